"""Autoencoders of diffusers as tokenizers: their networks by their names, our images and posteriors around them.

The library takes seconds to import: whoever builds one imports this module then.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from diffusers import AutoencoderDC, AutoencoderKL, AutoencoderKLFlux2, AutoencoderRAE
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.diffusers_config import Described
from models.image_autoencoder import ImageAutoencoder, certain
from models.posterior import DiagonalGaussian

_CLASSES: dict[str, Any] = {each.__name__: each for each in (AutoencoderKL, AutoencoderKLFlux2, AutoencoderDC)}
_CLASSES["AutoencoderRAE"] = AutoencoderRAE
_OLD_ATTENTION = {"query": "to_q", "key": "to_k", "value": "to_v", "proj_attn": "to_out.0"}
"""What layers of attention were called in files of 2022 and 2023."""
_NEVER_READ = ("decoder.decoder_pos_embed",)
"""Tables that follow from the configuration, which some files hold."""


class DiffusersAutoencoder(ImageAutoencoder):
    """One of diffusers' autoencoders, `.network`, with random weights.

    A posterior is theirs where they have one, else as sharp as it can be. Latents are in the network's own scale, of
    which its `scaling_factor` and the like are no part (a representation autoencoder's normalisation is).
    Raises ValueError, in one line, when diffusers cannot build it.
    """

    def __init__(self, described: Described) -> None:
        super().__init__()
        self.described = described
        self.downscale, self.embed_dim = described.downscale, described.channels
        try:
            self.network: Any = _CLASSES[described.class_name].from_config(dict(described.arguments))
        except Exception as error:  # whatever its layers make of impossible sizes
            said = " ".join(str(error).split())[:160]
            raise ValueError(f"diffusers cannot build this {described.class_name}: {said}") from error

    def encode(self, x_BCHW: Tensor) -> DiagonalGaussian:
        """Raises ValueError on images that the network cannot take."""
        sides, only = tuple(x_BCHW.shape[-2:]), self.described.side
        if any(side % self.downscale for side in sides) or (only is not None and sides != (only, only)):
            wanted = f"multiples of {self.downscale}" if only is None else f"{only} × {only}"
            raise ValueError(f"image sides must be {wanted}, found {sides}")
        if self.described.class_name == "AutoencoderRAE":
            return certain(self.network.encode((x_BCHW + 1) / 2, return_dict=False)[0])
        found = self.network.encode(x_BCHW, return_dict=False)[0]
        return DiagonalGaussian(found.parameters) if hasattr(found, "parameters") else certain(found)

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Raises ValueError on a grid that the network cannot take."""
        only = self.described.side
        if only is not None and tuple(z_BCHW.shape[-2:]) != (only // self.downscale,) * 2:
            raise ValueError(f"latents must have {only // self.downscale} cells a side, found {tuple(z_BCHW.shape)}")
        image: Tensor = self.network.decode(z_BCHW.contiguous(), return_dict=False)[0]
        return 2 * image - 1 if self.described.class_name == "AutoencoderRAE" else image

    def flops_at(self, side: int | None) -> int:
        """FLOPs of one image of side × side pixels there and back, as torch counts them; on the meta device only."""
        assert side is not None
        return sum(self.flops(side))

    @torch.no_grad()
    def flops(self, side: int) -> tuple[int, int]:
        """Of encoding and of decoding."""
        device = next(self.parameters()).device
        cells = side // self.downscale
        given = (
            torch.empty(1, 3, side, side, device=device),
            torch.empty(1, self.embed_dim, cells, cells, device=device),
        )
        counts = []
        for work, each in zip((self.encode, self.decode), given, strict=True):
            with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
                work(each)
            counts.append(int(counter.get_total_flops()))
        return counts[0], counts[1]

    @property
    def kept(self) -> nn.Module:
        return self.network

    @property
    def decoding(self) -> list[nn.Parameter]:
        parts = [self.network.post_quant_conv, self.network.decoder]
        return [parameter for part in parts if part is not None for parameter in part.parameters()]

    @property
    def last_encoder_weight(self) -> Tensor:
        return self.network.encoder.conv_out.weight

    @property
    def last_decoder_weight(self) -> Tensor:
        return self.network.decoder.conv_out.weight


def fitted(autoencoder: DiffusersAutoencoder, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors of a file under the network's names, in float32 where they are numbers of layers.

    The network may be on the meta device. Raises ValueError, listing what does not fit.
    """
    expected = autoencoder.network.state_dict()
    found = {_renamed(name): value for name, value in tensors.items() if name not in _NEVER_READ}
    if "decoder.up.0.block.0.norm1.weight" in found or any(name.startswith("first_stage_model.") for name in found):
        raise ValueError(
            "has the layout of the LDM code and not of diffusers: leave model.kind out, describe it in train_vavae."
            "model and name the file in train_vavae.pretrained"
        )
    missing, unknown = sorted(expected.keys() - found.keys()), sorted(found.keys() - expected.keys())
    shapes = [
        f"{name} {tuple(found[name].shape)} instead of {tuple(value.shape)}"
        for name, value in expected.items()
        if name in found and _shaped(found[name], value) is None
    ]
    problems = [
        f"{len(names)} tensors {label} (such as {', '.join(names[:3])})"
        for label, names in (("are missing", missing), ("are unknown", unknown), ("have another shape", shapes))
        if names
    ]
    if problems:
        name = autoencoder.described.class_name
        raise ValueError(f"does not fit its config.json: {'; '.join(problems)}; let both be of one {name}")
    return {name: _shaped(found[name], value).to(value.dtype) for name, value in expected.items()}  # type: ignore[union-attr]


def _shaped(found: Tensor, expected: Tensor) -> Tensor | None:
    """A tensor in its expected shape: old attention was of 1 × 1 convolutions where it now is of linear layers."""
    if found.shape == expected.shape:
        return found
    return found[..., 0, 0] if found.dim() == 4 and found.shape == (*expected.shape, 1, 1) else None


def _renamed(name: str) -> str:
    path, _, last = name.rpartition(".")
    before, _, layer = path.rpartition(".")
    if ".attentions." in name and layer in _OLD_ATTENTION:
        return f"{before}.{_OLD_ATTENTION[layer]}.{last}"
    return name
