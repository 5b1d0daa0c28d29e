"""LightningDiT over several resolutions of one latent: the network of LowDiff's latent cascade (papers.md 3).

What is added to the published network starts without effect at the finest resolution, so published weights load and
begin unchanged. The paper fixes a shared network, a resolution embedding and the lower result as condition; how they
enter is our choice.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from models.layers import PatchEmbed, RotaryTable, TimeEmbedder, sincos_positions
from models.lightningdit import LightningDiT
from models.routing import Route


class CascadeDiT(LightningDiT):
    """Velocity network on latents of any side in `resolutions`; the side of x says which.

    The condition, a lower result brought to the side of x, is further input channels of the patch embedding, written
    as a convolution of its own whose sum with the published one is the same thing. Positions are the centres of cells
    counted in cells of the finest grid.

    resolutions: sides in cells, coarsest first; the last is the published `input_size`.
    arguments: those of `LightningDiT`; `input_size`, where given, must be the finest side.
    Raises ValueError, naming the argument, when sizes do not fit.
    """

    added = ("resolution_embedder.", "condition_embedder.", "level_embedder.")
    """Names of what the published network does not have; fresh where a checkpoint lacks it."""

    def __init__(self, *, resolutions: tuple[int, ...], **arguments: Any) -> None:
        finest = resolutions[-1]
        if list(resolutions) != sorted(set(resolutions)) or arguments.setdefault("input_size", finest) != finest:
            raise ValueError(
                f"resolutions must rise to input_size={arguments.get('input_size', finest)}, found {resolutions}"
            )
        super().__init__(**arguments)
        self.resolutions = resolutions
        if any(side % self.patch_size for side in resolutions):
            raise ValueError(f"resolutions must be multiples of patch_size={self.patch_size}, found {resolutions}")
        self.resolution_embedder = nn.Embedding(len(resolutions), self.hidden_size)
        self.condition_embedder = PatchEmbed(self.in_channels, self.hidden_size, self.patch_size, bias=False)
        self.level_embedder = TimeEmbedder(self.hidden_size)
        # Tables of the coarser grids; not part of checkpoints, which stay as published.
        self.coarse_rope = nn.ModuleList()
        for index, side in enumerate(resolutions[:-1]):
            grid = side // self.patch_size
            positions = sincos_positions(self.hidden_size, grid, finest=self.grid_size)
            self.register_buffer(f"coarse_positions_{index}", positions, persistent=False)
            if self.feat_rope is not None:
                head_dim = self.hidden_size // arguments["num_heads"]
                self.coarse_rope.append(RotaryTable(head_dim, grid, finest=self.grid_size, persistent=False))
        nn.init.normal_(self.resolution_embedder.weight, std=0.02)
        level: Any = self.level_embedder.mlp
        nn.init.normal_(level[0].weight, std=0.02)
        with torch.no_grad():
            self.resolution_embedder.weight[-1].zero_()
        for zero in (self.condition_embedder.proj.weight, level[0].bias, level[2].weight, level[2].bias):
            nn.init.zeros_(zero)

    def forward(  # type: ignore[override]  # further arguments, one return type instead of two overloads
        self,
        x_BCHW: Tensor,
        t_BG: Tensor,
        y_B: Tensor,
        condition_BCHW: Tensor | None = None,
        level_B: Tensor | None = None,
        *,
        with_alignment: bool = False,
        route: Route | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity at x_BCHW of any side in `resolutions`; other arguments as of `LightningDiT.forward`.

        condition_BCHW: the lower result at the side of x; None where there is none, which counts as zeros at level 1.
        level_B: share of noise in the condition, in [0, 1]; None is 0.
        Raises ValueError when shapes do not fit.
        """
        side = x_BCHW.shape[-1]
        if side not in self.resolutions:
            raise ValueError(f"expected x of a side in {self.resolutions}, found shape {tuple(x_BCHW.shape)}")
        if condition_BCHW is not None and condition_BCHW.shape != x_BCHW.shape:
            raise ValueError(
                f"expected a condition of the shape of x {tuple(x_BCHW.shape)}, found {tuple(condition_BCHW.shape)}"
            )
        t_BG = self._checked_times(x_BCHW, t_BG, side)
        # Every part is used at every resolution, so that all workers have gradients for the same weights.
        if level_B is None:
            level_B = t_BG.new_full((len(x_BCHW),), 1.0 if condition_BCHW is None else 0.0)
        condition = torch.zeros_like(x_BCHW) if condition_BCHW is None else condition_BCHW
        index = self.resolutions.index(side)
        x_BND = self.x_embedder(x_BCHW) + self.condition_embedder(condition.to(x_BCHW.dtype)) + self._positions(index)
        resolution_B = torch.full((len(x_BCHW),), index, device=x_BCHW.device)
        c_BD = self._condition(t_BG, y_B) + self.resolution_embedder(resolution_B) + self.level_embedder(level_B)
        return self._through_blocks(x_BND, c_BD, self._rope(index), with_alignment, route)

    def _positions(self, index: int) -> Tensor:
        if index == len(self.resolutions) - 1:
            return self.pos_embed
        return self.get_buffer(f"coarse_positions_{index}")

    def _rope(self, index: int) -> nn.Module | None:
        if self.feat_rope is None or index == len(self.resolutions) - 1:
            return self.feat_rope
        return self.coarse_rope[index]
