from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest

from configs import UserError
from infra.artifacts import Artifact
from tasks.data.tensors import WRITE_OPTIONS, latent_table
from tasks.loading import row_groups
from tasks.loading.loader import Loader
from tasks.loading.row_groups import RowGroupReader
from tests.helpers.piles import put_latents
from tests.helpers.streams import same, take, with_a_flipped_bit

SHAPES = {"z": (2, 2, 2), "z_flip": (2, 2, 2), "s": (1, 2, 2), "s_flip": (1, 2, 2)}


def _file(artifact: Artifact, number: int) -> Path:
    return Path(artifact.storage.path) / artifact.files("train/")[number].path


def test_damaged_files_are_refused_by_name(tmp_path: Path) -> None:
    artifact, _ = put_latents(str(tmp_path), (64, 64), {"z": (2, 4, 4)})
    path = _file(artifact, 1)
    good = path.read_bytes()

    def refusal(data: bytes | None) -> str:
        path.unlink() if data is None else path.write_bytes(data)
        with pytest.raises(UserError) as caught:
            take(Loader(artifact, "train", ("z",), 64, 0), 128)
        path.write_bytes(good)
        return str(caught.value)

    for data in (None, good[: len(good) // 2], b"\0" * len(good), with_a_flipped_bit(good)):
        message = refusal(data)
        assert "train/part-00001.parquet is damaged" in message and "--force encode" in message
    assert take(Loader(artifact, "train", ("z",), 64, 0), 128)


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
    plain = take(Loader(artifact, "train", ("z", "s"), 14, 0, flips=True), 210)
    for number, entry in enumerate(artifact.files("train/")):
        table = pq.read_table(_file(artifact, number))
        again = artifact.storage.write_table(entry.path, table, 16, **{**WRITE_OPTIONS, **options})
        artifact.manifest.files[number].__dict__["bytes"] = again.bytes  # frozen, but this is a test's own copy
    assert same(take(Loader(artifact, "train", ("z", "s"), 14, 0, flips=True), 210), plain)
    # A batch of three epochs wants every group three times at once.
    wide = Loader(artifact, "train", ("z", "s"), 210, 0, flips=True, threads=8)
    [whole] = take(wide, 210)
    assert np.array_equal(whole.arrays["z"], np.concatenate([batch.arrays["z"] for batch in plain]))


def test_latents_of_another_dtype_are_refused(tmp_path: Path) -> None:
    artifact, content = put_latents(str(tmp_path), (40,), {"z": (2, 2, 2)})
    [entry] = artifact.files("train/")
    keys = [f"image-{number:05d}" for number in range(40)]
    table = latent_table(keys, content["label"], {"z": content["z"].astype(np.float32)})
    again = artifact.storage.write_table(entry.path, table, 16, **WRITE_OPTIONS)
    artifact.manifest.files[0].__dict__["bytes"] = again.bytes
    with pytest.raises(UserError, match=r"'z' has shape \(2, 2, 2\) float32 but the manifest says \(2, 2, 2\) float16"):
        take(Loader(artifact, "train", ("z",), 14, 0), 14)


@pytest.mark.parametrize("compression", ["none", "zstd"])
def test_checksums_are_looked_at_once_for_every_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, compression: str
) -> None:
    artifact, content = put_latents(str(tmp_path), (40,), SHAPES, compression=compression)
    looked: list[bool] = []
    pages_looked_at: list[int] = []
    whole, pages = pq.ParquetFile, row_groups.plain_pages

    def watched(file: Any, **options: Any) -> Any:
        if "page_checksum_verification" in options:
            looked.append(options["page_checksum_verification"])
        return whole(file, **options)

    def counted(file: Any, metadata: Any, group: int, row_bytes: Any) -> Any:
        pages_looked_at.append(group)
        found = pages(file, metadata, group, row_bytes)
        assert sorted(found) == (["label", "z"] if compression == "none" else [])
        return found

    monkeypatch.setattr("tasks.loading.row_groups.pq.ParquetFile", watched)
    monkeypatch.setattr(row_groups, "plain_pages", counted)
    columns = ["label", "key", "z"]
    reader = RowGroupReader(artifact, "train", columns, {"z": SHAPES["z"]})
    for number in (1, 1, 2, 1):
        rows = np.arange(min(16, 40 - 16 * number))[1::2]
        group = {name: reader.empty(name, len(rows)) for name in columns}
        kept = reader.read(number, {name: (rows, group[name]) for name in columns})
        assert sorted(kept) == (["key"] if compression == "none" else ["key", "label", "z"])
        assert np.array_equal(group["z"], content["z"][16 * number + rows].reshape(-1, 8))
        assert np.array_equal(group["label"], content["label"][16 * number + rows])
        assert group["key"].tolist() == [f"image-{row:05d}" for row in 16 * number + rows]
    assert reader.read(1, {"key": (rows, group["key"])}, {"key": kept["key"]})["key"] is kept["key"]
    os.utime(_file(artifact, 0), ns=(0, 0))  # now it is another file
    reader.read(1, {"key": (rows, group["key"])})
    assert looked == [True, False, True, False, True] and pages_looked_at == [1, 2, 1]


@pytest.mark.parametrize("harm", ["missing", "cut off", "longer", "damaged"])
def test_damaged_remote_files_are_refused_by_name(home: Path, harm: str) -> None:
    artifact, _ = put_latents("memory://damaged", (64, 64), {"z": (2, 4, 4)})
    name, storage = artifact.files("train/")[1].path, artifact.storage
    good = storage.read_bytes(name)
    bad = {"cut off": good[: len(good) // 2], "longer": good + b"more" * 9}
    if harm == "missing":
        storage.delete(name)
    else:
        storage.write_bytes(name, bad.get(harm, with_a_flipped_bit(good)))
    with pytest.raises(UserError, match=r"train/part-00001\.parquet is damaged .* --force encode"):
        take(Loader(artifact, "train", ("z",), 64, 0), 128)
    storage.write_bytes(name, good)
    assert take(Loader(artifact, "train", ("z",), 64, 0), 128)
    storage.delete()


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("harm", ["cut off", "cut off while it is read", "damaged", "gone"])
def test_a_file_that_changes_under_a_stream_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, harm: str, threads: int
) -> None:
    monkeypatch.setattr("tasks.loading.loader._SHUFFLED_LATENTS", 64)  # windows end, so that files are read again
    artifact, _ = put_latents(str(tmp_path), (64, 64), {"z": (2, 32, 32)})
    path = _file(artifact, 1)
    good = path.read_bytes()
    loader = Loader(artifact, "train", ("z",), 32, 0, keys=False, threads=threads, ahead=2)
    with loader.stream() as stream:
        for _ in range(4):
            next(stream)  # every group was found whole
        if harm == "cut off while it is read":
            opened = row_groups._stamp

            def cut(file: Any) -> Any:
                stamp = opened(file)
                os.truncate(path, len(good) // 3)
                return stamp

            monkeypatch.setattr(row_groups, "_stamp", cut)
        elif harm == "cut off":
            os.truncate(path, len(good) // 3)
        elif harm == "damaged":
            path.write_bytes(with_a_flipped_bit(good))
        else:
            path.unlink()
        with pytest.raises(UserError, match=r"train/part-00001\.parquet is damaged .* --force encode"):
            for _ in range(12):
                next(stream)


def test_a_file_replaced_by_an_equal_one_makes_no_difference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("tasks.loading.loader._SHUFFLED_LATENTS", 64)
    artifact, _ = put_latents(str(tmp_path), (64, 64), {"z": (2, 4, 4)})
    loader = Loader(artifact, "train", ("z",), 32, 0, ahead=0)
    plain = take(loader, 512)
    found = []
    with loader.stream() as stream:
        for _ in range(16):
            found.append(next(stream))
            artifact.storage.write_bytes(artifact.files("train/")[1].path, _file(artifact, 1).read_bytes())
    assert same(found, plain)
