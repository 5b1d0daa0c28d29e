"""What networks, solvers and steps cost by the plan's formulas, against built ones that torch counts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from configs import load_recipe, recipe_names
from configs.autoencoders import AutoencoderModel
from configs.diffusion import Routing
from configs.tokenizers import Discriminator, VavaeObjective
from models.discriminator import PatchDiscriminator
from models.tokenizer_losses import TrainableTokenizer
from tasks import train_vavae
from tasks.networks import build_autoencoder
from tasks.plan import networks, scoring, sizes, trainings
from tasks.plan.solvers import solver_evaluations
from tasks.scoring.inception import Inception
from tasks.scoring.lpips import Lpips
from tests.helpers.counting import counted
from tests.helpers.inceptions import put_inception


def same_state(cost: networks.Cost, network: torch.nn.Module) -> None:
    state = network.state_dict()
    assert (cost.values, cost.tensors) == (sum(tensor.numel() for tensor in state.values()), len(state))


ROUTING = Routing(first=1, last=2, drop=0.5)
DIFFUSING = [name for name in recipe_names() if not load_recipe(name).lacks("train_dit")]


@pytest.mark.parametrize("name", DIFFUSING)
def test_diffusion_models_cost_what_built_ones_do(name: str) -> None:
    """Values and tensors of the state dict, and FLOPs as `models/flops.py`, which is checked against torch's count."""
    from models import flops
    from models.lightningdit import LightningDiT
    from models.wide_head_dit import WideHeadDiT
    from tasks.networks import build_network

    recipe = load_recipe(name)
    with torch.device("meta"):
        network = build_network(recipe, recipe.train_dit.model)
    for side in recipe.sides:
        backbone, head = networks.diffusion(recipe, recipe.train_dit.model, side)
        same_state(backbone + head, network)
        assert backbone.flops == flops.forward_flops(network, side=side)
        assert (backbone + head).flops == flops.forward_flops(network, side=side, alignment=True)
        if isinstance(network, LightningDiT):
            found = networks.blocks_flops(recipe, recipe.train_dit.model, side)
            assert found == flops.blocks_flops(network, side)
        if isinstance(network, LightningDiT) and not isinstance(network, WideHeadDiT):  # which no tokens go around
            routed = recipe.model_copy(update={"train_dit": recipe.train_dit.model_copy(update={"routing": ROUTING})})
            saved = networks.routed_flops(routed, recipe.train_dit.model, side)
            assert saved == found - flops.blocks_flops(network, side, (1, 2, 0.5)) > 0


OURS = [name for name in recipe_names() if isinstance(load_recipe(name).train_vavae.model, AutoencoderModel)]
"""Recipes on our own autoencoder; of others, test_tokenizers.py."""


@pytest.mark.parametrize("name", OURS)
def test_tokenizers_cost_what_built_ones_do(name: str) -> None:
    from models import flops
    from tasks.networks import build_autoencoder, build_semantic_vae

    recipe = load_recipe(name)
    with torch.device("meta"):
        tokenizer = build_autoencoder(recipe.train_vavae.model)
    encoder, decoder = networks.autoencoder(recipe.train_vavae.model, recipe.image.size)
    same_state(encoder + decoder, tokenizer)
    if not recipe.train_vavae.model.identity:
        assert encoder.flops == flops.encoder_flops(tokenizer, recipe.image.size)
        assert decoder.flops == flops.decoder_flops(tokenizer, recipe.image.size)
    if recipe.train_semvae is not None and recipe.foundation is not None:
        with torch.device("meta"):
            semantics = build_semantic_vae(recipe.train_semvae.model, recipe.foundation.feature_dim)
        cost = networks.semantic_vae(recipe.train_semvae.model, recipe.foundation.feature_dim, recipe.latent_size**2)
        same_state(cost[0] + cost[1], semantics)
        assert (cost[0] + cost[1]).flops == flops.forward_flops(semantics, side=recipe.latent_size)


def test_a_linear_path_counts() -> None:
    from models import flops
    from tasks.networks import build_autoencoder

    section = AutoencoderModel(linear_path=True, patch_size=2, z_channels=4)
    with torch.device("meta"):
        tokenizer = build_autoencoder(section)
    encoder, decoder = networks.autoencoder(section, 64)
    same_state(encoder + decoder, tokenizer)
    assert encoder.flops == flops.encoder_flops(tokenizer, 64)
    assert decoder.flops == flops.decoder_flops(tokenizer, 64)


SWITCHES = ["patch_size=2", "swiglu=false", "rope=false", "rmsnorm=false", "shift=false", "learn_sigma=true"]


