"""Latents on disk and their statistics.

A tensor column is `fixed_size_binary`, its shape and dtype in the field's metadata, uncompressed and without
dictionary: reading one is a view of the file's bytes. Statistics are exact over all rows: float64 sums per part,
merged in the parts' order.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from configs.errors import UserError

FLIP = "_flip"
"""Suffix of the column that holds the same tensor of the mirrored image."""
WRITE_OPTIONS: dict[str, Any] = {
    "compression": "none",
    "use_dictionary": False,
    "write_statistics": False,
    "write_page_checksum": True,
}

T = TypeVar("T")


def tensor_field(name: str, shape: Sequence[int], dtype: str = "float16") -> pa.Field:
    """A column of tensors of one shape."""
    width = math.prod(shape) * np.dtype(dtype).itemsize
    return pa.field(name, pa.binary(width), False, {"shape": json.dumps([int(n) for n in shape]), "dtype": dtype})


def tensor_array(values: np.ndarray) -> pa.Array:
    """A numpy array (N, *shape) as a column, without copying contiguous data."""
    values = np.ascontiguousarray(values)
    width = values.dtype.itemsize * math.prod(values.shape[1:])
    return pa.FixedSizeBinaryArray.from_buffers(pa.binary(width), len(values), [None, pa.py_buffer(values)])


def is_tensor(field: pa.Field) -> bool:
    return bool(field.metadata) and b"shape" in field.metadata


def tensor_shape(field: pa.Field) -> tuple[int, ...]:
    """Shape of one row. Raises UserError where the field is no tensor column or its width disagrees."""
    if not is_tensor(field):
        raise UserError(f"column {field.name!r} ({field.type}) has no shape in its metadata: it is no tensor column")
    shape = tuple(json.loads(field.metadata[b"shape"]))
    width = math.prod(shape) * tensor_dtype(field).itemsize
    if field.type != pa.binary(width):
        raise UserError(f"column {field.name!r} is {field.type}, but its shape {shape} needs {width} bytes a row")
    return shape


def tensor_dtype(field: pa.Field) -> np.dtype[Any]:
    return np.dtype(field.metadata[b"dtype"].decode())


def to_numpy(column: pa.ChunkedArray | pa.Array, field: pa.Field) -> np.ndarray:
    """A tensor column as numpy (N, *shape): a view where it is one chunk."""
    shape, dtype = tensor_shape(field), tensor_dtype(field)
    chunks = column.chunks if isinstance(column, pa.ChunkedArray) else [column]
    width = math.prod(shape) * dtype.itemsize
    views = [
        np.frombuffer(chunk.buffers()[1], dtype, len(chunk) * width // dtype.itemsize, chunk.offset * width)
        for chunk in chunks
        if len(chunk)
    ]
    if not views:
        return np.empty((0, *shape), dtype)
    return (views[0] if len(views) == 1 else np.concatenate(views)).reshape(-1, *shape)


def values_in_file(metadata: pq.FileMetaData, name: str) -> list[tuple[int, int]] | None:
    """Where in a file the values of a fixed-width column should lie: (offset, bytes) for every row group.

    That is so for columns written with WRITE_OPTIONS: plain, without nulls and one page in a row group, so that the
    values end the column's chunk. None where the metadata speaks against it; about pages it does not say anything.
    """
    columns = [metadata.schema.column(number) for number in range(metadata.num_columns)]
    number = next((number for number, column in enumerate(columns) if column.path == name), None)
    if number is None or columns[number].max_definition_level or columns[number].max_repetition_level:
        return None
    width = {"INT32": 4, "INT64": 8, "FIXED_LEN_BYTE_ARRAY": columns[number].length}.get(columns[number].physical_type)
    found = []
    for group in range(metadata.num_row_groups):
        chunk = metadata.row_group(group).column(number)
        size, whole = chunk.num_values * (width or 0), chunk.total_compressed_size
        if chunk.compression != "UNCOMPRESSED" or chunk.has_dictionary_page or not 0 < size < whole:
            return None
        found.append((chunk.data_page_offset + whole - size, size))
    return found


def latent_table(keys: Sequence[str], labels: np.ndarray, tensors: Mapping[str, np.ndarray]) -> pa.Table:
    """Rows of latents: `key`, `label` and float16 tensor columns."""
    fields = [pa.field("key", pa.string(), False), pa.field("label", pa.int32(), False)]
    fields += [tensor_field(name, values.shape[1:], str(values.dtype)) for name, values in tensors.items()]
    columns = [pa.array(keys, pa.string()), pa.array(labels, pa.int32())]
    columns += [tensor_array(values) for values in tensors.values()]
    return pa.table(columns, schema=pa.schema(fields))


@dataclass(frozen=True)
class ChannelSums:
    """Count, sum and sum of squares per channel, float64, of one part of the data. Plain JSON by `vars`."""

    count: int
    """Values per channel: rows × height × width."""
    total: list[float]
    squares: list[float]

    @classmethod
    def of(cls, values_NChw: np.ndarray) -> ChannelSums:
        """Of the values as they are stored, so that what was rounded to float16 counts as rounded."""
        channels = values_NChw.shape[1]
        total, squares = np.zeros(channels), np.zeros(channels)
        for start in range(0, len(values_NChw), 256):  # a float64 copy of a whole part would be four times its size
            piece = values_NChw[start : start + 256].astype(np.float64)
            total += piece.sum(axis=(0, 2, 3))
            squares += np.square(piece).sum(axis=(0, 2, 3))
        return cls(values_NChw.size // max(1, channels), total.tolist(), squares.tolist())

    @classmethod
    def of_averages(cls, values_NChw: np.ndarray) -> dict[int, ChannelSums]:
        """Of averages over 2 × 2, 4 × 4 … cells, by the side that leaves, for as long as a side halves."""
        found: dict[int, list[ChannelSums]] = {}
        for start in range(0, len(values_NChw), 256):
            piece = values_NChw[start : start + 256].astype(np.float64)
            while piece.shape[-1] % 2 == 0:
                pairs = piece.reshape(*piece.shape[:2], piece.shape[2] // 2, 2, piece.shape[3] // 2, 2)
                piece = pairs.mean(axis=(3, 5))
                found.setdefault(piece.shape[-1], []).append(cls.of(piece))
        return {side: cls.merged(pieces) for side, pieces in found.items()}

    @classmethod
    def merged(cls, parts: Iterable[ChannelSums]) -> ChannelSums:
        """The sums of all parts. The order of the parts fixes the last bit, so give them in theirs."""
        found = list(parts)
        total = np.sum([part.total for part in found], axis=0)
        squares = np.sum([part.squares for part in found], axis=0)
        return cls(sum(part.count for part in found), total.tolist(), squares.tolist())

    def mean_and_std(self) -> dict[str, Any]:
        """`mean`, `std` (population) and `count`, as a manifest's facts store them."""
        mean = np.array(self.total) / self.count
        variance = np.maximum(np.array(self.squares) / self.count - np.square(mean), 0.0)
        return {"mean": mean.tolist(), "std": np.sqrt(variance).tolist(), "count": self.count}


