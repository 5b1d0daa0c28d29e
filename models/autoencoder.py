"""The convolutional KL autoencoder behind VA-VAE, its plain twin and smaller ones. Source: papers.md 1.1.

Tensor names are the published ones (the LDM family's), so the authors' checkpoints load strictly.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

from models.image_autoencoder import ImageAutoencoder, certain
from models.posterior import DiagonalGaussian

NORM_EPS = 1e-6


class ResBlock(nn.Module):
    """norm, silu, conv, norm, silu, dropout, conv, plus a skip (1x1 only where the channels change)."""

    def __init__(self, in_channels: int, out_channels: int, norm_groups: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.GroupNorm(norm_groups, in_channels, eps=NORM_EPS)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.norm2 = nn.GroupNorm(norm_groups, out_channels, eps=NORM_EPS)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(F.silu(self.norm1(x)))
        return self.nin_shortcut(x) + self.conv2(self.dropout(F.silu(self.norm2(h))))


class AttnBlock(nn.Module):
    """Single-head self-attention over cells with a residual."""

    def __init__(self, channels: int, norm_groups: int) -> None:
        super().__init__()
        self.norm = nn.GroupNorm(norm_groups, channels, eps=NORM_EPS)
        self.q = nn.Conv2d(channels, channels, 1)
        self.k = nn.Conv2d(channels, channels, 1)
        self.v = nn.Conv2d(channels, channels, 1)
        self.proj_out = nn.Conv2d(channels, channels, 1)

    def forward(self, x_BCHW: Tensor) -> Tensor:
        h = self.norm(x_BCHW)
        q, k, v = (part(h).flatten(2).transpose(1, 2) for part in (self.q, self.k, self.v))
        attended = F.scaled_dot_product_attention(q, k, v)
        return x_BCHW + self.proj_out(attended.transpose(1, 2).unflatten(-1, x_BCHW.shape[-2:]))


class Downsample(nn.Module):
    """Halve the side: pad one row below and one column right, then a 3x3 stride-2 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Double the side by repetition, then a 3x3 convolution."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The blocks of one resolution: residual blocks, each followed by attention where asked, then a resize."""

    def __init__(
        self,
        in_channels: int,
        channels: int,
        *,
        blocks: int,
        attention: bool,
        norm_groups: int,
        dropout: float,
        resize: tuple[str, nn.Module] | None,
    ) -> None:
        super().__init__()
        self.block = nn.ModuleList(
            ResBlock(in_channels if i == 0 else channels, channels, norm_groups, dropout) for i in range(blocks)
        )
        self.attn = nn.ModuleList(AttnBlock(channels, norm_groups) for _ in range(blocks if attention else 0))
        self._resize = resize[0] if resize else None
        if resize:
            self.add_module(*resize)

    def forward(self, x: Tensor) -> Tensor:
        for i, block in enumerate(self.block):
            x = block(x)
            if len(self.attn):
                x = self.attn[i](x)
        return x if self._resize is None else self.get_submodule(self._resize)(x)


class Middle(nn.Module):
    """Residual, attention, residual at the lowest resolution."""

    def __init__(self, channels: int, norm_groups: int, dropout: float) -> None:
        super().__init__()
        self.block_1 = ResBlock(channels, channels, norm_groups, dropout)
        self.attn_1 = AttnBlock(channels, norm_groups)
        self.block_2 = ResBlock(channels, channels, norm_groups, dropout)

    def forward(self, x: Tensor) -> Tensor:
        return self.block_2(self.attn_1(self.block_1(x)))


