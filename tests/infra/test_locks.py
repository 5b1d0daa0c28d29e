from __future__ import annotations

import multiprocessing
import os
import signal
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import pytest

from infra.locks import alone


def _hold(uri: str, held: Event) -> None:
    with alone(uri):
        held.set()
        signal.pause()


def test_a_second_process_waits_until_the_first_is_gone(home: Path, capfd: pytest.CaptureFixture[str]) -> None:
    context = multiprocessing.get_context("spawn")
    held = context.Event()
    first = context.Process(target=_hold, args=("file:///root/encode/1", held), daemon=True)
    first.start()
    assert held.wait(60)
    with alone("file:///root/encode/2"):
        assert capfd.readouterr().out == "", "another artifact is nobody else's"
    assert first.pid is not None
    over = context.Event()
    second = context.Process(target=_hold, args=("file:///root/encode/1", over), daemon=True)
    second.start()
    said, deadline = "", time.monotonic() + 60
    while "another process makes file:///root/encode/1: waiting for it" not in said and time.monotonic() < deadline:
        said += capfd.readouterr().out
        time.sleep(0.05)
    assert said and not over.is_set(), "the first one still holds it"
    os.kill(first.pid, signal.SIGKILL)
    assert over.wait(60)
    second.kill()
    first.join()
    second.join()
