"""The PatchGAN that a tokenizer is trained against. Source: papers.md 1.2; tensor names as published."""

from __future__ import annotations

from math import gcd
from typing import Literal

from torch import Tensor, nn
from torch.func import functional_call

from models.tokenizer_losses import hinge_discriminator

_MOST_WIDTHS = 8
_NORM_GROUPS = 32


class PatchDiscriminator(nn.Module):
    """Images (B, C, H, W) to one logit per overlapping patch, (B, 1, h, w); the defaults are the published one.

    layers: halvings of the side; sides must be at least 3 * 2 ** layers pixels.
    norm: `batch` as published: means and deviations of the batch at hand, in evaluation too, because nothing ever
        asks for running ones; so logits depend on how a global batch is cut. `group` judges every image by itself.
    Weights begin at N(0, 0.02), norms at N(1, 0.02), drawn from torch's global generator.
    """

    def __init__(
        self, *, in_channels: int = 3, width: int = 64, layers: int = 3, norm: Literal["batch", "group"] = "batch"
    ) -> None:
        super().__init__()
        widths = [width * min(2**level, _MOST_WIDTHS) for level in range(layers + 1)]
        parts: list[nn.Module] = [nn.Conv2d(in_channels, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for level in range(1, layers + 1):
            stride = 2 if level < layers else 1
            parts += [
                nn.Conv2d(widths[level - 1], widths[level], 4, stride=stride, padding=1, bias=False),
                _norm(norm, widths[level]),
                nn.LeakyReLU(0.2),
            ]
        parts.append(nn.Conv2d(widths[-1], 1, 4, padding=1))
        self.main = nn.Sequential(*parts)
        for module in self.main:
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, 0.0, 0.02)
            elif isinstance(module, (nn.BatchNorm2d, nn.GroupNorm)):
                nn.init.normal_(module.weight, 1.0, 0.02)

    def forward(self, images_BCHW: Tensor) -> Tensor:
        return self.main(images_BCHW)

    def frozen(self, images_BCHW: Tensor) -> Tensor:
        """The same logits, with gradients to the images only: what the network trained against it sees."""
        tensors = {name: value.detach() for name, value in self.named_parameters()}
        return functional_call(self, tensors, (images_BCHW,))


class TrainableDiscriminator(nn.Module):
    """A discriminator with its objective as one module for a training engine; `.model` is the network."""

    def __init__(self, model: PatchDiscriminator) -> None:
        super().__init__()
        self.model = model

    def forward(self, real_BCHW: Tensor, fake_BCHW: Tensor) -> dict[str, Tensor]:
        """{"total", "logit_real", "logit_fake"}: the hinge loss and the mean logits (detached). The images' gradients
        are nobody's business: give them detached.
        """
        real, fake = self.model(real_BCHW), self.model(fake_BCHW)
        return {
            "total": hinge_discriminator(real.float(), fake.float()),
            "logit_real": real.detach().float().mean(),
            "logit_fake": fake.detach().float().mean(),
        }


def _norm(kind: Literal["batch", "group"], channels: int) -> nn.Module:
    if kind == "batch":
        return nn.BatchNorm2d(channels, track_running_stats=False)
    return nn.GroupNorm(gcd(_NORM_GROUPS, channels), channels)
