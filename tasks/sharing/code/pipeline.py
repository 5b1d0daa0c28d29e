"""Images of chosen classes from a shared folder."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from diffusers.pipelines.pipeline_utils import DiffusionPipeline, ImagePipelineOutput
from torch import Tensor

from tasks.data.pixels import to_levels
from tasks.sampling.per_image import image_noise


class LatentforgePipeline(DiffusionPipeline):
    """Labels in, images out; an image depends on the seed and its number alone, on a CPU in every bit.

    vae: from latents to images.
    guide: the weak network of autoguidance, where the recipe has one.
    classes: names by label.
    latents: `mean` and `std` by channel of the latents that are decoded.
    pointwise: the autoencoder attends by 1 × 1 convolutions. unit: it makes images in [0, 1], not in [-1, 1].
    """

    model_cpu_offload_seq = "transformer->guide->vae"  # type: ignore[assignment]
    _optional_components = ["guide"]  # noqa: RUF012  # diffusers' own way

    def __init__(
        self,
        transformer: Any,
        vae: Any,
        scheduler: Any,
        guide: Any = None,
        classes: Sequence[str] | None = None,
        latents: dict[str, list[float]] | None = None,
        pointwise: bool = False,
        unit: bool = False,
    ) -> None:
        super().__init__()
        self.register_modules(transformer=transformer, vae=vae, scheduler=scheduler, guide=guide)
        self.register_to_config(classes=classes, latents=latents, pointwise=pointwise, unit=unit)
        if pointwise:
            vae.set_attn_processor(_PointwiseAttention())

    @torch.no_grad()
    def __call__(
        self,
        labels: Sequence[int],
        rows: int = 1,
        seed: int = 0,
        guidance_scale: float | None = None,
        num_inference_steps: int | None = None,
        output_type: str = "pil",
    ) -> Any:
        """`rows` images of each label, one label after the other and then again, under `.images`.

        guidance_scale, num_inference_steps: in place of what the model's scores were made with.
        output_type: `pil`, or `np` for uint8 (N, H, W, 3).
        Raises ValueError on a label that the model does not have.
        """
        network = self.transformer.network
        wrong = [label for label in labels if not 0 <= label <= network.null_label]
        if wrong or not len(labels):
            raise ValueError(
                f"labels must be 0 to {network.null_label - 1} ({network.null_label} is none), found {wrong}"
            )
        count, device = rows * len(labels), next(self.transformer.parameters()).device
        batch = min(count, self.scheduler.config.batch)
        made = []
        for start in self.progress_bar(range(0, count, batch)):
            indices = np.arange(start, start + batch)
            labels_B = torch.from_numpy(np.asarray(labels, np.int64)[indices % len(labels)]).to(device)

            def noise(shape: tuple[int, ...], draw: int, indices: Any = indices) -> Tensor:
                return torch.from_numpy(image_noise(indices, shape, seed, draw)).to(device)

            with _computing(self.scheduler.config.precision, device):
                latents = self.scheduler.integrate(
                    self.transformer,
                    labels_B,
                    noise,
                    network.null_label,
                    self.guide,
                    guidance_scale,
                    num_inference_steps,
                )
            made.append(self._decoded(latents, device).cpu().numpy())
        pixels = np.concatenate(made)[:count]
        return ImagePipelineOutput(images=pixels if output_type == "np" else self.numpy_to_pil(pixels / 255.0))

    def _decoded(self, latents_BCHW: Tensor, device: torch.device) -> Tensor:
        """uint8 (B, H, W, 3); the decoder sees the first channel group alone."""
        mean, std = (
            torch.tensor(each, dtype=torch.float32, device=device).view(-1, 1, 1)
            for each in (self.config.latents["mean"], self.config.latents["std"])
        )
        texture = latents_BCHW[:, : len(mean)]
        with _computing("fp32" if self.scheduler.config.precision == "fp32" else "tf32", device):
            image: Tensor = self.vae.decode((texture.float() * std + mean).contiguous()).sample
            return to_levels(2 * image - 1 if self.config.unit else image)


class _PointwiseAttention:
    """Attention of an autoencoder's cells by 1 × 1 convolutions, which is what it was trained with: diffusers' own
    products round otherwise, and now and then a pixel is another."""

    def __call__(self, attention: Any, x_BCHW: Tensor, temb: Any = None, **_others: Any) -> Tensor:
        h = attention.group_norm(x_BCHW)
        layers = (attention.to_q, attention.to_k, attention.to_v)
        q, k, v = (_pointwise(h, layer).flatten(2).transpose(1, 2) for layer in layers)
        attended = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).unflatten(-1, x_BCHW.shape[-2:])
        return x_BCHW + _pointwise(attended, attention.to_out[0])


def _pointwise(x_BCHW: Tensor, layer: Any) -> Tensor:
    return F.conv2d(x_BCHW, layer.weight[:, :, None, None], layer.bias)


@contextmanager
def _computing(precision: str, device: torch.device) -> Any:
    """Products and convolutions in one precision, as the recipe sampled."""
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = precision != "fp32"
    half = {"bf16": torch.bfloat16, "fp16": torch.float16}.get(precision)
    try:
        with torch.autocast(device.type, half, enabled=half is not None):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before
