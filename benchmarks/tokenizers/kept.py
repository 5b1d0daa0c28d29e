"""Trainings and figures that are made once and kept in a folder, so that a command goes on where it was stopped."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch.distributed as dist

from benchmarks.tokenizers.trials import Memory, Trial
from infra.artifacts import Artifact
from tasks.stage import Stage

BEGIN, END = "<!-- figures of {} -->", "<!-- end of figures -->"


def trained(stage: Stage, trial: Trial, memory: Memory, **inputs: str) -> Artifact:
    """The stage's artifact; says how many processor seconds it took, where it was not there."""
    began = time.process_time()
    made = trial.train(stage, memory, **inputs)
    _say(f"{stage.name} {trial.data} {trial.variant} {trial.seed}", began)
    return made


def kept(folder: Path, name: str, score: Callable[[], dict[str, float]]) -> dict[str, float]:
    """What `score` gives, made once."""
    file = folder / "scores" / f"{name}.json"
    if not file.exists():
        began = time.process_time()
        found = score()
        file.parent.mkdir(exist_ok=True)
        file.write_text(json.dumps(found))
        _say(name, began)
    figures: dict[str, float] = json.loads(file.read_text())
    return figures


def _say(what: str, began: float) -> None:
    spent = time.process_time() - began
    if spent > 1:
        print(f"{what}: {spent:.0f} s", flush=True)


def write_between_marks(page: Path, command: str, text: str) -> None:
    """Put text over the part of a page that a command made before."""
    before, rest = page.read_text().split(BEGIN.format(command))
    after = rest.split(END, 1)[1]
    page.write_text(f"{before}{BEGIN.format(command)}\n\n{text}\n{END}{after}")


@contextmanager
def alone() -> Iterator[None]:
    """The process group of one that the loop asks for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()
