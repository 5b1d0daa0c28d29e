"""Every published number in the recipes is the one that was read in the papers and the authors' repositories.

The tables here are written from there, not from the recipes: scores by ADM's evaluator of 50,000 images, settings of
sampling and training, places of files.
"""

from __future__ import annotations

import math
from typing import Any

import pytest

from configs import Recipe, UserError, load_recipe, recipe_names
from configs.published import Scores, beside, departures, published_metrics, scores_of_pictures, scores_of_tokenizer
from tasks.plan.solvers import effective_evaluations

ADM = (
    "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/ref_batches/imagenet/256/"
    "VIRTUAL_imagenet256_labeled.npz"
)
INCEPTION = (
    "https://github.com/toshas/torch-fidelity/releases/download/v0.2.0/weights-inception-2015-12-05-6726825d.pth"
)
GUIDES = "hf://SFD-Project/SFD/model_weights/sfd_autoguidance_b/checkpoints/"
VAVAE = "hf://hustvl/vavae-imagenet256-f16d32-dinov2/vavae-imagenet256-f16d32-dinov2.pt"
LDM = "hf://hustvl/va-vae-imagenet256-experimental-variants/ldm-imagenet256-f16d32-50ep.ckpt"
SEMVAE = "hf://SFD-Project/SFD/semantic_vae/dinov2_vitb14_reg/transformer_ch16/checkpoints/semantic_ae_final.pt"

NAMES = ("fid", "fid_gpu", "sfid", "inception_score", "precision", "recall")
PICTURES: dict[str, tuple[tuple[float | None, ...] | None, tuple[float | None, ...] | None]] = {
    # recipe: guided, unguided; each FID, on GPUs, sFID, IS, precision, recall
    "lightningdit_xl_64ep": ((2.11, None, 4.16, 252.3, 0.81, 0.58), (5.14,)),
    "lightningdit_xl_800ep": ((1.35, None, 4.15, 295.3, 0.79, 0.65), (2.17,)),
    "sfd_xl_80ep": ((1.30, 1.29, 3.87, 233.4), (3.43, 3.50)),
    "sfd_xl_80ep_short": ((1.38,), (3.23,)),
    "sfd_xl_800ep": ((1.06, 1.03, 3.89, 267.0), (2.54, 2.66)),
    "sfd_xxl_80ep": ((1.19, 1.20, 4.00, 240.4), (2.84, 2.92)),
    "sfd_xxl_800ep": ((1.04, 1.04, 3.75, 264.2), (2.38, 2.36)),
    "lowdiff_b_imagenet256": ((4.00, None, None, 195.06), None),
    "lowdiff_cifar10": (None, (1.94, None, None, 10.03)),
    "lowdiff_cifar10_uncond": (None, (2.11, None, None, 9.87)),
    "lowdiff_ffhq64": (None, (2.43,)),
}
TOKENIZERS = {  # rFID, PSNR, LPIPS, SSIM
    "vavae_f16d32": (0.28, 27.96, 0.096, 0.79),
    "ldm_f16d32": (0.26, 28.59, 0.089, 0.80),
}
LIGHTNINGDIT: dict[str, Any] = {
    "sample": {"images": 50_000, "labels": "random", "solver": "euler", "steps": 250, "off_by_one": True, "shift": 0.3},
    "guidance": {"method": "classifier_free", "channels": 3},
    "train": {"learning_rate": 2e-4, "betas": (0.9, 0.95), "batch": 1024, "ema_decay": 0.9999, "clip_norm": None},
    "objective": {"direction_floor": 1e-8, "align_weight": 0.0},
}
SFD: dict[str, Any] = {
    "sample": {"images": 50_000, "labels": "balanced", "solver": "dopri5", "shift": 0.0, "batch": 4},
    "guidance": {"method": "autoguidance", "groups": "both", "interval_start": 0.0, "interval_end": 1.0},
    "train": {"learning_rate": 1e-4, "betas": (0.9, 0.999), "batch": 256, "ema_decay": 0.9999, "clip_norm": None},
    "objective": {"direction_floor": 1e-8, "semantic_weight": 2.0, "align_weight": 1.0, "align_mode": "cos"},
}
SHORT: dict[str, Any] = {
    "train": {"learning_rate": 2e-4, "betas": (0.9, 0.95), "batch": 256},
    "objective": {"align_weight": 0.5, "align_mode": "cos_mse"},
}
SETTINGS: dict[str, tuple[dict[str, Any], int, dict[str, Any]]] = {
    # recipe: its family, steps of training, guidance
    "lightningdit_xl_64ep": (LIGHTNINGDIT, 80_000, {"scale": 10.0, "interval_start": 0.10}),
    "lightningdit_xl_800ep": (LIGHTNINGDIT, 1_000_000, {"scale": 6.7, "interval_start": 0.125}),
    "sfd_xl_80ep": (SFD, 400_000, {"scale": 1.6, "weights": GUIDES + "0070000.pt"}),
    "sfd_xl_80ep_short": ({**SFD, **SHORT}, 400_000, {"scale": 1.5, "weights": GUIDES + "0060000.pt"}),
    "sfd_xl_800ep": (SFD, 4_000_000, {"scale": 1.5, "weights": GUIDES + "0070000.pt"}),
    "sfd_xxl_80ep": (SFD, 400_000, {"scale": 1.5, "weights": GUIDES + "0060000.pt"}),
    "sfd_xxl_800ep": (SFD, 4_000_000, {"scale": 1.5, "weights": GUIDES + "0120000.pt"}),
}
OURS = {"lightningdit_xl_512", "sfd_xl_512", "lightningdit_xl_e2e_vavae", "ditdh_xl_rae"}
"""Of which nobody has published a score of just this."""
IMAGENET = [name for name in recipe_names() if load_recipe(name).data.classes == 1000 and name not in OURS]
LOWDIFF = [name for name in PICTURES if name.startswith("lowdiff")] + ["lowdiff_demo"]


