from __future__ import annotations

import itertools
import os
import time
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import UserError, load_recipe
from infra.artifacts import Artifact
from infra.storage import Storage
from tasks.buffers import as_tensor
from tasks.cache import copy_name, fetch
from tasks.decode import load
from tasks.groups_reader import GroupReader
from tasks.latents import WRITE_OPTIONS
from tasks.loader import Batch, Loader
from tasks.order import Order
from tasks.part_file import PartFile, read_span
from tasks.shard import SCHEMA
from tests.tasks.builders import put
from tests.tasks.piles import encoded, picture, put_latents

SHAPES = {"z": (2, 2, 2), "z_flip": (2, 2, 2), "s": (1, 2, 2), "s_flip": (1, 2, 2)}
ROWS = (100, 37, 64, 99)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, dict[str, np.ndarray]]:
    return put_latents(str(tmp_path_factory.mktemp("root")), ROWS, SHAPES)


orders = st.builds(
    Order,
    group_rows=st.lists(st.integers(1, 40), min_size=1, max_size=40).map(tuple),
    seed=st.integers(0, 3),
    shuffled_rows=st.sampled_from([32, 64, 500, 16_384]),  # many lanes with small windows, or one of each
)


def _served(order: Order, epoch: int, start: int, stop: int) -> list[int]:
    rows: list[int] = []
    for span in order.spans(start, stop):
        rows += order.window_rows(epoch, span.lane, span.window)[span.start : span.stop].tolist()
    return rows


@given(orders, st.integers(0, 2))
@settings(deadline=None, max_examples=60)
def test_every_row_exactly_once_an_epoch(order: Order, epoch: int) -> None:
    assert sorted(_served(order, epoch, 0, order.rows)) == list(range(order.rows))
    groups, begins = order.tape(epoch)
    assert sorted(groups.tolist()) == list(range(len(order.group_rows))) and begins[-1] == order.rows


@given(orders, st.data())
@settings(deadline=None, max_examples=60)
def test_any_slice_is_that_slice_of_the_epoch(order: Order, data: st.DataObject) -> None:
    start = data.draw(st.integers(0, order.rows))
    stop = data.draw(st.integers(start, order.rows))
    assert _served(order, 1, start, stop) == _served(order, 1, 0, order.rows)[start:stop]


def test_orders_differ_between_seeds_and_epochs() -> None:
    orders = [_served(Order((16,) * 8, seed), epoch, 0, 128) for seed in (0, 1) for epoch in (0, 1)]
    assert len({tuple(order) for order in orders}) == 4


