"""The side of a Ray job that waits for it, as far as it goes without a cluster."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs import UserError, load_recipe
from configs.compute import ClusterCompute
from infra import jobs
from infra.artifacts import Artifact
from infra.logs import FORMAT
from tasks.job import check_pins


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
        ("FAILED", "JOB_ENTRYPOINT_COMMAND_ERROR", -9, "", jobs.JobLost, "exit status -9"),
        ("FAILED", "JOB_SUPERVISOR_ACTOR_DIED", None, "node died", jobs.JobLost, "node died"),
    ],
)
def test_an_end_is_judged(
    status: str, kind: str | None, code: int | None, message: str, error: type[Exception], words: str
) -> None:
    said = json.dumps({"time": "now", "level": "error", "message": "classes is 5", "mistake": True})
    text = f"Job entrypoint command failed, last lines:\nsomething\n{said}" if message == "mistake" else message
    details = SimpleNamespace(status=status, error_type=kind, driver_exit_code=code, message=text)
    with pytest.raises(error, match=words):
        jobs._judge(details, "job")


def test_another_image_than_the_lock_is_refused(tmp_path: Path) -> None:
    check_pins()
    lock = tmp_path / "requirements.lock"
    lock.write_text("numpy==0.0.1\n")
    with pytest.raises(UserError, match=r"numpy .*pins 0\.0\.1"):
        check_pins(lock)
