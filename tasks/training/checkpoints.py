"""Checkpoints of a training in its artifact's folder: `checkpoints/{images}/`, whole when `complete.json` is there.

A checkpoint is tensors by name and a few plain values, and knows nothing of workers or ZeRO stages. Rank 0 writes it
in a thread while training goes on, snapshots of averages too. The newest whole one is read back; a damaged one is
named and skipped.
"""

from __future__ import annotations

import hashlib
import json
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from typing import Any

import torch.distributed as dist
from safetensors.torch import load as from_safetensors
from safetensors.torch import save as to_safetensors
from torch import Tensor

from infra import logs
from infra.storage import FileEntry, Storage
from tasks.data.receipts import Receipt, write_receipt

FOLDER = "checkpoints"
_COMPLETE = "complete.json"
_VALUES = "values.json"
_AT_ONCE = 2
"""Checkpoints in memory that wait to be written; with more, training waits."""


@dataclass(frozen=True)
class Checkpoint:
    """Everything that training needs to go on."""

    images_seen: int
    tensors: Mapping[str, Mapping[str, Tensor]]
    """Parts (`weights`, `ema`, `exp_avg`, …), each one file: tensors by parameter name, on the CPU."""
    values: Mapping[str, Any]
    """Plain JSON."""


class Checkpoints:
    """The checkpoints of one training. `save`, `snapshot` and `wait` are rank 0's, `newest` is for all together.

    keep: how many of the newest are kept; every: images, those at multiples of which are kept for good.
    stamp: adds to a snapshot what it says of itself.
    """

    def __init__(
        self,
        storage: Storage,
        keep: int,
        every: int | None = None,
        stamp: Callable[[bytes, str], bytes] = lambda data, name: data,
    ) -> None:
        self._storage, self._keep, self._every, self._stamp = storage, keep, every, stamp
        self._writer = ThreadPoolExecutor(1, thread_name_prefix="checkpoint")
        self._pending: deque[Future[None]] = deque()

    def save(self, checkpoint: Checkpoint, best: int | None = None) -> None:
        """Begin to write; the one at `best` images is kept. Raises what a write before failed with."""
        self._begin(self._write, checkpoint, best)

    def snapshot(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        """Begin to write one file of the artifact, and its receipt after it. Raises like `save`."""
        self._begin(self._write_snapshot, name, tensors)

    def wait(self) -> None:
        """Until everything is written. Raises what writing failed with."""
        while self._pending:
            self._pending.popleft().result()

    def _begin(self, write: Callable[..., None], *what: Any) -> None:
        while self._pending and (self._pending[0].done() or len(self._pending) >= _AT_ONCE):
            self._pending.popleft().result()
        self._pending.append(self._writer.submit(write, *what))

    def at(self, images_seen: int | None) -> Checkpoint | None:
        """The checkpoint there; None, and a word about it, where it is damaged or gone."""
        if images_seen is None:
            return None
        found, fault = read(self._storage, images_seen)
        if fault is not None:
            logs.say(
                f"checkpoint {self._storage.url}/{_name(images_seen)} is damaged ({fault}): going without", "warning"
            )
        return found

    def newest(self) -> Checkpoint | None:
        """The newest checkpoint that is whole for every worker; None where there is none."""
        rank, world = dist.get_rank(), dist.get_world_size()
        found: list[Any] = [whole(self._storage) if rank == 0 else None]
        dist.broadcast_object_list(found)
        for images_seen in reversed(found[0]):
            loaded, fault = read(self._storage, images_seen)
            faults: list[str | None] = [None] * world
            dist.all_gather_object(faults, fault)
            if not any(faults):
                return loaded
            if rank == 0:
                logs.say(
                    f"checkpoint {self._storage.url}/{_name(images_seen)} is damaged "
                    f"({next(filter(None, faults))}): taking the one before",
                    "warning",
                )
        return None

    def _write(self, checkpoint: Checkpoint, best: int | None) -> None:
        name = _name(checkpoint.images_seen)
        entries = [
            self._storage.write_bytes(f"{name}/{part}.safetensors", to_safetensors(dict(tensors)))
            for part, tensors in checkpoint.tensors.items()
        ]
        entries.append(self._storage.write_bytes(f"{name}/{_VALUES}", json.dumps(checkpoint.values).encode()))
        listed = json.dumps([asdict(entry) for entry in entries]).encode()
        self._storage.write_bytes(f"{name}/{_COMPLETE}", listed)
        there = whole(self._storage)
        kept = {best, *(_milestones(there, self._every) if self._every else ())}
        for old in there[: -self._keep]:
            if old not in kept:
                self._storage.delete(_name(old))

    def _write_snapshot(self, name: str, tensors: Mapping[str, Tensor]) -> None:
        data = self._stamp(to_safetensors(dict(tensors)), name)
        write_receipt(self._storage, Receipt(self._storage.write_bytes(name, data), name))


def _milestones(there: Sequence[int], every: int) -> set[int]:
    """The first checkpoint at or after each multiple of so many images: few lie on one exactly."""
    first: dict[int, int] = {}
    for images in there:
        first.setdefault(images // every, images)
    return {images for multiple, images in first.items() if multiple > 0}


def whole(storage: Storage) -> list[int]:
    """Images seen of every complete checkpoint, the oldest first."""
    names = [name for name in storage.names(FOLDER) if name.endswith(f"/{_COMPLETE}")]
    return sorted(int(name.split("/")[1]) for name in names)


def read(storage: Storage, images_seen: int) -> tuple[Checkpoint | None, str | None]:
    """A checkpoint, or what is wrong with it."""
    tensors: dict[str, dict[str, Tensor]] = {}
    values: dict[str, Any] = {}
    try:
        for listed in json.loads(storage.read_bytes(f"{_name(images_seen)}/{_COMPLETE}")):
            entry = FileEntry(**listed)
            data = storage.read_bytes(entry.path)
            if hashlib.sha256(data).hexdigest() != entry.sha256:
                return None, f"{entry.path} does not have the hash that was written down"
            file = entry.path.rsplit("/", 1)[1]
            if file == _VALUES:
                values = json.loads(data)
            else:
                tensors[file.removesuffix(".safetensors")] = from_safetensors(data)
    except FileNotFoundError as error:
        return None, f"missing file {error}"
    except (ValueError, KeyError, TypeError) as error:
        return None, f"{_COMPLETE}: {error}"
    return Checkpoint(images_seen, tensors, values), None


def _name(images_seen: int) -> str:
    return f"{FOLDER}/{images_seen:014d}"
