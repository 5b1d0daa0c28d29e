"""The benchmark of cascades: every way it samples is a recipe, and its rival is trained for no less."""

from __future__ import annotations

import pytest

from benchmarks.lowdiff import LATENTS, PIXELS, Ground, rival_of
from tasks.training.flops import flops_per_image

GROUNDS = pytest.mark.parametrize("ground", [LATENTS, PIXELS], ids=["latents", "pixels"])


@GROUNDS
def test_every_way_samples_the_network_that_was_trained(ground: Ground) -> None:
    trained, rival = ground.load(), rival_of(ground, ground.load(), 0)
    for stages in [*ground.ways.values(), *ground.multistep.values()]:
        assert ground.load(f"sample.stages={stages}").train_dit == trained.train_dit
    for stages in ground.rivals.values():
        own = ground.load(ground.apart, f"sample.stages={stages}")
        assert own.train_dit.cascade == rival.train_dit.cascade
        assert own.train_dit.model == trained.train_dit.model


@GROUNDS
def test_the_rival_sees_fewer_images_for_no_fewer_flops(ground: Ground) -> None:
    cascade, rival = ground.load("train_dit.images=6400"), rival_of(ground, ground.load("train_dit.images=6400"), 1)
    spent = [(flops_per_image(each, "train_dit") or 0.0) * each.train_dit.images for each in (cascade, rival)]
    assert 0 < spent[0] <= spent[1] < 1.05 * spent[0]
    assert rival.train_dit.images < cascade.train_dit.images
    assert rival.train_dit.seed == 1
