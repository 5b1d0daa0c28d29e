"""What alignment, the Semantic VAE and both together buy: the experiment of docs/tokenizers.md.

    python -m benchmarks.tokenizers [--folder F] [--seeds 3] [--scale 1] [--write docs/tokenizers.md]

On Fashion-MNIST and on patches of scikit-image's photographs, all at 32 × 32, with equal budgets and several seeds:
the tokenizer with and without alignment; the Semantic VAE against PCA; and a small diffusion model on the latents of
each Fashion-MNIST tokenizer. Everything goes through the project's own training loop and scores, in this process and
without Ray. What is done is kept in the folder, so the same command goes on where it was stopped. The tables are
written over the part of the page between its two marks, and the last line is one JSON object.
"""

from __future__ import annotations

import argparse
import io
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from functools import partial
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from configs import Recipe, load_recipe
from infra.artifacts import Artifact, Manifest, library_versions, timestamp
from tasks import encode, train_dit, train_semvae, train_vavae
from tasks.decode import center_crop
from tasks.encoder import Encoder
from tasks.examine import Examiner
from tasks.parts import Receipt
from tasks.sample import Sampler
from tasks.sources.fashion_mnist import FashionMnistSource
from tasks.stage import Context, Job, Outcome, Stage, perform
from tasks.training.launch import RESULT, build, export
from tasks.training.loop import Setting, fit
from tasks.training.metrics import Metrics

SIDE = 32
PHOTOGRAPHS = (
    "astronaut.png", "brick.png", "chelsea.png", "coffee.png", "coins.png",
    "grass.png", "gravel.png", "hubble_deep_field.jpg", "ihc.png", "motorcycle_left.png",
)  # fmt: skip
TRAIN, TEST = 4_000, 1_000
BASE = (
    "train_vavae.warmup_images=320",
    "train_vavae.model.base_channels=8",
    "train_vavae.objective.align_weight=0.0",
    "train_semvae.warmup_images=320",
    "encode.align_features=false",
    "train_dit.model.align_depth=null",
    "train_dit.objective.align_weight=0.0",
    "compute.train={workers: 1, engine: plain, checkpoint_every: 3200, log_every: 1600}",
    "compute.actors.actors=1",
)
ALIGNED = (  # the first stage of the published three: w 0.5, no margins (papers.md 1.3)
    "train_vavae.objective.align_weight=0.5",
    "train_vavae.objective.cos_margin=0.0",
    "train_vavae.objective.distance_margin=0.0",
)
DIFFUSION = (
    "train_semvae=null",
    "train_dit.clock={kind: synchronous}",
    "train_dit.warmup_images=640",
    "train_dit.model={hidden_size: 128, depth: 4, heads: 4, align_depth: null, qk_norm: true}",
    "train_dit.objective={semantic_weight: 1.0, align_weight: 0.0}",
    "sample={images: 1000, guidance: {method: none}, steps: 20, batch: 100}",
)
IMAGES = {"train_vavae": 8_000, "train_semvae": 8_000, "train_dit": 16_000}
VARIANTS = {"plain": (), "aligned": ALIGNED}
DATA = ("fashion", "photographs")


