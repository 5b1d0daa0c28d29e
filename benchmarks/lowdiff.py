"""A cascade against its own finest resolution: quality and images a second of the same weights (docs/lowdiff.md).

    python -m benchmarks.lowdiff [--pixels] [--rival] [--root FOLDER] [--seeds 0 1 2] [--images 32000] [--sampled 600]

Trains one small LowDiff on Fashion-MNIST latents for each seed, on one tokenizer and one set of latents, or with
`--pixels` a UNet on its pixels, 16 × 16, and samples the same labels from it three ways without guidance:

- `base`, the finest resolution alone, whose network is trained to begin without a condition in a share of batches;
- `cascade`, many steps at the coarse resolution and few at the finest;
- `equal`, the finest alone again with as many steps as the cascade has evaluations' worth, because fewer steps are
  the plainest way to be faster.

With `--rival` beside them what a cascade has to beat: `rival/n`, a network that saw the finest resolution alone, for as
many FLOPs of training, sampled by UniPC in n steps, and `cascade/c+f`, the cascade by UniPC too; in pixels `base/n`
by UniPC and `rival/heun`, EDM's sampler. Read score at equal cost and cost at equal score off `effective_evaluations`,
which are in passes at the finest resolution.

All ways take turns batch by batch, so that all feel the same noise; speeds are medians over turns of ratios within
one turn, in CPU time of the process and in wall time, without and with decoding. Scores are against the test split by
EfficientNet-Lite0 and by a small classifier; a difference is taken seed by seed. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import math
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from statistics import mean, median, stdev
from typing import Any

import numpy as np
import torch

from configs import Recipe, load_recipe
from flows.stages import STAGES
from infra.artifacts import Artifact
from infra.cluster import disconnect
from infra.device import default_device
from infra.home import home
from infra.storage import Storage
from tasks.data.images import images
from tasks.data.pixels import Pixels, to_tensor
from tasks.data.portions import SCORING_BATCH
from tasks.data.statistics import LatentStatistics
from tasks.networks import DiffusionNetwork, trained_autoencoder, trained_dit
from tasks.sampling.integrator import Integrator
from tasks.sampling.per_image import image_labels, image_noise
from tasks.sampling.sampler import Decoder
from tasks.scoring import classifier
from tasks.scoring.features import FeatureExtractor, FeatureNetworks, ImageFeatures, PerImageFeatures
from tasks.scoring.score import compare
from tasks.stage import Context, Job, Stage, perform
from tasks.training.flops import flops_per_image
from tasks.training.launch import train

PREPARED = ("shard", "train_vavae", "encode")
TRAINED = (
    "train_semvae=null", "encode.align_features=false", "train_dit.clock={kind: synchronous}",
    "train_dit.objective={semantic_weight: 1.0, align_weight: 0.0}",
    "sample.guidance={method: none}", "sample.stages=[]",
    "evaluate.bootstrap=0", "evaluate.classifier={epochs: 1}",
    "compute.train.workers=1", "compute.train.engine=plain", "compute.train.log_every=6400",
)  # fmt: skip


@dataclass(frozen=True)
class Ground:
    """What is diffused, and the ways to sample it: stages of `sample` by name."""

    recipe: str
    overrides: tuple[str, ...]
    sides: tuple[int, int]
    ways: dict[str, str]
    rivals: dict[str, str]
    multistep: dict[str, str]
    """What `--rival` adds: of the rival, and of the cascade's own weights."""

    def load(self, *overrides: str) -> Recipe:
        return load_recipe(self.recipe, [*TRAINED, *self.overrides, *overrides])

    @property
    def apart(self) -> str:
        """The rival sees one resolution; its network is the cascade's but for the other's entrance."""
        return f"train_dit.cascade={{sides: [{self.sides[-1]}], probabilities: null}}"


def fine(side: int, steps: int, solver: str) -> str:
    return f"[{{side: {side}, solver: {solver}, steps: {steps}}}]"


def both(low: int, high: int, coarse: int, fine: int, solver: str) -> str:
    second = f"{{side: {high}, solver: {solver}, steps: {fine}, augment: 0.1}}"
    return f"[{{side: {low}, solver: {solver}, steps: {coarse}}}, {second}]"