@pytest.mark.parametrize("switch", [*SWITCHES, "qk_norm=false", "align_depth=null", "size=1p6B"])
def test_every_switch_of_the_transformer_counts(switch: str) -> None:
    from models import flops
    from tasks.networks import build_dit

    changes = [f"train_dit.model.{switch}", "train_dit.objective.align_weight=0"]
    recipe = load_recipe("sfd_xl_80ep", changes)
    with torch.device("meta"):
        dit = build_dit(recipe, recipe.train_dit.model)
    backbone, head = networks.dit(recipe, recipe.train_dit.model)
    same_state(backbone + head, dit)
    assert backbone.flops == flops.forward_flops(dit)


@pytest.mark.parametrize("model", ["vit_base_patch14_reg4_dinov2.lvd142m", "vit_small_patch16_224.augreg_in21k"])
def test_vision_transformers_cost_what_torch_counts(model: str) -> None:
    section = load_recipe("sfd_xl_80ep").foundation
    assert section is not None
    section = section.model_copy(update={"name": model})
    formula, source = networks.foundation_flops(section)
    assert source.startswith("formula") and formula == networks._counted(section)


def test_judge_costs_what_torch_counts() -> None:
    from tasks.scoring.classifier import build_classifier

    recipe = load_recipe("demo")
    section = recipe.evaluate.classifier
    assert section is not None
    with torch.device("meta"):
        judge = build_classifier(recipe, section).eval()
        pixels = torch.empty(1, 3, recipe.image.size, recipe.image.size)
    cost = networks.judge(section, recipe.image.size, recipe.data.classes)
    same_state(cost, judge)
    assert cost.flops == counted(lambda: judge(pixels))


@pytest.mark.slow  # of a constant
def test_inception_costs_what_torch_counts(tmp_path: Path) -> None:
    network = Inception(str(put_inception(tmp_path)))
    assert counted(lambda: network(torch.zeros(1, 3, 32, 32, dtype=torch.uint8))) == scoring.INCEPTION_FLOPS


def test_what_the_plan_writes_down_is_what_the_code_says() -> None:
    """Figures whose modules a plan cannot import: they load torch or Parquet's library."""
    from tasks import shard, train_semvae, train_vavae

    assert len(shard.SCHEMA) == sizes.SHARD_COLUMNS
    assert {
        "train_vavae": train_vavae._SCORED_IMAGES,
        "train_semvae": train_semvae._SCORED_IMAGES,
    } == trainings.SCORED


# -------------------------------------------------------------------------------------------------------- steps


@pytest.fixture(scope="module")
def lpips() -> Lpips:
    return Lpips("random")


@pytest.mark.parametrize("side", [32, 256])
def test_perceptual_distance_costs_what_torch_counts(lpips: Lpips, side: int) -> None:
    pixels = torch.empty(1, 3, side, side, device="meta")
    looking, weighing = networks.lpips_flops(side)
    assert 2 * looking + weighing == counted(lambda: lpips(pixels, pixels))


@pytest.mark.parametrize("changes", [{}, {"width": 16, "layers": 2}, {"norm": "group"}])
def test_discriminator_costs_what_a_built_one_does(changes: dict[str, Any]) -> None:
    section = Discriminator(**changes)
    with torch.device("meta"):
        network, pixels = PatchDiscriminator(**section.model_dump()), torch.empty(1, 3, 64, 64)
    first, rest = networks.discriminator(section, 64)
    same_state(first + rest, network)
    assert (first + rest).flops == counted(lambda: network(pixels))


@pytest.mark.parametrize(
    ("name", "change", "adversarial"),
    [
        ("vavae_f16d32", "train_vavae.objective.adaptive=true", False),
        ("vavae_f16d32", "train_vavae.objective.adaptive=true", True),
        ("vavae_tiny", "train_vavae.objective.adaptive=false", True),
        ("vavae_tiny", "train_vavae.objective.align_weight=0", True),
        ("vavae_tiny", "train_vavae.objective.perceptual_weight=0", True),
        ("vavae_tiny", "compute.train.zero_stage=3", False),
    ],
)
def test_a_tokenizers_step_costs_what_torch_counts(lpips: Lpips, name: str, change: str, adversarial: bool) -> None:
    """Forward and backward of both networks within one per cent; the foundation model's share is a test above."""
    recipe = load_recipe(name, ["train_vavae.objective.perceptual_weight=1", change])
    section, foundation, side = recipe.train_vavae, recipe.foundation, recipe.image.size
    objective = section.objective
    assert foundation is not None
    with torch.device("meta"):
        module = TrainableTokenizer(
            build_autoencoder(section.model),
            feature_dim=foundation.feature_dim if section.aligned else None,
            adaptive=objective.adaptive,
            perceptual=lpips if section.perceptual else None,
            weights=train_vavae._weights(objective),
            one_decoder_backward=recipe.compute.train.zero_stage < 3,
        )
        adversary, images = train_vavae.Critic(objective.discriminator), torch.empty(1, 3, side, side)
        latent = torch.empty(1, section.model.z_channels, recipe.latent_size, recipe.latent_size)
        features = torch.empty(1, foundation.feature_dim, recipe.latent_size, recipe.latent_size)

    def step() -> None:
        terms = module(images, latent, features, adversary.network.frozen if adversarial else None)
        terms["total"].backward()
        if adversarial:
            adversary.module(real_BCHW=images, fake_BCHW=terms["image"])["total"].backward()

    planned = trainings.tokenizer_step_flops(recipe, objective, adversarial)
    if section.aligned:
        planned -= networks.foundation_flops(foundation)[0]
    assert planned == pytest.approx(counted(step), rel=0.01)


