"""`init`: a recipe for a pile of images that runs, with what can be seen of the pile filled in."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs import UserError, load_recipe
from flows.init import default_output, init
from tests.helpers.odd_sources import tree


def test_sixty_photographs_get_a_recipe_that_fits_them(tmp_path: Path) -> None:
    tree(tmp_path / "photos", {"cats": 30, "dogs": 24, "owls": 6})
    target = tmp_path / "mine.yaml"
    lines = init(str(tmp_path / "photos"), target)
    recipe = load_recipe(str(target))
    assert recipe.data.classes == 3 and recipe.data.source.path == str(tmp_path / "photos")
    assert recipe.shard.test_share == 0.3
    assert recipe.train_dit.batch == 8 and recipe.train_dit.images == 16_000
    assert recipe.train_dit.learning_rate == pytest.approx(
        load_recipe("demo").train_dit.learning_rate / 8**0.5, rel=1e-2
    )
    assert recipe.sample.images % 3 == 0 and recipe.report.columns == 3 and recipe.report.title == "mine"
    assert recipe.evaluate.classifier is None
    told = "\n".join(lines)
    assert recipe.compute.train.log_every <= recipe.train_semvae.images / 8, "a person sees that it goes on"
    for text in (
        "18 images are kept",
        "at 32 × 32 pixels",
        "class consistency is left out",
        "6 to 30 images",
        f"--recipe {target}",
    ):
        assert text in told, text


def test_many_images_get_the_demos_batches_a_judge_and_a_little_more_of_training(tmp_path: Path) -> None:
    tree(tmp_path / "train", {"a": 300, "b": 300})
    tree(tmp_path / "val", {"a": 150, "b": 150})
    lines = init(str(tmp_path), tmp_path / "mine.yaml")
    recipe = load_recipe(str(tmp_path / "mine.yaml"))
    demo = load_recipe("demo")
    assert recipe.train_dit.batch == demo.train_dit.batch
    for stage in ("train_vavae", "train_semvae", "train_dit"):
        share = getattr(recipe, stage).images / getattr(demo, stage).images
        # All images of the tokenizer are aligned, which takes as long again.
        assert (0.5 if stage == "train_vavae" else 0.95) < share < 1.3, f"{stage}: a first run is over in minutes"
    assert recipe.evaluate.classifier is not None and recipe.shard.test_share == 0.1
    assert not [line for line in lines if line.startswith("note")]


def test_classes_that_are_not_pictured_are_announced(tmp_path: Path) -> None:
    tree(tmp_path / "many", {f"class{number:02d}": 2 for number in range(24)})
    told = "\n".join(init(str(tmp_path / "many"), tmp_path / "mine.yaml"))
    assert "the report pictures 20 of 24 classes" in told


def test_what_cannot_be_learnt_from_is_refused_and_nothing_is_overwritten(tmp_path: Path) -> None:
    tree(tmp_path / "few", {"a": 5, "b": 5})
    with pytest.raises(UserError, match="10 images: 16 at least are needed"):
        init(str(tmp_path / "few"), tmp_path / "mine.yaml")
    assert not (tmp_path / "mine.yaml").exists()
    (tmp_path / "mine.yaml").write_text("mine")
    with pytest.raises(UserError, match="exists: name another file"):
        init(str(tmp_path / "few"), tmp_path / "mine.yaml")
    with pytest.raises(UserError):
        init(str(tmp_path / "nothing"), tmp_path / "other.yaml")


def test_the_recipe_is_called_after_the_folder() -> None:
    assert default_output("/data/my images/") == Path("my-images.yaml")
    assert default_output("s3://bucket/cats.tar") == Path("cats.yaml")
