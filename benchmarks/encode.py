"""How fast `encode` is: the whole stage against a bare loop over the same networks, and memory against rows.

    python -m benchmarks.encode [--rows 10000 70000] [--recipe demo]

Networks have random weights of the recipe's sizes (the foundation model its real ones). The last line is one JSON
object. The bare loop runs in one process on preloaded pixels and is multiplied by the number of actors.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import threading
import time

import torch
from safetensors.torch import save

from configs import Recipe, load_recipe
from infra.artifacts import Artifact
from infra.cluster import connect, disconnect
from tasks import encode, shard
from tasks.encode import decoded
from tasks.networks import WEIGHTS, build_autoencoder, build_semantic_vae
from tasks.stage import Context, Job, Outcome, Stage, perform


def made(stage: Stage, recipe: Recipe, root: str, *inputs: Artifact) -> Artifact:
    prints = {artifact.stage: artifact.fingerprint for artifact in inputs}
    name, sections = stage.fingerprint(recipe, prints)
    return perform(stage, Job(stage.name, name, root, recipe.model_dump(mode="json"), prints, sections))


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


def main() -> None:
    options = argparse.ArgumentParser(description=__doc__)
    options.add_argument("--rows", type=int, nargs="+", default=[10_000, 70_000], help="images of both splits")
    options.add_argument("--recipe", default="demo")
    chosen = options.parse_args()
    result: dict[str, float] = {"cores": os.cpu_count() or 1}
    with tempfile.TemporaryDirectory() as root:
        for rows in chosen.rows:
            limit = [f"shard.limit={rows - 10_000 if rows > 20_000 else rows // 2}"]
            recipe = load_recipe(chosen.recipe, limit)
            connect()
            shards = made(shard.STAGE, recipe, root)
            inputs = [shards, *untrained(recipe, root, shards)]
            with PeakMemory() as memory:
                artifact = made(encode.STAGE, recipe, root, *inputs)
            disconnect()
            result[f"peak_mib_{rows // 1000}k"] = round(memory.mib)
            result[f"images_per_second_{rows // 1000}k"] = round(artifact.manifest.rows / artifact.manifest.seconds, 1)
            print(f"{artifact.manifest.rows} images in {artifact.manifest.seconds:.1f} s", flush=True)
        stage_rate = artifact.manifest.rows / artifact.manifest.seconds
        bare, decode = bare_loop(recipe, shards, artifact)
    actors = recipe.compute.actors.actors
    result["vs_bare_loop"] = round(stage_rate / (actors * bare), 3)
    result["decode_share"] = round((1 / decode) / (1 / decode + 1 / bare), 3)
    result["bare_images_per_second_per_actor"] = round(bare, 1)
    result["decode_images_per_second_per_core"] = round(decode, 1)
    print(json.dumps(result))


def bare_loop(recipe: Recipe, shards: Artifact, artifact: Artifact) -> tuple[float, float]:
    """Images/s of the networks alone on preloaded pixels, and of decoding alone, one core each."""
    from tasks.encoder import Encoder

    job = Job(
        "encode", artifact.fingerprint, artifact.root, recipe.model_dump(mode="json"), artifact.manifest.inputs, {}
    )
    encoder = Encoder(job)
    part = shards.files("train/")[0].path
    started = time.perf_counter()
    keys, _, pixels = decoded(shards, part, recipe.image.size)
    decode = len(keys) / (time.perf_counter() - started)
    pixels = pixels[:2_000]
    encoder.encode(keys[:200], pixels[:200])
    started = time.perf_counter()
    with torch.inference_mode():
        for _, images_B3HW in encoder._batches(pixels):
            encoder._networks(images_B3HW, keys[: len(images_B3HW)], "")
    return len(pixels) / (time.perf_counter() - started), decode


if __name__ == "__main__":
    main()
