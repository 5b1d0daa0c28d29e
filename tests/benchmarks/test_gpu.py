"""`make gpu`: runs through at toy size without Ray, Prefect and MLflow, and its sheet hides nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.gpu import sheet
from benchmarks.gpu.goals import GOALS

REPOSITORY = Path(__file__).parents[2]
WITHOUT = """
import runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "prefect", "mlflow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
sys.argv = ["benchmarks.gpu", "--smoke", "--limit", "550", "--out", sys.argv[1]]
runpy.run_module("benchmarks.gpu", run_name="__main__")
"""


def found(figures: dict[str, float]) -> dict[str, object]:
    return {"card": "a card", "date": "2026-01-01", "versions": "torch 1", "figures": figures}


def test_the_sheet_that_is_there_has_every_figure(tmp_path: Path) -> None:
    rows = [line for line in sheet.SHEET.read_text().splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0].removeprefix("| ") for row in rows] == [goal.what for goal in GOALS]
    if "No GPU was measured" in sheet.SHEET.read_text():
        sheet.write(None, tmp_path / "none.md")
        assert (tmp_path / "none.md").read_text() == sheet.SHEET.read_text(), "python -m benchmarks.gpu --sheet none"
        assert all(row.endswith(f"| {sheet.NOT_YET} |") for row in rows)


def test_a_figure_says_where_it_stands(tmp_path: Path) -> None:
    sheet.write(found({"training/xl": 390.0, "training/b": 2400.0, "start/first_step": 70.0}), tmp_path / "gpu.md")
    text = (tmp_path / "gpu.md").read_text()
    assert "Measured on a card, 2026-01-01, torch 1." in text
    assert "| 400 images/s | 550 images/s | 480 to 560 images/s | 390 images/s (below the floor) |" in text
    assert "| 1,800 images/s | 2,300 images/s |  | 2,400 images/s |" in text
    assert "| 60 s | 20 s |  | 70 s (below the floor) |" in text, "here less is better"
    assert text.count(sheet.NOT_YET) == len(GOALS) - 3


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu_without_what_only_clusters_need(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    kept = json.loads((tmp_path / "measurement.json").read_text())
    only_gpus = {"training/xl_mfu", "training/xl_memory"}
    assert set(kept["figures"]) >= {goal.name for goal in GOALS} - only_gpus
    assert kept["figures"]["golden/fp32"] < 1
    assert kept["figures"]["stability/twice"] == 0, "a CPU computes the same bits"
