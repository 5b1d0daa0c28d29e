"""What is measured, in order of worth; every part by itself, so that one that fails costs no other."""

from __future__ import annotations

import importlib
import json
import time
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks.gpu.records import Records
from benchmarks.gpu.steps import OnlineStep, PlainStep, Sizes, Step, context_of, recipe_of
from benchmarks.train_step import latents
from configs import Recipe
from infra.device import autocast, set_determinism, set_precision
from infra.tracking import Tracker
from models.flops import forward_flops
from models.foundation import FoundationModel
from tasks.networks import build_autoencoder, build_network, ready
from tasks.train_dit import Diffusion
from tasks.training.loop import Setting, fit
from tasks.training.metrics import Metrics, peak_flops

XL, SFD = "lightningdit_xl_64ep", "sfd_xl_80ep"
COMPILED, EAGER = "compute.train.compile=true", "compute.train.compile=false"


def environment(records: Records, scratch: str) -> None:
    """Ceilings of this card, and which attention torch takes."""
    device, size = records.device, 128 if records.small else 8192
    with records.guarded("environment"):
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        records.figure("environment/bf16", 2 * size**3 / records.seconds(lambda: a @ b) / 1e12)
        half = size // 2
        c, d = a.float()[:half, :half].contiguous(), b.float()[:half, :half].contiguous()
        for precision in ("fp32", "tf32"):
            set_precision(precision)
            records.figure(f"environment/{precision}", 2 * half**3 / records.seconds(lambda: c @ d, 5) / 1e12)
    with records.guarded("environment/attention"):
        batch = 2 if records.small else 64
        q, k, v = (
            torch.randn(batch, 16, 256, 72, device=device, dtype=torch.bfloat16, requires_grad=True) for _ in range(3)
        )
        grad = torch.randn_like(q)

        def attention() -> Any:
            return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), grad)

        records.note("environment/chosen", backend=torch._fused_sdp_choice(q, k, v))
        flops = 3.5 * 4 * batch * 16 * 256 * 256 * 72
        records.figure("environment/attention", flops / records.seconds(attention) / 1e12)


def golden(records: Records, scratch: str) -> None:
    """The tests' golden tensors on this device, in every precision: the worst gap over what the tests allow."""
    cases = importlib.import_module("tests.models.test_golden")
    for precision in ("fp32", "tf32"):
        with records.guarded(f"golden/{precision}"):
            set_precision(precision)
            gaps: list[float] = []

            def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4, gaps: list[float] = gaps) -> None:
                assert found.shape == expected.shape and bool(torch.isfinite(found).all())
                gap = (found.double() - expected.double()).abs().max() / expected.abs().max().clamp_min(1e-12)
                gaps.append(float(gap) / tolerance)

            kept, cases.close = cases.close, close
            try:
                for name in sorted(cases.CASES):
                    case = json.loads((cases.GOLDEN / f"{name}.json").read_text())
                    tensors = cases.load_file(cases.GOLDEN / f"{name}.safetensors", device=str(records.device))
                    with torch.no_grad(), records.device:
                        cases.CHECKS[cases.CASES[name]](case, tensors)
            finally:
                cases.close = kept
            records.figure(f"golden/{precision}", max(gaps))


