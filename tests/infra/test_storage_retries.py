from __future__ import annotations

import errno
import pickle
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from botocore.exceptions import NoCredentialsError
from fsspec.implementations.memory import MemoryFileSystem

from configs import UserError
from configs.errors import Unreachable, attempt, checked
from infra import outages
from infra.storage import Storage


@pytest.fixture
def flaky(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], Storage]:
    """Storage on which only every n-th request of reading and writing succeeds."""

    def make(every: int) -> Storage:
        monkeypatch.setattr(outages, "_FIRST_WAIT", 0.001)
        monkeypatch.setattr(outages, "_answered", set())
        count = 0

        def unreliable(name: str) -> Any:
            whole = getattr(MemoryFileSystem, name)

            def request(*arguments: Any, **options: Any) -> Any:
                nonlocal count
                count += 1
                if count % every:
                    raise ConnectionResetError("connection reset by peer")
                return whole(*arguments, **options)

            return request

        for name in ("cat_file", "pipe_file", "rm"):
            monkeypatch.setattr(MemoryFileSystem, name, unreliable(name))
        return Storage.at("memory://flaky")

    return make


def test_transient_errors_are_tried_again(flaky: Callable[[int], Storage]) -> None:
    storage = flaky(3)
    storage.write_bytes("a", b"content")
    assert storage.read_bytes("a") == b"content"
    assert storage.read_range("a", 2, 3) == b"nte"
    storage.delete("a")
    assert not storage.exists("a")


def test_an_outage_ends_in_one_clear_line(flaky: Callable[[int], Storage]) -> None:
    storage = flaky(1000)
    with pytest.raises(UserError, match=r"cannot write memory://flaky/a: connection reset by peer; check that"):
        storage.write_bytes("a", b"content")


def test_what_is_not_there_is_asked_for_once(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[str] = []
    monkeypatch.setattr(outages.time, "sleep", lambda seconds: asked.append("again"))
    with pytest.raises(FileNotFoundError):
        Storage.at("memory://flaky").read_bytes("nothing here")
    assert not asked


@pytest.mark.parametrize(
    ("error", "passing"),
    [
        (OSError("connection reset"), True),
        (TimeoutError("timed out"), True),
        (OSError(errno.ENOSPC, "no space left on device"), False),
        (OSError(errno.EINVAL, "InvalidBucketName"), False),
        (NotADirectoryError("a file is in the way"), False),
        (NoCredentialsError(), False),
    ],
    ids=repr,
)
def test_only_what_may_pass_is_worth_another_attempt(tmp_path: Path, error: Exception, passing: bool) -> None:
    storage = Storage.at(str(tmp_path))
    with pytest.raises(UserError, match="cannot read") as raised, storage._explained("read", "a"):
        raise error
    assert isinstance(raised.value, Unreachable) == passing


def test_errors_travel_as_what_they_are() -> None:
    def fails(error: Exception) -> None:
        raise error

    for error in (UserError("a mistake"), Unreachable("a passing one")):
        again = pickle.loads(pickle.dumps(attempt(partial(fails, error))))
        assert type(again) is type(error) and str(again) == str(error)
        with pytest.raises(type(error), match=str(error)):
            checked(again)
    assert checked(attempt(lambda: 3)) == 3
    with pytest.raises(ZeroDivisionError):
        attempt(partial(fails, ZeroDivisionError("a defect")))
