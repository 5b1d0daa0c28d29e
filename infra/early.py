"""Machines of the next stage, started while this one still works.

An autoscaler starts what a placement group waits for. Ours is given back once it is fulfilled: it
holds nothing that the running stage might need, and the machines that came stay for as long as the
cluster lets machines idle. It goes with the process that asked, so nobody pays for a stage that
never comes.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

from infra import logs

_LOOK_SECONDS = 5.0


@contextmanager
def started_early(
    bundles: Sequence[dict[str, float]], share: Callable[[], float | None], lead: float
) -> Iterator[None]:
    """Ask for machines when the work within the context is expected to end in `lead` seconds.

    Args:
        bundles: resources of each worker that is to come, all together or none; without any
            nothing is done.
        share: of the work that is done, 0 to 1; None where that is not known (yet).
        lead: seconds that a machine takes to start.
    """
    if not (bundles and lead):
        yield
        return
    over = threading.Event()
    thread = threading.Thread(target=_watch, args=(list(bundles), share, lead, over), daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join(2 * _LOOK_SECONDS)


def _watch(
    bundles: list[dict[str, float]], share: Callable[[], float | None], lead: float, over: threading.Event
) -> None:
    try:
        if _nears_its_end(share, lead, over):
            _ask(bundles, over)
    except Exception as error:  # the next stage asks for itself
        logs.say(f"cannot ask for the next stage's machines early: {error}", "warning")


def _nears_its_end(share: Callable[[], float | None], lead: float, over: threading.Event) -> bool:
    """Wait until the work will be done within `lead` seconds, at the rate since the first look."""
    import ray

    first: tuple[float, float] | None = None
    pause = _LOOK_SECONDS
    while not over.wait(pause):
        now, done = time.monotonic(), _looked(share)
        if done is None or not ray.is_initialized():
            continue
        began, had = first = first or (now, done)
        if done > had:
            early = (1.0 - done) * (now - began) / (done - had) - lead
            if early <= 0.0:
                return True
            pause = max(_LOOK_SECONDS, early / 4)  # of days of training each look reads the curve
    return False


def _looked(share: Callable[[], float | None]) -> float | None:
    try:
        return share()
    except Exception:  # who knows it is away for a while, as MLflow may be: it is asked again
        return None


def _ask(bundles: list[dict[str, float]], over: threading.Event) -> None:
    from ray.util import placement_group, remove_placement_group

    logs.say(f"asking for the next stage's machines, {len(bundles)} times {bundles[0]}")
    group = placement_group(bundles, strategy="PACK")
    try:
        while not over.is_set() and not group.wait(_LOOK_SECONDS):
            pass
    finally:
        remove_placement_group(group)
