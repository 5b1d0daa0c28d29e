"""Plain items through an actor class on Ray Data: networks are loaded once per actor, then items one by one."""

from __future__ import annotations

import logging
import pickle
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from configs.compute import ActorCompute
from configs.errors import attempt, checked
from infra.cluster import actor_options, connect, require_gpus


def spread(
    items: Sequence[Mapping[str, Any]], worker: type, arguments: Sequence[Any], compute: ActorCompute
) -> Iterator[Any]:
    """Results of `worker(*arguments)(item)` for every item, as they finish (in no order).

    Args:
        items: plain values; each becomes one call.
        worker: a class whose instances take one item and return something that pickles.
        arguments: what its constructor needs; plain values and artifact references.
        compute: how many actors, and of what size.

    Raises:
        UserError: one that an actor raised, in its own words; anything else is Ray's error.
    """
    if not items:
        return
    for row in _by_ray([{"item": pickle.dumps(item)} for item in items], (worker, tuple(arguments)), compute):
        yield checked(pickle.loads(row["result"]))


def _by_ray(
    rows: Sequence[dict[str, Any]], work: tuple[type, tuple[Any, ...]], compute: ActorCompute
) -> Iterator[dict[str, Any]]:
    """What `Worker(*work)`, in as many actors as there may be, makes of each row."""
    import ray.data
    from ray.data import ActorPoolStrategy, DataContext

    connect()
    require_gpus("compute.actors.gpus_per_actor", compute.gpus_per_actor)
    DataContext.get_current().enable_progress_bars = False
    logging.getLogger("ray.data").setLevel(logging.WARNING)
    most = min(compute.actors, len(rows))
    fit = max(1, min(most, int(ray.cluster_resources().get("CPU", 1.0) // compute.cpus_per_actor)))
    results = ray.data.from_items(list(rows), override_num_blocks=len(rows)).map(
        Worker,  # type: ignore[arg-type]  # a class, called in its actors
        fn_constructor_args=work,
        compute=ActorPoolStrategy(min_size=fit, max_size=most),  # more may start where a cluster grows
        **actor_options(compute),
    )
    yield from results.iter_rows()


class Worker:
    """One actor: its errors come out as values, those of its construction with the first result."""

    def __init__(self, worker: type, arguments: tuple[Any, ...]) -> None:
        self._work = attempt(lambda: worker(*arguments))

    def __call__(self, row: dict[str, Any]) -> dict[str, Any]:
        return {"result": pickle.dumps(attempt(lambda: checked(self._work)(pickle.loads(row["item"]))))}
