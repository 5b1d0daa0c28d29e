"""A look before a long training: the loss of given weights on given latents, by channel group and time.

A tokenizer, statistics or latents other than those that weights were trained on show here in a minute,
as a loss far above what training reached; afterwards they would show in a week.
"""

from __future__ import annotations

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch

from configs import Recipe, UserError
from configs.diffusion import DitModel
from infra.artifacts import Artifact
from infra.device import computing, default_device
from infra.weights import load_pretrained
from models.objectives import VelocityMatching
from tasks.data.given_statistics import given_statistics
from tasks.data.statistics import ChannelSums, LatentStatistics
from tasks.data.tensors import to_numpy
from tasks.networks import build_network, build_objective
from tasks.randomness import ImageNumbers

BINS = 10
"""Of time, from noise (0) to data (1)."""
PUBLISHED = {
    100: 1.213,
    200: 0.540,
    500: 0.419,
    1_000: 0.385,
    2_000: 0.360,
    5_000: 0.338,
    10_000: 0.327,
    19_200: 0.318,
    29_100: 0.3135,
    39_100: 0.311,
    49_000: 0.308,
    59_000: 0.307,
    68_900: 0.306,
    80_000: 0.3045,
}
"""Loss of LightningDiT-XL/1 on VA-VAE's latents by steps of 1,024 images, from its authors' log (papers.md 1.5)."""
_BATCH = 16
_FAR = 1.1
"""Above this many times the published loss something is another than it was in training: ten times the spread that
64 images leave."""


@dataclass(frozen=True)
class Latents:
    """Rows of latents as they are stored, by column, with labels (N,)."""

    columns: Mapping[str, np.ndarray]
    labels: np.ndarray
    statistics: LatentStatistics
    """Their own."""


@dataclass(frozen=True)
class Probe:
    """Mean squared velocity errors under training's times, as the published curve counts them."""

    images: int
    loss: float
    by_group: Mapping[str, float]
    by_time: Mapping[str, Sequence[float | None]]
    """By channel group in :data:`BINS` bins of the group's time; None where no image fell."""
    ignorant: float
    """What a model reaches that knows of the latents no more than mean and deviation."""
    published: float | None
    """Of the same network and latents after the published steps; None where none is published."""

    @property
    def verdict(self) -> str:
        """One line: what the loss says of weights, latents and statistics."""
        if self.published is not None:
            said = f"loss {self.loss:.4f}, published {self.published:.4f} at {max(PUBLISHED):,} steps"
            if self.loss > _FAR * self.published:
                return f"{said}: tokenizer, latents or statistics are others than these weights were trained on"
            return f"{said}: weights, latents and statistics fit"
        said = f"loss {self.loss:.4f}, and {self.ignorant:.4f} of a model that knows only mean and deviation"
        if self.loss > self.ignorant:
            return f"{said}: latents or statistics are others than these weights were trained on, or they are untrained"
        return said

    @property
    def fits(self) -> bool:
        """Whether nothing speaks against the latents."""
        return self.loss <= (self.ignorant if self.published is None else _FAR * self.published)


def stored_latents(artifact: Artifact, images: int) -> Latents:
    """The first latents of an `encode` artifact. Raises UserError where it stores none."""
    if not artifact.manifest.facts["shapes"]:
        raise UserError(
            f"{artifact.uri} stores no latents (encode.latents: online): make some with encode.latents: stored"
        )
    statistics = LatentStatistics.from_facts(artifact.manifest.facts, artifact.uri)
    wanted, tables, rows = [*statistics.columns, "label"], [], 0
    for entry in artifact.files("train/"):
        with artifact.storage.open(entry.path) as file:
            parquet = pq.ParquetFile(io.BufferedReader(file))
            for group in range(parquet.num_row_groups):
                tables.append(parquet.read_row_group(group, columns=wanted))
                rows += tables[-1].num_rows
                if rows >= images:
                    break
        if rows >= images:
            break
    columns = {
        name: np.concatenate([to_numpy(each[name], each.schema.field(name)) for each in tables])[:images]
        for name in statistics.columns
    }
    return Latents(columns, np.concatenate([each["label"].to_numpy() for each in tables])[:images], statistics)


