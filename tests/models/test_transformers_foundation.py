"""Foundation models of transformers: grids, tokens and normalisation of their own configuration, at small width."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from configs import UserError
from configs.data import Foundation
from models.foundation import FoundationModel
from models.tokenizer_kit import features_vary
from models.transformers_foundation import FAMILIES, TransformersFoundation
from tasks.foreign.foundations import check_foundation, load_foundation, look
from tasks.plan import networks
from tests.helpers.builders import small_recipe

WIDTH: dict[str, Any] = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 64,
    "image_size": 32,
}
REGISTERS = {"num_register_tokens": 4}
DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_attention_heads": 2,
    "decoder_num_hidden_layers": 1,
    "decoder_intermediate_size": 32,
}
KINDS: dict[str, tuple[str, dict[str, Any], int]] = {
    # class, further entries, tokens before those of patches
    "dinov2": ("Dinov2Model", {"patch_size": 14, "image_size": 28}, 1),
    "dinov2_with_registers": ("Dinov2WithRegistersModel", {"patch_size": 14, "image_size": 28, **REGISTERS}, 5),
    "dinov3_vit": ("DINOv3ViTModel", {"patch_size": 16, **REGISTERS}, 5),
    "siglip_vision_model": ("SiglipVisionModel", {"patch_size": 16}, 0),
    "vit_mae": ("ViTMAEModel", {"patch_size": 16, **DECODER}, 1),
    "clip_vision_model": ("CLIPVisionModel", {"patch_size": 16}, 1),
    "vit": ("ViTModel", {"patch_size": 16}, 1),
}


def saved(folder: Path, kind: str) -> Any:
    import transformers

    class_name, entries, _ = KINDS[kind]
    built = getattr(transformers, class_name)
    torch.manual_seed(0)
    network = built(built.config_class(**(WIDTH | entries))).eval()
    network.save_pretrained(folder)
    return network


def images(side: int = 64) -> torch.Tensor:
    return torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(1)) * 2 - 1


@torch.no_grad()
@pytest.mark.parametrize("kind", list(KINDS))
def test_features_are_the_tokens_of_patches_on_their_grid(kind: str, tmp_path: Path) -> None:
    network, (_, entries, before) = saved(tmp_path, kind), KINDS[kind]
    side = 4 * entries["patch_size"]
    model = TransformersFoundation(kind, tmp_path, pretrained=True, input_size=side)
    assert (model.feature_dim, model.grid(64), model.has_token) == (32, 4, before > 0)
    mean, std = FAMILIES[kind].usual
    given = ((images() + 1) / 2 - torch.tensor(mean).view(1, 3, 1, 1)) / torch.tensor(std).view(1, 3, 1, 1)
    if side != 64:
        given = torch.nn.functional.interpolate(given, size=(side, side), mode="bicubic", align_corners=False)
    options: dict[str, Any] = {} if kind.startswith("dino") else {"interpolate_pos_encoding": True}
    if kind == "vit_mae":
        network.config.mask_ratio = 0.0
        options["noise"] = torch.arange(16.0).expand(2, -1)
    tokens = network(given, **options).last_hidden_state
    if kind == "clip_vision_model":
        tokens = network.post_layernorm(tokens)
    expected = tokens[:, before:].transpose(1, 2).unflatten(-1, (4, 4))
    torch.testing.assert_close(model(images()), expected, rtol=0, atol=1e-5)
    pooled = tokens[:, 0] if before else tokens.mean(dim=1)
    torch.testing.assert_close(model.pooled(images()), pooled, rtol=0, atol=1e-5)
    last = TransformersFoundation(kind, tmp_path, pretrained=True, input_size=side, layer=1)
    torch.testing.assert_close(last(images()), expected, rtol=0, atol=1e-5)
    first = TransformersFoundation(kind, tmp_path, pretrained=True, input_size=side, layer=0)
    assert not first.has_token and not torch.allclose(first(images()), expected, atol=1e-2)
    assert min(features_vary(model, 64)) > 0.05


def test_the_normalisation_is_that_of_the_preprocessor(tmp_path: Path) -> None:
    saved(tmp_path, "dinov2")
    values = {"image_mean": [0.1, 0.2, 0.3], "image_std": [1.0, 2.0, 4.0]}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(values))
    model = TransformersFoundation("x", tmp_path, input_size=28)
    grey = torch.zeros(1, 3, 28, 28)
    expected = torch.tensor([0.4, 0.15, 0.05])
    torch.testing.assert_close(model.preprocess(grey)[0, :, 0, 0], expected)


def test_a_pair_of_towers_gives_the_one_that_sees(tmp_path: Path) -> None:
    """CLIP's and SigLIP's own files hold a text tower, too."""
    import transformers

    text = {**WIDTH, "vocab_size": 16, "max_position_embeddings": 8}
    del text["image_size"]
    config = transformers.SiglipConfig(vision_config={**WIDTH, "patch_size": 16}, text_config=text)
    torch.manual_seed(0)
    both = transformers.SiglipModel(config).eval()
    both.save_pretrained(tmp_path)
    model = TransformersFoundation("x", tmp_path, pretrained=True, input_size=64)
    with torch.no_grad():
        seen = both.vision_model(model.preprocess(images()), interpolate_pos_encoding=True).last_hidden_state
    torch.testing.assert_close(model(images()), seen.transpose(1, 2).unflatten(-1, (4, 4)), rtol=0, atol=1e-5)


def section(folder: Path, **changes: Any) -> Foundation:
    values = {"name": "transformers/mine", "weights": str(folder), "feature_dim": 32, "input_size": 64} | changes
    return Foundation(**values)


def test_recipes_name_one_by_its_folder(tmp_path: Path) -> None:
    saved(tmp_path, "dinov3_vit")
    model = load_foundation(section(tmp_path, vector="token"))
    assert model.has_token and model.grid(32) == 4
    assert look(section(tmp_path), 32).startswith(
        "foundation transformers/mine: 32 channels on 4 × 4 cells, varying by"
    )
    flops, source = networks.foundation_flops(section(tmp_path))
    assert networks.foundation_values(section(tmp_path)) == sum(each.numel() for each in model.parameters())
    assert flops > 0 and source == "counted by torch: transformers/mine"
    with pytest.raises(UserError, match=r"foundation.feature_dim is 48 but .* gives 32: set feature_dim: 32"):
        load_foundation(section(tmp_path, feature_dim=48))
    chosen = "foundation={name: transformers/mine, weights: %s, feature_dim: 32, layer: null, input_size: %d}"
    check_foundation(small_recipe(chosen % (tmp_path, 64)))
    with pytest.raises(UserError, match="gives features on a grid of 2 × 2 at input_size 32, but train_vavae"):
        check_foundation(small_recipe(chosen % (tmp_path, 32)))


def test_features_that_say_nothing_are_refused(tmp_path: Path) -> None:
    network = saved(tmp_path, "dinov2")
    with torch.no_grad():
        network.layernorm.weight.zero_()
    network.save_pretrained(tmp_path)
    with pytest.raises(UserError, match=r"features are the same over images .* check weights, layer and input_size"):
        look(section(tmp_path, input_size=56), 32)


def test_files_that_are_not_such_a_network_are_refused(tmp_path: Path) -> None:
    def refuse(said: str) -> None:
        with pytest.raises(UserError, match=said) as refusal:
            load_foundation(section(tmp_path))
        assert "\n" not in str(refusal.value)

    refuse("has no config.json; a model of transformers is hub, random, or a folder")
    saved(tmp_path, "dinov2")
    values = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(values | {"model_type": "bert"}))
    refuse("is of model_type bert; known are clip, clip_vision_model, dinov2")
    (tmp_path / "config.json").write_text(json.dumps(values | {"hidden_size": 48}))
    refuse("transformers cannot build this Dinov2Model")
    (tmp_path / "config.json").write_text("{")
    refuse("cannot be read as a configuration")
    (tmp_path / "config.json").write_text(json.dumps(values))
    (tmp_path / "model.safetensors").rename(tmp_path / "pytorch_model.bin")
    refuse("transformers cannot build this Dinov2Model")
    with pytest.raises(ValueError, match="layer is 7 but x has 2 blocks"):
        TransformersFoundation("x", tmp_path, layer=7)


@pytest.mark.parametrize(
    ("name", "side", "width", "grid"),
    [
        ("vit_small_patch14_reg4_dinov2.lvd142m", 224, 384, 16),
        ("vit_small_patch16_dinov3.lvd1689m", 256, 384, 16),
        ("vit_base_patch16_siglip_256.v2_webli", 256, 768, 16),
        ("vit_base_patch16_224.mae", 256, 768, 16),
        ("vit_base_patch16_clip_224.openai", 256, 768, 16),
    ],
)
def test_timms_own_tell_their_grid_and_width(name: str, side: int, width: int, grid: int) -> None:
    with torch.device("meta"):
        model = FoundationModel(name, input_size=side)
        features = model(torch.empty(1, 3, 256, 256))
    assert (model.feature_dim, model.grid(256)) == (width, grid) and features.shape == (1, width, grid, grid)
