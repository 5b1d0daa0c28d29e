"""`python -m tests.helpers.run_stage ROOT`: stage `train_dit` on random latents, in a Ray of its own."""

from __future__ import annotations

import sys

from configs import Recipe
from infra.cluster import disconnect
from tasks.train_dit import STAGE
from tests.helpers.builders import context, small_recipe


def recipe(*overrides: str) -> Recipe:
    return small_recipe(
        "train_dit.images=1920", "compute.train.checkpoint_every=320", "compute.train.log_every=32", *overrides
    )


if __name__ == "__main__":
    try:
        STAGE.run(context(sys.argv[1], recipe(), STAGE, "encode"))
    finally:
        disconnect()
