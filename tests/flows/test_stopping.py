"""Ctrl-C in a real terminal: back in seconds, one line, cancelled in Prefect and MLflow, nothing left running."""

from __future__ import annotations

import os
import pty
import re
import select
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import pytest

from tests.flows.conftest import REPOSITORY, Workplace

_LIMIT = 600.0
_BACK = 30.0
"""Seconds after which a command counts as not back: it promises 10, and other processes may share its cores."""
_ESCAPES = re.compile(r"\x1b\[[0-9;?]*[a-zA-Z]")


@dataclass(frozen=True)
class Ended:
    """How a command in a terminal ended after it was told to stop."""

    status: int
    seconds: float
    lines: list[str]
    """What it said after the signal, but for bars."""
    left: list[str]
    """Command lines of its processes that are still there."""


def stopped(
    arguments: list[str], environment: Mapping[str, str], begun: Callable[[], bool], number: int | None = None
) -> Ended:
    """Run the command in a terminal of its own, and stop it once it has begun: by Ctrl-C, or by this signal."""
    mark = f"latentforge-test-{os.getpid()}-{time.monotonic_ns()}"
    process, terminal = pty.fork()
    if process == 0:
        os.chdir(REPOSITORY)
        os.execve(
            sys.executable,
            [sys.executable, "-m", "flows", *arguments],
            {**os.environ, **environment, "LATENTFORGE_TEST_MARK": mark},
        )
    said, told, deadline = b"", 0.0, time.monotonic() + _LIMIT
    seen, gone, status = 0, 0, 0
    while not gone:
        ready, _, _ = select.select([terminal], [], [], 0.1)
        if ready:
            try:
                fresh = os.read(terminal, 65536)
            except OSError:  # the last of its processes has closed the terminal
                fresh = b""
            said += fresh
        if not told and begun():
            if number is None:
                os.write(terminal, b"\x03")
            else:
                os.kill(process, number)
            told, seen = time.monotonic(), len(said)
        if time.monotonic() > deadline or (told and time.monotonic() - told > _BACK):
            os.kill(process, signal.SIGKILL)
        gone, status = os.waitpid(process, os.WNOHANG)
    seconds = time.monotonic() - told
    said += _rest(terminal)
    os.close(terminal)
    text = _ESCAPES.sub("", said[seen:].decode(errors="replace")).replace("\r", "\n")
    lines = [line.strip() for line in text.splitlines() if line.strip() and "━" not in line]
    assert told, said[-3000:].decode(errors="replace")
    left = _left(mark, 60.0 if number == signal.SIGKILL else 10.0)
    return Ended(os.waitstatus_to_exitcode(status), seconds, lines, left)


def _rest(terminal: int) -> bytes:
    """What lies in the terminal still."""
    found = b""
    while select.select([terminal], [], [], 0.2)[0]:
        try:
            fresh = os.read(terminal, 65536)
        except OSError:
            break
        if not fresh:
            break
        found += fresh
    return found