class Encoder(nn.Module):
    """Images (B, in, H, W) to moments before the quantisation convolution (B, 2 z, H / f, W / f)."""

    def __init__(
        self,
        in_channels: int,
        widths: tuple[int, ...],
        blocks: int,
        z_channels: int,
        attention_levels: tuple[int, ...],
        norm_groups: int,
        dropout: float,
        base_channels: int,
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(in_channels, base_channels, 3, padding=1)
        self.down = nn.ModuleList(
            Level(
                widths[i - 1] if i else base_channels,
                width,
                blocks=blocks,
                attention=i in attention_levels,
                norm_groups=norm_groups,
                dropout=dropout,
                resize=("downsample", Downsample(width)) if i != last else None,
            )
            for i, width in enumerate(widths)
        )
        self.mid = Middle(widths[-1], norm_groups, dropout)
        self.norm_out = nn.GroupNorm(norm_groups, widths[-1], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[-1], 2 * z_channels, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv_out(self.trunk(x))

    def trunk(self, x: Tensor) -> Tensor:
        """All but the last convolution, whose weight's gradients are asked for on their own (papers.md 1.2)."""
        h = self.conv_in(x)
        for level in self.down:
            h = level(h)
        return F.silu(self.norm_out(self.mid(h)))


class Decoder(nn.Module):
    """Latents (B, z, H / f, W / f) to images (B, out, H, W); no final squashing."""

    def __init__(
        self,
        out_channels: int,
        widths: tuple[int, ...],
        blocks: int,
        z_channels: int,
        attention_levels: tuple[int, ...],
        norm_groups: int,
        dropout: float,
    ) -> None:
        super().__init__()
        last = len(widths) - 1
        self.conv_in = nn.Conv2d(z_channels, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], norm_groups, dropout)
        # Level 0 is full resolution, as in the published names; the pass runs from the last level to 0.
        self.up = nn.ModuleList(
            Level(
                widths[min(i + 1, last)],
                width,
                blocks=blocks + 1,
                attention=i in attention_levels,
                norm_groups=norm_groups,
                dropout=dropout,
                resize=("upsample", Upsample(width)) if i else None,
            )
            for i, width in enumerate(widths)
        )
        self.norm_out = nn.GroupNorm(norm_groups, widths[0], eps=NORM_EPS)
        self.conv_out = nn.Conv2d(widths[0], out_channels, 3, padding=1)

    def forward(self, z: Tensor) -> Tensor:
        return self.conv_out(self.trunk(z))

    def trunk(self, z: Tensor) -> Tensor:
        """All but the last convolution, as the encoder's."""
        h = self.mid(self.conv_in(z))
        for level in reversed(self.up):
            h = level(h)
        return F.silu(self.norm_out(h))


class AutoencoderKL(ImageAutoencoder):
    """Images in [-1, 1] to a latent posterior and back; the defaults are the published f16d32 tokenizer.

    channel_multipliers: width of each level over base_channels; one level fewer halvings than entries.
    attention_levels: levels with attention after each block (0 = full resolution).
    decoder_attention: False leaves attention out of the decoder's levels (the MAR flavour keeps its middle).
    patch_size: pixels of a square's side that are channels of one cell of level 0 (pixel shuffle, Shi et al. 2016), so
        that no convolution runs at full resolution.
    linear_path: add what one linear map makes of each cell's pixels to the moments, and what another makes of its
        latent to the image, so that the networks learn what principal components would leave over. After the residual
        autoencoding of DC-AE (Chen et al. 2024, arXiv 2410.10733), whose shortcuts are fixed and at every level; one
        learned path across all levels is our choice.
    Raises ValueError when a width is not a multiple of norm_groups or a level does not exist.
    """

    def __init__(
        self,
        *,
        in_channels: int = 3,
        out_channels: int = 3,
        base_channels: int = 128,
        channel_multipliers: tuple[int, ...] = (1, 1, 2, 2, 4),
        blocks_per_level: int = 2,
        z_channels: int = 32,
        embed_dim: int | None = None,
        attention_levels: tuple[int, ...] = (4,),
        decoder_attention: bool = True,
        norm_groups: int = 32,
        dropout: float = 0.0,
        patch_size: int = 1,
        linear_path: bool = False,
    ) -> None:
        super().__init__()
        widths = tuple(base_channels * multiplier for multiplier in channel_multipliers)
        if any(width % norm_groups for width in (base_channels, *widths)):
            raise ValueError(
                f"every width must be a multiple of norm_groups={norm_groups}, found base_channels="
                f"{base_channels} with channel_multipliers={tuple(channel_multipliers)}"
            )
        if any(level not in range(len(widths)) for level in attention_levels):
            raise ValueError(
                f"attention_levels must lie in 0..{len(widths) - 1} (channel_multipliers has "
                f"{len(widths)} entries), found {tuple(attention_levels)}"
            )
        self.embed_dim = embed_dim or z_channels
        self.patch_size, pixels = patch_size, patch_size**2
        self.downscale = patch_size * 2 ** (len(widths) - 1)
        attention = tuple(attention_levels)
        self.encoder = Encoder(
            in_channels * pixels, widths, blocks_per_level, z_channels, attention, norm_groups, dropout, base_channels
        )
        self.decoder = Decoder(
            out_channels * pixels,
            widths,
            blocks_per_level,
            z_channels,
            attention if decoder_attention else (),
            norm_groups,
            dropout,
        )
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * self.embed_dim, 1)
        self.post_quant_conv = nn.Conv2d(self.embed_dim, z_channels, 1)
        self.encoder_path: nn.Conv2d | None = None
        self.decoder_path: nn.ConvTranspose2d | None = None
        if linear_path:
            cell = self.downscale
            self.encoder_path = nn.Conv2d(in_channels, 2 * self.embed_dim, cell, stride=cell)
            self.decoder_path = nn.ConvTranspose2d(self.embed_dim, out_channels, cell, stride=cell)

    def encode(self, x_BCHW: Tensor) -> DiagonalGaussian:
        """Posterior over (B, embed_dim, H / downscale, W / downscale) of images in [-1, 1].
        Raises ValueError when a side is not a multiple of the downscale factor.
        """
        if any(side % self.downscale for side in x_BCHW.shape[-2:]):
            raise ValueError(f"image sides must be multiples of {self.downscale}, found {tuple(x_BCHW.shape[-2:])}")
        cells = F.pixel_unshuffle(x_BCHW, self.patch_size) if self.patch_size > 1 else x_BCHW
        moments = self.quant_conv(self.encoder(cells))
        return DiagonalGaussian(moments if self.encoder_path is None else moments + self.encoder_path(x_BCHW))

    def decode(self, z_BCHW: Tensor) -> Tensor:
        """Images, nominally in [-1, 1] and not clamped, from latents in the encoder's own scale."""
        cells = self.decoder(self.post_quant_conv(z_BCHW))
        image = F.pixel_shuffle(cells, self.patch_size) if self.patch_size > 1 else cells
        return image if self.decoder_path is None else image + self.decoder_path(z_BCHW)

    @property
    def decoding(self) -> list[nn.Parameter]:
        parts = [self.post_quant_conv, self.decoder, self.decoder_path]
        return [parameter for part in parts if part is not None for parameter in part.parameters()]

    @property
    def last_encoder_weight(self) -> Tensor:
        return self.encoder.conv_out.weight

    @property
    def last_decoder_weight(self) -> Tensor:
        return self.decoder.conv_out.weight


class Identity(AutoencoderKL):
    """No network: a posterior as sharp as it can be around the pixels, which are the latents (our choice, so that
    diffusion in pixel space is diffusion in a latent space like any other).
    """

    def __init__(self) -> None:
        nn.Module.__init__(self)
        self.downscale = 1

    def encode(self, x_BCHW: Tensor) -> DiagonalGaussian:
        return certain(x_BCHW)

    def decode(self, z_BCHW: Tensor) -> Tensor:
        return z_BCHW
