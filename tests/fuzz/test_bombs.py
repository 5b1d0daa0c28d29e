"""Small files that say they are enormous, or never end: refused before they cost memory, time or disk."""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zipfile
import zlib
from collections import Counter
from pathlib import Path

import numpy as np
import pytest

from configs import UserError, load_recipe
from infra.weights import load_checkpoint
from models.checkpoints import check_whole, read
from tasks.data.decode import Undecodable, decode
from tasks.scoring.adm_file import read_statistics
from tasks.sources.csv_file import CsvSource
from tasks.sources.files import expand
from tasks.sources.labels import counted_labels
from tests.fuzz import seeds
from tests.helpers.odd_sources import jpeg

MEMORY = 64 << 20
"""Bytes that a refusal may take."""


@pytest.fixture(autouse=True)
def in_little_memory() -> object:
    tracemalloc.start()
    yield
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert peak < MEMORY


def _png(width: int, height: int, rows: bytes) -> bytes:
    def chunk(kind: bytes, body: bytes) -> bytes:
        return struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def test_a_picture_larger_than_allowed_is_not_decoded() -> None:
    with pytest.raises(Undecodable, match="too many pixels"):
        decode(_png(60_000, 60_000, bytes(1000)), 100_000_000)


def test_texts_in_a_picture_that_unpack_to_gigabytes_are_left_out() -> None:
    picture = bytearray(_png(2, 2, bytes(14)))
    body = b"Comment\0\0" + zlib.compress(bytes(50 << 20), 9)
    text = struct.pack(">I", len(body)) + b"zTXt" + body + struct.pack(">I", zlib.crc32(b"zTXt" + body))
    picture[33:33] = text  # after the header
    assert decode(bytes(picture), 100).size == (2, 2)


def test_aliases_that_come_to_a_billion_values_are_refused(tmp_path: Path) -> None:
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]" for n in range(1, 10)]
    path = tmp_path / "laughs.yaml"
    path.write_text("\n".join(lines))
    with pytest.raises(UserError, match=r"laughs\.yaml is not YAML: its aliases come to more than 100,000 values"):
        load_recipe(str(path))
    path.write_text("data: &a\n  source: *a")
    with pytest.raises(UserError, match="aliases"):
        load_recipe(str(path))
    path.write_text("data: &a {classes: 10}\nshard: *a")
    with pytest.raises(UserError, match=r"shard\.classes: no such field"):
        load_recipe(str(path))  # aliases as such are fine
    with pytest.raises(UserError, match="is not a YAML value"):
        load_recipe("demo_tiny", [f"data.classes={'[' * 5000}"])
    path.write_text("data:\n  " + "- " * 5000 + "x")
    with pytest.raises(UserError, match="nested deeper than 100"):
        load_recipe(str(path))


def test_a_label_of_millions_makes_no_classes(tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(jpeg())
    for label in ("4000000000", "9" * 30, "9" * 5000):
        (tmp_path / "labels.csv").write_text(f"path,label\na.jpg,0\na.jpg,1\na.jpg,{label}\n")
        listing = CsvSource(str(tmp_path / "labels.csv")).listing()
        assert listing.classes == ("0", "1") and [one.key for one in listing.refused] == ["a.jpg"]
    assert counted_labels(Counter([10**30, 999_999, 1_000_000]), 999_999).numbers == [-1, 0, -1]


def test_a_range_of_a_trillion_names_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at most"):
        expand(f"{tmp_path}/part-{{0..999999999999}}.tar", ".tar")


def _npz(path: Path, arrays: dict[str, tuple[tuple[int, ...], bytes]]) -> Path:
    """Arrays that say they are of these shapes, whatever lies behind."""
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, (shape, data) in arrays.items():
            head = io.BytesIO()
            np.lib.format.write_array_header_1_0(head, {"descr": "<f8", "fortran_order": False, "shape": shape})
            archive.writestr(f"{name}.npy", head.getvalue() + data)
    return path


def test_arrays_that_say_they_are_a_terabyte_are_refused(tmp_path: Path) -> None:
    bomb = {"mu": ((4,), bytes(32)), "sigma": ((1 << 20, 1 << 17), bytes(1000))}
    with pytest.raises(UserError, match=r"sigma is float64 \(1048576, 131072\), more than 256 MiB"):
        read_statistics(_npz(tmp_path / "bomb.npz", bomb), {"pool": 4, "spatial": 4})


def test_a_network_of_a_billion_layers_is_not_built(tmp_path: Path) -> None:
    data = seeds.safetensors()[1]
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    for name, value in (("depth", 10**9), ("input_size", 10**5), ("hidden_size", 10**12), ("depth", "many")):
        facts = json.loads(header["__metadata__"]["facts"])
        facts["arguments"][name] = value
        changed = json.dumps(
            {**header, "__metadata__": {**header["__metadata__"], "facts": json.dumps(facts)}}
        ).encode()
        path = tmp_path / "many.safetensors"
        path.write_bytes(len(changed).to_bytes(8, "little") + changed + data[8 + length :])
        with pytest.raises(ValueError, match=f"{name}|lightningdit"):
            check_whole(read(path))


def test_an_index_that_names_itself_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.write_text(json.dumps({"weight_map": {"a": path.name}}))
    with pytest.raises(UserError, match="is an index and no weights"):
        load_checkpoint(str(path))
