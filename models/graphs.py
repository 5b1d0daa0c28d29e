"""Compiled graphs: one for every kind of call, however many kinds and models a process has."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from types import FunctionType
from typing import Any

import torch
from torch import Tensor, nn

Tell = Callable[[str], None]
"""Takes one line for people."""
Turn = Callable[[str], AbstractContextManager[object]]
"""Around the making of a graph, by what is compiled."""


def at_once(_what: str) -> AbstractContextManager[object]:
    """Whoever else makes one."""
    return nullcontext()


def compiled(forward: Callable[..., Any], tell: Tell, turn: Turn = at_once) -> Callable[..., Any]:
    """`forward`, a function whose first argument is a module, with a compiled graph for each kind of
    call: shapes and dtypes of its arguments, training or not, gradients or not, autocast. A graph
    serves every module of one structure.

    torch counts variants by code object, over all models of a process, and from the ninth on a graph
    that may not break is an error. Raising that limit moves the end and makes every call try all
    variants in turn. Here every kind has a code object of its own: its graph is found by a look into
    a table, shapes are constants, which is faster than the one graph of unknown shapes that torch
    would make of the second, and all of it goes with the model.
    """
    graphs: dict[tuple[Any, ...], Callable[..., Any]] = {}

    def call(module: nn.Module, *given: Any, **named: Any) -> Any:
        kind = (module.training, *surroundings(), *(_kind(each) for each in given), *_named(named))
        graph = graphs.get(kind)
        if graph is not None:
            return graph(module, *given, **named)
        graph = graphs[kind] = torch.compile(_of_its_own(forward), fullgraph=True, dynamic=False)
        what = f"{type(module).__name__} for {_shapes(given)}"
        with turn(what):
            tell(f"compiling {what}: the first call waits for it, and so does its first backward pass")
            started = time.perf_counter()
            result = graph(module, *given, **named)
            tell(f"compiled {what} in {time.perf_counter() - started:.1f} s")
        return result

    return call


def _of_its_own(forward: Callable[..., Any]) -> Callable[..., Any]:
    """A function that calls `forward` and shares its code object with no other."""

    def through(*given: Any, **named: Any) -> Any:
        return forward(*given, **named)

    code = through.__code__.replace()
    return FunctionType(code, through.__globals__, through.__name__, through.__defaults__, through.__closure__)


def surroundings() -> tuple[Any, ...]:
    """What, beside its arguments, decides how a network computes: gradients or not, and autocast."""
    return (
        torch.is_grad_enabled(),
        torch.is_inference_mode_enabled(),
        *(torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) for device in _DEVICES),
    )


_DEVICES = ("cpu", "cuda")


def _named(values: dict[str, Any]) -> tuple[Any, ...]:
    return tuple((name, _kind(value)) for name, value in values.items())


def _kind(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.shape, value.dtype, value.device, value.requires_grad
    return value if isinstance(value, bool | int | float | str | None) else type(value)


def _shapes(given: tuple[Any, ...]) -> str:
    tensors = [value for value in given if isinstance(value, Tensor)]
    return ", ".join(f"{' × '.join(map(str, value.shape))} {str(value.dtype)[6:]}" for value in tensors)
