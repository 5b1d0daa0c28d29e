"""Archives, Parquet and CSV as sources: what lies in them, and what tries to trick us."""

from __future__ import annotations

import io
import json
import tarfile
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from configs import UserError, load_recipe
from tasks.shard import STAGE
from tasks.sources.csv_file import CsvSource
from tasks.sources.imagenet import ImageNetSource
from tasks.sources.parquet import ParquetSource
from tasks.sources.webdataset import WebDatasetSource
from tests.helpers.piles import SMALL_BATCHES, encoded, picture, read_rows, run_stage


def _tar(path: Path | None, members: dict[str, bytes], links: dict[str, str] | None = None) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
        for name, target in (links or {}).items():
            info = tarfile.TarInfo(name)
            info.type, info.linkname = tarfile.SYMTYPE, target
            archive.addfile(info)
    if path is not None:
        path.write_bytes(buffer.getvalue())
    return buffer.getvalue()


def _images(numbers: range, kind: str = "JPEG") -> list[bytes]:
    return [encoded(picture(number), kind) for number in numbers]


@pytest.fixture
def imagenet(tmp_path: Path) -> dict[str, str]:
    train = {
        f"{wnid}.tar": _tar(None, {f"{wnid}_{i}.JPEG": data for i, data in enumerate(_images(range(n, n + 6)))})
        for wnid, n in (("n02", 0), ("n01", 10))
    }
    _tar(tmp_path / "train.tar", train)
    _tar(tmp_path / "val.tar", {f"val_{i}.JPEG": data for i, data in enumerate(_images(range(20, 24)))})
    (tmp_path / "labels.txt").write_text("n01\nn02\nn02\nn01\n")
    return {
        "path": str(tmp_path / "train.tar"),
        "test_path": str(tmp_path / "val.tar"),
        "test_labels_path": str(tmp_path / "labels.txt"),
    }


def test_imagenet_archives_are_read_in_place(imagenet: dict[str, str]) -> None:
    source = ImageNetSource(**imagenet)
    listing = source.listing()
    assert listing.classes == ("n01", "n02")
    rows = {row["key"]: row for row in listing.images.to_pylist()}
    assert len(rows) == 16
    for key, number, label in (
        ("train/n01/n01_2.JPEG", 12, 0),
        ("train/n02/n02_5.JPEG", 5, 1),
        ("test/val_3.JPEG", 23, 0),
    ):
        row = rows[key]
        assert row["label"] == label and row["split"] == key.split("/")[0]
        assert source.read(row["file"], row["start"], row["length"]) == _images(range(number, number + 1))[0]


def test_imagenet_validation_labels_by_name(imagenet: dict[str, str]) -> None:
    Path(imagenet["test_labels_path"]).write_text(
        "ImageId,PredictionString\nval_3,n02 1 2 3 4\nval_1,n01 5 6 7 8\nval_0,n01 1 1 1 1\nval_2,n02 1 1 1 1\n"
    )
    rows = {row["key"]: row["label"] for row in ImageNetSource(**imagenet).listing().images.to_pylist()}
    assert [rows[f"test/val_{i}.JPEG"] for i in range(4)] == [0, 0, 1, 1]
    Path(imagenet["test_labels_path"]).write_text("490\n361\n171\n822\n")
    with pytest.raises(UserError, match=r"labels run from 171 to 822.*give names of classes"):
        ImageNetSource(**imagenet).listing()


@pytest.mark.usefixtures("local_ray")
def test_imagenet_through_the_stage(imagenet: dict[str, str], tmp_path: Path) -> None:
    source = "data.source=" + json.dumps({"kind": "imagenet", **imagenet})
    artifact = run_stage(
        STAGE, load_recipe("demo_tiny", [source, "data.classes=2", *SMALL_BATCHES]), str(tmp_path / "root")
    )
    assert artifact.manifest.facts["splits"] == {"train": 12, "test": 4}
    assert {row["key"] for row in read_rows(artifact, "test")} == {f"test/val_{i}.JPEG" for i in range(4)}


def test_tricks_in_archives_are_refused(tmp_path: Path) -> None:
    image = _images(range(1))[0]
    _tar(
        tmp_path / "x.tar",
        {"../../etc/a.jpg": image, "/b.jpg": image, "good.jpg": image, "good.cls": b"1"},
        links={"link.jpg": "/etc/passwd"},
    )
    listing = WebDatasetSource(str(tmp_path / "x.tar")).listing()
    assert listing.images["key"].to_pylist() == ["x.tar/good"]
    assert sorted(refusal.reason for refusal in listing.refused) == [
        "not a regular file in its archive",
        "unsafe path in its archive",
        "unsafe path in its archive",
    ]
    (tmp_path / "half.tar").write_bytes((tmp_path / "x.tar").read_bytes()[:700])
    with pytest.raises(UserError, match=r"half\.tar.* is not a whole, uncompressed tar"):
        WebDatasetSource(str(tmp_path / "half.tar")).listing()
    with pytest.raises(UserError, match="does not exist"):
        ImageNetSource(str(tmp_path / "none.tar")).identity()


