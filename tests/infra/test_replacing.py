"""Artifacts that are made anew: the old one is in use until the new one is whole, whatever dies meanwhile."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from configs import UserError, load_recipe
from flows.publish import publish
from infra import inventory
from infra.artifacts import MANIFEST, Artifact
from infra.storage import Storage
from infra.tracking import Tracker
from tasks.stage import Context, Job, Outcome, Stage, anew, perform


class _Killed(BaseException):
    """As SIGKILL: nothing is cleaned up."""


class Toy:
    """A stage of two parts that resumes; it can be killed after the first, and each making gives other bytes."""

    def __init__(self, root: str) -> None:
        self.made: list[str] = []
        self.killed = False
        self.stage = Stage("toy", 1, (), (), self.run)
        self.job = self.stage.job(load_recipe("demo_tiny"), root, {})
        self.artifact = Artifact(root, "toy", self.job.fingerprint)

    def run(self, context: Context) -> Outcome:
        for name in ("a/1.bin", "a/2.bin"):
            if context.out.exists(name):
                continue
            self.made.append(name)
            context.out.write_bytes(name, f"{name} {len(self.made)}".encode())
            if self.killed:
                raise _Killed
        context.out.write_bytes("receipts/1.json", b"{}")
        return Outcome([context.out.write_bytes(n, context.out.read_bytes(n)) for n in ("a/1.bin", "a/2.bin")])

    def content(self) -> list[bytes]:
        """Of the artifact as a reader finds it now."""
        now = replace(self.artifact)
        return [now.read(entry.path) for entry in now.manifest.files]


@pytest.fixture(params=["folder", "bucket"])
def toy(request: pytest.FixtureRequest, tmp_path: Path) -> Toy:
    bucket = request.param == "bucket"
    made = Toy(request.getfixturevalue("s3_root") if bucket else Storage.at(str(tmp_path)).url)
    perform(made.stage, made.job)
    made.artifact.storage.write_bytes("a/stale.bin", b"of an older attempt")
    return made


OLD, NEW = [b"a/1.bin 1", b"a/2.bin 2"], [b"a/1.bin 3", b"a/2.bin 4"]


def test_the_old_one_is_used_until_the_new_one_is_whole(toy: Toy) -> None:
    job, toy.killed = anew(toy.job), True
    with pytest.raises(_Killed):
        perform(toy.stage, job)
    assert toy.content() == OLD
    assert perform(toy.stage, toy.job).is_complete() and toy.content() == OLD, "without --force it is reused"
    toy.killed = False
    perform(toy.stage, anew(toy.job))
    assert toy.content() == NEW
    assert toy.made == ["a/1.bin", "a/2.bin"] * 2, "the half that was made was not made again"
    names = Storage.at(toy.artifact.root).names()
    here = toy.artifact.fingerprint
    assert names == [f"toy/{here}/{name}" for name in ("a/1.bin", "a/2.bin", MANIFEST, "receipts/1.json")]


def test_it_is_replaced_once(toy: Toy) -> None:
    """A second attempt of the same command, or a second command that waited, finds it done."""
    job = anew(toy.job)
    perform(toy.stage, job)
    perform(toy.stage, Job(**json.loads(json.dumps(job.__dict__))))
    assert toy.content() == NEW and len(toy.made) == 4


def test_a_failed_replacement_leaves_the_old_one(toy: Toy) -> None:
    def fails(context: Context) -> Outcome:
        context.out.write_bytes("a/1.bin", b"half")
        raise UserError("no room")

    with pytest.raises(UserError, match="no room"):
        perform(replace(toy.stage, run=fails), anew(toy.job))
    assert toy.content() == OLD


@pytest.mark.parametrize("nth", range(8))
def test_taking_its_place_can_die_at_any_request(toy: Toy, monkeypatch: pytest.MonkeyPatch, nth: int) -> None:
    """Then the old one or none is complete, never a mixture, and the next run has the new one without making it."""
    left = nth

    def counted(method: Callable[..., object]) -> Callable[..., object]:
        def call(*arguments: object, **named: object) -> object:
            nonlocal left
            if settling:
                left -= 1
                if left < 0:
                    raise _Killed
            return method(*arguments, **named)

        return call

    settling = False
    settle = Artifact.settle

    def settled(artifact: Artifact) -> None:
        nonlocal settling
        settling = artifact.beside.exists("whole.json")
        try:
            settle(artifact)
        finally:
            settling = False

    with monkeypatch.context() as dying:
        dying.setattr(Artifact, "settle", settled)
        for name in ("take", "delete", "write_bytes"):
            dying.setattr(Storage, name, counted(getattr(Storage, name)))
        with pytest.raises(_Killed):
            perform(toy.stage, anew(toy.job))
            raise _Killed
    if toy.artifact.is_complete():
        assert toy.content() in (OLD, NEW)
    job = anew(toy.job) if toy.artifact.is_complete() and toy.content() == OLD else toy.job
    perform(toy.stage, job)
    assert toy.content() == NEW and len(toy.made) == 4


def test_a_replacement_that_lost_files_is_made_again(toy: Toy, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as dying:
        dying.setattr(Storage, "take", _kill)
        with pytest.raises(_Killed):
            perform(toy.stage, anew(toy.job))
    assert not toy.artifact.is_complete()
    toy.artifact.beside.delete("a/2.bin")
    toy.artifact.storage.delete()
    perform(toy.stage, toy.job)
    assert toy.content() == [b"a/1.bin 5", b"a/2.bin 6"]


def _kill(*_: object) -> None:
    raise _Killed


def test_what_grows_beside_counts_as_the_artifacts(toy: Toy) -> None:
    job, toy.killed = anew(toy.job), True
    with pytest.raises(_Killed):
        perform(toy.stage, job)
    (entry,) = inventory.read(toy.artifact.root).values()
    assert entry.manifest is not None
    whole = sum(Storage.at(toy.artifact.root).sizes().values())
    assert entry.bytes == whole
    entry.artifact.discard()
    assert Storage.at(toy.artifact.root).names() == []


def test_a_page_stays_until_the_next_one_is_drawn(tmp_path: Path) -> None:
    root, recipe = Storage.at(str(tmp_path)).url, load_recipe("demo_tiny")

    def page(text: bytes) -> Callable[[Context], Outcome]:
        def written(context: Context) -> Outcome:
            entry = context.out.write_bytes("page.html", text)
            if not text:
                raise UserError("no run has scores")
            return Outcome([entry])

        return written

    first = publish("comparison", page(b"one"), root, recipe, {}, {}, Tracker())
    with pytest.raises(UserError, match="no run has scores"):
        publish("comparison", page(b""), root, recipe, {}, {}, Tracker())
    assert replace(first).read("page.html") == b"one"
    assert publish("comparison", page(b"two"), root, recipe, {}, {}, Tracker()).read("page.html") == b"two"
