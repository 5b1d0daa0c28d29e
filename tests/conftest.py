"""What tests share: real images, a real local Ray, a home folder of their own, a real S3 server."""

from __future__ import annotations

import os
import pickle
import shutil
import signal
import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from benchmarks.s3_server import free_ports
from benchmarks.s3_server import s3_server as s3_server_at

# Before anything imports flows or infra.home: tests never touch the developer's runs, but keep the data sets.
_REAL_HOME = Path(os.environ.get("LATENTFORGE_HOME") or Path(__file__).parents[1] / ".latentforge").absolute()
_HOME = Path(tempfile.mkdtemp(prefix="latentforge-tests-"))
(_REAL_HOME / "datasets").mkdir(parents=True, exist_ok=True)
(_HOME / "datasets").symlink_to(_REAL_HOME / "datasets")
os.environ["LATENTFORGE_HOME"] = str(_HOME)
os.environ.setdefault("OMP_NUM_THREADS", "1" if "PYTEST_XDIST_WORKER" in os.environ else "2")
os.environ.setdefault("OMP_WAIT_POLICY", "passive")  # many processes share few cores: threads that spin take them
for _name in ("LATENTFORGE_ROOT", "LATENTFORGE_LOGS", "MLFLOW_TRACKING_URI", "PREFECT_API_URL"):
    os.environ.pop(_name, None)
for _name in ("RAY_ADDRESS", "RAY_API_SERVER_ADDRESS"):
    os.environ.pop(_name, None)


_SHARED = ("finished: Workplace", "Workplace", "local_ray")
"""Words of the files that share what is dear: a finished run with its servers, servers alone (they start in seconds,
and the run is not waited for), a Ray."""


@cache
def _shared(file: Path) -> str:
    text = file.read_text()
    return next((word for word in _SHARED if word in text), "")


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """With `-n`, a file's tests run in one process, and those of all files that share what is dear in the same one."""
    from xdist.scheduler import LoadFileScheduling

    class Together(LoadFileScheduling):  # type: ignore[misc]
        def _split_scope(self, nodeid: str) -> str:
            file: str = super()._split_scope(nodeid)
            return _shared(config.rootpath / file) or file

    return Together(config, log)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """With `-n`, begin with what takes longest: the other files fill the time that is left beside it."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        items.sort(key=lambda item: [*_SHARED, ""].index(_shared(item.path)))


# Started in the background of a script, one ignores Ctrl-C, and so would the commands that tests stop with it.
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_sessionfinish() -> None:
    shutil.rmtree(_HOME, ignore_errors=True)


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A home folder of this test's own."""
    folder = tmp_path / "home"
    folder.mkdir()
    (folder / "datasets").symlink_to(_REAL_HOME / "datasets")
    monkeypatch.setenv("LATENTFORGE_HOME", str(folder))
    return folder


@pytest.fixture(scope="session")
def fashion_mnist() -> str:
    """Folder of the real Fashion-MNIST idx files, found or fetched as the demo does."""
    from tasks.sources.fashion_mnist import resolve

    return resolve(None)


@pytest.fixture(scope="session")
def local_ray() -> Iterator[None]:
    """A local Ray of two CPUs, as a stage starts it; one for all tests, whose workers keep what they imported."""
    from infra.cluster import connect, disconnect

    connect()
    yield
    disconnect()


@pytest.fixture(scope="module")
def actors_here() -> Iterator[None]:
    """What actors would do is done in this process, the last item first: each of theirs imports torch anew.

    Real ones are at work in the flows' tests and in `test_sample`.
    """
    import torch

    from configs.compute import ActorCompute
    from tasks.data import actors

    def by_one(rows: Sequence[dict[str, Any]], work: Any, compute: ActorCompute) -> Iterator[dict[str, Any]]:
        yield from map(actors.Worker(*pickle.loads(pickle.dumps(work))), reversed(rows))

    threads = torch.get_num_threads()
    with pytest.MonkeyPatch.context() as changed:
        changed.setattr(actors, "_by_ray", by_one)
        yield
    torch.set_num_threads(threads)


def free_port() -> int:
    return free_ports(1)[0]


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real S3 server (SeaweedFS) on loopback with one bucket `latents`; gives the environment that reaches it."""
    with s3_server_at(tmp_path_factory.mktemp("weed")) as environment:
        yield environment


@pytest.fixture
def s3_root(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A fresh prefix on the S3 server, with its credentials in this process's environment."""
    import s3fs

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    return f"s3://latents/{request.node.name.replace('[', '-').replace(']', '')}"
