"""Settings of a sample that a person turns, and the overrides that they are."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

from configs import Recipe, UserError
from configs.diffusion import SemanticFirstClock
from configs.sampling import NoGuidance

LEAD = "Δt"
AXES: dict[str, Callable[[str], Any]] = {"guidance": float, "steps": int, "solver": str, LEAD: float, "seed": int}
"""What a grid can vary, and what its values are."""
MOST_CELLS = 64


def values_of(name: str, text: str) -> list[Any]:
    """`1, 2, 4` as values of a setting. Raises UserError on anything else."""
    parts = [part.strip() for part in text.split(",") if part.strip()]
    try:
        found = [AXES[name](part) for part in parts]
    except ValueError:
        found = []
    if not found:
        raise UserError(f"{name}: expected values between commas, found {text!r}")
    return found


def overrides(recipe: Recipe, wanted: dict[str, Any], stages: list[dict[str, Any]] | None = None) -> list[str]:
    """`sample.…=value` for what differs from the recipe's own; of `seed` there is none.

    wanted: by the names of :data:`AXES`. stages: steps of each resolution that a cascade goes through.
    """
    sample, found = recipe.sample, list[str]()
    own = current(recipe)
    if "guidance" in wanted and wanted["guidance"] != own["guidance"]:
        if isinstance(sample.guidance, NoGuidance):
            found.append(f"sample.guidance={{method: classifier_free, scale: {wanted['guidance']:g}}}")
        else:
            found.append(f"sample.guidance.scale={wanted['guidance']:g}")
    for name, path in (("steps", "sample.steps"), ("solver", "sample.solver"), (LEAD, "sample.delta")):
        if wanted.get(name) is not None and wanted[name] != own[name]:
            found.append(f"{path}={wanted[name]}")
    if stages is not None and stages != steps_of(recipe):
        known = {each.side: each.model_dump(mode="json", exclude_none=True) for each in recipe.sampled_resolutions}
        found.append(f"sample.stages={json.dumps([{**known.get(each['side'], {}), **each} for each in stages])}")
    return found


def current(recipe: Recipe) -> dict[str, Any]:
    """What a recipe says of each setting; None where it knows no such thing."""
    sample, clock = recipe.sample, recipe.train_dit.clock
    lead = (clock.delta if sample.delta is None else sample.delta) if isinstance(clock, SemanticFirstClock) else None
    scale = 1.0 if isinstance(sample.guidance, NoGuidance) else sample.guidance.scale
    return {"guidance": scale, "steps": sample.steps, "solver": sample.solver, LEAD: lead}


def steps_of(recipe: Recipe) -> list[dict[str, Any]]:
    """Side and steps of each resolution that a cascade goes through, coarsest first."""
    return [
        {"side": each.side, "steps": recipe.sample.at(each).steps}
        for each in recipe.sampled_resolutions
        if recipe.train_dit.cascade is not None
    ]


def cells(
    recipe: Recipe,
    wanted: dict[str, Any],
    stages: list[dict[str, Any]] | None,
    seed: int,
    across: tuple[str, list[Any]],
    down: tuple[str, list[Any]],
) -> list[tuple[list[str], int]]:
    """Overrides and seed of each cell of a grid over two settings, row by row.

    across, down: a name of :data:`AXES` and its values, of columns and of rows.

    Raises:
        UserError: both are the same setting, or there are too many cells.
    """
    if across[0] == down[0]:
        raise UserError(f"Columns and rows are both {across[0]}: choose two settings.")
    if (count := len(across[1]) * len(down[1])) > MOST_CELLS:
        raise UserError(f"A grid has {MOST_CELLS} cells at most, asked for {count}.")
    varied = [{"seed": seed, **wanted, across[0]: one, down[0]: other} for other in down[1] for one in across[1]]
    return [(overrides(recipe, each, stages), each["seed"]) for each in varied]