def multistep(low: int, high: int) -> dict[str, str]:
    return {f"cascade/{c}+{f}": both(low, high, c, f, "unipc") for c, f in ((5, 3), (8, 4), (12, 6), (24, 12))}


BASE, EQUAL = 40, 18
LATENTS = Ground(
    "lowdiff_demo",
    (
        "train_dit.model={hidden_size: 128, depth: 6, heads: 4, align_depth: null}",
        "train_dit.cascade={sides: [2, 4], probabilities: [0.3, 0.7], augment: 0.5, condition_dropout: 0.4}",
    ),
    (2, 4),
    {"base": fine(4, BASE, "euler"), "cascade": both(2, 4, 24, 12, "euler"), "equal": fine(4, EQUAL, "euler")},
    {f"rival/{n}": fine(4, n, "unipc") for n in (4, 6, 9, 12, 18)},
    multistep(2, 4),
)
PIXELS = Ground(
    "lowdiff_pixels_tiny",
    (
        "shard={rows_per_shard: 5000, limit: null}",
        "train_dit.batch=32", "train_dit.learning_rate=4.0e-3", "train_dit.decay_share=0.5",
        "train_dit.warmup_images=2000", "train_dit.ema_decay=0.98", "train_dit.optimizer=adamw",
        "train_dit.model={kind: unet, channels: 32, multipliers: [1, 1], blocks: 1, attention: [8]}",
        "train_dit.cascade={sides: [8, 16], probabilities: [0.4, 0.6], augment: 0.5, condition_dropout: 0.2}",
        "sample.batch=100", "evaluate.images=2000", "evaluate.classifier={epochs: 3, width: 32}",
        "compute.train.checkpoint_every=16000",
    ),
    (8, 16),
    {  # EDM's sampler, the cascade of LowDiff's recipe for CIFAR-10, and as many evaluations without it
        "base": fine(16, 18, "heun"),
        "cascade": both(8, 16, 13, 8, "heun"),
        "equal": fine(16, 11, "heun"),
    },
    {f"rival/{n}": fine(16, n, "unipc") for n in (6, 9, 12, 18)} | {"rival/heun": fine(16, 18, "heun")},
    {f"base/{n}": fine(16, n, "unipc") for n in (9, 18)} | multistep(8, 16),
)  # fmt: skip
SCORES = ("frechet", "class_consistency")


@dataclass
class Turns:
    """Seconds of every turn of one way to sample, and what it made."""

    integrating: list[dict[str, float]] = field(default_factory=list)
    decoding: list[dict[str, float]] = field(default_factory=list)
    pixels: list[Pixels] = field(default_factory=list)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=home() / "benchmarks" / "lowdiff")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--images", type=int, default=32_000)
    parser.add_argument("--sampled", type=int, default=600)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--pixels", action="store_true", help="a UNet on pixels, instead of a DiT on latents")
    parser.add_argument("--rival", action="store_true", help="beside them a network of the finest resolution alone")
    parser.add_argument("--prepare", action="store_true", help="make tokenizer and latents, and stop")
    given = parser.parse_args()
    torch.set_num_threads(given.threads)
    root = Storage.at(str(given.root.absolute())).url
    ground = PIXELS if given.pixels else LATENTS
    prepare(root, ground)
    if given.prepare:
        return
    judge, real = standards(root, ground)
    results = [run(root, ground, seed, given, judge, real) for seed in given.seeds]
    print(json.dumps(summary(results, given)))


def job_of(root: str, recipe: Recipe, name: str) -> tuple[Stage, Job]:
    """The job of a stage as the flow would have it."""
    prints: dict[str, str] = {}
    for stage in (stage for stage in STAGES if stage.present(recipe)):
        job = stage.job(recipe, root, {needed: prints[needed] for needed in stage.inputs if needed in prints})
        prints[stage.name] = job.fingerprint
        if stage.name == name:
            return stage, job
    raise ValueError(f"no stage {name}")


def prepare(root: str, ground: Ground) -> None:
    """Tokenizer and latents, once for all seeds, by the stages themselves."""
    for name in PREPARED:
        stage, job = job_of(root, ground.load(), name)
        perform(stage, job)
    disconnect()


