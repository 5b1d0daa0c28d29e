"""Semantic VAE: foundation features to a few semantic channels and back, token by token. Source: papers.md 2.2."""

from __future__ import annotations

from torch import Tensor, nn

from models.posterior import DiagonalGaussian


class TransformerBlock(nn.Module):
    """Pre-norm self-attention and GELU feed-forward, without positions."""

    def __init__(self, width: int, num_heads: int) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, num_heads, batch_first=True)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x_BND: Tensor) -> Tensor:
        h = self.norm1(x_BND)
        x_BND = x_BND + self.attn(h, h, h, need_weights=False)[0]
        return x_BND + self.mlp(self.norm2(x_BND))


def _stack(in_dim: int, width: int, out_dim: int, depth: int, num_heads: int) -> nn.Sequential:
    blocks = [TransformerBlock(width, num_heads) for _ in range(depth)]
    return nn.Sequential(nn.Linear(in_dim, width), *blocks, nn.LayerNorm(width), nn.Linear(width, out_dim))


class SemanticVAE(nn.Module):
    """Compress feature grids (B, feature_dim, h, w) to (B, bottleneck, h, w). Any grid size, no positions.
    Raises ValueError when width is not a multiple of num_heads.
    """

    def __init__(
        self,
        *,
        feature_dim: int = 768,
        width: int = 768,
        depth: int = 4,
        num_heads: int = 6,
        bottleneck: int = 16,
    ) -> None:
        super().__init__()
        if width % num_heads:
            raise ValueError(f"width must be a multiple of num_heads={num_heads}, found {width}")
        self.feature_dim, self.bottleneck = feature_dim, bottleneck
        self.encoder = _stack(feature_dim, width, 2 * bottleneck, depth, num_heads)
        self.decoder = _stack(bottleneck, width, feature_dim, depth, num_heads)

    def encode(self, features_BChw: Tensor) -> DiagonalGaussian:
        """Posterior over (B, bottleneck, h, w). Raises ValueError on another number of features."""
        if features_BChw.shape[1] != self.feature_dim:
            raise ValueError(
                f"expected features of shape (B, {self.feature_dim}, h, w), found {tuple(features_BChw.shape)}"
            )
        return DiagonalGaussian(_over_tokens(self.encoder, features_BChw))

    def decode(self, s_Bchw: Tensor) -> Tensor:
        """Features (B, feature_dim, h, w) from semantic latents in the encoder's own scale."""
        return _over_tokens(self.decoder, s_Bchw)

    def forward(self, features_BChw: Tensor, noise: Tensor | None = None) -> tuple[Tensor, DiagonalGaussian, Tensor]:
        """(reconstruction, posterior, latent); the latent is the posterior mean when no noise is given."""
        posterior = self.encode(features_BChw)
        s = posterior.mean if noise is None else posterior.sample(noise)
        return self.decode(s), posterior, s


def _over_tokens(stack: nn.Sequential, x_BChw: Tensor) -> Tensor:
    tokens_BND = stack(x_BChw.flatten(2).transpose(1, 2))
    return tokens_BND.transpose(1, 2).unflatten(-1, x_BChw.shape[-2:])
