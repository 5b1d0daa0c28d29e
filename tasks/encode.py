"""Stage `encode`: image shards to latents, one output file per input shard.

Ray Data decodes on CPU workers while actors hold the networks; a shard travels as one row, so a part is made whole
by one actor and is the same bytes whoever makes it. What is finished has a receipt and is not made again; of a set
that has grown, neither is what was encoded before.
"""

from __future__ import annotations

import pickle
import time
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs import Recipe, UserError
from configs.errors import attempt
from infra.artifacts import Artifact
from infra.cluster import actor_options, connect, require_gpus
from infra.progress import Bar
from infra.storage import FileEntry
from tasks.data import kept_latents, ready_latents
from tasks.data.decode import Undecodable, load
from tasks.data.receipts import InOrder, Receipt, finished, quiet_ray_data, receipts
from tasks.data.statistics import ChannelSums, Merging, statistics_hash
from tasks.data.tensors import FLIP
from tasks.stage import Context, Outcome, Stage

LATENTS = ("z", "s")
"""Columns that the diffusion model sees, in channel order; the others are targets."""


def run(context: Context) -> Outcome:
    """Encode every shard that has no receipt yet, or convert latents that are given; statistics are over all rows of
    the train split.

    Raises:
        UserError: a shard is damaged, or the networks' grids do not fit each other.
    """
    recipe, out = context.recipe, context.out
    if recipe.ready_latents:
        made = ready_latents.converted(recipe, out)
        classes = [str(label) for label in range(recipe.data.classes)]
        return _outcome(recipe, made, classes, None)
    shards = context.input("shard")
    parts = shards.files(suffix=".parquet")
    parts = [entry for entry in parts if "/" in entry.path]
    done = InOrder(entry.path for entry in parts)
    for receipt in finished(out, [(entry.path, entry.sha256) for entry in parts]):
        done.add(receipt)
    missing = [entry for entry in parts if entry.path not in done]
    rows = sum(entry.rows or 0 for entry in parts)
    with Bar("encode", rows) as bar:
        bar.skip(rows - sum(entry.rows or 0 for entry in missing))
        for receipt in _kept(context, kept_latents.jobs(context, STAGE.version, missing)):
            done.add(receipt)
            bar.skip(receipt.entry.rows or 0)
        missing = [entry for entry in missing if entry.path not in done]
        for receipt in _encoded(context, shards, missing):
            done.add(receipt)
            bar.advance(receipt.entry.rows or 0)
    facts = shards.manifest.facts
    return _outcome(recipe, done, facts["classes"], facts["splits"])


def _kept(context: Context, jobs: list[dict[str, Any]]) -> Iterator[Receipt]:
    """Receipts of parts whose latents an artifact has that was made before the set grew."""
    if not jobs:
        return
    import ray.data

    connect()
    quiet_ray_data()
    rows = ray.data.from_items(jobs, override_num_blocks=len(jobs)).map(partial(kept_latents.part_row, job=context.job))
    yield from filter(None, receipts(rows.iter_rows()))


def _encoded(context: Context, shards: Artifact, parts: list[FileEntry]) -> Iterator[Receipt]:
    """Receipts of parts as actors finish them."""
    if not parts:
        return
    import ray.data

    from tasks.encoder import EncoderActor

    connect()
    quiet_ray_data()
    recipe, compute = context.recipe, context.recipe.compute.actors
    require_gpus("compute.actors.gpus_per_actor", compute.gpus_per_actor)
    jobs = [{"part": entry.path, "made_from": entry.sha256} for entry in parts]
    actors = min(compute.actors, len(parts))
    decode_cpus, actor_cpus = share_cpus(ray.cluster_resources().get("CPU", 1.0), actors, compute.cpus_per_actor)
    stream = ray.data.from_items(jobs, override_num_blocks=len(jobs)).map_batches(
        partial(decode_part, shards=shards, size=recipe.image.size),
        batch_size=1,
        batch_format="pyarrow",
        num_cpus=decode_cpus,
    )
    stream = stream.map_batches(
        EncoderActor,
        fn_constructor_args=(context.job,),
        compute=ray.data.ActorPoolStrategy(
            size=actors,
            max_tasks_in_flight_per_actor=3,  # one is encoded, one written, one waits
            max_concurrent_calls_per_actor=2,
            enable_true_multi_threading=True,
        ),
        batch_size=1,
        batch_format="pyarrow",
        **actor_options(compute, actor_cpus),
    )
    yield from receipts(stream.iter_rows())


def share_cpus(available: float, actors: int, wanted: float) -> tuple[float, float]:
    """CPUs that one decode task and one actor reserve, such that all actors and a decode task fit side by side.

    Ray starts nothing that does not fit: actors that reserve every core would wait for ever for what they decode.
    Reservations do not bind threads, so a small machine is only shared, not left idle.
    """
    if available - actors * wanted >= 1:
        return 1.0, wanted
    decode = min(1.0, available / 4)
    return decode, int(100 * (available - decode) / actors) / 100


