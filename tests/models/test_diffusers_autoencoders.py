"""Autoencoders of diffusers: the same tensors as their own library's, from their own files."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.autoencoders import DiffusersModel
from configs.errors import UserError
from models.diffusers_autoencoder import DiffusersAutoencoder
from models.diffusers_config import describe
from models.image_autoencoder import ImageAutoencoder
from models.tiling import tiled_decode, tiled_encode
from models.tokenizer_losses import TrainableTokenizer
from tasks.networks import build_autoencoder, check_diffusers, load_diffusers
from tests.helpers.builders import small_recipe
from tests.helpers.foreign import ARGUMENTS, SIZES, saved, section, theirs

CLASSES = list(ARGUMENTS)


def read(folder: object, class_name: str, **changes: Any) -> ImageAutoencoder:
    given = DiffusersModel(**section(class_name, folder, **changes))
    network = build_autoencoder(given)
    load_diffusers(network, given)
    return network.eval()


def pictures(count: int = 3, side: int = 32) -> torch.Tensor:
    return torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("class_name", CLASSES)
def test_diffusers_tensors_are_their_librarys(class_name: str, tmp_path: Path) -> None:
    """Encoded, decoded, and there and back; images in [-1, 1], which a representation autoencoder has in [0, 1]."""
    from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderRAE

    own = {each.__name__: each for each in (AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderRAE)}
    saved(tmp_path, class_name)
    reference, network = own[class_name].from_pretrained(tmp_path).eval(), read(tmp_path, class_name)
    images = pictures()
    representation = class_name == "AutoencoderRAE"
    found = reference.encode((images + 1) / 2 if representation else images, return_dict=False)[0]
    mean = found.mean if hasattr(found, "mean") and not isinstance(found, torch.Tensor) else found
    posterior = network.encode(images)
    torch.testing.assert_close(posterior.mean, mean, rtol=0, atol=1e-5)
    assert posterior.mean.shape == (3, SIZES[class_name][0], 4, 4) and float(mean.std()) > 0.01
    if hasattr(found, "std") and not isinstance(found, torch.Tensor):
        torch.testing.assert_close(posterior.std, found.std, rtol=0, atol=1e-5)
    else:
        assert float(posterior.std.max()) < 1e-6, "an encoder without a posterior is certain"
    again = reference.decode(mean, return_dict=False)[0]
    expected = 2 * again - 1 if representation else again
    torch.testing.assert_close(network.decode(posterior.mean), expected, rtol=0, atol=1e-5)
    torch.testing.assert_close(network(images)[0], expected, rtol=0, atol=1e-5)
    channels_last = posterior.mean.contiguous(memory_format=torch.channels_last)
    torch.testing.assert_close(network.decode(channels_last), expected, rtol=0, atol=1e-5)


@torch.no_grad()
@pytest.mark.parametrize("layout", ["shards", "index", "single file"])
def test_diffusers_layouts_hold_one_network(layout: str, tmp_path: Path) -> None:
    saved(tmp_path, "AutoencoderKL", shard="20KB" if layout != "single file" else None)
    index = tmp_path / "diffusion_pytorch_model.safetensors.index.json"
    assert index.exists() == (layout != "single file")
    place = {"shards": tmp_path, "index": index, "single file": tmp_path / "diffusion_pytorch_model.safetensors"}
    expected = theirs("AutoencoderKL").encode(pictures()).latent_dist.mean
    torch.testing.assert_close(read(place[layout], "AutoencoderKL").encode(pictures()).mean, expected)


@torch.no_grad()
def test_diffusers_files_of_2022_name_attention_otherwise(tmp_path: Path) -> None:
    """`query` for `to_q` and the like, some as 1 × 1 convolutions."""
    saved(tmp_path, "AutoencoderKL")
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for name, value in load_file(file).items():
        old = next((name.replace(f".{key}.", f".{old}.") for key, old in new.items() if f".{key}." in name), name)
        tensors[old] = value[..., None, None].clone() if ".query.weight" in old else value
    assert sum(".query." in name for name in tensors) == 4, "encoder and decoder, weight and bias"
    save_file(tensors, file)
    expected = theirs("AutoencoderKL").encode(pictures()).latent_dist.mean
    torch.testing.assert_close(read(tmp_path, "AutoencoderKL").encode(pictures()).mean, expected)


@torch.no_grad()
def test_diffusers_factors_are_shown_and_change_no_latent(tmp_path: Path) -> None:
    saved(tmp_path / "a", "AutoencoderKL")
    saved(tmp_path / "b", "AutoencoderKL", scaling_factor=3.0, shift_factor=0.5)
    one, other = (read(tmp_path / name, "AutoencoderKL") for name in "ab")
    assert isinstance(other, DiffusersAutoencoder)
    assert other.described.factors == {"scaling_factor": 3.0, "shift_factor": 0.5}
    assert torch.equal(one.encode(pictures()).mean, other.encode(pictures()).mean)


@torch.no_grad()
def test_diffusers_autoencoders_work_in_tiles(tmp_path: Path) -> None:
    saved(tmp_path, "AutoencoderKL")
    network, images = read(tmp_path, "AutoencoderKL"), pictures(1, 64)
    latents = tiled_encode(network, images, tile=32, overlap=16).mean
    assert latents.shape == (1, 4, 8, 8)
    again = tiled_decode(network, latents, tile=4, overlap=2)
    assert again.shape == images.shape
    torch.testing.assert_close(tiled_decode(network, latents, tile=8, overlap=2), network.decode(latents))


def test_diffusers_kl_learns_by_our_objective(tmp_path: Path) -> None:
    """With the weights whose gradients balance alignment and adversary, and the decoder's gradients taken once."""
    saved(tmp_path, "AutoencoderKL")
    network = read(tmp_path, "AutoencoderKL").train()
    gradients = []
    for once in (True, False):
        torch.manual_seed(0)
        trainable = TrainableTokenizer(network, feature_dim=6, one_decoder_backward=once)
        trainable.zero_grad()
        features = torch.randn(3, 6, 4, 4)
        terms = trainable(pictures(), torch.randn(3, 4, 4, 4), features)
        terms["total"].backward()
        assert float(terms["align_scale"]) > 0
        gradients.append([each.grad.clone() for each in network.parameters() if each.grad is not None])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-5 * float(other.abs().max()) + 1e-8)
    assert len(gradients[0]) == len(list(network.parameters()))


