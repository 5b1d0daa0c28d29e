"""Foundation models: real EfficientNet-Lite0 weights on real photographs, true architectures for the rest."""

from __future__ import annotations

import pytest
import skimage.data
import timm
import torch
import torch.nn.functional as F
from timm.data import ImageNetInfo
from torch import Tensor

from models.foundation import FoundationModel, load_efficientnet_lite0


def photograph(name: str, side: int = 224) -> Tensor:
    """A photograph of scikit-image, centre-cropped, in [-1, 1]."""
    image = torch.from_numpy(getattr(skimage.data, name)()).permute(2, 0, 1)[None].float() / 127.5 - 1
    edge = min(image.shape[-2:])
    top, left = ((size - edge) // 2 for size in image.shape[-2:])
    crop = image[..., top : top + edge, left : left + edge]
    return F.interpolate(crop, size=(side, side), mode="bicubic", antialias=True).clamp(-1, 1)


def classifier(name: str) -> torch.nn.Module:
    network = timm.create_model(name, pretrained=False).eval()
    network.load_state_dict(load_efficientnet_lite0())
    return network


def test_packaged_weights_recognise_photographs() -> None:
    model = FoundationModel("efficientnet_lite0", pretrained=True)
    info, network = ImageNetInfo(), classifier(model.name)
    for name, answers in {"chelsea": ("tabby", "tiger cat", "Egyptian cat"), "coffee": ("espresso",)}.items():
        with torch.no_grad():
            chances = network(model.preprocess(photograph(name))).softmax(-1)[0]
        best = [info.index_to_description(int(i)) for i in chances.topk(len(answers)).indices]
        assert all(any(answer in found for answer in answers) for found in best), best
        assert chances.topk(len(answers)).values.sum() > 0.8


def surprise(variant: str, half: bool) -> float:
    """How unlike training the photographs look to the batch norms of this variant, fed this way: divergence
    of what each norm sees from what it remembers, median over channels, mean over layers.
    """
    network, gaps = classifier(variant), []

    def compare(norm: torch.nn.Module, inputs: tuple[Tensor, ...], _output: Tensor) -> None:
        seen = inputs[0].transpose(0, 1).flatten(1)
        wanted, variance = norm.running_var + 1e-5, seen.var(dim=1) + 1e-5  # some channels are dead
        squared = (seen.mean(dim=1) - norm.running_mean).square()
        gaps.append((0.5 * ((squared + variance) / wanted - 1 - torch.log(variance / wanted))).median().item())

    for module in network.modules():
        if isinstance(module, torch.nn.BatchNorm2d):
            module.register_forward_hook(compare)
    images = torch.cat([photograph(name) for name in ("chelsea", "coffee", "rocket", "astronaut")])
    mean, std = torch.tensor([0.485, 0.456, 0.406]), torch.tensor([0.229, 0.224, 0.225])
    with torch.no_grad():
        network(images if half else ((images + 1) / 2 - mean.view(1, 3, 1, 1)) / std.view(1, 3, 1, 1))
    return sum(gaps) / len(gaps)


def test_packaged_weights_are_the_tensorflow_variant_with_half_half_normalisation() -> None:
    """Both variants recognise photographs; what the batch norms remember tells which one was trained."""
    chosen = FoundationModel("efficientnet_lite0", pretrained=True)
    assert chosen.name == "tf_efficientnet_lite0"
    assert chosen.mean.unique().tolist() == chosen.std.unique().tolist() == [0.5]
    found = {
        (variant, half): surprise(variant, half)
        for variant in ("tf_efficientnet_lite0", "efficientnet_lite0")
        for half in (True, False)
    }
    best = min(found, key=found.__getitem__)
    assert best == ("tf_efficientnet_lite0", True)
    assert found[best] < 0.9 * min(value for key, value in found.items() if key != best), found


def test_one_interface_for_a_convolutional_network() -> None:
    images = photograph("chelsea", 64)
    model = FoundationModel("timm/tf_efficientnet_lite0", pretrained=True, layer=2, input_size=64)
    features = model(images)
    assert features.shape == (1, model.feature_dim, model.grid(64), model.grid(64)) == (1, 40, 8, 8)
    assert torch.equal(features, FoundationModel("efficientnet_lite0", pretrained=True, layer=2)(images))
    assert model.pooled(images).shape == (1, 1280)
    assert FoundationModel("efficientnet_lite0", pretrained=True).feature_dim == 320
    grey = images.mean(dim=1, keepdim=True)
    assert torch.equal(model(grey), model(grey.expand(-1, 3, -1, -1)))


@pytest.mark.parametrize(
    ("name", "grid"),
    [
        ("vit_small_patch14_dinov2.lvd142m", 4),
        ("vit_small_patch14_reg4_dinov2.lvd142m", 4),
        ("vit_base_patch16_224.mae", 4),
        ("vit_base_patch16_clip_224.openai", 4),
        ("vit_base_patch16_siglip_224", 4),
    ],
)
def test_vision_transformers_give_normed_patch_tokens_on_the_grid_of_an_f16_tokenizer(name: str, grid: int) -> None:
    model = FoundationModel(name)
    images = photograph("chelsea", 64)
    features = model(images)
    assert features.shape == (1, model.feature_dim, grid, grid) and model.grid(64) == grid
    assert model.grid(256) == 16
    with torch.no_grad():
        tokens = model.network.forward_features(model.preprocess(images))
    patches = tokens[:, model.network.num_prefix_tokens :]  # class token and registers dropped
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), patches)


