"""From a recipe that names what its authors released to the run that uses it: nothing is trained. Pictures are scored
without reading an image of the recipe's own, a tokenizer on validation images alone."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

from configs.errors import UserError
from configs.load import load_recipe, recipe_names
from configs.recipe import Recipe


def reproduction(
    recipe: str, unguided: bool = False, images: int | None = None, overrides: Sequence[str] = ()
) -> list[str]:
    """Overrides under which what a recipe's authors released is scored as they scored it.

    Args:
        recipe: a recipe's name or a path to a YAML file, with `published.released`.
        unguided: sample without guidance, for the paper's unguided score.
        images: sample (or reconstruct) so many instead of the published number, for a first look.
        overrides: `section.field=value` strings that go before all others.

    Raises:
        UserError: the recipe names no released files, or its paper reports no such score.
    """
    loaded = load_recipe(recipe, overrides)
    published = loaded.published
    if published is None or published.released is None:
        raise UserError(
            f"recipe {recipe}: names no files that its authors released (published.released), so there is nothing to "
            f"reproduce: choose one of {', '.join(reproducible())}, or name them"
        )
    if published.released.tokenizer is not None:
        if unguided:
            raise UserError(f"recipe {recipe}: is about a tokenizer, which is not guided: leave out --unguided")
        return _of_tokenizer(loaded, published.released.tokenizer, images, overrides)
    assert published.released.statistics is not None  # its own rules
    if (published.unguided if unguided else published.guided) is None:
        kind, way_out = ("unguided", "leave out --unguided") if unguided else ("guided", "add --unguided")
        raise UserError(f"recipe {recipe}: its paper reports no {kind} score: {way_out}")
    changes: dict[str, Any] = {
        "train_dit.images": 0,
        "train_dit.pretrained": published.released.weights,
        "train_dit.statistics": published.released.statistics.model_dump(exclude_none=True),
    }
    if unguided:
        changes["sample.guidance"] = {"method": "none"}
    if images is not None:
        changes["sample.images"] = images
    return [*_assigned(changes), *overrides]


def _of_tokenizer(loaded: Recipe, weights: str, images: int | None, overrides: Sequence[str]) -> list[str]:
    changes: dict[str, Any] = {
        "train_vavae.images": 0,
        "train_vavae.pretrained": weights,
        "shard.test_share": 1.0,
        "evaluate_tokenizer.probe_images": 0,
    }
    if images is not None:
        changes["evaluate_tokenizer.images"] = images
    validation = getattr(loaded.data.source, "test_path", None)
    if validation is None:  # all that there is, or the source's own test split
        return [*_assigned(changes), *overrides]
    return [*_assigned(changes), *overrides, *_assigned({"data.source": {"path": validation, "test_path": None}})]


def _assigned(changes: Mapping[str, Any]) -> list[str]:
    return [f"{field}={json.dumps(value)}" for field, value in changes.items()]


def of_tokenizer(recipe: str, overrides: Sequence[str] = ()) -> bool:
    """Whether what a recipe's authors released is a tokenizer."""
    published = load_recipe(recipe, overrides).published
    return published is not None and published.released is not None and published.released.tokenizer is not None


def reproducible() -> list[str]:
    """Names of the recipes that come with the project and name what their authors released."""
    return [name for name in recipe_names() if _released(load_recipe(name))]


def _released(recipe: Recipe) -> bool:
    return recipe.published is not None and recipe.published.released is not None
