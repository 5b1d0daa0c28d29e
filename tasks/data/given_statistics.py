"""Statistics of latents that a recipe names, or that travel in the weights it names: what published
weights were trained on, in place of what is measured on latents here.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from configs import Recipe, UserError
from configs.diffusion import StatisticsFiles
from infra.logs import say
from infra.weights import fetch, identities, load_statistics
from models.checkpoints import Statistics, travelling_statistics
from tasks.data.statistics import LatentStatistics

_COLUMNS = {"latent": "z", "texture": "z", "semantic": "s"}
"""Column of each channel group; networks of one group call it `latent`."""
_GROUPS = {"z": "texture", "s": "semantic"}
_FAR = 0.1
"""Of a deviation, and of its logarithm nearly: ten times what 10,000 latents leave to chance."""
_FIELDS = {"texture": "train_dit.statistics.texture", "semantic": "train_dit.statistics.semantic"}


def given_statistics(recipe: Recipe) -> tuple[LatentStatistics, str] | None:
    """What the diffusion model's latents are standardised by and whose it is (`files` or `weights`);
    None where the recipe leaves it to the latents.

    Raises:
        UserError: a file cannot be had, holds something else, or has another number of channels.
    """
    section = recipe.train_dit
    if isinstance(section.statistics, StatisticsFiles):
        named = section.statistics.model_dump(exclude_none=True)
        found = {group: _loaded(_FIELDS[group], location) for group, location in named.items()}
        return _checked(recipe, found, {group: f"{_FIELDS[group]} {where}" for group, where in named.items()}), "files"
    if section.pretrained is None:
        return None
    found = travelling_statistics(fetch(section.pretrained))
    if not found and section.statistics == "weights":
        raise UserError(
            f"train_dit.statistics is weights, but none travel in {section.pretrained}: put them there with "
            "`weights import --statistics`, or name their files in train_dit.statistics"
        )
    return (_checked(recipe, found, dict.fromkeys(found, section.pretrained)), "weights") if found else None


def external(recipe: Recipe) -> dict[str, str]:
    """Which statistics these are, for a fingerprint."""
    section = recipe.train_dit
    if isinstance(section.statistics, StatisticsFiles):
        named = section.statistics.model_dump(exclude_none=True)
        return identities(**{f"{group}_statistics": location for group, location in named.items()})
    if section.pretrained is None or section.pretrained.startswith("hf://"):
        return {}  # a hub's name stands for all that is in the file
    found = given_statistics(recipe)
    return {} if found is None else {"statistics": found[0].hash}


def differences(given: LatentStatistics, own: LatentStatistics) -> dict[str, dict[str, float]]:
    """How far given statistics are from those of latents, by channel group.

    `mean`: the largest difference of a channel's means, in deviations of the latents. `std`: the
    largest ratio of a channel's deviations, either way, less 1.
    """
    found = {}
    for column in own.columns:
        spread = own.std([column])
        means = np.abs(given.mean([column]) - own.mean([column])) / spread
        ratios = np.exp(np.abs(np.log(given.std([column]) / spread)))
        found[_GROUPS[column]] = {"mean": float(means.max()), "std": float(ratios.max() - 1)}
    return found


def tell_differences(given: LatentStatistics, own: LatentStatistics, whose: str) -> dict[str, dict[str, float]]:
    """Say how far statistics that are given are from the latents' own; returns :func:`differences`.

    Statistics of a few thousand latents differ by a few per cent; more is said as a warning, since a
    model sees another distribution than it was trained on.
    """
    found = differences(given, own)
    for group, far in found.items():
        level = "warning" if far["mean"] > _FAR or far["std"] > _FAR else "info"
        say(
            f"statistics of {group} from {whose}: means are up to {far['mean']:.3f} deviations off these latents', "
            f"deviations up to {100 * far['std']:.1f} %"
            + ("; are these the latents that the weights were trained on?" if level == "warning" else ""),
            level,
            group=group,
            mean_difference=far["mean"],
            std_difference=far["std"],
        )
    return found


def _loaded(field: str, location: str) -> Statistics:
    try:
        return load_statistics(location)
    except UserError as error:
        raise UserError(f"{field}: {error}") from None


def _checked(recipe: Recipe, found: dict[str, Statistics], named: dict[str, str]) -> LatentStatistics:
    values: dict[str, dict[str, Any]] = {}
    for group, channels in recipe.channel_groups.items():
        own = next((name for name in found if _COLUMNS.get(name) == _COLUMNS[group]), None)
        if own is None:
            where = ", ".join(named.values())
            raise UserError(f"{where}: has statistics of {', '.join(found)}, but none of {group}: name its file too")
        mean, std = (each.double().tolist() for each in (found[own].mean, found[own].std))
        if len(mean) != channels:
            raise UserError(
                f"{named[own]}: statistics of {len(mean)} channels, but the {group} group of this recipe has "
                f"{channels}: take those of the weights that the recipe names"
            )
        values[_COLUMNS[group]] = {"mean": mean, "std": std}
    return LatentStatistics(values)
