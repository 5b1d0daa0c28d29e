"""Names, sizes and shapes of the two autoencoders, and the posterior they share."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from torch import nn

from models.autoencoder import AutoencoderKL
from models.lightningdit import parameter_count
from models.posterior import DiagonalGaussian
from models.semantic_vae import SemanticVAE

GOLDEN = Path(__file__).parents[1] / "golden"


def names_and_shapes(model: nn.Module) -> dict[str, list[int]]:
    return {name: list(value.shape) for name, value in model.state_dict().items()}


def test_vavae_is_the_published_one_tensor_for_tensor() -> None:
    published = json.loads((GOLDEN / "official_vavae_tensors.json").read_text())
    with torch.device("meta"):
        model = AutoencoderKL()
    assert names_and_shapes(model) == published["tensors"]
    assert round(parameter_count(model) / 1e6, 2) == published["params_M"] == 69.84
    assert round(parameter_count(model.encoder) / 1e6, 2) == 28.41
    assert round(parameter_count(model.decoder) / 1e6, 2) == 41.42


@pytest.mark.parametrize("channels", [16, 32, 64])
def test_latent_widths_change_four_convolutions_only(channels: int) -> None:
    with torch.device("meta"):
        model, usual = AutoencoderKL(z_channels=channels), AutoencoderKL()
    shapes, expected = names_and_shapes(model), names_and_shapes(usual)
    assert shapes.keys() == expected.keys()
    changed = {name.rpartition(".")[0] for name in shapes if shapes[name] != expected[name]}
    tied = {"encoder.conv_out", "quant_conv", "post_quant_conv", "decoder.conv_in"}
    assert changed == (set() if channels == 32 else tied)


def test_attention_free_decoder_keeps_the_middle() -> None:
    with torch.device("meta"):
        names = AutoencoderKL(z_channels=16, decoder_attention=False).state_dict()
    assert not any(name.startswith("decoder.up.4.attn") for name in names)
    assert "decoder.mid.attn_1.q.weight" in names and "encoder.down.4.attn.1.q.weight" in names


def small(**changes: object) -> AutoencoderKL:
    arguments = {
        "in_channels": 1,
        "out_channels": 1,
        "base_channels": 8,
        "channel_multipliers": (1, 2),
        "blocks_per_level": 1,
        "z_channels": 3,
        "attention_levels": (),
        "norm_groups": 4,
    }
    return AutoencoderKL(**(arguments | changes))  # type: ignore[arg-type]


def test_small_autoencoder_halves_once_and_comes_back() -> None:
    model = small(embed_dim=2)
    assert model.downscale == 2
    posterior = model.encode(torch.randn(2, 1, 6, 8))
    assert posterior.mean.shape == (2, 2, 3, 4)
    assert model.decode(posterior.mean).shape == (2, 1, 6, 8)
    recon, _, z = model(torch.zeros(2, 1, 6, 8))
    assert recon.shape == (2, 1, 6, 8) and z.shape == (2, 2, 3, 4)
    assert model.last_encoder_weight is model.encoder.conv_out.weight
    assert model.last_decoder_weight is model.decoder.conv_out.weight


def test_squares_of_pixels_are_channels_of_a_cell() -> None:
    """Of a network at half resolution, on images whose squares were laid out as channels by hand."""
    model, inner = small(patch_size=2), small(in_channels=4, out_channels=4)
    inner.load_state_dict(model.state_dict())
    image = torch.randn(2, 1, 8, 12)
    squares = torch.stack([image[:, 0, y::2, x::2] for y in (0, 1) for x in (0, 1)], dim=1)
    assert model.downscale == 4
    posterior = model.encode(image)
    assert posterior.mean.shape == (2, 3, 2, 3) and torch.equal(posterior.mean, inner.encode(squares).mean)
    made, cells = model.decode(posterior.mean), inner.decode(posterior.mean)
    assert made.shape == image.shape and torch.equal(made[:, 0, 1::2, 0::2], cells[:, 2])
    with pytest.raises(ValueError, match="multiples of 4"):
        model.encode(torch.zeros(1, 1, 8, 6))


def test_a_linear_path_is_added_to_what_networks_make() -> None:
    """Of networks that say nothing, it is all there is: of each cell alone, and linear."""
    plain, model = small(patch_size=2), small(patch_size=2, linear_path=True)
    model.load_state_dict(plain.state_dict(), strict=False)
    assert model.encoder_path is not None and model.decoder_path is not None
    image = torch.randn(2, 1, 8, 12)
    posterior, before = model.encode(image), plain.encode(image)
    path = model.encoder_path(image)
    assert path.shape == (2, 6, 2, 3) and torch.equal(posterior.moments, before.moments + path)
    cell = torch.nn.functional.conv2d(image[:, :, 4:, 8:], model.encoder_path.weight, model.encoder_path.bias)
    assert torch.allclose(path[:, :, 1:, 2:], cell, atol=1e-6)
    latent = posterior.mean
    beside = model.decoder_path(latent)
    assert torch.equal(model.decode(latent), plain.decode(latent) + beside)
    assert torch.allclose(beside[:, :, 4:, 8:], model.decoder_path(latent[:, :, 1:, 2:]), atol=1e-6)
    trained = {id(parameter) for parameter in model.decoding}
    assert {id(parameter) for parameter in model.decoder_path.parameters()} < trained
    assert len(trained) == len(plain.decoding) + 2


def test_bad_arguments_and_sides_are_refused() -> None:
    with pytest.raises(ValueError, match="norm_groups=5"):
        small(norm_groups=5)
    with pytest.raises(ValueError, match="attention_levels"):
        small(attention_levels=(2,))
    with pytest.raises(ValueError, match="multiples of 2"):
        small().encode(torch.zeros(1, 1, 5, 4))


def test_semantic_vae_has_the_published_names_and_size() -> None:
    with torch.device("meta"):
        model = SemanticVAE()
    assert round(parameter_count(model.encoder) / 1e6, 2) == 28.97
    assert round(parameter_count(model.decoder) / 1e6, 2) == 28.96
    block = ["norm1.weight", "norm1.bias", "norm2.weight", "norm2.bias"]
    block += ["attn.in_proj_weight", "attn.in_proj_bias", "attn.out_proj.weight", "attn.out_proj.bias"]
    block += ["mlp.0.weight", "mlp.0.bias", "mlp.2.weight", "mlp.2.bias"]
    ends = [f"{i}.{part}" for i in (0, 5, 6) for part in ("weight", "bias")]
    half = {*ends, *(f"{i}.{name}" for i in range(1, 5) for name in block)}
    assert model.state_dict().keys() == {f"{side}.{name}" for side in ("encoder", "decoder") for name in half}
    assert model.state_dict()["encoder.6.weight"].shape == (32, 768)


def test_semantic_vae_treats_tokens_as_a_set_and_keeps_the_grid() -> None:
    model = SemanticVAE(feature_dim=10, width=16, depth=1, num_heads=2, bottleneck=3).eval()
    features = torch.randn(2, 10, 2, 3)
    posterior = model.encode(features)
    assert posterior.mean.shape == (2, 3, 2, 3)
    assert model.decode(posterior.mean).shape == features.shape
    torch.testing.assert_close(model.encode(features.flip(-1)).mean, posterior.mean.flip(-1))
    with pytest.raises(ValueError, match="10, h, w"):
        model.encode(torch.zeros(1, 9, 2, 2))
    with pytest.raises(ValueError, match="num_heads=3"):
        SemanticVAE(width=16, num_heads=3)


def test_posterior_in_closed_form() -> None:
    moments = torch.zeros(1, 4, 2, 2)
    moments[:, :2] = 3.0
    moments[:, 2:] = 2 * torch.log(torch.tensor(0.5))
    posterior = DiagonalGaussian(moments)
    torch.testing.assert_close(posterior.std, torch.full((1, 2, 2, 2), 0.5))
    torch.testing.assert_close(posterior.sample(torch.ones(1, 2, 2, 2)), torch.full((1, 2, 2, 2), 3.5))
    expected = 8 * 0.5 * (9 + 0.25 - 1 - 2 * torch.log(torch.tensor(0.5)))
    torch.testing.assert_close(posterior.kl(), expected[None])


def test_posterior_clamps_and_draws_nothing_by_itself() -> None:
    posterior = DiagonalGaussian(torch.tensor([0.0, 1000.0]).view(1, 2, 1, 1))
    assert posterior.logvar.item() == 20.0
    with pytest.raises(ValueError, match="noise"):
        posterior.sample()
    draws = [posterior.sample(generator=torch.Generator().manual_seed(3)) for _ in range(2)]
    assert torch.equal(*draws)
    with pytest.raises(ValueError, match="even"):
        DiagonalGaussian(torch.zeros(1, 3, 1, 1))
