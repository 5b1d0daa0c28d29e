"""The side of a Ray job that waits for it, as far as it goes without a cluster."""

from __future__ import annotations

import json
import socket
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import requests

from configs import UserError, load_recipe
from configs.compute import ClusterCompute
from configs.errors import Unreachable
from infra import jobs
from infra.artifacts import Artifact
from infra.logs import FORMAT, Line
from tasks import job
from tasks.job import check_pins
from tasks.stage import Job


def test_a_job_is_named_after_what_it_makes() -> None:
    first = jobs.submission_id(Artifact("s3://bucket/a", "encode", "0123456789abcdef"), 1)
    assert first == jobs.submission_id(Artifact("s3://bucket/a", "encode", "0123456789abcdef"), 1)
    assert first.startswith("latentforge-encode-0123456789abcdef-")
    others = [
        jobs.submission_id(Artifact("s3://bucket/b", "encode", "0123456789abcdef"), 1),
        jobs.submission_id(Artifact("s3://bucket/a", "sample", "0123456789abcdef"), 1),
        jobs.submission_id(Artifact("s3://bucket/a", "encode", "0123456789abcdee"), 1),
        jobs.submission_id(Artifact("s3://bucket/a", "encode", "0123456789abcdef"), 2),
    ]
    assert len({first, *others}) == 5


def test_the_environment_names_a_cluster_before_the_recipe(monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe("demo_tiny", ["compute.cluster.jobs=http://head:8265"])
    assert jobs.address(load_recipe("demo_tiny").compute.cluster) is None
    assert jobs.address(recipe.compute.cluster) == "http://head:8265"
    monkeypatch.setenv(jobs.ADDRESS, "http://127.0.0.1:8265")
    assert jobs.address(recipe.compute.cluster) == "http://127.0.0.1:8265"


def test_where_a_cluster_is_enters_no_fingerprint() -> None:
    from tasks.train_vavae import STAGE

    plain, there = load_recipe("demo_tiny"), load_recipe("demo_tiny", ["compute.cluster.jobs=http://head:8265"])
    assert STAGE.fingerprint(plain, {}) == STAGE.fingerprint(there, {})


@pytest.mark.parametrize("name", ["AWS_SECRET_ACCESS_KEY", "AWS_SESSION_TOKEN", "DB_PASSWORD", "aws_access_key_id"])
def test_secrets_do_not_travel(name: str) -> None:
    with pytest.raises(UserError, match=f"{name}.*dashboard"):
        load_recipe("demo_tiny", [f"compute.cluster.environment=[{name}]"])


@pytest.mark.parametrize("url", ["head:8265", "ray://head:10001", "http://user:word@head:8265", "http://head/jobs"])
def test_an_address_is_that_of_a_jobs_api(url: str) -> None:
    with pytest.raises(UserError, match=r"compute\.cluster\.jobs"):
        load_recipe("demo_tiny", [f"compute.cluster.jobs={url}"])


def test_a_job_gets_what_the_recipe_names_and_no_more(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "hidden")
    monkeypatch.setenv("LATENTFORGE_FASHION_MNIST", "/data")
    given = jobs._variables(ClusterCompute(environment=("LATENTFORGE_FASHION_MNIST",)))
    assert given["LATENTFORGE_FASHION_MNIST"] == "/data" and given[FORMAT] == "json"
    assert "hidden" not in str(given)
    monkeypatch.delenv("LATENTFORGE_FASHION_MNIST")
    with pytest.raises(UserError, match="LATENTFORGE_FASHION_MNIST"):
        jobs._variables(ClusterCompute(environment=("LATENTFORGE_FASHION_MNIST",)))


def test_only_code_travels(tmp_path: Path) -> None:
    """By Ray's own rules: packages and pins, neither images nor tests nor what git leaves out."""
    from ray._private.runtime_env.packaging import _dir_travel, _get_excludes

    code = {"configs/data.py", "configs/recipes/demo.yaml", "tasks/sources/base.py", "requirements.lock"}
    other = {"my images/cats/1.jpg", ".git/config", "tests/conftest.py", "*.yaml", "tasks/__pycache__/a.pyc"}
    for name in code | other:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / ".gitignore").write_text("__pycache__/\n")
    found: set[str] = set()

    def note(path: Path) -> None:
        if path.is_file():
            found.add(str(path.relative_to(tmp_path)))

    _dir_travel(tmp_path, [_get_excludes(tmp_path, jobs._excludes(tmp_path))], note, include_gitignore=True)
    assert found == code


def test_no_cluster_is_said_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    from tests.conftest import free_port

    compute = ClusterCompute(jobs=f"http://127.0.0.1:{free_port()}")
    with pytest.raises(UserError, match=r"no Ray Jobs API answers at http://127\.0\.0\.1"):
        jobs.check(compute)


