"""The commands about artifacts: what they print, what they delete, and how they end."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import yaml
from typer.testing import CliRunner

from configs import UserError, load_recipe
from flows.artifacts import app
from infra import inventory
from infra.artifacts import Artifact
from infra.locks import alone
from tests.infra.test_inventory import make_all


@pytest.fixture
def asked(tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch):  # type: ignore[no-untyped-def]
    """A command's words, with the root added; gives its exit status and what it said."""
    monkeypatch.setenv("COLUMNS", "200")

    def ask(*words: str) -> tuple[int, str]:
        ended = CliRunner().invoke(app, [*words, "--root", str(tmp_path / "root")])
        if ended.exception is not None and not isinstance(ended.exception, SystemExit):
            raise ended.exception
        return ended.exit_code, ended.output

    return ask


@pytest.fixture
def made(tmp_path: Path) -> dict[str, str]:
    return make_all(str(tmp_path / "root"), days=40)


def test_list_and_show(asked, made: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:  # type: ignore[no-untyped-def]
    status, told = asked("list")
    assert status == 0 and "40 d" in told and f"encode/{made['encode']}" in told and f"{len(made)} artifacts" in told
    monkeypatch.setenv("COLUMNS", "80")
    narrow = asked("list")[1].splitlines()[1:]  # the title is a place
    assert max(map(len, narrow)) <= 80 and all(
        any(f" {stage}/{made[stage]} " in line for line in narrow) for stage in made
    )
    listed = {each["artifact"]: each for each in json.loads(asked("list", "--json", "--stage", "encode")[1])}
    assert set(listed) == {f"encode/{made['encode']}"}
    assert f"shard/{made['shard']}" in listed[f"encode/{made['encode']}"]["made_from"]
    shown = yaml.safe_load(asked("show", made["sample"][:8])[1])
    assert (shown["recipe"], shown["state"], shown["rows"]) == ("demo_tiny", "whole", 1)
    assert f"evaluate/{made['evaluate']}" in shown["used_by"]


def test_a_damaged_file_is_told_with_the_command_that_mends_it(  # type: ignore[no-untyped-def]
    asked, made: dict[str, str], tmp_path: Path
) -> None:
    assert asked("verify") == (0, f"{len(made)} of {len(made)} artifacts are whole\n")
    (tmp_path / "root" / "sample" / made["sample"] / "part.bin").write_bytes(b"other")
    status, told = asked("verify", "sample/" + made["sample"])
    assert status == 1 and "part.bin has 5 bytes, expected 60 bytes" in told and "0 of 1 artifacts are whole" in told
    mend = re.search(r"latentforge (artifacts .*) --root .* > mend.yaml; latentforge run (.*) --root", told)
    assert mend is not None
    words = mend[2].split()
    assert words == ["sfd-full", "--recipe", "mend.yaml", "--force", "sample", "--only", "sample"]
    recipe = tmp_path / "mend.yaml"
    recipe.write_text(asked(*mend[1].split()[1:])[1])
    assert load_recipe(str(recipe)) == load_recipe("demo_tiny"), "the mended one is the same"


@contextmanager
def _made_anew(artifact: Artifact) -> Iterator[None]:
    artifact.beside.write_bytes("page.html", b"a new one")
    yield


def _in_the_making(artifact: Artifact) -> AbstractContextManager[None]:
    return alone(artifact.uri)


def test_prune_says_what_would_go_before_it_does(  # type: ignore[no-untyped-def]
    asked, made: dict[str, str], tmp_path: Path
) -> None:
    with pytest.raises(UserError, match="prune of what"):
        asked("prune")
    with pytest.raises(UserError, match="--older-than 30: expected"):
        asked("prune", "--older-than", "30")
    root = str(tmp_path / "root")
    later = make_all(root, ["sample.seed=3"], days=20)
    status, told = asked("prune", "--keep-last", "1", "--older-than", "30d")
    assert status == 0 and f"would delete 3 of {len(made) + 3} artifacts" in told and "--yes does it" in told
    assert len(inventory.read(root)) == len(made) + 3
    status, told = asked("prune", "--keep-last", "1", "--older-than", "30d", "--yes")
    assert status == 0 and f"deleted 3 of {len(made) + 3} artifacts" in told
    assert set(inventory.read(root)) == {f"{stage}/{name}" for stage, name in later.items()}
    status, told = asked("prune", f"shard/{later['shard']}", "--yes")
    assert "needs it" in told and f"deleted 0 of {len(made)} artifacts" in told


@pytest.mark.parametrize(
    ("stage", "begun", "deleted"), [("report", _made_anew, 0), ("encode", _in_the_making, 5)], ids=["anew", "made"]
)
def test_prune_keeps_what_a_flow_began_to_write_after_it_chose(  # type: ignore[no-untyped-def]
    asked,
    made: dict[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    stage: str,
    begun: Callable[[Artifact], AbstractContextManager[None]],
    deleted: int,
) -> None:
    """And all that it needs; it is not waited for, either."""
    root, choose = str(tmp_path / "root"), inventory.choose
    artifact = Artifact(root, stage, made[stage])
    with ExitStack() as flow:

        def choose_then(*given: Any, **named: Any) -> inventory.Choice:
            choice = choose(*given, **named)
            flow.enter_context(begun(artifact))
            return choice

        monkeypatch.setattr(inventory, "choose", choose_then)
        told = asked("prune", "--keep-last", "0", "--yes")[1]
    assert f"keeps {stage}/{made[stage]}: a flow began just now" in told
    assert f"deleted {deleted} of {len(made)} artifacts" in told
    left = inventory.read(root)
    assert len(left) == len(made) - deleted
    assert set(left[f"{stage}/{made[stage]}"].made_from) <= left.keys()


def test_why(asked, made: dict[str, str], tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    other = make_all(str(tmp_path / "root"), ["train_dit.learning_rate=0.5"])
    told = asked("why", f"report/{made['report']}", f"report/{other['report']}")[1]
    assert re.fullmatch(r"train_dit: train_dit\.learning_rate: [\d.e-]+ → 0\.5\n", told)
    assert "one and the same" in asked("why", made["encode"], f"encode/{made['encode']}")[1]
