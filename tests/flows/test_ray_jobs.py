"""Stages as jobs of a Ray cluster: one run of `shard`, disturbed, and a mistake. More nodes: test_ray_cluster.py."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from configs import UserError
from configs.compute import ClusterCompute
from infra import jobs
from infra.artifacts import Artifact
from tests.flows.conftest import REPOSITORY, Workplace
from tests.helpers.nodes import RayNodes, ray_nodes, wait_until


@pytest.fixture(scope="module")
def nodes(finished: Workplace) -> Iterator[RayNodes]:
    with ray_nodes(finished.environment, head_cpus=2) as cluster:
        yield cluster


@pytest.fixture
def there(finished: Workplace, nodes: RayNodes, tmp_path: Path) -> Workplace:
    """An empty root, and stages go to the cluster."""
    environment = {**finished.environment, **nodes.environment}
    return replace(finished, root=str(tmp_path / "artifacts"), environment=environment)


@pytest.mark.slow
def test_a_stage_outlives_the_process_that_submitted_it(
    finished: Workplace, there: Workplace, nodes: RayNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "of-the-flow-alone")
    log = tmp_path / "flow.log"
    first = start(there, "--only", "shard")
    wait_until(lambda: bool(nodes.drivers()) or first.poll() is not None, "the stage was submitted")
    (job,), (driver,) = nodes.running(), nodes.drivers()
    os.kill(driver, signal.SIGSTOP)  # so that it does not end before the second process looks
    first.kill()
    first.wait()

    again = start(there, "--only", "shard", log=log)
    following = f"job {job} runs already"
    wait_until(lambda: following in log.read_text() or again.poll() is not None, "the second process found it")
    os.kill(driver, signal.SIGCONT)
    assert again.wait(timeout=300) == 0, log.read_text()
    said = log.read_text()
    assert following in said and "made shard" in said
    sharded = {name: found for name, found in nodes.jobs().items() if "-shard-" in name}
    assert list(sharded) == [job] and sharded[job]["status"] == "SUCCEEDED"
    artifact = Artifact(f"file://{there.root}", "shard", finished.first["shard"])
    assert job == jobs.submission_id(artifact, 1)
    assert artifact.manifest.files == Artifact(f"file://{finished.root}", "shard", artifact.fingerprint).manifest.files
    assert not artifact.storage.exists(jobs.DESCRIPTION)
    assert "of-the-flow-alone" not in json.dumps(sharded) + nodes.log(job) + said


def test_a_mistake_reaches_the_person_as_one_line(there: Workplace) -> None:
    wrong = there.run("--only", "shard", "--set", "data.classes=5", check=False)
    assert wrong.returncode == 1 and "Traceback" not in wrong.stderr
    (line,) = [line for line in wrong.stderr.splitlines() if line.startswith("error:")]
    assert line.startswith("error: stage shard: data.source has 10 classes ('T-shirt/top', ")
    assert line.endswith("but data.classes is 5: set data.classes to 10")


def test_a_wrong_token_is_refused_before_anything_starts(nodes: RayNodes, monkeypatch: pytest.MonkeyPatch) -> None:
    compute = ClusterCompute(jobs=nodes.environment[jobs.ADDRESS])
    monkeypatch.setenv("RAY_AUTH_TOKEN_PATH", nodes.environment["RAY_AUTH_TOKEN_PATH"])
    jobs.check(compute)
    monkeypatch.setenv("RAY_AUTH_TOKEN", "wrong")
    with pytest.raises(UserError, match="wants another token"):
        jobs.check(compute)


def start(workplace: Workplace, *arguments: str, log: Path = Path(os.devnull)) -> subprocess.Popen[bytes]:
    """`latentforge run`, not waited for."""
    command = ["run", "sfd-full", "--recipe", "demo_tiny", "--root", workplace.root, *arguments]
    with log.open("wb") as sink:
        return subprocess.Popen(
            [sys.executable, "-m", "flows", *command],
            cwd=REPOSITORY,
            env={**os.environ, **workplace.environment},
            stdout=sink,
            stderr=sink,
        )
