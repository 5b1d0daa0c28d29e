"""How fast `encode` is against a bare loop over the same networks, and its memory against the number of images.

    python -m benchmarks.encode [--rows 10000 70000] [--bare-rows 4000] [--recipe demo]

Memory and the share of decoding are those of the recipe as it is. For the comparison its images and networks are made
larger, so that networks are the bottleneck. The bare loop runs in as many processes as the stage has actors, at the
same time, each with the actors' thread count, over preloaded tensors, before and after the stage; both stand for what
the machine gives at that time. The stage counts from its first part's start to its last part's end (`vs_bare_loop`)
and as a whole, with the start of actors that import torch (`vs_bare_loop_whole`). On a machine that does other things,
too, the two never meet the same conditions: `cpu_vs_bare_loop` compares the processor time of one image in the bare
loop with that of one image of a whole part, from decoded pixels to the file, in the same process. Networks have random
weights (the foundation model its real ones). Memory is that of shards of 1,000 images, so that the smaller run, too,
has more shards than are in work at once. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import tempfile
import threading
import time
from pathlib import Path
from typing import Any
from unittest import mock

import pyarrow as pa
import torch
from safetensors.torch import save

from configs import Recipe, load_recipe
from infra.artifacts import Artifact
from infra.cluster import KEEP_FREED_MEMORY, connect, disconnect
from tasks import encode, shard
from tasks.data.receipts import RECEIPTS, Receipt
from tasks.encode import decode_part, decoded
from tasks.networks import WEIGHTS, build_autoencoder, build_semantic_vae
from tasks.stage import Context, Job, Outcome, Stage, perform

HEAVY = (
    "image.size=64", "foundation.input_size=128", "train_vavae.model.base_channels=32", "shard.rows_per_shard=250",
)  # fmt: skip
ROUNDS = 2
"""How often the bare loop goes over its images."""


def made(stage: Stage, recipe: Recipe, root: str, *inputs: Artifact) -> Artifact:
    prints = {artifact.stage: artifact.fingerprint for artifact in inputs}
    return perform(stage, stage.job(recipe, root, prints))


def untrained(recipe: Recipe, root: str, shards: Artifact) -> list[Artifact]:
    """Tokenizers with random weights, as artifacts."""
    torch.manual_seed(0)
    networks = {"train_vavae": build_autoencoder(recipe.train_vavae.model)}
    if recipe.train_semvae and recipe.foundation:
        networks["train_semvae"] = build_semantic_vae(recipe.train_semvae.model, recipe.foundation.feature_dim)  # type: ignore[assignment]

    def saved(network: torch.nn.Module):  # type: ignore[no-untyped-def]
        def run(context: Context) -> Outcome:
            return Outcome([context.out.write_bytes(WEIGHTS, save(network.state_dict()))])

        return run

    return [
        made(Stage(name, 1, (name,), ("shard",), saved(net)), recipe, root, shards) for name, net in networks.items()
    ]


class PeakMemory:
    """Peak of the private memory of this process and all its descendants (Ray's workers), in MiB."""

    def __enter__(self) -> PeakMemory:
        self.mib, self._stop = 0.0, threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        import psutil

        while not self._stop.wait(0.5):
            total = 0
            for process in [psutil.Process(), *psutil.Process().children(recursive=True)]:
                try:
                    memory = process.memory_info()
                    total += memory.rss - memory.shared
                except psutil.Error:
                    continue
            self.mib = max(self.mib, total / 2**20)


def limited(recipe: str, rows: int, *overrides: str) -> Recipe:
    """A recipe that keeps so many images of both splits together."""
    return load_recipe(recipe, [f"shard.limit={rows - 10_000 if rows > 20_000 else rows // 2}", *overrides])


def timed(artifact: Artifact) -> dict[str, float]:
    """Seconds of a finished stage: decoding and encoding (summed over workers), first part to last, and as a whole."""
    spent, first, last = {"decode": 0.0, "encode": 0.0}, float("inf"), 0.0
    for name in artifact.storage.names(RECEIPTS):
        seconds = Receipt.from_json(artifact.storage.read_bytes(name)).facts["seconds"]
        ended = Path(artifact.storage.locate(name)).stat().st_mtime
        first, last = min(first, ended - seconds["encode"]), max(last, ended)
        spent = {kind: spent[kind] + seconds[kind] for kind in spent}
    return {**spent, "working": last - first, "whole": artifact.manifest.seconds}


def memory(recipe: Recipe, root: str) -> tuple[Artifact, float]:
    """The finished stage and its peak memory in MiB."""
    connect()
    shards = made(shard.STAGE, recipe, root)
    inputs = [shards, *untrained(recipe, root, shards)]
    with PeakMemory() as peak:
        artifact = made(encode.STAGE, recipe, root, *inputs)
    disconnect()
    return artifact, peak.mib


def speed(recipe: Recipe, root: str) -> dict[str, float]:
    """The stage against the bare loop."""
    connect()
    shards = made(shard.STAGE, recipe, root)
    inputs = [shards, *untrained(recipe, root, shards)]
    disconnect()
    prints = {artifact.stage: artifact.fingerprint for artifact in inputs}
    job = Job("encode", "bare", root, recipe.model_dump(mode="json"), prints, {})
    before, cpu_before = bare_rate(job)
    connect()
    artifact = made(encode.STAGE, recipe, root, *inputs)
    disconnect()
    after, cpu_after = bare_rate(job)
    bare, seconds, rows = (before + after) / 2, timed(artifact), artifact.manifest.rows
    return {
        "vs_bare_loop": round(rows / seconds["working"] / bare, 3),
        "vs_bare_loop_whole": round(rows / seconds["whole"] / bare, 3),
        "cpu_vs_bare_loop": round((cpu_before + cpu_after) / 2, 3),
        "bare_images_per_second_before": round(before, 1),
        "bare_images_per_second_after": round(after, 1),
        "start_up_seconds": round(seconds["whole"] - seconds["working"], 1),
    }


def bare_rate(job: Job) -> tuple[float, float]:
    """Images/s of the networks alone, of as many processes as there are actors together; and what share of a part's
    processor time is theirs."""
    spawn = multiprocessing.get_context("spawn")
    count = Context(job).recipe.compute.actors.actors
    start, results = spawn.Barrier(count), spawn.Queue()
    processes = [spawn.Process(target=bare_loop, args=(job, number, start, results)) for number in range(count)]
    with mock.patch.dict(os.environ, KEEP_FREED_MEMORY):  # as the actors have it
        for process in processes:
            process.start()
    found = [results.get() for _ in processes]
    for process in processes:
        process.join()
    shares = [share for _, _, share in found]
    return sum(images for images, _, _ in found) / max(s for _, s, _ in found), sum(shares) / len(shares)


def bare_loop(job: Job, number: int, start: Any, results: Any) -> None:
    from tasks.encoder import Encoder

    os.nice(int(os.environ.get("RAY_worker_niceness", "15")))  # noqa: SIM112 - as Ray's workers
    encoder = Encoder(job)
    shards = encoder.context.input("shard")
    part = shards.files("train/")[number]
    row = decode_part(pa.table({"part": [part.path], "made_from": [part.sha256]}), shards, encoder.recipe.image.size)
    _, _, pixels = decoded(shards, part.path, encoder.recipe.image.size)
    batches = [images.clone() for _, images in encoder._batches(pixels)]
    with torch.inference_mode():
        for measured in (False, True):  # the first round warms up
            start.wait()
            started, cpu = time.perf_counter(), time.process_time()
            for images in batches * (ROUNDS if measured else 1):
                encoder.autoencoder.encode(images)
                if encoder.foundation is not None:
                    features = encoder.foundation(images)
                    if encoder.semantic_vae is not None:
                        encoder.semantic_vae.encode(features)
    count = ROUNDS * len(batches) * encoder.batch
    seconds, bare = time.perf_counter() - started, (time.process_time() - cpu) / count
    cpu = time.process_time()
    encoder.write_part({name: row[name][0] for name in row.column_names})
    whole = (time.process_time() - cpu) / len(pixels)
    results.put((count, seconds, bare / whole))


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", type=int, nargs="*", default=[10_000, 70_000], help="images of both splits")
    options.add_argument("--bare-rows", type=int, default=4_000, help="images of the comparison with the bare loop")
    options.add_argument("--recipe", default="demo")
    chosen = options.parse_args()
    result: dict[str, float] = {"cores": os.cpu_count() or 1}
    with tempfile.TemporaryDirectory() as root:
        for rows in chosen.rows:
            artifact, mib = memory(limited(chosen.recipe, rows, "shard.rows_per_shard=1000"), root)
            seconds = timed(artifact)
            result[f"peak_mib_{rows // 1000}k"] = round(mib)
            result[f"images_per_second_{rows // 1000}k"] = round(artifact.manifest.rows / seconds["whole"], 1)
            result["decode_share"] = round(seconds["decode"] / (seconds["decode"] + seconds["encode"]), 3)
            print(f"{artifact.manifest.rows} images: {seconds}, {mib:.0f} MiB", flush=True)
        result |= speed(limited(chosen.recipe, chosen.bare_rows, *HEAVY), root)
    print(json.dumps(result))


if __name__ == "__main__":
    main()
