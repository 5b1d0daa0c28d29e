"""A real training: LightningDiT on 28 × 28 clothes, four by four pixels of which are the channels of one cell."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.loop import trained
from benchmarks.gpu.records import Left, Records
from benchmarks.gpu.steps import recipe_of
from benchmarks.gpu.training import COMPILED, EAGER, XL
from configs import Recipe
from infra.artifacts import Artifact, Manifest
from infra.device import autocast, set_precision
from tasks.data.statistics import ChannelSums, LatentStatistics, statistics_hash
from tasks.data.tensors import WRITE_OPTIONS, latent_table
from tasks.drawing.pictures import grid, png
from tasks.networks import build_network
from tasks.sampling.integrator import Integrator
from tasks.sampling.per_image import image_noise

CHANGES = (
    "image.size=32", "image.flips=false", "data.classes=10",
    "train_vavae.pretrained=null", "train_vavae.images=1", "train_vavae.batch=1",
    "train_vavae.learning_rate=1.0e-4",
    "train_vavae.model={base_channels: 32, channel_multipliers: [1, 1, 1], z_channels: 16, attention_levels: []}",
    "train_dit.learning_rate=1.0e-3", "train_dit.ema_decay=0.995", "train_dit.warmup_images=2000",
    "train_dit.model.qk_norm=true", "train_dit.clip_norm=1.0", "train_dit.schedule=cosine",
    "train_dit.decay_share=0.4", "sample.guidance={method: classifier_free, scale: 2.0}",
    "sample.steps=20", "sample.shift=0", "sample.off_by_one=false",
)  # fmt: skip
FILE = "fashion.npz"
"""Beside the code, as `--pack` leaves it."""


def fashion(records: Records, scratch: str) -> None:
    """Trained for 45 seconds, 1,000 samples judged by a small classifier of the same images, and a picture."""
    data, device = clothes(), records.device
    if records.small:
        data = {name: values[:512] for name, values in data.items()}
    batch, seconds = (16, 0.0) if records.small else (256, min(45.0, records.left - 25))
    if seconds < 15 and not records.small:
        raise Left(f"a training and its samples need 40 s, {max(records.left, 0):.0f} left")
    set_precision("bf16")
    root = f"{scratch}/fashion"
    statistics = _latents(root, data["train_x"], data["train_y"])
    size = (EAGER,) if records.small else (COMPILED, "train_dit.model.size=S")

    def recipe_for(images: int) -> Recipe:
        return recipe_of(XL, batch, images, records.small, *CHANGES, *size)

    # The speed is measured first, for the training is as long as there is time.
    _, points = trained(records, recipe_for(batch * (2 if records.small else 30)), root, made_before=True)
    speed = points["images_per_second"][-1]
    recipe = recipe_for(batch * (6 if records.small else max(100, int(speed * seconds / batch))))
    Artifact(root, "train_dit", "run").discard()
    weights, points = trained(records, recipe, root, made_before=True)
    records.figure("fashion/speed", speed)
    losses = points["loss/velocity"]
    records.note("fashion/loss", images=recipe.train_dit.images, first=losses[0], last=losses[-1])
    levels, labels = _samples(records, recipe, weights, statistics)
    shown = levels[:100].permute(0, 2, 3, 1).expand(-1, -1, -1, 3).cpu().numpy()
    (records.folder / "fashion.png").write_bytes(png(grid(shown, columns=10)))
    judge = _judge(data, device, 10 if records.small else 800)
    test, answers = (torch.tensor(data[name], device=device) for name in ("t10k_x", "t10k_y"))
    records.note("fashion/judge", accuracy=_share(judge, test[:, None], answers))
    records.figure("fashion/consistency", _share(judge, levels, labels))


def clothes() -> dict[str, np.ndarray]:
    """uint8 images (N, 28, 28) and labels (N,) of both splits: from beside the code, else from the usual places."""
    beside = Path(__file__).parent / FILE
    if beside.is_file():
        return dict(np.load(beside))
    from tasks.sources.fashion_mnist import _folder, _images, _labels

    try:
        place = _folder(None)
    except Exception as error:
        raise Left(f"no Fashion-MNIST: {str(error)[:150]}") from None
    return {
        f"{split}_{letter}": read(place, name)
        for split, name in (("train", "train"), ("t10k", "test"))
        for letter, read in (("x", _images), ("y", _labels))
    }


def _latents(root: str, images: np.ndarray, labels: np.ndarray) -> dict[str, Any]:
    """Pixels as an `encode` artifact; statistics of its one column."""
    pixels = np.pad(images, ((0, 0), (2, 2), (2, 2))).astype(np.float32) / 127.5 - 1
    cells = F.pixel_unshuffle(torch.from_numpy(pixels)[:, None], 4).numpy().astype(np.float16)
    made = Artifact(root, "encode", "benchmark")
    table = latent_table([str(n) for n in range(len(cells))], labels.astype(np.int64), {"z": cells})
    entry = made.storage.write_table("train/part-00000.parquet", table, 256, **WRITE_OPTIONS)
    statistics = {"z": ChannelSums.of(cells).mean_and_std()}
    facts = {
        "statistics": statistics,
        "statistics_hash": statistics_hash(statistics),
        "shapes": {"z": list(cells.shape[1:])},
        "rows_per_group": 256,
    }
    made.complete(Manifest("encode", 1, "benchmark", {}, {}, {}, (entry,), len(cells), facts))
    return statistics


def _samples(
    records: Records, recipe: Recipe, weights: dict[str, Tensor], statistics: dict[str, Any]
) -> tuple[Tensor, Tensor]:
    """uint8 (N, 1, 28, 28) and the labels that were asked for."""
    device, wanted = records.device, 20 if records.small else 1000
    with device:
        model: Any = build_network(recipe, recipe.train_dit.model)
    own = {name.removeprefix("model."): value for name, value in weights.items()}
    missing, unexpected = model.load_state_dict(own, strict=False)
    assert not unexpected and set(missing) <= {name for name, _ in model.named_buffers()} | {"pos_embed"}
    integrator = Integrator(recipe, model.requires_grad_(False).eval().to(device))
    labels = torch.arange(wanted, device=device) % 10

    def noise(shape: tuple[int, ...], draw: int) -> Tensor:
        return torch.from_numpy(image_noise(np.arange(wanted), shape, 0, draw)).to(device)

    with torch.inference_mode(), autocast("bf16", device):
        found = integrator(labels, noise).float()
    found = LatentStatistics(statistics).denormalise(found, ["z"])
    pixels = F.pixel_shuffle(found, 4)[:, :, 2:-2, 2:-2]
    return (127.5 * pixels + 128).clamp(0, 255).to(torch.uint8), labels


def _judge(data: dict[str, np.ndarray], device: torch.device, steps: int) -> nn.Module:
    torch.manual_seed(0)
    judge = nn.Sequential(
        nn.Conv2d(1, 32, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Conv2d(32, 64, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2),
        nn.Flatten(), nn.Linear(64 * 49, 128), nn.ReLU(), nn.Linear(128, 10),
    ).to(device)  # fmt: skip
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    images, labels = (torch.tensor(data[name], device=device) for name in ("train_x", "train_y"))
    for _ in range(steps):
        chosen = torch.randint(len(images), (256,), device=device)
        loss = F.cross_entropy(judge(images[chosen, None].float() / 127.5 - 1), labels[chosen].long())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return judge


@torch.no_grad()
def _share(judge: nn.Module, images: Tensor, labels: Tensor) -> float:
    """Share of images that the judge gives these labels."""
    found = judge(images.float() / 127.5 - 1).argmax(1)
    return float((found == labels).float().mean())
