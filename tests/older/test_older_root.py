"""A root and a half-trained checkpoint of the last release, met by today's code (docs/versions.md)."""

from __future__ import annotations

import json
import shutil
import tarfile
import tomllib
from pathlib import Path

import numpy as np
import pytest

from configs import UserError, load_recipe
from configs.load import read_recorded
from infra import differences, integrity, inventory
from infra.artifacts import MANIFEST, Artifact, Manifest
from infra.storage import Storage
from tasks.dag import load_stage
from tasks.stage import Context, perform
from tasks.training.checkpoints import Checkpoints, read, whole
from tasks.training.launch import train
from tests.older.make import MIDDLE, RECIPE, STAGES, figures

SAMPLE = Path(__file__).with_name("v0.1.0.tar.xz")


@pytest.fixture
def sample(tmp_path: Path) -> Path:
    """`root` of the last release, where today's code may write, `half` a checkpoint, and `trained.json`."""
    with tarfile.open(SAMPLE) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path


@pytest.fixture
def root(sample: Path) -> Path:
    return sample / "root"


def test_finished_artifacts_of_the_last_release_are_used_as_they_are(root: Path, fashion_mnist: str) -> None:
    """Today's code gives every stage the name that it had, so that nothing of an older root is made anew."""
    entries = inventory.read(str(root))
    made: dict[str, str] = {}
    for name in STAGES[:-1]:
        stage = load_stage(name)
        inputs = {each: made[each] for each in stage.inputs if each in made}
        job = stage.job(load_recipe(str(RECIPE)), Storage.at(str(root)).url, inputs)
        assert f"{name}/{job.fingerprint}" in entries, (name, "is made anew: CHANGELOG.md has to say so")
        assert perform(stage, job).manifest.libraries["torch"], "read, not made"
        made[name] = job.fingerprint
    assert len(entries) == len(STAGES) - 1
    assert not [fault for faults in integrity.faults(entries.values()).values() for fault in faults]


def test_what_an_older_manifest_says_is_understood(root: Path) -> None:
    entries = inventory.read(str(root))
    for entry in entries.values():
        assert entry.manifest is not None
        assert read_recorded(entry.manifest.recipe).train_dit.images == 2 * MIDDLE
        assert not differences.why(entries, entry, entry)


def test_a_manifest_of_a_newer_version_is_not_taken_for_damaged(root: Path) -> None:
    entry = next(iter(inventory.read(str(root)).values()))
    path = Path(entry.artifact.storage.path) / MANIFEST
    values = json.loads(path.read_text()) | {"flavour": "sweet"}
    values["libraries"]["latentforge"] = "9.9"
    path.write_text(json.dumps(values))
    with pytest.raises(UserError, match=r"written by another latentforge \(9\.9\) and says flavour"):
        _ = Artifact(entry.artifact.root, entry.artifact.stage, entry.artifact.fingerprint).manifest
    with pytest.raises(UserError, match="is damaged"):
        Manifest.from_json(b"[]", "here")


def test_a_half_trained_checkpoint_of_the_last_release_is_whole(sample: Path) -> None:
    (sample / "half").rename(sample / "checkpoints")
    storage = Storage.at(str(sample))
    assert whole(storage) == [MIDDLE]
    checkpoint, fault = read(storage, MIDDLE)
    assert fault is None and checkpoint is not None and checkpoint.images_seen == MIDDLE
    assert Checkpoints(storage, keep=1).at(MIDDLE) is not None


def test_a_half_trained_checkpoint_of_the_last_release_goes_on(sample: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """To the weights that the last release trained without an interruption, and from what the checkpoint says."""
    told = json.loads((sample / "trained.json").read_text())
    root = sample / "root"
    inputs = {each.artifact.stage: each.artifact.fingerprint for each in inventory.read(str(root)).values()}
    stage = load_stage("train_dit")
    recipe = load_recipe(str(RECIPE))
    job = stage.job(recipe, Storage.at(str(root)).url, {n: inputs[n] for n in stage.inputs if n in inputs})
    assert job.fingerprint == told["fingerprint"], "training begins anew: CHANGELOG.md has to say so"
    folder = root / "train_dit" / job.fingerprint
    shutil.copytree(sample / "half", folder / "checkpoints")
    train(Context(job), recipe.train_dit, alone=True)
    said = capfd.readouterr()
    assert f"going on from the checkpoint at {MIDDLE} images" in said.out + said.err
    trained = figures(folder)
    assert trained.keys() == told["weights"].keys()
    for file, tensors in told["weights"].items():
        assert trained[file].keys() == tensors.keys()
        for name, expected in tensors.items():
            np.testing.assert_allclose(trained[file][name], expected, rtol=1e-3, atol=1e-5, err_msg=f"{file} {name}")


def test_this_version_and_the_last_one_have_their_headings() -> None:
    repository = Path(__file__).parents[2]
    version = tomllib.loads((repository / "pyproject.toml").read_text())["project"]["version"]
    headings = [line for line in (repository / "CHANGELOG.md").read_text().splitlines() if line.startswith("## ")]
    assert headings[0] == "## Unreleased" or headings[0].startswith(f"## {version} ")
    assert [line for line in headings if line.startswith("## 0.1.0 ") and "`v0.1.0`" in line]
    assert SAMPLE.stat().st_size < 300_000