def test_each_network_has_its_own_normalisation_and_the_published_omission_is_a_switch() -> None:
    images = torch.zeros(1, 3, 32, 32)
    clip = FoundationModel("vit_base_patch32_clip_224.openai", input_size=32)
    torch.testing.assert_close(clip.preprocess(images), (0.5 - clip.mean).expand(1, 3, 32, 32) / clip.std)
    assert clip.mean.flatten()[0].item() == pytest.approx(0.4815, abs=1e-4)
    bare = FoundationModel("vit_small_patch14_dinov2.lvd142m", imagenet_norm=False, interpolation="bilinear")
    torch.testing.assert_close(bare.preprocess(images + 0.25), torch.full((1, 3, 28, 28), 0.25))


def test_it_stays_frozen() -> None:
    model = FoundationModel("efficientnet_lite0", pretrained=True).train()
    assert not any(module.training for module in model.modules())
    assert not any(p.requires_grad for p in model.parameters())
    assert not model(torch.zeros(1, 3, 32, 32, requires_grad=True)).requires_grad


def test_given_weights_are_loaded_strictly_and_heads_are_ignored() -> None:
    weights = load_efficientnet_lite0()
    assert "classifier.weight" in weights and len(weights) == 296
    images = photograph("coffee", 32)
    given = FoundationModel("efficientnet_lite0", weights=weights)
    assert torch.equal(given(images), FoundationModel("efficientnet_lite0", pretrained=True)(images))
    with pytest.raises(ValueError, match=r"1 tensors missing.*conv_stem"):
        FoundationModel("efficientnet_lite0", weights={k: v for k, v in weights.items() if k != "conv_stem.weight"})
    with pytest.raises(ValueError, match="no model 'dinov9'"):
        FoundationModel("dinov9")


def test_the_class_token_stands_for_an_image_where_a_network_has_one() -> None:
    """FD-DINOv2 is a distance of the class token after the last norm (Stein et al. 2023)."""
    torch.manual_seed(0)
    model = FoundationModel("vit_small_patch14_dinov2.lvd142m", input_size=28)
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    tokens = model.network.forward_features(model.preprocess(images))
    assert model.has_token and torch.equal(model.pooled(images), tokens[:, 0])
    assert not FoundationModel("efficientnet_lite0").has_token
    assert not FoundationModel("vit_base_patch16_siglip_224").has_token  # it pools by attention
