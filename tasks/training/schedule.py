"""The learning rate as a function of images seen."""

from __future__ import annotations

import math

from configs.training import Training


def learning_rate(section: Training, images_seen: int) -> float:
    """Rate for the step that begins after `images_seen` images.

    Linear warm-up over `warmup_images`, then constant; with `schedule: cosine` the last `decay_share` of all images
    decays along half a cosine to `final_lr_share` of the rate.
    """
    rate = section.learning_rate
    if images_seen < section.warmup_images:
        return rate * (images_seen + section.batch) / (section.warmup_images + section.batch)
    if section.schedule == "constant":
        return rate
    decay = max(1.0, section.images * section.decay_share)
    progress = min(1.0, max(0.0, (images_seen - (section.images - decay)) / decay))
    share = section.final_lr_share
    return rate * (share + (1 - share) * 0.5 * (1 + math.cos(math.pi * progress)))