@pytest.mark.parametrize(
    ("entry", "value", "said"),
    [
        ("_class_name", "VQModel", "is of class VQModel, but the recipe's class_name is AutoencoderKL"),
        ("_class_name", None, "has no _class_name"),
        ("block_out_channels", "128", "block_out_channels is '128': expected a list of widths"),
        ("latent_channels", -4, "latent_channels is -4: expected a positive integer"),
        ("in_channels", 4, "in_channels is 4: images here have 3 channels"),
    ],
)
def test_diffusers_configuration_is_checked_entry_by_entry(
    entry: str, value: object, said: str, tmp_path: Path
) -> None:
    saved(tmp_path, "AutoencoderKL")
    values = json.loads((tmp_path / "config.json").read_text()) | {entry: value}
    (tmp_path / "config.json").write_text(json.dumps({k: v for k, v in values.items() if v is not None}))
    with pytest.raises(UserError, match=f"train_vavae.model.location .*: config.json {said}"):
        read(tmp_path, "AutoencoderKL")


def test_diffusers_cannot_build_what_a_configuration_says(tmp_path: Path) -> None:
    saved(tmp_path, "AutoencoderKL")
    values = json.loads((tmp_path / "config.json").read_text()) | {"norm_num_groups": 7}
    with pytest.raises(ValueError, match="diffusers cannot build this AutoencoderKL: num_channels"):
        DiffusersAutoencoder(describe(values, "AutoencoderKL"))


