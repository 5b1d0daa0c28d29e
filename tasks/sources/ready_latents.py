"""Latents that their authors publish ready-made: safetensors shards in a folder, in a tar, or in the
pieces of a tar that was split (`cat pieces | tar -x`); read where they lie, by ranges.

A shard holds `latents` (N, C, h, w) and `labels` (N,), and where there are some `latents_flip` of the
mirrored images, SFD's `latents_sv`, `latents_sv_flip` and its alignment targets `feats_dino`,
`feats_dino_flip` (papers.md 1.6, 2.3).
"""

from __future__ import annotations

import io
import json
import lzma
import math
import re
import tarfile
import tempfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from functools import cached_property
from threading import Lock
from typing import TYPE_CHECKING, Any

from configs.errors import UserError
from infra.ranges import Ranges
from infra.storage import Storage
from tasks.sources.base import identity_of

if TYPE_CHECKING:
    from torch import Tensor

NAMES = {
    "z": "latents",
    "z_flip": "latents_flip",
    "s": "latents_sv",
    "s_flip": "latents_sv_flip",
    "f": "feats_dino",
    "f_flip": "feats_dino_flip",
}
"""Their names by the columns of our latents."""
LABELS = "labels"
_SHARD = ".safetensors"
_BESIDE = (".md", ".json", ".pt", ".txt", ".npz", ".gitattributes", ".py", ".yaml")
_TYPES = {
    "F64": "float64",
    "F32": "float32",
    "F16": "float16",
    "BF16": "bfloat16",
    "I64": "int64",
    "I32": "int32",
    "I16": "int16",
    "U8": "uint8",
}
_LONGEST_HEADER = 100_000_000
_DAMAGE = (tarfile.TarError, EOFError, OSError, ValueError, zlib.error, lzma.LZMAError)


@dataclass(frozen=True)
class LatentShard:
    """One safetensors file of latents, wherever its bytes lie."""

    name: str
    size: int
    """Bytes."""
    read: Callable[[int, int], bytes]
    """(start, length) of the file's bytes."""

    @cached_property
    def tensors(self) -> dict[str, dict[str, Any]]:
        """`dtype`, `shape` and `data_offsets` of each tensor, from the header.

        Raises:
            UserError: it is no safetensors file, or cut short.
        """
        return self._header[1]

    @cached_property
    def _header(self) -> tuple[int, dict[str, dict[str, Any]]]:
        """Where the tensors begin, and what they are."""
        length = int.from_bytes(self.read(0, 8), "little")
        if not 2 <= length <= min(self.size, _LONGEST_HEADER):
            raise UserError(f"{self.name}: not a safetensors file, or cut short; fetch it again")
        try:
            found: dict[str, dict[str, Any]] = json.loads(self.read(8, length))
            found.pop("__metadata__", None)
            for entry in found.values():
                _check(entry)
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            raise UserError(f"{self.name}: not a safetensors file, or damaged; fetch it again") from None
        end = 8 + length + max((each["data_offsets"][1] for each in found.values()), default=0)
        if end > self.size:
            raise UserError(f"{self.name}: cut short, {self.size:,} of {end:,} bytes; fetch it again")
        return 8 + length, found

    @property
    def rows(self) -> int:
        """Raises UserError where it has no latents."""
        if NAMES["z"] not in self.tensors or LABELS not in self.tensors:
            seen = ", ".join(list(self.tensors)[:6]) or "nothing"
            raise UserError(f"{self.name}: expected tensors latents and labels, found {seen}")
        shape = self.tensors[NAMES["z"]]["shape"]
        if not shape:
            raise UserError(f"{self.name}: tensor {NAMES['z']} is one number; fetch it again")
        return int(shape[0])

    def values(self, name: str, start: int, count: int) -> Tensor:
        """Rows `start` to `start + count` of a tensor, as they are stored."""
        import torch  # seconds, which a plan does not need

        entry = self.tensors[name]
        dtype, shape = _TYPES.get(entry["dtype"]), entry["shape"]
        if dtype is None:
            raise UserError(f"{self.name}: {name} is of type {entry['dtype']}; known: {', '.join(_TYPES)}")
        begin, end = entry["data_offsets"]
        kind: torch.dtype = getattr(torch, dtype)
        row = math.prod(shape[1:]) * kind.itemsize
        if not shape or end - begin != shape[0] * row or start + count > shape[0]:
            raise UserError(f"{self.name}: {name} of shape {shape} has {end - begin:,} bytes; fetch it again")
        data = self.read(self._header[0] + begin + start * row, count * row)
        if len(data) != count * row:
            raise UserError(f"{self.name}: {name} ends early; fetch it again")
        return torch.frombuffer(bytearray(data), dtype=kind).view(count, *shape[1:])


def _check(entry: dict[str, Any]) -> None:
    """Raises ValueError, TypeError or LookupError on what describes no tensor."""
    begin, end = entry["data_offsets"]
    numbers, kinds = [*entry["shape"], begin, end], (type(entry["shape"]), type(entry["dtype"]))
    if kinds != (list, str) or any(type(number) is not int for number in numbers):
        raise TypeError("no description of a tensor")
    if min(numbers) < 0 or begin > end or max(numbers) >= 1 << 48:
        raise ValueError("no description of a tensor")


