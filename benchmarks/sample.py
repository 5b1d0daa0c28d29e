"""How fast images are sampled, against the loop that anyone would write first, at equal evaluations.

    python -m benchmarks.sample [--recipe demo] [--turns 6] [--steps 25] [--batch 100] [--no-compile]

Random networks of the recipe's sizes, the real sampler from noise to uint8 pixels on this process's device, one batch
at a time. `plain` is the obvious loop: noise by `torch.randn`, Euler steps, the model and its guide at every step and
what is not wanted thrown away, nothing compiled, decoded when a batch is done. Both take the same steps, so they
would have made the same images from the same noise; they take turns, so that both feel the same neighbours.

Three settings: no guidance; classifier-free guidance as LightningDiT publishes it (shift 0.3, off below t 0.125, where
we leave the second pass out); autoguidance by a network of half the depth. `vs_plain` is plain's seconds over ours,
the median over turns, of classifier-free guidance; the others are beside it. `lowdiff_vs_base` is the same for a
cascade of resolutions against its finest alone, the network and the steps those of `benchmarks.lowdiff`, which says
what quality costs; here its weights are random too. Where there is no accelerator the same ratios come in processor
time too, which neighbours disturb less. Compiling is not in it: it is paid once for a sample; `first_seconds` is how
long the first batches took with it. The last line is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor, nn

from benchmarks import lowdiff
from configs import Recipe, load_recipe
from configs.diffusion import DitModel
from infra.device import default_device
from models.autoencoder import AutoencoderKL
from models.lightningdit import LightningDiT
from models.sizes import SIZES
from models.solvers import time_grid
from tasks.data.pixels import Pixels, to_pixels
from tasks.data.statistics import LatentStatistics
from tasks.networks import (
    build_autoencoder,
    build_clock,
    build_dit,
    build_network,
    channel_groups,
    ready,
)
from tasks.sampling.sampler import Decoder, Sampler

ONE_CLOCK = ("train_semvae=null", "train_dit.clock={kind: synchronous}", "train_dit.objective.semantic_weight=1.0")
UNALIGNED = ("train_dit.model.align_depth=null", "train_dit.objective.align_weight=0.0")
PUBLISHED = "{method: classifier_free, scale: 6.7, interval_start: 0.125}"


def settings(weak: Path, model: DitModel) -> dict[str, list[str]]:
    """Overrides by guidance; the weak network's weights and section."""
    guide = {"method": "autoguidance", "scale": 1.5, "weights": str(weak), "model": model.model_dump(mode="json")}
    return {
        "none": ["sample.guidance={method: none}"],
        "classifier_free": [f"sample.guidance={PUBLISHED}"],
        "autoguidance": [f"sample.guidance={json.dumps(guide)}"],
    }