def _left(mark: str, seconds: float) -> list[str]:
    """Processes with this mark in their environment, so many seconds later."""
    found: list[str] = []
    for _ in range(int(5 * seconds)):
        found = []
        for folder in Path("/proc").iterdir():
            try:
                if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                    found.append((folder / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace"))
            except OSError:
                continue
        if not found:
            break
        time.sleep(0.2)
    return found


def _states(place: Workplace) -> list[list[str]]:
    """Of each flow run, the newest first: its state in Prefect and the statuses of its runs in MLflow."""
    code = (
        "from prefect.client.orchestration import get_client\n"
        "from prefect.client.schemas.sorting import FlowRunSort\n"
        "with get_client(sync_client=True) as client:\n"
        "    flow_runs = client.read_flow_runs(sort=FlowRunSort.START_TIME_DESC, limit=3)\n"
        "from mlflow import MlflowClient\n"
        "client = MlflowClient()\n"
        "experiments = [each.experiment_id for each in client.search_experiments()]\n"
        "for found in flow_runs:\n"
        "    runs = client.search_runs(experiments, f\"tags.prefect_flow_run = '{found.id}'\")\n"
        "    print('state', found.state.name, *sorted({run.info.status for run in runs}))\n"
    )
    environment = {**os.environ, **place.environment}
    environment.setdefault("MLFLOW_TRACKING_URI", f"sqlite:///{place.home / 'mlflow.db'}")
    environment["PREFECT_SERVER_ALLOW_EPHEMERAL_MODE"] = "true"
    command = [sys.executable, "-c", f"import flows\n{code}"]
    done = subprocess.run(command, cwd=REPOSITORY, env=environment, capture_output=True, text=True, check=True)
    return [line.split()[1:] for line in done.stdout.splitlines() if line.startswith("state ")]


def _has(place: Workplace, pattern: str) -> Callable[[], bool]:
    return lambda: any(Path(place.root).glob(pattern))


def _check(ended: Ended, place: Workplace, number: int = signal.SIGINT) -> None:
    print(ended)  # for the table in docs/operations.md: pytest -rP
    assert ended.status == 128 + number
    assert ended.seconds < _BACK
    said = [line for line in ended.lines if line != "^C"]
    assert len(said) == 1 and re.fullmatch(r"(\^C)?stopped.*; the same command( without --\w+)* goes on", said[0]), said
    assert not ended.left
    assert _states(place)[0] == ["Cancelled", "KILLED"]


def _arguments(place: Workplace, *further: str) -> list[str]:
    return ["run", "sfd-full", "--recipe", "demo_tiny", "--root", place.root, *further]


def test_a_stopped_command_with_servers_is_back_and_cancelled(finished: Workplace) -> None:
    """`sample` of the finished workplace, with more steps than anybody waits for."""
    arguments = _arguments(finished, "--set", "sample.steps=100000", "--only", "sample")
    ended = stopped(arguments, finished.environment, _new(finished, "sample/*/run.json"))
    _check(ended, finished)


def _new(place: Workplace, pattern: str) -> Callable[[], bool]:
    before = set(Path(place.root).glob(pattern))
    return lambda: bool(set(Path(place.root).glob(pattern)) - before)


@pytest.mark.slow
def test_sampling_without_servers_stops_alike(finished: Workplace, alone: Workplace) -> None:
    place = replace(alone, root=finished.root)
    arguments = _arguments(place, "--set", "sample.steps=100001", "--only", "sample")
    _check(stopped(arguments, place.environment, _new(place, "sample/*/run.json")), place)


@pytest.mark.slow
@pytest.mark.parametrize(("served", "number"), [(False, None), (False, signal.SIGTERM), (True, None)])
def test_nothing_stays_behind(
    finished: Workplace, alone: Workplace, tmp_path: Path, served: bool, number: int | None
) -> None:
    """`shard`, then `train_dit` on what is there, which saves before it leaves and goes on where it was."""
    place = replace(finished if served else alone, root=alone.root)
    begun = _has(place, "shard/*/run.json")
    _check(stopped(_arguments(place), place.environment, begun, number), place, number or signal.SIGINT)
    place = replace(place, root=str(tmp_path / "artifacts"))
    shutil.copytree(finished.undisturbed, place.root)
    long = _arguments(place, "--only", "train_dit", "--set", "train_dit.images=4000000")
    begun = _has(place, "train_dit/*/checkpoints/00000000001*")
    ended = stopped(long, place.environment, begun, number)
    _check(ended, place, number or signal.SIGINT)
    (saved,) = re.findall(r"stopped at ([\d,]+) images", ended.lines[-1])
    newest = max(int(path.name) for path in Path(place.root).glob("train_dit/*/checkpoints/*"))
    assert int(saved.replace(",", "")) == newest >= 1


@pytest.mark.slow
def test_what_a_killed_command_leaves_is_closed_by_the_next(alone: Workplace) -> None:
    """No server that is there all the time saw it die; its own ends by itself. The stage goes on in its run."""
    arguments = _arguments(alone, "--only", "shard")
    ended = stopped(arguments, alone.environment, _has(alone, "shard/*/run.json"), signal.SIGKILL)
    assert ended.status == -signal.SIGKILL and not ended.left, ended
    alone.flows(*arguments)
    assert _states(alone)[:2] == [["Completed", "FINISHED"], ["Crashed", "FAILED", "FINISHED"]]
