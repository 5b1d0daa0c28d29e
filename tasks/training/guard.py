"""What follows from bad steps. That they change nothing is the optimizer's doing; this is the policy and the log."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

from configs.errors import UserError
from configs.training import Guard as GuardSection
from infra import logs
from tasks.loading.loader import Loader

_SHOWN_KEYS = 8


class Rewind(Exception):
    """Back to the last checkpoint, with a guard that knows what to leave out."""

    def __init__(self, guard: Guard) -> None:
        super().__init__("rewind")
        self.guard = guard


class Guard:
    """Collects the verdicts of steps without reading them; `look` reads and acts, alike in all workers."""

    def __init__(self, left_out: frozenset[int] = frozenset(), rewinds: int = 0) -> None:
        self.left_out = left_out
        """Cursors before batches that are served but not trained on."""
        self.rewinds = rewinds
        self._in_a_row = 0
        self._seen: list[tuple[int, Tensor]] = []

    def resume(self, left_out: list[int]) -> None:
        self.left_out |= frozenset(left_out)

    def watch(self, cursor: int, bad: Tensor) -> None:
        """Remember the verdict on the batch that begins at `cursor`: a scalar on the device, 1 where it is bad."""
        self._seen.append((cursor, bad))

    def look(self, section: GuardSection, loader: Loader) -> None:
        """Read the verdicts since last time.

        Raises:
            Rewind: the policy says so, and patience lasts.
            UserError: the policy is to stop, or patience is at its end.
        """
        if not self._seen:
            return
        verdicts = torch.stack([bad for _, bad in self._seen]).tolist()
        cursors = [cursor for cursor, _ in self._seen]
        self._seen = []
        found = [cursor for cursor, bad in zip(cursors, verdicts, strict=True) if bad]
        for bad in verdicts:
            self._in_a_row = self._in_a_row + 1 if bad else 0
            if self._in_a_row > section.patience:
                break
        if not found:
            return
        told = [_tell(cursor, loader, section.policy) for cursor in found[:3]]
        if section.policy == "stop" or self._in_a_row > section.patience or self.rewinds >= section.patience:
            raise UserError(
                f"training diverged: {told[0]}; {len(found)} such steps since the last look. Lower learning_rate, set "
                "clip_norm or model.qk_norm, or look at these images"
            )
        if dist.get_rank() == 0:
            for line in told:
                logs.say(f"guard: {line}", "warning")
        if section.policy == "rewind":
            raise Rewind(Guard(self.left_out | frozenset(found), self.rewinds + 1))


def _tell(cursor: int, loader: Loader, policy: str) -> str:
    """A line about the bad batch; its keys are read again, because carrying them along would cost every step."""
    keys = loader.keys_at(cursor)
    shown = ", ".join(keys[:_SHOWN_KEYS]) + (f" and {len(keys) - _SHOWN_KEYS} more" if len(keys) > _SHOWN_KEYS else "")
    return f"{policy}: loss or gradient not finite or exploding at image {cursor:,}, batch of {shown}"