def halved(model: DitModel) -> DitModel:
    """The same network with half the blocks."""
    size = SIZES[model.size] if model.size else model.dimensions
    named = {"hidden_size": size["hidden_size"], "heads": size["num_heads"], "depth": max(1, size["depth"] // 2)}
    values = {**model.model_dump(mode="json"), "size": None, "align_depth": None, **named}
    return DitModel.model_validate(values)


class Plain:
    """The obvious loop."""

    def __init__(self, recipe: Recipe, model: LightningDiT, weak: LightningDiT, decoder: Decoder) -> None:
        self.recipe, self.model, self.weak, self.decoder = recipe, model, weak, decoder
        self.clock, self.groups = build_clock(recipe), channel_groups(recipe)

    @torch.no_grad()
    def __call__(self, device: torch.device) -> Pixels:
        section, guidance = self.recipe.sample, self.recipe.sample.guidance
        side, batch = self.recipe.latent_size, section.batch
        y = torch.arange(batch, device=device) % self.recipe.data.classes
        x = torch.randn(batch, self.groups.channels, side, side, device=device)
        grid = time_grid(section.steps, self.clock.span, section.shift).to(device)
        for now, then in pairwise(grid):
            t, mask = (each.expand(batch, -1) for each in self.clock.at(now))
            v = self.model(x, t, y)
            if guidance.method != "none":
                v = self._guided(v, x, t, y)
            x = x + (then - now) * v * self.groups.spread(mask)
        return to_pixels(self._decoded(x))

    def _guided(self, v: Tensor, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        guidance = self.recipe.sample.guidance
        if guidance.method == "classifier_free":
            other = self.model(x, t, torch.full_like(y, self.model.null_label))
            on = self.groups.spread(t >= guidance.interval_start)
            return torch.where(on, other + guidance.scale * (v - other), v)
        assert guidance.method == "autoguidance"
        other = self.weak(x, t, y)
        return other + guidance.scale * (v - other)

    def _decoded(self, x: Tensor) -> Tensor:
        texture = self.decoder.statistics.denormalise(x[:, self.groups.slice_of("texture")], ["z"])
        return self.decoder.tokenizer.decode(texture)


def random_network(network: nn.Module, seed: int) -> Any:
    """With weights that are not zero anywhere, frozen: zero layers would do less work on some machines."""
    torch.manual_seed(seed)
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    return network.requires_grad_(False).eval()


def random_decoder(recipe: Recipe, device: torch.device) -> Decoder:
    tokenizer: AutoencoderKL = random_network(build_autoencoder(recipe.train_vavae.model), 1).to(device)
    z = recipe.train_vavae.model.z_channels
    return Decoder(tokenizer, LatentStatistics({"z": {"mean": [0.0] * z, "std": [1.0] * z, "count": 1}}))


def measure(recipe: Recipe, turns: int, weak: LightningDiT) -> dict[str, Any]:
    """Seconds of a batch by side, and the ratio of the two."""
    device = default_device()
    model = random_network(build_dit(recipe, recipe.train_dit.model), 0).to(device)
    decoder = random_decoder(recipe, device)
    plain = Plain(recipe, model, weak.to(device), decoder)
    twin = build_dit(recipe, recipe.train_dit.model)  # of its own, since compiling changes a network in place
    twin.load_state_dict(model.state_dict())
    twin.requires_grad_(False).eval().to(device)
    ours = Sampler(recipe, ready(twin, recipe.compute.actors.compile), decoder, device)
    batch = recipe.sample.batch
    began = time.perf_counter()
    for images in ours.stream(np.arange(start, start + batch) for start in (0, batch)):
        assert images[2].shape[0] == batch
    first = time.perf_counter() - began
    plain(device)
    seconds: dict[str, list[tuple[float, float]]] = {"plain": [], "ours": []}
    for turn in range(turns):
        indices = [np.arange(start, start + batch) for start in (2 * turn * batch, (2 * turn + 1) * batch)]
        for name in ("plain", "ours") if turn % 2 else ("ours", "plain"):
            clocks = time.perf_counter(), time.process_time()
            if name == "ours":
                list(ours.stream(indices))
            else:
                for _ in indices:
                    plain(device)
            seconds[name].append((time.perf_counter() - clocks[0], time.process_time() - clocks[1]))
    ratios = [[p[clock] / o[clock] for p, o in zip(*seconds.values(), strict=True)] for clock in (0, 1)]
    result = {f"{name}_images_per_second": 2 * batch / median(s for s, _ in each) for name, each in seconds.items()}
    result |= {"vs_plain": median(ratios[0]), "evaluations": ours.integrator.evaluations()["evaluations"]}
    result["first_seconds"] = first
    return result if device.type == "cuda" else {**result, "vs_plain_processor": median(ratios[1])}


def cascaded(turns: int, batch: int, compiled: bool) -> dict[str, Any]:
    """How many times as fast as its finest resolution alone a cascade is, and the evaluations of both."""
    recipe, device = lowdiff.LATENTS.load(f"sample.batch={batch}"), default_device()
    network = ready(random_network(build_network(recipe, recipe.train_dit.model), 3).to(device), compiled)
    labels = np.arange(turns * batch) % recipe.data.classes
    found, evaluations = lowdiff.in_turns(lowdiff.LATENTS, recipe, network, random_decoder(recipe, device), labels)
    return {"effective_evaluations": evaluations, **lowdiff.speeds(found)}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--recipe", default="demo")
    parser.add_argument("--turns", type=int, default=6)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--batch", type=int, default=100)
    parser.add_argument("--no-compile", action="store_true")
    parser.add_argument("--set", action="append", default=[], metavar="SECTION.FIELD=VALUE")
    given = parser.parse_args()
    overrides = [
        *ONE_CLOCK,
        *UNALIGNED,
        f"sample.batch={given.batch}",
        f"sample.steps={given.steps}",
        "sample.shift=0.3",
        f"compute.actors.compile={str(not given.no_compile).lower()}",
        *given.set,
    ]
    base = load_recipe(given.recipe, overrides)
    section = base.train_dit.model
    result: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "weak.safetensors"
        shallow = halved(section)
        weak: LightningDiT = random_network(build_dit(base, shallow), 2)
        save_file(weak.state_dict(), file)
        for name, changes in settings(file, shallow).items():
            result[name] = measure(load_recipe(given.recipe, [*overrides, *changes]), given.turns, weak)
            found = "  ".join(f"{key} {value:.2f}" for key, value in result[name].items())
            print(f"{name:>16}  {found}", flush=True)
    cascade = cascaded(given.turns, given.batch, not given.no_compile)
    print(f"{'lowdiff':>16}  {cascade}", flush=True)
    print(
        json.dumps(
            {
                "benchmark": "sample",
                "recipe": given.recipe,
                "device": torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu",
                "threads": torch.get_num_threads(),
                "compiled": not given.no_compile,
                "vs_plain": result["classifier_free"]["vs_plain"],
                "lowdiff_vs_base": cascade["cascade"]["wall_decoded"],
                **result,
                "lowdiff": cascade,
            }
        )
    )


if __name__ == "__main__":
    main()
