"""The networks of stage `encode` in one process: pixels of a shard in, a part of latents and its receipt out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from configs import UserError
from models.posterior import DiagonalGaussian
from tasks.latents import FLIP, WRITE_OPTIONS, Sums, latent_table
from tasks.networks import default_device, load_foundation, trained_autoencoder, trained_semantic_vae
from tasks.parts import Receipt, receipt_row, write_receipt
from tasks.stage import Context, Job


class Encoder:
    """An actor of the stage. Loads its networks once; every call encodes one decoded shard."""

    def __init__(self, job: Job) -> None:
        self.context = Context(job)
        self.recipe = self.context.recipe
        compute = self.recipe.compute.actors
        torch.set_num_threads(compute.cpus_per_actor)
        self.batch = compute.batch
        self.device = default_device() if compute.gpus_per_actor else torch.device("cpu")
        self.autoencoder = self._placed(trained_autoencoder(self.context.input("train_vavae")))
        self.foundation: Any = None
        self.semantic_vae: Any = None
        if self.recipe.train_semvae is not None:
            self.semantic_vae = self._placed(trained_semantic_vae(self.context.input("train_semvae")))
        if self.recipe.foundation is not None and (self.semantic_vae or self.recipe.encode.align_features):
            self.foundation = self._placed(load_foundation(self.recipe.foundation))
            self._check_grids()

    def __call__(self, shard: pa.Table) -> pa.Table:
        """One row of `decode_part` in, the row of one receipt out; the part is in storage by then."""
        done = receipt_row(lambda: self.write_part({name: shard[name][0] for name in shard.column_names}))
        return pa.table({name: [value] for name, value in done.items()})

    def write_part(self, row: dict[str, Any]) -> Receipt:
        """Encode one decoded shard and write its part.

        Raises:
            UserError: the shard did not decode, or latents are not finite.
        """
        if row["error"].as_py():
            raise UserError(row["error"].as_py())
        keys, labels = row["keys"].as_py(), row["labels"].values.to_numpy()
        size = self.recipe.image.size
        pixels = np.frombuffer(row["pixels"].as_buffer(), np.uint8).reshape(len(keys), size, size, 3)
        tensors = self.encode(keys, pixels)
        out, part = self.context.out, row["part"].as_py()
        entry = out.write_table(
            part, latent_table(keys, labels, tensors), self.recipe.encode.rows_per_group, **WRITE_OPTIONS
        )
        facts = {
            "sums": {name: vars(Sums.of(tensors[name])) for name in ("z", "s") if name in tensors},
            "shapes": {name: list(values.shape[1:]) for name, values in tensors.items()},
        }
        receipt = Receipt(entry, row["made_from"].as_py(), facts)
        write_receipt(out, receipt)
        return receipt

    def encode(self, keys: list[str], pixels_NHWC: np.ndarray) -> dict[str, np.ndarray]:
        """float16 columns (N, C, h, w) by name, for the images as they are and, where the recipe allows, mirrored."""
        columns: dict[str, list[Tensor]] = {}
        for start, images_B3HW in self._batches(pixels_NHWC):
            batch_keys = keys[start : start + self.batch]
            views = {"": images_B3HW, FLIP: images_B3HW.flip(-1)} if self.recipe.image.flips else {"": images_B3HW}
            for suffix, view in views.items():
                for name, values in self._networks(view, batch_keys, suffix).items():
                    kept = values[: len(batch_keys)].half().to("cpu", non_blocking=True)
                    columns.setdefault(name + suffix, []).append(kept)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        order = [name + suffix for name in ("z", "s", "f") for suffix in ("", FLIP)]
        found = {name: torch.cat(columns[name]).numpy() for name in order if name in columns}
        for name, stored in found.items():
            if not np.isfinite(stored).all():
                raise UserError(
                    f"latent column {name!r} has values that float16 cannot hold: check its network's training"
                )
        return found

    @torch.inference_mode()
    def _networks(self, images_B3HW: Tensor, keys: list[str], suffix: str) -> dict[str, Tensor]:
        found = {"z": self._drawn(self.autoencoder.encode(images_B3HW), keys, "z" + suffix)}
        if self.foundation is not None:
            features = self.foundation(images_B3HW)
            if self.semantic_vae is not None:
                found["s"] = self._drawn(self.semantic_vae.encode(features), keys, "s" + suffix)
            if self.recipe.encode.align_features:
                found["f"] = features
        return found

    def _drawn(self, posterior: DiagonalGaussian, keys: list[str], column: str) -> Tensor:
        if self.recipe.encode.posterior == "mean":
            return posterior.mean
        noise = torch.zeros(posterior.mean.shape)
        for row, key in enumerate(keys):
            noise[row] = torch.from_numpy(key_noise(self.recipe.encode.seed, key, column, posterior.mean.shape[1:]))
        return posterior.sample(noise.to(self.device, non_blocking=True))

    def _batches(self, pixels_NHWC: np.ndarray) -> Iterator[tuple[int, Tensor]]:
        """Batches in [-1, 1], all of one static size: the last is filled up with its own last image."""
        cuda = self.device.type == "cuda"
        for start in range(0, len(pixels_NHWC), self.batch):
            chosen = pixels_NHWC[start : start + self.batch]
            if len(chosen) < self.batch:
                chosen = np.concatenate([chosen, np.repeat(chosen[-1:], self.batch - len(chosen), axis=0)])
            pixels = torch.from_numpy(np.array(chosen))  # owned memory: the shard's is read-only
            pixels = pixels.pin_memory().to(self.device, non_blocking=True) if cuda else pixels
            yield start, pixels.permute(0, 3, 1, 2).float().div_(127.5).sub_(1.0)

    def _placed(self, network: Any) -> Any:
        return network.to(self.device, memory_format=torch.channels_last)

    def _check_grids(self) -> None:
        grid, latent = self.foundation.grid(self.recipe.image.size), self.recipe.latent_size
        if grid != latent:
            raise UserError(
                f"foundation features form a {grid} × {grid} grid but latents are {latent} × {latent}: set "
                "foundation.input_size or foundation.layer so that the two agree"
            )


def key_noise(seed: int, key: str, column: str, shape: torch.Size | tuple[int, ...]) -> np.ndarray:
    """Standard normal float32 noise that belongs to one image and column, whoever draws it and when.

    Our choice: a counter-based generator (Philox) keyed by a hash of (seed, column, key).
    """
    name = json.dumps([seed, column, key]).encode()
    counter = int.from_bytes(hashlib.blake2b(name, digest_size=16).digest(), "little")
    return np.random.Generator(np.random.Philox(key=counter)).standard_normal(tuple(shape), dtype=np.float32)
