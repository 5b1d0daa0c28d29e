"""Stage `evaluate_tokenizer` on random networks: every score is there and is what one computes by hand."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from torchmetrics.image import StructuralSimilarityIndexMeasure

from configs import UserError
from infra.artifacts import Artifact
from tasks import evaluate_tokenizer, networks, train_vavae
from tasks.data.crops import Crop
from tasks.data.images import images, read_images, read_keys, stretches
from tasks.data.pixels import to_pixels, to_tensor
from tasks.data.portions import SCORED_AT_ONCE, SCORING_BATCH
from tasks.evaluate_tokenizer import STAGE
from tasks.networks import WEIGHTS, build_autoencoder, build_semantic_vae
from tasks.plan import scoring
from tasks.plan.data import Images
from tasks.randomness import key_noise
from tasks.scoring.features import FeatureExtractor, FeatureNetworks, ImageSet
from tasks.scoring.latent_scores import probe
from tasks.scoring.latents import LatentFeatureExtractor, Subjects, fit, joined, scored
from tests.helpers.builders import at, context, put_shard, put_weights, small_recipe
from tests.helpers.counting import counted

RECIPE = small_recipe(
    "evaluate_tokenizer={images: 80, probe_images: 100, density_points: 32, lpips_weights: random}",
    "foundation.weights=random",
    "evaluate.features.weights=random",
)


_UNTRAINED = (
    "train_vavae.images=0",
    "train_vavae.pretrained=v.pt",
    "train_semvae.images=0",
    "train_semvae.pretrained=s.pt",
    "train_dit.images=0",
    "train_dit.pretrained=d.pt",
)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> str:
    found = at(tmp_path_factory.mktemp("root"))
    put_shard(found, RECIPE, train=100, test=80)
    torch.manual_seed(0)
    assert RECIPE.train_semvae is not None and RECIPE.foundation is not None
    semantic = build_semantic_vae(RECIPE.train_semvae.model, RECIPE.foundation.feature_dim)
    put_weights(found, RECIPE, "train_vavae", {WEIGHTS: build_autoencoder(RECIPE.train_vavae.model)})
    put_weights(found, RECIPE, "train_semvae", {WEIGHTS: semantic})
    return found


def test_latents_are_compared_with_features_as_by_hand(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(1)
    shards = Artifact(root, "shard", "shard")
    tokenizer, semantic = (Artifact(root, stage, stage) for stage in ("train_vavae", "train_semvae"))
    foundation = networks.load_foundation(RECIPE.foundation)  # type: ignore[arg-type]
    examiner = LatentFeatureExtractor(Subjects(32, tokenizer, RECIPE.foundation, semantic))
    examiner.foundation = foundation  # random weights are drawn anew at every load
    train, sums = joined([(n, *examiner.look(*batch)) for n, batch in enumerate(images(shards, "train", 32))])
    assert sums is not None
    fitted = fit(sums, 4)
    test, _ = joined([(n, *examiner.look(*batch, fitted)) for n, batch in enumerate(images(shards, "test", 32))])
    scores, facts = scored(train, test, fitted, points=32, seed=0)

    with torch.no_grad():
        pixels = torch.cat([to_tensor(each) for _, each in images(shards, "test", 32)])
        vae, sem = networks.trained_autoencoder(tokenizer), networks.trained_semantic_vae(semantic)
        z, f = vae.encode(pixels).mean, foundation(pixels)
        restored = sem.decode(sem.encode(f).mean)
        line, mean, basis = (torch.from_numpy(np.ascontiguousarray(each)).float() for each in vars(fitted).values())
        projected = torch.einsum("cd,bchw->bdhw", line, z)
        pca = torch.einsum("dk,ek,behw->bdhw", basis, basis, f - mean[:, None, None]) + mean[:, None, None]
    expected = {
        "align_cosine": F.cosine_similarity(projected, f, dim=1).mean(),
        "feature_cosine": F.cosine_similarity(restored, f, dim=1).mean(),
        "feature_error": F.mse_loss(restored, f),
        "pca_feature_cosine": F.cosine_similarity(pca, f, dim=1).mean(),
        "pca_feature_error": F.mse_loss(pca, f),
    }
    for name, value in expected.items():
        assert scores[name] == pytest.approx(value.item(), rel=1e-3, abs=1e-4), name
    assert scores["pca_feature_error"] < scores["feature_error"], "an untrained network restores nothing"
    assert 0 < scores["align_distance_error"] < 2 and 0 < scores["density_entropy"] <= 1
    assert len(facts["channels"]["deviation"]) == 8
    chance = 0.1
    assert scores["feature_probe"] > 2 * chance and scores["pca_probe"] > chance
    cells = [
        (semantic.encode(foundation(torch.cat([to_tensor(each) for _, each in shown]))).mean, [n for n, _ in shown])
        for semantic, shown in ((sem, list(images(shards, split, 32))) for split in ("train", "test"))
    ]
    (train_s, train_labels), (test_s, test_labels) = ((s.detach().numpy(), np.concatenate(n)) for s, n in cells)
    for name, seen in (
        ("semantic_probe", lambda s: s.reshape(len(s), -1)),
        ("semantic_pooled_probe", lambda s: s.mean((2, 3))),
    ):
        found = probe(seen(train_s), train_labels, seen(test_s), test_labels)
        assert scores[name] == pytest.approx(found, abs=0.03), name


def test_the_stage_scores_both_tokenizers(root: str, local_ray: None, actors_here: None) -> None:
    made = context(root, RECIPE, STAGE, "shard", "train_vavae", "train_semvae")
    outcome = STAGE.run(made)
    assert outcome.rows == 80
    by_hand, originals, vae = (
        [],
        list[np.ndarray](),
        networks.trained_autoencoder(Artifact(root, "train_vavae", "train_vavae")),
    )
    for _, shown in images(Artifact(root, "shard", "shard"), "test", 32):
        again = vae.decode(vae.encode(to_tensor(shown)).mean)
        levels = (127.5 * again + 128).clamp(0, 255).floor().permute(0, 2, 3, 1).numpy()
        error = np.square(levels - shown.astype(np.float64)).mean(axis=(1, 2, 3))
        by_hand += (10 * np.log10(255**2 / error)).tolist()
        originals.append(shown)
    (file,) = outcome.files
    sheet = np.asarray(Image.open(io.BytesIO(made.out.read_bytes(file.path))))[
        ::2, ::2
    ]  # small images are shown at twice their size
    tiles = [sheet[33 * row : 33 * row + 32, :32] for row in range(8)]
    for row, number in enumerate((0, 10, 20, 30)):
        assert (tiles[2 * row] == np.concatenate(originals)[number]).all(), "a row of images"
        assert (tiles[2 * row] != tiles[2 * row + 1]).any(), "and what an untrained network makes of them"
    assert outcome.scores["reconstruction_psnr"] == pytest.approx(np.mean(by_hand), rel=1e-4)
    assert -1 <= outcome.scores["reconstruction_ssim"] <= 1 and outcome.scores["reconstruction_lpips"] > 0
    assert outcome.scores["reconstruction_frechet_efficientnet_lite0"] > 0
    assert not any("fid" in name for name in outcome.scores)
    assert {"align_cosine", "latent_probe", "semantic_probe", "pca_probe", "channels_active"} <= outcome.scores.keys()


def test_the_authors_protocol_as_by_hand(root: str) -> None:
    """A posterior sample of each image's own, decoded from images between the levels; PSNR and distances of levels."""
    tokenizer, shards = Artifact(root, "train_vavae", "train_vavae"), Artifact(root, "shard", "shard")
    vae, crop = networks.trained_autoencoder(tokenizer), Crop(32, "bilinear")
    examiner = FeatureExtractor(FeatureNetworks(crop, RECIPE.evaluate.features, tokenizer=tokenizer, lpips="random"))
    stretch = stretches(shards, "test/", 70, 70)[0]
    keys = read_keys(shards.storage, stretch)
    asked = {"set": ImageSet(shards, "test/", 70, reconstruct=True, sampled=5), "stretch": stretch, "name": "again"}
    found = examiner(asked)[2]
    real = torch.cat([to_tensor(each) for _, each in read_images(shards.storage, stretch, crop)])
    assert len(keys) == len(real) == 40 and keys[0] == "test/0"
    with torch.no_grad():
        posterior = vae.encode(real)
        noise = torch.from_numpy(key_noise(5, keys, "z", posterior.mean.shape[1:]))
        again = vae.decode(posterior.mean + posterior.std * noise)
    levels, theirs = to_pixels(again).astype(float), to_pixels(real).astype(float)
    psnr = 10 * np.log10(255**2 / np.square(levels - theirs).mean(axis=(1, 2, 3)))
    np.testing.assert_allclose(found.psnr, psnr, rtol=2e-3)  # a level here and there is cut off another way
    measure = StructuralSimilarityIndexMeasure(data_range=(-1.0, 1.0))
    assert found.ssim is not None and found.lpips is not None
    for row in (0, 39):
        assert found.ssim[row] == pytest.approx(measure(again[row : row + 1], real[row : row + 1]).item(), abs=1e-4)
    by_hand = examiner.lpips(again, real).flatten()  # type: ignore[misc]
    torch.testing.assert_close(torch.from_numpy(found.lpips), by_hand, rtol=1e-2, atol=1e-4)
    means = examiner(asked | {"set": ImageSet(shards, "test/", 70, reconstruct=True)})[2]
    assert not np.allclose(means.psnr, found.psnr, rtol=1e-3)
    pair = np.concatenate([each for _, each in images(shards, "test", crop, 5)])[3:]
    second = examiner.look(found.labels[3:5], pair, True, keys[3:5], 5)
    np.testing.assert_allclose(second.psnr, found.psnr[3:5], rtol=1e-4)  # type: ignore[index]


