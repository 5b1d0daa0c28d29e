"""Building blocks of LightningDiT: norms, embeddings, rotary positions, feed-forward."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

MAX_PERIOD = 10000.0


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis: computed in float32, cast back, then scaled by a learnt
    weight (papers.md 1.4).
    """

    def __init__(self, dim: int, eps: float = 1e-6) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        x32 = x.float()
        normed = x32 * torch.rsqrt(x32.square().mean(dim=-1, keepdim=True) + self.eps)
        return normed.to(x.dtype) * self.weight


class PatchEmbed(nn.Module):
    """x_BCHW -> tokens_BND by a convolution whose kernel and stride are the patch size."""

    def __init__(self, in_channels: int, dim: int, patch_size: int, *, bias: bool = True) -> None:
        super().__init__()
        self.proj = nn.Conv2d(in_channels, dim, kernel_size=patch_size, stride=patch_size, bias=bias)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        # Contiguous, because a strided token axis would make every linear layer a slow batched product.
        return self.proj(x_BCHW).flatten(2).transpose(1, 2).contiguous()


class TimeEmbedder(nn.Module):
    """t_B in [0, 1], not rescaled by 1000, -> (B, D): sinusoid of 256 features, cosines first, then an MLP."""

    def __init__(self, dim: int, frequencies: int = 256) -> None:
        super().__init__()
        self.frequencies = frequencies
        self.mlp = nn.Sequential(nn.Linear(frequencies, dim), nn.SiLU(), nn.Linear(dim, dim))

    def forward(self, t_B: Tensor) -> Tensor:
        half = self.frequencies // 2
        exponents = torch.arange(half, device=t_B.device, dtype=torch.float32) / half
        angles = t_B.float()[:, None] * (MAX_PERIOD**-exponents)
        sinusoid = torch.cat([angles.cos(), angles.sin()], dim=-1)
        return self.mlp(sinusoid.to(next(self.mlp.parameters()).dtype))


class LabelEmbedder(nn.Module):
    """y_B -> (B, D). Row `num_classes` stands for "no label"."""

    def __init__(self, num_classes: int, dim: int) -> None:
        super().__init__()
        self.embedding_table = nn.Embedding(num_classes + 1, dim)

    def forward(self, y_B: Tensor) -> Tensor:
        return self.embedding_table(y_B)


class SwiGLU(nn.Module):
    """silu(first half) * second half of one projection, then back to D; both with bias."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.w12 = nn.Linear(dim, 2 * hidden)
        self.w3 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        gate, value = self.w12(x).chunk(2, dim=-1)
        return self.w3(F.silu(gate) * value)


class GeluMlp(nn.Module):
    """The feed-forward of plain DiT: tanh-approximated GELU between two linears."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(F.gelu(self.fc1(x), approximate="tanh"))


class RotaryTable(nn.Module):
    """Cosines and sines of the 2D rotary embedding, (N, head_dim), rows first, then columns (papers.md 1.4).

    finest: side of the grid whose cells count the positions, see `cell_centres`.
    persistent: whether the buffers are part of checkpoints, as they are of the published ones.
    Raises ValueError when head_dim is not a multiple of 4 (two axes of pairs).
    """

    freqs_cos: Tensor
    freqs_sin: Tensor

    def __init__(self, head_dim: int, grid: int, *, finest: int | None = None, persistent: bool = True) -> None:
        super().__init__()
        if head_dim % 4:
            raise ValueError(f"rotary positions need hidden_size / num_heads to be a multiple of 4, found {head_dim}")
        axis_dim = head_dim // 2
        exponents = torch.arange(0, axis_dim, 2, dtype=torch.float32) / axis_dim
        angles = cell_centres(grid, finest).float()[:, None] * (1.0 / MAX_PERIOD**exponents)
        angles = angles.repeat_interleave(2, dim=1)
        rows = angles[:, None, :].expand(grid, grid, axis_dim)
        columns = angles[None, :, :].expand(grid, grid, axis_dim)
        table = torch.cat([rows, columns], dim=-1).reshape(grid * grid, head_dim)
        self.register_buffer("freqs_cos", table.cos(), persistent=persistent)
        self.register_buffer("freqs_sin", table.sin(), persistent=persistent)

    def forward(self, x_BKNI: Tensor, tokens_BN: Tensor | None = None) -> Tensor:
        """Turn neighbouring pairs (a, b) by the angle of their token, dtype kept.

        tokens_BN: which of the grid's tokens they are; None are all of them.
        """
        cosines, sines = self.freqs_cos, self.freqs_sin
        if tokens_BN is not None:
            cosines, sines = cosines[tokens_BN].unsqueeze(1), sines[tokens_BN].unsqueeze(1)
        pairs = x_BKNI.unflatten(-1, (-1, 2))
        if x_BKNI.dtype == torch.float32 and not torch.compiler.is_compiling():
            # One product of complex numbers for six passes over memory; what is compiled is one pass as it is.
            turn = torch.complex(cosines[..., ::2], sines[..., ::2])
            return torch.view_as_real(torch.view_as_complex(pairs) * turn).flatten(-2)
        first, second = pairs.unbind(-1)
        turned = torch.stack([-second, first], dim=-1).flatten(-2)
        return (x_BKNI * cosines + turned * sines).to(x_BKNI.dtype)


def cell_centres(grid: int, finest: int | None = None) -> Tensor:
    """Centres of a grid's cells along an axis, float64 (grid,), counted in cells of a grid of side `finest` over the
    same image: 0, 1, 2 … on that grid itself (or where it is None), 0.5, 2.5 … on one of half its side.
    """
    scale = (finest or grid) / grid
    return (torch.arange(grid, dtype=torch.float64) + 0.5) * scale - 0.5


def sincos_positions(dim: int, grid: int, *, finest: int | None = None) -> Tensor:
    """The fixed 2D sine-cosine table of DiT, (1, grid * grid, dim), float32: columns fill the first half of
    the features, rows the second, each as sines then cosines, temperature 10000.
    finest: as for `cell_centres`.
    Raises ValueError when dim is not a multiple of 4.
    """
    if dim % 4:
        raise ValueError(f"hidden_size must be a multiple of 4 for 2D positions, found {dim}")
    omega = 1.0 / MAX_PERIOD ** (torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    angles = cell_centres(grid, finest)[:, None] * omega
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)
    columns = axis[None, :, :].expand(grid, grid, dim // 2)
    rows = axis[:, None, :].expand(grid, grid, dim // 2)
    return torch.cat([columns, rows], dim=-1).reshape(1, grid * grid, dim).float()
