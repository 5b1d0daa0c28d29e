"""More bytes in a file than 32-bit offsets reach: in what is read, and in the part that is written."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from PIL import Image

from tasks import shard
from tests.helpers.odd_sources import recipe_of
from tests.helpers.piles import run_stage

IMAGES, SIDE = 720, 1_024


@pytest.mark.slow
def test_parts_above_two_gibibytes_are_read_and_written(tmp_path: Path, local_ray: None) -> None:
    data = io.BytesIO()
    Image.new("RGB", (SIDE, SIDE), (90, 120, 30)).save(data, "BMP")
    plain = bytearray(data.getvalue())
    pictures = []
    for number in range(IMAGES):
        plain[-4:] = number.to_bytes(4, "big")  # each image is another
        pictures.append({"bytes": bytes(plain), "path": f"{number}.bmp"})
    kind = pa.struct([("bytes", pa.large_binary()), ("path", pa.string())])
    table = pa.table({"image": pa.array(pictures, kind), "label": [n % 2 for n in range(IMAGES)]})
    assert table.nbytes > 2**31
    (tmp_path / "pile").mkdir()
    pq.write_table(table, tmp_path / "pile" / "train.parquet", row_group_size=200, compression="none")
    del table, pictures
    overrides = ["shard.test_share=0.1", "shard.rows_per_shard=100000"]
    recipe = recipe_of("parquet", tmp_path / "pile", 2, *overrides)
    made = run_stage(shard.STAGE, recipe, f"file://{tmp_path}/root")
    assert made.manifest.rows == IMAGES
    part = max(made.files("train/", ".parquet"), key=lambda entry: entry.bytes)
    labels = pq.read_table(f"{made.uri.removeprefix('file://')}/{part.path}", columns=["label"])
    assert len(labels) == part.rows
    last = shard_rows(made.uri.removeprefix("file://") + "/" + part.path)
    assert last.shape == (SIDE, SIDE, 3) and tuple(last[0, 0]) == (90, 120, 30)


def shard_rows(path: str) -> np.ndarray:
    """Pixels of the last image of a part."""
    file = pq.ParquetFile(path)
    (data,) = file.read_row_group(file.num_row_groups - 1, columns=["image"])["image"].to_pylist()[-1:]
    return np.asarray(Image.open(io.BytesIO(data)))