def training(records: Records, scratch: str) -> None:
    """Steps of the published networks, compiled and not, and against a plain loop."""
    batch, device, small = (8 if records.small else 128), records.device, records.small
    set_precision("bf16")
    given: dict[str, Any] = {}
    speed = 0.0
    recipe = recipe_of(XL, batch, 64 * batch, small, COMPILED)
    with records.guarded("training/xl"):
        step = Step(recipe, f"{scratch}/xl", device, 2 * batch)
        speed = batch / records.steady(step)
        records.figure("training/xl", speed)
        if (peak := peak_flops(device)) is not None:
            records.figure("training/xl_mfu", 100 * speed * step.flops / peak)
        if records.cuda:
            records.figure("training/xl_memory", records.peak_gb())
        places = records.waits(step)
        records.note("training/waits", places=places)
        records.figure("training/xl_waits", len(places))
        given.update(step.given)
        del step
    with records.guarded("training/against_plain", 30):
        plain = PlainStep(recipe, given, device, sizes_of(recipe))
        records.figure("training/against_plain", speed * records.steady(plain) / batch)
        del plain
    given.clear()
    with records.guarded("start/first_step", 20):
        began = time.monotonic()
        step = Step(recipe, f"{scratch}/again", device, 2 * batch)
        step()
        records.sync()
        records.figure("start/first_step", time.monotonic() - began)
        del step
    with records.guarded("training/xl_eager", 20):
        less = batch // 4
        step = Step(recipe_of(XL, less, 64 * less, small, EAGER), f"{scratch}/xl_eager", device, 2 * less)
        records.figure("training/xl_eager", less / records.steady(step, 6))
        del step
    with records.guarded("training/sfd", 30):
        part = batch // 2  # whose stored targets of 400 KB a row still fit into a minute
        sfd = recipe_of(SFD, part, 64 * part, small, COMPILED)
        assert sfd.foundation is not None
        foundation = FoundationModel(sfd.foundation.name, input_size=sfd.foundation.input_size).to(device).eval()
        online = OnlineStep(sfd, f"{scratch}/sfd", device, part, foundation)
        records.figure("training/sfd", part / records.steady(online, 6))
        del online
    with records.guarded("training/b", 20):
        changes = () if small else ("train_dit.model.size=B",)
        step = Step(recipe_of(XL, batch, 64 * batch, small, COMPILED, *changes), f"{scratch}/b", device, 2 * batch)
        records.figure("training/b", batch / records.steady(step))


def sizes_of(recipe: Recipe) -> Sizes:
    """Of the recipe's network."""
    with torch.device("meta"):
        network: Any = build_network(recipe, recipe.train_dit.model)
    return network.hidden_size, len(network.blocks), network.blocks[0].attn.num_heads


def sampling(records: Records, scratch: str) -> None:
    """One pass of XL in every precision, and their errors against float32."""
    batch, device = (2 if records.small else 128), records.device
    recipe = recipe_of(XL, batch, 64 * batch, records.small)
    torch.manual_seed(0)
    network: Any = build_network(recipe, recipe.train_dit.model).to(device).requires_grad_(False).eval()
    for parameter in network.parameters():
        nn.init.normal_(parameter, std=0.02)
    flops, side = forward_flops(network), recipe.latent_size
    x = torch.randn(batch, recipe.latent_channels, side, side, device=device)
    t, y = torch.full((batch, 1), 0.5, device=device), torch.arange(batch, device=device)
    exact: Tensor | None = None
    rates: dict[str, float] = {}
    for name, precision in (("fp32", "fp32"), ("tf32", "tf32"), ("bf16_compiled", "bf16")):
        with records.guarded(f"sampling/{name}", 15), torch.inference_mode():
            set_precision(precision)
            if precision == "bf16":
                ready(network, True, precision)  # in place

            def once(precision: str = precision) -> Tensor:
                with autocast(precision, device):
                    found: Tensor = network(x, t, y)
                return found

            found = once().float()
            exact = found if exact is None else exact
            rates[name] = batch / records.seconds(once, 5, 1)
            records.figure(f"sampling/{name}", rates[name] * flops / 1e12)
            records.note(f"sampling/{name}_error", relative=float((found - exact).norm() / exact.norm()))
    if {"fp32", "bf16_compiled"} <= rates.keys():
        records.figure("sampling/speedup", rates["bf16_compiled"] / rates["fp32"])


