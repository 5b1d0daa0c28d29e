"""Several Ray nodes for tests: the other end of `tests.helpers.ray_nodes`, and what its Jobs API knows."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import psutil

from tests.conftest import free_port
from tests.flows.conftest import REPOSITORY


@dataclass(frozen=True)
class RayNodes:
    """A running cluster; its Jobs API is on loopback, behind a token."""

    environment: Mapping[str, str]
    """What reaches it: address of the Jobs API and file of the token."""
    process: subprocess.Popen[str]

    def ask(self, verb: str, argument: Any = True) -> Any:
        assert self.process.stdin and self.process.stdout
        print(json.dumps({verb: argument}), file=self.process.stdin, flush=True)
        return json.loads(self.process.stdout.readline())[verb]

    def add(self, **resources: Any) -> str:
        """A node; its id."""
        return str(self.ask("add", resources))

    def kill(self, node: str) -> None:
        """SIGKILL to every process of a node."""
        self.ask("kill", node)

    def holding(self, name: str) -> list[str]:
        """Nodes with a worker whose title has this in it, such as an actor's class."""
        return list(self.ask("holding", name))

    def warn(self, node: str, seconds: float) -> None:
        """Notice that a node will be gone in so many seconds; it is still there then."""
        self.ask("warn", {"node": node, "seconds": seconds})

    def jobs(self) -> dict[str, Any]:
        """Every job that was ever submitted, by its id."""
        return {job["submission_id"]: job for job in self._get("jobs/") if job["submission_id"]}

    def running(self) -> list[str]:
        return [name for name, job in self.jobs().items() if job["status"] in ("PENDING", "RUNNING")]

    def log(self, job: str) -> str:
        return str(self._get(f"jobs/{job}/logs")["logs"])

    def drivers(self) -> list[int]:
        """Processes of stages' drivers that are alive under this cluster."""
        found = []
        for child in psutil.Process(self.process.pid).children(recursive=True):
            try:
                if "tasks.job" in child.cmdline() and child.status() != psutil.STATUS_ZOMBIE:
                    found.append(child.pid)
            except psutil.Error:
                continue
        return found

    def _get(self, path: str) -> Any:
        import requests

        token = Path(self.environment["RAY_AUTH_TOKEN_PATH"]).read_text()
        url = f"{self.environment['RAY_API_SERVER_ADDRESS']}/api/{path}"
        answer = requests.get(url, headers={"Authorization": f"Bearer {token}"}, timeout=60)
        answer.raise_for_status()
        return answer.json()


@contextmanager
def ray_nodes(
    environment: Mapping[str, str], head_cpus: int = 0, pools: Mapping[str, Mapping[str, float]] | None = None
) -> Iterator[RayNodes]:
    """A cluster of one head until the context ends. Its machines' environment is this one's and `environment`.

    pools: resources and `most` nodes by name, of what Ray's autoscaler starts on demand.
    """
    folder = Path(tempfile.mkdtemp(prefix="lf-"))  # a short path: sockets lie under it
    token = folder / "token"
    token.write_text(uuid.uuid4().hex * 2)
    port = free_port()
    reach = {"RAY_API_SERVER_ADDRESS": f"http://127.0.0.1:{port}", "RAY_AUTH_TOKEN_PATH": str(token)}
    ours = {**os.environ, **environment, "RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN_PATH": str(token)}
    ours["PATH"] = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', '')}"
    command = [sys.executable, "-m", "tests.helpers.ray_nodes", str(folder / "ray"), str(port), str(head_cpus)]
    command += [json.dumps(pools)] if pools else []
    with (folder / "nodes.log").open("wb") as log:
        process = subprocess.Popen(
            command, cwd=REPOSITORY, env=ours, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True
        )
    assert process.stdin and process.stdout
    family = psutil.Process(process.pid)
    try:
        assert process.stdout.readline(), (folder / "nodes.log").read_text()[-4000:]
        yield RayNodes(reach, process)
    finally:
        everything = [family, *family.children(recursive=True)] if family.is_running() else []
        process.stdin.close()
        for left in psutil.wait_procs(everything, timeout=90)[1]:
            left.kill()
        shutil.rmtree(folder, ignore_errors=True)


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 300, pause: float = 0.1) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, f"waited in vain until {what}"
        time.sleep(pause)
