"""Where runs go."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from configs import UserError
from flows.studio import running
from infra import registry, tracking
from infra.storage import Storage
from infra.tracking import start_run, tracking_uri
from tasks.plan.actual import actuals
from tests.conftest import free_port


@pytest.mark.parametrize(
    "uri",
    ["postgresql://me:hidden@db:5432/mlflow", "https://hidden@mlflow:5000", "postgresql://db/mlflow?password=hidden"],
)
def test_an_address_with_credentials_is_refused(monkeypatch: pytest.MonkeyPatch, uri: str) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    with pytest.raises(UserError, match="MLFLOW_TRACKING_URI holds credentials") as refused:
        tracking_uri()
    assert "hidden" not in str(refused.value)
    with pytest.raises(UserError, match="holds credentials") as refused:
        Storage.at(uri)
    assert "hidden" not in str(refused.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri() == "http://mlflow:5000"


@pytest.mark.parametrize(
    "look",
    [
        tracking.evaluated_runs,
        lambda: tracking.run_tags("a" * 32),
        lambda: registry.fetch("--from", "models:/mine", Path()),
        lambda: actuals("a" * 32, None, "demo"),
        running.running,
    ],
    ids=["runs", "one run", "a registered model", "a plan's run", "studio"],
)
def test_looking_at_runs_of_a_dead_server_is_refused_at_once(
    look: Callable[[], object], monkeypatch: pytest.MonkeyPatch
) -> None:
    """MLflow's client alone tries for minutes, and ends in a traceback."""
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("MLFLOW_HTTP_REQUEST_MAX_RETRIES", "0")
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI is .*nothing answers.*unset it"):
        look()


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A database of this file's own, which takes seconds to make."""
    return f"sqlite:///{tmp_path_factory.mktemp('tracking') / 'mlflow.db'}"


def test_a_run_that_the_server_does_not_know_is_not_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, database: str
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    known = start_run("experiment", "a run", {})
    assert known.reopen()
    assert not replace(known, run="0" * 32).reopen()


def test_a_deleted_experiment_is_restored_and_told(
    monkeypatch: pytest.MonkeyPatch, database: str, capfd: pytest.CaptureFixture[str]
) -> None:
    from mlflow import MlflowClient

    monkeypatch.setenv("MLFLOW_TRACKING_URI", database)
    client = MlflowClient(tracking_uri=tracking_uri())
    start_run("experiment", "first", {})
    found = client.get_experiment_by_name("experiment")
    assert found is not None
    client.delete_experiment(found.experiment_id)
    second = start_run("experiment", "second", {})
    assert client.get_run(second.run).info.experiment_id == found.experiment_id
    assert "experiment had been deleted: restored it" in capfd.readouterr().out
