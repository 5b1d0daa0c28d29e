"""What a worker of Ray finds wrong ends its stage at once: one line that a person can act upon, no traceback."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path

import pytest

from configs import UserError
from infra.artifacts import MANIFEST
from infra.storage import Storage
from tasks import shard
from tasks.scoring import classifier
from tasks.stage import Stage, perform
from tests.helpers.builders import put_shard, small_recipe
from tests.helpers.odd_sources import hub, recipe_of, tree
from tests.helpers.piles import run_stage

pytestmark = pytest.mark.usefixtures("local_ray")


def _in_the_way(tmp_path: Path) -> str:
    """A folder where a worker wants to write is a file already."""
    recipe = recipe_of("folder", tree(tmp_path / "pile", {"a": 4, "b": 4}), 2)
    job = shard.STAGE.job(recipe, f"file://{tmp_path}/root", {})
    folder = Storage.at(job.root).child("shard", job.fingerprint)
    folder.write_bytes("train", b"a file")
    perform(shard.STAGE, job)
    return job.fingerprint


def _scanned(tmp_path: Path) -> None:
    """Parquet whose images are damaged behind a sound footer, which only a worker reads."""
    path = tmp_path / "pile" / "train.parquet"
    hub(path, [n % 2 for n in range(40)], names=["cat", "dog"])
    recipe = recipe_of("parquet", path.parent, 2)
    shard.external(recipe)  # as the command looked at it
    data = bytearray(path.read_bytes())
    data[100:4000] = bytes(3900)
    path.write_bytes(data)
    run_stage(shard.STAGE, recipe, f"file://{tmp_path}/root")


def _judged(tmp_path: Path) -> None:
    """Images that the judge learns from are gone."""
    root = f"file://{tmp_path}/root"
    recipe = small_recipe("evaluate.classifier={epochs: 1}")
    images = put_shard(root, recipe)
    for part in images.files("train/", ".parquet"):
        images.storage.delete(part.path)
    stage = Stage("judge", 1, ("evaluate",), ("shard",), classifier.run)
    run_stage(stage, recipe, root, images)


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (_in_the_way, r"stage shard: cannot write .*train/part-00000"),
        (_scanned, r"data\.source: .*train\.parquet is not a whole Parquet file, or damaged"),
        (_judged, r"train/part-00000\.parquet is damaged \(the file is missing\); .* --force shard"),
    ],
)
def test_a_mistake_is_told_once(
    act: Callable[[Path], object],
    words: str,
    tmp_path: Path,
    capfd: pytest.CaptureFixture[str],
    caplog: pytest.LogCaptureFixture,
) -> None:
    with caplog.at_level(logging.WARNING), pytest.raises(UserError, match=words) as told:
        act(tmp_path)
    assert "\n" not in str(told.value)
    said = "".join(capfd.readouterr()) + caplog.text
    assert "Traceback" not in said and "ray::" not in said
    assert len(list(tmp_path.rglob(MANIFEST))) == (act is _judged), "only what was there before"
