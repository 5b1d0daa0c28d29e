"""The card itself, and whether numbers are right on it."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import subprocess
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from benchmarks.gpu.records import Records
from infra.attention import fastest_attention
from infra.device import autocast, set_precision

_LIBRARIES = ("timm", "triton", "pydantic", "deepspeed", "lpips", "pyarrow", "numpy", "torchdiffeq")
_XL_PRODUCTS = {"qkv": (1152, 3456), "out": (1152, 1152), "wide": (1152, 6144), "narrow": (3072, 1152)}
"""In and out of the four products of a block of XL."""


def environment(records: Records, _scratch: str) -> None:
    """Versions, ceilings of this card, and which attention torch takes."""
    device, size = records.device, 128 if records.small else 8192

    def facts() -> None:
        found = {name: _version(name) for name in _LIBRARIES}
        records.note("environment/versions", cudnn=torch.backends.cudnn.version(), **found)
        records.note("environment/machine", cpus=os.cpu_count())
        if records.cuda:
            asked = "name,driver_version,clocks.max.sm,power.limit,temperature.gpu"
            line = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
            said = subprocess.run(line, capture_output=True, text=True, timeout=20, check=False)
            records.note("environment/card", csv=said.stdout.strip())

    def ceilings() -> None:
        a, b = (torch.randn(size, size, device=device, dtype=torch.bfloat16) for _ in range(2))
        records.figure("environment/bf16", 2 * size**3 / records.seconds(lambda: a @ b) / 1e12)
        half = size // 2
        c, d = a.float()[:half, :half].contiguous(), b.float()[:half, :half].contiguous()
        for precision in ("fp32", "tf32"):
            set_precision(precision)
            seconds = records.seconds(lambda: c @ d, 5)
            records.figure(f"environment/{precision}", 2 * half**3 / seconds / 1e12)
        big = torch.empty(1 << (20 if records.small else 30), dtype=torch.uint8, device=device)
        other = torch.empty_like(big)
        seconds = records.seconds(lambda: other.copy_(big))
        records.figure("environment/memory", 2 * big.numel() / seconds / 1e12)

    def products() -> None:
        rows = 64 if records.small else 32_768
        for name, (into, out) in _XL_PRODUCTS.items():
            x = torch.randn(rows, into, device=device, dtype=torch.bfloat16)
            w = torch.randn(out, into, device=device, dtype=torch.bfloat16)
            rate = 2 * rows * into * out / records.seconds(lambda x=x, w=w: F.linear(x, w))
            records.note("environment/products", product=name, tflops=round(rate / 1e12, 1))

    def attention() -> None:
        for width in (72, 64, 96, 128):
            q, k, v = (_heads(records, width) for _ in range(3))
            grad, batch = torch.randn_like(q), len(q)
            flops = 3.5 * 4 * batch * 16 * 256 * 256 * width

            def both(q: Tensor = q, k: Tensor = k, v: Tensor = v, grad: Tensor = grad) -> Any:
                return torch.autograd.grad(F.scaled_dot_product_attention(q, k, v), (q, k, v), grad)

            rates: dict[str, Any] = {}
            for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
                try:
                    with sdpa_kernel(backend):
                        rates[backend.name] = round(flops / records.seconds(both, 5) / 1e12, 1)
                except RuntimeError as error:
                    rates[backend.name] = str(error).partition("\n")[0][:60]
            with fastest_attention(device):
                found = flops / records.seconds(both) / 1e12
                rates["chosen"] = torch._fused_sdp_choice(q, k, v)
            records.note("environment/attention", width=width, ours=round(found, 1), **rates)
            if width == 72:
                records.figure("environment/attention", found)

    for name, run in (("versions", facts), ("ceilings", ceilings), ("products", products)):
        records.attempt(f"environment/{name}", run)
    records.attempt("environment/attention", attention)


def _heads(records: Records, width: int) -> Tensor:
    shape = (2 if records.small else 64, 16, 256, width)
    return torch.randn(*shape, device=records.device, dtype=torch.bfloat16, requires_grad=True)


def _version(name: str) -> str | None:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return None


def golden(records: Records, _scratch: str) -> None:
    """The tests' golden tensors on this device, in every precision: the worst gap over what the tests allow."""
    cases = importlib.import_module("tests.models.test_golden")

    def one(precision: str) -> None:
        set_precision(precision)
        gaps: list[float] = []

        def close(found: Tensor, expected: Tensor, tolerance: float = 1e-4) -> None:
            assert found.shape == expected.shape and bool(torch.isfinite(found).all())
            gap = (found.double() - expected.double()).abs().max()
            gaps.append(float(gap / expected.abs().max().clamp_min(1e-12)) / tolerance)

        kept, cases.close = cases.close, close
        try:
            for name in sorted(cases.CASES):
                case = json.loads((cases.GOLDEN / f"{name}.json").read_text())
                file = cases.GOLDEN / f"{name}.safetensors"
                tensors = cases.load_file(file, device=str(records.device))
                with torch.no_grad(), records.device, autocast(precision, records.device):
                    cases.CHECKS[cases.CASES[name]](case, tensors)
        finally:
            cases.close = kept
        records.figure(f"golden/{precision}", max(gaps))

    for precision in ("fp32", "tf32", "bf16"):
        records.attempt(f"golden/{precision}", lambda precision=precision: one(precision))
