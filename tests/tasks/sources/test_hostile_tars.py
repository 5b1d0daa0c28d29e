"""Members of tars that point elsewhere: links of both kinds, devices, pipes and names that climb are no images."""

from __future__ import annotations

import gzip
import io
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from configs.errors import UserError
from tasks.sources.imagenet import ImageNetSource
from tasks.sources.label_files import classes_of_images
from tasks.sources.ready_latents import ReadyLatentsSource
from tasks.sources.webdataset import WebDatasetSource
from tests.fuzz import seeds
from tests.helpers.odd_sources import jpeg

KINDS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.BLKTYPE, tarfile.FIFOTYPE)
Member = tuple[str, bytes, bytes, str]
"""Name, content, kind and what it points to."""


def _tar(members: list[Member]) -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        for name, data, kind, target in members:
            info = tarfile.TarInfo(name)
            info.type, info.linkname, info.size = kind, target, len(data)
            archive.addfile(info, io.BytesIO(data))
    return buffer.getvalue()


def _files(content: bytes, suffix: str, name: Callable[[int], str], secret: Path) -> list[Member]:
    """One whole file, and others that are none of the archive's own."""
    found = [(name(0), content, tarfile.REGTYPE, "")]
    found += [(name(number), b"", kind, str(secret)) for number, kind in enumerate(KINDS, 1)]
    found += [(name(9), b"", tarfile.LNKTYPE, f"../{secret.name}")]
    return [*found, (f"../up.{suffix}", content, tarfile.REGTYPE, ""), (str(secret), content, tarfile.REGTYPE, "")]


@pytest.fixture
def inside(tmp_path: Path) -> Path:
    (tmp_path / "inside").mkdir()
    return tmp_path / "inside"


@pytest.fixture
def secret(tmp_path: Path) -> Path:
    """A picture outside, which a careless reader would take."""
    (tmp_path / "secret.jpg").write_bytes(jpeg(77))
    return tmp_path / "secret.jpg"


def _nothing_else(tmp_path: Path, secret: Path) -> None:
    assert sorted(each.name for each in tmp_path.iterdir()) == ["inside", secret.name]
    assert secret.read_bytes() == jpeg(77)


def test_of_a_webdataset(tmp_path: Path, inside: Path, secret: Path) -> None:
    members = [("000000.cls", b"0", tarfile.REGTYPE, "")]
    members += _files(jpeg(1), "jpg", lambda number: f"{number:06d}.jpg", secret)
    (inside / "0.tar").write_bytes(_tar(members))
    source = WebDatasetSource(str(inside))
    listing = source.listing()
    rows = listing.images.to_pylist()
    assert [source.read(row["file"], row["start"], row["length"]) for row in rows] == [jpeg(1)]
    reasons = [each.reason for each in listing.refused]
    assert reasons.count("not a regular file in its archive") == 6
    assert reasons.count("unsafe path in its archive") == 2
    _nothing_else(tmp_path, secret)


def test_of_imagenet(tmp_path: Path, inside: Path, secret: Path) -> None:
    inner = _tar(_files(jpeg(1), "JPEG", lambda number: f"n01_{number}.JPEG", secret))
    outer = [("n01.tar", inner, tarfile.REGTYPE, ""), ("n02.tar", b"", tarfile.SYMTYPE, str(secret))]
    (inside / "train.tar").write_bytes(_tar(outer))
    source = ImageNetSource(str(inside / "train.tar"))
    rows = source.listing().images.to_pylist()
    assert [source.read(row["file"], row["start"], row["length"]) for row in rows] == [jpeg(1)]
    _nothing_else(tmp_path, secret)


@pytest.mark.parametrize("packed", [False, True])
def test_of_ready_latents(tmp_path: Path, inside: Path, secret: Path, packed: bool) -> None:
    secret.write_bytes(seeds.latents()[1])
    content = _tar(_files(seeds.latents()[0], "txt", lambda number: f"{number}.safetensors", secret))
    (inside / "l.tar").write_bytes(gzip.compress(content) if packed else content)
    shards = [(shard.name, shard.rows) for shard in ReadyLatentsSource(str(inside / "l.tar")).shards()]
    assert len(shards) == 1 and shards[0][0] == "0.safetensors"
    assert secret.read_bytes() == seeds.latents()[1] and len(list(tmp_path.iterdir())) == 2


def test_of_the_development_kit(tmp_path: Path, inside: Path, secret: Path) -> None:
    truth = "ILSVRC2012_validation_ground_truth.txt"
    secret.write_bytes(b"1\n2\n")
    for kind in KINDS:
        (inside / "kit.tar").write_bytes(_tar([(truth, b"", kind, str(secret))]))
        with pytest.raises(UserError, match=f"holds no {truth}"):
            classes_of_images(str(inside / "kit.tar"), ["ILSVRC_1.JPEG", "ILSVRC_2.JPEG"], ("n01", "n02"))
