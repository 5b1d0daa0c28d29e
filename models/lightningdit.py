"""LightningDiT, with one clock (LightningDiT) or one clock per channel group (SFD). Source: papers.md 1.4, 2.4.

The backbone sees (x, t, y) and nothing else: guidance, clocks, losses and random label dropout live outside,
and compile, precision and activation checkpointing are applied from outside (see models/execution.py).
Tensor names are the published ones, so the authors' checkpoints load strictly.
"""

from __future__ import annotations

import math
from typing import Any, Literal, overload

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from models.groups import ChannelGroups, single_group
from models.layers import (
    GeluMlp,
    LabelEmbedder,
    PatchEmbed,
    RMSNorm,
    RotaryTable,
    SwiGLU,
    TimeEmbedder,
    sincos_positions,
)
from models.routing import Route


def _norm(dim: int, rmsnorm: bool) -> nn.Module:
    return RMSNorm(dim) if rmsnorm else nn.LayerNorm(dim, elementwise_affine=False, eps=1e-6)


def _of_tokens(modulation: Tensor) -> Tensor:
    return modulation if modulation.dim() == 3 else modulation.unsqueeze(1)


class Attention(nn.Module):
    """Self-attention over tokens, with optional per-head norm of queries and keys, then rotary positions."""

    def __init__(self, dim: int, num_heads: int, qk_norm: bool, rmsnorm: bool) -> None:
        super().__init__()
        self.num_heads, self.returns_values = num_heads, False
        head_dim = dim // num_heads
        head_norm = RMSNorm if rmsnorm else nn.LayerNorm
        self.qkv = nn.Linear(dim, 3 * dim)
        self.q_norm = head_norm(head_dim) if qk_norm else nn.Identity()
        self.k_norm = head_norm(head_dim) if qk_norm else nn.Identity()
        self.proj = nn.Linear(dim, dim)

    def forward(
        self,
        x_BND: Tensor,
        rope: nn.Module | None,
        tokens_BN: Tensor | None = None,
        first_BKNI: Tensor | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """(B, N, D) and, where it `returns_values`, those that were looked at (B, K, N, I), of K heads of width I.

        first_BKNI: values of the first block, which are half of those that are looked at.
        """
        q, k, v = self.qkv(x_BND).unflatten(-1, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
        q, k = self.q_norm(q), self.k_norm(k)
        if rope is not None:
            q, k = rope(q, tokens_BN), rope(k, tokens_BN)
        if first_BKNI is not None:
            v = (v + first_BKNI) / 2
        # Norm weights and rotary tables are float32 under autocast; attention wants one dtype.
        attended = F.scaled_dot_product_attention(q.to(v.dtype), k.to(v.dtype), v)
        # Values that nobody asked for would keep queries and keys, which share their memory.
        return self.proj(attended.transpose(1, 2).flatten(2)), v if self.returns_values else None


class Block(nn.Module):
    """Pre-norm attention and feed-forward, each scaled, (shifted) and gated by the condition (adaLN-zero)."""

    def __init__(self, dim: int, num_heads: int, *, qk_norm: bool, swiglu: bool, rmsnorm: bool, shift: bool) -> None:
        super().__init__()
        self.shift = shift
        self.norm1 = _norm(dim, rmsnorm)
        self.attn = Attention(dim, num_heads, qk_norm, rmsnorm)
        self.norm2 = _norm(dim, rmsnorm)
        self.mlp = SwiGLU(dim, int(2 / 3 * 4 * dim)) if swiglu else GeluMlp(dim, 4 * dim)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, (6 if shift else 4) * dim))

    def forward(
        self,
        x_BND: Tensor,
        c_BD: Tensor,
        rope: nn.Module | None,
        tokens_BN: Tensor | None = None,
        first_BKNI: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """c_BD: the condition after its SiLU, which is the same for all blocks; (B, N, D) where tokens have their own.
        tokens_BN: which of the grid's tokens x_BND are; None are all of them.
        first_BKNI: values of the first block, for a value residual. A block whose attention
            `returns_values` gives them beside x.
        """
        modulation = _of_tokens(self.adaLN_modulation[1](c_BD))
        if self.shift:
            shift_a, scale_a, gate_a, shift_m, scale_m, gate_m = modulation.chunk(6, dim=-1)
            attn_in = self.norm1(x_BND) * (1 + scale_a) + shift_a
            attended, values = self.attn(attn_in, rope, tokens_BN, first_BKNI)
            x_BND = x_BND + gate_a * attended
            x_BND = x_BND + gate_m * self.mlp(self.norm2(x_BND) * (1 + scale_m) + shift_m)
        else:
            scale_a, gate_a, scale_m, gate_m = modulation.chunk(4, dim=-1)
            attended, values = self.attn(self.norm1(x_BND) * (1 + scale_a), rope, tokens_BN, first_BKNI)
            x_BND = x_BND + gate_a * attended
            x_BND = x_BND + gate_m * self.mlp(self.norm2(x_BND) * (1 + scale_m))
        return x_BND if values is None else (x_BND, values)


class FinalLayer(nn.Module):
    """Norm, scale and shift by the condition, projection to one patch per token."""

    def __init__(self, dim: int, out_features: int, rmsnorm: bool) -> None:
        super().__init__()
        self.norm_final = _norm(dim, rmsnorm)
        self.linear = nn.Linear(dim, out_features)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(dim, 2 * dim))

    def forward(self, x_BND: Tensor, c_BD: Tensor) -> Tensor:
        shift, scale = _of_tokens(self.adaLN_modulation[1](c_BD)).chunk(2, dim=-1)
        return self.linear(self.norm_final(x_BND) * (1 + scale) + shift)