@pytest.mark.parametrize(
    ("status", "kind", "code", "message", "error", "words"),
    [
        ("STOPPED", None, None, "", UserError, "was stopped on the cluster"),
        ("FAILED", "JOB_ENTRYPOINT_COMMAND_ERROR", 1, "mistake", UserError, "^classes is 5$"),
        ("FAILED", "JOB_ENTRYPOINT_COMMAND_ERROR", 70, "Traceback", RuntimeError, "exit status 70"),
        ("FAILED", "JOB_ENTRYPOINT_COMMAND_ERROR", 75, "Traceback", jobs.JobLost, "exit status 75"),
        ("FAILED", "JOB_ENTRYPOINT_COMMAND_ERROR", 75, "passing", jobs.JobLost, r"exit status 75\): storage is away$"),
        ("FAILED", "JOB_ENTRYPOINT_COMMAND_ERROR", -9, "", jobs.JobLost, "exit status -9"),
        ("FAILED", "JOB_SUPERVISOR_ACTOR_DIED", None, "node died", jobs.JobLost, "node died"),
        ("FAILED", "JOB_ENTRYPOINT_COMMAND_ERROR", 1, "No module named 'fsspec'", UserError, "cannot begin.*image"),
    ],
)
def test_an_end_is_judged(
    status: str, kind: str | None, code: int | None, message: str, error: type[Exception], words: str
) -> None:
    said = json.dumps({"time": "now", "level": "error", "message": "classes is 5", "mistake": True})
    away = json.dumps({"time": "now", "level": "error", "message": "storage is away"})
    last = {"mistake": said, "passing": away}.get(message)
    text = f"Job entrypoint command failed, last lines:\nsomething\n{last}" if last else message
    details = SimpleNamespace(status=status, error_type=kind, driver_exit_code=code, message=text)
    with pytest.raises(error, match=words):
        jobs._judge(details, "job")


class _Silent:
    """A Jobs API that has gone away."""

    def __getattr__(self, name: str) -> Any:
        def gone(*given: Any, **named: Any) -> None:
            raise requests.exceptions.ConnectionError("connection refused")

        return gone


def test_a_jobs_api_that_goes_away_is_worth_another_attempt(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(jobs, "_client", lambda *_: _Silent())
    artifact, said = Artifact(str(tmp_path), "encode", "0" * 16), list[Line]()
    with pytest.raises(jobs.JobLost, match=r"does not answer any more: connection refused"):
        jobs.run(artifact, b"{}", ClusterCompute(jobs="http://127.0.0.1:1"), said.append)

    jobs._stop(_Silent(), artifact, said.append)
    assert said[-1].level == "error" and "cannot tell job latentforge-encode-" in said[-1].message


def test_an_address_with_credentials_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(jobs.ADDRESS, "http://me:hidden@127.0.0.1:1")
    with pytest.raises(UserError, match=r"RAY_API_SERVER_ADDRESS holds credentials") as refused:
        jobs.check(ClusterCompute())
    assert "hidden" not in str(refused.value)


def test_requests_to_a_silent_jobs_api_end(monkeypatch: pytest.MonkeyPatch) -> None:
    assert jobs._CHECK_SECONDS < 10 < jobs._ANSWER_SECONDS, "who starts a run waits less than who is in the midst of it"
    monkeypatch.setattr(jobs, "_CHECK_SECONDS", 0.2)
    with socket.create_server(("127.0.0.1", 0)) as silent:  # takes connections and never answers
        place = f"http://127.0.0.1:{silent.getsockname()[1]}"
        with pytest.raises(UserError, match=r"no Ray Jobs API answers .*timed out"):
            jobs.check(ClusterCompute(jobs=place))


def test_what_another_attempt_may_mend(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from ray.exceptions import ActorDiedError

    def status(error: Exception) -> int:
        def fail(stage: Any, job: Any) -> None:
            raise error

        monkeypatch.setattr(job, "perform", fail)
        return job.main(str(tmp_path), "encode", "0" * 16)

    recipe = load_recipe("demo_tiny").model_dump(mode="json")
    monkeypatch.setattr(job, "_described", lambda artifact: Job("encode", "0" * 16, str(tmp_path), recipe, {}, {}))
    assert status(Unreachable("cannot write s3://bucket/part")) == 75
    assert status(UserError("classes is 5")) == 1
    assert status(ActorDiedError()) == 75
    assert status(ValueError("a defect")) == 70
    refused = ActorDiedError()
    monkeypatch.setattr(refused, "_actor_init_failed", True)
    assert status(refused) == 70, "its constructor would raise again"


def test_another_image_than_the_lock_is_refused(tmp_path: Path) -> None:
    check_pins()
    lock = tmp_path / "requirements.lock"
    lock.write_text("numpy==0.0.1\n")
    with pytest.raises(UserError, match=r"numpy .*pins 0\.0\.1"):
        check_pins(lock)
