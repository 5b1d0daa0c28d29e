"""Memory of frozen networks' passes: the plan's figures against what torch allocates, and refusals."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from configs import load_recipe
from configs.data import Foundation
from flows.plan import make_plan
from models.execution import halve
from models.foundation import FoundationModel
from tasks.networks import build_autoencoder, build_network, build_semantic_vae
from tasks.plan import passes
from tests.helpers.allocations import a_pass

HALF = pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])


def ready(network: torch.nn.Module, half: bool) -> torch.nn.Module:
    network.requires_grad_(False).eval()
    if half:
        halve(network, torch.bfloat16)
    return network


@HALF
@pytest.mark.parametrize("name", ["lightningdit_xl_64ep", "sfd_xl_80ep"])
def test_a_transformer_takes_what_torch_counts(name: str, half: bool) -> None:
    sizes = {"size": "null", "hidden_size": 144, "heads": 2, "depth": 2}
    recipe = load_recipe(name, [f"train_dit.model.{key}={value}" for key, value in sizes.items()])
    network = ready(build_network(recipe, recipe.train_dit.model), half)

    def call(batch: int) -> object:
        latents = torch.zeros(batch, recipe.latent_channels, 16, 16)
        times = torch.zeros(batch, len(recipe.channel_groups))
        return network(latents, times, torch.zeros(batch, dtype=torch.long))

    assert a_pass(network, call, half) == pytest.approx(passes.PASS[half] * 256 * 144, rel=0.15)


@HALF
@pytest.mark.parametrize("name", ["vavae_f16d32", "ldm_f16d32"])
def test_an_autoencoder_takes_what_torch_counts(name: str, half: bool) -> None:
    model = load_recipe(name).train_vavae.model
    network = ready(build_autoencoder(model), half)
    heights = [
        a_pass(network, lambda batch: network.encode(torch.zeros(batch, 3, 32, 32)), half),
        a_pass(network, lambda batch: network.decode(torch.zeros(batch, model.z_channels, 2, 2)), half),
    ]
    assert max(heights) == pytest.approx(passes.convolved(model, 32, half), rel=0.15)


@HALF
def test_what_looks_at_images_takes_no_more_than_is_planned(half: bool) -> None:
    section = Foundation(name="vit_small_patch14_reg4_dinov2.lvd142m", input_size=112, feature_dim=384)
    network = ready(FoundationModel(section.name, input_size=112), half)
    found = a_pass(network, lambda batch: network(torch.zeros(batch, 3, 128, 128)), half)
    assert 0.6 * passes.looking(section, half) < found < passes.looking(section, half)
    model = load_recipe("sfd_xl_80ep").train_semvae
    assert model is not None
    semantic = ready(build_semantic_vae(model.model, 768), half)
    found = a_pass(semantic, lambda batch: semantic.encode(torch.zeros(batch, 768, 16, 16)), half)
    assert 0.5 * passes.PASS[half] * 256 * model.model.width < found < passes.PASS[half] * 256 * model.model.width


def test_inception_takes_no_more_than_is_planned(tmp_path: Path) -> None:
    from tasks.scoring.inception import Inception
    from tests.helpers.inceptions import put_inception

    network = Inception(str(put_inception(tmp_path)))
    found = a_pass(network, lambda batch: network(torch.zeros(batch, 3, 32, 32, dtype=torch.uint8)), False)
    assert 0.7 * passes.INCEPTION_PASS < found < passes.INCEPTION_PASS
    values = sum(each.numel() for each in network.parameters())
    assert values == pytest.approx(passes.INCEPTION_VALUES, rel=0.02)


def test_a_plan_tells_the_memory_of_every_stage_on_a_gpu() -> None:
    plan = make_plan("sfd_xl_80ep", cluster="aws")
    told = {stage.work.stage for stage in plan.stages if stage.memory is not None}
    assert told >= {"encode", "train_dit", "sample", "evaluate"}
    assert told == {stage.work.stage for stage in plan.stages if stage.work.gpus}
    assert not plan.problems


def test_a_plan_refuses_actors_that_do_not_fit() -> None:
    def why(stage: str, *overrides: str) -> str:
        problems = make_plan("lightningdit_xl_64ep", list(overrides), cluster="aws").problems
        (found,) = [each for each in problems if each.startswith(stage) and "GB" in each]
        return found

    assert "lower compute.actors.batch" in why("encode", "compute.actors.batch=2048")
    assert "lower sample.batch" in why("sample", "sample.batch=4096")
    shared = why("encode", "compute.actors.batch=256", "compute.actors.gpus_per_actor=0.25")
    assert "4 actors of a GPU" in shared and "raise compute.actors.gpus_per_actor" in shared


def test_half_the_bytes_where_encode_says_so() -> None:
    full = passes.encoding(load_recipe("sfd_xl_80ep", ["encode.precision=fp32"]))
    half = passes.encoding(load_recipe("sfd_xl_80ep", ["encode.precision=bf16"]))
    assert full is not None and half is not None
    assert half.fixed == full.fixed and 0.4 < half.image / full.image < 0.6
