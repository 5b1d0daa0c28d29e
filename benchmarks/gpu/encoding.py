"""What `encode` and `sample` run around the diffusion network, and a step of the tokenizer's training."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from safetensors.torch import save
from torch import Tensor, nn

from benchmarks.gpu.records import Records
from benchmarks.gpu.steps import recipe_of
from benchmarks.tokenizer_step import Side
from benchmarks.tokenizers.data import put_shards
from configs import Recipe, load_recipe
from infra.artifacts import Artifact, Manifest
from infra.device import autocast, set_precision
from models.autoencoder import AutoencoderKL
from models.flops import decoder_flops, encoder_flops
from models.foundation import FoundationModel
from tasks.encoder import Encoder, layout
from tasks.networks import WEIGHTS, build_autoencoder, build_semantic_vae, ready
from tasks.stage import Context, Job

SFD = "sfd_xl_80ep"
_SMALL = (
    "image.size=64", "foundation.name=vit_tiny_patch16_224", "foundation.input_size=64",
    "foundation.feature_dim=192", "train_vavae.model.base_channels=32",
    "train_vavae.model.blocks_per_level=1",
    "train_semvae.model={width: 48, depth: 1, heads: 4, channels: 16}",
)  # fmt: skip

_OWN = (
    "foundation.weights=random", "train_vavae.pretrained=null", "train_semvae.pretrained=null",
    *(f"{stage}.{field}" for stage in ("train_vavae", "train_semvae")
      for field in ("images=8", "batch=8", "learning_rate=1.0e-4")),
)  # fmt: skip
"""Networks of the recipe's sizes, with weights of nobody."""


