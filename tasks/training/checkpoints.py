"""Checkpoints of a training in its artifact's folder: `checkpoints/{images}/`, whole when `complete.json` is there.

Every worker writes its own files (the engine's: weights, optimizer, and what we add), rank 0 then writes the list
with hashes. The newest whole one is read back; a damaged one is named and skipped for the one before.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch.distributed as dist

from infra.storage import FileEntry, Storage

FOLDER = "checkpoints"
_COMPLETE = "complete.json"
_TAG = "state"


def save(engine: Any, storage: Storage, images_seen: int, state: Mapping[str, Any], keep: int) -> None:
    """Write a checkpoint from all workers, then forget all but the newest `keep`."""
    name = f"{FOLDER}/{images_seen:014d}"
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / _TAG).mkdir()
        engine.save_checkpoint(folder, tag=_TAG, client_state=dict(state), save_latest=False)
        written = [
            storage.upload(str(path), f"{name}/{path.relative_to(folder).as_posix()}")
            for path in sorted(Path(folder).rglob("*"))
            if path.is_file()
        ]
    gathered: list[list[FileEntry]] = [[] for _ in range(dist.get_world_size())]
    dist.all_gather_object(gathered, written)  # also the barrier after which every file is there
    if dist.get_rank() == 0:
        entries = [asdict(entry) for rank in gathered for entry in rank]
        storage.write_bytes(f"{name}/{_COMPLETE}", json.dumps(entries).encode())
        for old in _images(storage)[:-keep]:
            storage.delete(f"{FOLDER}/{old:014d}")
    dist.barrier()


def restore(engine: Any, storage: Storage) -> dict[str, Any] | None:
    """Load the newest whole checkpoint into the engine; its state, or None where there is none."""
    for images_seen in reversed(_agreed(storage)):
        name = f"{FOLDER}/{images_seen:014d}"
        with tempfile.TemporaryDirectory() as folder:
            fault = _download(storage, name, Path(folder))
            faults: list[str | None] = [None] * dist.get_world_size()
            dist.all_gather_object(faults, fault)
            if any(faults):
                if dist.get_rank() == 0:
                    print(
                        f"checkpoint {storage.url}/{name} is damaged ({next(filter(None, faults))}): taking the one before"
                    )
                continue
            _, state = engine.load_checkpoint(folder, tag=_TAG)
            return dict(state)
    return None


def _agreed(storage: Storage) -> list[int]:
    """Images of the whole checkpoints, as rank 0 sees them, so that all workers try the same ones."""
    found: list[Any] = [_images(storage) if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found)
    return list(found[0])


def _images(storage: Storage) -> list[int]:
    names = [name for name in storage.names(FOLDER) if name.endswith(f"/{_COMPLETE}")]
    return sorted(int(name.split("/")[1]) for name in names)


def _download(storage: Storage, name: str, folder: Path) -> str | None:
    """Fetch a checkpoint; what is wrong with it, or None."""
    try:
        entries = [FileEntry(**values) for values in json.loads(storage.read_bytes(f"{name}/{_COMPLETE}"))]
        for entry in entries:
            data = storage.read_bytes(entry.path)
            if hashlib.sha256(data).hexdigest() != entry.sha256:
                return f"{entry.path} does not have the hash that was written down"
            target = folder / entry.path.removeprefix(f"{name}/")
            target.parent.mkdir(parents=True, exist_ok=True)
            target.write_bytes(data)
    except FileNotFoundError as error:
        return f"missing file {error}"
    except (ValueError, KeyError, TypeError) as error:
        return f"{_COMPLETE}: {error}"
    return None
