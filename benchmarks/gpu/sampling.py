"""Passes of XL in every precision, compiled and captured, and the guided loop around them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from benchmarks.gpu.records import Records
from benchmarks.gpu.steps import recipe_of
from infra.device import autocast, set_precision
from models.captured import Captured, on_cuda
from models.flops import forward_flops
from tasks.networks import build_network, ready
from tasks.sampling.integrator import Integrator
from tasks.sampling.per_image import image_noise

XL = "lightningdit_xl_64ep"
_GUIDED = 249 * 1.93
"""Passes of an image of the published sample: 249 steps, of which guidance doubles 93 in 100."""


def sampling(records: Records, _scratch: str) -> None:
    """One pass in every precision and its error against float32, and what the host adds."""
    batch, few, device = (2, 1, records.device) if records.small else (128, 8, records.device)
    steps = f"sample.steps={3 if records.small else 8}"
    recipe = recipe_of(XL, batch, 64 * batch, records.small, steps, "sample.off_by_one=false")

    def network() -> Any:
        torch.manual_seed(0)
        with device:
            found: Any = build_network(recipe, recipe.train_dit.model)
        for parameter in found.parameters():
            nn.init.normal_(parameter, std=0.02)
        return found.requires_grad_(False).eval()

    model = network()
    flops, side = forward_flops(model), recipe.latent_size
    x = torch.randn(batch, recipe.latent_channels, side, side, device=device)
    t, y = torch.full((batch, 1), 0.5, device=device), torch.arange(batch, device=device)
    exact: list[Tensor] = []
    rates: dict[str, float] = {}

    def passes(name: str, call: Callable[[], Tensor], times: int = 5) -> None:
        found: list[Tensor] = []
        first = records.first(lambda: found.append(call().float()))
        exact.extend(found[:1] if not exact else [])
        rates[name] = batch / records.seconds(call, times, 1)
        error = float((found[0] - exact[0]).norm() / exact[0].norm())
        records.figure(f"sampling/{name}", rates[name] * flops / 1e12)
        images = rates[name] / _GUIDED
        records.note(f"sampling/{name}", error=error, first_s=round(first, 1), images_s=images)

    def in_precision(name: str, precision: str, net: Any = model) -> Callable[[], None]:
        def call() -> Tensor:
            with autocast(precision, device):
                found: Tensor = net(x, t, y)
            return found

        @torch.inference_mode()
        def run() -> None:
            set_precision(precision)
            passes(name, call)

        return run

    @torch.inference_mode()
    def guided() -> None:
        set_precision("bf16")
        integrator = Integrator(recipe, model)

        def noise(shape: tuple[int, ...], draw: int) -> Tensor:
            return torch.from_numpy(image_noise(np.arange(batch), shape, 0, draw)).to(device)

        first = noise((recipe.latent_channels, side, side), 0)

        def whole() -> Tensor:
            with autocast("bf16", device):
                return integrator(y, lambda shape, draw: first)

        whole()
        seconds, places = records.seconds(whole, 2, 0), records.waits(whole)
        records.note("sampling/guided", seconds=seconds, places=places, **integrator.evaluations())
        records.figure("sampling/waits", len(places))

    def compiled() -> None:
        in_precision("bf16_compiled", "bf16", ready(model, True, "bf16"))()  # in place
        if "fp32" in rates:
            records.figure("sampling/speedup", rates["bf16_compiled"] / rates["fp32"])

    @torch.inference_mode()
    def captured() -> None:
        set_precision("bf16")
        record = on_cuda if records.cuda else (lambda network, _given: network)
        told: list[str] = []
        quick = Captured(model, told.append, record)
        in_precision("bf16_captured", "bf16", quick)()
        small = (x[:few], t[:few], y[:few])
        with autocast("bf16", device):
            plain = records.seconds(lambda: model(*small), 5, 2)
            graph = records.seconds(lambda: quick(*small), 5, 2)
        records.note("sampling/few", images=few, compiled_ms=plain * 1e3, captured_ms=graph * 1e3)
        records.figure("sampling/captured_gain", plain / graph)
        if told:
            raise RuntimeError(told[0])

    for precision in ("fp32", "tf32", "bf16"):
        records.attempt(f"sampling/{precision}", in_precision(precision, precision), 6)
    records.attempt("sampling/guided", guided, 4)
    records.attempt("sampling/bf16_compiled", compiled, 15)
    records.attempt("sampling/bf16_captured", captured, 8)