def ready_latents(recipe: Recipe, images: int) -> Latents:
    """The first latents of the recipe's own source of them, where they lie; statistics of those alone."""
    from tasks.data.ready_latents import columns_of, source_of
    from tasks.sources.ready_latents import LABELS, NAMES

    shard = next(source_of(recipe).shards())
    count = min(images, shard.rows)
    names = [name for name in columns_of(recipe, shard) if name in ("z", "s")]
    columns = {name: shard.values(NAMES[name], 0, count).half().numpy() for name in names}
    own = LatentStatistics({name: ChannelSums.of(values).mean_and_std() for name, values in columns.items()})
    return Latents(columns, shard.values(LABELS, 0, count).reshape(-1).numpy(), own)


@torch.inference_mode()
def probe(recipe: Recipe, latents: Latents) -> Probe:
    """The loss of `train_dit.pretrained` on latents, at times spread over those of training.

    Raises:
        UserError: the recipe names no weights, or ones that do not fit, or does not match velocities.
    """
    section, device = recipe.train_dit, default_device()
    objective = build_objective(recipe)
    if section.pretrained is None or not isinstance(objective, VelocityMatching) or section.cascade is not None:
        raise UserError("nothing to probe: train_dit.pretrained has to name weights of a LightningDiT without cascade")
    network = build_network(recipe, section.model)
    load_pretrained(network, section.pretrained)
    network.to(device).eval()
    objective = replace(objective, align_weight=0.0)
    given = given_statistics(recipe)
    statistics = latents.statistics if given is None else given[0]
    count = len(latents.labels)
    numbers = ImageNumbers(section.seed, "probe")
    # Spread evenly, and unrelated to the order of rows: as good as ten times as many times drawn at random.
    u = (torch.from_numpy(np.random.default_rng(section.seed).permutation(count)).float() + 0.5) / count
    found: dict[str, list[np.ndarray]] = {name: [] for name in objective.groups.names}
    for start in range(0, count, _BATCH):
        rows = slice(start, start + _BATCH)
        stored = np.concatenate([values[rows] for values in latents.columns.values()], axis=1)
        x1 = statistics.normalise(torch.from_numpy(stored)).to(device)
        noise = numbers.normal(np.arange(start, start + len(x1)), x1.shape[1:]).to(device)
        labels = torch.from_numpy(latents.labels[rows].astype(np.int64)).to(device)
        times = objective.train_times(u[rows]).to(device)
        with computing(section.precision, device):
            terms = objective.loss_at(network, x1, labels, noise, times)
        for name in found:
            found[name].append(terms.monitors[f"by_time/{name}"].cpu().numpy())
    points = {name: np.concatenate(pieces, axis=1) for name, pieces in found.items()}
    return _summed_up(recipe, points, count)


def _summed_up(recipe: Recipe, points: Mapping[str, np.ndarray], count: int) -> Probe:
    """points: by group, times and errors of every image, (2, N)."""
    sizes = {name: recipe.channel_groups[name] for name in points}
    by_group = {name: float(errors.mean()) for name, (_, errors) in points.items()}
    # Of independent standard normals, x_t says so much of the velocity and no more (our derivation).
    unknown = {name: float((1 / (t**2 + (1 - t) ** 2)).mean()) for name, (t, _) in points.items()}
    total = sum(sizes.values())

    def mean(values: Mapping[str, float]) -> float:
        return sum(sizes[name] * value for name, value in values.items()) / total

    return Probe(
        count,
        mean(by_group),
        by_group,
        {name: _binned(*each) for name, each in points.items()},
        mean(unknown),
        _published(recipe),
    )


def _binned(times: np.ndarray, errors: np.ndarray) -> list[float | None]:
    places = np.clip((times * BINS).astype(int), 0, BINS - 1)
    return [float(errors[places == place].mean()) if (places == place).any() else None for place in range(BINS)]


def _published(recipe: Recipe) -> float | None:
    """Where the recipe's network, latents and times are those of the published log, its last loss."""
    model: Any = recipe.train_dit.model
    theirs = isinstance(model, DitModel) and model.size == "XL" and recipe.channel_groups == {"texture": 32}
    vavae = "vavae" in (recipe.train_vavae.pretrained or "")
    return PUBLISHED[max(PUBLISHED)] if theirs and vavae and recipe.train_dit.objective.uniform_after is None else None
