"""From a recipe that names what its authors released to the run that uses it: nothing trained, no image read."""

from __future__ import annotations

import json
from collections.abc import Sequence

from configs.errors import UserError
from configs.load import load_recipe, recipe_names
from configs.recipe import Recipe


def reproduction(
    recipe: str, unguided: bool = False, images: int | None = None, overrides: Sequence[str] = ()
) -> list[str]:
    """Overrides under which a recipe samples its authors' weights and is scored as they scored them.

    Args:
        recipe: a recipe's name or a path to a YAML file, with `published.released`.
        unguided: sample without guidance, for the paper's unguided score.
        images: sample so many instead of the published number, for a first look.
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
    if (published.unguided if unguided else published.guided) is None:
        kind, way_out = ("unguided", "leave out --unguided") if unguided else ("guided", "add --unguided")
        raise UserError(f"recipe {recipe}: its paper reports no {kind} score: {way_out}")
    changes = {
        "train_dit.images": 0,
        "train_dit.pretrained": published.released.weights,
        "train_dit.statistics": published.released.statistics.model_dump(exclude_none=True),
    }
    if unguided:
        changes["sample.guidance"] = {"method": "none"}
    if images is not None:
        changes["sample.images"] = images
    return [*(f"{field}={json.dumps(value)}" for field, value in changes.items()), *overrides]


def reproducible() -> list[str]:
    """Names of the recipes that come with the project and name what their authors released."""
    return [name for name in recipe_names() if _released(load_recipe(name))]


def _released(recipe: Recipe) -> bool:
    return recipe.published is not None and recipe.published.released is not None