def test_webdataset_samples(tmp_path: Path) -> None:
    for shard in range(2):
        members = {}
        for i, data in enumerate(_images(range(4 * shard, 4 * shard + 4), "PNG")):
            members |= {f"{i:03d}.png": data, f"{i:03d}.cls": str(i).encode(), f"{i:03d}.json": b"{}"}
        members |= {"lonely.png": members["000.png"], "words.png": members["000.png"], "words.cls": b"cat"}
        _tar(tmp_path / f"data-{shard}.tar", members)
    source = WebDatasetSource(str(tmp_path))
    listing = source.listing()
    assert listing.classes == ("0", "1", "2", "3") and listing.images.num_rows == 8
    row = listing.images.to_pylist()[5]
    assert row["key"] == "data-1.tar/001" and row["label"] == 1 and row["split"] is None
    assert source.read(row["file"], row["start"], row["length"]) == _images(range(5, 6), "PNG")[0]
    assert sorted(refusal.reason for refusal in listing.refused) == ["label is not a number"] * 2 + ["no label"] * 2
    globbed = WebDatasetSource(str(tmp_path / "data-0*.tar"), str(tmp_path / "data-1*.tar")).listing()
    assert sorted(set(globbed.images["split"].to_pylist())) == ["test", "train"]


def _hub_parquet(path: Path, numbers: range, names: list[str] | None = None) -> None:
    images = [{"bytes": data, "path": f"{n}.jpg"} for n, data in zip(numbers, _images(numbers), strict=True)]
    table = pa.table({"image": images, "label": pa.array([n % 2 for n in numbers], pa.int64())})
    if names:
        info = {"info": {"features": {"label": {"names": names, "_type": "ClassLabel"}}}}
        table = table.replace_schema_metadata({"huggingface": json.dumps(info)})
    pq.write_table(table, path, row_group_size=3)


@pytest.mark.usefixtures("local_ray")
def test_hub_parquet_through_the_stage(tmp_path: Path) -> None:
    data = tmp_path / "data"
    data.mkdir()
    for number in range(3):
        _hub_parquet(data / f"train-{number}-of-3.parquet", range(10 * number, 10 * number + 10), ["cat", "dog"])
    _hub_parquet(data / "validation-0-of-1.parquet", range(30, 36), ["cat", "dog"])
    source = {"kind": "parquet", "path": f"{data}/train-*.parquet", "test_path": f"{data}/validation-*.parquet"}
    recipe = load_recipe(
        "demo_tiny", ["data.source=" + json.dumps(source), "data.classes=2", "shard.rows_per_shard=7", *SMALL_BATCHES]
    )
    artifact = run_stage(STAGE, recipe, str(tmp_path / "root"))
    assert artifact.manifest.facts["classes"] == ["cat", "dog"]
    assert artifact.manifest.facts["splits"] == {"train": 30, "test": 6}
    for row in read_rows(artifact, "train"):
        _, file, number = row["key"].split("/")
        image = 10 * int(file.split("-")[1]) + int(number)
        assert row["image"] == _images(range(image, image + 1))[0] and row["label"] == image % 2
    assert not artifact.storage.names("unpacked")


def test_parquet_mistakes_are_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no \.parquet files at"):
        ParquetSource(str(tmp_path)).identity()
    path = tmp_path / "x.parquet"
    pq.write_table(pa.table({"image": ["a name"], "label": [1]}), path)
    with pytest.raises(UserError, match="column 'image' is string, expected bytes, or a struct"):
        ParquetSource(str(path)).listing()
    with pytest.raises(UserError, match="no column 'img'"):
        ParquetSource(str(path), image_column="img").listing()
    path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UserError, match="not a whole Parquet file"):
        ParquetSource(str(path)).listing()


def test_csv(tmp_path: Path) -> None:
    for number in range(3):
        (tmp_path / f"bild {number}.jpg").write_bytes(_images(range(number, number + 1))[0])
    csv = tmp_path / "list.csv"
    csv.write_text("path,label,split\nbild 0.jpg,Hund,train\nbild 1.jpg,Äpfel,test\nbild 2.jpg,Hund,train\n")
    source = CsvSource(str(csv))
    listing = source.listing()
    assert listing.classes == ("Hund", "Äpfel")
    assert listing.images.select(["label", "split"]).to_pydict() == {
        "label": [0, 1, 0],
        "split": ["train", "test", "train"],
    }
    row = listing.images.to_pylist()[1]
    assert source.read(row["file"], row["start"], row["length"] or 1 << 20) == _images(range(1, 2))[0]
    csv.write_text("path,label\nbild 0.jpg,3\nbild 1.jpg,\nbild 9.jpg,3\n")
    listing = CsvSource(str(csv)).listing()
    assert listing.classes == ("0", "1", "2", "3") and listing.images["key"].to_pylist() == ["bild 0.jpg"]
    assert [(r.key, r.reason) for r in listing.refused] == [("bild 1.jpg", "no label"), ("bild 9.jpg", "no such file")]
    csv.write_text("file;class\na;b\n")
    with pytest.raises(UserError, match="columns path and label are needed"):
        CsvSource(str(csv)).listing()
