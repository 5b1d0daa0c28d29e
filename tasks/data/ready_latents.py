"""What stage `encode` does where latents are given: the authors' shards into our Parquet, once.

Parts are whole or not there, and a killed conversion goes on with the parts that it lacks. Rows keep
their order, float16 their bits.
"""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from configs import Recipe, UserError
from configs.data import ReadyLatents
from infra.logs import say
from infra.storage import Storage
from tasks.data.receipts import Receipt, finished, write_receipt
from tasks.data.statistics import ChannelSums
from tasks.data.tensors import FLIP, WRITE_OPTIONS, latent_table
from tasks.sources.ready_latents import LABELS, NAMES, LatentShard, ReadyLatentsSource

_PART_ROWS, _PART_BYTES = 2_000, 256 << 20
"""A part is at most so large: several are in memory at once."""
_AT_ONCE = 4
_FEATURES = "f"


@dataclass(frozen=True)
class _Part:
    name: str
    shard: LatentShard
    start: int
    count: int

    @property
    def made_from(self) -> str:
        return f"{self.shard.name}:{self.shard.size}:{self.start}+{self.count}"


def source_of(recipe: Recipe) -> ReadyLatentsSource:
    """The recipe's latents. Raises UserError where it names images."""
    section = recipe.data.source
    if not isinstance(section, ReadyLatents):
        raise UserError(f"data.source.kind is {section.kind}, which holds images and no latents")
    return ReadyLatentsSource(section.path)


def columns_of(recipe: Recipe, shard: LatentShard) -> dict[str, tuple[int, ...]]:
    """Shape of a row of each column that the recipe takes from a shard.

    Raises:
        UserError: naming what the shard lacks, or what has another shape than the recipe's networks.
    """
    side, wanted = recipe.latent_size, dict[str, tuple[int, ...]]()
    for name, channels in zip(("z", "s"), recipe.channel_groups.values(), strict=False):
        wanted[name] = (channels, side, side)
    if recipe.encode.align_features:
        assert recipe.foundation is not None  # the recipe's rules
        wanted[_FEATURES] = (recipe.foundation.feature_dim, side, side)
    if recipe.image.flips:
        wanted |= {name + FLIP: shape for name, shape in wanted.items()}
    shard.rows  # noqa: B018 - refuses what holds no latents at all
    for name, shape in wanted.items():
        entry = shard.tensors.get(NAMES[name])
        if entry is None:
            raise UserError(f"{shard.name} has no {NAMES[name]}: {_WITHOUT[name.removesuffix(FLIP)]}{_unflipped(name)}")
        if tuple(entry["shape"][1:]) not in ((shape), (math.prod(shape[1:]), shape[0])):
            raise UserError(
                f"{shard.name}: {NAMES[name]} has rows of {tuple(entry['shape'][1:])}, but this recipe's networks take "
                f"{shape}: check image.size, the tokenizer and the foundation section"
            )
    return wanted


_WITHOUT = {
    "z": "these are no latents",
    "s": "the recipe has semantic channels (train_semvae); take SFD's latents, or a recipe without them",
    "f": "alignment has no targets, as there are neither features nor pixels here; set "
    "train_dit.objective.align_weight: 0 and encode.align_features: false",
}


def _unflipped(name: str) -> str:
    return ", or set image.flips: false where only mirrored ones are missing" if name.endswith(FLIP) else ""


def check(recipe: Recipe) -> None:
    """Raises UserError where the first shard is not what the recipe's networks take."""
    columns_of(recipe, next(source_of(recipe).shards()))