def test_a_large_epoch_is_shuffled_well() -> None:
    order = Order((256,) * 400, 0)
    assert order.lanes > 1
    tape_rows = np.array(_served(order, 0, 0, order.rows))
    served = order.tape(0)[0][tape_rows // 256] * 256 + tape_rows % 256  # groups are of one size
    for batch in served[: 256 * 100].reshape(-1, 256):  # every batch draws from all over the data
        assert len(np.unique(batch // 256)) > 8
        assert abs(batch.mean() / order.rows - 0.5) < 0.3


def test_flips_are_fair_and_belong_to_the_position() -> None:
    order = Order((256,), 0)
    flips = order.flips(0, np.arange(100_000))
    assert abs(flips.mean() - 0.5) < 0.01
    assert abs((flips[1:] == flips[:-1]).mean() - 0.5) < 0.01
    assert np.array_equal(order.flips(0, np.arange(500, 600)), flips[500:600])
    assert not np.array_equal(order.flips(1, np.arange(1000)), flips[:1000])


def _take(loader: Loader, images: int, cursor: int = 0, world: int = 1) -> list[Batch]:
    """Global batches put together from every worker's slices."""
    streams = [loader.stream(cursor, rank, world) for rank in range(world)]
    found = []
    for _ in range(-(-images // loader.batch)):
        slices = [next(stream) for stream in streams]
        assert len({part.images_seen for part in slices}) == 1
        found.append(
            Batch(
                slices[0].images_seen,
                np.concatenate([part.positions for part in slices]),
                [key for part in slices for key in part.keys],
                np.concatenate([part.labels for part in slices]),
                {name: np.concatenate([part.arrays[name] for part in slices]) for name in slices[0].arrays},
            )
        )
    for stream in streams:
        stream.close()
    return found


def _same(a: list[Batch], b: list[Batch]) -> bool:
    return len(a) == len(b) and all(
        x.images_seen == y.images_seen
        and x.keys == y.keys
        and np.array_equal(x.positions, y.positions)
        and np.array_equal(x.labels, y.labels)
        and all(np.array_equal(x.arrays[name], y.arrays[name]) for name in x.arrays)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("flips", [False, True])
def test_the_stream_does_not_depend_on_the_number_of_workers(
    latents: tuple[Artifact, dict[str, np.ndarray]], flips: bool
) -> None:
    loader = Loader(latents[0], "train", ("z", "s"), 48, 5, flips=flips)
    alone = _take(loader, 700)
    for world in (2, 3, 8):
        assert _same(_take(loader, 700, world=world), alone)


@given(cursor=st.integers(0, 1500), world=st.sampled_from([1, 2, 3, 8]), batch=st.sampled_from([24, 48, 600]))
@settings(deadline=None, max_examples=25)
def test_a_restart_anywhere_goes_on_where_it_stopped(
    latents: tuple[Artifact, dict[str, np.ndarray]], cursor: int, world: int, batch: int
) -> None:
    loader = Loader(latents[0], "train", ("z",), batch, 1, flips=True, ahead=0)
    undisturbed = Loader(latents[0], "train", ("z",), 1, 1, flips=True, ahead=0)
    [resumed] = _take(loader, batch, cursor, world)
    one_by_one = _take(undisturbed, batch, cursor)
    assert resumed.keys == [key for single in one_by_one for key in single.keys]
    assert resumed.images_seen == cursor + batch
    assert np.array_equal(resumed.arrays["z"], np.concatenate([single.arrays["z"] for single in one_by_one]))


def test_epochs_run_on_into_each_other(latents: tuple[Artifact, dict[str, np.ndarray]]) -> None:
    loader = Loader(latents[0], "train", ("z",), 64, 0)
    keys = [key for batch in _take(loader, 3 * 300) for key in batch.keys]
    assert loader.rows == 300
    for epoch in range(3):
        assert Counter(keys[300 * epoch : 300 * (epoch + 1)]) == Counter(f"image-{i:05d}" for i in range(300))
    positions = np.concatenate([batch.positions for batch in _take(loader, 900)])
    assert np.array_equal(positions, np.arange(len(positions)))


def test_rows_keep_their_label_and_latent_and_flip(latents: tuple[Artifact, dict[str, np.ndarray]]) -> None:
    artifact, content = latents
    flipped = 0
    for batch in _take(Loader(artifact, "train", ("z", "s"), 50, 2, flips=True), 600):
        for key, label, z, s in zip(batch.keys, batch.labels, batch.arrays["z"], batch.arrays["s"], strict=True):
            row = int(key.split("-")[1])
            assert label == content["label"][row]
            mirrored = np.array_equal(z, content["z_flip"][row])
            assert mirrored or np.array_equal(z, content["z"][row])
            assert np.array_equal(s, content["s_flip" if mirrored else "s"][row])
            flipped += mirrored
    assert 200 < flipped < 400


def test_many_lanes_serve_the_same_as_the_order_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.loader._SHUFFLED_LATENTS", 256)
    artifact, _ = put_latents(str(tmp_path), (900, 700), {"z": (1, 2, 2)})
    loader = Loader(artifact, "train", ("z",), 96, 0)
    assert loader.order.lanes > 1
    keys = [key for batch in _take(loader, 3200, world=3) for key in batch.keys]
    assert len(set(keys[:1600])) == len(set(keys[1600:3200])) == 1600
    groups, begins = loader.order.tape(0)
    for key, tape_row in zip(keys, _served(loader.order, 0, 0, 200), strict=False):
        owner = int(np.searchsorted(begins, tape_row, side="right") - 1)
        part, group, _ = loader.reader.index[groups[owner]]
        row = (0, 900)[part] + 16 * group + tape_row - begins[owner]
        assert key == f"image-{row:05d}"


def test_a_worker_reads_little_more_than_its_share(tmp_path: Path) -> None:
    artifact, _ = put_latents(str(tmp_path), (16_000, 16_000), {"z": (1, 1, 1)}, rows_per_group=64)
    loader = Loader(artifact, "train", ("z",), 1024, 0, keys=False, ahead=0)
    read: list[int] = []
    whole = loader.reader.read
    loader.reader.read = lambda number: read.append(number) or whole(number)  # type: ignore[func-returns-value]
    for _ in itertools.islice(loader.stream(0, 3, 8), 32_000 // 1024):
        pass
    groups = len(loader.reader.index)
    assert groups // 8 <= len(read) < 2 * groups / 8


def test_images_are_decoded_cropped_and_mirrored(tmp_path: Path) -> None:
    import pyarrow as pa

    storage = Storage.at(str(tmp_path)).child("shard", "shard")
    data = [encoded(picture(number, 50, 40)) for number in range(12)]
    columns = [[f"k{i}" for i in range(12)], list(range(12)), data, [b"12345678"] * 12]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
    files = [storage.write_table("train/part-00000.parquet", table, 5, **WRITE_OPTIONS)]
    artifact = put(str(tmp_path), load_recipe("demo_tiny"), "shard", files, facts={"rows_per_group": 5})
    loader = Loader(artifact, "train", ["image"], 12, 0, size=16, flips=True, threads=2)
    [batch] = _take(loader, 12)
    mirrored = 0
    for label, image in zip(batch.labels, batch.arrays["image"], strict=True):
        expected = load(data[label], 16)
        mirrored += not np.array_equal(image, expected)
        assert np.array_equal(image, expected) or np.array_equal(image, expected[:, ::-1])
    assert 0 < mirrored < 12
    with pytest.raises(ValueError, match="needs `size`"):
        Loader(artifact, "train", ["image"], 12, 0)


def _file(artifact: Artifact, number: int) -> Path:
    return Path(artifact.storage.path) / artifact.files("train/")[number].path


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    artifact, _ = put_latents(str(tmp_path), (64, 64), {"z": (2, 4, 4)})
    path = _file(artifact, 1)
    good = path.read_bytes()

    def refusal(data: bytes | None) -> str:
        path.unlink() if data is None else path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            _take(Loader(artifact, "train", ("z",), 64, 0), 128)
        path.write_bytes(good)
        return str(caught.value)

    for data in (None, good[: len(good) // 2], b"\0" * len(good), _with_a_flipped_bit(good)):
        message = refusal(data)
        assert "train/part-00001.parquet is damaged" in message and "--force encode" in message
    assert _take(Loader(artifact, "train", ("z",), 64, 0), 128)


def test_what_does_not_fit_is_refused(latents: tuple[Artifact, dict[str, np.ndarray]], tmp_path: Path) -> None:
    artifact, _ = latents
    with pytest.raises(UserError, match=r"has no columns f, f_flip \(it has s, s_flip, z, z_flip\)"):
        Loader(artifact, "train", ("z", "f"), 8, 0, flips=True)
    with pytest.raises(UserError, match="split 'test' has no rows"):
        Loader(artifact, "test", ("z",), 8, 0)
    with pytest.raises(ValueError, match="batch of 8 does not divide over 3 workers"):
        Loader(artifact, "train", ("z",), 8, 0).stream(0, 0, 3)
    other, _ = put_latents(str(tmp_path), (20,), {"z": (2, 4, 4)})
    other.manifest.facts["shapes"]["z"] = [2, 2, 2]
    with pytest.raises(UserError, match=r"column 'z' has shape \(2, 4, 4\) but the manifest says \(2, 2, 2\)"):
        next(Loader(other, "train", ("z",), 8, 0).stream())


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "zstd"},
        {"use_dictionary": True},
        {"data_page_size": 64, "write_batch_size": 4},
        {"data_page_version": "2.0"},
        {"column_encoding": {"label": "DELTA_BINARY_PACKED"}},
    ],
    ids=str,
)
def test_parts_laid_out_in_other_ways_are_read_alike(tmp_path: Path, options: dict[str, Any]) -> None:
    artifact, _content = put_latents(str(tmp_path), (40, 30), SHAPES)
    plain = _take(Loader(artifact, "train", ("z", "s"), 14, 0, flips=True), 210)
    for number, entry in enumerate(artifact.files("train/")):
        table = pq.read_table(_file(artifact, number))
        again = artifact.storage.write_table(entry.path, table, 16, **{**WRITE_OPTIONS, **options})
        artifact.manifest.files[number].__dict__["bytes"] = again.bytes  # frozen, but this is a test's own copy
    assert _same(_take(Loader(artifact, "train", ("z", "s"), 14, 0, flips=True), 210), plain)


def test_after_its_first_reading_a_local_group_needs_no_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, content = put_latents(str(tmp_path), (40,), SHAPES)
    decoded: list[list[str]] = []
    whole = PartFile.decoded
    monkeypatch.setattr(
        PartFile, "decoded", lambda *given, verify: decoded.append(given[3]) or whole(*given, verify=verify)
    )
    with ThreadPoolExecutor(2) as pool:
        reader = GroupReader(artifact, "train", ["label", "key", "z"], {"z": SHAPES["z"]}, pool=pool)
        for group in (reader.read(1), reader.read(1)):
            assert np.array_equal(group.items("z", slice(2, 5)), content["z"][18:21].reshape(3, -1))
            assert group.labels.tolist() == content["label"][16:32].tolist()
            assert group.items("key", slice(0, 2)) == ["image-00016", "image-00017"]
    assert decoded == [["label", "key", "z"], ["key"]]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("harm", ["cut off", "cut off while it is read", "damaged", "gone"])
def test_a_file_that_changes_under_a_stream_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str, threads: int
) -> None:
    monkeypatch.setattr("tasks.loader._SHUFFLED_LATENTS", 64)  # windows end, so that files are read again
    artifact, _ = put_latents(str(tmp_path), (64, 64), {"z": (2, 32, 32)})
    path = _file(artifact, 1)
    good = path.read_bytes()
    loader = Loader(artifact, "train", ("z",), 32, 0, keys=False, threads=threads, ahead=2)
    with loader.stream() as stream:
        for _ in range(4):
            next(stream)  # every group was found whole
        if harm == "cut off while it is read":

            def cut(file: Any, offset: int, target: np.ndarray, pool: Any) -> None:
                os.truncate(path, len(good) // 3)
                read_span(file, offset, target, pool)

            monkeypatch.setattr("tasks.groups_reader.read_span", cut)
        elif harm == "cut off":
            os.truncate(path, len(good) // 3)
        elif harm == "damaged":
            path.write_bytes(_with_a_flipped_bit(good))
        else:
            path.unlink()
        with pytest.raises(UserError, match=r"train/part-00001\.parquet is damaged .* --force encode"):
            for _ in range(12):
                next(stream)


def test_a_file_replaced_by_an_equal_one_makes_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.loader._SHUFFLED_LATENTS", 64)
    artifact, _ = put_latents(str(tmp_path), (64, 64), {"z": (2, 4, 4)})
    loader = Loader(artifact, "train", ("z",), 32, 0, ahead=0)
    plain = _take(loader, 512)
    found = []
    with loader.stream() as stream:
        for _ in range(16):
            found.append(next(stream))
            artifact.storage.write_bytes(artifact.files("train/")[1].path, _file(artifact, 1).read_bytes())
    assert _same(found, plain)


def test_what_is_held_of_a_batch_never_changes(latents: tuple[Artifact, dict[str, np.ndarray]]) -> None:
    loader = Loader(latents[0], "train", ("z",), 32, 0, ahead=2)
    stream = loader.stream()
    held: list[tuple[Any, np.ndarray]] = []
    addresses = set()
    for number, batch in enumerate(itertools.islice(stream, 60)):
        values = batch.arrays["z"]
        addresses.add(values.ctypes.data)
        for kept in (values[3:5], torch.from_numpy(values)[7], memoryview(values[9]))[: number % 4]:
            held.append((kept, np.array(kept)))
        del values, batch
    stream.close()
    assert len(held) > 60 and all(np.array_equal(np.asarray(kept), copy) for kept, copy in held)
    assert len(addresses) > 45, "what is held is not written to again"

    stream, addresses = loader.stream(), set()
    for batch in itertools.islice(stream, 60):
        addresses.add(batch.arrays["z"].ctypes.data)
    stream.close()
    assert len(addresses) < 10, "memory that nobody holds is used again"


def test_a_part_of_a_tensors_memory_stays_a_part_of_that_tensor() -> None:
    owner = torch.arange(24, dtype=torch.float16).reshape(6, 2, 2)
    for values in (owner.numpy(), owner.numpy()[2:5]):
        found = as_tensor(values)
        assert np.array_equal(found.numpy(), values)
        assert found.untyped_storage()._cdata == owner.untyped_storage()._cdata or (
            found.untyped_storage().data_ptr() == owner.untyped_storage().data_ptr()
        )
    plain = np.arange(6.0)
    assert as_tensor(plain[2:]).tolist() == [2.0, 3.0, 4.0, 5.0] and np.shares_memory(as_tensor(plain).numpy(), plain)


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
    plain = _take(Loader(artifact, "train", ("z",), 16, 0), 432)
    _take(Loader(artifact, "train", ("z",), 16, 0, cache_gib=1.0), 144)
    assert sum(path.stat().st_size for path in _copies(folder)) == artifact.manifest.size
    for entry in artifact.files("train/"):
        artifact.storage.delete(entry.path)
    assert _same(_take(Loader(artifact, "train", ("z",), 16, 0, cache_gib=1.0), 432), plain)


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
    plain = _take(Loader(artifact, "train", ("z",), 16, 0), 288)
    small = (entries[1].bytes + 1) / 2**30  # too small for the first part, which is read in place
    assert _same(_take(Loader(artifact, "train", ("z",), 16, 0, cache_gib=small), 288), plain)
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


def test_a_damaged_copy_is_fetched_again(remote: tuple[Artifact, Path]) -> None:
    artifact, folder = remote
    plain = _take(Loader(artifact, "train", ("z",), 16, 0, cache_gib=1.0), 144)
    whole = {path: path.read_bytes() for path in _copies(folder)}
    for harm in (lambda data: data[:-9], lambda data: b"\0" * len(data), _with_a_flipped_bit):
        for path, data in whole.items():
            path.write_bytes(harm(data))
        assert _same(_take(Loader(artifact, "train", ("z",), 16, 0, cache_gib=1.0), 144), plain)
        assert {path: path.read_bytes() for path in _copies(folder)} == whole


def _with_a_flipped_bit(data: bytes) -> bytes:
    return data[: len(data) // 2] + bytes([data[len(data) // 2] ^ 1]) + data[len(data) // 2 + 1 :]


def test_from_s3_with_and_without_the_local_cache(s3_root: str, home: Path) -> None:
    artifact, _ = put_latents(s3_root, (100, 60), {"z": (2, 4, 4)})
    plain = _take(Loader(artifact, "train", ("z",), 32, 0), 320)
    limit = 1.2 * max(entry.bytes for entry in artifact.manifest.files)
    loader = Loader(artifact, "train", ("z",), 32, 0, cache_gib=limit / 2**30)
    assert _same(_take(loader, 320), plain)
    kept = _copies(home / "cache")
    assert kept and sum(path.stat().st_size for path in kept) <= limit
    artifact.storage.write_bytes(artifact.files("train/")[0].path, b"\0" * artifact.files("train/")[0].bytes)
    for path in kept:
        path.unlink()
    with pytest.raises(UserError, match=r"part-00000\.parquet is damaged"):
        _take(Loader(artifact, "train", ("z",), 32, 0, cache_gib=1.0), 320)