class LightningDiT(nn.Module):
    """Velocity network on latents of side `input_size` (cells) and `in_channels` channels.

    groups: channel groups, one clock each; None (or one group) is the plain network with one `t_embedder`.
        With G > 1 groups, each has an embedder of width hidden_size / G under `t_embedder_<first 3 letters>`
        (`tex`, `sem`), concatenated last group first: the published order for SFD, our choice beyond.
    positions_of: side in tokens of the grid whose steps count positions, where the network goes on from one of that
        size: both tables are then that network's, resized (its grid spread over this one), and not read from files.
    shift: shift in the blocks' modulation (published switch `wo_shift` is its negation).
    learn_sigma: predict a second set of channels that the forward pass drops, as the original does.
    align_depth, align_dim: put a projection of width `align_hidden` to `align_dim` features on the tokens
        after block number `align_depth` (1 = first).
    value_residual: every block but the first looks at the mean of its own values and the first block's (Zhou et al.
        2024, arXiv 2410.17897, with their fixed halves, which add no weight).
    Raises ValueError, naming the argument, when sizes do not fit.
    """

    def __init__(
        self,
        *,
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
        learn_sigma: bool = False,
        align_depth: int | None = None,
        align_dim: int | None = None,
        align_hidden: int = 2048,
        value_residual: bool = False,
    ) -> None:
        super().__init__()
        groups = groups or single_group(in_channels)
        _check(input_size, patch_size, in_channels, hidden_size, depth, num_heads, groups)
        if (align_depth is None) != (align_dim is None):
            raise ValueError(
                f"align_depth and align_dim go together, found align_depth={align_depth}, "
                f"align_dim={align_dim}; give both or neither"
            )
        if align_depth is not None and not 1 <= align_depth <= depth:
            raise ValueError(f"align_depth must be between 1 and depth={depth}, found {align_depth}")

        self.input_size, self.patch_size, self.in_channels = input_size, patch_size, in_channels
        self.num_classes, self.groups, self.learn_sigma = num_classes, groups, learn_sigma
        self.align_depth, self.hidden_size = align_depth, hidden_size
        self.grid_size = input_size // patch_size
        out_channels = in_channels * (2 if learn_sigma else 1)

        self.x_embedder = PatchEmbed(in_channels, hidden_size, patch_size)
        self._embedder_names = embedder_names(groups)
        for name in self._embedder_names:
            self.add_module(name, TimeEmbedder(hidden_size // len(groups)))
        self.y_embedder = LabelEmbedder(num_classes, hidden_size)
        # A frozen parameter, as published: it counts among the parameters but is never trained.
        self.pos_embed = nn.Parameter(
            sincos_positions(hidden_size, self.grid_size, finest=positions_of), requires_grad=False
        )
        self.feat_rope = RotaryTable(hidden_size // num_heads, self.grid_size, finest=positions_of) if rope else None
        self.resized: tuple[str, ...] = () if positions_of in (None, self.grid_size) else ("pos_embed", "feat_rope.")
        self.blocks = nn.ModuleList(
            Block(hidden_size, num_heads, qk_norm=qk_norm, swiglu=swiglu, rmsnorm=rmsnorm, shift=shift)
            for _ in range(depth)
        )
        first: Any = self.blocks[0]
        first.attn.returns_values = self.value_residual = value_residual
        self.final_layer = FinalLayer(hidden_size, patch_size**2 * out_channels, rmsnorm)
        self.repa_projector = None
        if align_dim is not None:
            self.repa_projector = nn.Sequential(
                nn.Linear(hidden_size, align_hidden),
                nn.SiLU(),
                nn.Linear(align_hidden, align_hidden),
                nn.SiLU(),
                nn.Linear(align_hidden, align_dim),
            )
        self.reset_parameters()

    @property
    def null_label(self) -> int:
        """The label that means "no label"; a caller drops a label by writing this one."""
        return self.num_classes

    def reset_parameters(self) -> None:
        """Xavier linears, zero biases, N(0, 0.02) time and label embeddings, zero modulation and output, so
        that a fresh network predicts zero velocity (papers.md 1.4)."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        proj: Any = self.x_embedder.proj
        nn.init.xavier_uniform_(proj.weight.view(self.hidden_size, -1))
        nn.init.zeros_(proj.bias)
        nn.init.normal_(self.y_embedder.embedding_table.weight, std=0.02)
        for name in self._embedder_names:
            mlp: Any = self.get_submodule(f"{name}.mlp")
            nn.init.normal_(mlp[0].weight, std=0.02)
            nn.init.normal_(mlp[2].weight, std=0.02)
        blocks: list[Any] = list(self.blocks)
        final: Any = self.final_layer
        for zero in [*(block.adaLN_modulation[1] for block in blocks), final.adaLN_modulation[1], final.linear]:
            nn.init.zeros_(zero.weight)
            nn.init.zeros_(zero.bias)

    @overload
    def forward(
        self,
        x_BCHW: Tensor,
        t_BG: Tensor,
        y_B: Tensor,
        *,
        with_alignment: Literal[False] = False,
        route: Route | None = None,
    ) -> Tensor: ...

    @overload
    def forward(
        self,
        x_BCHW: Tensor,
        t_BG: Tensor,
        y_B: Tensor,
        *,
        with_alignment: Literal[True],
        route: Route | None = None,
    ) -> tuple[Tensor, Tensor]: ...

    def forward(
        self,
        x_BCHW: Tensor,
        t_BG: Tensor,
        y_B: Tensor,
        *,
        with_alignment: bool = False,
        route: Route | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Velocity (B, C, H, W) at x_BCHW, times t_BG in [0, 1] ((B,) when G = 1) and labels y_B (int64).

        with_alignment=True also returns the projection (B, align_dim, h, w). It is an argument, not the
        training mode, that decides; callers normally use `forward_with_alignment`.
        route: which tokens go through which blocks; None has all of them go through all.
        Raises ValueError when shapes do not fit or no alignment head was built.
        """
        t_BG = self._checked_times(x_BCHW, t_BG, self.input_size)
        x_BND = self.x_embedder(x_BCHW) + self.pos_embed
        c_BD = self._condition(t_BG, y_B)
        return self._through_blocks(x_BND, c_BD, self.feat_rope, with_alignment, route)

    def forward_with_alignment(
        self, x_BCHW: Tensor, t_BG: Tensor, y_B: Tensor, *, route: Route | None = None
    ) -> tuple[Tensor, Tensor]:
        """(velocity_BCHW, projection_BDhw). Goes through __call__, so hooks (ZeRO, compile) see it."""
        return self(x_BCHW, t_BG, y_B, with_alignment=True, route=route)

    def _through_blocks(
        self,
        x_BND: Tensor,
        c_BD: Tensor,
        rope: nn.Module | None,
        with_alignment: bool,
        route: Route | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """From embedded tokens and their condition to what `forward` gives, on the square grid of the tokens."""
        if with_alignment and self.repa_projector is None:
            raise ValueError("this LightningDiT has no alignment head; build it with align_depth and align_dim")
        if self.value_residual and route is not None and route.first == 1:
            raise ValueError("a value residual needs the first block's values of all tokens: route from block 2 on")
        grid = math.isqrt(x_BND.shape[1])
        # Once for all blocks; the modules named `adaLN_modulation` hold it for the published tensor names alone.
        c_BD = F.silu(c_BD)
        projection = around_BND = None
        first_BKNI: Tensor | None = None
        for number, block in enumerate(self.blocks, start=1):
            if route is not None and number == route.first:
                around_BND, x_BND = x_BND, route.taken(x_BND)
            values = first_BKNI
            if route is None or around_BND is None:
                x_BND = block(x_BND, c_BD, rope, None, values)
            else:
                values = None if values is None else route.values(values)
                x_BND = block(x_BND, c_BD, rope, route.kept_BK, values)
                if number == route.last:
                    x_BND, around_BND = route.returned(x_BND, around_BND), None
            if self.value_residual and number == 1:
                x_BND, first_BKNI = x_BND
            if with_alignment and number == self.align_depth and self.repa_projector is not None:
                projection = self.repa_projector(x_BND).transpose(1, 2).unflatten(-1, (grid, grid))
        velocity = self._unpatchify(self.final_layer(x_BND, c_BD), grid)
        if self.learn_sigma:
            velocity = velocity.chunk(2, dim=1)[0]
        return velocity if projection is None else (velocity, projection)

    def _checked_times(self, x_BCHW: Tensor, t_BG: Tensor, side: int) -> Tensor:
        expected = (self.in_channels, side, side)
        if tuple(x_BCHW.shape[1:]) != expected:
            raise ValueError(f"expected x of shape (B, {expected}), found {tuple(x_BCHW.shape)}")
        if t_BG.ndim == 1 and len(self.groups) == 1:
            t_BG = t_BG[:, None]
        if t_BG.shape != (x_BCHW.shape[0], len(self.groups)):
            raise ValueError(
                f"expected t of shape ({x_BCHW.shape[0]}, {len(self.groups)}): one time per image and "
                f"channel group {self.groups.names}, found {tuple(t_BG.shape)}"
            )
        return t_BG

    def _condition(self, t_BG: Tensor, y_B: Tensor) -> Tensor:
        reverse = range(len(self.groups) - 1, -1, -1)
        embedded = [
            self.get_submodule(name)(t_BG[:, group]) for name, group in zip(self._embedder_names, reverse, strict=True)
        ]
        return torch.cat(embedded, dim=-1) + self.y_embedder(y_B)

    def _unpatchify(self, x_BNF: Tensor, grid: int) -> Tensor:
        p = self.patch_size
        cells = x_BNF.unflatten(-1, (p, p, -1)).unflatten(1, (grid, grid))  # B, h, w, p, p, C
        return cells.permute(0, 5, 1, 3, 2, 4).flatten(4, 5).flatten(2, 3)


def embedder_names(groups: ChannelGroups) -> tuple[str, ...]:
    """Module names of the time embedders in the order of concatenation, last group first."""
    if len(groups) == 1:
        return ("t_embedder",)
    short = [name[:3] for name in reversed(groups.names)]
    if len(set(short)) != len(short):
        raise ValueError(f"channel group names must differ in their first three letters, found {groups.names}")
    return tuple(f"t_embedder_{name}" for name in short)


def parameter_count(model: nn.Module, *, trainable: bool = False) -> int:
    """Number of parameters; with trainable=True without the frozen position table (works on meta)."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad or not trainable)


def _check(
    input_size: int,
    patch_size: int,
    in_channels: int,
    hidden_size: int,
    depth: int,
    num_heads: int,
    groups: ChannelGroups,
) -> None:
    if input_size % patch_size:
        raise ValueError(f"input_size must be a multiple of patch_size={patch_size}, found {input_size}")
    if hidden_size % num_heads:
        raise ValueError(f"hidden_size must be a multiple of num_heads={num_heads}, found {hidden_size}")
    if hidden_size % len(groups):
        raise ValueError(f"hidden_size must be a multiple of the {len(groups)} groups, found {hidden_size}")
    if depth < 1:
        raise ValueError(f"depth must be at least 1, found {depth}")
    if groups.channels != in_channels:
        raise ValueError(f"in_channels must equal the channels of the groups ({groups.channels}), found {in_channels}")