def converted(recipe: Recipe, out: Storage) -> Iterator[Receipt]:
    """Write every part that is not there yet; receipts of all of them in the order of the shards.

    Raises:
        UserError: a shard is damaged or does not fit the recipe.
    """
    rows = 0
    there = out.names("train")
    started = time.monotonic()
    with ThreadPoolExecutor(_AT_ONCE) as pool:
        for number, shard in enumerate(source_of(recipe).shards()):
            parts = list(_parts(recipe, shard, number))
            known = [(part.name, part.made_from) for part in parts if part.name in there]
            done = {receipt.entry.path: receipt for receipt in finished(out, known)} if known else {}
            missing = [part for part in parts if part.name not in done]
            for receipt in _written(pool, recipe, out, missing):
                done[receipt.entry.path] = receipt
            yield from (done[part.name] for part in parts)
            rows += sum(done[part.name].entry.rows or 0 for part in parts)
            verb = "converted" if missing else "there"
            say(
                f"encode: {verb} {shard.name}, {rows:,} latents so far, {time.monotonic() - started:.0f} s", images=rows
            )


def _written(pool: ThreadPoolExecutor, recipe: Recipe, out: Storage, parts: list[_Part]) -> Iterator[Receipt]:
    """Receipts in the parts' order; a few are on their way at once."""
    waiting: deque[Future[Receipt]] = deque()
    for part in parts:
        waiting.append(pool.submit(_write, recipe, out, part))
        if len(waiting) > _AT_ONCE:
            yield waiting.popleft().result()
    while waiting:
        yield waiting.popleft().result()


def _parts(recipe: Recipe, shard: LatentShard, number: int) -> Iterator[_Part]:
    row = sum(2 * math.prod(shape) for shape in columns_of(recipe, shard).values())
    group = recipe.encode.rows_per_group
    length = max(group, min(_PART_ROWS, _PART_BYTES // row) // group * group)
    for piece, start in enumerate(range(0, shard.rows, length)):
        name = f"train/part-{number:05d}-{piece:03d}.parquet"
        yield _Part(name, shard, start, min(length, shard.rows - start))


def _write(recipe: Recipe, out: Storage, part: _Part) -> Receipt:
    started, shard = time.perf_counter(), part.shard
    tensors = {}
    for name, shape in columns_of(recipe, shard).items():
        values = shard.values(NAMES[name], part.start, part.count)
        if tuple(values.shape[1:]) != shape:  # tokens, then features: as networks give them
            values = values.transpose(1, 2).reshape(part.count, *shape)
        tensors[name] = _to_float16(values, f"{shard.name}: {NAMES[name]}")
    labels = shard.values(LABELS, part.start, part.count).reshape(-1).numpy()
    if labels.min() < 0 or labels.max() >= recipe.data.classes:
        raise UserError(
            f"{shard.name}: labels from {labels.min()} to {labels.max()}, but data.classes {recipe.data.classes} has "
            f"labels 0 to {recipe.data.classes - 1}"
        )
    stem = shard.name.removesuffix(".safetensors")
    keys = [f"{stem}/{row:06d}" for row in range(part.start, part.start + part.count)]
    table = latent_table(keys, labels.astype(np.int32), tensors)
    entry = out.write_table(part.name, table, recipe.encode.rows_per_group, **WRITE_OPTIONS)
    receipt = Receipt(entry, part.made_from, _facts(tensors, time.perf_counter() - started))
    write_receipt(out, receipt)
    return receipt


def _facts(tensors: dict[str, np.ndarray], seconds: float) -> dict[str, Any]:
    diffused = [name for name in ("z", "s") if name in tensors]
    averages = {name: ChannelSums.of_averages(tensors[name]) for name in diffused}
    return {
        "sums": {name: vars(ChannelSums.of(tensors[name])) for name in diffused},
        "averages": {name: {str(side): vars(sums) for side, sums in averages[name].items()} for name in diffused},
        "shapes": {name: list(values.shape[1:]) for name, values in tensors.items()},
        "seconds": {"convert": seconds},
    }


def _to_float16(values: torch.Tensor, where: str) -> np.ndarray:
    """As our latents are stored. Raises UserError where float16 cannot hold a value."""
    half = values.to(torch.float16)
    if not bool(torch.isfinite(half).all()):
        raise UserError(f"{where} has values that float16 cannot hold: are these latents of a trained tokenizer?")
    found: np.ndarray = half.numpy()
    return found
