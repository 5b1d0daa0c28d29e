"""The notebook runs from its first cell to its last, without a server, and draws what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from flows import share
from tests.flows.test_share import made

NOTEBOOK = Path(__file__).parents[2] / "docs" / "a_model.ipynb"


def test_every_cell_runs_in_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = made(tmp_path, "demo_tiny")
    monkeypatch.setenv("LATENTFORGE_EXPORT", share.export(run, str(tmp_path / "model"), "demo"))
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not [cell for cell in cells if cell.get("outputs")], "outputs are not kept"
    found: dict[str, Any] = {}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            exec(compile("".join(cell["source"]), f"cell {number}", "exec"), found)
    assert found["classes"][0] == "hoop" and len(found["labels"]) == 5
    assert found["sheet"].width > found["sheet"].height > 0
    one, _, three = found["rows"]
    assert one.shape == three.shape and not np.array_equal(one, three), "guidance changes images"
    assert set(found["far"]) == {2, 4, 8} and found["far"][2] > 0


def test_pages_name_variables_that_are_read() -> None:
    """Every variable of ours on the page is in the code, and the other way round."""
    root = NOTEBOOK.parents[1]
    page = (root / "docs" / "environment.md").read_text()
    code = "".join(path.read_text() for folder in ("infra", "flows", "tasks") for path in (root / folder).rglob("*.py"))
    for name in ("HOME", "ROOT", "LOGS", "FASHION_MNIST"):
        assert f"`LATENTFORGE_{name}`" in page and f"LATENTFORGE_{name}" in code
