"""Part files and their receipts: how a stage that was killed knows which of its outputs are whole.

A part's receipt is written after the part; it names what the part was made from and holds what the manifest will
need, so that resuming costs one small read per part and never reads a part again.
"""

from __future__ import annotations

import json
import logging
import pickle
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field
from typing import Any

import pyarrow as pa

from configs.errors import attempt, checked
from infra.storage import FileEntry, Storage
from tasks.data.rows import Rows, in_order

RECEIPTS = "receipts"
_READERS = 16  # threads that wait for storage
_AT_ONCE = 1_024
_SAID = pa.schema([("place", pa.int64()), ("receipt", pa.string())])


@dataclass(frozen=True)
class Receipt:
    """Proof that one part is whole."""

    entry: FileEntry
    made_from: str
    """Hash of what determines the part within its artifact; another one makes the receipt void."""
    facts: dict[str, Any] = field(default_factory=dict)
    """Plain JSON."""

    def to_json(self) -> str:
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str | bytes) -> Receipt:
        """Raises ValueError, KeyError or TypeError on anything but a receipt."""
        try:
            values = json.loads(text)
        except RecursionError:
            raise ValueError("nested without end") from None
        return cls(FileEntry(**values["entry"]), values["made_from"], values["facts"])


def part_name(split: str, number: int) -> str:
    return f"{split}/part-{number:05d}.parquet"


def write_receipt(out: Storage, receipt: Receipt) -> None:
    out.write_bytes(_receipt_name(receipt.entry.path), receipt.to_json().encode())


def finished(out: Storage, wanted: Iterable[tuple[str, str]]) -> Iterator[Receipt]:
    """Receipts of the parts that are there and were made from what is wanted now, in their order.

    Args:
        wanted: (part's name, `made_from`) pairs.
    """
    sizes = out.sizes()  # one listing, of two files a part
    there = [(part, made_from) for part, made_from in wanted if part in sizes and _receipt_name(part) in sizes]
    with ThreadPoolExecutor(_READERS) as readers:
        for first in range(0, len(there), _AT_ONCE):
            some = there[first : first + _AT_ONCE]
            found = readers.map(lambda pair: read_receipt(out, pair[0]), some)
            for (part, made_from), receipt in zip(some, found, strict=True):
                if receipt and receipt.made_from == made_from and sizes[part] == receipt.entry.bytes:
                    yield receipt


class InOrder:
    """Receipts as parts are finished, and in the parts' order once all are; what they say takes no memory."""

    def __init__(self, parts: Iterable[str]) -> None:
        self._places = {part: place for place, part in enumerate(parts)}
        self._there: set[str] = set()
        self._rows = Rows(_SAID)

    def add(self, receipt: Receipt) -> None:
        self._there.add(receipt.entry.path)
        self._rows.add(pa.table([[self._places[receipt.entry.path]], [receipt.to_json()]], schema=_SAID))

    def __contains__(self, part: str) -> bool:
        return part in self._there

    def __iter__(self) -> Iterator[Receipt]:
        for chunk in in_order(self._rows, "place"):
            yield from map(Receipt.from_json, chunk["receipt"].to_pylist())


def read_receipt(out: Storage, part: str) -> Receipt | None:
    """None where there is none, or it cannot be read: such a receipt proves nothing."""
    try:
        return Receipt.from_json(out.read_bytes(_receipt_name(part)))
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None


def _receipt_name(part: str) -> str:
    return f"{RECEIPTS}/{part}.json"


def receipt_row(make: Callable[[], Receipt | None]) -> dict[str, bytes]:
    """A row for Ray Data with the receipt of the part that `make` made, or with the UserError it met."""
    return {"receipt": pickle.dumps(attempt(make))}


def receipts(rows: Iterable[Mapping[str, bytes]]) -> Iterator[Receipt]:
    """The receipts in rows of :func:`receipt_row`. Raises the UserError that one of them carries."""
    return (checked(pickle.loads(row["receipt"])) for row in rows)


def quiet_ray_data() -> None:
    """Our own bars and errors instead of Ray Data's."""
    import ray.data  # sets up the loggers whose level we change

    ray.data.DataContext.get_current().enable_progress_bars = False
    for name in ("ray.data", "ray.data.exceptions"):
        logging.getLogger(name).setLevel(logging.ERROR)
