"""Finds places where the host waits for a device, without one: tensors on `meta` stand for those of an accelerator."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

DEVICES = ("meta", *(["cuda"] if torch.cuda.is_available() else []))


class Waited(AssertionError):
    """A value went from the host to the device or back."""


@contextmanager
def no_waits(device: str) -> Iterator[None]:
    """Raises where numbers are brought to the device, and where one of its tensors is read: on `meta` that has no
    value to be read, torch refuses by itself. On CUDA its own debug mode watches, kernels included.
    """
    if device == "cuda":
        torch.cuda.set_sync_debug_mode("error")
        try:
            yield
        finally:
            torch.cuda.set_sync_debug_mode("default")
        return
    with _Made(), _Copied():
        yield


class _Made(TorchFunctionMode):
    """Tensors that are made of Python's numbers, which on `meta` are never copied."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.tensor, torch.as_tensor, torch.asarray, Tensor.new_tensor) and result.is_meta:
            raise Waited(f"{func.__name__} copies numbers to the device")
        return result


class _Copied(TorchDispatchMode):
    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if func in (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default):
            source = args[1] if func is torch.ops.aten.copy_.default else args[0]
            if result.device != source.device:
                raise Waited(f"a copy from {source.device} to {result.device}")
        return result