def test_reconstructions_alone_need_no_training_images_and_no_features(
    tmp_path: Path, actors_here: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Validation images, the tokenizer, and what scores reconstructions: no foundation model, no Semantic VAE."""
    chosen = small_recipe(
        *_UNTRAINED,
        "shard.test_share=1.0",
        "evaluate_tokenizer={images: 80, probe_images: 0, density_points: 32, posterior: sample, crop: torchvision}",
        "evaluate.features.weights=random",
        "foundation.weights=nowhere.pt",
    )
    put_shard(at(tmp_path), chosen, train=0, test=80)
    put_weights(at(tmp_path), chosen, "train_vavae", {WEIGHTS: build_autoencoder(chosen.train_vavae.model)})
    monkeypatch.setattr(evaluate_tokenizer, "reconstructed", lambda context, shown: shown)
    outcome = STAGE.run(context(at(tmp_path), chosen, STAGE, "shard", "train_vavae"))
    assert outcome.rows == 80 and {"reconstruction_psnr", "density_entropy", "channels_active"} <= outcome.scores.keys()
    assert not [name for name in outcome.scores if "probe" in name or "align" in name or "feature_" in name]
    with pytest.raises(UserError, match=r"probe_images is 100 but shard.test_share is 1, .*set probe_images to 0"):
        fitted = "evaluate_tokenizer.probe_images=100"
        evaluate_tokenizer.check(small_recipe("shard.test_share=1.0", *_UNTRAINED, fitted))
    with pytest.raises(UserError, match=r"shard.test_share is 1, which leaves train_vavae no image"):
        small_recipe("shard.test_share=1.0")


def test_weights_of_scores_are_opened_before_anything_is_trained(tmp_path: Path) -> None:
    torch.save({"state_dict": {}}, tmp_path / "vgg.pth")
    wrong = small_recipe(f"evaluate_tokenizer.lpips_weights={tmp_path}/vgg.pth")
    with pytest.raises(UserError, match=r"vgg\.pth: .*set evaluate_tokenizer.lpips_weights to null"):
        evaluate_tokenizer.check(wrong)
    evaluate_tokenizer.check(small_recipe("evaluate_tokenizer.lpips_weights=null"))  # as it says
    trained = ("train_vavae.objective.perceptual_weight=1.0", f"train_vavae.objective.lpips_weights={tmp_path}/vgg.pth")
    with pytest.raises(UserError, match=r"perceptual_weight .* to 0"):
        train_vavae.check(small_recipe(*trained))
    train_vavae.check(small_recipe(trained[1]))


def test_the_plan_counts_what_its_networks_do(root: str) -> None:
    """Of a part of each set, whose last batch is filled up for the networks that score reconstructions."""
    tokenizer, semantic = (Artifact(root, stage, stage) for stage in ("train_vavae", "train_semvae"))
    batch, part = SCORING_BATCH, SCORED_AT_ONCE
    labels, pixels = np.zeros(batch, np.int64), np.zeros((batch, 32, 32, 3), np.uint8)

    def looks(lpips: str | None) -> int:
        examiner = FeatureExtractor(FeatureNetworks(32, RECIPE.evaluate.features, tokenizer=tokenizer, lpips=lpips))
        return sum(counted(lambda again=again: examiner.look(labels, pixels, again)) for again in (False, True))

    examined = LatentFeatureExtractor(Subjects(32, tokenizer, RECIPE.foundation, semantic))
    _, sums = examined.look(labels, pixels)
    assert sums is not None
    passes = [counted(lambda fitted=fitted: examined.look(labels, pixels, fitted)) for fitted in (None, fit(sums, 4))]
    bare = looks(None)
    found = -(-part // batch) * bare + part / batch * (looks("random") - bare + sum(passes))
    recipe = RECIPE.model_copy(
        update={
            "evaluate_tokenizer": RECIPE.evaluate_tokenizer.model_copy(update={"images": part, "probe_images": part})
        }
    )
    planned = scoring.evaluate_tokenizer(recipe, Images(part, part, 500.0, 10.0, "given", "given"))
    assert planned.flops.value == pytest.approx(found, rel=0.01)
    assert (planned.rows.value, planned.decodes) == (part, 4 * part)
