"""The recorded fingerprints of all recipes: `python -m tests.configs.fingerprints` writes them anew.

They name the artifacts that people have. A change of `fingerprints.json` makes those anew: it is a decision, and
CHANGELOG.md says which artifacts and why.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs import Recipe, load_recipe, recipe_names

if TYPE_CHECKING:
    from tasks.stage import Stage

TABLE = Path(__file__).with_suffix(".json")
UNNAMED = {"name", "published", "compute", "tracking"}
"""Sections that are in no fingerprint."""


def sections(recipe: Recipe) -> dict[str, str]:
    """A digest of each section as fingerprints see it, 16 hex digits."""
    names = (name for name in type(recipe).model_fields if name not in UNNAMED)
    return {name: _digest(recipe.section(name)) for name in names if getattr(recipe, name) is not None}


def stages(recipe: Recipe, dag: Sequence[Stage]) -> dict[str, str]:
    """The fingerprint of each stage's artifact, each fed with those before it, in the order of `dag`.

    Stages that the recipe lacks a section for are left out. What a stage reads from outside counts as one fixed
    identity: no source and no file is opened.
    """
    found: dict[str, str] = {}
    for stage in dag:
        if stage.present(recipe) and not any(recipe.lacks(section) for section in stage.sections):
            fixed = replace(stage, external=None if stage.external is None else lambda recipe: {"outside": "fixed"})
            inputs = {name: found[name] for name in stage.inputs if name in found}
            found[stage.name] = fixed.fingerprint(recipe, inputs)[0]
    return found


def recorded() -> dict[str, dict[str, dict[str, str]]]:
    """By recipe: `sections` and `stages`."""
    table: dict[str, dict[str, dict[str, str]]] = json.loads(TABLE.read_text())
    return table


def _digest(values: Any) -> str:
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()[:16]


def main() -> None:
    from flows.stages import STAGES
    from flows.tokenizer_eval import STAGES as TOKENIZER_STAGES

    dag = tuple(dict.fromkeys((*STAGES, *TOKENIZER_STAGES)))
    recipes = {name: load_recipe(name) for name in recipe_names()}
    table = {name: {"sections": sections(r), "stages": stages(r, dag)} for name, r in recipes.items()}
    TABLE.write_text(json.dumps(table, indent=1) + "\n")


if __name__ == "__main__":
    main()
