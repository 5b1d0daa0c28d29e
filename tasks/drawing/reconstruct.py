"""A few images and what the tokenizer makes of them, for people."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from configs.errors import UserError, attempt, checked
from infra.artifacts import Artifact
from infra.cluster import connect
from infra.device import computing, default_device
from tasks.data.pixels import Pixels, to_pixels, to_tensor
from tasks.networks import trained_autoencoder
from tasks.stage import Context

_AT_ONCE = 16


def reconstructed(context: Context, images_BHW3: Pixels) -> Pixels:
    """Reconstructions of posterior means by the input `train_vavae`, made in one Ray task."""
    connect()
    compute = context.recipe.compute.actors
    import ray

    task = ray.remote(_attempted).options(num_cpus=compute.cpus_per_actor, num_gpus=compute.gpus_per_actor)
    given = context.input("train_vavae"), images_BHW3, compute.cpus_per_actor
    again: Pixels | UserError = ray.get(task.remote(*given))
    return checked(again)


def _attempted(*given: Any) -> Pixels | UserError:
    return attempt(lambda: _reconstruct(*given))


@torch.inference_mode()
def _reconstruct(tokenizer: Artifact, images_BHW3: Pixels, threads: int) -> Pixels:
    torch.set_num_threads(threads)
    network = trained_autoencoder(tokenizer).to(device := default_device())
    pieces = to_tensor(images_BHW3).split(_AT_ONCE)
    with computing("tf32", device):  # for people, who see 8 bits
        return np.concatenate([to_pixels(network.decode(network.encode(x.to(device)).mean)) for x in pieces])