def scores(values: tuple[float | None, ...] | None) -> dict[str, float]:
    return {name: value for name, value in zip(NAMES, values or (), strict=False) if value is not None}


def given(row: Scores | None) -> dict[str, float]:
    return {} if row is None else row.model_dump(exclude_none=True, exclude={"note"})


def test_every_score_in_the_recipes_is_the_papers() -> None:
    found = {name: load_recipe(name).published for name in recipe_names()}
    with_scores = {name: each for name, each in found.items() if each and (each.guided or each.unguided)}
    assert {name: (given(each.guided), given(each.unguided)) for name, each in with_scores.items()} == {
        name: (scores(guided), scores(unguided)) for name, (guided, unguided) in PICTURES.items()
    }
    tokenizers = {name: given(each.tokenizer) for name, each in found.items() if each and each.tokenizer}
    assert tokenizers == {
        name: dict(zip(("rfid", "psnr", "lpips", "ssim"), row, strict=True)) for name, row in TOKENIZERS.items()
    }


def _holds(section: Any, expected: dict[str, Any]) -> None:
    assert {name: getattr(section, name) for name in expected} == expected


@pytest.mark.parametrize("name", SETTINGS)
def test_recipes_are_what_they_claim(name: str) -> None:
    recipe, (family, steps, guidance) = load_recipe(name), SETTINGS[name]
    _holds(recipe.sample, {**family["sample"], "ema": True, "precision": "tf32"})
    _holds(recipe.sample.guidance, {**family["guidance"], **guidance})
    _holds(recipe.train_dit, family["train"])
    _holds(recipe.train_dit.objective, family["objective"])
    assert recipe.train_dit.images == steps * recipe.train_dit.batch
    tokenizer, semantics = recipe.train_vavae.pretrained, recipe.train_semvae
    if family is LIGHTNINGDIT:
        assert (tokenizer, semantics, recipe.train_dit.clock.kind) == (VAVAE, None, "synchronous")
        return
    assert semantics is not None and (tokenizer, semantics.pretrained) == (LDM, SEMVAE)
    _holds(recipe.train_dit.clock, {"kind": "semantic_first", "delta": 0.3})
    _holds(recipe.train_dit.model, {"align_depth": 2, "qk_norm": True})


@pytest.mark.parametrize("name", [*TOKENIZERS, "vavae_f16d32_long"])
def test_tokenizers_are_trained_and_scored_as_published(name: str) -> None:
    """Squares anywhere and no flips in training; a posterior sample of torchvision's crops in scoring."""
    recipe = load_recipe(name)
    _holds(recipe.train_vavae, {"crop": "random", "learning_rate": 1e-4, "betas": (0.5, 0.9), "batch": 256})
    assert not recipe.image.flips
    scored = {"images": 50_000, "posterior": "sample", "crop": "torchvision", "lpips_weights": "hub"}
    _holds(recipe.evaluate_tokenizer, scored)
    released = recipe.published and recipe.published.released
    files = {"vavae_f16d32": VAVAE, "ldm_f16d32": LDM}
    assert (released.tokenizer if released else None) == files.get(name)


