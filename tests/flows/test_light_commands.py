"""Commands that read recipes answer at once: they import no library that computes, stores or orchestrates."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
HEAVY = {"torch", "ray", "prefect", "mlflow", "deepspeed", "timm", "diffusers", "pandas", "pyarrow", "s3fs"}
PLAN = ("plan", "sfd-full", "--recipe", "sfd_xl_80ep", "--cluster", "aws", "--images", "1000")
PIXELS = ("plan", "lowdiff-full", "--recipe", "lowdiff_cifar10", "--images", "1000")
UNKNOWN_RECIPE = ("run", "sfd-full", "--recipe", "nosuch")
IMPOSSIBLE_VALUE = ("sweep", "--set", "train_dit.images=-1", "--over", "sample.steps=2,3")


@pytest.mark.parametrize(
    ("command", "status"),
    [
        (("--help",), 0),
        (("recipes",), 0),
        (("show", "--recipe", "sfd_xl_80ep"), 0),
        (PLAN, 0),
        (PIXELS, 0),
        (UNKNOWN_RECIPE, 1),
        (IMPOSSIBLE_VALUE, 1),
    ],
    ids=lambda value: " ".join(value[:2]) if isinstance(value, tuple) else "",
)
def test_light_commands_import_nothing_heavy(command: tuple[str, ...], status: int) -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "flows", *command],
        cwd=REPOSITORY,
        env={**os.environ, "COLUMNS": "200"},
        capture_output=True,
        text=True,
    )
    assert done.returncode == status, done.stderr[-2000:]
    imported = set(re.findall(r"^import time:.*\| +(\S+)$", done.stderr, flags=re.M))
    assert "flows.plan" in imported, "the list of imports is not what this test thinks"
    assert not imported & HEAVY
