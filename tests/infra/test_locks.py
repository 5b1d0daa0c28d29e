from __future__ import annotations

import multiprocessing
import os
import signal
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
    first = context.Process(target=_hold, args=("file:///root/encode/1", held))
    first.start()
    assert held.wait(60)
    with alone("file:///root/encode/2"):
        assert capfd.readouterr().out == "", "another artifact is nobody else's"
    assert first.pid is not None
    second = context.Process(target=_hold, args=("file:///root/encode/1", over := context.Event()))
    second.start()
    assert not over.wait(3), "the first one still holds it"
    os.kill(first.pid, signal.SIGKILL)
    assert over.wait(60)
    second.kill()
    first.join()
    second.join()
    assert "another process makes file:///root/encode/1: waiting for it" in capfd.readouterr().out
