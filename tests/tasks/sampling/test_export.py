"""A sample as files for other evaluators: every image once, with its label, in an order that mixes the classes."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image as Picture

from infra.artifacts import Artifact
from tasks.sampling.export import write_npz, write_pngs
from tasks.scoring.adm_file import read_statistics
from tests.helpers.builders import at, put, put_sample, small_recipe

COUNT = 60
LABELS = np.repeat(np.arange(6), 10)  # sorted: the order in which ADM's evaluator must not see them
IMAGES = np.random.default_rng(0).integers(0, 256, size=(COUNT, 32, 32, 3), dtype=np.uint8)


@pytest.fixture
def sample(tmp_path: Path) -> Artifact:
    made = put_sample(at(tmp_path), small_recipe(), IMAGES, LABELS)
    return put(made.root, small_recipe(), "sample", list(made.manifest.files), facts={"shape": [32, 32, 3]})


def test_the_npz_holds_every_image_with_its_label_in_a_mixed_order(sample: Artifact, tmp_path: Path) -> None:
    target = tmp_path / "out" / "sample.npz"
    assert write_npz(sample, target, seed=3) == COUNT
    with np.load(target, allow_pickle=False) as found:
        images, labels = found["arr_0"], found["arr_1"]
    assert images.dtype == np.uint8 and images.shape == IMAGES.shape
    order = np.random.default_rng(3).permutation(COUNT)
    assert np.array_equal(images[order], IMAGES) and np.array_equal(labels[order], LABELS)
    assert min(len(set(labels[start : start + 20])) for start in range(0, COUNT, 20)) >= 5
    assert [path.name for path in target.parent.iterdir()] == ["sample.npz"], "nothing is left beside it"
    assert read_statistics(target, {}).images == (COUNT, 32), "our own reader takes it as a reference"


def test_the_order_belongs_to_the_seed(sample: Artifact, tmp_path: Path) -> None:
    for name, seed in (("one", 0), ("same", 0), ("other", 1)):
        write_npz(sample, tmp_path / f"{name}.npz", seed)
    one, same, other = (np.load(tmp_path / f"{name}.npz")["arr_1"].tolist() for name in ("one", "same", "other"))
    assert one == same != other


def test_one_png_for_each_image(sample: Artifact, tmp_path: Path) -> None:
    assert write_pngs(sample, tmp_path / "png") == COUNT
    files = sorted((tmp_path / "png").iterdir())
    assert [file.name for file in files[9:11]] == ["000009_0.png", "000010_1.png"] and len(files) == COUNT
    assert np.array_equal(np.asarray(Picture.open(files[17])), IMAGES[17])
