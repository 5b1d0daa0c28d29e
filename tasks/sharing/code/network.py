"""The diffusion network as diffusers loads and saves it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from models.cascade_dit import CascadeDiT
from models.cascade_unet import CascadeUNet
from models.edm import Preconditioning
from models.groups import ChannelGroups
from models.lightningdit import LightningDiT


class LatentforgeNetwork(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A velocity (or, in pixels, denoising) network under the field `network`.

    kind: `lightningdit` or `cascade_unet`.
    arguments: of its constructor, plain JSON values.
    """

    @register_to_config
    def __init__(self, kind: str, arguments: dict[str, Any]) -> None:
        super().__init__()
        given = dict(arguments)
        for name in ("resolutions", "multipliers", "attention"):
            if name in given:
                given[name] = tuple(given[name])
        if kind == "cascade_unet":
            given["preconditioning"] = Preconditioning(**given["preconditioning"])
            self.network: Any = CascadeUNet(**given)
            return
        given["groups"] = _groups(given["groups"])
        self.network = (CascadeDiT if "resolutions" in given else LightningDiT)(**given)

    def forward(self, *arguments: Tensor) -> Tensor:
        """As the network's own: (x_BCHW, t_BG, y_B), and of a cascade (condition_BCHW, level_B)."""
        found: Tensor = self.network(*arguments)
        return found


def _groups(stored: Mapping[str, Any]) -> ChannelGroups:
    return ChannelGroups(tuple(stored["names"]), tuple(stored["sizes"]))
