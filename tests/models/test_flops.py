"""The formulas say exactly what torch counts, forward; backward is twice that but for inputs without gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.autoencoder import AutoencoderKL
from models.execution import prepare
from models.flops import decoder_flops, encoder_flops, forward_flops, training_flops_per_image
from models.groups import SFD
from models.lightningdit import LightningDiT
from models.semantic_vae import SemanticVAE
from models.sizes import SIZES
from tests.models.conftest import PAIR
from tests.models.test_execution import SWITCHES

TINY = {"input_size": 8, "in_channels": 6, "hidden_size": 48, "depth": 3, "num_heads": 4, "num_classes": 5}
HEAD = {"groups": PAIR, "align_depth": 2, "align_dim": 12, "align_hidden": 16}


def counted(run: Callable[[], Any]) -> int:
    # The fused attention of a CPU is not among the operators that torch's counter knows.
    with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
        run()
    return counter.get_total_flops()


def dit(device: str = "meta", **changes: Any) -> LightningDiT:
    with torch.device(device):
        return LightningDiT(**(TINY | changes))


def given(network: LightningDiT, device: str = "meta") -> tuple[Tensor, Tensor, Tensor]:
    x = torch.rand(1, network.in_channels, network.input_size, network.input_size, device=device)
    t = torch.rand(1, len(network.groups), device=device)
    return x, t, torch.zeros(1, dtype=torch.long, device=device)


@pytest.mark.parametrize("switches", SWITCHES)
def test_lightningdit_forward_is_exact(switches: str) -> None:
    network = dit(**(HEAD | SWITCHES[switches]))
    assert forward_flops(network) == counted(lambda: network(*given(network)))
    if network.align_depth is not None:
        both = forward_flops(network, alignment=True)
        assert both == counted(lambda: network.forward_with_alignment(*given(network)))


@pytest.mark.parametrize("size", SIZES)
def test_published_sizes_are_exact(size: str) -> None:
    sfd = {"groups": SFD, "align_depth": 2, "align_dim": 768, "align_hidden": 2048, "qk_norm": True}
    arguments = SIZES[size] | {"input_size": 16, "in_channels": 48, "num_classes": 1000}
    network = dit(**(sfd | arguments))
    assert forward_flops(network, alignment=True) == counted(lambda: network.forward_with_alignment(*given(network)))


@pytest.mark.parametrize("recompute", [False, True])
def test_lightningdit_training(recompute: bool) -> None:
    """Above the count by the gradients of inputs that nobody asks for, and by no more than one per cent."""
    network = dit("cpu", **HEAD, depth=8)
    prepare(network, checkpoint_activations=recompute)

    def step() -> None:
        velocity, projection = network.forward_with_alignment(*given(network, "cpu"))
        (velocity.sum() + projection.sum()).backward()

    found, count = training_flops_per_image(network, alignment=True, recompute=recompute), counted(step)
    assert 0 <= found - count <= 0.01 * count


AUTOENCODERS: dict[str, dict[str, Any]] = {
    "published": {},
    "demo": {
        "base_channels": 8,
        "channel_multipliers": (1, 2, 4, 8),
        "blocks_per_level": 1,
        "z_channels": 8,
        "attention_levels": (),
        "norm_groups": 8,
    },
    "mar": {"z_channels": 16, "decoder_attention": False, "attention_levels": (3, 4)},
    "squares": {"channel_multipliers": (1, 2), "z_channels": 8, "attention_levels": (), "patch_size": 4},
    "path": {"channel_multipliers": (1, 2), "z_channels": 8, "attention_levels": (), "linear_path": True},
}


@pytest.mark.parametrize("name", AUTOENCODERS)
@pytest.mark.parametrize("side", [64, 256])
def test_autoencoder_is_exact(name: str, side: int) -> None:
    with torch.device("meta"):
        network = AutoencoderKL(**AUTOENCODERS[name])
        pixels = torch.empty(1, 3, side, side)
        latent = torch.empty(1, network.embed_dim, side // network.downscale, side // network.downscale)
    assert encoder_flops(network, side) == counted(lambda: network.encode(pixels))
    assert decoder_flops(network, side) == counted(lambda: network.decode(latent))
    assert forward_flops(network, side=side) == encoder_flops(network, side) + decoder_flops(network, side)


@pytest.mark.parametrize("arguments", [{}, {"feature_dim": 112, "width": 96, "depth": 1, "num_heads": 4}])
def test_semantic_vae_is_exact(arguments: dict[str, int]) -> None:
    with torch.device("meta"):
        network = SemanticVAE(**arguments)
        features = torch.empty(1, network.feature_dim, 16, 16)
    assert forward_flops(network, side=16) == counted(lambda: network(features))


def test_what_has_no_formula_is_said() -> None:
    with pytest.raises(TypeError, match="no formula for Linear"):
        forward_flops(nn.Linear(2, 2))
    with pytest.raises(ValueError, match="side is missing"):
        training_flops_per_image(SemanticVAE(feature_dim=4, width=8, num_heads=2))
