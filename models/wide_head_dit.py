"""A diffusion transformer with a wide, shallow head, for latents of many channels.

Its trunk is LightningDiT's; what the trunk makes of every token is the condition of a few much wider blocks that see
the noisy latent anew. Source: Zheng et al. 2025 (RAE, arXiv 2510.11690: DiT-DH), after DDT (Wang et al. 2025). Tensor
names are the published ones, so that the authors' checkpoints load strictly; times inside run from data to noise, as
theirs do.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.groups import ChannelGroups
from models.layers import PatchEmbed, RotaryTable
from models.lightningdit import Block, FinalLayer, LightningDiT


class FourierTimes(nn.Module):
    """t_B -> (B, D): sines and cosines of `frequencies` drawn rates, then an MLP. The rates `W` are never trained."""

    def __init__(self, dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.W = nn.Parameter(torch.randn(frequencies), requires_grad=False)
        self.mlp = nn.Sequential(nn.Linear(2 * frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t_B: Tensor) -> Tensor:
        angles = 2 * math.pi * t_B.float()[:, None] * self.W
        waves = torch.cat([angles.sin(), angles.cos()], dim=-1)
        return self.mlp(waves.to(next(self.mlp.parameters()).dtype))


class WideHeadDiT(LightningDiT):
    """Velocity network like `LightningDiT`, of one channel group and without alignment head.

    head_hidden, head_depth, head_heads: width, blocks and attention heads of the head.
    Other arguments as of `LightningDiT`; of the trunk. Raises ValueError, naming the argument, when sizes do not fit.
    """

    def __init__(
        self,
        *,
        head_hidden: int,
        head_depth: int,
        head_heads: int,
        input_size: int,
        patch_size: int = 1,
        positions_of: int | None = None,
        in_channels: int,
        hidden_size: int,
        depth: int,
        num_heads: int,
        num_classes: int,
        groups: ChannelGroups | None = None,
        qk_norm: bool = False,
        swiglu: bool = True,
        rope: bool = True,
        rmsnorm: bool = True,
        shift: bool = True,
    ) -> None:
        if groups is not None and len(groups) > 1:
            raise ValueError(f"a wide head has one clock, found channel groups {groups.names}")
        if head_hidden % head_heads:
            raise ValueError(f"head_hidden must be a multiple of head_heads={head_heads}, found {head_hidden}")
        super().__init__(
            input_size=input_size,
            patch_size=patch_size,
            positions_of=positions_of,
            in_channels=in_channels,
            hidden_size=hidden_size,
            depth=depth,
            num_heads=num_heads,
            num_classes=num_classes,
            groups=groups,
            qk_norm=qk_norm,
            swiglu=swiglu,
            rope=rope,
            rmsnorm=rmsnorm,
            shift=shift,
        )
        self.head_hidden, self.trunk_depth = head_hidden, depth
        self.t_embedder = FourierTimes(hidden_size)
        self.s_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self.x_embedder = PatchEmbed(in_channels, head_hidden, patch_size)
        same = head_hidden == hidden_size
        self.s_projector: nn.Module = nn.Identity() if same else nn.Linear(hidden_size, head_hidden)
        self.enc_feat_rope, self.feat_rope = self.feat_rope, None
        self.dec_feat_rope = (
            RotaryTable(head_hidden // head_heads, self.grid_size, finest=positions_of) if rope else None
        )
        if self.resized:
            self.resized = ("pos_embed", "enc_feat_rope.", "dec_feat_rope.")
        for _ in range(head_depth):
            self.blocks.append(
                Block(head_hidden, head_heads, qk_norm=qk_norm, swiglu=swiglu, rmsnorm=rmsnorm, shift=shift)
            )
        self.final_layer = FinalLayer(head_hidden, patch_size**2 * in_channels, rmsnorm)
        self._begin()

    def _begin(self) -> None:
        """As `LightningDiT.reset_parameters`: Xavier linears, zero modulation and output."""
        times: Any = self.t_embedder.mlp
        for module in [self.s_projector, times, *list(self.blocks)[self.trunk_depth :]]:
            for linear in (each for each in module.modules() if isinstance(each, nn.Linear)):
                nn.init.xavier_uniform_(linear.weight)
                nn.init.zeros_(linear.bias)
        for embedder in (self.x_embedder, self.s_embedder):
            proj: Any = embedder.proj
            nn.init.xavier_uniform_(proj.weight.view(len(proj.weight), -1))
            nn.init.zeros_(proj.bias)
        for layer in (times[0], times[2]):
            nn.init.normal_(layer.weight, std=0.02)
        final: Any = self.final_layer
        head: list[Any] = list(self.blocks)[self.trunk_depth :]
        for zero in [*(block.adaLN_modulation[1] for block in head), final.adaLN_modulation[1], final.linear]:
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    def forward(  # type: ignore[override]  # without the alignment that its parent has
        self, x_BCHW: Tensor, t_BG: Tensor, y_B: Tensor, *, with_alignment: bool = False, route: Any = None
    ) -> Tensor:
        """Velocity (B, C, H, W), as of `LightningDiT.forward`. Raises ValueError with alignment or a route."""
        if with_alignment or route is not None:
            raise ValueError("a wide head has no alignment head beside it, and all tokens go through all blocks")
        noise_B = 1 - self._checked_times(x_BCHW, t_BG, self.input_size)[:, 0]
        times_BD = self.t_embedder(noise_B)
        # The authors' blocks take the SiLU of a condition that is one already.
        c_BD = F.silu(F.silu(times_BD + self.y_embedder(y_B)))
        s_BND = self.s_embedder(x_BCHW) + self.pos_embed
        blocks: list[Any] = list(self.blocks)
        for block in blocks[: self.trunk_depth]:
            s_BND = block(s_BND, c_BD, self.enc_feat_rope)
        c_BND = F.silu(self.s_projector(F.silu(times_BD[:, None] + s_BND)))
        x_BND = self.x_embedder(x_BCHW)
        for block in blocks[self.trunk_depth :]:
            x_BND = block(x_BND, c_BND, self.dec_feat_rope)
        return -self._unpatchify(self.final_layer(x_BND, c_BND), self.grid_size)
