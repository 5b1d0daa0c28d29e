"""What a network, a loader or a score would refuse later is refused by the recipe, with the way out."""

from __future__ import annotations

import pytest

from configs import UserError, load_recipe

GRID = "set foundation.input_size"


@pytest.mark.parametrize(
    ("base", "overrides", "words"),
    [
        (
            "demo_tiny",
            ["train_dit.model.align_depth=4"],
            ["align_depth is 4 but the network has 3 blocks", "at most 3"],
        ),
        ("sfd_xl_80ep", ["train_dit.model.align_depth=29"], ["has 28 blocks"]),
        ("demo_tiny", ["image.size=64"], ["grid of 4 × 4 at input_size 64", "latents' 8 × 8", "input_size to 128"]),
        ("demo_tiny", ["foundation.input_size=128"], ["grid of 8 × 8", "set foundation.input_size to 64"]),
        ("demo_tiny", ["foundation.layer=4", "foundation.feature_dim=320"], ["grid of 2 × 2", "foundation.layer"]),
        (
            "vavae_f16d32",
            ["image.size=128"],
            ["grid of 16 × 16", "train_vavae.objective.align_weight", "latents' 8 × 8"],
        ),
        (
            "demo_tiny",
            ["train_dit.routing={first: 1, last: 1}", "train_dit.model.value_residual=true"],
            ["routing.first is 1", "value_residual"],
        ),
        (
            "demo_tiny",
            ["sample.guidance={method: routed, scale: 2.0}"],
            ["train_dit.routing is not set", "classifier_free"],
        ),
        (
            "demo_tiny",
            [
                "train_dit.routing={first: 3, last: 3}",
                "sample.guidance={method: routed, scale: 2.0}",
                "train_dit.objective.label_dropout=0.0",
            ],
            ["method is routed", "label_dropout is 0"],
        ),
        ("demo_tiny", ["train_dit.model.patch_size=2"], ["patch_size is 2", "2 × 2", "align_weight 0"]),
        ("demo_tiny", ["foundation.feature_dim=64"], ["foundation.feature_dim is 64", "gives 112"]),
        ("demo_tiny", ["evaluate.features.feature_dim=1280"], ["evaluate.features.feature_dim to 320"]),
        ("demo_tiny", ["foundation.layer=5"], ["foundation.layer 5 is none of the 5", "use 0 to 4"]),
        ("demo_tiny", ["evaluate.features.vector=token"], ["evaluate.features.vector is token", "no class token"]),
        ("sfd_xl_80ep", ["evaluate.features.layer=3"], ["(layer 3) ends in no class token", "leave layer out"]),
        (
            "sfd_xl_80ep",
            ["foundation.input_size=225"],
            ["foundation.input_size 225 is not a multiple", "patches of 14: use 224"],
        ),
        ("sfd_xl_80ep", ["foundation.layer=12"], ["foundation.layer 12 is none of the 12"]),
        ("demo_tiny", ["train_dit.objective.label_dropout=0.0"], ["classifier_free", "label_dropout is 0", "0.1"]),
        ("demo_tiny", ["shard.limit=8"], ["shard.limit 8 is below data.classes 10", "allow_empty_classes"]),
        ("demo_tiny", ["shard.limit=20"], ["train_vavae.batch 32 is more than all images", "use at most 20"]),
        ("demo_tiny", ["sample.steps=1", "sample.off_by_one=true"], ["sample.steps is 1", "at least 2"]),
        ("demo_tiny", ["evaluate.neighbours=40"], ["evaluate.neighbours 40", "leave 40"]),
        (
            "demo_tiny",
            ["train_vavae.objective.gan_weight=0.5", "train_vavae.objective.discriminator.layers=4"],
            ["discriminator.layers 4 leaves nothing of images of 32 pixels", "image.size 48"],
        ),
        (
            "demo_tiny",
            ["train_vavae.objective={perceptual_weight: 1.0, perceptual_layers: [0, 5]}"],
            ["perceptual_layers: layer 5 is none of the 5 of efficientnet_lite0", "use 0 to 4"],
        ),
        (
            "ldm_tiny",
            ["train_vavae.objective={perceptual_weight: 1.0, perceptual_layers: [1]}", "foundation=null"],
            ["perceptual_layers names layers [1] but foundation is not set"],
        ),
        ("demo_tiny", ["evaluate.classifier=null", "evaluate.classifier_frechet=true"], ["classifier_frechet is true"]),
        ("demo_tiny", ["train_dit.routing={last: 4}"], ["routing.last is 4", "3 blocks"]),
        ("demo_tiny", ["train_dit.routing={first: 3, last: 2}"], ["first 3 comes after last 2"]),
        (
            "demo_tiny",
            ["train_dit.routing={first: 1, last: 3}", "train_dit.model.align_depth=2"],
            ["align_depth is 2", "blocks 1 to 3", "from 3 on"],
        ),
        ("lowdiff_pixels_tiny", ["train_dit.routing={first: 1, last: 1}"], ["the model is a UNet"]),
        (
            "demo_tiny",
            ["train_dit.objective.contrastive_weight=0.05", "compute.train.micro_batch=1"],
            ["pairs images", "1 at a time", "make both even"],
        ),
        (
            "lowdiff_pixels_tiny",
            ["train_dit.objective={contrastive_weight: 0.05, uniform_after: 640, label_dropout: 0.2}"],
            ["train_dit.objective.contrastive_weight, train_dit.objective.uniform_after: ", "predicts images"],
        ),
        (
            "demo_tiny",
            ["train_dit.optimizer=muon", "compute.train={workers: 2, zero_stage: 1}"],
            ["train_dit.optimizer is muon", "zero_stage 1", "set zero_stage to 0"],
        ),
        ("demo_tiny", ["train_vavae.optimizer=muon"], ["train_vavae.optimizer is muon", "set adamw"]),
        ("demo_tiny", ["train_semvae.optimizer=muon"], ["train_semvae.optimizer is muon", "set adamw"]),
        ("demo_tiny", ["compute.train={engine: plain, zero_stage: 2}"], ["zero_stage is 2", "engine to auto"]),
        (
            "demo_tiny",
            ["compute.train.deepspeed={gradient_clipping: 1.0, zero_optimization: {stage: 2}}"],
            ["sets gradient_clipping, zero_optimization.stage", "clip_norm"],
        ),
        ("demo_tiny", ["train_dit.betas=[0.9, 1.0]"], ["train_dit.betas are [0.9, 1.0]", "below 1"]),
        ("demo_tiny", ["train_semvae.betas=[-0.1, 0.9]"], ["train_semvae.betas", "0 or more"]),
        ("demo_tiny", ["train_dit.ema_decay=1.0"], ["train_dit.ema_decay", "stays at the first weights"]),
        ("demo_tiny", ["train_dit.ema_decays=[0.9, 1.0]"], ["ema_decays is 1"]),
        ("demo_tiny", ["train_dit.ema_sigmas=[0.1, 0.1]"], ["ema_sigmas [0.1, 0.1] name a width twice"]),
        ("demo_tiny", ["train_dit.learning_rate=.inf"], ["train_dit.learning_rate is inf", "finite"]),
        ("demo_tiny", ["sample.guidance.scale=.inf"], ["sample.guidance.scale is inf"]),
        ("lowdiff_pixels_tiny", ["train_dit.model.sigma_mean=.nan"], ["train_dit.model.sigma_mean is nan"]),
        ("lowdiff_pixels_tiny", ["train_dit.model.sigma_max=0.001"], ["sigma_min 0.002 is not below sigma_max 0.001"]),
        ("lowdiff_pixels_tiny", ["train_dit.model.multipliers=[]"], ["train_dit.model.unet.multipliers", "at least 1"]),
        ("demo_tiny", ["train_vavae.model.channel_multipliers=[]"], ["channel_multipliers", "at least 1"]),
        ("demo_tiny", ["compute.actors.gpus_per_actor=1.5"], ["gpus_per_actor is 1.5", "use 2"]),
        ("demo_tiny", ["sample.times=[0, 0.5]"], ["rise from 0 (noise) to 1 (data)"]),
        ("demo_tiny", ["sample.times=[0, 0.5, 1]", "sample.shift=0.3"], ["times is the whole grid", "leave out shift"]),
        ("lowdiff_pixels_tiny", ["sample.times=[0, 0.5, 1]"], ["times (0", "without shift"]),
        ("lowdiff_pixels_tiny", ["train_vavae.images=8"], ["identity is true but train_vavae.images is 8"]),
        ("lowdiff_pixels_tiny", ["train_dit.cascade.sides=[4, 16]", "sample.stages=[]"], ["resolutions double"]),
        (
            "lowdiff_pixels_tiny",
            ["train_dit.model.multipliers=[1]"],
            ["has 1 levels but train_dit.cascade.sides has 2"],
        ),
        (
            "lowdiff_pixels_tiny",
            ["train_dit.model.multipliers=[1, 1, 1, 1, 1, 1]"],
            ["halve the side 16 5 times", "multiple of 32"],
        ),
    ],
)
def test_what_cannot_work_is_refused(base: str, overrides: list[str], words: list[str]) -> None:
    with pytest.raises(UserError) as caught:
        load_recipe(base, overrides)
    for each in words:
        assert each in str(caught.value)


def test_all_that_is_wrong_is_told_at_once() -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("demo_tiny", ["data.classes=3", "image.size=64", "train_dit.objective.label_dropout=0.0"])
    message = str(caught.value)
    assert "use 39" in message and "input_size to 128" in message and "label_dropout is 0" in message


def test_images_smaller_than_a_cell_are_told_as_such() -> None:
    with pytest.raises(UserError) as caught:
        load_recipe("demo_tiny", ["image.size=1", "encode.align_features=false"])
    message = str(caught.value)
    assert "image.size 1 is not a multiple of 8" in message and "\n" not in message and "0 × 0" not in message


@pytest.mark.parametrize(
    "overrides",
    [
        ["train_dit.objective.label_dropout=0.0", "sample.guidance={method: none}"],
        ["shard.limit=8", "data.allow_empty_classes=true", *(f"train_{n}.batch=8" for n in ("vavae", "semvae", "dit"))],
        ["foundation.input_size=128", "image.size=64"],
        [
            "train_dit.routing={first: 3, last: 3}",
            "sample.guidance={method: routed, scale: 2.0}",
            "sample.labels=unconditional",
        ],
    ],
)
def test_what_works_is_not(overrides: list[str]) -> None:
    load_recipe("demo_tiny", overrides)
