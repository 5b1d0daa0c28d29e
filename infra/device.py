"""The device of a process, and the arithmetic that it computes with.

Left alone, torch on CUDA multiplies matrices in full float32 and convolves in TF32: slow where it is exact, and inexact
where nobody asked. So whoever computes says which precision holds, for products and convolutions alike. On a CPU `tf32`
is `fp32`.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import torch.distributed as dist

from infra.attention import fastest_attention

HALVES = {"bf16": torch.bfloat16, "fp16": torch.float16}
"""The precisions that torch.autocast brings, beside which what stays float32 may use TF32."""


def default_device() -> torch.device:
    """An accelerator if this process has one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def group_of_one(device: torch.device) -> None:
    """Make this process a process group of its own. NCCL is told which device is meant, which it would guess else."""
    store = dist.HashStore()
    if device.type == "cuda":
        index = torch.cuda.current_device() if device.index is None else device.index
        dist.init_process_group("nccl", store=store, rank=0, world_size=1, device_id=torch.device("cuda", index))
    else:
        dist.init_process_group("gloo", store=store, rank=0, world_size=1)


def set_precision(*wanted: str) -> None:
    """How all threads of this process multiply and convolve float32 on CUDA from now on.

    wanted: what runs here side by side, each `fp32`, `tf32` or a half precision; full float32 where one wants that.
    """
    reduced = "fp32" not in wanted
    torch.backends.cuda.matmul.allow_tf32 = reduced
    torch.backends.cudnn.allow_tf32 = reduced


def set_determinism(wanted: bool) -> None:
    """Whether this process's accelerator sums in one order only, so that the same numbers give the same bits.

    Attention and scattered sums otherwise add up in the order in which blocks of threads finish. To be called before
    the process first multiplies on the device: cuBLAS takes its workspace once. Operations that have no such form raise
    torch's error, which names them.
    """
    if wanted:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # what torch asks for
    torch.use_deterministic_algorithms(wanted)
    torch.backends.cudnn.benchmark = False


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """Networks in a half precision where it is one; nothing otherwise."""
    half = HALVES.get(precision)
    return torch.autocast(device.type, half, enabled=half is not None)


@contextmanager
def computing(precision: str, device: torch.device) -> Iterator[None]:
    """A stretch of a stage that computes in one precision, beside others of the process in theirs; networks see
    autocast where it is a half one. It binds all threads: not for what runs beside a training.
    """
    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    set_precision(precision)
    try:
        with fastest_attention(device), autocast(precision, device):
            yield
    finally:
        torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def uploaded(values: torch.Tensor, device: torch.device) -> torch.Tensor:
    """On the device. On its way to an accelerator through pinned memory, so that the host need not wait until what the
    device has to do before is done."""
    if device.type != "cuda":
        return values.to(device)
    return values.pin_memory().to(device, non_blocking=True)
