"""Foundation models of transformers behind the interface of `models/foundation.py`, from their own configuration.

Patch grid, class token, registers and width are the configuration's, the normalisation is that of the preprocessor
beside it. Features are tokens of patches after the network's last norm, as timm gives them. The library takes seconds
to import: whoever builds one imports this module then.
"""

from __future__ import annotations

import inspect
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import Tensor, nn

from models.foundation import FoundationModel

transformers.utils.logging.disable_progress_bar()
_IMAGENET = ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225))
_HALF = ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
_CLIP = ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


@dataclass(frozen=True)
class Family:
    """Networks of one `model_type`."""

    class_name: str
    norm: str
    """Its last norm."""
    token: bool = True
    """Whether a class token stands before the patches."""
    usual: tuple[tuple[float, ...], tuple[float, ...]] = _IMAGENET
    """Mean and deviation of its images, where no preprocessor says them."""
    vision: bool = False
    """Whether the configuration is of a pair of towers, of which this is one."""


FAMILIES = {
    "dinov2": Family("Dinov2Model", "layernorm"),
    "dinov2_with_registers": Family("Dinov2WithRegistersModel", "layernorm"),
    "dinov3_vit": Family("DINOv3ViTModel", "norm"),
    "vit": Family("ViTModel", "layernorm", usual=_HALF),
    "vit_mae": Family("ViTMAEModel", "layernorm"),
    "clip": Family("CLIPVisionModel", "post_layernorm", usual=_CLIP, vision=True),
    "clip_vision_model": Family("CLIPVisionModel", "post_layernorm", usual=_CLIP),
    "siglip": Family("SiglipVisionModel", "post_layernorm", token=False, usual=_HALF, vision=True),
    "siglip_vision_model": Family("SiglipVisionModel", "post_layernorm", token=False, usual=_HALF),
}
"""SigLIP 2 of fixed resolution calls itself `siglip`."""


class TransformersFoundation(FoundationModel):
    """A frozen vision network of transformers in eval mode.

    folder: holds `config.json`, and where `pretrained` its safetensors (a pickle is never read).
    layer: index of a block, whose tokens are normed as the last one's are; None is the last.
    Other arguments as of `FoundationModel`. Raises ValueError, in one line, on what it cannot be built from.
    """

    def __init__(
        self,
        name: str,
        folder: Path,
        *,
        pretrained: bool = False,
        input_size: int | None = None,
        layer: int | None = None,
        imagenet_norm: bool = True,
        interpolation: Literal["bicubic", "bilinear"] = "bicubic",
    ) -> None:
        nn.Module.__init__(self)
        self.name, self.layer = name, layer
        self.input_size, self.imagenet_norm, self.interpolation = input_size, imagenet_norm, interpolation
        values = _json(folder / "config.json")
        kind = values.get("model_type")
        family = FAMILIES.get(str(kind))
        if family is None:
            raise ValueError(f"{folder}/config.json is of model_type {kind}; known are {', '.join(sorted(FAMILIES))}")
        built: Any = getattr(transformers, family.class_name)
        try:
            config = built.config_class.from_dict(values.get("vision_config", values) if family.vision else values)
            if kind == "vit_mae":
                config.mask_ratio = 0.0
            self.network = _loaded(built, folder, config) if pretrained else built(config)
        except Exception as error:  # whatever its layers or its files make of it
            said = " ".join(str(error).split())[:200]
            raise ValueError(f"transformers cannot build this {family.class_name}: {said}") from error
        self.kind, self.family = str(kind), family
        self.patch = int(config.patch_size)
        self._before = int(family.token) + int(getattr(config, "num_register_tokens", 0) or 0)
        self._depth = int(config.num_hidden_layers)
        if layer is not None and not -self._depth <= layer < self._depth:
            raise ValueError(f"layer is {layer} but {name} has {self._depth} blocks")
        accepted = inspect.signature(self.network.forward).parameters
        self._interpolates = "interpolate_pos_encoding" in accepted or kind == "vit_mae"
        mean, std = _normalisation(folder, family)
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1), persistent=False)
        self.requires_grad_(False)
        self.eval()

    @property
    def feature_dim(self) -> int:
        return int(self.network.config.hidden_size)

    @property
    def has_token(self) -> bool:
        return self.layer is None and self.family.token

    @torch.no_grad()
    def forward(self, images_B3HW: Tensor) -> Tensor:
        """Features (B, C, h, w) of images in [-1, 1]; grey images (one channel) are repeated."""
        images = self.preprocess(images_B3HW)
        tokens, cells = self._tokens(images)[:, self._before :], images.shape[-1] // int(self.patch or 1)
        return tokens.transpose(1, 2).unflatten(-1, (cells, cells))

    @torch.no_grad()
    def pooled(self, images_B3HW: Tensor) -> Tensor:
        """The class token, or the mean of the patches where there is none, (B, C)."""
        tokens = self._tokens(self.preprocess(images_B3HW))
        return tokens[:, 0] if self.has_token else tokens[:, self._before :].mean(dim=1)

    def _tokens(self, images: Tensor) -> Tensor:
        options: dict[str, Any] = {"interpolate_pos_encoding": True} if self._interpolates else {}
        if self.kind == "vit_mae":  # whose patches else come in a drawn order
            count = (images.shape[-1] // int(self.patch or 1)) ** 2
            order = torch.arange(count, device=images.device, dtype=images.dtype)
            options["noise"] = order.expand(len(images), -1)
        if self.layer is None and self.family.class_name != "CLIPVisionModel":  # which norms its token alone
            tokens: Tensor = self.network(images, **options).last_hidden_state
            return tokens
        states = self.network(images, output_hidden_states=True, **options).hidden_states
        layer = self._depth - 1 if self.layer is None else self.layer % self._depth
        tokens = self.network.get_submodule(self.family.norm)(states[layer + 1])
        return tokens


def _loaded(built: Any, folder: Path, config: Any) -> Any:
    network, told = built.from_pretrained(
        folder,
        config=config,
        use_safetensors=True,
        local_files_only=True,
        dtype=torch.float32,
        output_loading_info=True,
    )
    missing = sorted(name for name in told["missing_keys"] if not name.startswith(("pooler", "head")))
    if missing:
        raise ValueError(f"its weights lack {len(missing)} tensors (such as {', '.join(missing[:3])})")
    return network


def _normalisation(folder: Path, family: Family) -> tuple[Any, Any]:
    path = folder / "preprocessor_config.json"
    values = _json(path) if path.is_file() else {}
    return values.get("image_mean", family.usual[0]), values.get("image_std", family.usual[1])


def _json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: cannot be read as a configuration ({error})") from None
    if not isinstance(values, dict):
        raise ValueError(f"{path}: is no configuration: expected an object")
    return values