def standards(root: str, ground: Ground) -> tuple[classifier.ImageClassifier, ImageFeatures]:
    """The judge of classes, and what the test split looks like to it and to the feature network."""
    recipe = ground.load()
    shards = Artifact(root, "shard", job_of(root, recipe, "shard")[1].fingerprint)
    section = recipe.evaluate.classifier
    assert section is not None
    torch.manual_seed(section.seed)
    judge = classifier.build_classifier(recipe, section)
    for _ in classifier.train(judge, shards, recipe.image.size, section):
        pass
    judge.requires_grad_(False).eval()
    print(f"judge: {classifier.accuracy(judge, shards, recipe.image.size):.3f} of the test split right", flush=True)
    return judge, examined(recipe, judge, list(images(shards, "test", recipe.image.size, recipe.evaluate.images)))


def examined(
    recipe: Recipe, judge: classifier.ImageClassifier, batches: list[tuple[np.ndarray, Pixels]]
) -> ImageFeatures:
    examiner = FeatureExtractor(FeatureNetworks(recipe.image.size, recipe.evaluate.features), torch.get_num_threads())
    found = []
    for labels, pixels in batches:
        for start in range(0, len(labels), SCORING_BATCH):
            rows = slice(start, start + SCORING_BATCH)
            seen = examiner.look(labels[rows], pixels[rows])
            guesses = classifier.predict(judge, to_tensor(pixels[rows]))
            found.append(PerImageFeatures(seen.labels, seen.features, guesses))
    return ImageFeatures.of(PerImageFeatures.joined(found))


def run(
    root: str,
    ground: Ground,
    seed: int,
    given: argparse.Namespace,
    judge: classifier.ImageClassifier,
    real: ImageFeatures,
) -> dict[str, Any]:
    """One network trained, sampled and scored."""
    started = time.process_time()
    recipe = ground.load(f"train_dit.seed={seed}", f"train_dit.images={given.images}", f"sample.seed={seed}")
    models = {"": trained(root, recipe)}
    if given.rival:
        models["rival"] = trained(root, rival_of(ground, recipe, seed))
    print(f"seed {seed}: trained in {time.process_time() - started:.0f} s of CPU time", flush=True)
    turns, evaluations, labels = sampled(root, ground, recipe, models, given.sampled)
    found: dict[str, Any] = {"seed": seed, "evaluations": evaluations, "speed": speeds(turns)}
    for name, each in turns.items():
        scores = compare(
            real,
            examined(recipe, judge, [(labels, np.concatenate(each.pixels))]),
            recipe.evaluate,
            {"features": lambda kind: kind},
            recipe.data.classes,
        )
        found[name] = {score: scores.values[score] for score in SCORES}
    found["cpu_seconds"] = time.process_time() - started
    print(json.dumps(found), flush=True)
    return found


def trained(root: str, recipe: Recipe) -> Artifact:
    """The recipe's diffusion network, trained where it is not there yet."""
    stage, job = job_of(root, recipe, "train_dit")
    artifact = Context(job).artifact
    if not artifact.is_complete():
        perform(replace(stage, run=lambda context: train(context, recipe.train_dit, alone=True)), job)
    return artifact


def rival_of(ground: Ground, recipe: Recipe, seed: int) -> Recipe:
    """The same training on the finest resolution alone: whole batches, for no fewer FLOPs."""
    apart, section = ground.load(ground.apart), recipe.train_dit
    flops = [flops_per_image(each, "train_dit") or 0.0 for each in (recipe, apart)]
    images = section.batch * math.ceil(section.images * flops[0] / flops[1] / section.batch)
    own = f"train_dit.seed={seed}", f"train_dit.images={images}", f"sample.seed={seed}"
    return ground.load(ground.apart, *own)


def sampled(
    root: str, ground: Ground, recipe: Recipe, models: Mapping[str, Artifact], count: int
) -> tuple[dict[str, Turns], dict[str, float], np.ndarray]:
    """As :func:`in_turns`, of trained networks and the labels of all images."""
    device = default_device()
    prints = {name: job_of(root, recipe, name)[1].fingerprint for name in PREPARED}
    tokenizer = trained_autoencoder(Artifact(root, "train_vavae", prints["train_vavae"])).to(device)
    statistics = LatentStatistics.from_facts(Artifact(root, "encode", prints["encode"]).manifest.facts)
    labels = image_labels("balanced", np.arange(count), recipe.data.classes, recipe.sample.seed)
    networks = {name: trained_dit(model, ema=True).to(device) for name, model in models.items()}
    decoder = Decoder(tokenizer, statistics)
    turns, evaluations = in_turns(ground, recipe, networks[""], decoder, labels, rival=networks.get("rival"))
    return turns, evaluations, labels


