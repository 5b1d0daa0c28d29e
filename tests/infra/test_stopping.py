"""Real signals to real processes: once saves and leaves, twice leaves at once, and nobody waits longer than said."""

from __future__ import annotations

import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from pathlib import Path

import pytest

REPOSITORY = Path(__file__).parents[2]
_HEAD = """
import os, signal, sys, threading, time
from infra import stopping

def farewell(number):
    os.write(1, b"farewell\\n")

stopping.take_signals(farewell)
"""

Begun = Callable[[str], "subprocess.Popen[str]"]


@pytest.fixture
def begun() -> Begun:
    """A process that takes signals and runs this code, once it says `ready`."""

    def begin(code: str) -> subprocess.Popen[str]:
        text = _HEAD + textwrap.dedent(code)
        process = subprocess.Popen([sys.executable, "-c", text], cwd=REPOSITORY, stdout=subprocess.PIPE, text=True)
        assert process.stdout is not None
        assert process.stdout.readline() == "ready\n"
        return process

    return begin


_WAIT = """
    try:
        print("ready", flush=True)
        time.sleep(60)
    except stopping.Stopped as stop:
        print(f"stopped by {stop.number}", flush=True)
        sys.exit(128 + stop.number)
"""


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_signal_stops_what_has_nothing_to_save(begun: Begun, number: signal.Signals) -> None:
    process = begun(_WAIT)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert (said, process.returncode) == (f"stopped by {int(number)}\n", 128 + number)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_what_can_be_saved_is_saved_first(begun: Begun, number: signal.Signals) -> None:
    process = begun("""
        left = threading.Event()
        with stopping.saving_first(left.set) as told:
            print("ready", flush=True)
            left.wait(60)  # a signal asks it to leave and raises nothing
        print("saved", told(), stopping.asked(), flush=True)
    """)
    process.send_signal(number)
    said, _ = process.communicate(timeout=60)
    assert (said, process.returncode) == (f"saved True {int(number)}\n", 0)


def test_saving_that_takes_too_long_is_left(begun: Begun) -> None:
    process = begun("""
        stopping._SAVING = 0.2
        try:
            with stopping.saving_first(lambda: print("asked", flush=True)):
                print("ready", flush=True)
                time.sleep(60)
        except stopping.Stopped:
            print("stopped", flush=True)
    """)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert (said, process.returncode) == ("asked\nstopped\n", 0)


def test_a_wish_that_cannot_be_left_stops_at_once(begun: Begun) -> None:
    process = begun("""
        def ask():
            raise ConnectionError("storage is away")

        try:
            with stopping.saving_first(ask):
                print("ready", flush=True)
                time.sleep(60)
        except stopping.Stopped:
            print("stopped", flush=True)
    """)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=30)
    assert (said, process.returncode) == ("stopped\n", 0)


def test_a_second_signal_leaves_at_once(begun: Begun) -> None:
    process = begun("""
        with stopping.saving_first(lambda: print("asked", flush=True)):
            print("ready", flush=True)
            time.sleep(60)
    """)
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None and process.stdout.readline() == "asked\n"
    started = time.monotonic()
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert time.monotonic() - started < 5
    assert (said, process.returncode) == ("farewell\n", 130)


def test_the_command_is_back_in_time_whatever_goes_on(begun: Begun) -> None:
    process = begun("""
        stopping.SECONDS = 1.0
        while True:
            try:
                print("ready", flush=True)
                time.sleep(60)
            except stopping.Stopped:
                pass  # a library that does not end
    """)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=30)
    assert (said, process.returncode) == ("ready\nfarewell\n", 130)


def test_outside_of_the_command_line_a_second_sigterm_does_what_it_did(begun: Begun) -> None:
    process = begun("""
        stopping._State.taken = False
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        with stopping.saving_first(lambda: print("asked", flush=True)):
            print("ready", flush=True)
            time.sleep(60)
    """)
    process.send_signal(signal.SIGTERM)
    assert process.stdout is not None and process.stdout.readline() == "asked\n"
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGTERM
