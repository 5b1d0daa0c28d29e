"""Tokenizer recipes: the published schedules, their twins, and what a schedule may not say."""

from __future__ import annotations

import pytest

from configs import UserError, load_recipe
from tasks.training.schedule import learning_rate

BARE = (
    "foundation=null",
    "train_semvae=null",
    "train_vavae.objective.align_weight=0.0",
    "train_dit={clock: {kind: synchronous}, objective: {semantic_weight: 1.0, align_weight: 0.0}}",
    "train_dit.model.align_depth=null",
    "encode.align_features=false",
)
EPOCH = 5_005 * 256
"""ImageNet-1k's 1,281,167 images in whole batches."""


def test_published_hyperparameters() -> None:
    section = load_recipe("vavae_f16d32").train_vavae
    assert (section.images, section.batch, section.learning_rate, section.betas) == (50 * EPOCH, 256, 1e-4, (0.5, 0.9))
    assert section.schedule == "constant" and section.ema_decay is None and section.precision == "tf32"
    ((begin, objective),) = section.objectives
    assert begin == 0 and objective.gan_start == 2_500 * 256
    weights = (objective.perceptual_weight, objective.kl_weight, objective.gan_weight, objective.align_weight)
    assert weights == (1.0, 1e-6, 0.5, 0.1) and (objective.cos_margin, objective.distance_margin) == (0.5, 0.25)
    plain = load_recipe("ldm_f16d32")
    assert not plain.train_vavae.aligned and plain.train_vavae.adversarial and plain.foundation is None


@pytest.mark.parametrize(("name", "length"), [("vavae_f16d32_long", EPOCH), ("vavae_long_tiny", None)])
def test_the_long_schedule_has_the_published_three_stages(name: str, length: int | None) -> None:
    section = load_recipe(name).train_vavae
    stages = section.objectives
    assert [(o.align_weight, o.cos_margin, o.distance_margin) for _, o in stages] == [
        (0.5, 0.0, 0.0),
        (0.1, 0.0, 0.0),
        (0.1, 0.5, 0.25),
    ]
    assert [o.gan_start > 0 for _, o in stages] == [True, False, False]
    if length is not None:
        assert [begin // length for begin, _ in stages] == [0, 100, 115] and section.images == 130 * length


def test_the_semantic_vae_warms_up_stays_and_decays() -> None:
    section = load_recipe("semvae_ch16").train_semvae
    assert section is not None
    step, rate = section.batch, section.learning_rate
    assert (section.images // step, rate, section.betas, section.weight_decay) == (1_000_000, 5e-5, (0.9, 0.999), 0.01)
    assert learning_rate(section, 0) < 0.01 * rate
    assert learning_rate(section, 500 * step) == learning_rate(section, 800_000 * step) == rate
    assert learning_rate(section, 801_000 * step) < rate
    assert learning_rate(section, section.images - step) == pytest.approx(0.1 * rate, rel=1e-3)


@pytest.mark.parametrize("name", ["vavae_tiny", "vavae_long_tiny", "ldm_tiny", "semvae_tiny"])
def test_twins_take_a_minute_on_a_cpu(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.train_vavae.images <= 640 and recipe.compute.train.gpus_per_worker == 0
    assert recipe.train_vavae.aligned == (name != "ldm_tiny")
    assert recipe.train_vavae.adversarial == (name != "semvae_tiny")


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (["train_vavae.stages=[{images: 320}]"], "stages have 320 images in all"),
        (["train_vavae.stages=[{images: 310}, {images: 330}]"], "stages.0.images 310 is not a multiple of batch 32"),
        (["train_vavae.pretrained_objective=x"], "pretrained_objective goes with pretrained"),
        (["train_vavae.stages=[{images: 640, margin: 1}]"], "margin"),
        ([*BARE, "train_vavae.stages=[{images: 320}, {images: 320, align_weight: 0.1}]"], "is 0.1 but foundation"),
    ],
)
def test_impossible_schedules_are_refused(overrides: list[str], said: str) -> None:
    with pytest.raises(UserError, match=said):
        load_recipe("vavae_tiny", overrides)
