"""Machines with homes of their own that make one artifact on one storage: one whole result, never a mixture."""

from __future__ import annotations

import json
import os
import pickle
import subprocess
import sys
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path

import pytest

from configs import load_recipe
from infra import claims
from infra.artifacts import MANIFEST, Artifact, Manifest
from infra.claims import Claim, TakenOver, claimed
from infra.storage import Storage
from tasks.stage import Context, Job, Outcome, Stage, perform

REPOSITORY = Path(__file__).parents[2]
FINGERPRINT = "0" * 16
_MACHINE = """
    import sys, time, uuid
    from infra import claims
    claims.EVERY = 0.2
    from configs import load_recipe
    from tasks.stage import Outcome, Stage, perform

    def run(context):
        print("makes", flush=True)
        files = []
        for number in range(6):
            files.append(context.out.write_bytes(f"part-{number}", uuid.uuid4().hex.encode()))
            time.sleep(0.1)
        return Outcome(files)

    stage = Stage("toy", 1, (), (), run)
    print("ready", flush=True)
    sys.stdin.readline()
    artifact = perform(stage, stage.job(load_recipe("demo_tiny"), sys.argv[1], {}))
    for file in artifact.manifest.files:
        artifact.read(file.path)  # checks the hash
    print("has", artifact.manifest.created, artifact.mark(), flush=True)
"""