def _refused(tmp_path: Path, class_name: str = "AutoencoderKL", location: object = None, **changes: Any) -> str:
    own = DiffusersModel(**section(class_name, location or tmp_path, **changes))
    with pytest.raises(UserError) as refusal:
        check_diffusers(small_recipe(), own)
    said = str(refusal.value)
    assert "\n" not in said
    return said


def test_diffusers_sizes_that_the_recipe_states_are_checked(tmp_path: Path) -> None:
    saved(tmp_path, "AutoencoderKL")
    assert "channels is 16 but this AutoencoderKL" in (said := _refused(tmp_path, channels=16))
    assert said.endswith("set channels: 4")
    assert "downscale is 16" in _refused(tmp_path, downscale=16)


def test_diffusers_of_one_image_size_refuses_others(tmp_path: Path) -> None:
    saved(tmp_path, "AutoencoderRAE", encoder_input_size=112)
    assert "makes images of 64 × 64 only: set image.size: 64" in _refused(tmp_path, "AutoencoderRAE")


def test_diffusers_pickles_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "AutoencoderKL")
    (tmp_path / "diffusion_pytorch_model.safetensors").rename(tmp_path / "diffusion_pytorch_model.bin")
    assert "only diffusion_pytorch_model.bin, a pickle, which could run code" in _refused(tmp_path)
    named = _refused(tmp_path, location=tmp_path / "diffusion_pytorch_model.bin")
    assert "is a pickle, which could run code; expected safetensors" in named


def test_diffusers_layouts_that_are_not_theirs_are_refused_by_name(tmp_path: Path) -> None:
    saved(tmp_path / "pipeline" / "vae", "AutoencoderKL")
    assert "is a whole pipeline; name the folder of its autoencoder" in _refused(
        tmp_path, location=tmp_path / "pipeline"
    )
    assert "has no config.json (pipeline)" in _refused(tmp_path)
    saved(tmp_path / "ldm", "AutoencoderKL")
    file = tmp_path / "ldm" / "diffusion_pytorch_model.safetensors"
    save_file({"decoder.up.0.block.0.norm1.weight": torch.ones(8)}, file)
    assert "has the layout of the LDM code and not of diffusers" in _refused(tmp_path, location=tmp_path / "ldm")


def test_diffusers_weights_of_another_network_are_refused(tmp_path: Path) -> None:
    saved(tmp_path, "AutoencoderKL")
    file = tmp_path / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    bias = tensors.pop("encoder.conv_in.bias")
    tensors |= {"stranger": bias, "decoder.conv_out.bias": torch.zeros(5)}
    save_file(tensors, file)
    said = _refused(tmp_path)
    for part in (
        "1 tensors are missing (such as encoder.conv_in.bias)",
        "1 tensors are unknown (such as stranger)",
        "1 tensors have another shape (such as decoder.conv_out.bias (5,) instead of (3,))",
    ):
        assert part in said


def test_diffusers_recipes_are_refused_before_any_file_is_opened() -> None:
    def refuse(said: str, *overrides: str, class_name: str = "AutoencoderKL", **changes: Any) -> None:
        own = section(class_name, "/nowhere", **changes)
        with pytest.raises(UserError, match=said):
            small_recipe(f"train_vavae.model={json.dumps(own)}", *overrides)

    zero = "train_vavae.images=0"
    with pytest.raises(UserError, match=r"class_name: input should be 'AutoencoderKL', .* or 'AutoencoderRAE'"):
        small_recipe(
            zero, f"train_vavae.model={json.dumps(section('AutoencoderKL', '/x') | {'class_name': 'VQModel'})}"
        )
    refuse("image.size 32 is not a multiple of 64, the tokenizer's downscale: use 64", zero, downscale=64)
    refuse("patch_size 3 does not divide the latent side 4", zero, "train_dit.model.patch_size=3")
    refuse("foundation .* gives features on a grid of", zero, downscale=16)
    refuse("our objective trains no AutoencoderDC, only AutoencoderKL", class_name="AutoencoderDC")
    refuse("pretrained is set but model.kind diffusers brings weights of its own", "train_vavae.pretrained=/x")
