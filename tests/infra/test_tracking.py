"""Where runs go."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

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


def test_a_run_that_the_server_does_not_know_is_not_gone_on_with(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", f"sqlite:///{tmp_path / 'mlflow.db'}")
    known = start_run("experiment", "a run", {})
    assert known.reopen()
    assert not replace(known, run="0" * 32).reopen()
