"""AdamW with the guard inside: a step whose loss or gradient is no good is left out on the device, unseen by the host.

Reading a gradient's norm back on every step would make an accelerator wait. Here the verdict stays a tensor that the
fused kernel reads itself, so a bad step changes no weight and no moment; the host reads the verdicts when it logs.
Clipping and the scale of float16 losses are undone in the same kernel: DeepSpeed's own would hide the true norm from
the guard and ask the host.
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
_FIRST_SCALE, _LEAST_SCALE, _LARGEST_SCALE = 2.0**16, 1.0, 2.0**24
_DOUBLED_AFTER = 2000.0
"""Good steps in a row after which the scale of float16 losses doubles (Micikevicius et al. 2018, section 3.2)."""
_KEPT = ("usual", "usual_loss", "good", "scale", "since_change")


class GuardedAdamW(torch.optim.AdamW):
    """Fused AdamW that skips steps of non-finite and exploding losses or gradients and clips the others.

    limit: a gradient longer than this many times the running mean of good ones explodes, and a loss likewise; None
        minds non-finite ones only.
    clip_norm: longest gradient that passes unscaled; None clips nothing.
    sharded: each worker steps its own part of the parameters (ZeRO), so that norms add up over workers.
    scaled: gradients are those of the loss times `scale`, so that float16 keeps their small values. A step that
        overflows is left out and halves the scale; it is no event, unless the scale cannot get any smaller.
    """

    def __init__(
        self,
        parameters: Iterable[nn.Parameter],
        *,
        limit: float | None,
        clip_norm: float | None,
        sharded: bool,
        scaled: bool = False,
        **adam: Any,
    ) -> None:
        super().__init__(parameters, fused=True, **adam)
        self.limit, self.clip_norm, self.sharded, self.scaled = limit, clip_norm, sharded, scaled
        device = self.param_groups[0]["params"][0].device
        self.loss, self.norm, self.bad, self.event = torch.zeros(4, device=device).unbind()
        """Of the last step: its loss, the gradient's norm before clipping, 1 where it was left out, and 1 where that
        is for the guard to know."""
        self.usual, self.usual_loss, self.good = torch.zeros(3, device=device).unbind()
        """Running means of good norms and of absolute losses, and how many there were."""
        self.scale = torch.full((), _FIRST_SCALE if scaled else 1.0, device=device)
        self.since_change = torch.zeros((), device=device)
        """What the loss is multiplied by before the backward pass, and good steps since that changed."""
        self.veto = torch.zeros((), device=device)
        """1 where the next step is to be left out whatever it is like, and that is no event: another network's step on
        the same batch was."""
        self.found_inf: Tensor | None = None
        self.grad_scale: Tensor | None = None
        self.armed = False
        """Whether steps are judged; not while an engine steps to allocate the moments."""

    def expect(self, loss: Tensor) -> None:
        """Announce a step by its loss, the mean over the global batch. It counts as left out until it is judged: ZeRO
        drops a non-finite one before it gets here.
        """
        self.loss, self.norm, self.bad = loss, torch.full_like(self.norm, torch.inf), torch.ones_like(self.bad)

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:  # type: ignore[override]
        if self.armed:
            self._judge([p.grad for group in self.param_groups for p in group["params"] if p.grad is not None])
        self._adam_step(closure)

    def _adam_step(self, closure: Any = None) -> None:
        """Of all parameters that have a gradient, as they were judged."""
        super().step(closure)

    def _judge(self, gradients: list[Tensor]) -> None:
        square = torch.stack(torch._foreach_norm(gradients)).square().sum()
        if self.sharded:
            dist.all_reduce(square)
        norm, size = square.sqrt() / self.scale, self.loss.abs()
        good = norm.isfinite() & size.isfinite() & (self.veto == 0)
        if self.limit is not None:
            usual = (norm <= self.limit * self.usual) & (size <= self.limit * self.usual_loss)
            good &= usual | (self.good < _TRUSTED_STEPS)
        follow = (1 / (self.good + 1)).clamp_min(_FOLLOW)
        self.usual = torch.where(good, self.usual + follow * (norm - self.usual), self.usual)
        self.usual_loss = torch.where(good, self.usual_loss + follow * (size - self.usual_loss), self.usual_loss)
        self.good, self.norm, self.bad = self.good + good, norm, 1.0 - good.float()
        self.found_inf = self.bad
        self.grad_scale = self.scale if self.scaled else None  # the kernel divides gradients by it
        if self.clip_norm is not None:
            self.grad_scale = torch.where(good, (norm / self.clip_norm).clamp_min(1.0), 1.0) * self.scale

    @torch.no_grad()
    def settle(self) -> None:
        """After a step that was announced: what the guard is told of it, and the scale of the next loss."""
        self.event = self.bad * (1 - self.veto)
        if not self.scaled:
            return
        # A loss that is not finite is no matter of scale, and one that overflows at the least scale is not either.
        overflow = self.bad.bool() & ~self.norm.isfinite() & self.loss.isfinite() & (self.scale > _LEAST_SCALE)
        self.event = self.event * ~overflow
        since = torch.where(overflow, 0.0, self.since_change + (1 - self.bad))
        doubled = since >= _DOUBLED_AFTER
        factor = torch.where(overflow, 0.5, torch.where(doubled, 2.0, 1.0))
        self.scale = (self.scale * factor).clamp(_LEAST_SCALE, _LARGEST_SCALE)
        self.since_change = torch.where(doubled, 0.0, since)

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

    def figures(self) -> dict[str, Tensor]:
        """Scalars about the last step, for logs."""
        return {"gradient_norm": self.norm, "left_out": self.bad} | ({"loss_scale": self.scale} if self.scaled else {})

    def kept(self) -> dict[str, float]:
        """What a checkpoint keeps beside the moments."""
        return {name: float(getattr(self, name)) for name in _KEPT} | {"steps": self.steps}

    def load_kept(self, state: dict[str, float]) -> None:
        for name in _KEPT:
            getattr(self, name).fill_(state[name])
        for values in self.state.values():
            values["step"].fill_(state["steps"])

    @property
    def steps(self) -> float:
        """Steps that were taken, bad ones left out."""
        return next((float(values["step"]) for values in self.state.values() if "step" in values), 0.0)
