"""LPIPS (Zhang et al. 2018) on VGG16, by the `lpips` package, which brings its calibration but not VGG itself.

Weights are torchvision's `vgg16-397923af.pth`: from torchvision's hub, or a path or URL of that file.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any
from urllib.error import URLError

import torch
from torch import Tensor, nn

from configs.errors import UserError
from infra.weights import fetch
from models.files import read_content

_FEATURES = "features."
WITHOUT = "set train_vavae.objective.perceptual_weight (and of its stages) to 0 to train without LPIPS"


class Lpips:
    """Perceptual distance of two batches of images in [-1, 1], (B, 1, 1, 1); gradients reach both, never the network.

    Not a module: it is no part of what is trained, saved or sharded. It follows the images' device.

    Args:
        weights: `hub`, `random`, or a path or URL.
        otherwise: what to do without weights, for errors.

    Raises:
        UserError: weights that cannot be had, or that are not VGG16's.
    """

    def __init__(self, weights: str, otherwise: str = WITHOUT) -> None:
        try:
            self.network = _network(None if weights == "random" else _tensors(weights))
        except (UserError, ValueError, pickle.UnpicklingError) as error:
            raise UserError(f"lpips_weights {weights}: {error}. Or {otherwise}") from None

    def __call__(self, x_B3HW: Tensor, y_B3HW: Tensor) -> Tensor:
        if next(self.network.parameters()).device != x_B3HW.device:
            self.network.to(x_B3HW.device)
        distance: Tensor = self.network(x_B3HW, y_B3HW)
        return distance


def check_weights(weights: str, otherwise: str = WITHOUT) -> None:
    """Raises UserError as :class:`Lpips` does for a path or URL; names stand for themselves."""
    if weights not in ("hub", "random"):
        Lpips(weights, otherwise)


def _tensors(weights: str) -> Mapping[str, Any]:
    """What the file holds by name. Raises UserError or ValueError."""
    if weights == "hub":
        try:
            return _from_hub()
        except (OSError, URLError) as error:
            raise UserError(
                f"torchvision's hub cannot be reached for VGG16 ({error}): download vgg16-397923af.pth elsewhere and "
                "give its path or URL"
            ) from None
    found = read_content(fetch(weights)).values
    if not isinstance(found, Mapping) or not any(str(name).startswith(_FEATURES) for name in found):
        raise UserError("expected torchvision's VGG16 (features.0.weight …), found something else")
    return found


def _from_hub() -> Mapping[str, Any]:
    from torchvision.models import VGG16_Weights

    return VGG16_Weights.IMAGENET1K_V1.get_state_dict(progress=False)


def _network(vgg: Mapping[str, Tensor] | None) -> nn.Module:
    """LPIPS with these convolutions, frozen; random ones are drawn from a seed of their own."""
    import lpips

    with warnings.catch_warnings(), torch.device("meta"):  # VGG's classifier, which nobody needs, is most of it
        warnings.simplefilter("ignore")  # torchvision's, about how the package calls it
        network = lpips.LPIPS(net="vgg", pretrained=False, pnet_rand=True, verbose=False)
    network.scaling_layer = lpips.ScalingLayer()
    calibration = Path(lpips.__file__).parent / "weights" / "v0.1" / "vgg.pth"
    state = dict(torch.load(calibration, map_location="cpu", weights_only=True))
    state |= {f"lins.{name.removeprefix('lin')}": value for name, value in state.items()}
    state |= {f"scaling_layer.{name}": value for name, value in network.scaling_layer.state_dict().items()}
    generator = torch.Generator().manual_seed(0)
    for name, expected in network.net.state_dict().items():
        theirs = _FEATURES + name.partition(".")[2]
        if vgg is None:
            state[f"net.{name}"] = _drawn(expected.shape, generator)
        elif theirs in vgg and vgg[theirs].shape == expected.shape:
            state[f"net.{name}"] = vgg[theirs].float()
        else:
            found = tuple(vgg[theirs].shape) if theirs in vgg else "nothing"
            raise ValueError(f"{theirs}: expected a tensor of shape {tuple(expected.shape)}, found {found}")
    network.load_state_dict(state, assign=True)
    return network.requires_grad_(False).eval()


def _drawn(shape: torch.Size, generator: torch.Generator) -> Tensor:
    """A convolution's weight that keeps the scale of what passes; a bias of 0."""
    if len(shape) == 1:
        return torch.zeros(shape)
    fan_in = shape[1] * shape[2] * shape[3]
    return torch.randn(shape, generator=generator) * (2.0 / fan_in) ** 0.5