@pytest.fixture(params=["folder", "bucket"])
def root(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    bucket = request.param == "bucket"
    return str(request.getfixturevalue("s3_root")) if bucket else Storage.at(str(tmp_path / "shared")).url


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(claims, "EVERY", 0.05)
    monkeypatch.setattr(claims, "STALE", 1.0)


@pytest.fixture
def machine(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Threads of this process are machines of their own."""
    monkeypatch.setattr(claims, "_home", lambda: threading.current_thread().name)
    yield


def _whole(root: str, name: str) -> Artifact:
    return Artifact(root, name, FINGERPRINT)


def test_two_machines_that_race_have_one_whole_result(root: str, tmp_path: Path) -> None:
    def begun(name: str) -> subprocess.Popen[str]:
        environment = {**os.environ, "LATENTFORGE_HOME": str(tmp_path / name)}
        return subprocess.Popen(
            [sys.executable, "-c", textwrap.dedent(_MACHINE), root], cwd=REPOSITORY, env=environment, text=True,
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
        )  # fmt: skip

    machines = [begun(name) for name in ("one", "two")]
    for each in machines:
        assert each.stdout is not None and each.stdout.readline() == "ready\n"
    with ThreadPoolExecutor(2) as pool:
        said = list(pool.map(lambda each: each.communicate("go\n", timeout=120)[0].splitlines(), machines))
    assert [each.returncode for each in machines] == [0, 0]
    assert sorted(lines.count("makes") for lines in said) == [0, 1], said
    assert len({lines[-1] for lines in said}) == 1 and said[0][-1].startswith("has "), said
    names = [name.split("/")[-1] for name in Storage.at(root).names("toy")]
    assert sorted(names) == [MANIFEST, *(f"part-{number}" for number in range(6))], "no claim is left"


def test_of_many_that_create_a_file_one_does(root: str) -> None:
    place = Storage.at(root)
    with ThreadPoolExecutor(8) as pool:
        for name in "abc":
            won = list(pool.map(lambda number, name=name: place.create_bytes(name, b"%d" % number), range(8)))
            assert won.count(True) == 1 and place.read_bytes(name) == b"%d" % won.index(True)
    assert place.create_bytes("a", place.read_bytes("a")) == (not place.local), "a write whose answer was lost"


def test_a_claim_is_kept_past_an_error_that_no_client_should_raise(
    tmp_path: Path, quick: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Else a machine that works would fall silent, and another one begin the same."""
    artifact, failed = _whole(str(tmp_path), "demo"), list[int]()
    read = Storage.read_bytes

    def broken_twice(self: Storage, name: str) -> bytes:
        if threading.current_thread().name == "claim" and len(failed) < 2:
            failed.append(1)
            raise RuntimeError("Session is closed")
        return read(self, name)

    monkeypatch.setattr(Storage, "read_bytes", broken_twice)
    with claimed(artifact, lambda: False) as claim:
        assert claim is not None
        until = time.monotonic() + 30
        while json.loads(artifact.storage.read_bytes(claim.name))["beats"] < 4:
            assert time.monotonic() < until, "nobody says that it lives"
            time.sleep(0.02)
    assert len(failed) == 2 and not artifact.storage.names(claims.CLAIMS)


def test_a_second_manifest_never_replaces_the_first(root: str) -> None:
    artifact = _whole(root, "demo")
    first, second = (Manifest("demo", 1, FINGERPRINT, {}, {}, {}, (), n) for n in (1, 2))
    assert artifact.complete(first) and not artifact.complete(second)
    assert artifact.manifest.rows == 1


def test_the_dead_are_taken_over_and_the_living_waited_for(root: str, quick: None, machine: None) -> None:
    artifact = _whole(root, "demo")
    artifact.storage.create_bytes("claims/000001.json", b'{"home": "dead", "token": "x", "beats": 0}')
    started = time.monotonic()
    with claimed(artifact, lambda: False) as claim:
        assert claim is not None and claim.number == 2 and time.monotonic() - started >= claims.STALE
        with ThreadPoolExecutor(1) as other:
            over = threading.Event()
            waits = other.submit(lambda: claimed(artifact, over.is_set).__enter__())
            time.sleep(3 * claims.STALE)
            assert not waits.done(), "its holder lives"
            over.set()
            assert waits.result(timeout=60) is None
        assert claim.held()
    assert not artifact.storage.names()


def test_a_killed_run_goes_on_at_once_in_its_own_home(root: str, machine: None) -> None:
    artifact = _whole(root, "demo")
    own = json.dumps({"home": claims._home(), "token": "x", "beats": 3}).encode()
    artifact.storage.create_bytes("claims/000007.json", own)
    artifact.storage.create_bytes("claims/odd", b"")
    started = time.monotonic()
    with claimed(artifact, lambda: False) as claim:
        assert claim is not None and claim.number == 8
    assert time.monotonic() - started < claims.STALE / 2


def test_who_was_frozen_leaves_it_to_the_other(root: str, quick: None, capsys: pytest.CaptureFixture[str]) -> None:
    """Its manifest is not written, its claim is gone, and it returns with the other's result."""
    made: list[str] = []

    def run(context: Context) -> Outcome:
        made.append("frozen")
        other = b'{"home": "another", "token": "x", "beats": 0}'
        assert context.artifact.storage.create_bytes(Claim(context.artifact.storage, 2).name, other)
        job = context.job
        whole = Manifest(job.stage, 1, job.fingerprint, {}, {}, {}, (), 7)
        threading.Timer(0.2, lambda: context.artifact.complete(whole)).start()
        return Outcome([], rows=1)

    stage = Stage("toy", 1, (), (), run)
    artifact = perform(stage, stage.job(load_recipe("demo_tiny"), root, {}))
    assert artifact.manifest.rows == 7 and made == ["frozen"]
    assert "was taken over" in capsys.readouterr().out


def test_who_wakes_late_overwrites_no_part_of_the_other(root: str, quick: None) -> None:
    """Neither while the other is at work nor once it has finished and its claims are gone."""
    told: list[str] = []

    def run(context: Context) -> Outcome:
        place = context.artifact.storage
        actor = Context(Job(**json.loads(json.dumps(asdict(context.job)))))
        task: Storage = pickle.loads(pickle.dumps(context.out))
        actor.out.write_bytes("part-0", b"ours")
        assert place.create_bytes(Claim(place, 2).name, b'{"home": "another", "token": "x", "beats": 0}')
        files = [place.write_bytes(f"part-{number}", b"the other's", rows=1) for number in range(2)]
        for late in (actor.out, task):
            with pytest.raises(TakenOver, match="taken over by another machine"):
                late.write_bytes("part-0", b"ours, too late")
            with pytest.raises(TakenOver):
                late.delete("part-0")
        job = context.job
        assert context.artifact.complete(Manifest(job.stage, 1, job.fingerprint, {}, {}, {}, tuple(files), 2))
        place.delete("claims")
        told.append("woken")
        task.write_bytes("part-1", b"ours, much too late")
        raise AssertionError("it was written")

    stage = Stage("toy", 1, (), (), run)
    artifact = perform(stage, stage.job(load_recipe("demo_tiny"), root, {}))
    assert told and [artifact.read(f"part-{number}") for number in range(2)] == [b"the other's"] * 2


def test_signs_of_life_spare_looks_and_none_is_spared_too_long(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write asks storage once in a while, and never later than a takeover could be."""
    now, looks = [0.0], [0]

    def newest(storage: Storage, before: Callable[[Storage], int] = claims._newest) -> int:
        looks[0] += 1
        return before(storage)

    monkeypatch.setattr(claims, "_clock", lambda: now[0])
    monkeypatch.setattr(claims, "_newest", newest)
    storage = Storage.at(str(tmp_path))
    claim = Claim(storage, 1)
    storage.create_bytes(claim.name, claim.text())

    def beat() -> None:
        claim.beats += 1
        storage.write_bytes(claim.name, claim.text())

    for second in range(600):  # a write and a sign of life every second
        now[0] = float(second)
        claim.check()
        beat()
    assert looks[0] <= 600 / (claims.STALE / 4) + 2
    last_beat = now[0]
    storage.create_bytes(Claim(storage, 2).name, b'{"home": "another", "token": "x", "beats": 0}')
    assert pickle.loads(pickle.dumps(claim))._sure_until == 0, "another machine's clock says something else"
    now[0] = last_beat + claims.STALE / 2
    with pytest.raises(TakenOver):
        claim.check()


def test_without_signs_of_life_every_write_looks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now = [0.0]
    monkeypatch.setattr(claims, "_clock", lambda: now[0])
    claim = Claim(Storage.at(str(tmp_path)), 1)
    claim.storage.create_bytes(claim.name, claim.text())
    for second in range(3):
        now[0] = float(second)
        claim.check()
    claim.storage.delete("claims")
    with pytest.raises(TakenOver):
        claim.check()


def test_a_number_that_began_again_is_another_machines(root: str, quick: None) -> None:
    storage = _whole(root, "demo").storage
    first, second = Claim(storage, 1), Claim(storage, 1)
    assert storage.create_bytes(first.name, first.text()) and first.held()
    storage.delete("claims")
    assert not first.held()
    assert storage.create_bytes(second.name, second.text()) and second.held() and not first.held()
    awake = threading.Event()
    threading.Timer(0.5, awake.set).start()
    first.keep(awake)
    assert second.held(), "who was frozen says nothing in another's place"
