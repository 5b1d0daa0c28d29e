"""Evaluation: better pictures score better, the floor stands beside them, and what can be shared is made once."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from configs import UserError
from configs.data import Foundation
from infra.artifacts import MANIFEST, Artifact
from tasks.data.images import images
from tasks.data.pixels import peak_signal_to_noise, to_tensor
from tasks.evaluate import STAGE
from tasks.networks import load_foundation
from tasks.scoring.classifier import trained_classifier
from tasks.scoring.distances import frechet_distance
from tasks.scoring.features import FeatureExtractor, FeatureNetworks, PerImageFeatures
from tasks.scoring.gaussian import Gaussian
from tasks.stage import perform
from tests.helpers.builders import at, context, drawing, put_networks, put_sample, put_shard, small_recipe

SECOND = "evaluate.classifier_frechet=true"
SETTINGS = ("evaluate.images=100", "evaluate.classifier.epochs=6", "evaluate.classifier.learning_rate=5.0e-3")
RECIPE = small_recipe(*SETTINGS, SECOND)


def pictures(labels: np.ndarray, seed: int) -> np.ndarray:
    random = np.random.default_rng(seed)
    return np.stack([drawing(int(label), random, side=32) for label in labels])


# ------------------------------------------------------------------------------------------------------ examiner


def test_features_do_not_depend_on_how_many_images_come_at_once(tmp_path: Path) -> None:
    torch.set_num_threads(1)
    put_networks(at(tmp_path), RECIPE)
    tokenizer = Artifact(at(tmp_path), "train_vavae", "train_vavae")
    examiner = FeatureExtractor(FeatureNetworks(32, RECIPE.evaluate.features, tokenizer=tokenizer))
    labels = np.arange(20) % 10
    images = pictures(labels, seed=3)
    whole = examiner.look(labels, images, reconstruct=True)
    starts = range(0, 20, 3)
    pieces = PerImageFeatures.joined(
        [examiner.look(labels[i : i + 3], images[i : i + 3], reconstruct=True) for i in starts]
    )
    assert whole.features.shape == (20, 320)
    assert np.array_equal(whole.features, pieces.features)
    assert whole.psnr is not None and np.array_equal(whole.psnr, pieces.psnr)  # type: ignore[arg-type]
    assert whole.predictions is None and whole.consistency is None


def test_an_image_is_its_class_token_where_the_recipe_says_so() -> None:
    mean = Foundation(name="vit_tiny_patch16_224", weights="random", feature_dim=192, input_size=32)
    torch.manual_seed(0)
    means = FeatureExtractor(FeatureNetworks(32, mean))
    torch.manual_seed(0)
    tokens = FeatureExtractor(FeatureNetworks(32, mean.model_copy(update={"vector": "token"})))
    labels = np.arange(3)
    images = pictures(labels, seed=3)
    found = tokens.look(labels, images).features
    network, given = tokens.features, tokens.features.preprocess(to_tensor(images))
    assert np.allclose(found, network.network.forward_features(given)[:, 0].numpy(), atol=1e-5)
    assert not np.allclose(found, means.look(labels, images).features, atol=1e-3)
    assert mean.label == "vit_tiny_patch16_224"
    assert mean.model_copy(update={"vector": "token"}).label == "vit_tiny_patch16_224 token"
    without = Foundation(
        name="efficientnet_lite0", weights="package", feature_dim=320, input_size=32, layer=4, vector="token"
    )
    with pytest.raises(UserError, match=r"efficientnet_lite0 .* has no class token"):
        load_foundation(without)


def test_psnr_in_closed_form() -> None:
    black = np.zeros((2, 4, 4, 3), np.uint8)
    off = black.copy()
    off[0] += 10
    off[1, 0, 0, 0] = 48
    expected = [20 * np.log10(255 / 10), 10 * np.log10(255**2 / (48**2 / 48))]
    assert peak_signal_to_noise(black, off) == pytest.approx(expected)
    assert peak_signal_to_noise(black, black) == pytest.approx([20 * np.log10(255 / 0.5)] * 2)


# --------------------------------------------------------------------------------------------------------- stage


@pytest.fixture(scope="module")
def evaluated(
    tmp_path_factory: pytest.TempPathFactory, local_ray: None, actors_here: None
) -> tuple[str, Artifact, Artifact]:
    """Evaluations of pictures as good as real ones, and of the same under noise and wrong labels."""
    root = at(tmp_path_factory.mktemp("evaluated"))
    put_shard(root, RECIPE, train=240, test=100)
    put_networks(root, RECIPE)
    labels = np.arange(80) % 10
    images = pictures(labels, seed=5)
    noise = np.random.default_rng(0).normal(scale=60, size=images.shape)
    put_sample(root, RECIPE, images, labels, "good")
    put_sample(root, RECIPE, (images + noise).clip(0, 255).astype(np.uint8), np.roll(labels, 3), "poor")
    jobs = [context(root, RECIPE, STAGE, "shard", "train_vavae", sample=name) for name in ("good", "poor")]
    good, poor = (perform(STAGE, each.job) for each in jobs)
    return root, good, poor


def test_better_pictures_have_better_scores(evaluated: tuple[str, Artifact, Artifact]) -> None:
    good, poor = (artifact.manifest.scores for artifact in evaluated[1:])
    assert poor["frechet_efficientnet_lite0"] > 2 * good["frechet_efficientnet_lite0"]
    assert good["class_consistency"] > 0.9 > 0.3 > poor["class_consistency"]
    assert good["precision_efficientnet_lite0"] > poor["precision_efficientnet_lite0"]
    assert poor["frechet_classifier"] > 2 * good["frechet_classifier"] > 0
    assert good["reconstruction_psnr"] > 5 and good["reconstruction_frechet_efficientnet_lite0"] > 0


def test_the_floor_is_what_real_images_reach(evaluated: tuple[str, Artifact, Artifact]) -> None:
    good, poor = (artifact.manifest for artifact in evaluated[1:])
    for name in (
        "frechet_efficientnet_lite0",
        "frechet_classifier",
        "precision_efficientnet_lite0",
        "recall_efficientnet_lite0",
        "class_consistency",
    ):
        assert good.scores[f"floor_{name}"] == poor.scores[f"floor_{name}"]
    assert good.scores["floor_class_consistency"] > 0.9 and good.scores["judge_accuracy"] > 0.9
    assert good.scores["floor_frechet_efficientnet_lite0"] < poor.scores["frechet_efficientnet_lite0"]
    assert good.facts["images"] == {"generated": 80, "test": 100, "floor": 80}
    assert len(good.facts["consistency_by_label"]) == 10


def test_where_all_images_are_trained_on_there_is_no_floor(tmp_path: Path, actors_here: None) -> None:
    recipe = small_recipe(*SETTINGS, "evaluate.reference=train", "evaluate.classifier=null", "shard.test_share=0.0")
    put_shard(at(tmp_path), recipe, train=120, test=0)
    put_networks(at(tmp_path), recipe)
    labels = np.arange(80) % 10
    put_sample(at(tmp_path), recipe, pictures(labels, seed=9), labels)
    made = perform(STAGE, context(at(tmp_path), recipe, STAGE, "shard", "train_vavae", "sample").job).manifest
    assert made.facts["images"] == {"generated": 80, "test": 100, "floor": 0}
    assert made.scores["frechet_efficientnet_lite0"] > 0
    assert not [name for name in made.scores if name.startswith(("floor_", "reconstruction_"))]


def test_the_second_distance_is_of_what_the_judge_sees(evaluated: tuple[str, Artifact, Artifact]) -> None:
    root, good, _ = evaluated
    (fingerprint,) = (path.name for path in (Path(root.removeprefix("file://")) / "judge").iterdir())
    judge = trained_classifier(Artifact(root, "judge", fingerprint))

    def seen(pixels: np.ndarray) -> Gaussian:
        with torch.no_grad():
            return Gaussian.of(judge.grid(to_tensor(pixels)).mean(dim=(2, 3)).numpy())

    real = np.concatenate([pixels for _, pixels in images(Artifact(root, "shard", "shard"), "test", 32)])
    by_hand = frechet_distance(seen(real), seen(pictures(np.arange(80) % 10, seed=5)))
    assert good.manifest.scores["frechet_classifier"] == pytest.approx(by_hand, rel=1e-3)


def test_no_distance_calls_itself_fid(evaluated: tuple[str, Artifact, Artifact]) -> None:
    assert not [name for name in evaluated[1].manifest.scores if "fid" in name]


def test_judge_and_references_are_made_once(evaluated: tuple[str, Artifact, Artifact]) -> None:
    root = Path(evaluated[0].removeprefix("file://"))
    for name in ("judge", "reference", "floor", "reconstruction"):
        assert len(list((root / name).glob("*/manifest.json"))) == 1, name


def test_a_poor_judge_is_told_and_only_its_score_left_out(
    evaluated: tuple[str, Artifact, Artifact], capsys: pytest.CaptureFixture[str]
) -> None:
    root = evaluated[0]
    (fingerprint,) = (path.name for path in (Path(root.removeprefix("file://")) / "judge").iterdir())
    judge = Artifact(root, "judge", fingerprint)
    judge.storage.write_bytes(MANIFEST, replace(judge.manifest, scores={"judge_accuracy": 0.62}).to_json())
    strict = small_recipe(*SETTINGS, SECOND, "evaluate.classifier.min_accuracy=0.9")
    job = context(root, strict, STAGE, "shard", "train_vavae", sample="good").job
    scores = perform(STAGE, job).manifest.scores
    said = capsys.readouterr()
    assert "labels only 0.620 of the test split right" in said.out + said.err
    assert scores["judge_accuracy"] == 0.62 and scores.keys() >= {"frechet_efficientnet_lite0", "reconstruction_psnr"}
    assert not [name for name in scores if "class_consistency" in name or "frechet_classifier" in name]
