"""What one stage does, in numbers that no cluster changes, and what the formulas of all stages share.

The formulas follow the stages' code; docs/scale.md explains those of requests.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from tasks.plan.memory import Memory

REREAD = 1.1
"""Row groups a loader reads for each one it serves, over all workers (docs/scale.md)."""
MANIFEST_AND_RUN = 2
"""Files that every stage writes beside its own."""
NETWORKS = "formula: tasks/plan/networks.py"
SIZES = "formula: tasks/plan/sizes.py"
REQUESTS = "formula: docs/scale.md"


@dataclass(frozen=True)
class Figure:
    """A number in base units (images, bytes, requests, FLOPs, hours, seconds, dollars)."""

    value: float
    source: str


@dataclass(frozen=True)
class Work:
    """One stage. Figures that people see have sources; the others only lead to time."""

    stage: str
    pool: Literal["decode", "infer", "train", "head"]
    rows: Figure
    written: Figure
    """Bytes of the artifact (and of side artifacts)."""
    reads: Figure
    writes: Figure
    """Requests to storage."""
    flops: Figure
    read: float = 0.0
    """Bytes from storage."""
    beside: float = 0.0
    """Bytes that lie beside the artifact only while the stage runs, at most."""
    decodes: float = 0.0
    """Images decoded on CPUs: of the decode pool, or of training workers."""
    decoded_share: float = 1.0
    """Of the images; what is computed of the others has no decoding beside it."""
    image_bytes: float = 0.0
    """Of one encoded image."""
    precision: Literal["bf16", "tf32", "fp32"] = "fp32"
    workers: int = 1
    gpus: float = 0.0
    """Of each worker or actor."""
    cpus: float = 1.0
    """The same."""
    alone: float = 0.0
    """FLOPs that one worker does while the others wait; of a training without images an actor, where actors have GPUs,
    or else the flow's own process."""
    alone_decodes: float = 0.0
    held: float = 0.0
    """Bytes in the memory of the flow's own process."""
    memory: Memory | None = None
    """Of one GPU that one worker has; of a stage that uses one."""
    notes: tuple[str, ...] = field(default=())
