"""`look`: what it says of a source, the picture, and a section that a recipe takes as it is."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import yaml
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from typer.testing import CliRunner

from configs import UserError, load_recipe
from flows.__main__ import app
from flows.look import section_of
from tests.helpers.odd_sources import hub, jpeg, listed, tar, tree, webdataset


def _folder(root: Path) -> Path:
    return tree(root, {"cats": 5, "dogs": 4})


def _splits(root: Path) -> Path:
    tree(root / "train", {"cats": 5, "dogs": 4})
    tree(root / "val", {"cats": 1, "dogs": 1})
    return root


def _webdataset(root: Path) -> Path:
    webdataset(root / "0.tar", [{"jpg": jpeg(n), "cls": str(n % 2).encode()} for n in range(9)])
    return root


def _parquet(root: Path) -> Path:
    hub(root / "data" / "train-0.parquet", [n % 2 for n in range(9)], names=["cat", "dog"])
    return root


def _imagenet(root: Path) -> Path:
    root.mkdir()
    inner = [(f"n{k}.tar", tar(None, [(f"n{k}_{n}.JPEG", jpeg(n)) for n in range(5)])) for k in range(2)]
    tar(root / "train.tar", inner)
    return root / "train.tar"


def _csv(root: Path) -> Path:
    _folder(root)
    (root / "list.csv").write_text("path,label\n" + "".join(f"cats/00{n}.jpg,{n % 2}\n" for n in range(5)))
    return root / "list.csv"


@pytest.mark.parametrize(
    ("make", "kind", "splits"),
    [
        (_folder, "folder", "none of its own"),
        (_splits, "folder", "train 9 · test 2"),
        (_webdataset, "webdataset", "none of its own"),
        (_parquet, "parquet", "none of its own"),
        (_imagenet, "imagenet", "none of its own"),
        (_csv, "csv", "none of its own"),
    ],
)
def test_every_kind_is_told_drawn_and_named(
    tmp_path: Path, home: Path, make: Callable[[Path], Path], kind: str, splits: str
) -> None:
    source, picture = make(tmp_path / "pile"), tmp_path / "look.png"
    done = CliRunner().invoke(app, ["look", str(source), "--images", "5", "--output", str(picture)])
    assert done.exit_code == 0, done.output
    lines, _, section = done.output.partition("\n\n")
    told = dict(line.split(maxsplit=1) for line in lines.splitlines() if not line.startswith("left out"))
    assert told["source"].startswith(f"{kind} ") and splits in told["splits"]
    assert told["classes"].startswith("2: 0 ") and told["picture"] == str(picture)
    with Image.open(picture) as drawn:
        assert drawn.size == (5 * 136 + 8, 164 + 8) and len(drawn.getcolors(1 << 20)) > 10
    recipe = tmp_path / "mine.yaml"
    recipe.write_text(f"extends: demo_tiny\n{section}")
    small = [f"train_{name}.batch=2" for name in ("vavae", "semvae", "dit")]
    assert listed(load_recipe(str(recipe), small)).images.num_rows in (5, 9, 10, 11)
    assert not list(tmp_path.rglob("manifest.json"))


def test_what_does_not_fit_is_told_and_a_field_mends_it(tmp_path: Path) -> None:
    hub(tmp_path / "x.parquet", [1 + n % 2 for n in range(6)], names=None)
    arguments = ["look", str(tmp_path), "--output", str(tmp_path / "look.png")]
    first = CliRunner().invoke(app, arguments)
    assert "to mend   data.source.path" in first.output and "first_label to 1" in first.output
    second = CliRunner().invoke(app, [*arguments, "--set", "first_label=1"])
    assert "to mend" not in second.output
    assert yaml.safe_load(second.output.partition("\n\n")[2])["data"] == {
        "source": {"kind": "parquet", "path": str(tmp_path), "first_label": 1},
        "classes": 2,
    }


def test_pictures_that_cannot_be_read_have_a_tile_that_says_so(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 1, "b": 1})
    long = PngInfo()
    long.add_text("workflow", "x" * 3_000_000, zip=True)
    Image.new("RGB", (8, 8)).save(tmp_path / "b" / "long text.png", pnginfo=long)
    (tmp_path / "a" / "cut.jpg").write_bytes(jpeg()[:-40] + bytes(300))
    done = CliRunner().invoke(app, ["look", str(tmp_path), "--output", str(tmp_path / "out" / "look.png")])
    assert done.exit_code == 0 and (tmp_path / "out" / "look.png").is_file()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("/no/such/folder",), "does not exist"),
        (("{here}", None, "nosuch"), "'nosuch'"),
        (("{here}", None, None, ["imgae=jpg"]), "no such field"),
    ],
)
def test_mistakes_are_told(tmp_path: Path, arguments: tuple[Any, ...], words: str) -> None:
    path, test_path, kind, overrides = (*arguments, *(None, None, [])[len(arguments) - 1 :])
    with pytest.raises(UserError, match=words):
        section_of(path.format(here=tmp_path), test_path, kind, overrides or [])
