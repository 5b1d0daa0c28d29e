"""Where runs go."""

from __future__ import annotations

from dataclasses import replace

import pytest

from configs import UserError
from infra.storage import Storage
from infra.tracking import start_run, tracking_uri


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
