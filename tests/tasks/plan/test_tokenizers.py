"""What a plan says of autoencoders that are not ours, against built ones."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from configs.autoencoders import DiffusersModel
from configs.errors import UserError
from tasks.networks import build_autoencoder
from tasks.plan import networks
from tasks.plan.memory import memory_of
from tests.flows.test_light_commands import HEAVY, REPOSITORY
from tests.helpers.builders import small_recipe
from tests.helpers.foreign import ARGUMENTS, KL, saved, section

FORMULA = ("AutoencoderKL", "AutoencoderKLFlux2")


@pytest.mark.parametrize("class_name", list(ARGUMENTS))
def test_diffusers_autoencoders_cost_what_built_ones_do(
    class_name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved(tmp_path, class_name)
    given = DiffusersModel(**section(class_name, tmp_path))
    with torch.device("meta"):
        built: Any = build_autoencoder(given)
    if class_name in FORMULA:
        monkeypatch.setattr("tasks.plan.tokenizers._counted", None)
    encoder, decoder = networks.autoencoder(given, 32)
    state = built.kept.state_dict()
    assert (encoder + decoder).values == sum(value.numel() for value in state.values())
    assert (encoder + decoder).tensors == len(state)
    assert (encoder.flops, decoder.flops) == built.flops(32)
    assert encoder.values and decoder.values


@pytest.mark.parametrize(
    "changes", [{"use_quant_conv": False, "use_post_quant_conv": False}, {"mid_block_add_attention": False}], ids=str
)
def test_diffusers_switches_of_a_kl_autoencoder_count(changes: dict[str, Any], tmp_path: Path) -> None:
    """FLUX.1 has no convolution between moments and network."""
    saved(tmp_path, "AutoencoderKL", **changes)
    given = DiffusersModel(**section("AutoencoderKL", tmp_path))
    with torch.device("meta"):
        built: Any = build_autoencoder(given)
    encoder, decoder = networks.autoencoder(given, 32)
    assert (encoder + decoder).values == sum(value.numel() for value in built.kept.state_dict().values())
    assert (encoder.flops, decoder.flops) == built.flops(32)


def test_diffusers_kl_needs_memory_like_one_of_ours_of_its_widths(tmp_path: Path) -> None:
    saved(tmp_path, "AutoencoderKL")
    foreign = f"train_vavae.model={json.dumps(section('AutoencoderKL', tmp_path))}"
    own = {
        "base_channels": 8,
        "channel_multipliers": [1, 1, 2, 2],
        "blocks_per_level": KL["layers_per_block"],
        "z_channels": 4,
        "attention_levels": [],
        "norm_groups": 4,
    }
    both = [memory_of(small_recipe(each), "train_vavae") for each in (foreign, f"train_vavae.model={json.dumps(own)}")]
    assert both[0] == both[1] and both[0] is not None and both[0].image > 0


def test_diffusers_plan_is_light_and_reads_the_configuration_alone(tmp_path: Path) -> None:
    saved(tmp_path, "AutoencoderKL")
    (tmp_path / "diffusion_pytorch_model.safetensors").unlink()
    code = (
        "import sys; from configs import load_recipe; from tasks.plan import networks; "
        "recipe = load_recipe('demo_tiny', sys.argv[1:]); "
        "print(networks.autoencoder(recipe.train_vavae.model, 32)[0].values > 0, *sys.modules)"
    )
    own = f"train_vavae.model={json.dumps(section('AutoencoderKL', tmp_path))}"
    done = subprocess.run(
        [sys.executable, "-c", code, "train_vavae.images=0", own],
        cwd=REPOSITORY,
        env=dict(os.environ),
        capture_output=True,
        text=True,
        check=True,
    )
    first, *modules = done.stdout.split()
    assert first == "True" and not HEAVY & set(modules)
    assert re.search("tasks.plan", done.stdout)


def test_diffusers_plan_without_files_says_what_is_missing(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"train_vavae.model.location .*: has no config.json \(nothing is there\)"):
        networks.autoencoder(DiffusersModel(**section("AutoencoderKL", tmp_path / "nothing")), 32)
