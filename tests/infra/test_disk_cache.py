from __future__ import annotations

import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from configs import UserError
from infra.artifacts import Artifact
from infra.disk_cache import copy_name, fetch
from infra.storage import Storage
from tasks.loading.loader import Batch, Loader
from tests.helpers.piles import put_latents
from tests.helpers.streams import same, take, with_a_flipped_bit


@pytest.fixture
def remote(home: Path) -> Iterator[tuple[Artifact, Path]]:
    """An artifact in fsspec's memory, which is as remote as a bucket; and the folder of local copies."""
    artifact, _ = put_latents("memory://loader", (64, 48, 32), {"z": (2, 4, 4)})
    yield artifact, home / "cache"
    artifact.storage.delete()


def _copies(folder: Path) -> list[Path]:
    return sorted(folder.glob("*.parquet"))


def test_a_remote_part_is_read_once(remote: tuple[Artifact, Path]) -> None:
    artifact, folder = remote
    plain = take(Loader(artifact, "train", ("z",), 16, 0), 432)
    take(Loader(artifact, "train", ("z",), 16, 0, cache_gib=1.0), 144)
    assert sum(path.stat().st_size for path in _copies(folder)) == artifact.manifest.size
    for entry in artifact.files("train/"):
        artifact.storage.delete(entry.path)
    assert same(take(Loader(artifact, "train", ("z",), 16, 0, cache_gib=1.0), 432), plain)


def test_the_cache_keeps_to_its_limit_and_evicts_the_least_recently_used(remote: tuple[Artifact, Path]) -> None:
    artifact, folder = remote
    entries = artifact.files("train/")
    limit = entries[0].bytes + entries[1].bytes
    for number in (0, 1, 0, 2):
        fetch(artifact, entries[number], folder / copy_name(entries[number]), limit)
        assert sum(path.stat().st_size for path in folder.iterdir()) <= limit
        time.sleep(0.01)  # the order of use is that of the files' times
    assert _copies(folder) == sorted(folder / copy_name(entries[number]) for number in (0, 2))

    for path in _copies(folder):
        path.unlink()
    plain = take(Loader(artifact, "train", ("z",), 16, 0), 288)
    small = (entries[1].bytes + 1) / 2**30  # too small for the first part, which is read in place
    assert same(take(Loader(artifact, "train", ("z",), 16, 0, cache_gib=small), 288), plain)
    assert folder / copy_name(entries[0]) not in _copies(folder)
    assert sum(path.stat().st_size for path in _copies(folder)) <= entries[1].bytes


def test_several_threads_or_processes_fetch_a_part_once(
    remote: tuple[Artifact, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, folder = remote
    entry = artifact.files("train/")[0]
    asked: list[str] = []
    whole = Storage.read_bytes

    def counted(storage: Storage, name: str) -> bytes:
        asked.append(name)
        time.sleep(0.05)
        return whole(storage, name)

    monkeypatch.setattr(Storage, "read_bytes", counted)
    with ThreadPoolExecutor(4) as pool:  # each has a lock of its own, as processes have
        list(pool.map(lambda _: fetch(artifact, entry, folder / copy_name(entry), 2**30), range(4)))
    assert asked == [entry.path] and [path.stat().st_size for path in _copies(folder)] == [entry.bytes]


@pytest.mark.parametrize("streams", ["threads of a stream", "streams side by side"])
def test_a_cache_too_small_for_its_readers_serves_them_all(home: Path, streams: str) -> None:
    artifact, _ = put_latents("memory://crowded", (64,) * 8, {"z": (2, 4, 4)})
    limit = 2.2 * max(entry.bytes for entry in artifact.manifest.files)

    def served(threads: int, cache_gib: float) -> list[Batch]:
        return take(Loader(artifact, "train", ("z",), 64, 0, threads=threads, cache_gib=cache_gib), 2048)

    plain = served(1, 0.0)
    if streams == "threads of a stream":
        assert same(served(8, limit / 2**30), plain)
    else:  # each with a loader of its own, as the workers on a node have
        with ThreadPoolExecutor(6) as pool:
            found = list(pool.map(lambda _: served(1, limit / 2**30), range(6)))
        assert all(same(one, plain) for one in found)
    assert sum(path.stat().st_size for path in _copies(home / "cache")) <= limit
    artifact.storage.delete()


def test_a_damaged_copy_is_fetched_again(remote: tuple[Artifact, Path]) -> None:
    artifact, folder = remote
    plain = take(Loader(artifact, "train", ("z",), 16, 0, cache_gib=1.0), 144)
    whole = {path: path.read_bytes() for path in _copies(folder)}
    for harm in (lambda data: data[:-9], lambda data: b"\0" * len(data), with_a_flipped_bit):
        for path, data in whole.items():
            path.write_bytes(harm(data))
        assert same(take(Loader(artifact, "train", ("z",), 16, 0, cache_gib=1.0), 144), plain)
        assert {path: path.read_bytes() for path in _copies(folder)} == whole


def test_from_s3_with_and_without_the_local_cache(s3_root: str, home: Path) -> None:
    artifact, _ = put_latents(s3_root, (100, 60), {"z": (2, 4, 4)})
    plain = take(Loader(artifact, "train", ("z",), 32, 0), 320)
    limit = 1.2 * max(entry.bytes for entry in artifact.manifest.files)
    loader = Loader(artifact, "train", ("z",), 32, 0, cache_gib=limit / 2**30)
    assert same(take(loader, 320), plain)
    kept = _copies(home / "cache")
    assert kept and sum(path.stat().st_size for path in kept) <= limit
    artifact.storage.write_bytes(artifact.files("train/")[0].path, b"\0" * artifact.files("train/")[0].bytes)
    for path in kept:
        path.unlink()
    with pytest.raises(UserError, match=r"part-00000\.parquet is damaged"):
        take(Loader(artifact, "train", ("z",), 32, 0, cache_gib=1.0), 320)
