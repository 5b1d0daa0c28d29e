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
from tasks.loading.loader import Loader
from tasks.loading.part_file import PartFile
from tasks.loading.placement import Placement, read_into
from tasks.loading.row_groups import GroupReader
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


def test_after_its_first_reading_a_local_group_needs_no_decoder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    artifact, content = put_latents(str(tmp_path), (40,), SHAPES)
    decoded: list[list[str]] = []
    whole = PartFile.decoded
    monkeypatch.setattr(
        PartFile, "decoded", lambda *given, verify: decoded.append(given[3]) or whole(*given, verify=verify)
    )
    reader = GroupReader(artifact, "train", ["label", "key", "z"], {"z": SHAPES["z"]})
    for _ in range(2):
        found = np.zeros((4, 2, 2, 2), np.float16)
        places = [row.data for row in found.reshape(4, -1).view(np.uint8)]
        group = reader.read(1, {"z": Placement(np.array([2, 3, 4, 9]), places)})
        assert np.array_equal(found, content["z"][[18, 19, 20, 25]])
        assert group.labels.tolist() == content["label"][16:32].tolist()
        assert group.items("key", slice(0, 2)) == ["image-00016", "image-00017"]
    assert decoded == [["label", "key", "z"], ["key"]]


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

            def cut(file: Any, offset: int, places: Any) -> None:
                os.truncate(path, len(good) // 3)
                read_into(file, offset, places)

            monkeypatch.setattr("tasks.loading.placement.read_into", cut)
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
