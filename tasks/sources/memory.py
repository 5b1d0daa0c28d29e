"""What was found in a large file, remembered until the file changes.

Labels in archives and in Parquet are content, so a source's identity needs one pass over them. Times and etags
decide whether that pass is made again; they are no part of what it finds.
"""

from __future__ import annotations

import hashlib
import io
import time
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from infra.home import home
from infra.storage import Storage
from tasks.sources.files import File

_FORMAT = "1"
"""Raised when what is remembered changes its meaning."""
_SETTLED_SECONDS = 2.0
"""A file that was written this shortly before is not remembered: it may change again within one tick of its time."""


def remembered(file: File, what: str, find: Callable[[], pa.Table]) -> pa.Table:
    """`find()`, or what it gave when the file was last as it is now.

    Args:
        file: without a mark nothing is remembered.
        what: a name of what is found, with all that it depends on besides the file.
    """
    place = _place(file, what)
    if not file.mark:
        return find()
    try:
        known = pq.read_table(io.BytesIO(place.read_bytes()))
        if (known.schema.metadata or {}).get(b"mark") == file.mark.encode():
            return known.replace_schema_metadata(_without_mark(known.schema.metadata))
    except (OSError, pa.ArrowException):
        pass  # never looked at, or a damaged memory: look
    began = time.time()
    found = find()
    if _settled(file, began):
        marked = found.replace_schema_metadata({**(found.schema.metadata or {}), b"mark": file.mark.encode()})
        sink = io.BytesIO()
        pq.write_table(marked, sink, compression="zstd")
        Storage.at(str(place.parent)).write_bytes(place.name, sink.getvalue())
    return found


def _place(file: File, what: str) -> Path:
    digest = hashlib.sha256("\0".join((_FORMAT, what, Storage.at(file.path).url)).encode()).hexdigest()[:32]
    return home() / "sources" / f"{digest}.parquet"


def _without_mark(metadata: dict[bytes, bytes]) -> dict[bytes, bytes]:
    return {key: value for key, value in metadata.items() if key != b"mark"}


def _settled(file: File, began: float) -> bool:
    storage = Storage.at(file.path)
    if not storage.local:
        return True
    try:
        found = Path(storage.path).stat()
    except OSError:
        return False
    return max(found.st_mtime, found.st_ctime) < began - _SETTLED_SECONDS