@pytest.mark.parametrize("name", ["semvae_ch16", *(name for name in SETTINGS if name.startswith("sfd"))])
def test_the_semantic_vae_sees_what_its_authors_showed_it(name: str) -> None:
    """Resize(256, bicubic) and CenterCrop(224) in training; whole crops of 256 scaled to 224 in encoding."""
    recipe = load_recipe(name)
    assert recipe.train_semvae is not None and recipe.foundation is not None
    assert (recipe.train_semvae.resize, recipe.foundation.input_size, recipe.image.size) == (256, 224, 256)
    _holds(recipe.foundation, {"interpolation": "bicubic", "imagenet_norm": True})


def test_the_weak_guides_stay_where_recipes_can_name_them() -> None:
    """The guide of 60,000, 70,000 and 120,000 steps of 256: the same setting with a B."""
    guide, main = load_recipe("sfd_autoguide_b").train_dit, load_recipe("sfd_xl_80ep").train_dit
    assert guide.keep_averages_at == tuple(256 * steps for steps in (60_000, 70_000, 120_000))
    assert guide.keep_averages_at == (15_360_000, 17_920_000, 30_720_000)
    model = main.model.model_copy(update={"size": "B"})
    assert guide.model_copy(update={"keep_averages_at": ()}) == main.model_copy(update={"model": model})
    for name, (_, _, guidance) in SETTINGS.items():
        if "weights" in guidance:
            assert load_recipe(name).sample.guidance.model == model  # type: ignore[union-attr]


@pytest.mark.parametrize("name", IMAGENET)
def test_imagenet_is_scored_by_adms_protocol(name: str) -> None:
    recipe = load_recipe(name)
    section = recipe.evaluate
    assert section.inception is not None and section.inception.weights == INCEPTION
    assert (section.images, section.reference) == (50_000, ADM)
    assert recipe.data.revision is None
    assert "dinov2" not in section.features.name  # SFD generates it, and VA-VAE is aligned with it


@pytest.mark.parametrize(("name", "count"), [("cifar10", 50_000), ("cifar10_uncond", 50_000), ("ffhq64", 70_000)])
def test_pixels_are_trained_and_scored_as_edms(name: str, count: int) -> None:
    recipe = load_recipe(f"lowdiff_{name}")
    section = recipe.evaluate
    assert (section.reference, section.reference_images, section.images) == ("train", count, 50_000)
    assert section.inception is not None and section.inception.weights == INCEPTION
    assert recipe.data.revision is None
    assert recipe.shard.test_share == 0.0 if name == "ffhq64" else recipe.data.source.test_path  # type: ignore[union-attr]
    _holds(section.features, {"name": "vit_large_patch14_dinov2.lvd142m", "vector": "token", "input_size": 224})
    _holds(recipe.train_dit, {"clip_norm": None, "ema_rampup": 0.05, "images": 200_000_000})
    _holds(recipe.train_dit.model, {"augment": 0.15 if name == "ffhq64" else 0.12, "kind": "unet"})
    assert not recipe.image.flips  # they are told to the network, with the other augmentations
    half_life = recipe.train_dit.batch / -math.log2(recipe.train_dit.ema_decay)
    assert half_life == pytest.approx(500_000, rel=0.02)
    dropped = recipe.train_dit.objective.label_dropout
    assert dropped == (0.0 if recipe.sample.labels == "balanced" else 1.0)  # nothing is guided


@pytest.mark.parametrize("name", LOWDIFF)
def test_cascades_are_as_fast_as_their_paper_claims(name: str) -> None:
    """Over 50 % more images a second than what they are compared with; CIFAR-10 at 22 effective evaluations."""
    recipe = load_recipe(name)
    assert recipe.published is not None and recipe.published.baseline is not None
    evaluations = effective_evaluations(recipe, adaptive=0)
    base = {"lowdiff_b_imagenet256": 249, "lowdiff_ffhq64": 79, "lowdiff_demo": 12}.get(name, 35)
    assert recipe.published.baseline.evaluations == base
    assert base / evaluations >= 1.5
    if "cifar10" in name:
        assert evaluations <= 22


