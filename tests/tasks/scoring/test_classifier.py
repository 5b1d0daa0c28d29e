"""The judge: learns what a person can tell, is deterministic, and keeps its shape for any image size."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from configs.scores import Classifier
from tasks.data.pixels import to_tensor
from tasks.scoring.classifier import ImageClassifier, accuracy, build_classifier, predict, train
from tests.helpers.builders import CLASSES, at, drawing, put_shard, small_recipe

SECTION = Classifier(epochs=6, batch=32, width=8, learning_rate=5e-3)


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    torch.set_num_threads(1)


def trained(folder: Path) -> tuple[ImageClassifier, int]:
    torch.manual_seed(0)
    judge = build_classifier(small_recipe(), SECTION)
    shards = put_shard(at(folder), small_recipe(), train=240, test=100)
    return judge, sum(train(judge, shards, 32, SECTION))


def test_it_learns_and_counts_every_image(tmp_path: Path) -> None:
    judge, seen = trained(tmp_path)
    assert seen == 6 * 240
    shards = put_shard(at(tmp_path), small_recipe(), train=240, test=100)
    assert accuracy(judge, shards, 32) > 0.9
    assert not judge.training


def test_the_same_seed_trains_the_same_judge(tmp_path: Path) -> None:
    one, other = trained(tmp_path)[0], trained(tmp_path)[0]
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))


@pytest.mark.parametrize("size", [16, 28, 32, 256])
def test_any_size_ends_in_one_label_per_image(size: int) -> None:
    torch.manual_seed(0)
    judge = ImageClassifier(size, classes=7, width=4).eval()
    random = np.random.default_rng(0)
    images = to_tensor(np.stack([drawing(label, random, side=size) for label in range(len(CLASSES))]))
    labels = predict(judge, images)
    assert labels.shape == (10,) and labels.dtype == np.int64 and labels.max() < 7
    assert torch.allclose(judge(images[:3]), judge(images)[:3], atol=1e-5), "an image is judged on its own"
