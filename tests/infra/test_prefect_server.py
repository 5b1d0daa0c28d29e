"""The server of a command: two first commands at once, and no server without its command."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
_FIRST_USE = """
import flows, os, sys, time
from infra import open_runs, prefect_server, tracking

open_runs.close_abandoned()
prefect_server.start()
tracking.start_run("first use", "a run", {}).finish()
print(os.environ["PREFECT_API_URL"], flush=True)
sys.stdin.read()
"""


def _servers(mark: str) -> list[int]:
    found = []
    for folder in Path("/proc").iterdir():
        try:
            if folder.name.isdigit() and mark.encode() in (folder / "environ").read_bytes():
                found += [int(folder.name)] if b"infra.prefect_server" in (folder / "cmdline").read_bytes() else []
        except OSError:
            continue
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_two_first_commands_in_a_new_home_and_no_server_without_its_command(tmp_path: Path) -> None:
    environment = {**os.environ, "LATENTFORGE_HOME": str(tmp_path / "home")}
    for name in ("PREFECT_API_URL", "PREFECT_HOME", "MLFLOW_TRACKING_URI"):
        environment.pop(name, None)
    commands = [
        subprocess.Popen(
            [sys.executable, "-c", _FIRST_USE],
            cwd=REPOSITORY,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )
        for _ in range(2)
    ]
    urls = []
    for command in commands:
        assert command.stdout is not None
        lines = iter(command.stdout.readline, "")
        urls.append(next(line for line in lines if line.startswith("http")))  # the other line may tell of waiting
    assert len(set(urls)) == 2
    mark = f"LATENTFORGE_HOME={tmp_path / 'home'}\0"
    servers = _servers(mark)
    assert len(servers) == 2
    assert {os.getpgid(server) for server in servers}.isdisjoint({os.getpgid(each.pid) for each in commands})

    os.kill(commands[0].pid, signal.SIGKILL)
    commands[0].communicate()
    commands[1].communicate("")
    assert commands[1].returncode == 0
    deadline = time.monotonic() + 60
    while _servers(mark) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not _servers(mark)
