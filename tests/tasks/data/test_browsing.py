"""Images of a shard by class and key, and the tables beside them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

from configs import UserError
from tasks.data.browsing import find, of_class, one_of, table_beside, with_key
from tests.helpers import builders


def test_images_of_a_class_come_in_order_and_in_pages(tmp_path: Path) -> None:
    shard = builders.put_shard(builders.at(tmp_path), builders.small_recipe())
    everything = find(shard, "train", of_class(None), 1000)
    assert [each.key for each in everything] == [f"train/{row}" for row in range(200)]
    hoops = [each.key for each in everything if each.label == 0]
    assert len(hoops) > 10
    pages = [find(shard, "train", of_class(0), 4, skip) for skip in range(0, len(hoops), 4)]
    assert [each.key for page in pages for each in page] == hoops
    assert find(shard, "train", of_class(0), 4, len(hoops)) == []
    assert find(shard, "validation", of_class(None), 4) == []


def test_images_by_a_part_of_their_key_or_by_many_keys(tmp_path: Path) -> None:
    shard = builders.put_shard(builders.at(tmp_path), builders.small_recipe())
    assert [each.key for each in find(shard, "train", with_key("TRAIN/19"), 100)] == [
        "train/19",
        *(f"train/{row}" for row in range(190, 200)),
    ]
    assert [each.key for each in find(shard, "train", with_key("n/1.3"), 100)] == []
    assert [each.key for each in find(shard, "test", one_of(["test/90", "test/7", "none"]), 9)] == ["test/7", "test/90"]


def test_a_picture_fits_its_square_and_one_that_does_not_decode_is_grey(tmp_path: Path) -> None:
    shard = builders.put_shard(builders.at(tmp_path), builders.small_recipe())
    first = find(shard, "train", of_class(None), 1)[0]
    assert first.picture(96).size == (84, 84) and first.picture(16).size == (16, 16)
    broken = type(first)("x", 0, b"no image").picture(24)
    assert broken.size == (24, 24) and np.ptp(np.asarray(broken)) == 0


def test_tables_and_files_that_are_gone(tmp_path: Path) -> None:
    root, recipe = builders.at(tmp_path), builders.small_recipe()
    shard = builders.put_shard(root, recipe)
    assert table_beside(shard, "quarantine.parquet", 10) == []
    refused = pa.table({"key": ["a", "b"], "reason": ["empty file"] * 2, "detail": ["", ""]})
    file = shard.storage.write_table("quarantine.parquet", refused, 10)
    shard = builders.put(root, recipe, "shard", [*shard.manifest.files, file])
    assert [row["key"] for row in table_beside(shard, "quarantine.parquet", 1)] == ["a"]
    shard.storage.delete("train/part-00000.parquet")
    with pytest.raises(UserError, match=r"train/part-00000\.parquet cannot be read"):
        find(shard, "train", of_class(0), 4)