@pytest.mark.parametrize("name", [*PICTURES, *TOKENIZERS])
def test_recipes_meet_their_own_protocol(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.published is not None and recipe.published.protocol
    assert departures(recipe) == []


def test_every_large_recipe_has_a_paper() -> None:
    """But the guide, the Semantic VAE, the long tokenizer and the speedrun, of whose settings no paper has scores."""
    alone = {"sfd_autoguide_b", "semvae_ch16", "speedrun_b_imagenet256", "vavae_f16d32_long"}
    large = {name for name in recipe_names() if "demo" not in name and not name.endswith("_tiny")}
    assert large - alone - OURS == {*PICTURES, *TOKENIZERS}
    found = [load_recipe(name).published for name in OURS]
    assert all(each and each.data and not (each.guided or each.unguided or each.released) for each in found)
    for name in alone:
        published = load_recipe(name).published
        assert published is not None and published.data == "imagenet-1k"
        assert not any((published.guided, published.unguided, published.tokenizer))


def _of(name: str, *overrides: str) -> Recipe:
    return load_recipe(name, list(overrides))


@pytest.mark.parametrize("name", ["lightningdit_xl_64ep", "sfd_xl_80ep"])
def test_training_further_on_published_weights_takes_the_published_statistics(name: str) -> None:
    released = load_recipe(name).published.released  # type: ignore[union-attr]
    assert released is not None and load_recipe(name).train_dit.statistics is None
    further = f"train_dit.pretrained={released.weights}"
    assert _of(name, further).train_dit.statistics == released.statistics
    assert _of(name, further, "train_dit.statistics=null").train_dit.statistics is None
    assert _of(name, "train_dit.pretrained=w.pt").train_dit.statistics is None


def test_a_run_says_where_it_departs() -> None:
    changed = _of("sfd_xl_80ep", "sample.images=1000", "sample.batch=128", "evaluate.inception=null")
    assert departures(changed) == [
        "sample.images is 1,000, published with 50,000",
        "sample.batch is 128, published with 4",
        f"evaluate.inception.weights is not set, published with {INCEPTION}",
    ]
    assert departures(_of("lightningdit_xl_64ep", "sample.guidance.scale=4.0")) == [
        "sample.guidance.scale is 4.0, published with 10.0"
    ]
    assert departures(_of("demo")) == []


def test_without_guidance_a_run_is_held_to_the_unguided_scores() -> None:
    plain = _of("sfd_xl_80ep", "sample.guidance={method: none}")
    assert departures(plain) == []
    found = scores_of_pictures(plain)
    assert found is not None and found.named == {"fid": 3.43}
    assert scores_of_pictures(_of("lowdiff_b_imagenet256", "sample.guidance={method: none}")) is None


def test_published_scores_stand_beside_ours_under_one_name() -> None:
    recipe = _of("lightningdit_xl_64ep")
    rows = beside(scores_of_pictures(recipe), {"fid": 2.2, "precision_inception": 0.8})
    assert {row.name: row.difference for row in rows} == {
        "fid": pytest.approx(0.09),
        "sfid": None,
        "inception_score": None,
        "precision_inception": pytest.approx(-0.01),
        "recall_inception": None,
    }
    assert published_metrics(scores_of_tokenizer(_of("ldm_f16d32"))) == {
        "published/reconstruction_fid": 0.26,
        "published/reconstruction_psnr": 28.59,
        "published/reconstruction_lpips": 0.089,
        "published/reconstruction_ssim": 0.80,
    }
    assert published_metrics(scores_of_pictures(_of("demo"))) == {} == published_metrics(None)


def test_impossible_sections_are_refused() -> None:
    with pytest.raises(UserError, match=r"published: there are no scores"):
        _of("demo", "published={source: nobody}")
    with pytest.raises(UserError, match=r"protocol names train_dit\.images"):
        _of("demo", "published={source: us, guided: {fid: 1.0}, protocol: {train_dit.images: 3}}")


def test_what_is_published_names_no_artifact() -> None:
    plain, told = _of("demo"), _of("demo", "published={source: us, guided: {fid: 1.0}}")
    assert all(plain.section(name) == told.section(name) for name in ("sample", "evaluate", "report"))
