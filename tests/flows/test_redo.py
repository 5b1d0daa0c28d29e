"""What a run redoes, reuses and refuses: its own rules, on toy stages and without any server."""

from __future__ import annotations

import logging
import re
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from configs import UserError, load_recipe
from flows import run as running
from flows.run import Run, preflight
from infra import stopping
from infra.artifacts import Artifact
from infra.storage import Storage
from infra.tracking import Tracker
from tasks.stage import Context, Job, Outcome, Stage, perform

MADE: list[str] = []
BROKEN: set[str] = set()
REFRESHED: dict[str, bool] = {}
"""Whether Prefect was told to forget what it remembers of a stage, by its name."""


def _stage(name: str, *inputs: str) -> Stage:
    def write(context: Context) -> Outcome:
        MADE.append(name)
        entries = [context.out.write_bytes(f"{part}.bin", f"{name} {len(MADE)}".encode()) for part in "ab"]
        if name in BROKEN:
            raise UserError("broken")
        return Outcome(entries)

    return Stage(name, 1, (), inputs, write)


STAGES = (_stage("first"), _stage("second", "first"), _stage("third", "second"))


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[str]:
    """A root where all three were made; Prefect's and MLflow's parts do nothing."""

    class Plain:
        """Prefect's task, without Prefect."""

        def with_options(self, name: str, refresh_cache: bool, **_: Any) -> Any:
            REFRESHED.update({name: refresh_cache})
            return lambda stage, job: perform(stage, Job(**job)).fingerprint

    monkeypatch.setattr(running, "_perform", Plain())
    monkeypatch.setattr(running, "get_run_logger", lambda: logging.getLogger("toy"))
    monkeypatch.setattr(Run, "_new_run", lambda *_: Tracker())
    MADE.clear()
    BROKEN.clear()
    place = Storage.at(str(tmp_path)).url
    run(place)
    assert MADE == ["first", "second", "third"]
    MADE.clear()
    yield place
    stopping.note_options("")


def run(root: str, start: str | None = None, only: str | None = None, force: tuple[str, ...] = ()) -> None:
    """As a command does: what can be refused is refused before any stage starts."""
    preflight(STAGES, "demo_tiny", [], root, start, only, force)
    go(root, start, only, force)


def go(root: str, start: str | None = None, only: str | None = None, force: tuple[str, ...] = ()) -> None:
    """The same without the look ahead, as days later, when the look ahead is long past."""
    names = [stage.name for stage in STAGES]
    redone = set(force) | (set(names[names.index(start) :]) if start else set())
    Run(load_recipe("demo_tiny"), root, STAGES, start, only, frozenset(redone), Tracker(), "").all()


def artifact(root: str, name: str) -> Artifact:
    (found,) = {path.split("/")[1] for path in Storage.at(root).names(name) if path.endswith("manifest.json")}
    return Artifact(root, name, found)


@pytest.mark.parametrize("look", [run, go])
@pytest.mark.parametrize("chosen", [{"only": "second", "force": ("second",)}, {"start": "second"}])
@pytest.mark.parametrize("damage", ["missing", "short"])
def test_inputs_are_checked_before_anything_is_touched(root: str, look: Any, chosen: Any, damage: str) -> None:
    before = artifact(root, "second").read("a.bin")
    first = artifact(root, "first")
    if damage == "missing":
        first.storage.delete("b.bin")
    else:
        first.storage.write_bytes("b.bin", b"cut")
    found = "is missing" if damage == "missing" else "has 3 bytes"
    with pytest.raises(UserError) as refused:
        look(root, **chosen)
    line = f"stage first: {first.uri}/b.bin {found}, expected 7 bytes; the same command with --only first --force first"
    assert str(refused.value).startswith(line) and "\n" not in str(refused.value)
    assert MADE == [] and artifact(root, "second").read("a.bin") == before
    run(root, only="first", force=("first",))
    assert MADE == ["first"]
    run(root, **chosen)
    assert MADE[:2] == ["first", "second"]


