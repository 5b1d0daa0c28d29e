"""Stage `evaluate_tokenizer` on random networks: every score is there and is what one computes by hand."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

from infra.artifacts import Artifact
from tasks import networks
from tasks.data.images import images
from tasks.data.pixels import to_tensor
from tasks.data.portions import SCORED_AT_ONCE, SCORING_BATCH
from tasks.evaluate_tokenizer import STAGE
from tasks.networks import WEIGHTS, build_autoencoder, build_semantic_vae
from tasks.plan import scoring
from tasks.plan.data import Images
from tasks.scoring.features import FeatureExtractor, FeatureNetworks
from tasks.scoring.latents import LatentFeatureExtractor, Subjects, fit, joined, scored
from tests.helpers.builders import at, context, put_shard, put_weights, small_recipe
from tests.helpers.counting import counted

RECIPE = small_recipe(
    "evaluate_tokenizer={images: 80, probe_images: 100, density_points: 32, lpips_weights: random}",
    "foundation.weights=random",
    "evaluate.features.weights=random",
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


def test_the_plan_counts_what_its_networks_do(root: str) -> None:
    """Of a part of each set, whose last batch is filled up for the networks that score reconstructions."""
    tokenizer, semantic = (Artifact(root, stage, stage) for stage in ("train_vavae", "train_semvae"))
    batch, part = SCORING_BATCH, SCORED_AT_ONCE
    labels, pixels = np.zeros(batch, np.int64), np.zeros((batch, 32, 32, 3), np.uint8)

    def looks(lpips: str | None) -> int:
        examiner = FeatureExtractor(FeatureNetworks(32, RECIPE.evaluate.features, tokenizer=tokenizer, lpips=lpips))
        return sum(counted(lambda again=again: examiner.look(labels, pixels, again)) for again in (False, True))

    latents = LatentFeatureExtractor(Subjects(32, tokenizer, RECIPE.foundation, semantic))
    _, sums = latents.look(labels, pixels)
    assert sums is not None
    passes = [counted(lambda fitted=fitted: latents.look(labels, pixels, fitted)) for fitted in (None, fit(sums, 4))]
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
