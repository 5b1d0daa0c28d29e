"""What shells, homes and networks bring along, through the whole command: one line that names it, before anything
starts. `pytest -m slow -rP` on this file prints the table of docs/environment.md anew."""

from __future__ import annotations

import os
import resource
import socket
import sqlite3
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import closing
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
SECONDS = 15.0
"""Within which a person is to know."""
PROXIES = ("http_proxy", "https_proxy", "HTTP_PROXY", "HTTPS_PROXY")


def _newer(folder: Path, name: str) -> Path:
    """A database that a newer version of its program has used."""
    folder.mkdir()
    with closing(sqlite3.connect(folder / name)) as base:
        base.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        base.execute("INSERT INTO alembic_version VALUES ('ffffffffffff')")
        base.commit()
    return folder


def _deep(folder: Path) -> Path:
    folder.mkdir()
    return folder


CASES: dict[str, Callable[[str, Path], dict[str, str]]] = {
    "RAY_ADDRESS of a dead cluster": lambda dead, _: {"RAY_ADDRESS": dead},
    "RAY_ADDRESS auto, no cluster": lambda _, folder: {"RAY_ADDRESS": "auto", "RAY_TMPDIR": str(folder)},
    "RAY_ADDRESS with http://": lambda dead, _: {"RAY_ADDRESS": f"http://{dead}"},
    "PREFECT_API_URL of a dead server": lambda dead, _: {"PREFECT_API_URL": f"http://{dead}/api"},
    "MLFLOW_TRACKING_URI of a dead server": lambda dead, _: {"MLFLOW_TRACKING_URI": f"http://{dead}"},
    "MLFLOW_TRACKING_URI of a folder": lambda _, folder: {"MLFLOW_TRACKING_URI": str(folder / "mlruns")},
    "PREFECT_HOME of a newer Prefect": lambda _, folder: {"PREFECT_HOME": str(_newer(folder / "new", "prefect.db"))},
    "MLFLOW_TRACKING_URI of a newer MLflow": lambda _, folder: {
        "MLFLOW_TRACKING_URI": f"sqlite:///{_newer(folder / 'new', 'mlflow.db')}/mlflow.db"
    },
    "http_proxy dead, data to fetch": lambda dead, _: dict.fromkeys(PROXIES, f"http://{dead}"),
    "TMPDIR too long for sockets": lambda _, folder: {"TMPDIR": str(_deep(folder / ("scratch_of_the_job" * 3)))},
    "LATENTFORGE_HOME that cannot be made": lambda *_: {"LATENTFORGE_HOME": "/proc/version/home"},
}
"""What is wrong, by variable, and the variables that make it so, given a dead address and a folder."""


@pytest.mark.slow
@pytest.mark.parametrize("case", CASES)
def test_one_line_names_what_to_mend(case: str, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        dead = f"127.0.0.1:{listener.getsockname()[1]}"
    ours = ("RAY_", "PREFECT_", "MLFLOW_", "LATENTFORGE_")
    plain = {
        name: value for name, value in os.environ.items() if not name.startswith(ours) and "proxy" not in name.lower()
    }
    given = plain | {"LATENTFORGE_HOME": str(tmp_path / "home"), "OMP_NUM_THREADS": "1"} | CASES[case](dead, tmp_path)
    command = [sys.executable, "-m", "latentforge", "run", "sfd-full", "--recipe", "demo_tiny", "--only", "shard"]
    began, before = time.monotonic(), resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [*command, "--root", str(tmp_path / "root")],
        cwd=REPOSITORY, env=given, capture_output=True, text=True, check=False,
    )  # fmt: skip
    after, wall = resource.getrusage(resource.RUSAGE_CHILDREN), time.monotonic() - began
    spent = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    lines = (done.stdout + done.stderr).splitlines()
    print(f"| {case} | {spent:.1f} | {len(lines)} | {wall:.1f} s by the clock")
    assert done.returncode == 1 and len(lines) == 1, done.stdout + done.stderr
    assert lines[0].startswith("error: ") and case.split()[0] in lines[0]
    assert spent < SECONDS, "of a processor; nothing here waits for an answer"
