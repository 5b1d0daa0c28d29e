"""What all sections of a recipe have in common, and the types of their fields.

Every section is frozen and rejects unknown keys. A stage's fingerprint hashes the sections it reads, so a
field belongs in the section of the stage whose *output* it changes; what only changes speed or place
(workers, batch splits, accelerators) lives in `configs/compute.py`, which no fingerprint reads.
Progress is counted in images everywhere.

A field that is added to a section would give every artifact a new name and have it made anew. So it says which
value is what the code did before there was the field, and stays out of fingerprints while it holds that::

    direction_floor: Annotated[float, Field(gt=0), Added(before=1.0)] = 1e-8

`before` need not be the default: a recipe that says nothing gets the default, and where that is another value its
artifacts are made anew. Manifests and `show` hold all values of a recipe, fingerprints (:func:`fingerprinted`) those
that name its artifacts; :func:`recorded` reads back either, also where it is older than a field.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal, Optional, TypeVar

from pydantic import BaseModel, ConfigDict, Field

M = TypeVar("M", bound=BaseModel)
T = TypeVar("T")

if TYPE_CHECKING:
    LeftOut = Annotated[T, "may be left out"]
else:
    LeftOut = Optional
"""A field that is None where nothing reads it. To type checkers it is there: whoever reads it runs only after a check
that it is (a section's own rules, or the preflight of a flow for the sections of its stages)."""
NOTHING: Any = None
"""The default of such a field."""


class Section(BaseModel):
    """Base of all sections: immutable, strict about keys and about types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


@dataclass(frozen=True)
class Added:
    """Marks a field that came after artifacts had been made: without it they were as if it held `before`."""

    before: Any


def fingerprinted(section: BaseModel) -> dict[str, Any]:
    """The plain JSON values of a section that name what is made of it."""
    return _without(section, section.model_dump(mode="json"))


def recorded(section: M) -> M:
    """What a manifest recorded, read as it was meant: an added field that it does not give held `before`.

    section: made from the manifest's values, full or as they name an artifact.
    """
    changes: dict[str, Any] = {name: _recorded(value) for name, value in _values(section)}
    changes |= {n: a.before for n, a in _added(section).items() if n not in section.model_fields_set}
    return section.model_copy(update=changes)


def _added(section: BaseModel) -> dict[str, Added]:
    fields = type(section).model_fields.items()
    return {name: mark for name, field in fields for mark in field.metadata if isinstance(mark, Added)}


def _values(section: BaseModel) -> Iterator[tuple[str, Any]]:
    return ((name, getattr(section, name)) for name in type(section).model_fields)


def _without(value: Any, plain: Any) -> Any:
    """`plain`, the JSON of `value`, without the added fields that hold what they held before."""
    match value:
        case BaseModel():
            added = _added(value)
            return {
                name: _without(each, plain[name])
                for name, each in _values(value)
                if name not in added or each != added[name].before
            }
        case tuple():
            return [_without(each, its) for each, its in zip(value, plain, strict=True)]
    return plain


def _recorded(value: Any) -> Any:
    match value:
        case BaseModel():
            return recorded(value)
        case tuple():
            return tuple(_recorded(each) for each in value)
    return value


Positive = Annotated[int, Field(gt=0)]
Seed = Annotated[int, Field(ge=0, lt=2**63)]
"""Where random numbers begin. All integers outside of this range would share the numbers of one."""
Precision = Literal["fp32", "tf32", "bf16"]
"""Of networks' arithmetic: float32 throughout, float32 whose products and convolutions tensor cores round to TF32 (on a
CPU the same as `fp32`), or bfloat16 by autocast. Weights are float32 in any case."""
Share = Annotated[float, Field(ge=0.0, le=1.0)]
Weight = Annotated[float, Field(ge=0.0)]
SigmaRel = Annotated[float, Field(gt=0.0, lt=0.288)]
"""Width of an average with a power profile, relative to the training so far (Karras et al. 2024)."""
