"""Where runs go."""

from __future__ import annotations

import pytest

from configs import UserError
from infra.tracking import tracking_uri


def test_an_address_with_a_password_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "postgresql://me:hidden@db:5432/mlflow")
    with pytest.raises(UserError, match="holds a password") as refused:
        tracking_uri()
    assert "hidden" not in str(refused.value)
    monkeypatch.setenv("MLFLOW_TRACKING_URI", "http://mlflow:5000")
    assert tracking_uri() == "http://mlflow:5000"
