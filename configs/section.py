"""What all sections of a recipe have in common, and the types of their fields.

Every section is frozen and rejects unknown keys. A stage's fingerprint hashes the sections it reads, so a
field belongs in the section of the stage whose *output* it changes; what only changes speed or place
(workers, batch splits, accelerators) lives in `configs/compute.py`, which no fingerprint reads.
Progress is counted in images everywhere.
"""

from __future__ import annotations

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class Section(BaseModel):
    """Base of all sections: immutable, strict about keys and about types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


Positive = Annotated[int, Field(gt=0)]
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
SigmaRel = Annotated[float, Field(gt=0.0, lt=0.288)]
"""Width of an average with a power profile, relative to the training so far (Karras et al. 2024)."""
