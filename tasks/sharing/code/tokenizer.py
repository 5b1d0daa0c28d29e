"""Tokenizers that diffusers has no class for."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from diffusers.configuration_utils import ConfigMixin, register_to_config
from diffusers.models.modeling_utils import ModelMixin
from torch import Tensor

from models.autoencoder import AutoencoderKL, Identity


@dataclass
class Decoded:
    """Images, nominally in [-1, 1], as diffusers' autoencoders give them."""

    sample: Tensor


class LatentforgeTokenizer(ModelMixin, ConfigMixin):  # type: ignore[misc]
    """A convolutional autoencoder, or none where the latents are pixels.

    arguments: of its constructor; None is no network.
    """

    @register_to_config
    def __init__(self, arguments: dict[str, Any] | None) -> None:
        super().__init__()
        self.register_buffer("anchor", torch.zeros(1), persistent=False)  # diffusers asks where a module lies
        if arguments is None:
            self.network: Any = Identity()
            return
        given = dict(arguments)
        for name in ("channel_multipliers", "attention_levels"):
            given[name] = tuple(given[name])
        self.network = AutoencoderKL(**given)

    def decode(self, latents_BCHW: Tensor) -> Decoded:
        """Images of latents in the encoder's own scale."""
        return Decoded(self.network.decode(latents_BCHW))
