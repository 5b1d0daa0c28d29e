"""The objective on held-out images while training goes on.

Noise, times and dropped labels of a held-out image are those of image numbers that training never reaches, so the
score is of the same draws every time, and looking changes nothing in training.
"""

from __future__ import annotations

from dataclasses import replace

import torch
import torch.distributed as dist
from torch import Tensor

from tasks.loading.loader import Loader
from tasks.training.trainee import HELD_OUT_NUMBERS, Trainee, pieces


class Validation:
    """Scores a network on the first `images` held-out images, rounded up to whole batches; each worker on its share.

    micro: images of a worker at once.
    """

    def __init__(self, images: int, loader: Loader, micro: int, device: torch.device) -> None:
        self._images, self._loader, self._micro, self._device = images, loader, micro, device

    @torch.no_grad()
    def __call__(self, trainee: Trainee) -> dict[str, float]:
        """Means of the objective's terms over the held-out images, `total` among them, the same in all workers."""
        world = dist.get_world_size()
        stream = self._loader.stream(0, dist.get_rank(), world)
        sums: dict[str, Tensor] = {}
        count = 0
        trainee.module.eval()
        try:
            for _ in range(-(-self._images // self._loader.batch)):
                for piece in pieces(next(stream), self._micro):
                    numbered = replace(piece, positions=piece.positions + HELD_OUT_NUMBERS)
                    terms = trainee.module(**trainee.inputs(numbered, self._device))
                    for name, value in terms.items():
                        if value.ndim == 0:
                            sums[name] = value.double() + sums.get(name, 0.0)
                    count += 1
        finally:
            stream.close()
            trainee.module.train()
        means = torch.stack(list(sums.values())) / (count * world)
        dist.all_reduce(means)
        return dict(zip(sums, means.tolist(), strict=True))
