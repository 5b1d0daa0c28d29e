from __future__ import annotations

import itertools
import tracemalloc
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from configs import UserError, load_recipe
from infra.artifacts import Artifact
from infra.storage import Storage
from tasks.data.crops import Crop
from tasks.data.decode import decode, load
from tasks.data.tensors import WRITE_OPTIONS
from tasks.loading.loader import Loader
from tasks.shard import SCHEMA
from tasks.training.trainee import pieces
from tests.helpers.builders import put
from tests.helpers.piles import encoded, picture, put_latents
from tests.helpers.streams import same, served, take

SHAPES = {"z": (2, 2, 2), "z_flip": (2, 2, 2), "s": (1, 2, 2), "s_flip": (1, 2, 2)}


ROWS = (100, 37, 64, 99)


@pytest.fixture(scope="module")
def latents(tmp_path_factory: pytest.TempPathFactory) -> tuple[Artifact, dict[str, np.ndarray]]:
    return put_latents(str(tmp_path_factory.mktemp("root")), ROWS, SHAPES)


@pytest.mark.parametrize("flips", [False, True])
def test_the_stream_does_not_depend_on_the_number_of_workers_and_threads(
    latents: tuple[Artifact, dict[str, np.ndarray]], flips: bool
) -> None:
    loader = Loader(latents[0], "train", ("z", "s"), 48, 5, flips=flips)
    alone = take(loader, 700)
    for world in (2, 3, 8):
        assert same(take(loader, 700, world=world), alone)
    assert same(take(Loader(latents[0], "train", ("z", "s"), 48, 5, flips=flips, threads=3), 700), alone)


@given(cursor=st.integers(0, 1500), world=st.sampled_from([1, 2, 3, 8]), batch=st.sampled_from([24, 48, 600]))
@settings(deadline=None, max_examples=25)
def test_a_restart_anywhere_goes_on_where_it_stopped(
    latents: tuple[Artifact, dict[str, np.ndarray]], cursor: int, world: int, batch: int
) -> None:
    loader = Loader(latents[0], "train", ("z",), batch, 1, flips=True, ahead=0)
    undisturbed = Loader(latents[0], "train", ("z",), 1, 1, flips=True, ahead=0)
    [resumed] = take(loader, batch, cursor, world)
    one_by_one = take(undisturbed, batch, cursor)
    assert resumed.keys == [key for single in one_by_one for key in single.keys]
    assert resumed.images_seen == cursor + batch
    assert np.array_equal(resumed.arrays["z"], np.concatenate([single.arrays["z"] for single in one_by_one]))


def test_epochs_run_on_into_each_other(latents: tuple[Artifact, dict[str, np.ndarray]]) -> None:
    loader = Loader(latents[0], "train", ("z",), 64, 0)
    keys = [key for batch in take(loader, 3 * 300) for key in batch.keys]
    assert loader.rows == 300
    for epoch in range(3):
        assert Counter(keys[300 * epoch : 300 * (epoch + 1)]) == Counter(f"image-{i:05d}" for i in range(300))
    positions = np.concatenate([batch.positions for batch in take(loader, 900)])
    assert np.array_equal(positions, np.arange(len(positions)))


def test_rows_keep_their_label_and_latent_and_flip(latents: tuple[Artifact, dict[str, np.ndarray]]) -> None:
    artifact, content = latents
    flipped = 0
    for batch in take(Loader(artifact, "train", ("z", "s"), 50, 2, flips=True), 600):
        for key, label, z, s in zip(batch.keys, batch.labels, batch.arrays["z"], batch.arrays["s"], strict=True):
            row = int(key.split("-")[1])
            assert label == content["label"][row]
            mirrored = np.array_equal(z, content["z_flip"][row])
            assert mirrored or np.array_equal(z, content["z"][row])
            assert np.array_equal(s, content["s_flip" if mirrored else "s"][row])
            flipped += mirrored
    assert 200 < flipped < 400


def test_many_lanes_serve_the_same_as_the_order_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.loading.loader._SHUFFLED_LATENTS", 256)
    artifact, _ = put_latents(str(tmp_path), (900, 700), {"z": (1, 2, 2)})
    loader = Loader(artifact, "train", ("z",), 96, 0)
    assert loader.order.lanes > 1
    keys = [key for batch in take(loader, 3200, world=3) for key in batch.keys]
    assert len(set(keys[:1600])) == len(set(keys[1600:3200])) == 1600
    groups, begins = loader.order.tape(0)
    for key, tape_row in zip(keys, served(loader.order, 0, 0, 200), strict=False):
        owner = int(np.searchsorted(begins, tape_row, side="right") - 1)
        part, group, _ = loader.reader.index[groups[owner]]
        row = (0, 900)[part] + 16 * group + tape_row - begins[owner]
        assert key == f"image-{row:05d}"


