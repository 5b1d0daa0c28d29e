"""`encode` disturbed: a killed actor, a killed driver, failing storage. The result is bitwise the undisturbed one."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path

import fsspec
import psutil
import pytest

from configs import Recipe
from infra import claims
from infra.artifacts import Artifact
from infra.storage import Storage
from tasks import encode
from tasks.stage import Job
from tests.helpers.encoding import encode_inputs, encode_recipe
from tests.helpers.failing_s3 import FailingS3
from tests.helpers.piles import run_stage

PARTS = 30


class Run:
    """One stage on one root, finished once; `again` must give the same."""

    def __init__(self, root: Path, recipe: Recipe) -> None:
        self.root, self.recipe = root, recipe
        self.inputs = encode_inputs(str(root), recipe)
        self.artifact = run_stage(encode.STAGE, recipe, str(root), *self.inputs)
        self.folder = Path(self.artifact.storage.path)
        self.manifest = self.artifact.manifest
        self.bytes = {entry.path: (self.folder / entry.path).read_bytes() for entry in self.manifest.files}
        assert len(self.bytes) >= PARTS

    def forget(self) -> None:
        shutil.rmtree(self.folder)

    def again(self) -> None:
        made = run_stage(encode.STAGE, self.recipe, str(self.root), *self.inputs)
        assert made.manifest.files == self.manifest.files and made.manifest.facts == self.manifest.facts
        assert {name: (self.folder / name).read_bytes() for name in self.bytes} == self.bytes

    def finished(self) -> dict[str, int]:
        """Receipts of finished parts and when they were written."""
        receipts = self.folder.glob("receipts/**/*.json")
        return {str(path): path.stat().st_mtime_ns for path in receipts}

    def job(self, root: str) -> Job:
        recipe = self.recipe.model_dump(mode="json")
        return Job("encode", self.artifact.fingerprint, root, recipe, self.manifest.inputs, self.manifest.sections)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory, local_ray: None) -> Run:
    recipe = encode_recipe(tmp_path_factory.mktemp("data"), 10 * PARTS, "encode.align_features=true")
    return Run(tmp_path_factory.mktemp("root"), recipe)


@pytest.mark.slow  # that an interrupted run ends bitwise the same is shown by test_encode
def test_a_killed_actor_leaves_no_trace(run: Run) -> None:
    run.forget()
    left: list[int] = []

    def kill() -> None:
        _await(lambda: bool(run.finished()))
        left.append(PARTS - len(run.finished()))
        victims = [child for child in psutil.Process().children(recursive=True) if _is_actor(child)]
        os.kill(victims[-1].pid, signal.SIGKILL)

    killer = threading.Thread(target=kill, daemon=True)
    killer.start()
    run.again()
    killer.join(timeout=5)
    assert left and left[0] > 0, "the stage was over before an actor was killed"


@pytest.mark.slow  # another Ray; that finished parts are kept is shown by test_shard and test_sample too
def test_a_killed_driver_is_taken_up_where_it_stopped(run: Run, tmp_path: Path) -> None:
    run.forget()
    driver = _start(run.job(str(run.root)), tmp_path)
    _await(lambda: bool(run.finished()) or driver.poll() is not None)
    orphans = psutil.Process(driver.pid).children(recursive=True)
    os.kill(driver.pid, signal.SIGKILL)
    driver.wait()
    for orphan in orphans:  # its Ray, which until then may finish a part and whose agents outlive it by minutes
        with suppress(psutil.NoSuchProcess):
            orphan.kill()
    psutil.wait_procs(orphans, timeout=60)
    kept = run.finished()
    assert 0 < len(kept) < PARTS, "the driver was not killed half way"
    run.again()
    assert {name: run.finished()[name] for name in kept} == kept


@pytest.mark.slow  # retries themselves are shown by test_storage_retries
def test_storage_that_fails_every_third_request(
    run: Run, tmp_path: Path, s3_root: str, s3_server: dict[str, str]
) -> None:
    there = fsspec.filesystem("s3")
    for artifact in run.inputs:
        there.put(artifact.storage.path, f"{s3_root}/{artifact.stage}/{artifact.fingerprint}", recursive=True)
    proxy = FailingS3(s3_server["AWS_ENDPOINT_URL"], lambda number, method, path: number % 3 == 0)
    began = time.monotonic()
    with proxy.running() as endpoint:
        driver = _start(run.job(s3_root), tmp_path, AWS_ENDPOINT_URL=endpoint, AWS_MAX_ATTEMPTS="1")
        assert driver.wait(timeout=300) == 0
    assert proxy.failed > len(run.bytes)
    made = Artifact(s3_root, "encode", run.artifact.fingerprint)
    assert made.manifest.files == run.manifest.files
    assert {name: made.storage.read_bytes(name) for name in run.bytes} == run.bytes
    # The claim is looked at before each attempt to write a part or a receipt, as long as it gave no sign of life, and
    # at each of those. A look and a write are three requests, of which one fails: two or three attempts.
    looks = sum("claims" in prefix for prefix in proxy.listed)
    assert 0 < looks < 3 * (2 * PARTS + 10 + (time.monotonic() - began) / claims.EVERY)
    assert len(proxy.listed) - looks < 20, "the stage's own"


def test_a_large_file_appears_whole_or_not_at_all(
    s3_root: str, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Above 100 MB a file travels in parts; here the last but one step fails for good."""
    from configs import UserError

    data = os.urandom(1 << 20) * 101
    proxy = FailingS3(s3_server["AWS_ENDPOINT_URL"], lambda number, method, path: "partNumber=2" in path)
    with proxy.running() as endpoint, monkeypatch.context() as changed:
        changed.setenv("AWS_ENDPOINT_URL", endpoint)
        changed.setenv("AWS_MAX_ATTEMPTS", "1")
        changed.setattr("infra.outages._FIRST_WAIT", 0.001)
        changed.setattr("infra.outages._PATIENCE", 0.1)
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        with pytest.raises(UserError, match="cannot write"):
            Storage.at(s3_root).write_bytes("large", data)
    assert proxy.failed > 0
    fsspec.get_filesystem_class("s3").clear_instance_cache()
    storage = Storage.at(s3_root)
    assert not storage.exists("large") and not storage.names()
    entry = storage.write_bytes("large", data)
    assert (storage.size("large"), storage.read_range("large", 1 << 20, 9)) == (entry.bytes, data[:9])


def _start(job: Job, folder: Path, **environment: str) -> subprocess.Popen[bytes]:
    """The stage in a process of its own, with a Ray of its own."""
    path = folder / "job.json"
    path.write_text(json.dumps(asdict(job)))
    with (folder / "driver.log").open("wb") as log:
        return subprocess.Popen(
            [sys.executable, "-m", "tests.helpers.stage_driver", str(path)],
            stdout=log, stderr=log, env={**os.environ, **environment},
        )  # fmt: skip


def _await(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 300
    while not condition():
        assert time.monotonic() < deadline, "waited for nothing"
        time.sleep(0.005)


def _is_actor(process: psutil.Process) -> bool:
    try:
        return "MapBatches(EncoderActor)" in " ".join(process.cmdline())
    except psutil.Error:
        return False