@dataclass(frozen=True)
class Trial:
    """One recipe on one data set."""

    root: str
    data: str
    variant: str
    seed: int
    scale: float
    further: tuple[str, ...] = ()

    @property
    def recipe(self) -> Recipe:
        budgets = [f"{section}.images={round(images * self.scale / 64) * 64}" for section, images in IMAGES.items()]
        seeds = [f"{section}.seed={self.seed}" for section in IMAGES]
        return load_recipe("demo", [*BASE, *VARIANTS[self.variant], *budgets, *seeds, *self.further])

    def job(self, stage: Stage, **inputs: str) -> Job:
        prints = {"shard": self.data} | inputs
        prints = {name: value for name, value in prints.items() if name in stage.inputs}
        name, sections = stage.fingerprint(self.recipe, prints)
        return Job(stage.name, name, self.root, self.recipe.model_dump(mode="json"), prints, sections)

    def train(self, stage: Stage, memory: dict[bytes, Tensor], **inputs: str) -> Artifact:
        """The stage's artifact, trained in this process unless it is there."""
        context = Context(self.job(stage, **inputs))
        if not context.artifact.is_complete() and not context.out.exists(RESULT):
            section, compute = import_module(f"tasks.{stage.name}").section(context.recipe), context.recipe.compute
            device = torch.device("cpu")
            metrics = Metrics(stage.name, section.images, compute.train.log_every, context.tracker, device)

            def trainee() -> Any:
                made = build(context)
                if getattr(made, "foundation", None) is not None:
                    made.foundation = Remembered(made.foundation, memory)  # type: ignore[attr-defined]
                return made

            fit(trainee, Setting(context.out, compute.train, device, metrics, partial(export, context)))
        return perform(stage, context.job)


class Remembered:
    """A foundation model that looks at every image once."""

    def __init__(self, model: Any, memory: dict[bytes, Tensor]) -> None:
        self._model, self._memory = model, memory

    def to(self, device: torch.device) -> Remembered:
        return self

    def __call__(self, images_B3HW: Tensor) -> Tensor:
        keys = [image.numpy().tobytes() for image in images_B3HW]
        fresh = [place for place, key in enumerate(keys) if key not in self._memory]
        if fresh:
            found = self._model(images_B3HW[fresh])
            self._memory |= {keys[place]: features for place, features in zip(fresh, found, strict=True)}
        return torch.stack([self._memory[key] for key in keys])


def latents(trial: Trial, tokenizer: Artifact) -> Artifact:
    """What stage `encode` makes, in this process."""
    job = trial.job(encode.STAGE, train_vavae=tokenizer.fingerprint)

    def run(context: Context) -> Outcome:
        encoder, shards = Encoder(job), context.input("shard")
        found: list[Receipt] = []
        for entry in shards.files(suffix=".parquet"):
            part = pa.table({"part": [entry.path], "made_from": [entry.sha256]})
            row = encode.decode_part(part, shards, SIDE)
            found.append(encoder.write_part({name: row[name][0] for name in row.column_names}))
        return encode._outcome(shards, context.recipe, found)

    return perform(Stage("encode", encode.STAGE.version, (), (), run), job)


def sampled(trial: Trial, examiner: Examiner, tokenizer: Artifact, encoded: Artifact, model: Artifact) -> NDArray[Any]:
    """Features of generated images, (N, D)."""
    prints = {each.stage: each.fingerprint for each in (tokenizer, encoded, model)}
    sampler = Sampler(asdict(Job("sample", "none", trial.root, trial.recipe.model_dump(mode="json"), prints, {})))
    count, batch = trial.recipe.sample.images, trial.recipe.sample.batch
    made = [sampler.images(np.arange(start, start + batch)) for start in range(0, count, batch)]
    return features(examiner, np.concatenate([pixels for _, pixels in made]))


def features(examiner: Examiner, pixels_NHW3: NDArray[np.uint8]) -> NDArray[Any]:
    pieces = [pixels_NHW3[start : start + 64] for start in range(0, len(pixels_NHW3), 64)]
    return np.concatenate([examiner.look(np.zeros(len(piece), np.int64), piece).features for piece in pieces])


# ---------------------------------------------------------------------------------------------------------- data


