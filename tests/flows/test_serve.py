"""What `serve` starts, and where it listens: on a laptop nowhere but loopback."""

from __future__ import annotations

import os
import socket
import sys
import time
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


def test_ports_and_addresses_that_cannot_be_had_are_told_apart() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UserError, match=rf"port {port} is taken .*stop what runs there.*--port"):
            serve.check_free("127.0.0.1", port, "--port")
    with pytest.raises(UserError, match=r"--port 70000: ports go up to 65535"):
        serve.check_free("127.0.0.1", 70_000, "--port")
    with pytest.raises(UserError, match=r"--listen no\.such\.invalid: this machine has no such address"):
        serve.check_free("no.such.invalid", port, "--port")


def test_a_server_that_ends_is_told_at_once(home: Path) -> None:
    """One that refuses its database, as after an update, answers no sooner for being waited for."""
    began = time.monotonic()
    refuses = sys.executable, "-c", "raise SystemExit(3)"
    with (
        serve._process("mlflow", refuses, dict(os.environ)) as server,
        pytest.raises(UserError, match=r"the MLflow UI ended with status 3: see .*mlflow\.log"),
    ):
        serve._await("the MLflow UI", server, f"http://127.0.0.1:{free_port()}/", home / "mlflow.log")
    assert time.monotonic() - began < 60


def test_a_heads_own_servers_are_not_asked_through_a_proxy(monkeypatch: pytest.MonkeyPatch, home: Path) -> None:
    """Its private address is no loopback, and a proxy outside knows no way to it."""
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{free_port()}")
    monkeypatch.setenv("no_proxy", "")
    port = free_port()
    command = (sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.2")
    with serve._process("mlflow", command, dict(os.environ)) as server:
        serve._await("the MLflow UI", server, f"http://127.0.0.2:{port}/", home / "mlflow.log", seconds=20)
