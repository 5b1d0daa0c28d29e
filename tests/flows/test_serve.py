"""What `serve` starts, and where it listens: on a laptop nowhere but loopback."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from configs import UserError
from flows import serve
from tests.conftest import free_port


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[tuple[str, ...], dict[str, str]]]:
    """Command and environment of every process, none of which runs."""
    found: dict[str, tuple[tuple[str, ...], dict[str, str]]] = {}

    @contextmanager
    def process(name: str, command: tuple[str, ...], environment: dict[str, str]) -> Iterator[None]:
        found[name] = (command, environment)
        yield

    monkeypatch.setattr(serve, "_process", process)
    monkeypatch.setattr(serve, "_await", lambda *_: None)
    monkeypatch.setattr(serve, "_run", lambda *_: None)
    return found


def _host(command: tuple[str, ...]) -> str:
    return command[command.index("--host") + 1]


def test_a_laptops_servers_are_on_loopback(
    home: Path, started: dict[str, tuple[tuple[str, ...], dict[str, str]]], monkeypatch: pytest.MonkeyPatch
) -> None:
    port = free_port()
    with serve.running(free_port(), port) as environment:
        assert {_host(started[name][0]) for name in ("prefect-server", "mlflow")} == {"127.0.0.1"}
        assert environment["MLFLOW_TRACKING_URI"] == f"http://127.0.0.1:{port}"
        assert started["mlflow"][0][-2:] == ("--artifacts-destination", str(home / "mlruns"))
        assert "MLFLOW_SERVER_ALLOWED_HOSTS" not in started["mlflow"][1]
    monkeypatch.setenv("MLFLOW_ARTIFACTS_DESTINATION", "s3://bucket/mlflow")
    with serve.running(free_port(), free_port()):
        assert started["mlflow"][0][-1] == "s3://bucket/mlflow"


def test_a_heads_mlflow_answers_the_cluster(
    home: Path, started: dict[str, tuple[tuple[str, ...], dict[str, str]]]
) -> None:
    """127.0.0.2 stands for a private address: this machine has it, and it is not the usual loopback."""
    port = free_port()
    with serve.running(free_port(), port, "127.0.0.2") as environment:
        assert _host(started["mlflow"][0]) == "127.0.0.2" and _host(started["prefect-server"][0]) == "127.0.0.1"
        assert environment["MLFLOW_TRACKING_URI"] == f"http://127.0.0.2:{port}", "jobs hand it to every machine"
        assert started["mlflow"][1]["MLFLOW_SERVER_ALLOWED_HOSTS"] == f"127.0.0.2:{port},localhost:{port}"


def test_an_address_of_another_machine_is_refused(home: Path) -> None:
    with (
        pytest.raises(UserError, match=r"--listen 192\.0\.2\.1: this machine has no such address"),
        serve.running(free_port(), free_port(), "192.0.2.1"),
    ):
        pass
