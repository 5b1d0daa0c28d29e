"""What tests share: real images, a real local Ray, a home folder of their own, a real S3 server."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

# Before anything imports flows or infra.home: tests never touch the developer's runs, but keep the data sets.
_REAL_HOME = Path(os.environ.get("LATENTFORGE_HOME") or Path(__file__).parents[1] / ".latentforge").absolute()
_HOME = Path(tempfile.mkdtemp(prefix="latentforge-tests-"))
(_REAL_HOME / "datasets").mkdir(parents=True, exist_ok=True)
(_HOME / "datasets").symlink_to(_REAL_HOME / "datasets")
os.environ["LATENTFORGE_HOME"] = str(_HOME)
os.environ.setdefault("OMP_NUM_THREADS", "2")
for _name in ("LATENTFORGE_ROOT", "MLFLOW_TRACKING_URI", "PREFECT_API_URL", "RAY_ADDRESS"):
    os.environ.pop(_name, None)


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


@pytest.fixture(scope="module")
def local_ray() -> Iterator[None]:
    """A local Ray of two CPUs, as a stage starts it."""
    from infra.cluster import connect, disconnect

    connect()
    yield
    disconnect()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def s3_server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[dict[str, str]]:
    """A real S3 server (SeaweedFS) on loopback with one bucket `latents`; gives the environment that reaches it."""
    folder = tmp_path_factory.mktemp("weed")
    key, secret = "tester", "not-a-secret-outside-tests"
    identity = {
        "name": "tester",
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    (folder / "s3.json").write_text(json.dumps({"identities": [identity]}))
    ports = {name: str(free_port()) for name in ("master", "volume", "filer", "s3", "grpc1", "grpc2", "grpc3", "grpc4")}
    weed = shutil.which("weed") or str(Path(os.sys.executable).parent / "weed")  # type: ignore[attr-defined]
    command = [weed, f"-logdir={folder}", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    command += [f"-master.port={ports['master']}", f"-volume.port={ports['volume']}", f"-filer.port={ports['filer']}"]
    command += [f"-master.port.grpc={ports['grpc1']}", f"-volume.port.grpc={ports['grpc2']}"]
    command += [f"-filer.port.grpc={ports['grpc3']}", f"-s3.port.grpc={ports['grpc4']}"]
    command += [f"-s3.port={ports['s3']}", f"-s3.config={folder / 's3.json'}", "-master.telemetry=false"]
    command += ["-master.volumeSizeLimitMB=64", "-volume.max=100"]
    endpoint = f"http://127.0.0.1:{ports['s3']}"
    environment = {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with (folder / "weed.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            _await_s3(endpoint, server, folder / "weed.log")
            import boto3

            client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=secret)
            for _attempt in range(60):
                try:
                    client.create_bucket(Bucket="latents")
                    client.put_object(Bucket="latents", Key="ready", Body=b"yes")
                    break
                except Exception:
                    time.sleep(0.5)
            yield environment
        finally:
            server.kill()  # its graceful end takes half a minute, and nothing of it is kept
            server.wait(timeout=30)


def _await_s3(endpoint: str, server: subprocess.Popen[bytes], log: Path) -> None:
    for _attempt in range(120):
        if server.poll() is not None:
            raise RuntimeError(f"weed ended: {log.read_text(errors='replace')[-2000:]}")
        try:
            urllib.request.urlopen(endpoint, timeout=2)
            return
        except urllib.error.HTTPError:
            return
        except (urllib.error.URLError, ConnectionError, TimeoutError):
            time.sleep(0.5)
    raise RuntimeError("weed did not answer")


@pytest.fixture
def s3_root(s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch, request: pytest.FixtureRequest) -> str:
    """A fresh prefix on the S3 server, with its credentials in this process's environment."""
    import s3fs

    for name, value in s3_server.items():
        monkeypatch.setenv(name, value)
    s3fs.S3FileSystem.clear_instance_cache()
    return f"s3://latents/{request.node.name.replace('[', '-').replace(']', '')}"
