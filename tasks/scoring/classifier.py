"""The judge of class consistency: a small convolutional classifier of the train split, an artifact of its own.

It is keyed by the shards, the image section and its own section, so that other guidance, other steps or another
model are judged by the same judge, trained once.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from safetensors.torch import load as load_safetensors
from safetensors.torch import save
from torch import Tensor, nn

from configs import Recipe, UserError
from configs.errors import checked
from configs.scores import Classifier
from configs.section import recorded
from infra.artifacts import Artifact
from infra.cluster import connect
from infra.device import default_device, set_precision
from infra.progress import Bar
from models.checkpoints import TENSORS, stamped
from tasks.data.crops import Crop
from tasks.data.images import images
from tasks.data.pixels import to_tensor
from tasks.data.portions import CLASSIFIER_GRID
from tasks.loading.loader import Loader
from tasks.networks import WEIGHTS
from tasks.stage import Context, Job, Outcome

"""Side of the last feature grid."""


class ImageClassifier(nn.Module):
    """Strided 6 × 6 convolution, then convolution and pooling down to a 4 × 4 grid, then one linear layer.

    size: side of the images; width: the first layer has twice as many channels, doubling at most twice.
    forward: (B, 3, size, size) in [-1, 1] → logits (B, classes). Our choice of network.
    """

    def __init__(self, size: int, classes: int, width: int) -> None:
        super().__init__()
        layers: list[nn.Module] = [*_block(3, 2 * width, kernel=6, stride=2, padding=2), nn.MaxPool2d(2)]
        side, channels = size // 4, 2 * width
        while side > CLASSIFIER_GRID:
            wider = min(2 * channels, 8 * width)
            layers += [*_block(channels, wider), nn.MaxPool2d(2)]
            side, channels = side // 2, wider
        self.features = nn.Sequential(*layers, nn.AdaptiveAvgPool2d(CLASSIFIER_GRID), nn.Flatten())
        self.head = nn.Linear(channels * CLASSIFIER_GRID**2, classes)

    def forward(self, images_B3HW: Tensor) -> Tensor:
        return self.head(self.grid(images_B3HW).flatten(1))

    def grid(self, images_B3HW: Tensor) -> Tensor:
        """What it sees of images: (B, channels, 4, 4)."""
        seen: Tensor = self.features(images_B3HW.contiguous(memory_format=torch.channels_last))
        return seen.unflatten(1, (-1, CLASSIFIER_GRID, CLASSIFIER_GRID))


def build_classifier(recipe: Recipe, section: Classifier) -> ImageClassifier:
    return ImageClassifier(recipe.image.size, recipe.data.classes, section.width)


def trained_classifier(artifact: Artifact) -> ImageClassifier:
    """The network of a `judge` artifact, frozen."""
    recipe = artifact.manifest.recipe
    section = recorded(Classifier.model_validate(artifact.manifest.sections["classifier"]))
    judge = ImageClassifier(recipe["image"]["size"], recipe["data"]["classes"], section.width)
    judge.load_state_dict(load_safetensors(artifact.read(WEIGHTS)))
    return judge.requires_grad_(False).eval()


@torch.inference_mode()
def judged(judge: ImageClassifier, images_B3HW: Tensor) -> tuple[NDArray[np.int64], NDArray[np.float32]]:
    """The most likely label of each image, (B,), and its features, the mean over their grid, (B, channels)."""
    grid = judge.grid(images_B3HW)
    labels: NDArray[np.int64] = judge.head(grid.flatten(1)).argmax(dim=1).cpu().numpy()
    return labels, grid.mean(dim=(2, 3)).float().cpu().numpy()


def predict(judge: ImageClassifier, images_B3HW: Tensor) -> NDArray[np.int64]:
    """The most likely label of each image, (B,)."""
    return judged(judge, images_B3HW)[0]


def run(context: Context) -> Outcome:
    """Train on the train split and measure on the whole test split, in one Ray task that reports its progress."""
    section = context.recipe.evaluate.classifier
    if section is None:
        raise UserError("evaluate.classifier is not set: there is no judge to train")
    compute = context.recipe.compute.actors
    connect()
    cpus = compute.actors * compute.cpus_per_actor if not compute.gpus_per_actor else compute.cpus_per_actor
    import ray

    largest = max(int(node["Resources"].get("CPU", 0)) for node in ray.nodes())
    cpus = max(1, min(cpus, largest))
    task: Any = ray.remote(_train_remotely).options(
        num_cpus=cpus, num_gpus=min(1, compute.gpus_per_actor), max_retries=2
    )
    rows = context.input("shard").manifest.facts["splits"]["train"]
    result: dict[str, Any] = {}
    with Bar("judge", section.epochs * rows) as bar:
        for reference in task.remote(asdict(context.job), cpus):
            update = checked(ray.get(reference))
            if isinstance(update, int):
                bar.advance(update)
            else:
                result = update
    made = {"stage": context.job.stage, "fingerprint": context.job.fingerprint, "recipe": context.recipe.name}
    said = {"kind": "the judge of class consistency", "made": made | {"sections": context.job.sections}}
    entry = context.out.write_bytes(WEIGHTS, stamped(result["weights"], said, TENSORS))
    return Outcome(files=[entry], rows=rows, scores={"judge_accuracy": result["accuracy"]})


def _train_remotely(job: dict[str, Any], cpus: int) -> Iterator[int | dict[str, Any] | UserError]:
    """Images seen since the last report, again and again, and at last the weights and the accuracy."""
    try:
        yield from _trained(job, cpus)
    except UserError as error:
        yield error


def _trained(job: dict[str, Any], cpus: int) -> Iterator[int | dict[str, Any]]:
    context = Context(Job(**job))
    recipe, shards = context.recipe, context.input("shard")
    section = recipe.evaluate.classifier
    assert section is not None
    torch.set_num_threads(cpus)
    torch.manual_seed(section.seed)
    set_precision("fp32")  # like the networks of published scores
    judge = build_classifier(recipe, section).to(default_device()).to(memory_format=torch.channels_last)
    yield from train(judge, shards, recipe.image.size, section)
    tensors = {name: value.cpu().contiguous() for name, value in judge.state_dict().items()}
    yield {"weights": save(tensors), "accuracy": accuracy(judge, shards, recipe.image.size)}


def train(judge: ImageClassifier, shards: Artifact, size: int, section: Classifier) -> Iterator[int]:
    """Train in place on the train split, yielding the number of images of each few steps.

    AdamW under a one-cycle schedule, cross-entropy with a little label smoothing (our choice).
    """
    device = next(judge.parameters()).device
    loader = Loader(shards, "train", ["image"], section.batch, section.seed, crop=Crop(size), keys=False)
    total = section.epochs * loader.rows
    optimiser = torch.optim.AdamW(judge.parameters(), lr=section.learning_rate, weight_decay=0.01)
    seen, reported = 0, 0
    judge.train()
    for batch in loader.stream():
        for group in optimiser.param_groups:
            group["lr"] = section.learning_rate * _one_cycle(seen / total)
        logits = judge(to_tensor(batch.arrays["image"]).to(device))
        loss = F.cross_entropy(logits, torch.from_numpy(batch.labels).to(device), label_smoothing=0.05)
        optimiser.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        optimiser.step()
        seen = batch.images_seen
        if seen >= total:
            break
        if seen - reported >= 20 * section.batch:
            yield seen - reported
            reported = seen
    judge.eval()
    yield total - reported


def accuracy(judge: ImageClassifier, shards: Artifact, size: int) -> float:
    """Share of the test split that the judge labels right."""
    device = next(judge.parameters()).device
    right = count = 0
    for labels, pixels in images(shards, "test", size):
        right += int((predict(judge, to_tensor(pixels).to(device)) == labels).sum())
        count += len(labels)
    return right / count


def _one_cycle(progress: float, warm_up: float = 0.2) -> float:
    """Factor on the learning rate: up to 1 in a straight line, then down to 0 along a cosine."""
    if progress < warm_up:
        return 0.04 + 0.96 * progress / warm_up
    return 0.5 * (1.0 + float(np.cos(np.pi * (progress - warm_up) / (1.0 - warm_up))))


def _block(inward: int, outward: int, kernel: int = 3, stride: int = 1, padding: int = 1) -> list[nn.Module]:
    convolution = nn.Conv2d(inward, outward, kernel, stride, padding, bias=False)
    return [convolution, nn.BatchNorm2d(outward), nn.ReLU(inplace=True)]