def statistics_hash(statistics: Mapping[str, Any]) -> str:
    """A name for exactly these statistics; stored beside them and in every checkpoint trained on them."""
    return hashlib.sha256(json.dumps(statistics, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation per channel of each latent column, texture `z` first, semantic `s` last."""

    values: Mapping[str, Mapping[str, Any]]
    """{"z": {"mean": [C], "std": [C], "count": n}, "s": …} in the columns' order."""

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], where: str = "the latents") -> LatentStatistics:
        """From a manifest's facts.

        Raises:
            UserError: they are missing, do not have the hash stored beside them, or cannot normalise anything.
        """
        if "statistics" not in facts or "statistics_hash" not in facts:
            raise UserError(f"{where}: the manifest has no latent statistics; run stage encode again")
        values = {name: facts["statistics"][name] for name in ("z", "s") if name in facts["statistics"]}
        found = cls(values)
        if found.hash != facts["statistics_hash"]:
            raise UserError(
                f"{where}: latent statistics have hash {found.hash} but {facts['statistics_hash']} is stored beside "
                "them: they were changed; run stage encode again"
            )
        return found

    @classmethod
    def of_averages(cls, facts: Mapping[str, Any], side: int, where: str = "the latents") -> LatentStatistics:
        """Of the latents' averages on a coarser grid of this side, from a manifest's facts.

        Raises:
            UserError: there are none of this side, or they were changed.
        """
        try:
            stored = facts["averages"][str(side)]
        except KeyError:
            raise UserError(f"{where}: no statistics of averages of side {side}; run stage encode again") from None
        values = {name: stored["statistics"][name] for name in ("z", "s") if name in stored["statistics"]}
        return cls.from_facts({"statistics": values, "statistics_hash": stored["statistics_hash"]}, where)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.values)

    @cached_property
    def hash(self) -> str:
        return statistics_hash(self.values)

    def check(self, other: str, where: str) -> None:
        """Refuse to go on with something made for other statistics, by their hash. Raises UserError."""
        if other != self.hash:
            raise UserError(
                f"{where} was made for latents with statistics {other}, but these latents have {self.hash}: "
                "use the artifacts of one run, or train again"
            )

    def mean(self, columns: Sequence[str] | None = None) -> np.ndarray:
        """float32 (C,) over the concatenated `columns` (all by default)."""
        return self._joined("mean", columns)

    def std(self, columns: Sequence[str] | None = None) -> np.ndarray:
        """float32 (C,); a channel that never changes counts as 1."""
        std = self._joined("std", columns)
        return np.where(std > 0, std, 1.0).astype(np.float32)

    def normalise(self, x_BCHW: T, columns: Sequence[str] | None = None) -> T:
        """(x − mean) / std in float32, for numpy and torch alike; channels are those of `columns`, concatenated."""
        mean, std = self._like(x_BCHW, columns)
        return (_float32(x_BCHW) - mean) / std

    def denormalise(self, x_BCHW: T, columns: Sequence[str] | None = None) -> T:
        """x × std + mean in float32: the inverse of :meth:`normalise`."""
        mean, std = self._like(x_BCHW, columns)
        return _float32(x_BCHW) * std + mean

    def _joined(self, name: str, columns: Sequence[str] | None) -> np.ndarray:
        chosen = self.columns if columns is None else columns
        return np.concatenate([np.asarray(self.values[column][name]) for column in chosen]).astype(np.float32)

    def _like(self, x: Any, columns: Sequence[str] | None) -> tuple[Any, Any]:
        """Mean and std as (C, 1, 1) of the kind of `x`. Raises ValueError on another number of channels."""
        mean, std = (values.reshape(-1, 1, 1) for values in (self.mean(columns), self.std(columns)))
        if x.shape[-3] != len(mean):
            raise ValueError(f"latents have {x.shape[-3]} channels, their statistics {len(mean)} ({self.columns})")
        if isinstance(x, np.ndarray):
            return mean, std
        import torch

        return torch.from_numpy(mean).to(x.device), torch.from_numpy(std).to(x.device)


def _float32(x: Any) -> Any:
    return x.astype(np.float32) if isinstance(x, np.ndarray) else x.float()
