"""A remote file as one on disk: seekable, each read a range of it that storage is asked for, again where need be."""

from __future__ import annotations

import io
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from infra.storage import Storage


class Ranges(io.RawIOBase):
    """A remote file as seekable bytes, each read a range of it."""

    def __init__(self, storage: Storage, name: str) -> None:
        self._storage, self._name, self._at = storage, name, 0
        self._size = storage.size(name)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._at

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def readinto(self, buffer: Any) -> int:
        wanted = max(0, min(len(buffer), self._size - self._at))
        if not wanted:
            return 0
        data = self._storage.read_range(self._name, self._at, wanted)[:wanted]
        buffer[: len(data)] = data
        self._at += len(data)
        return len(data)
