"""A UNet over several resolutions of one image: the network of LowDiff's pixel cascade (papers.md 3.1).

The UNet is diffusers' `UNet2DModel`. A lower resolution enters and leaves it at the level of its own size, so that all
but the outermost levels are shared, as the paper says; an embedding tells the resolutions apart. Doors of their own for
the lower ones, and the condition as further input channels, are our choice.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from diffusers.models.unets.unet_2d import UNet2DModel
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from models.edm import Preconditioning, sigma_of
from models.sizes import AUGMENTATION_LABELS

_MOST_NORM_GROUPS = 32


class CascadeUNet(nn.Module):
    """Denoiser of images of any side in `resolutions`; the side of x says which.

    resolutions: sides in pixels, coarsest first, each half of the next.
    channels, multipliers, blocks: width of each level over `channels`, full resolution first, and residual blocks of
        each level.
    norm_channels: at least so many share a norm. What a block is told is a shift of each channel, which the norm after
        it would take away from channels that have one of their own.
    attention: sides at which blocks attend, with one head as in EDM's networks.
    augmented: whether it can be told what was done to an image (`models/augmentation.py`).
    preconditioning: see `models/edm.py`.
    Raises ValueError, naming the argument, when sizes do not fit.
    """

    def __init__(
        self,
        *,
        resolutions: tuple[int, ...],
        num_classes: int,
        channels: int,
        multipliers: tuple[int, ...],
        blocks: int,
        norm_channels: int,
        attention: tuple[int, ...] = (16,),
        dropout: float = 0.0,
        augmented: bool = False,
        image_channels: int = 3,
        preconditioning: Preconditioning | None = None,
    ) -> None:
        super().__init__()
        finest, levels = resolutions[-1], len(multipliers)
        if [finest >> level for level in range(len(resolutions))] != list(reversed(resolutions)):
            raise ValueError(f"resolutions must double from one to the next, found {resolutions}")
        if len(resolutions) > levels or finest % 2 ** (levels - 1):
            raise ValueError(
                f"a UNet of {levels} levels (multipliers {multipliers}) has no levels of its own for {resolutions}"
            )
        widths = tuple(channels * multiplier for multiplier in multipliers)
        most = min(_MOST_NORM_GROUPS, max(1, min(widths) // norm_channels))
        groups = next(n for n in range(most, 0, -1) if not any(width % n for width in widths))
        attends = [finest >> level in attention for level in range(levels)]
        down = tuple("AttnDownBlock2D" if each else "DownBlock2D" for each in attends)
        up = tuple("AttnUpBlock2D" if each else "UpBlock2D" for each in reversed(attends))
        self.resolutions, self.num_classes, self.image_channels = resolutions, num_classes, image_channels
        self.preconditioning = preconditioning or Preconditioning()
        self.unet: Any = UNet2DModel(
            sample_size=finest,
            in_channels=2 * image_channels,
            out_channels=image_channels,
            down_block_types=down,
            up_block_types=up,
            block_out_channels=widths,
            layers_per_block=blocks,
            attention_head_dim=None,
            norm_num_groups=groups,
            dropout=dropout,
        )
        width = self.unet.time_embedding.linear_2.out_features
        self.label_embedder = nn.Embedding(num_classes + 1, width)
        self.resolution_embedder = nn.Embedding(len(resolutions), width)
        self.level_embedder = nn.Linear(1, width)
        # Without a bias: an image to which nothing was done, all zeros, is as if there were no such input.
        self.augment_embedder = nn.Linear(AUGMENTATION_LABELS, width, bias=False) if augmented else None
        for embedder in (self.label_embedder, self.resolution_embedder, self.level_embedder):
            nn.init.normal_(embedder.weight, std=0.02)
        self.doors_in, self.doors_out = nn.ModuleList(), nn.ModuleList()
        for level in range(1, len(resolutions)):  # of the second finest resolution first
            self.doors_in.append(nn.Conv2d(2 * image_channels, widths[level - 1], 3, padding=1))
            self.doors_out.append(
                nn.Sequential(
                    nn.GroupNorm(groups, widths[level]),
                    nn.SiLU(),
                    nn.Conv2d(widths[level], image_channels, 3, padding=1),
                )
            )
        with torch.no_grad():  # conditions start without effect, as in the latent cascade
            for door in (self.unet.conv_in, *self.doors_in):
                door.weight[:, image_channels:].zero_()

    @property
    def side(self) -> int:
        """Of the finest resolution."""
        return self.resolutions[-1]

    @property
    def null_label(self) -> int:
        """The label that means "no label"."""
        return self.num_classes

    def forward(
        self,
        x_BCHW: Tensor,
        t_BG: Tensor,
        y_B: Tensor,
        condition_BCHW: Tensor | None = None,
        level_B: Tensor | None = None,
        augment_BA: Tensor | None = None,
    ) -> Tensor:
        """The denoised image, float32 (B, C, side, side), of x_BCHW at times t_BG (B, 1) (see `models/edm.py`).

        Condition and level as of `CascadeDiT.forward`. augment_BA: what was done to the image, (B, 9); None is nothing.
        Raises ValueError on a side that is no resolution.
        """
        side = x_BCHW.shape[-1]
        if side not in self.resolutions:
            raise ValueError(f"expected x of a side in {self.resolutions}, found shape {tuple(x_BCHW.shape)}")
        if level_B is None:
            level_B = x_BCHW.new_full((len(x_BCHW),), 1.0 if condition_BCHW is None else 0.0)
        condition = torch.zeros_like(x_BCHW) if condition_BCHW is None else condition_BCHW
        index = self.resolutions.index(side)
        resolution_B = torch.full((len(x_BCHW),), index, device=x_BCHW.device)
        told = self.label_embedder(y_B) + self.resolution_embedder(resolution_B) + self.level_embedder(level_B[:, None])

        if augment_BA is not None:
            assert self.augment_embedder is not None, "the network was built without augmentation"
            told = told + self.augment_embedder(augment_BA.to(told.dtype))

        def network(scaled: Tensor, noise_label_B: Tensor) -> Tensor:
            embedding = self.unet.time_embedding(self.unet.time_proj(noise_label_B).to(scaled.dtype)) + told
            return self._levels(torch.cat([scaled, condition], dim=1), embedding, len(self.resolutions) - 1 - index)

        return self.preconditioning(network, x_BCHW, sigma_of(t_BG[:, 0]))

    def flops_at(self, side: int | None = None) -> int:
        """FLOPs of one image's pass at a side (the finest where it is None), counted by torch on the meta device."""
        twin = copy.deepcopy(self).to("meta").eval()
        x, t = (
            torch.empty(shape, device="meta") for shape in ((1, self.image_channels, *(side or self.side,) * 2), (1, 1))
        )
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH), torch.no_grad():
            # The class's own, should the network be compiled.
            CascadeUNet.forward(twin, x, t, torch.zeros(1, dtype=torch.long, device="meta"))
        return int(counter.get_total_flops())

    def _levels(self, given: Tensor, embedding: Tensor, outermost: int) -> Tensor:
        """Through the UNet from level `outermost` on (0 is full resolution), in and out by that level's doors."""
        unet = self.unet
        h = unet.conv_in(given) if outermost == 0 else self.doors_in[outermost - 1](given)
        skips = [h]
        for block in unet.down_blocks[outermost:]:
            h, states = block(h, embedding)
            skips += states
        h = unet.mid_block(h, embedding)
        blocks = unet.up_blocks[: len(unet.up_blocks) - outermost]
        for block in blocks:
            for number, residual in enumerate(block.resnets):
                h = residual(torch.cat([h, skips.pop()], dim=1), embedding)
                if hasattr(block, "attentions"):
                    h = block.attentions[number](h)
            if block is not blocks[-1]:  # the last one leaves at its own size
                h = block.upsamplers[0](h)
        if outermost:
            return self.doors_out[outermost - 1](h)
        return unet.conv_out(unet.conv_act(unet.conv_norm_out(h)))
