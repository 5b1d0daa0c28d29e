"""A cascade's resolutions (LowDiff) as training sees them: batches of one resolution each."""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from configs.diffusion import Cascade as CascadeSection
from infra.artifacts import Artifact
from models.cascade import Cascade, no_condition
from tasks.data.statistics import LatentStatistics
from tasks.randomness import ImageNumbers


class Resolutions:
    """What training sees of stored latents at each resolution of a cascade.

    latents: an `encode` artifact, whose facts hold the statistics of every resolution.
    whole: what full resolution is standardised by instead of the latents' own.
    Raises UserError where they are missing.
    """

    def __init__(
        self, section: CascadeSection, latents: Artifact, seed: int, whole: LatentStatistics | None = None
    ) -> None:
        self.section = section
        self.cascade = Cascade(section.sides, section.upsample)
        facts = latents.manifest.facts
        coarse = {side: LatentStatistics.of_averages(facts, side, latents.uri) for side in section.sides[:-1]}
        self.statistics = {**coarse, section.sides[-1]: whole or LatentStatistics.from_facts(facts, latents.uri)}
        self._choices = ImageNumbers(seed, "resolution")
        self._levels = ImageNumbers(seed, "condition level")
        self._noise = ImageNumbers(seed, "condition noise")
        self._drops = ImageNumbers(seed, "condition dropout")

    @property
    def facts(self) -> dict[str, object]:
        """For checkpoints: which statistics the coarser resolutions were trained on."""
        return {"averages": {str(side): self.statistics[side].hash for side in self.cascade.sides[:-1]}}

    def side(self, images_seen: int) -> int:
        """The resolution of the global batch that ends at this cursor, alike for every worker and after a restart."""
        drawn = float(self._choices.uniform(np.array([images_seen])))
        reached = np.cumsum(self.section.shares)
        return self.cascade.sides[min(int(np.searchsorted(reached, drawn)), len(reached) - 1)]

    def weight(self, side: int) -> float:
        """Of the loss at a resolution."""
        return self.section.weights[self.cascade.sides.index(side)] if self.section.weights else 1.0

    def target(self, stored_BCHW: Tensor, side: int) -> Tensor:
        """Stored latents averaged to a resolution and standardised by its own statistics, float32."""
        return self.statistics[side].normalise(self.cascade.lowered(stored_BCHW.float(), side))

    def condition(self, stored_BCHW: Tensor, positions: np.ndarray, side: int) -> tuple[Tensor, Tensor]:
        """What a resolution is given of the one below, (B, C, side, side), and its level (B,); each image's own share
        of noise, and nothing at all where it is dropped or there is none below.
        """
        below = self.cascade.below(side)
        if below is None:
            return no_condition(stored_BCHW.new_zeros((*stored_BCHW.shape[:2], side, side), dtype=torch.float32))
        lower = self.target(stored_BCHW, below)
        level = (self.section.augment * self._levels.uniform(positions)).to(lower.device)
        noise = self._noise.normal(positions, lower.shape[1:]).to(lower.device)
        given = self.cascade.condition(lower, noise, level, side)
        dropped = (self._drops.uniform(positions) < self.section.condition_dropout).to(lower.device)
        return given.masked_fill(dropped.view(-1, 1, 1, 1), 0.0), level.masked_fill(dropped, 1.0)