def test_a_deleted_artifact_is_rebuilt_and_nothing_else(root: str) -> None:
    """Though Prefect remembers that it was made."""
    second = artifact(root, "second")
    shutil.rmtree(second.storage.path)
    run(root)
    assert MADE == ["second"] and artifact(root, "second").fingerprint == second.fingerprint
    assert REFRESHED == {"first": False, "second": True, "third": False}


def test_a_failed_redo_loses_nothing(root: str) -> None:
    BROKEN.add("second")
    with pytest.raises(UserError, match="broken"):
        run(root, force=("second", "third"))
    assert MADE == ["second"] and stopping.options() == "--force second --force third"
    assert artifact(root, "second").read("a.bin") == b"second 2"
    run(root)
    assert MADE == ["second"], "what was there is reused"
    BROKEN.clear()
    run(root, force=("second", "third"))
    assert MADE == ["second", "second", "third"] and stopping.options() == ""
    assert Storage.at(root).names("second") == [
        f"second/{artifact(root, 'second').fingerprint}/{name}" for name in ("a.bin", "b.bin", "manifest.json")
    ]


def test_from_says_where_it_goes_on(root: str) -> None:
    BROKEN.add("third")
    with pytest.raises(UserError, match="broken"):
        run(root, start="second")
    assert MADE == ["second", "third"] and stopping.options() == "--from third"
    assert artifact(root, "third").read("a.bin") == b"third 3"


def test_an_input_that_had_not_quite_taken_its_place_is_used(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Killed(BaseException):
        pass

    def kill(*_: object) -> None:
        raise Killed

    with monkeypatch.context() as dying:
        dying.setattr(Storage, "take", kill)
        with pytest.raises(Killed):
            run(root, only="first", force=("first",))
    run(root, only="second", force=("second",))
    assert MADE == ["first", "second"] and artifact(root, "first").read("a.bin") == b"first 1"


@pytest.mark.parametrize("look", [run, go])
def test_damage_of_what_is_reused_is_told_with_what_mends_it(root: str, look: Any) -> None:
    """All of it in one line, as the last stage's, which nothing reads, is what a person would open."""
    first, third = artifact(root, "first"), artifact(root, "third")
    third.storage.write_bytes("a.bin", b"longer than it was")
    with pytest.raises(UserError) as refused:
        look(root)
    words = f"stage third: {third.uri}/a.bin has 18 bytes, expected 7 bytes; the same command with --force third makes"
    assert str(refused.value).startswith(words) and MADE == []
    first.storage.delete("a.bin")
    first.storage.delete("b.bin")
    with pytest.raises(UserError) as refused:
        run(root)
    assert f"{first.uri}/a.bin is missing, expected 7 bytes (and 1 more)" in str(refused.value)
    assert "the same command with --force first --force third makes" in str(refused.value)
    run(root, force=("first", "third"))
    assert MADE == ["first", "third"]
    run(root)
    assert MADE == ["first", "third"]


def test_damage_that_does_not_concern_a_run_does_not_stop_it(root: str) -> None:
    artifact(root, "first").storage.delete("a.bin")
    run(root, only="third", force=("third",))
    assert MADE == ["third"]


def test_verify_reads_what_is_reused(root: str) -> None:
    """A changed byte has no other size: only a run with --verify, or whoever reads the file, finds it."""
    second = artifact(root, "second")
    second.storage.write_bytes("b.bin", b"second ?")
    run(root)
    with pytest.raises(UserError) as refused:
        preflight(STAGES, "demo_tiny", [], root, verify=True)
    assert re.search(
        rf"^stage second: {second.uri}/b\.bin has SHA-256 (\w+)…, expected (?!\1)\w+…; the same command with "
        "--force second makes",
        str(refused.value),
    )
    preflight(STAGES, "demo_tiny", [], root, force=["second"], verify=True)
    preflight(STAGES, "demo_tiny", [], root, only="first", verify=True)
    with pytest.raises(UserError, match="with --only second --force second makes"):
        preflight(STAGES, "demo_tiny", [], root, only="third", force=["third"], verify=True)
