"""The networks of stage `encode` in one process: pixels of a shard in, a part of latents and its receipt out."""

from __future__ import annotations

import pickle
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from threading import Lock
from typing import Any, Self

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from configs import Recipe, UserError
from configs.errors import attempt, checked
from infra.artifacts import Artifact
from infra.device import computing, default_device
from infra.storage import Storage
from models.posterior import DiagonalGaussian
from tasks.data.pixels import to_tensor
from tasks.data.receipts import Receipt, receipt_row, write_receipt
from tasks.data.statistics import ChannelSums
from tasks.data.tensors import FLIP, WRITE_OPTIONS, latent_table
from tasks.networks import check_grid, load_foundation, ready, trained_autoencoder, trained_semantic_vae
from tasks.randomness import key_noise
from tasks.stage import Context, Job

DEVIATION = "_std"
"""Suffix of the column with a posterior's standard deviation, beside that of its mean (`encode.posterior: moments`)."""
COLUMNS = tuple(name + suffix for name in ("z", "z" + DEVIATION, "s", "s" + DEVIATION, "f") for suffix in ("", FLIP))
"""Every tensor column a part can have, in its order."""


class EncoderActor:
    """An :class:`Encoder` in an actor, whose errors come out as values, those of its construction too."""

    def __init__(self, job: Job) -> None:
        self._encoder = attempt(lambda: Encoder(job))

    def __call__(self, shard: pa.Table) -> pa.Table:
        """One row of `decode_part` in, the row of one receipt out; the part is in storage by then."""
        row = {name: shard[name][0] for name in shard.column_names}
        done = receipt_row(lambda: checked(self._encoder).write_part(row))
        return pa.table({name: [value] for name, value in done.items()})


class LatentNetworks:
    """The frozen networks that make latents of images: the tokenizer, and where the recipe has one the Semantic VAE, on
    the foundation model's features.

    made: gives the artifact of `train_vavae`, and of `train_semvae` where there is one.
    compiled: their blocks are, for images of one size in batches of one size.

    Raises UserError where one cannot be loaded, or features do not lie on the latents' grid.
    """

    def __init__(self, recipe: Recipe, made: Callable[[str], Artifact], device: torch.device, compiled: bool) -> None:
        self.recipe, self.device, self._layout = recipe, device, layout(device, compiled)
        self._compiled, precision = compiled, recipe.encode.precision
        autoencoder = trained_autoencoder(made("train_vavae")).to(device).to(memory_format=self._layout)
        self.autoencoder = ready(autoencoder, compiled, precision)
        self.foundation: Any = None
        self.semantic_vae: Any = None
        if recipe.train_semvae is not None:
            self.semantic_vae = ready(self._placed(trained_semantic_vae(made("train_semvae"))), compiled)
        if recipe.foundation is not None and (self.semantic_vae or recipe.encode.align_features):
            self.foundation = self._placed(load_foundation(recipe.foundation))
            check_grid(self.foundation, recipe)
            self.foundation = ready(self.foundation, compiled, precision)

    def to(self, device: torch.device) -> Self:
        """All of them on a device, which may be where they are."""
        if device != self.device:
            self.device, self._layout = device, layout(device, self._compiled)
            self.autoencoder.to(device).to(memory_format=self._layout)
            for network in filter(None, (self.foundation, self.semantic_vae)):
                network.to(device)
        return self

    def posteriors(self, images_B3HW: Tensor) -> tuple[dict[str, DiagonalGaussian], Tensor | None]:
        """float32 posteriors by column, of images in [-1, 1], and features where there is a foundation model."""
        found = {"z": self.autoencoder.encode(images_B3HW.contiguous(memory_format=self._layout))}
        features = None if self.foundation is None else self.foundation(images_B3HW)
        if self.semantic_vae is not None:
            found["s"] = self.semantic_vae.encode(features)
        return {name: DiagonalGaussian(posterior.moments.float()) for name, posterior in found.items()}, features

    def _placed(self, network: Any) -> Any:
        return network.to(self.device, memory_format=torch.channels_last)


