"""Muon for the matrices of a transformer's blocks, and AdamW for everything else, both behind one guard.

A matrix goes against its momentum made orthogonal, so that no direction of a weight learns faster than another. Source:
Jordan et al. 2024 (kellerjordan.github.io/posts/muon), whose iteration and coefficients these are; steps are scaled to
the usual length of AdamW's (Liu et al. 2025, arXiv 2502.16982), so that both share a learning rate and its schedule.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from tasks.training.optimizer import GuardedAdamW

MOMENTUM = 0.95
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
"""Of the quintic that drives singular values towards 1 fastest; it ends between about 0.7 and 1.2."""
_ITERATIONS = 5
_LENGTH = 0.2
"""Root mean square of a usual step of AdamW in units of its learning rate."""
_JOINED = {"qkv.weight": 3, "w12.weight": 2}
"""Matrices that are several in one, side by side along their rows: each is made orthogonal alone. Our choice."""


def matrices(named: Iterable[tuple[str, nn.Parameter]]) -> dict[nn.Parameter, int]:
    """The parameters that Muon takes, those of two axes within `blocks`, and how many matrices each of them is.

    The modulation is left to AdamW: it begins at zero and reads one vector an image. Our choice.
    """
    found: dict[nn.Parameter, int] = {}
    for name, parameter in named:
        if parameter.ndim == 2 and "blocks." in name and "adaLN_modulation" not in name:
            found[parameter] = next((n for end, n in _JOINED.items() if name.endswith(end)), 1)
    return found


class GuardedMuon(GuardedAdamW):
    """`GuardedAdamW`, whose matrices take Muon's steps. Their momentum is kept as `exp_avg`; `exp_avg_sq` stays zero.

    matrices: as the function of that name gives them; at least one.
    Other arguments as of `GuardedAdamW`; gradients must be whole on every worker, which ZeRO's are not.
    """

    def __init__(
        self, parameters: Iterable[nn.Parameter], *, matrices: Mapping[nn.Parameter, int], **options: Any
    ) -> None:
        if not matrices or options.get("sharded"):
            raise ValueError("Muon needs matrices with whole gradients: at least one, and no ZeRO stage")
        super().__init__(parameters, **options)
        self._matrices = dict(matrices)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if not self.armed:  # moments are allocated, as AdamW's
            super().step(closure)
            return
        held = {parameter: parameter.grad for parameter in self._matrices}
        self._judge([p.grad for group in self.param_groups for p in group["params"] if p.grad is not None])
        for parameter in held:
            parameter.grad = None
        self._adam_step(closure)
        for group in self.param_groups:
            for parameter in group["params"]:
                gradient = held.get(parameter)
                if gradient is not None:
                    self._muon_step(parameter, gradient, group["lr"], group["weight_decay"])
                    parameter.grad = gradient

    def _muon_step(self, parameter: nn.Parameter, gradient: Tensor, rate: Any, decay: float) -> None:
        state, good = self.state[parameter], self.bad == 0
        if self.grad_scale is not None:
            gradient = gradient / self.grad_scale
        momentum = state["exp_avg"].lerp(gradient, 1 - MOMENTUM)
        ahead = gradient.lerp(momentum, MOMENTUM)
        direction = torch.cat([orthogonal(each) for each in ahead.chunk(self._matrices[parameter])])
        rows, columns = len(parameter) // self._matrices[parameter], parameter.shape[1]
        length = _LENGTH * max(rows, columns) ** 0.5
        after = parameter * (1 - rate * decay) - rate * length * direction
        # Chosen on the device: a bad step, whose numbers may be none, leaves weight and momentum as they were.
        parameter.copy_(torch.where(good, after, parameter))
        state["exp_avg"].copy_(torch.where(good, momentum, state["exp_avg"]))
        state["step"] += good


def orthogonal(matrix_MN: Tensor) -> Tensor:
    """The nearest matrix whose singular values are all about 1, by five steps of a Newton-Schulz iteration.

    In bfloat16 on an accelerator, as published, in float32 on a CPU; the result is float32.
    """
    a, b, c = _COEFFICIENTS
    x = matrix_MN.bfloat16() if matrix_MN.is_cuda else matrix_MN.float()
    tall = x.shape[0] > x.shape[1]
    x = x.T if tall else x
    x = x / x.norm().clamp_min(1e-7)  # singular values at most 1
    for _ in range(_ITERATIONS):
        square = x @ x.T
        x = a * x + (b * square + c * square @ square) @ x
    return (x.T if tall else x).float()
