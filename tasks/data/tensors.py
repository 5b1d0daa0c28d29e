"""Tensors as columns of Parquet.

A tensor column is `fixed_size_binary`, its shape and dtype in the field's metadata, uncompressed and
without dictionary: reading one is a view of the file's bytes.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import numpy as np
import pyarrow as pa

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


def column_values(table: pa.Table, name: str) -> np.ndarray:
    """A column as numpy: a tensor (N, values), int32 (N,), of anything else Python's values."""
    column, field = table[name], table.schema.field(name)
    if is_tensor(field):
        return to_numpy(column, field).reshape(len(column), -1)
    return np.array(column.to_pylist(), np.int32 if pa.types.is_integer(field.type) else object)


def latent_table(keys: Sequence[str], labels: np.ndarray, tensors: Mapping[str, np.ndarray]) -> pa.Table:
    """Rows of latents: `key`, `label` and float16 tensor columns."""
    fields = [pa.field("key", pa.string(), False), pa.field("label", pa.int32(), False)]
    fields += [tensor_field(name, values.shape[1:], str(values.dtype)) for name, values in tensors.items()]
    columns = [pa.array(keys, pa.string()), pa.array(labels, pa.int32())]
    columns += [tensor_array(values) for values in tensors.values()]
    return pa.table(columns, schema=pa.schema(fields))