def fashion(split: str, count: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    source = FashionMnistSource()
    listing = source.listing().images.to_pylist()
    rows = [row for row in listing if row["split"] == split]
    for number in np.random.default_rng(0).permutation(len(rows))[:count]:
        row = rows[int(number)]
        image = Image.open(io.BytesIO(source.read(row["file"], row["start"], row["length"]))).convert("RGB")
        yield row["label"], center_crop(image, SIDE)


def photographs(split: str, count: int) -> Iterator[tuple[int, NDArray[np.uint8]]]:
    """Patches at random places: for training of the left four fifths of each photograph, for tests of the rest."""
    import skimage.data

    random = np.random.default_rng({"train": 1, "test": 2}[split])
    for label, name in enumerate(PHOTOGRAPHS):
        photograph = np.asarray(Image.open(Path(skimage.data.__file__).parent / name).convert("RGB"))
        border = photograph.shape[1] * 4 // 5
        photograph = photograph[:, :border] if split == "train" else photograph[:, border:]
        for _ in range(count // len(PHOTOGRAPHS)):
            top, left = (int(random.integers(side - SIDE + 1)) for side in photograph.shape[:2])
            yield label, photograph[top : top + SIDE, left : left + SIDE]


def put_shards(root: str, name: str, source: Callable[[str, int], Iterator[tuple[int, NDArray[np.uint8]]]]) -> Artifact:
    """A `shard` artifact of these images, unless it is there."""
    artifact = Artifact(root, "shard", name)
    if artifact.is_complete():
        return artifact
    files = []
    for split, count in (("train", TRAIN), ("test", TEST)):
        rows = list(source(split, count))
        table = pa.table(
            {
                "key": [f"{split}/{number:05d}" for number in range(len(rows))],
                "label": pa.array([label for label, _ in rows], pa.int32()),
                "image": [_png(pixels) for _, pixels in rows],
            }
        )
        files.append(artifact.storage.write_table(f"{split}/part-00000.parquet", table, rows_per_group=250))
    classes = [str(label) for label in range(10)]
    manifest = Manifest(
        stage="shard",
        stage_version=1,
        fingerprint=name,
        recipe=load_recipe("demo").model_dump(mode="json"),
        sections={},
        inputs={},
        files=tuple(files),
        rows=TRAIN + TEST,
        facts={"classes": classes, "splits": {"train": TRAIN, "test": TEST}, "quarantine": {}, "rows_per_group": 250},
        created=timestamp(),
        libraries=library_versions(),
    )
    artifact.complete(manifest)
    return artifact


def _png(pixels: NDArray[np.uint8]) -> bytes:
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, format="PNG", compress_level=1)
    return buffer.getvalue()


@contextmanager
def alone() -> Iterator[None]:
    """The process group of one that the loop asks for."""
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        yield
    finally:
        dist.destroy_process_group()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--folder", default=".latentforge/tokenizers")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scale", type=float, default=1.0, help="budget of every training, over the usual one")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    root = Path(arguments.folder).absolute().as_uri()
    memory: dict[str, dict[bytes, Tensor]] = {}
    with alone():
        for name, source in (("fashion", fashion), ("photographs", photographs)):
            put_shards(root, name, source)
        for seed in range(arguments.seeds):
            for data in DATA:
                trials = {variant: Trial(root, data, variant, seed, arguments.scale) for variant in VARIANTS}
                for trial in trials.values():
                    trained(train_vavae.STAGE, trial, memory)
                trained(train_semvae.STAGE, trials["plain"], memory)
        for seed in range(arguments.seeds):
            for variant in VARIANTS:
                trial = Trial(root, "fashion", variant, seed, arguments.scale, DIFFUSION)
                tokenizer = trained(train_vavae.STAGE, trial, memory)
                trained(train_dit.STAGE, trial, memory, encode=latents(trial, tokenizer).fingerprint)


def trained(stage: Stage, trial: Trial, memory: dict[str, dict[bytes, Tensor]], **inputs: str) -> Artifact:
    began = time.process_time()
    made = trial.train(stage, memory.setdefault(trial.data, {}), **inputs)
    spent = time.process_time() - began
    if spent > 1:
        print(f"{stage.name} {trial.data} {trial.variant} {trial.seed}: {spent:.0f} s {made.uri}", flush=True)
    return made


if __name__ == "__main__":
    main()
