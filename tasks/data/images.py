"""Images of an artifact in their order, whatever they are stored as: encoded files of a shard, pixels of a sample."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from configs import UserError
from configs.errors import brief
from infra.artifacts import Artifact
from infra.storage import FileEntry, Storage
from tasks.data.crops import Crop
from tasks.data.decode import Undecodable, decode
from tasks.data.portions import SCORING_BATCH
from tasks.data.tensors import is_tensor, tensor_array, tensor_field, to_numpy

Images = tuple[NDArray[np.int64], NDArray[Any]]
"""labels (B,) and pixels (B, H, W, 3), uint8 unless a crop gives floats"""


@dataclass(frozen=True)
class Stretch:
    """Consecutive rows of one Parquet file: a unit of work."""

    file: str
    start: int
    """First row within the file."""
    rows: int
    first: int
    """Number of the first row within the split."""


def stretches(artifact: Artifact, prefix: str, limit: int | None = None, length: int = 1_000) -> list[Stretch]:
    """The first `limit` rows of a split (files whose names start with `prefix`), cut into stretches.

    Raises:
        UserError: the artifact holds no such rows.
    """
    found: list[Stretch] = []
    first = 0
    for entry in artifact.files(prefix=prefix, suffix=".parquet"):
        rows = entry.rows or 0
        take = rows if limit is None else min(rows, limit - first)
        for start in range(0, take, length):
            found.append(Stretch(entry.path, start, min(length, take - start), first + start))
        first += max(take, 0)
    if not found:
        raise UserError(
            f"{artifact.uri} has no images in {prefix or 'its parts'}: run stage {artifact.stage} on more images"
        )
    return found


def read_images(storage: Storage, stretch: Stretch, crop: Crop | int, batch: int = SCORING_BATCH) -> Iterator[Images]:
    """Labels and pixels of a stretch, at most `batch` rows at a time.

    Encoded images are decoded and cropped, a side alone means ADM's centre crop; stored pixels must have that size
    already.

    Raises:
        UserError: the file is missing or damaged, or its images have another size.
    """
    try:
        with storage.open(stretch.file) as file:
            for rows in _rows(pq.ParquetFile(file), stretch, batch):
                yield rows["label"].to_numpy(zero_copy_only=False).astype(np.int64), _pixels(rows, crop)
    except (OSError, pa.ArrowException, Undecodable, ValueError, LookupError, TypeError, AttributeError) as error:
        if isinstance(error, OSError) and error.errno is not None and not isinstance(error, FileNotFoundError):
            raise  # of the storage, not of what Arrow finds in the file
        said = brief(error)
        raise UserError(
            f"{storage.url}/{stretch.file} cannot be read ({said}); delete its artifact and run its stage again"
        ) from None


def images(artifact: Artifact, split: str, crop: Crop | int, limit: int | None = None) -> Iterator[Images]:
    """The first `limit` images of a split, in its order; `split` is `train`, `test`, or empty for a sample."""
    prefix = f"{split}/" if split else "part-"
    for stretch in stretches(artifact, prefix, limit):
        yield from read_images(artifact.storage, stretch, crop)


def read_labels(artifact: Artifact, prefix: str, limit: int) -> NDArray[np.int64]:
    """Labels of the first `limit` images of a split, (N,)."""
    found: list[NDArray[np.int64]] = []
    for stretch in stretches(artifact, prefix, limit, length=limit):
        with artifact.storage.open(stretch.file) as file:
            column = pq.ParquetFile(file).read(columns=["label"])["label"]
        found.append(column.to_numpy()[: stretch.rows].astype(np.int64))
    return np.concatenate(found)


def read_keys(storage: Storage, stretch: Stretch) -> list[str]:
    """Keys of a stretch of a shard's images."""
    with storage.open(stretch.file) as file:
        column = pq.ParquetFile(file).read(columns=["key"])["key"]
    found: list[str] = column.slice(stretch.start, stretch.rows).to_pylist()
    return found


def pick_images(
    storage: Storage, entries: Sequence[FileEntry], positions: Sequence[int], size: int
) -> NDArray[np.uint8]:
    """Images (B, size, size, 3) by their number within the files, in the order asked for.

    Only the row groups that hold them are read, only they are decoded.
    Raises ValueError for a number beyond the last row.
    """
    found: dict[int, NDArray[np.uint8]] = {}
    first = 0
    for entry in entries:
        count = entry.rows or 0
        if any(first <= position < first + count for position in positions):
            with storage.open(entry.path) as opened:
                file, start = pq.ParquetFile(opened), first
                for group in range(file.num_row_groups):
                    rows = file.metadata.row_group(group).num_rows
                    here = sorted({p for p in positions if start <= p < start + rows})
                    if here:
                        table = file.read_row_group(group, columns=["image"]).take([p - start for p in here])
                        pixels = _pixels(table.combine_chunks().to_batches()[0], size)
                        found.update(zip(here, pixels, strict=True))
                    start += rows
        first += count
    missing = set(positions) - set(found)
    if missing:
        raise ValueError(f"no images number {sorted(missing)[:3]} in {storage.url}: there are {first}")
    return np.stack([found[position] for position in positions])


def _rows(file: pq.ParquetFile, stretch: Stretch, batch: int) -> Iterator[pa.RecordBatch]:
    """The stretch's rows, reading only the row groups that overlap it."""
    first, groups, before = 0, [], 0
    for number in range(file.num_row_groups):
        rows = file.metadata.row_group(number).num_rows
        if first + rows <= stretch.start:
            before = first + rows
        elif first < stretch.start + stretch.rows:
            groups.append(number)
        first += rows
    skip, left = stretch.start - before, stretch.rows
    for batched in file.iter_batches(batch, row_groups=groups, columns=["label", "image"]):
        rows = batched.slice(min(skip, batched.num_rows), left)
        skip = max(0, skip - batched.num_rows)
        left -= rows.num_rows
        if rows.num_rows:
            yield rows


def _pixels(rows: pa.RecordBatch, crop: Crop | int) -> NDArray[Any]:
    """(B, size, size, 3), uint8 or what the crop gives."""
    field, column = rows.schema.field("image"), rows["image"]
    cut = Crop(crop) if isinstance(crop, int) else crop
    size = cut.size
    if not is_tensor(field):
        return np.stack([cut(decode(image)) for image in column.to_pylist()])
    pixels = to_numpy(column, field)
    if pixels.shape[1:] != (size, size, 3):
        raise UserError(
            f"stored images have shape {pixels.shape[1:]}, "
            f"expected ({size}, {size}, 3): sample again at image.size {size}"
        )
    return pixels


def image_table(indices: NDArray[np.int64], labels: NDArray[np.int64], images_BHW3: NDArray[np.uint8]) -> pa.Table:
    """index, label, image: pixels as they are, shape and dtype in the field's metadata."""
    schema = pa.schema(
        [
            pa.field("index", pa.int64(), nullable=False),
            pa.field("label", pa.int32(), nullable=False),
            tensor_field("image", images_BHW3.shape[1:], "uint8"),
        ]
    )
    return pa.table([pa.array(indices), pa.array(labels, pa.int32()), tensor_array(images_BHW3)], schema=schema)
