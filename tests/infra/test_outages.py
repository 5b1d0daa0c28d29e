"""An S3 server that goes away for a while, cuts answers short, or has no room: waited for, in one line."""

from __future__ import annotations

import io
import threading
import time
from collections.abc import Iterator
from urllib.parse import urlsplit

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import s3fs

from benchmarks.chaos.proxy import Proxy
from configs.errors import Unreachable
from infra import outages
from infra.storage import Storage

ROWS = 200_000


@pytest.fixture
def between(s3_root: str, s3_server: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    proxy = Proxy(int(urlsplit(s3_server["AWS_ENDPOINT_URL"]).port or 0))
    with proxy.running() as address:
        monkeypatch.setenv("AWS_ENDPOINT_URL", f"http://{address}")
        monkeypatch.setenv("AWS_MAX_ATTEMPTS", "1")
        monkeypatch.setattr(outages, "_answered", set())
        monkeypatch.setattr(outages, "_away", set())
        s3fs.S3FileSystem.clear_instance_cache()
        yield proxy
    s3fs.S3FileSystem.clear_instance_cache()


def _table() -> pa.Table:
    return pa.table({"x": pa.array(range(ROWS), pa.int64())})


def _clear_up(between: Proxy, told: bool) -> None:
    """End an outage after four seconds, or as soon as it is told: when that is depends on waits of random length."""
    until = time.monotonic() + (60.0 if told else 4.0)
    while time.monotonic() < until and not (told and outages._away):
        time.sleep(0.02)
    between.weather = "fair"


_LATER = [pytest.param(weather, marks=pytest.mark.slow) for weather in ("short", "full")]


@pytest.mark.parametrize("weather", ["cut", *_LATER])
def test_what_passes_is_waited_for_and_told_in_two_lines(
    between: Proxy, s3_root: str, weather: str, capsys: pytest.CaptureFixture[str]
) -> None:
    place = Storage.at(s3_root)
    place.write_table("x.parquet", _table(), 10_000)
    reading = place.open("x.parquet")
    between.weather = weather
    over = threading.Thread(target=_clear_up, args=(between, weather == "cut"))
    over.start()
    place.write_bytes("b", b"written meanwhile")
    assert pq.read_table(io.BytesIO(place.read_bytes("x.parquet"))).num_rows == ROWS
    assert pq.ParquetFile(reading).read()["x"].to_pylist()[-1] == ROWS - 1
    assert place.read_bytes("b") == b"written meanwhile" and place.names() == ["b", "x.parquet"]
    over.join()
    told = capsys.readouterr().out.splitlines()
    assert len(told) in ((2,) if weather == "cut" else (0, 2)), told
    if told:
        assert told[0].startswith("s3://latents does not answer (") and told[1] == "s3://latents answers again"


def test_an_outage_without_end_is_one_line(
    between: Proxy, s3_root: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(outages, "_PATIENCE", 4.0)
    monkeypatch.setattr(outages, "_UNTOLD", 0.5)  # less than the waits before the last attempt, however they are spread
    place = Storage.at(s3_root)
    place.write_bytes("a", b"content")
    between.weather = "cut"
    with pytest.raises(Unreachable, match=r"cannot read s3://latents/.*/a: .*; check that the storage is reachable"):
        place.read_bytes("a")
    assert len(capsys.readouterr().out.splitlines()) == 1


def test_a_file_is_read_by_ranges(between: Proxy, s3_root: str) -> None:
    """As one on disk is, wherever one seeks."""
    place = Storage.at(s3_root)
    content = bytes(range(256)) * 1000
    place.write_bytes("a", content)
    with place.open("a") as file:
        assert file.read(3) == content[:3] and file.tell() == 3
        file.seek(-5, io.SEEK_END)
        assert file.read() == content[-5:] and file.read() == b""
        file.seek(100)
        assert file.read(1000) == content[100:1100]
    with pytest.raises(FileNotFoundError):
        place.open("nothing")