def encoding(records: Records, scratch: str) -> None:
    """Both views through VA-VAE's encoder and DINOv2-B, and a step of the tokenizer."""
    batch, device = (1 if records.small else 64), records.device
    recipe = recipe_of(SFD, 8, 64, records.small)
    side = 64 if records.small else recipe.image.size
    with records.guarded("encoding/views", 30), torch.inference_mode():
        set_precision(recipe.encode.precision)
        assert recipe.foundation is not None
        tokenizer = build_autoencoder(recipe.train_vavae.model).to(device).eval()
        section = recipe.foundation
        foundation = FoundationModel(section.name, input_size=section.input_size).to(device).eval()
        images = torch.rand(batch, 3, side, side, device=device) * 2 - 1

        def views() -> None:
            with autocast(recipe.encode.precision, device):
                for view in (images, images.flip(-1)):
                    tokenizer.encode(view)
                    foundation(view)

        records.figure("encoding/views", batch / records.seconds(views, 5, 1))
    with records.guarded("encoding/tokenizer", 30):
        from models.tokenizer_losses import TokenizerWeights, TrainableTokenizer
        from tasks.scoring.lpips import Lpips

        count = 1 if records.small else 8
        model = build_autoencoder(recipe.train_vavae.model)
        assert not isinstance(model, nn.Identity)
        weights = TokenizerWeights(perceptual=1.0)
        module = TrainableTokenizer(model, perceptual=Lpips("random"), weights=weights).to(device)  # type: ignore[arg-type]
        optimizer = torch.optim.AdamW(module.parameters(), fused=True)
        given = torch.rand(count, 3, side, side, device=device) * 2 - 1
        noise = torch.randn(count, model.embed_dim, side // 16, side // 16, device=device)  # type: ignore[union-attr]

        def step() -> None:
            optimizer.zero_grad()
            with autocast("bf16", device):
                total = module(given, noise)["total"]
            total.backward()
            optimizer.step()

        records.figure("encoding/tokenizer", count / records.steady(step, 5, 1))


def stability(records: Records, scratch: str) -> None:
    """The whole loop on B/1, and whether two runs end in the same bits."""
    batch, steps = (4, 6) if records.small else (128, 300)
    changes = () if records.small else ("train_dit.model.size=B",)
    with records.guarded("stability/loop", 45):
        recipe = recipe_of(XL, batch, batch * steps, records.small, COMPILED, "train_dit.warmup_images=0", *changes)
        _, points = trained(records, recipe, f"{scratch}/loop")
        records.figure("stability/finite", sum(points["left_out"]))
        records.figure("stability/loop", sorted(points["images_per_second"])[len(points["images_per_second"]) // 2])
    spent: dict[bool, float] = {}
    for deterministic in (False, True):
        suffix = "_deterministic" if deterministic else ""
        with records.guarded(f"stability/twice{suffix}", 25):
            set_determinism(deterministic)
            few, count = (4, 4) if records.small else (32, 40)
            small = () if records.small else ("train_dit.model.size=S",)
            recipe = recipe_of(XL, few, few * count, records.small, EAGER, *small)
            began = time.monotonic()
            one, _ = trained(records, recipe, f"{scratch}/one{suffix}")
            spent[deterministic] = time.monotonic() - began
            two, _ = trained(records, recipe, f"{scratch}/two{suffix}")
            records.figure(f"stability/twice{suffix}", max(float((one[n] - two[n]).abs().max()) for n in one))
        set_determinism(False)
    if len(spent) == 2:
        records.figure("stability/price", spent[True] / spent[False])


@dataclass(frozen=True)
class _Notes(Tracker):
    """Keeps what is tracked."""

    points: dict[str, list[float]] = field(default_factory=dict)

    def series(self, points: list[tuple[str, float, int]]) -> None:
        for name, value, _ in points:
            self.points.setdefault(name, []).append(value)


def trained(records: Records, recipe: Recipe, root: str) -> tuple[dict[str, Tensor], dict[str, list[float]]]:
    """Final weights and tracked figures of a training through the project's whole loop."""
    latents(recipe, root, max(64, recipe.train_dit.batch))
    context, notes, kept = context_of(recipe, root, "run"), _Notes(), dict[str, Any]()
    metrics = Metrics("train_dit", recipe.train_dit.images, recipe.train_dit.batch, notes, records.device)

    def finished(end: Any, best: Any, curves: Any) -> None:
        kept.update(end.tensors["weights"])

    def made() -> Diffusion:
        torch.manual_seed(0)
        return Diffusion(context)

    with (records.folder / "loop.log").open("a") as log, redirect_stdout(log):
        fit(made, Setting(context.out, recipe.compute.train, records.device, metrics, finished))
    return kept, notes.points


SECTIONS: dict[str, Callable[[Records, str], None]] = {
    "environment": environment,
    "golden": golden,
    "training": training,
    "sampling": sampling,
    "stability": stability,
    "encoding": encoding,
}
"""By name, in order of worth."""
