"""The minute-sized twin of the demo, run once by the command line, and the servers that all its runs talk to."""

from __future__ import annotations

import os
import shutil
import sqlite3
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, closing
from dataclasses import dataclass, field, replace
from pathlib import Path

import pytest

from tests.conftest import free_port

REPOSITORY = Path(__file__).parents[2]
PLANTED = {
    name: f"planted-{name.lower().replace('_', '-')}-f9c1"
    for name in (
        "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "HF_TOKEN", "PREFECT_API_KEY",
        "MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_USERNAME", "WANDB_API_KEY",
    )
}  # fmt: skip
"""Credentials in the environment of the first run; what it needs none of, and whatever it leaves must not hold."""


@dataclass(frozen=True)
class Workplace:
    """A home folder and a root of one test session, and the command line on them."""

    home: Path
    root: str
    environment: Mapping[str, str]
    first: dict[str, str] = field(default_factory=dict)
    """Fingerprint by stage of the first undisturbed run."""
    console: list[str] = field(default_factory=list)
    """What that run printed."""

    @property
    def undisturbed(self) -> str:
        """A root with what the first run left and no other adds to."""
        return f"{self.root}-undisturbed"

    def run(self, *arguments: str, root: str | None = None, check: bool = True) -> subprocess.CompletedProcess[str]:
        """`latentforge run sfd-full --recipe demo_tiny` with further arguments."""
        command = ["run", "sfd-full", "--recipe", "demo_tiny", "--root", root or self.root, *arguments]
        return self.flows(*command, check=check)

    def flows(self, *arguments: str, check: bool = True) -> subprocess.CompletedProcess[str]:
        done = subprocess.run(
            [sys.executable, "-m", "flows", *arguments],
            cwd=REPOSITORY,
            env={**os.environ, **self.environment},
            capture_output=True,
            text=True,
            timeout=850,
            check=False,
        )
        if check and done.returncode:
            raise AssertionError(f"exit status {done.returncode}\n{done.stdout[-4000:]}\n{done.stderr[-8000:]}")
        return done

    def manifests(self) -> dict[str, dict[str, int]]:
        """When each manifest was written: stage → fingerprint → nanoseconds."""
        found: dict[str, dict[str, int]] = {}
        for path in Path(self.root).glob("*/*/manifest.json"):
            found.setdefault(path.parts[-3], {})[path.parts[-2]] = path.stat().st_mtime_ns
        return found

    def rebuilt_since(self, before: dict[str, dict[str, int]]) -> set[str]:
        """Stages with a manifest that is new or was written again."""
        return {stage for stage, prints in self.manifests().items() if prints.items() - before.get(stage, {}).items()}


def _workplace(folder: Path, fashion_mnist: str) -> Workplace:
    home = folder / "home"
    home.mkdir()
    environment = {
        "LATENTFORGE_HOME": str(home),
        "LATENTFORGE_FASHION_MNIST": fashion_mnist,
        "PREFECT_HOME": str(home / "prefect"),
        "PREFECT_SERVER_EPHEMERAL_STARTUP_TIMEOUT_SECONDS": "180",
    }
    return Workplace(home, str(folder / "artifacts"), environment)


@pytest.fixture(scope="package")
def workplace(tmp_path_factory: pytest.TempPathFactory, fashion_mnist: str) -> Iterator[Workplace]:
    """A workplace with what `make serve` starts, which spares each run the start of a Prefect server."""
    from flows.serve import running

    place = _workplace(tmp_path_factory.mktemp("workplace"), fashion_mnist)
    with pytest.MonkeyPatch.context() as changed, ExitStack() as stack:
        for name, value in place.environment.items():
            changed.setenv(name, value)
        served = stack.enter_context(running(free_port(), free_port()))
        changed.undo()
        servers = {name: served[name] for name in ("PREFECT_API_URL", "MLFLOW_TRACKING_URI")}
        yield replace(place, environment={**place.environment, **servers})


@pytest.fixture
def alone(tmp_path_factory: pytest.TempPathFactory, fashion_mnist: str, workplace: Workplace) -> Workplace:
    """A workplace of this test's own without servers, where a run starts Prefect's for itself as `make demo` does.

    Prefect's database is there, as at a second run: making one takes ten seconds.
    """
    place = _workplace(tmp_path_factory.mktemp("alone"), fashion_mnist)
    (place.home / "prefect").mkdir()
    with (
        closing(sqlite3.connect(workplace.home / "prefect" / "prefect.db")) as full,
        closing(sqlite3.connect(place.home / "prefect" / "prefect.db")) as own,
    ):
        full.backup(own)
    return place


@pytest.fixture(scope="package")
def finished(workplace: Workplace) -> Workplace:
    """The workplace after one undisturbed run of the whole DAG."""
    done = replace(workplace, environment={**workplace.environment, **PLANTED}).run()
    workplace.console.extend([done.stdout, done.stderr])
    shutil.copytree(workplace.root, workplace.undisturbed)
    workplace.first.update({stage: next(iter(prints)) for stage, prints in workplace.manifests().items()})
    return workplace
