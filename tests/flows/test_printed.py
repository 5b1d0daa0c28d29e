"""What light commands print fits a terminal of 80 columns, and reads well in a file."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.load import RECIPES, described
from flows.__main__ import app
from flows.init import init
from flows.summary import show
from infra.artifacts import Artifact
from tests.helpers.odd_sources import tree
from tests.infra.test_inventory import make_all


def printed(*command: str) -> list[str]:
    shown = CliRunner().invoke(app, [*command], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"}, catch_exceptions=False)
    assert shown.exit_code == 0
    return [line.rstrip() for line in shown.output.splitlines()]


@pytest.mark.parametrize(
    "command",
    [
        ("--help",),
        ("recipes",),
        *(
            (name, "--help")
            for name in ("run", "look", "init", "sample", "export", "compare", "sweep", "serve", "studio")
        ),
    ],
    ids=" ".join,
)
def test_80_columns_hold_it(command: tuple[str, ...]) -> None:
    assert [line for line in printed(*command) if len(line) > 80] == []


def test_recipes_say_what_each_is_for_beside_its_name() -> None:
    lines = printed("recipes")
    first = {line.split()[0]: line for line in lines if re.match(r"  \S", line)}
    named = described(RECIPES)
    assert set(named) <= set(first) and {"fashion_mnist", "aws"} <= set(first)
    beside = {name: re.match(rf"  {name}  +(\S+)", first[name]) for name in named}
    assert {name: found and found[1] for name, found in beside.items()} == {
        name: said.split()[0] for name, said in named.items()
    }


def test_help_names_the_environment_and_the_page_that_lists_it() -> None:
    text = " ".join(printed("--help"))
    assert all(name in text for name in ("LATENTFORGE_ROOT", "MLFLOW_TRACKING_URI", "HF_TOKEN", "docs/environment.md"))


def test_a_folder_in_brackets_is_no_style(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its name would vanish from a path that a person copies, or the command fail at its end."""
    monkeypatch.setenv("COLUMNS", "300")
    root = tmp_path / "[old]" / "[/]"
    made = make_all(str(root))
    report = Artifact(str(root), "report", made["report"])
    show(report.uri)
    assert f"result   file://{root}/report/" in capsys.readouterr().out
    listed = CliRunner().invoke(app, ["artifacts", "list", "--root", str(root)], env={"COLUMNS": "300"})
    assert str(root) in "".join(listed.output.split()), "a title is as wide as its table"


def test_commands_to_paste_hold_paths_with_spaces(
    tmp_path: Path, home: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    root = tmp_path / "my runs"
    made = make_all(str(root))
    (root / "sample" / made["sample"] / "part.bin").write_bytes(b"other")
    told = CliRunner().invoke(app, ["artifacts", "verify", "--root", str(root)]).output
    assert f"--root '{root}' > mend.yaml" in told and f"--only sample --root '{root}'\n" in told
    tree(tmp_path / "photos", {"cats": 12, "dogs": 12})
    line = init(str(tmp_path / "photos"), root / "mine.yaml")[-1]
    assert shlex.split(line)[-1] == str(root / "mine.yaml")
    monkeypatch.setenv("LATENTFORGE_HOME", str(root))
    show(Artifact(str(root), "report", made["report"]).uri)
    assert f"--backend-store-uri 'sqlite:///{root}/mlflow.db'" in capsys.readouterr().out
