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

from configs.errors import attempt, checked
from infra.storage import FileEntry, Storage

RECEIPTS = "receipts"
_READERS = 16  # threads that wait for storage


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


def finished(out: Storage, wanted: Iterable[tuple[str, str]]) -> dict[str, Receipt]:
    """Receipts of the parts that are there and were made from what is wanted now.

    Args:
        wanted: (part's name, `made_from`) pairs.
    """
    sizes = out.sizes()  # one listing, of two files a part
    there = [(part, made_from) for part, made_from in wanted if part in sizes and _receipt_name(part) in sizes]
    with ThreadPoolExecutor(_READERS) as readers:
        receipts = readers.map(lambda pair: _receipt(out, pair[0]), there)
        return {
            part: receipt
            for (part, made_from), receipt in zip(there, receipts, strict=True)
            if receipt and receipt.made_from == made_from and sizes[part] == receipt.entry.bytes
        }


def _receipt(out: Storage, part: str) -> Receipt | None:
    """None where it cannot be read: such a receipt proves nothing."""
    try:
        return Receipt.from_json(out.read_bytes(_receipt_name(part)))
    except (ValueError, KeyError, TypeError):
        return None


def _receipt_name(part: str) -> str:
    return f"{RECEIPTS}/{part}.json"


def receipt_row(make: Callable[[], Receipt]) -> dict[str, bytes]:
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
