"""A model played with: the same pixels as its sample stage's, whoever looks on, and what is seen on the way."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from configs import UserError
from tasks.sample import STAGE
from tasks.sampling.playing import Moment, Player, Stopped, as_colours, drawn, for_picture, tokenizer_of
from tasks.sampling.sampler import Sampler
from tests.helpers import builders

RECIPE = builders.small_recipe()
CLASSES, ROWS, SEED = [7, 2, 5], 2, 3
SETTINGS = ["sample.steps=6", "sample.guidance.scale=3"]


@pytest.fixture(scope="module")
def player(tmp_path_factory: pytest.TempPathFactory) -> Player:
    root = builders.at(tmp_path_factory.mktemp("root"))
    builders.put_networks(root, RECIPE)
    builders.put(root, RECIPE, "encode", [], inputs={"train_vavae": "train_vavae"})
    model = builders.Artifact(root, "train_dit", "train_dit")
    builders.put(
        root, RECIPE, "train_dit", list(model.manifest.files), inputs={"encode": "encode"}, facts=model.manifest.facts
    )
    model = builders.Artifact(root, "train_dit", "train_dit")
    return Player(model, tokenizer_of(model))


def test_the_pixels_are_those_of_the_sample_stage(player: Player) -> None:
    ours = for_picture(RECIPE.sample, CLASSES, SEED, ROWS)
    recipe = builders.small_recipe(*SETTINGS, *ours)
    context = builders.context(player.model.root, recipe, STAGE, "train_vavae", "encode", "train_dit")
    wanted = drawn(Sampler.of(context), len(CLASSES) * ROWS, len(CLASSES))
    assert np.array_equal(player.draw(CLASSES, ROWS, SEED, SETTINGS), wanted)
    assert not np.array_equal(player.draw(CLASSES, ROWS, SEED + 1, SETTINGS), wanted)


def test_who_looks_on_changes_nothing_and_sees_semantics_ahead(player: Player) -> None:
    moments: list[Moment] = []
    alone = player.draw(CLASSES, ROWS, SEED, SETTINGS)
    assert np.array_equal(player.draw(CLASSES, ROWS, SEED, SETTINGS, moments.append), alone)
    times = [(each.times["texture"], each.times["semantic"]) for each in moments]
    assert len(moments) == 6 and times == sorted(times) and times[0] == (0.0, 0.0)
    for texture, semantic in times:  # demo's lead is 0.3
        assert semantic == pytest.approx(min(1.0, texture + 0.3), abs=1e-5) or texture == 0.0
    assert any(semantic > 0 and texture == 0 for texture, semantic in times)
    for each in moments:
        assert each.texture.shape == alone.shape and each.semantics is not None


def test_many_steps_are_few_moments_and_a_stop_ends_it(player: Player) -> None:
    moments: list[Moment] = []
    player.draw([1], 1, SEED, ["sample.steps=120"], moments.append)
    assert 12 < len(moments) < 40

    def impatient(moment: Moment) -> None:
        moments.append(moment)
        raise Stopped

    before = len(moments)
    with pytest.raises(Stopped):
        player.draw([1], 1, SEED, SETTINGS, impatient)
    assert len(moments) == before + 1


def test_the_lead_can_be_another_than_in_training(player: Player) -> None:
    same, other = (player.draw([1], 1, SEED, [f"sample.delta={delta}"]) for delta in (0.3, 0.8))
    assert np.array_equal(same, player.draw([1], 1, SEED)) and not np.array_equal(other, same)


def test_settings_that_cannot_be_are_one_line(player: Player) -> None:
    with pytest.raises(UserError, match=r"sample\.steps"):
        player.draw([1], 1, SEED, ["sample.steps=0"])
    with pytest.raises(UserError, match=r"sample\.labels names 10"):
        player.draw([10], 1, SEED)
    with pytest.raises(UserError, match=r"sample\.delta is 0\.2 but train_dit\.clock\.kind is synchronous"):
        builders.small_recipe("sample.delta=0.2", "train_dit.clock.kind=synchronous")


def test_a_model_whose_latents_nobody_knows(player: Player, tmp_path: Path) -> None:
    lonely = builders.put(builders.at(tmp_path), RECIPE, "train_dit", [])
    with pytest.raises(UserError, match="does not say whose latents it makes"):
        tokenizer_of(lonely)


def test_latents_as_colours() -> None:
    import torch

    latents = torch.zeros(1, 2, 1, 3)
    latents[0, 0, 0] = torch.tensor([-9.0, 0.0, 9.0])
    assert as_colours(latents)[0, 0].tolist() == [[0, 127, 127], [127, 127, 127], [255, 127, 127]]
