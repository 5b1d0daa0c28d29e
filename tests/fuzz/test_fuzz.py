"""Files of other people's making, damaged: a refusal in words, within ten seconds, in bounded memory, nothing else."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from infra.storage import Storage
from tests.fuzz.attack import MEMORY, attacked, read
from tests.fuzz.targets import TARGETS, Target

REPOSITORY = Path(__file__).parents[2]
KEPT = Path(__file__).parent / "kept"
FEW, MANY = 16, 1050
SEED = 2026


@pytest.mark.parametrize("name", TARGETS)
def test_a_few_damaged_files_of_each_kind_are_refused_in_words(name: str) -> None:
    assert attacked(name, FEW, SEED) == []


@pytest.mark.parametrize("path", sorted(KEPT.iterdir()), ids=lambda path: path.name)
def test_what_was_found_once_stays_mended(path: Path, tmp_path: Path) -> None:
    """Each file did once end in a traceback, without end, or in gigabytes."""
    assert read(path.name.partition("--")[0], path.read_bytes(), tmp_path) == ""


@pytest.mark.slow
@pytest.mark.parametrize("name", TARGETS)
def test_a_thousand_damaged_files_of_each_kind_are_refused_in_words(name: str, tmp_path: Path) -> None:
    """In a process of its own, whose end (a crash below Python, a hang in it) is no end of the tests."""
    assert MANY * len(TARGETS) >= 20_000
    command = [sys.executable, "-m", "tests.fuzz.attack", name, f"--count={MANY}", f"--seed={SEED}"]
    environment = {**os.environ, "LATENTFORGE_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [*command, f"--keep={tmp_path}"], cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=False,
        timeout=600,
    )  # fmt: skip
    assert done.returncode == 0, f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}\ninputs are in {tmp_path}"


def _spins(path: Path) -> None:
    while True:
        pass


_HELD: list[bytes] = []
_WRONG: dict[str, Callable[[Path], object]] = {
    "ZeroDivisionError: integer": lambda path: 1 // 0,
    "MiB": lambda path: _HELD.append(b"x" * (MEMORY + (64 << 20))),
    "outside its folder": lambda path: (path.parent.parent / "up").write_bytes(b"x"),
    "took more than": _spins,
    "refused in": lambda path: Storage.at("http://user:password@host" + "x" * 20_000),
}


@pytest.mark.parametrize("told", _WRONG)
def test_the_attack_finds_what_it_looks_for(told: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Or nothing that it says means anything."""
    monkeypatch.setattr("tests.fuzz.attack.SECONDS", 1.0)
    monkeypatch.setattr("tests.fuzz.attack._LONGEST", 50)
    monkeypatch.setitem(TARGETS, "toy", Target(".bin", lambda: [b"abc"], _WRONG[told]))
    found = attacked("toy", 1, 0)
    _HELD.clear()
    assert told in found[-1]
