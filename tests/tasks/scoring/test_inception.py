"""The Inception network: torch-fidelity's numbers, ADM's spatial features, and no name that is not earned."""

from __future__ import annotations

import os
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch_fidelity.feature_extractor_inceptionv3 import FeatureExtractorInceptionV3
from torch_fidelity.interpolate_compat_tensorflow import interpolate_bilinear_2d_like_tensorflow1x

from configs import UserError
from infra.weights import file_hash
from tasks.scoring.features import FeatureExtractor, FeatureNetworks, PerImageFeatures
from tasks.scoring.inception import GENUINE, Identity, Inception
from tests.helpers.builders import small_recipe
from tests.helpers.inceptions import put_inception


@pytest.fixture(scope="module")
def weights(tmp_path_factory: pytest.TempPathFactory) -> Path:
    torch.set_num_threads(1)
    return put_inception(tmp_path_factory.mktemp("inception"))


def noise(count: int, side: int = 32) -> torch.Tensor:
    return torch.from_numpy(np.random.default_rng(0).integers(0, 256, (count, 3, side, side), dtype=np.uint8))


def test_it_finds_what_torch_fidelity_finds(weights: Path) -> None:
    theirs = FeatureExtractorInceptionV3("it", ["2048", "logits_unbiased"], feature_extractor_weights_path=str(weights))
    ours, images = Inception(str(weights)), noise(2)
    found = ours(images)
    pool, logits = theirs(images)
    assert torch.equal(found.pool, pool) and torch.equal(found.logits, logits)
    assert found.pool.shape == (2, 2048) and found.logits.shape == (2, 1008)
    assert not torch.equal(found.pool[0], found.pool[1])


@torch.inference_mode()
def test_spatial_features_are_seven_channels_of_the_seventh_mixed_block(weights: Path) -> None:
    ours, images = Inception(str(weights)), noise(1)
    body = ours.network
    x = interpolate_bilinear_2d_like_tensorflow1x(images.float(), size=(299, 299), align_corners=False)
    x = (x - 128) / 128
    before = ["Conv2d_1a_3x3", "Conv2d_2a_3x3", "Conv2d_2b_3x3", "MaxPool_1", "Conv2d_3b_1x1", "Conv2d_4a_3x3"]
    mixed = ["MaxPool_2", "Mixed_5b", "Mixed_5c", "Mixed_5d", "Mixed_6a", "Mixed_6b", "Mixed_6c"]
    for name in (*before, *mixed):
        x = getattr(body, name)(x)
    branch = body.Mixed_6d.branch1x1
    grid = torch.relu(branch.bn(branch.conv(x)))[0, :7]
    found = ours(images).spatial
    assert found.shape == (1, 2023)
    assert torch.equal(found.reshape(17, 17, 7), grid.permute(1, 2, 0))
    assert found.max() > 0


def test_features_do_not_depend_on_how_many_images_come_at_once(weights: Path) -> None:
    features = small_recipe().evaluate.features
    examiner = FeatureExtractor(FeatureNetworks(32, features, inception=str(weights)))
    labels, images = np.arange(5), noise(5).permute(0, 2, 3, 1).numpy()
    whole = examiner.look(labels, images)
    pieces = PerImageFeatures.joined([examiner.look(labels[part], images[part]) for part in (slice(0, 1), slice(1, 5))])
    for name in ("pool", "spatial", "logits"):
        assert np.array_equal(getattr(whole, name), getattr(pieces, name)), name


def test_only_the_genuine_weights_give_the_published_names(weights: Path) -> None:
    ours, genuine = Identity.at(str(weights)), Identity(GENUINE)
    assert ours.sha256 == file_hash(weights) and not ours.genuine and genuine.genuine
    scores = ("frechet", "spatial_frechet", "kernel_distance", "class_score")
    assert [genuine.name(score) for score in scores] == ["fid", "sfid", "kid", "inception_score"]
    for score in scores:
        assert ours.name(score) == f"{score}_inception_unverified"


def test_a_changed_file_is_noticed(tmp_path: Path) -> None:
    path = tmp_path / "weights.pth"
    path.write_bytes(b"one")
    before = file_hash(path)
    path.write_bytes(b"other")
    assert file_hash(path) != before


def test_weights_that_cannot_be_used_are_refused(weights: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="does not exist"):
        Inception(str(tmp_path / "none.pth"))
    damaged = tmp_path / "damaged.pth"
    damaged.write_bytes(weights.read_bytes()[:100_000])
    with pytest.raises(UserError, match="damaged"):
        Inception(str(damaged))
    other = tmp_path / "other.pth"
    torch.save({"fc.weight": torch.zeros(3)}, other)
    with pytest.raises(UserError, match=r"not the tensors of torch-fidelity's Inception"):
        Inception(str(other))
    torch.save([torch.zeros(3)], other)
    with pytest.raises(UserError, match="dictionary of tensors"):
        Inception(str(other))


class _Command:
    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (f"touch {self.target}",)


def test_code_in_a_weights_file_is_not_run(tmp_path: Path) -> None:
    target, file = tmp_path / "ran", tmp_path / "evil.pth"
    torch.save({"fc.weight": _Command(target)}, file, pickle_module=pickle)
    with pytest.raises(UserError, match=r"refused, because it holds an object of posix\.system"):
        Inception(str(file))
    assert not target.exists()
