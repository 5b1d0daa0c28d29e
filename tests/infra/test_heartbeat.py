"""A flow run whose process died is crashed on its server within two minutes, and a live one never."""

from __future__ import annotations

import multiprocessing
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from uuid import UUID

import pytest
import yaml

from infra import heartbeat
from tests.conftest import free_port

_AWAY = float(os.environ.get("LATENTFORGE_TEST_AWAY", "75"))
"""Seconds that the server is away: longer than both silences together would have been 90, than one 45."""


def test_the_file_is_what_prefect_takes() -> None:
    from prefect.automations import AutomationCore

    first, second = (
        AutomationCore.model_validate(each) for each in yaml.safe_load(heartbeat.AUTOMATIONS.read_text())["automations"]
    )
    state: Any = first.actions[0]
    assert state.name == heartbeat.UNHEARD
    triggers: list[Any] = [first.trigger, second.trigger]
    assert triggers[0].after == {heartbeat.EVENT} and triggers[1].after == {f"prefect.flow-run.{heartbeat.UNHEARD}"}
    assert all(heartbeat.EVENT in each.expect for each in triggers)
    silences = sum(each.within.total_seconds() for each in triggers)
    assert silences + 2 * 5 + heartbeat.SECONDS < 120, "with the server's own 5 s between looks"
    assert min(each.within.total_seconds() for each in triggers) > 2 * heartbeat.SECONDS, "one sign may be lost"


@contextmanager
def _server(home: Path, port: int) -> Iterator[None]:
    """A Prefect server as `serve` starts it."""
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_EVENTS_EXPIRED_BUCKET_BUFFER": "P1D",
    }
    environment.pop("PREFECT_API_URL", None)
    command = [str(Path(sys.executable).parent / "prefect"), "server", "start", "--port", str(port)]
    with (home / "server.log").open("ab") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log, start_new_session=True)
        try:
            yield
        finally:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()


def _state(client: Any, run: UUID) -> str:
    return str(client.read_flow_run(run).state.name)


def _heard(client: Any) -> set[UUID]:
    """Flow runs that gave a sign of life."""
    found = client.request("POST", "/events/filter", json={"filter": {"event": {"name": [heartbeat.EVENT]}}}).json()
    return {UUID(each["resource"]["prefect.resource.id"].rpartition(".")[2]) for each in found["events"]}


def _until(condition: Callable[[], bool], seconds: float) -> float:
    started = time.monotonic()
    while time.monotonic() - started < seconds:
        try:
            if condition():
                return time.monotonic() - started
        except Exception:  # the server is not there yet
            pass
        time.sleep(0.5)
    raise AssertionError(f"not within {seconds} s")


def _live(run: str, url: str) -> None:
    os.environ["PREFECT_API_URL"] = url
    with heartbeat.beating(run):
        signal.pause()


@pytest.mark.slow
def test_the_dead_are_crashed_and_the_living_are_not_though_the_server_was_away(tmp_path: Path) -> None:
    from prefect import flow
    from prefect.client.orchestration import get_client
    from prefect.settings import PREFECT_API_URL, temporary_settings
    from prefect.states import Running

    @flow
    def nothing() -> None: ...

    port = free_port()
    url = f"http://127.0.0.1:{port}/api"
    spawn = multiprocessing.get_context("spawn")
    with temporary_settings({PREFECT_API_URL: url}), get_client(sync_client=True) as client:
        with _server(tmp_path, port):
            _until(lambda: client.api_healthcheck() is None, 180)
            heartbeat.install()
            heartbeat.install()
            assert len(client.read_automations_by_name("latentforge: crashed")) == 1
            dead, living = (client.create_flow_run(nothing, state=Running()).id for _ in range(2))
            processes = [spawn.Process(target=_live, args=(str(run), url), daemon=True) for run in (dead, living)]
            for process in processes:
                process.start()
            _until(lambda: _heard(client) == {dead, living}, 120)
            assert processes[0].pid is not None
            os.kill(processes[0].pid, signal.SIGKILL)
            took = _until(lambda: _state(client, dead) == "Crashed", 150)
            assert took < 120
            assert _state(client, living) == "Running"
        time.sleep(_AWAY)
        seen: set[str] = set()
        with _server(tmp_path, port):
            _until(lambda: client.api_healthcheck() is None, 180)

            def look() -> bool:
                seen.add(_state(client, living))
                return "Crashed" in seen

            with pytest.raises(AssertionError, match="not within"):
                _until(look, 150)
        assert "Running" in seen and seen <= {"Running", heartbeat.UNHEARD}
        processes[1].kill()