class Encoder(LatentNetworks):
    """Loads the stage's networks once, then encodes one decoded shard after the other.

    Calls may come from several threads: one part at a time is on the device, while another is written to storage.
    """

    def __init__(self, job: Job) -> None:
        self.context = Context(job)
        compute = self.context.recipe.compute.actors
        torch.set_num_threads(compute.cpus_per_actor)
        self.batch = compute.batch
        device = default_device() if compute.gpus_per_actor else torch.device("cpu")
        self._turn = Lock()
        self.uploads: Any = None
        if device.type == "cuda":
            self.uploads = torch.cuda.Stream(device)
            torch.backends.cudnn.deterministic = True  # a part is the same bytes whenever it is made
        super().__init__(self.context.recipe, self.context.input, device, compute.compile)

    def write_part(self, row: dict[str, Any]) -> Receipt:
        """Encode one decoded shard and write its part.

        Raises:
            UserError: the shard did not decode, or latents are not finite.
        """
        checked(pickle.loads(row["error"].as_py()))
        keys, labels = row["keys"].as_py(), row["labels"].values.to_numpy()
        size = self.recipe.image.size
        pixels = np.frombuffer(row["pixels"].as_buffer(), np.uint8).reshape(len(keys), size, size, 3)
        with self._turn:
            started = time.perf_counter()
            tensors = self.encode(keys, pixels)
        seconds = {"decode": row["seconds"].as_py(), "encode": time.perf_counter() - started}
        job = {name: row[name].as_py() for name in ("part", "made_from")}
        return written_part(self.recipe, self.context.out, job, keys, labels, tensors, seconds)

    def encode(self, keys: Sequence[str], pixels_NHWC: np.ndarray) -> dict[str, np.ndarray]:
        """float16 columns (N, C, h, w) by name, for the images as they are and, where that is stored, mirrored."""
        columns: dict[str, Tensor] = {}
        for start, images_B3HW in self._batches(pixels_NHWC):
            batch_keys = keys[start : start + self.batch]
            rows = slice(start, start + len(batch_keys))
            views = {"": images_B3HW}
            if self.recipe.image.flips and not self.recipe.online_latents:  # statistics are of images as they are
                views[FLIP] = images_B3HW.flip(-1)
            for suffix, view in views.items():
                for name, values in self._networks(view, batch_keys, suffix).items():
                    if name + suffix not in columns:
                        shape = (len(keys), *values.shape[1:])
                        # Pinned, so that copies from the device do not wait for it and the next batch is queued.
                        columns[name + suffix] = torch.empty(shape, dtype=torch.half, pin_memory=bool(self.uploads))
                    columns[name + suffix][rows].copy_(values[: len(batch_keys)].half(), non_blocking=True)
        if self.uploads is not None:
            torch.cuda.synchronize(self.device)
        found = {name: columns[name].numpy() for name in COLUMNS if name in columns}
        for name, stored in found.items():
            if not np.isfinite(stored).all():
                raise UserError(
                    f"latent column {name!r} has values that float16 cannot hold: check its network's training"
                )
        return found

    @torch.inference_mode()
    def _networks(self, images_B3HW: Tensor, keys: Sequence[str], suffix: str) -> dict[str, Tensor]:
        with computing(self.recipe.encode.precision, self.device):
            return self._found(images_B3HW, keys, suffix)

    def _found(self, images_B3HW: Tensor, keys: Sequence[str], suffix: str) -> dict[str, Tensor]:
        posteriors, features = self.posteriors(images_B3HW)
        found: dict[str, Tensor] = {}
        for name, posterior in posteriors.items():
            found |= self._stored(name, posterior, keys, suffix)
        if self.recipe.encode.align_features and features is not None:
            found["f"] = features
        return found

    def _stored(self, name: str, posterior: DiagonalGaussian, keys: Sequence[str], suffix: str) -> dict[str, Tensor]:
        """What `encode.posterior` asks to be stored of a batch's posteriors."""
        kind = self.recipe.encode.posterior
        if kind == "mean":
            return {name: posterior.mean}
        if kind == "moments":
            return {name: posterior.mean, name + DEVIATION: posterior.std}
        noise = np.zeros(posterior.mean.shape, np.float32)  # rows that only fill up the batch stay zero
        noise[: len(keys)] = key_noise(self.recipe.encode.seed, keys, name + suffix, posterior.mean.shape[1:])
        return {name: posterior.sample(self._uploaded(torch.from_numpy(noise)))}

    def _batches(self, pixels_NHWC: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """Batches in [-1, 1], all of one static size: the last is filled up with its own last image."""
        for start in range(0, len(pixels_NHWC), self.batch):
            chosen = pixels_NHWC[start : start + self.batch]
            if len(chosen) < self.batch:
                chosen = np.concatenate([chosen, np.repeat(chosen[-1:], self.batch - len(chosen), axis=0)])
            pixels = self._uploaded(torch.from_numpy(np.array(chosen)))  # owned memory: the shard's is read-only
            yield start, to_tensor(pixels)

    def _uploaded(self, values: Tensor) -> Tensor:
        """On the device. Copies to an accelerator have a stream of their own: they run beside the last batch."""
        if self.uploads is None:
            return values
        with torch.cuda.stream(self.uploads):
            moved = values.pin_memory().to(self.device, non_blocking=True)
        compute = torch.cuda.current_stream(self.device)
        compute.wait_stream(self.uploads)
        moved.record_stream(compute)
        return moved


def written_part(
    recipe: Recipe,
    out: Storage,
    job: Mapping[str, str],
    keys: Sequence[str],
    labels: np.ndarray,
    tensors: Mapping[str, np.ndarray],
    seconds: Mapping[str, float],
) -> Receipt:
    """Write a part of latents and its receipt.

    job: `part` and `made_from`; seconds: what it took of each kind of worker, empty where nothing was encoded.
    """
    stored = {} if recipe.online_latents else tensors
    entry = out.write_table(
        job["part"], latent_table(keys, labels, stored), recipe.encode.rows_per_group, **WRITE_OPTIONS
    )
    facts = {
        "sums": {name: vars(_sums(name, tensors)) for name in ("z", "s") if name in tensors},
        "averages": {name: _averages(name, tensors) for name in ("z", "s") if name in tensors},
        "shapes": {name: list(values.shape[1:]) for name, values in stored.items()},
        "seconds": dict(seconds),
    }
    receipt = Receipt(entry, job["made_from"], facts)
    write_receipt(out, receipt)
    return receipt


def layout(device: torch.device, compiled: bool) -> torch.memory_format:
    """Of the autoencoder's activations. Channels lie side by side for tensor cores and for a CPU; but on CUDA a group
    norm answers with channels apart, so that every block would turn them twice, unless a compiler fuses it."""
    return torch.contiguous_format if device.type == "cuda" and not compiled else torch.channels_last


def _averages(name: str, tensors: Mapping[str, np.ndarray]) -> dict[str, dict[str, Any]]:
    """Sums of what coarser resolutions of a cascade see, by side; none where moments are stored, which none sees."""
    if name + DEVIATION in tensors:
        return {}
    return {str(side): vars(sums) for side, sums in ChannelSums.of_averages(tensors[name]).items()}


def _sums(name: str, tensors: Mapping[str, np.ndarray]) -> ChannelSums:
    """Of what training sees: where moments are stored, of samples drawn from them."""
    sums = ChannelSums.of(tensors[name])
    if name + DEVIATION not in tensors:
        return sums
    spread = ChannelSums.of(tensors[name + DEVIATION]).squares
    return ChannelSums(sums.count, sums.total, [a + b for a, b in zip(sums.squares, spread, strict=True)])
