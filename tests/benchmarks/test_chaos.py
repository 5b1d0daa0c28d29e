"""The benchmark of runs under fire: its weather is what it says, its accounts are right.

A short run of it is in `tests.flows.test_under_fire`.
"""

from __future__ import annotations

import json
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import nullcontext
from http.client import HTTPConnection, HTTPException
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from benchmarks.chaos import __main__ as chaos
from benchmarks.chaos import account, gremlin, proxy
from benchmarks.chaos.account import Done
from benchmarks.chaos.gremlin import KINDS, Fault, Gremlin
from benchmarks.chaos.proxy import Proxy
from infra.artifacts import Manifest
from infra.storage import FileEntry

BODY = bytes(range(256)) * 64


class _Files(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.send_response(200)
        self.send_header("Content-Length", str(len(BODY)))
        self.end_headers()
        self.wfile.write(BODY)

    do_PUT = do_GET

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def between() -> Iterator[Proxy]:
    server = ThreadingHTTPServer(("127.0.0.1", 0), _Files)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    made = Proxy(server.server_port)
    with made.running():
        yield made
    server.shutdown()
    server.server_close()


def _asked(port: int, method: str = "GET") -> tuple[int, bytes]:
    connection = HTTPConnection("127.0.0.1", port, timeout=20)
    try:
        connection.request(method, "/latents/root/shard/0/part", body=b"x" if method == "PUT" else None)
        answer = connection.getresponse()
        return answer.status, answer.read()
    finally:
        connection.close()


def test_every_weather_is_what_it_says(between: Proxy, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(proxy, "SLOW", 0.3)
    assert _asked(between.port) == (200, BODY)
    between.weather = "cut"
    with pytest.raises(OSError):
        _asked(between.port)
    between.weather = "short"
    with pytest.raises((HTTPException, OSError)):
        _asked(between.port)
    between.weather, began = "slow", time.monotonic()
    assert _asked(between.port) == (200, BODY) and time.monotonic() - began >= 0.3
    between.weather = "full"
    assert _asked(between.port)[0] == 200 and _asked(between.port, "PUT")[0] == 507
    between.weather = "fair"
    assert _asked(between.port, "PUT") == (200, BODY)
    assert [path for _, path in between.written] == ["/latents/root/shard/0/part"]


def _gremlin(seed: int) -> Gremlin:
    return Gremlin(seed, KINDS, 60.0, None, [], lambda: None, {})


def test_faults_are_of_the_seed_and_of_all_kinds_alike() -> None:
    assert _gremlin(1).plan(50) == _gremlin(1).plan(50) != _gremlin(2).plan(50)
    plan = _gremlin(0).plan(11_000)
    assert 59 < sum(wait for wait, _ in plan) / len(plan) < 61
    assert Counter(kind for _, kind in plan) == dict.fromkeys(KINDS, 1000)
    assert {kind for _, kind in plan[: len(KINDS)]} == set(KINDS), "a short run meets all of them"
    assert plan[len(KINDS) : 2 * len(KINDS)] != plan[: len(KINDS)]


def test_images_that_are_trained_again_are_counted_again() -> None:
    """To 192, back to the checkpoint at 64, and to the end at 256; what is told at once came in its order."""
    first = [(100.0 + n, "train_dit", 64 * n) for n in (1, 2, 3)] + [(101.0, "train_vavae", 32)]
    second = [(120.0, "train_dit", 64 * n) for n in (4, 3, 2)]
    done = account.images_trained([*second, *first], 100.0)
    assert sum(each.units for each in done if each.stage == "train_dit") == 192 + 192
    assert sum(each.again for each in done) == 128 and done[0] == Done(1.0, "train_dit", 64, 0)


def test_a_fault_that_takes_a_while_does_not_put_off_the_next(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, drawn = [100.0], _gremlin(0)

    class Ended(threading.Event):
        def wait(self, timeout: float | None = None) -> bool:
            clock[0] += timeout or 0.0
            return len(drawn.faults) == 20

    def strike(self: Gremlin, fault: Fault, *_: object) -> bool:
        clock[0] += 20.0
        return True

    monkeypatch.setattr(Gremlin, "_strike", strike)
    monkeypatch.setattr(gremlin, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    drawn.haunt(Ended())
    due = accumulate(wait for wait, _ in drawn.plan(20))
    assert [fault.at for fault in drawn.faults] == pytest.approx(list(due))


def test_parts_that_are_written_again_are_counted_again() -> None:
    entry = FileEntry("train/part-0", 1, "", 100)
    manifests: dict[str, Any] = {"shard": Manifest("shard", 1, "f", {}, {}, {}, (entry,), 100)}
    path = "/latents/root/shard/f/train/part-0"
    written = [(10.0, path), (11.0, path), (40.0, path), (41.0, "/latents/root/shard/f/receipts/train/part-0.json")]
    done = account.parts_written(written, manifests, 10.0)
    assert done == [Done(0.0, "shard", 100, 0), Done(30.0, "shard", 100, 100)], "a second later it is the same write"


def test_each_fault_is_charged_what_came_after_it() -> None:
    faults = [Fault("node", 5.0), Fault("flow", 20.0), Fault("node", 90.0)]
    done = [Done(1, "shard", 100, 0), Done(8, "shard", 100, 50), Done(25, "encode", 10, 10), Done(30, "encode", 5, 0)]
    account.charge(faults, done)
    assert [(each.recovered, each.repeated) for each in faults] == [(3.0, 50), (5.0, 10), (None, 0)]
    kinds = account.by_kind(faults)
    assert kinds["node"] == {"faults": 2, "images_again": 50, "seconds_to_recover": 3.0}
    assert kinds["flow"] == {"faults": 1, "images_again": 10, "seconds_to_recover": 5.0}


def test_a_run_that_is_broken_off_leaves_neither_its_command_nor_a_gremlin(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pressed(number: int, frame: object) -> None:
        raise KeyboardInterrupt

    haunted = _gremlin(0)
    gone = threading.Event()
    monkeypatch.setattr(Gremlin, "haunt", lambda self, ended: gone.set() if ended.wait(60) else None)
    (endless := tmp_path / "python").write_text("#!/bin/sh\nexec sleep 60\n")
    endless.chmod(0o755)
    monkeypatch.setattr(chaos.sys, "executable", str(endless))
    place: Any = SimpleNamespace(environment={}, nodes=SimpleNamespace(environment={}))
    usual = signal.signal(signal.SIGALRM, pressed)
    signal.setitimer(signal.ITIMER_REAL, 0.3)
    try:
        with pytest.raises(KeyboardInterrupt):
            chaos.measured(place, tmp_path, "fired", "demo_tiny", time.monotonic() + 60, haunted)
    finally:
        signal.signal(signal.SIGALRM, usual)
    assert gone.is_set() and haunted.flow() is None


def _ran(well: bool, files: tuple[FileEntry, ...], seconds: float, done: list[Done]) -> dict[str, Any]:
    manifests = {"shard": Manifest("shard", 1, "f", {}, {}, {}, files, 100)}
    return {"well": well, "seconds": seconds, "starts": 1, "done": done, "manifests": manifests}


@pytest.mark.parametrize(
    ("calm", "well", "same"), [(True, True, True), (True, True, False), (True, False, True), (False, True, True)]
)
def test_the_last_line_is_one_of_json(
    calm: bool,
    well: bool,
    same: bool,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    files = (FileEntry("train/part-0", 1, "one", 100),)
    quiet = _ran(calm, files, 50.0, [])
    fired = _ran(well, files if same else (), 125.0, [Done(8.0, "shard", 100, 0), Done(20.0, "shard", 100, 50)])

    def measured(*given: Any) -> dict[str, Any]:
        if given[-1] is None:
            return quiet
        given[-1].faults.append(Fault("node", 5.0))
        return fired

    place = SimpleNamespace(nodes=None, members=[], proxies={})
    monkeypatch.setattr(chaos, "Place", lambda *_: place)
    monkeypatch.setattr(chaos, "_served", lambda folder: nullcontext({}))
    monkeypatch.setattr(chaos, "measured", measured)
    monkeypatch.setattr("sys.argv", ["chaos", "--folder", str(tmp_path)])
    assert chaos.main() == (0 if well else 1)
    (line,) = capsys.readouterr().out.splitlines()
    found = json.loads(line)
    assert found["goodput"] == 0.75 and found["faults"] == 1
    assert found["slowdown"] == (2.5 if calm and well else None)
    assert (found["finished"], found["same_bytes"]) == (well, calm and same)
    assert found["differs"] == ([] if same else ["shard"])
    assert found["by_kind"] == {"node": {"faults": 1, "images_again": 50, "seconds_to_recover": 3.0}}