def in_turns(
    ground: Ground,
    recipe: Recipe,
    network: DiffusionNetwork,
    decoder: Decoder,
    labels: np.ndarray,
    rival: DiffusionNetwork | None = None,
) -> tuple[dict[str, Turns], dict[str, float]]:
    """Every way's turns, batch by batch, and its evaluations per image in units of the finest resolution."""
    device, seed, batch = default_device(), recipe.sample.seed, recipe.sample.batch
    asked = ground.ways if rival is None else ground.ways | ground.multistep
    ways = {name: Integrator(ground.load(f"sample.stages={stages}"), network) for name, stages in asked.items()}
    if rival is not None:
        alone = {name: ground.load(ground.apart, f"sample.stages={stages}") for name, stages in ground.rivals.items()}
        ways |= {name: Integrator(own, rival) for name, own in alone.items()}
    turns = {name: Turns() for name in ways}
    with torch.inference_mode():
        for start in range(-batch, len(labels), batch):  # the first turn warms up
            indices = np.arange(max(start, 0), max(start, 0) + batch)
            wanted = torch.from_numpy(labels[indices]).to(device)

            def noise(shape: tuple[int, ...], draw: int, indices: np.ndarray = indices) -> torch.Tensor:
                return torch.from_numpy(image_noise(indices, shape, seed, draw)).to(device)

            for name, way in ways.items():
                latents, integrating = timed(partial(way, wanted, noise))
                pixels, decoding = timed(lambda latents=latents: decoder(latents).cpu().numpy())
                if start >= 0:
                    turns[name].integrating.append(integrating)
                    turns[name].decoding.append(decoding)
                    turns[name].pixels.append(pixels)
    return turns, {name: way.evaluations()["effective_evaluations"] for name, way in ways.items()}


def timed(do: Callable[[], Any]) -> tuple[Any, dict[str, float]]:
    before = time.process_time(), time.perf_counter()
    found = do()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return found, {"cpu": time.process_time() - before[0], "wall": time.perf_counter() - before[1]}


def speeds(turns: dict[str, Turns]) -> dict[str, dict[str, float]]:
    """How many times as fast as `base` every other way is: `cpu` and `wall`, and the same with decoding."""
    found: dict[str, dict[str, float]] = {}
    base = turns["base"]
    for name, own in turns.items():
        if name == "base":
            continue
        found[name] = {}
        for clock in ("cpu", "wall"):
            pairs = list(zip(base.integrating, own.integrating, base.decoding, own.decoding, strict=True))
            found[name][clock] = median(b[clock] / o[clock] for b, o, _, _ in pairs)
            found[name][f"{clock}_decoded"] = median(
                (b[clock] + db[clock]) / (o[clock] + do[clock]) for b, o, db, do in pairs
            )
    return found


def summary(results: list[dict[str, Any]], given: argparse.Namespace) -> dict[str, Any]:
    """Means over seeds and their standard deviations; differences to `base` are taken seed by seed."""

    def spread(values: list[float]) -> dict[str, float]:
        return {"mean": mean(values), "std": stdev(values) if len(values) > 1 else 0.0}

    ways = list(results[0]["evaluations"])
    scores = {way: {score: spread([each[way][score] for each in results]) for score in SCORES} for way in ways}
    gaps = {
        way: {score: spread([each[way][score] - each["base"][score] for each in results]) for score in SCORES}
        for way in ways[1:]
    }
    speed = {
        way: {kind: mean(each["speed"][way][kind] for each in results) for kind in results[0]["speed"][way]}
        for way in ways[1:]
    }
    return {
        "lowdiff_vs_base": speed["cascade"]["cpu_decoded"],
        "effective_evaluations": results[0]["evaluations"],
        "speed": speed,
        "scores": scores,
        "minus_base": gaps,
        "seeds": given.seeds,
        "images_trained": given.images,
        "images_sampled": given.sampled,
        "cpu_seconds": sum(each["cpu_seconds"] for each in results),
    }


if __name__ == "__main__":
    main()