def decode_part(jobs: pa.Table, shards: Artifact, size: int) -> pa.Table:
    """One shard's keys, labels and cropped uint8 pixels, as one row; `error` is why there are none, pickled."""
    started, part = time.perf_counter(), jobs["part"][0].as_py()
    found, error = attempt(lambda: decoded(shards, part, size)), None
    if isinstance(found, UserError):
        found, error = ([], np.empty(0, np.int32), np.empty(0, np.uint8)), found
    keys, labels, pixels = found
    columns = {
        "error": pa.array([pickle.dumps(error)], pa.binary()),
        "keys": pa.array([keys], pa.list_(pa.string())),
        "labels": pa.array([labels], pa.list_(pa.int32())),
        "pixels": pa.array([pixels.data], pa.large_binary()),
        "seconds": pa.array([time.perf_counter() - started], pa.float64()),
    }
    for name, column in columns.items():
        jobs = jobs.append_column(name, column)
    return jobs


def decoded(shards: Artifact, part: str, size: int) -> tuple[list[str], np.ndarray, np.ndarray]:
    """Keys, labels int32 (N,) and cropped pixels uint8 (N, size, size, 3) of a shard, checked against its hash.

    Raises:
        UserError: the shard is missing or damaged.
    """
    table = pq.read_table(pa.BufferReader(shards.read(part)), columns=["key", "label", "image"])
    pixels = np.empty((table.num_rows, size, size, 3), np.uint8)
    keys = table["key"].to_pylist()
    for row, image in enumerate(table["image"]):
        try:
            pixels[row] = load(image.as_py(), size)
        except Undecodable as error:
            raise UserError(
                f"{shards.uri}/{part}: image {keys[row]!r} does not decode ({error}); run shard again"
            ) from None
    return keys, table["label"].to_numpy(), pixels


def _outcome(recipe: Recipe, receipts: Iterable[Receipt], classes: list[str], splits: dict[str, int] | None) -> Outcome:
    """receipts: in the parts' order; splits: None where all is trained on."""
    entries: list[FileEntry] = []
    first: Mapping[str, Any] = {}
    spent: Counter[str] = Counter()
    timed = 0
    whole: dict[str, Merging] = defaultdict(Merging)
    coarser: dict[tuple[str, str], Merging] = defaultdict(Merging)
    for receipt in receipts:
        entries.append(receipt.entry)
        first = first or receipt.facts
        spent.update(receipt.facts["seconds"])
        timed += bool(receipt.facts["seconds"]) * (receipt.entry.rows or 0)
        for name, sums in receipt.facts["sums"].items() if receipt.entry.path.startswith("train/") else ():
            whole[name].add(ChannelSums(**sums))
            for side, averages in receipt.facts["averages"][name].items():
                coarser[side, name].add(ChannelSums(**averages))
    shapes, columns = first["shapes"], [name for name in LATENTS if name in first["sums"]]
    statistics = {name: standards(whole[name].sums(), recipe) for name in columns}
    rows = sum(entry.rows or 0 for entry in entries)
    facts = {
        "statistics": statistics,
        "statistics_hash": statistics_hash(statistics),
        "averages": _averages(coarser, columns, recipe),
        "shapes": shapes,
        "rows_per_group": recipe.encode.rows_per_group,
        "posterior": recipe.encode.posterior,
        "flips": recipe.image.flips if recipe.online_latents else any(name.endswith(FLIP) for name in shapes),
        "classes": classes,
        "splits": {"train": rows, "test": 0} if splits is None else splits,
    }
    scores = {f"{name}_images_per_second_per_worker": timed / seconds for name, seconds in spent.items()}
    return Outcome(entries, rows, facts, scores)


def standards(sums: ChannelSums, recipe: Recipe) -> dict[str, Any]:
    """What a column is standardised by: its moments. Pixels are not: EDM's preconditioning knows their spread."""
    moments = sums.mean_and_std()
    if not recipe.train_vavae.model.identity:
        return moments
    channels = len(moments["mean"])
    return moments | {"mean": [0.0] * channels, "std": [1.0] * channels}


def _averages(coarser: Mapping[tuple[str, str], Merging], columns: list[str], recipe: Recipe) -> dict[str, Any]:
    """Statistics of the latents' averages on coarser grids, by side: the targets of a cascade's lower resolutions."""
    found: dict[str, Any] = {}
    for side in dict.fromkeys(side for side, _ in coarser):
        statistics = {name: standards(coarser[side, name].sums(), recipe) for name in columns}
        found[side] = {"statistics": statistics, "statistics_hash": statistics_hash(statistics)}
    return found


def external(recipe: Recipe) -> dict[str, str] | None:
    """Which foundation model, where its weights are a file's, or which latents, where they are given."""
    from infra.weights import identities

    if recipe.ready_latents:
        source = ready_latents.source_of(recipe)
        return {"latents": recipe.data.revision or source.identity(), "classes": str(recipe.data.classes)}

    return None if recipe.foundation is None else identities(foundation=recipe.foundation.weights) or None


def check(recipe: Recipe) -> None:
    """Raises UserError where latents that are given are not what the recipe's networks take."""
    if recipe.ready_latents:
        ready_latents.check(recipe)


STAGE = Stage(
    name="encode",
    version=3,
    sections=("image", "encode", "foundation"),
    inputs=("shard", "train_vavae", "train_semvae"),
    run=run,
    external=external,
    check=check,
)
