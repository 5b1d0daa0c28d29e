"""AdamW with the guard inside: a step whose gradient is no good is left out on the device, without asking the host.

Reading a gradient's norm back on every step would make an accelerator wait. Here the verdict stays a tensor that the
fused kernel reads itself, so a bad step changes no weight and no moment; the host reads the verdicts when it logs.
Clipping happens in the same kernel: DeepSpeed's own would hide the true norm from the guard.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

_TRUSTED_STEPS = 100.0
"""The usual norm is known after this many good steps; before, only non-finite gradients are bad. Our choice."""
_FOLLOW = 0.02


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that skips non-finite and exploding gradients and clips the others.

    limit: a gradient longer than this many times the running mean of good ones explodes; None never.
    clip_norm: longest gradient that passes unscaled; None clips nothing.
    sharded: each worker steps its own part of the parameters (ZeRO), so that norms add up over workers.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        limit: float | None,
        clip_norm: float | None,
        sharded: bool,
        **adam: Any,
    ) -> None:
        super().__init__(parameters, fused=True, **adam)
        self.limit, self.clip_norm, self.sharded = limit, clip_norm, sharded
        device = self.param_groups[0]["params"][0].device
        self.norm, self.bad = torch.zeros((), device=device), torch.zeros((), device=device)
        """Of the last step: the gradient's norm before clipping, and 1 where it was left out."""
        self.usual, self.good = torch.zeros((), device=device), torch.zeros((), device=device)
        """Running mean of good norms, and how many there were."""
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        self.armed = False
        """Whether steps are judged; not while an engine steps to allocate the moments."""

    def expect_nothing(self) -> None:
        """Take the coming step as left out until it is judged: ZeRO drops a non-finite one before it gets here."""
        self.norm, self.bad = torch.full_like(self.norm, torch.inf), torch.ones_like(self.bad)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.armed:
            self._judge([p.grad for group in self.param_groups for p in group["params"] if p.grad is not None])
        super().step(closure)

    def _judge(self, gradients: list[Tensor]) -> None:
        square = torch.stack(torch._foreach_norm(gradients)).square().sum()
        if self.sharded:
            dist.all_reduce(square)
        norm = square.sqrt()
        good = norm.isfinite()
        if self.limit is not None:
            good &= (norm <= self.limit * self.usual) | (self.good < _TRUSTED_STEPS)
        follow = torch.maximum(1 / (self.good + 1), norm.new_tensor(_FOLLOW))
        self.usual = torch.where(good, self.usual + follow * (norm - self.usual), self.usual)
        self.good, self.norm, self.bad = self.good + good, norm, 1.0 - good.float()
        self.found_inf = self.bad
        if self.clip_norm is not None:  # the kernel divides gradients by it
            self.grad_scale = torch.where(good, (norm / self.clip_norm).clamp_min(1.0), torch.ones_like(norm))

    def allocate(self) -> None:
        """Make the moments exist, all zero and at step 0, as a checkpoint's are to be laid into them."""
        armed, self.armed, self.found_inf, self.grad_scale = self.armed, False, None, None
        for group in self.param_groups:
            rate, group["lr"] = group["lr"], 0.0
            fresh = [p for p in group["params"] if p not in self.state and p.requires_grad]
            for parameter in fresh:
                parameter.grad = torch.zeros_like(parameter)
            super().step()
            for parameter in fresh:
                parameter.grad = None
            group["lr"] = rate
        for state in self.state.values():
            state["step"].zero_()
        self.armed = armed

    def guard_state(self) -> dict[str, float]:
        return {"usual": float(self.usual), "good": float(self.good), "steps": self.steps}

    def load_guard_state(self, state: dict[str, float]) -> None:
        self.usual.fill_(state["usual"])
        self.good.fill_(state["good"])
        for values in self.state.values():
            values["step"].fill_(state["steps"])

    @property
    def steps(self) -> float:
        """Steps that were taken, bad ones left out."""
        return next((float(values["step"]) for values in self.state.values() if "step" in values), 0.0)
