"""The sheet: every figure with its goal, what was expected, and what was measured on which card and when."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.goals import GOALS, Goal
from benchmarks.gpu.records import Records

NOT_YET = "not yet measured"
SHEET = Path(__file__).parents[1] / "gpu.md"
_HEAD = """# What one GPU reaches

Written by `make gpu` (`python -m benchmarks.gpu`), which drives the project's own code on one GPU in about
eight minutes and needs neither Ray, Prefect nor MLflow. Floors and goals are of one H100 in bfloat16 at
batch 128 unless a row says otherwise; what is expected was estimated by reading the code. A figure that was
not measured says so.
"""


def measurement(records: Records, earlier: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """What the sheet keeps of one run, and of an earlier one of the same card and versions what this has not."""
    card = torch.cuda.get_device_name(records.device) if records.cuda else "no GPU"
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}"
    found = {"card": card, "date": datetime.now(UTC).date().isoformat(), "versions": versions}
    figures, why = dict(records.figures), dict.fromkeys(records.failed, "failed")
    why |= {name: f"skipped, {reason}" for name, reason in records.skipped.items()}
    if earlier is not None and all(earlier[name] == found[name] for name in ("card", "versions")):
        figures = earlier["figures"] | figures
        why = earlier.get("why", {}) | why
    return {**found, "figures": figures, "why": {name: why[name] for name in why if name not in figures}}


def write(found: Mapping[str, Any] | None, path: Path = SHEET) -> None:
    """The sheet of one measurement, or of none."""
    figures: Mapping[str, float] = {} if found is None else found["figures"]
    why: Mapping[str, str] = {} if found is None else found.get("why", {})
    lines = [_HEAD]
    lines.append(
        "No GPU was measured so far."
        if found is None
        else f"Measured on {found['card']}, {found['date']}, {found['versions']}."
    )
    lines += ["", "| figure | floor | goal | expected | measured |", "|---|---|---|---|---|"]
    lines += [_row(goal, figures.get(goal.name), _reason(goal, why)) for goal in GOALS]
    path.write_text("\n".join(lines) + "\n")


def load(path: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads(path.read_text())
    return found


def _reason(goal: Goal, why: Mapping[str, str]) -> str:
    """Why a figure is not there, of itself or of its section."""
    said = why.get(goal.name) or why.get(goal.name.partition("/")[0])
    return NOT_YET if said is None else f"{NOT_YET}: {said}"


def _row(goal: Goal, value: float | None, missing: str) -> str:
    def shown(number: float | None) -> str:
        return "" if number is None else f"{number:,.4g} {goal.unit}".strip()

    measured = missing if value is None else shown(value)
    if value is not None and goal.floor is not None:
        below = value > goal.floor if goal.name.startswith("start/") else value < goal.floor
        measured += " (below the floor)" if below else ""
    expected = f"{goal.expected} {goal.unit}".strip() if goal.expected else ""
    return f"| {goal.what} | {shown(goal.floor)} | {shown(goal.goal)} | {expected} | {measured} |"
