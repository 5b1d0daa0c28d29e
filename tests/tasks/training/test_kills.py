"""SIGKILL at random moments: of workers of a toy training, of a stage's driver, and of its whole Ray cluster."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import psutil
import pytest

from tasks.networks import EMA_WEIGHTS, WEIGHTS
from tasks.train_dit import STAGE
from tests.helpers.builders import at, context
from tests.helpers.run_stage import recipe
from tests.helpers.toy_training import result, same
from tests.tasks.training.test_killed_worker import put_latents

KILLS = 20
ROOT = Path(__file__).parents[3]


def test_workers_killed_at_random_moments_leave_no_trace(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.helpers.killed_toys", str(tmp_path), str(KILLS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) == KILLS
    undisturbed = result(tmp_path, "undisturbed")
    disturbed = sorted(tmp_path.glob("disturbed*.safetensors"))
    assert disturbed
    for path in disturbed:
        assert same(result(tmp_path, path.stem), undisturbed), path.stem
    assert "going on from the checkpoint" in (tmp_path / "said.txt").read_text()


@pytest.fixture
def processes() -> Iterator[list[psutil.Process]]:
    """Everything that was started, ended with the test."""
    found: list[psutil.Process] = []
    yield found
    _end(found)


@pytest.mark.slow  # four Rays; a killed worker of the real stage is in test_killed_worker
def test_a_killed_driver_and_a_killed_cluster_leave_no_trace(tmp_path: Path, processes: list[psutil.Process]) -> None:
    roots = {name: at(tmp_path / name) for name in ("undisturbed", "disturbed")}
    for root in roots.values():
        put_latents(root, recipe())
    chance = random.Random(3)

    driver = _start(roots["disturbed"], processes)
    _await_checkpoint(tmp_path / "disturbed", driver, later_than=0)
    time.sleep(chance.uniform(0.0, 0.5))
    processes += driver.children(recursive=True)
    driver.kill()
    driver.wait(60)

    driver = _start(roots["disturbed"], processes)
    _await_checkpoint(tmp_path / "disturbed", driver, later_than=640)
    time.sleep(chance.uniform(0.0, 0.5))
    _end([driver, *driver.children(recursive=True)])

    for root in ("disturbed", "undisturbed"):
        assert _start(roots[root], processes).wait(600) == 0, root
    finished = [context(root, recipe(), STAGE, "encode").out for root in roots.values()]
    for name in (WEIGHTS, EMA_WEIGHTS):
        one, other = (out.read_bytes(name) for out in finished)
        assert one == other, name


def _start(root: str, processes: list[psutil.Process]) -> psutil.Popen:
    environment = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
    started = psutil.Popen([sys.executable, "-m", "tests.helpers.run_stage", root], cwd=ROOT, env=environment)
    processes.append(started)
    return started


def _await_checkpoint(root: Path, driver: psutil.Popen, later_than: int) -> None:
    deadline = time.monotonic() + 300
    while time.monotonic() < deadline:
        assert driver.poll() is None, "the stage ended before it could be killed"
        if any(int(path.parent.name) > later_than for path in root.glob("train_dit/*/checkpoints/*/complete.json")):
            return
        time.sleep(0.01)
    raise AssertionError("no checkpoint in time")


def _end(processes: list[psutil.Process]) -> None:
    for process in processes:
        if process.is_running():
            process.send_signal(signal.SIGKILL)
    psutil.wait_procs(processes, timeout=60)