def test_a_tokenizers_stages_cost_what_their_images_do() -> None:
    """The long recipe: its discriminator begins within the first stage and is there throughout the others."""
    recipe = load_recipe("vavae_f16d32_long")
    (_, first), (_, second), (_, third) = recipe.train_vavae.objectives
    lengths = [stage.images for stage in recipe.train_vavae.stages]

    def cost(objective: VavaeObjective, adversarial: bool) -> float:
        return trainings.tokenizer_step_flops(recipe, objective, adversarial)

    expected = 640_000 * cost(first, False) + (lengths[0] - 640_000) * cost(first, True)
    expected += lengths[1] * cost(second, True) + lengths[2] * cost(third, True)
    assert trainings.tokenizer_flops(recipe) == pytest.approx(expected)
    never = load_recipe("vavae_tiny", ["train_vavae.objective.gan_start=641"])
    silent = trainings.tokenizer_step_flops(never, never.train_vavae.objective, False)
    assert trainings.tokenizer_flops(never) == pytest.approx(640 * silent)


# ------------------------------------------------------------------------------------------------------------- sampling


AUTO = "{method: autoguidance, scale: 1.6, weights: weak.pt, model: {size: S}"


@pytest.mark.parametrize(
    "changes",
    [
        ["sample.solver=euler"],
        ["sample.solver=heun", "sample.shift=0.3"],
        ["sample.off_by_one=true", "sample.guidance={method: none}"],
        ["sample.guidance.interval_start=0.4", "sample.shift=0.3"],
        ["sample.guidance.interval_start=0.4", "sample.solver=heun", "train_dit.clock={kind: synchronous}"],
        ["sample.guidance.interval_start=0.2", "sample.guidance.interval_end=0.6", "sample.guidance.groups=texture"],
        ["sample.guidance.interval_end=0.5", "sample.guidance.groups=semantic", "sample.solver=heun"],
        [f"sample.guidance={AUTO}, interval_start: 0.3, interval_end: 0.9}}"],
        [f"sample.guidance={AUTO}, groups: semantic, semantic_scale: 1.5}}"],
        [f"sample.guidance={AUTO}, groups: texture, interval_end: 0.5}}", "sample.shift=0.3"],
        [f"sample.guidance={AUTO}, groups: semantic, semantic_scale: 1.0}}"],
    ],
)
def test_evaluations_are_those_that_the_solver_makes(changes: list[str]) -> None:
    from models.solvers import sample as solve
    from tasks.networks import build_clock, channel_groups
    from tasks.sampling.integrator import build_guidance

    recipe = load_recipe("demo_tiny", ["sample.steps=11", *changes])
    section, groups = recipe.sample, channel_groups(recipe)
    asked = {0: 0, 1: 0}

    def network(x_BCHW: torch.Tensor, t_BG: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
        asked[int(y_B[0])] += 1
        return torch.zeros_like(x_BCHW)

    def weak(x_BCHW: torch.Tensor, t_BG: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
        return network(x_BCHW, t_BG, torch.ones_like(y_B))

    guidance = build_guidance(section.guidance, groups, null_label=1, guide=weak)
    solve(
        guidance(network),
        torch.zeros(1, groups.channels, 4, 4),
        torch.zeros(1, dtype=torch.long),
        clock=build_clock(recipe),
        groups=groups,
        solver=section.solver,
        steps=section.steps,
        shift=section.shift,
        steps_are_points=section.off_by_one,
    )
    main, guided, _ = solver_evaluations(recipe, section, adaptive=0)
    assert (main, guided) == (asked[0], asked[1])