def encoding(records: Records, scratch: str) -> None:
    """Autoencoder and foundation model by precision, the stage's own encoder, and the tokenizer's step."""
    batch, device, small = (2 if records.small else 64), records.device, records.small
    changes = (*_SMALL, "compute.actors.compile=false") if small else ()
    recipe = recipe_of(SFD, 8, 512, small, f"compute.actors.batch={batch}", *_OWN, *changes)
    size = recipe.image.size
    images = torch.rand(batch, 3, size, size, device=device) * 2 - 1
    z = torch.randn(batch, recipe.train_vavae.model.z_channels, size // 16, size // 16, device=device)

    def tokenizer() -> AutoencoderKL:
        return build_autoencoder(recipe.train_vavae.model).requires_grad_(False).eval().to(device)

    def rate(name: str, run: Callable[[], Tensor], flops: float, exact: Tensor | None) -> Tensor:
        found: list[Tensor] = []
        first = records.first(lambda: found.append(run().float()))
        speed = batch / records.seconds(run, 5, 1)
        error = 0.0 if exact is None else float((found[0] - exact).norm() / exact.norm())
        records.figure(f"encoding/{name}", speed)
        tflops = round(speed * flops / 1e12, 1)
        records.note(f"encoding/{name}", tflops=tflops, error=error, first_s=round(first, 1))
        return found[0]

    @torch.inference_mode()
    def autoencoder(compiled: bool) -> None:
        net = tokenizer()
        work = encoder_flops(net, size), decoder_flops(net, size)
        exact: list[Tensor | None] = [None, None]
        suffix = "_compiled" if compiled else ""
        for precision in ("bf16",) if compiled else ("fp32", "tf32", "bf16"):
            set_precision(precision)
            if precision == "bf16":
                ready(net, compiled, precision)  # in place
            form = layout(device, compiled)
            net.to(memory_format=form)

            def run(part: int, precision: str = precision, form: Any = form) -> Tensor:
                with autocast(precision, device):
                    if part == 0:
                        return net.encode(images.contiguous(memory_format=form)).mean
                    return net.decode(z)

            for part, name in enumerate(("encoder", "decoder")):
                found = rate(f"{name}_{precision}{suffix}", lambda: run(part), work[part], exact[part])  # noqa: B023
                exact[part] = found if precision == "fp32" else exact[part]

    @torch.inference_mode()
    def foundation() -> None:
        assert recipe.foundation is not None
        section = recipe.foundation
        net = FoundationModel(section.name, input_size=section.input_size).to(device).eval()
        tokens, width, depth = 261, 768, 12
        work = depth * (2 * tokens * 12 * width**2 + 4 * tokens**2 * width)
        exact = None
        for precision in ("fp32", "tf32", "bf16"):
            set_precision(precision)
            if precision == "bf16":
                ready(net, False, precision)

            def run(precision: str = precision) -> Tensor:
                with autocast(precision, device):
                    found: Tensor = net(images)
                return found

            found = rate(f"foundation_{precision}", run, 0.0 if small else work, exact)
            exact = found if exact is None else exact

    def whole() -> None:
        """The stage's own encoder on decoded images, from pixels on the host to columns on the host."""
        encoder = Encoder(_job(recipe, scratch))
        count = 2 * batch if small else 6 * batch
        pixels = np.random.default_rng(0).integers(0, 256, (count, size, size, 3), dtype=np.uint8)
        keys = [str(number) for number in range(count)]
        first = records.first(lambda: encoder.encode(keys[:batch], pixels[:batch]))
        seconds = records.first(lambda: encoder.encode(keys, pixels))
        records.figure("encoding/views", count / seconds)
        records.note("encoding/views", first_s=round(first, 1), gb=round(records.peak_gb(), 1))

    for name, run, need in (
        ("autoencoder", lambda: autoencoder(False), 12.0), ("foundation", foundation, 6.0),
        ("views", whole, 25.0),
    ):  # fmt: skip
        records.attempt(f"encoding/{name}", run, need)
    quick = (f"compute.train.compile={not small}", "compute.train.channels_last=true")
    for name, changes in (
        ("tokenizer_tf32", ("train_vavae.precision=tf32",)),
        ("tokenizer_bf16", ("train_vavae.precision=bf16",)),
        ("tokenizer", ("train_vavae.precision=bf16", *quick)),
    ):
        name, need = f"encoding/{name}", 40 if changes[1:] else 10
        records.attempt(name, partial(_tokenizer, records, scratch, name, *changes), need)
    records.attempt("encoding/autoencoder_compiled", lambda: autoencoder(True), 35)


def _job(recipe: Recipe, root: str) -> Job:
    """A job of `encode` on random networks."""
    assert recipe.foundation is not None and recipe.train_semvae is not None
    networks: dict[str, nn.Module] = {
        "train_vavae": build_autoencoder(recipe.train_vavae.model),
        "train_semvae": build_semantic_vae(recipe.train_semvae.model, recipe.foundation.feature_dim),
    }
    values = recipe.model_dump(mode="json")
    for stage, network in networks.items():
        artifact = Artifact(root, stage, "random")
        entry = artifact.storage.write_bytes(WEIGHTS, save(network.state_dict()))
        artifact.complete(Manifest(stage, 1, "random", values, {}, {}, (entry,), 0, {}))
    return Job("encode", "random", root, values, dict.fromkeys(networks, "random"), {})


def _tokenizer(records: Records, scratch: str, name: str, *changes: str) -> None:
    """A step of the published VA-VAE with all that it has: LPIPS, DINOv2-L beside it, its discriminator."""
    recipe = load_recipe("vavae_tiny" if records.small else "vavae_f16d32", [
        f"train_vavae.batch={2 if records.small else 8}", "train_vavae.objective.gan_start=0",
        "train_vavae.stages=[]", "train_vavae.objective.lpips_weights=random",
        "foundation.weights=random", "compute.train={workers: 1, engine: plain, micro_batch: null}",
        *changes,
    ])  # fmt: skip
    section, size = recipe.train_vavae, recipe.image.size
    set_precision(section.precision, section.foundation_precision)

    def noise(split: str, _count: int) -> Iterator[tuple[int, Any]]:
        random = np.random.default_rng(len(split))
        for _ in range(section.batch):
            yield 0, random.integers(0, 256, (size, size, 3), dtype=np.uint8)

    put_shards(scratch, f"noise{size}", noise)
    shard = {"shard": f"noise{size}"}
    job = Job("train_vavae", name, scratch, recipe.model_dump(mode="json"), shard, {})
    side = Side(recipe, Context(job), records.device)
    records.figure(name, section.batch / records.steady(lambda: side.turn(1), 5, 2))
    first, gb = round(side.first_seconds, 1), round(records.peak_gb(), 1)
    records.note(name, first_s=first, gb=gb, places=records.waits(lambda: side.turn(1)))
