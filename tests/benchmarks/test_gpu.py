"""`make gpu`: runs through at toy size without Ray, Prefect and MLflow, and its sheet hides nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from benchmarks.gpu import pack as packing
from benchmarks.gpu import sheet
from benchmarks.gpu.goals import GOALS
from benchmarks.gpu.kernels import summed
from benchmarks.gpu.records import Records

REPOSITORY = Path(__file__).parents[2]
WITHOUT = """
import os, runpy, sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("ray", "prefect", "mlflow"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

def leave(code, leave=os._exit):
    found = {name.split(".")[0] for name in sys.modules} & {"ray", "prefect", "mlflow"}
    print("loaded", found)
    leave(code or bool(found))

sys.meta_path.insert(0, Absent())
os._exit = leave
sys.argv = ["benchmarks.gpu", "--smoke", "--limit", "900", "--out", sys.argv[1]]
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


def test_a_figure_that_is_not_there_says_why(tmp_path: Path) -> None:
    why = {"training/xl": "skipped, needs 30 s, 4 left", "zero": "skipped, No module named 'deepspeed'"}
    sheet.write(found({}) | {"why": why}, tmp_path / "gpu.md")
    text = (tmp_path / "gpu.md").read_text()
    assert "| 480 to 560 images/s | not yet measured: skipped, needs 30 s, 4 left |" in text
    assert text.count("not yet measured: skipped, No module named 'deepspeed'") == 3, "all of a section's"


@pytest.fixture
def records(tmp_path: Path) -> Records:
    return Records(tmp_path, torch.device("cpu"), 100.0, small=False)


def test_what_has_no_time_is_skipped_by_name(records: Records) -> None:
    done: list[str] = []

    def section() -> None:
        records.attempt("section/short", lambda: done.append("short"), 1)
        records.attempt("section/long", lambda: done.append("long"), 40)

    records.section("section", section, 30)
    records.limit = 5.0
    records.section("late", section, 30)
    assert done == ["short"] and not records.failed
    assert set(records.skipped) == {"section/long", "late"}
    assert records.skipped["section/long"].startswith("needs 40 s, "), "of the 30 that it has"
    assert "needs 12 s" in records.skipped["late"]


def test_a_failure_is_a_record_and_what_is_missing_no_failure(records: Records, tmp_path: Path) -> None:
    def asks_for(name: str) -> None:
        raise ModuleNotFoundError(f"No module named {name!r}", name=name)

    records.attempt("broken", lambda: 1 // 0)
    records.attempt("foreign", lambda: asks_for("deepspeed.comm"))
    records.attempt("ours", lambda: asks_for("tasks.nothing"))
    records.attempt("after", lambda: records.figure("after", 1.0))
    assert records.failed == ["broken", "ours"] and records.figures == {"after": 1.0}
    assert records.skipped == {"foreign": "No module named 'deepspeed.comm'"}
    lines = [json.loads(line) for line in (tmp_path / "records.jsonl").read_text().splitlines()]
    assert any("ZeroDivisionError" in line.get("error", "") for line in lines)


def test_a_second_run_joins_the_first_on_the_same_card(records: Records) -> None:
    records.figures, records.failed = {"a": 1.0}, ["b"]
    records.skipped = {"c": "needs 9 s, 1 left"}
    first = sheet.measurement(records)
    assert first["why"] == {"b": "failed", "c": "skipped, needs 9 s, 1 left"}
    records.figures, records.failed, records.skipped = {"c": 3.0}, [], {}
    joined = sheet.measurement(records, first)
    assert joined["figures"] == {"a": 1.0, "c": 3.0} and joined["why"] == {"b": "failed"}
    elsewhere = sheet.measurement(records, first | {"card": "another"})
    assert elsewhere["figures"] == {"c": 3.0} and not elsewhere["why"]


def test_kernels_are_told_apart() -> None:
    spent = [
        ("void cutlass::Kernel2<sm90_gemm>", 3000.0), ("void cutlass::Kernel2<sm90_gemm>", 1000.0),
        ("triton_poi_fused_add_0", 500.0), ("cudnn_generated_fort_native_sdpa_sm90_flash_fprop", 700.0),
        ("Memcpy DtoD", 20.0), ("void at::native::multi_tensor_apply_kernel<FusedAdam>", 90.0),
        ("something", 10.0),
    ]  # fmt: skip
    found = summed(spent, steps=2)
    assert found["kinds"] == pytest.approx(
        {"products": 2.0, "compiled": 0.25, "attention": 0.35, "copies": 0.01, "optimizer": 0.045, "other": 0.005}
    )
    assert found["launches"] == 3.5
    assert found["longest"][0] == ("void cutlass::Kernel2<sm90_gemm>", 2.0, 1.0)


def test_a_pack_holds_code_data_and_what_wheels_came(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def done(command: list[str], environment: dict[str, str] | None = None) -> bool:
        place = next(part.partition("=")[2] for part in command if part.startswith(("--dest=", "--wheel-dir=")))
        name = command[-1].partition("==")[0]
        if name == "timm":
            return False
        (Path(place) / f"{name}-1.whl").write_bytes(b"")
        return True

    clothes = {name: np.zeros((3, *shape), np.uint8) for name, shape in
               {"train_x": (28, 28), "train_y": (), "t10k_x": (28, 28), "t10k_y": ()}.items()}  # fmt: skip
    monkeypatch.setattr(packing, "_done", done)
    monkeypatch.setattr(packing, "clothes", lambda: clothes)
    said = list(packing.pack(tmp_path / "pack"))
    assert (tmp_path / "pack/benchmarks/gpu/__main__.py").is_file()
    assert (tmp_path / "pack/tests/golden/flow.safetensors").is_file()
    assert not list((tmp_path / "pack").rglob("__pycache__"))
    assert np.load(tmp_path / "pack/benchmarks/gpu/fashion.npz")["train_x"].shape == (3, 28, 28)
    assert len(list((tmp_path / "pack/wheels").iterdir())) == len(packing.FROM_LOCK)
    assert any("no wheel came of timm==" in line for line in said)
    assert "--target site wheels/*.whl" in (tmp_path / "pack/RUN.md").read_text()


@pytest.mark.slow
def test_all_of_it_runs_on_a_cpu_without_what_only_clusters_need(tmp_path: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, str(tmp_path)], cwd=REPOSITORY, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-2000:]
    kept = json.loads((tmp_path / "measurement.json").read_text())
    only_gpus = {"training/xl_mfu", "training/xl_memory"}
    assert set(kept["figures"]) >= {goal.name for goal in GOALS} - only_gpus
    assert not kept["why"] and "loaded set()" in done.stdout
    assert kept["figures"]["golden/fp32"] < 1
    assert kept["figures"]["stability/twice"] == 0, "a CPU computes the same bits"
    assert kept["figures"]["stability/resumed"] == 0
    assert (tmp_path / "fashion.png").is_file()
