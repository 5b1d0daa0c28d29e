"""Given weights (`images: 0`) are taken by an actor with an accelerator where actors have one, with the same result."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

import tasks.data.actors
from configs import Recipe
from configs.compute import ActorCompute
from tasks import train_vavae
from tasks.networks import build_autoencoder
from tests.helpers.builders import at, context, put_shard, small_recipe


def given(folder: Path, gpus: int) -> Recipe:
    weights = str(folder / "given.safetensors")
    recipe = small_recipe(
        "train_vavae.images=0", f"train_vavae.pretrained={weights}", f"compute.actors.gpus_per_actor={gpus}"
    )
    if not Path(weights).exists():
        save_file(build_autoencoder(recipe.train_vavae.model).state_dict(), weights)
    return recipe


def test_an_actor_scores_them_and_the_driver_does_not(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[ActorCompute] = []

    def spread(items: Sequence[Any], worker: type, arguments: Sequence[Any], compute: ActorCompute) -> Iterator[Any]:
        asked.append(compute)
        made = worker(*arguments)
        return (made(item) for item in items)

    monkeypatch.setattr(tasks.data.actors, "spread", spread)
    found = []
    for gpus in (0, 1):
        recipe = given(tmp_path, gpus)
        put_shard(at(tmp_path / f"root{gpus}"), recipe)
        found.append(train_vavae.run(context(at(tmp_path / f"root{gpus}"), recipe, train_vavae.STAGE, "shard")))
    assert [each.gpus_per_actor for each in asked] == [1], "a recipe without GPUs needs no actor"
    driver, actor = found
    assert driver.scores["psnr"] > 0
    assert actor.scores == driver.scores and actor.files == driver.files and actor.rows == 0


def test_a_machine_without_gpus_is_told_which_field_to_change(tmp_path: Path, local_ray: None) -> None:
    recipe = given(tmp_path, 1)
    put_shard(at(tmp_path), recipe)
    with pytest.raises(Exception, match=r"compute.actors.gpus_per_actor is 1 but Ray finds 0 GPUs on this machine"):
        train_vavae.run(context(at(tmp_path), recipe, train_vavae.STAGE, "shard"))
