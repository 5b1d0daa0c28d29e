"""What a call spends its time on: kernels by kind, and the longest of them."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from torch.profiler import ProfilerActivity, profile

from benchmarks.gpu.records import Records, Run

KINDS = (
    ("attention", r"flash|fmha|attention|sdpa|cudnn.*(mha|bmm_softmax)"),
    ("products", r"gemm|cutlass|cublas|nvjet|xmma|wgmma|splitk|conv|implicit|cudnn|addmm|::mm|bmm"),
    ("optimizer", r"adam|multi_tensor|foreach|lpnorm"),
    ("compiled", r"triton"),
    ("copies", r"memcpy|memset|copy|cast"),
    ("pointwise", r"elementwise|vectorized|unrolled|reduce|CatArray|index|norm"),
)
"""Kinds of kernels and how their names begin to tell, the first that fits."""
_NOTES = ("##", "Torch-Compiled", "CompiledFunction", "ProfilerStep", "Optimizer.", "aten::", "cuda")
"""What a profile of CUDA holds beside kernels: notes about stretches of them, and calls of the host."""


def kernels(records: Records, run: Run, steps: int = 3) -> dict[str, Any]:
    """Milliseconds a call by kind, launches a call, and the ten longest kernels: name, milliseconds, launches."""
    run()
    records.sync()
    steps = 1 if records.small else steps
    activities = [ProfilerActivity.CPU, *([ProfilerActivity.CUDA] if records.cuda else [])]
    with profile(activities=activities) as seen:
        for _ in range(steps):
            run()
        records.sync()
    spent: list[tuple[str, float]] = []
    for event in seen.events():
        if not records.cuda:
            spent.append((event.name, event.self_cpu_time_total))
        elif "CUDA" in str(event.device_type) and not event.name.startswith(_NOTES):
            spent.append((event.name, event.time_range.elapsed_us()))
    return summed(spent, steps)


def summed(spent: Iterable[tuple[str, float]], steps: int) -> dict[str, Any]:
    """Of (name, microseconds) of every launch in so many steps."""
    totals: dict[str, tuple[float, int]] = {}
    for name, microseconds in spent:
        before = totals.get(name, (0.0, 0))
        totals[name] = (before[0] + microseconds, before[1] + 1)
    kinds: dict[str, float] = {}
    for name, (total, _) in totals.items():
        kind = next((kind for kind, names in KINDS if re.search(names, name, re.I)), "other")
        kinds[kind] = kinds.get(kind, 0.0) + total / 1e3 / steps
    order = sorted(totals.items(), key=lambda item: -item[1][0])[:10]
    return {
        "kinds": kinds,
        "launches": sum(count for _, count in totals.values()) / steps,
        "longest": [(name[:90], total / 1e3 / steps, count / steps) for name, (total, count) in order],
    }