def test_many_lanes_serve_the_same_to_any_number_of_workers_and_threads_from_anywhere(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("tasks.loading.loader._SHUFFLED_LATENTS", 256)
    artifact, content = put_latents(str(tmp_path), (900, 700), SHAPES)
    alone = take(Loader(artifact, "train", ("z", "s"), 96, 3, flips=True), 3500)
    for batch in alone:
        for key, z, s in zip(batch.keys, batch.arrays["z"], batch.arrays["s"], strict=True):
            row = int(key.split("-")[1])
            flip = "" if np.array_equal(z, content["z"][row]) else "_flip"
            assert np.array_equal(z, content["z" + flip][row]) and np.array_equal(s, content["s" + flip][row])
    threaded = Loader(artifact, "train", ("z", "s"), 96, 3, flips=True, threads=4)
    for world in (1, 3, 8):
        assert same(take(threaded, 3500, world=world), alone)
        assert same(take(threaded, 3500 - 96 * 19, cursor=96 * 19, world=world), alone[19:])


def test_a_worker_reads_little_more_than_its_share(tmp_path: Path) -> None:
    artifact, _ = put_latents(str(tmp_path), (16_000, 16_000), {"z": (1, 1, 1)}, rows_per_group=64)
    loader = Loader(artifact, "train", ("z",), 1024, 0, keys=False, ahead=0)
    read: list[int] = []
    whole = loader.reader.read
    loader.reader.read = lambda *asked: read.append(asked[0]) or whole(*asked)  # type: ignore
    for _ in itertools.islice(loader.stream(0, 3, 8), 32_000 // 1024):
        pass
    groups = len(loader.reader.index)
    assert groups // 8 <= len(read) < 2 * groups / 8


def put_pictures(root: Path) -> tuple[Artifact, list[bytes]]:
    """Twelve, labelled by their numbers."""
    storage = Storage.at(str(root)).child("shard", "shard")
    data = [encoded(picture(number, 50, 40)) for number in range(12)]
    columns = [[f"k{i}" for i in range(12)], list(range(12)), data, [b"12345678"] * 12]
    table = pa.table([pa.array(c, f.type) for c, f in zip(columns, SCHEMA, strict=True)], schema=SCHEMA)
    files = [storage.write_table("train/part-00000.parquet", table, 5, **WRITE_OPTIONS)]
    return put(str(root), load_recipe("demo_tiny"), "shard", files, facts={"rows_per_group": 5}), data


def test_random_squares_belong_to_the_image_of_the_run(tmp_path: Path) -> None:
    """Whatever the batch, the workers and the restart; another epoch cuts elsewhere."""
    artifact, data = put_pictures(tmp_path)
    crop = Crop(16, "opencv", random=True)
    alone = take(Loader(artifact, "train", ["image"], 12, 3, crop=crop), 36)
    assert same(take(Loader(artifact, "train", ["image"], 12, 3, crop=crop, threads=2), 36, world=3), alone)
    again = take(Loader(artifact, "train", ["image"], 4, 3, crop=crop), 8, cursor=20)
    whole = np.concatenate([batch.arrays["image"] for batch in alone])
    assert np.array_equal(np.concatenate([batch.arrays["image"] for batch in again]), whole[20:28])
    labels = np.concatenate([batch.labels for batch in alone])
    seen = [{whole[row].tobytes() for row in np.flatnonzero(labels == label)} for label in range(12)]
    assert sum(len(each) > 1 for each in seen) > 6, "another place in another epoch"
    places = [[crop(decode(data[label]), (x, 0.5)).tobytes() for x in np.linspace(0, 0.99, 40)] for label in range(12)]
    assert all(image.tobytes() in places[label] for label, image in zip(labels, whole, strict=True))


def test_images_are_decoded_cropped_and_mirrored(tmp_path: Path) -> None:
    artifact, data = put_pictures(tmp_path)
    loader = Loader(artifact, "train", ["image"], 12, 0, crop=Crop(16), flips=True, threads=2)
    [batch] = take(loader, 12)
    mirrored = 0
    for label, image in zip(batch.labels, batch.arrays["image"], strict=True):
        expected = load(data[label], 16)
        mirrored += not np.array_equal(image, expected)
        assert np.array_equal(image, expected) or np.array_equal(image, expected[:, ::-1])
    assert 0 < mirrored < 12
    with pytest.raises(ValueError, match="needs `crop`"):
        Loader(artifact, "train", ["image"], 12, 0)


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
    with pytest.raises(UserError, match=r"column 'z' has shape \(2, 4, 4\) float16 but the manifest says \(2, 2, 2\)"):
        next(Loader(other, "train", ("z",), 8, 0).stream())


def test_what_is_held_of_a_batch_never_changes(latents: tuple[Artifact, dict[str, np.ndarray]]) -> None:
    loader = Loader(latents[0], "train", ("z",), 32, 0, ahead=2)
    stream = loader.stream()
    held: list[tuple[Any, np.ndarray]] = []
    addresses = set()
    for number, batch in enumerate(itertools.islice(stream, 60)):
        values = batch.arrays["z"]
        if number % 4:
            addresses.add(values.ctypes.data)
        for kept in (values[3:5], torch.from_numpy(values)[7], memoryview(values[9]))[: number % 4]:
            held.append((kept, np.array(kept)))
        del values, batch
    stream.close()
    assert len(held) > 60 and all(np.array_equal(np.asarray(kept), copy) for kept, copy in held)
    assert len(addresses) == 45, "what is held is not given away again"


@pytest.mark.parametrize("compression", ["none", "zstd"])
@pytest.mark.parametrize(("batch", "world", "flips"), [(96, 3, True), (64, 2, True), (64, 2, False)])
def test_streams_hold_one_shuffle_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, batch: int, world: int, flips: bool, compression: str
) -> None:
    monkeypatch.setattr("tasks.loading.loader._SHUFFLED_LATENTS", 2048)
    shape, row = (8, 16, 16), 4096
    shapes = {"z": shape, "z_flip": shape}
    artifact, _ = put_latents(str(tmp_path), (2400, 1696), shapes, compression=compression)
    loader = Loader(artifact, "train", ("z",), batch, 0, flips=flips, keys=False, ahead=0)
    assert loader.order.lanes == 32
    streams = [loader.stream(0, rank, world) for rank in range(world)]
    before, largest = pa.total_allocated_bytes(), 0
    tracemalloc.start()
    try:
        for _ in range(3 * loader.rows // (2 * batch)):
            for stream in streams:
                next(stream)
            traced, _ = tracemalloc.get_traced_memory()
            largest = max(largest, traced + pa.total_allocated_bytes() - before)
    finally:
        tracemalloc.stop()
    lanes = 32 * (world if batch == 96 else 1)  # batches of 96 deal no whole lanes to a worker
    decoded = lanes * 16 * (1 + flips) if compression == "zstd" else 0
    bound = (2048 + batch + decoded) * row
    assert largest < 1.1 * bound
    # A worker's share of a window is of one batch where no whole lanes are dealt: it is soon gone.
    assert largest > bound / 2 or (batch == 96 and not decoded)


def test_page_locked_batches_are_tensors_that_stay_parts_of_one(
    latents: tuple[Artifact, dict[str, np.ndarray]], monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[Any] = []
    whole = torch.empty

    def pinned(*shape: Any, pin_memory: bool = False, **options: Any) -> torch.Tensor:
        asked.append((*shape, pin_memory))
        return whole(*shape, **options)

    plain = take(Loader(latents[0], "train", ("z",), 30, 0), 300)
    loader = Loader(latents[0], "train", ("z",), 30, 0, pin=True, ahead=0)
    monkeypatch.setattr("torch.empty", pinned)  # without an accelerator none can be locked
    batch = next(loader.stream())
    assert asked == [((30, 2, 2, 2), True)]
    values = torch.as_tensor(batch.arrays["z"])
    assert values.dtype == torch.float16 and np.array_equal(values.numpy(), plain[0].arrays["z"])
    # Torch's allocator learns of a copy under way from the tensor alone, so that a piece is one.
    [_, piece] = pieces(batch, 15)
    assert isinstance(piece.arrays["z"], torch.Tensor)
    assert piece.arrays["z"].untyped_storage().data_ptr() == values.untyped_storage().data_ptr()