@dataclass(frozen=True)
class ReadyLatentsSource:
    """Shards of latents below `path`: a folder, a `.safetensors`, a `.tar`, or a glob; local or any
    fsspec URL. Nothing is read before it is asked for."""

    path: str

    @cached_property
    def files(self) -> dict[str, int]:
        """Names below the place with their sizes in bytes: shards, or archives and their pieces.

        Raises:
            UserError: there is nothing of the kind.
        """
        place, name = self._place
        if any(mark in name for mark in "*?["):
            found = {each: size for each, size in place.sizes().items() if fnmatch(each, name)}
        elif name:
            found = {name: place.size(name)} if place.exists(name) else {}
        else:
            found = {each: size for each, size in place.sizes().items() if not each.endswith(_BESIDE)}
        shards = {each: size for each, size in found.items() if each.endswith(_SHARD)}
        chosen = shards or found
        if not chosen:
            raise UserError(
                f"data.source {self.path}: no latents there; expected safetensors shards, a tar of them or its pieces"
            )
        return dict(sorted(chosen.items(), key=lambda pair: _natural(pair[0])))

    def identity(self) -> str:
        """A name for this content: names below the place and sizes."""
        return identity_of("latents", self.files)

    def shards(self) -> Iterator[LatentShard]:
        """Every shard in order; each may be read until the next one is asked for, those of a folder or an
        uncompressed tar at any time. Raises UserError where an archive is damaged or holds none."""
        place, _ = self._place
        for archive, pieces in self._archives().items():
            if archive.endswith(_SHARD):
                yield LatentShard(archive, self.files[archive], _reader(place, archive))
            else:
                yield from _of_archive(archive, _Pieces(place, [(name, self.files[name]) for name in pieces]))

    @cached_property
    def _place(self) -> tuple[Storage, str]:
        bare = self.path.rstrip("/")
        folder, _, name = bare.rpartition("/")
        if any(mark in name for mark in "*?["):
            return Storage.at(folder), name
        whole = Storage.at(bare)
        return (Storage.at(folder or "."), name) if whole.fs.isfile(whole.path) else (whole, "")

    def _archives(self) -> dict[str, list[str]]:
        """Pieces by the archive that they are of: what stands up to `.tar`, or all of them together."""
        found: dict[str, list[str]] = {}
        for name in self.files:
            whole = name if name.endswith(_SHARD) else name[: name.find(".tar") + 4] if ".tar" in name else ""
            found.setdefault(whole, []).append(name)
        return found


class _Pieces:
    """Files that follow each other as one: `read(start, length)` over all of them."""

    def __init__(self, place: Storage, pieces: list[tuple[str, int]]) -> None:
        self._place, self._pieces = place, pieces
        self.size = sum(size for _, size in pieces)

    def read(self, start: int, length: int) -> bytes:
        """Bytes of the whole, across pieces; fewer at its end. Called from several threads."""
        found, begin = [], 0
        for name, size in self._pieces:
            low, high = max(start, begin), min(start + length, begin + size)
            if low < high:
                found.append(_ranged(self._place, name, low - begin, high - low))
            begin += size
        return b"".join(found)


def _of_archive(archive: str, pieces: _Pieces) -> Iterator[LatentShard]:
    head = pieces.read(0, 512)
    packed = head.startswith((b"\x1f\x8b", b"BZh", b"\xfd7zXZ"))
    count = 0
    try:
        buffered = io.BufferedReader(Ranges(pieces.read, pieces.size), 1 << 22 if packed else 1 << 12)
        with tarfile.open(fileobj=buffered, mode="r|*" if packed else "r:") as tar:
            for member in tar:
                if not member.isfile() or not member.name.endswith(_SHARD):
                    continue
                count += 1
                if packed:  # only a stream can be unpacked: one shard at a time lies in a temporary file
                    with _unpacked(tar, member) as shard:
                        yield shard
                else:
                    yield LatentShard(member.name, member.size, _within(pieces, member.offset_data))
    except _DAMAGE as error:
        raise UserError(
            f"data.source {archive or 'pieces'}: not a tar, or damaged or cut short ({error}); are all pieces there, "
            "named so that they sort in their order?"
        ) from None
    if not count:
        raise UserError(f"data.source {archive}: holds no {_SHARD} files")


@contextmanager
def _unpacked(tar: tarfile.TarFile, member: tarfile.TarInfo) -> Iterator[LatentShard]:
    source = tar.extractfile(member)
    assert source is not None  # it is a file
    turn = Lock()
    with tempfile.TemporaryFile() as file:

        def read(start: int, length: int) -> bytes:
            with turn:
                if not file.tell():
                    try:
                        while piece := source.read(1 << 22):
                            file.write(piece)
                    except _DAMAGE as error:
                        raise UserError(f"{member.name}: its archive is damaged ({error}); fetch it again") from None
                file.seek(start)
                data = file.read(length)
                file.seek(0, io.SEEK_END)
                return data

        yield LatentShard(member.name, member.size, read)


def _reader(place: Storage, name: str) -> Callable[[int, int], bytes]:
    return lambda start, length: _ranged(place, name, start, length)


def _ranged(place: Storage, name: str, start: int, length: int) -> bytes:
    data = place.read_range(name, start, length)
    if len(data) > length:
        raise UserError(f"{place.url}/{name}: this server gives whole files only; download them and name the folder")
    return data


def _within(pieces: _Pieces, begin: int) -> Callable[[int, int], bytes]:
    return lambda start, length: pieces.read(begin + start, length)


def _natural(name: str) -> list[Any]:
    """A key by which numbers in names sort as numbers."""
    return [(1, int(part), "") if part.isdigit() else (0, 0, part) for part in re.split(r"(\d+)", name)]
