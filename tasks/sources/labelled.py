"""Images whose labels are read before it is known what they mean: numbers or names, and of which splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from tasks.data.rows import Rows
from tasks.sources.base import LISTING_SCHEMA, REFUSALS, Refusal, refusal_table
from tasks.sources.labels import NO_LABEL, Labels, Text, counted_labels, why_not
from tasks.sources.splits import Kept, held_out

_SCHEMA = pa.schema([pa.field("detail", pa.string()), *(pa.field(field.name, field.type) for field in LISTING_SCHEMA)])
"""A listing's rows with a number of the label's text instead of the label."""


class Labelled:
    """Rows of a source, added file by file; what memory holds of them is their distinct labels."""

    def __init__(self) -> None:
        self._rows = Rows(_SCHEMA)
        self._numbers: dict[Text, int] = {}
        self._counts: Counter[tuple[str | None, int]] = Counter()

    def add(
        self,
        keys: pa.Array,
        texts: Sequence[Text],
        of: np.ndarray,
        split: str | None,
        file: str,
        starts: pa.Array,
        lengths: pa.Array,
        details: pa.Array | None = None,
    ) -> None:
        """Append images of one file and split.

        Args:
            texts: distinct labels; `of`: int (N,), which of them each image has.
            details: what is told of an image without a label.
        """
        numbers = np.array([self._numbers.setdefault(text, len(self._numbers)) for text in texts], np.int32)
        for number, count in zip(numbers, np.bincount(of, minlength=len(texts)), strict=True):
            self._counts[split, int(number)] += int(count)
        rows = len(keys)
        columns = {
            "detail": pa.nulls(rows, pa.string()) if details is None else details,
            "key": keys,
            "label": pa.array(numbers[of] if rows else [], pa.int32()),
            "split": pa.nulls(rows, pa.string()) if split is None else pa.repeat(split, rows),
            "file": pa.repeat(file, rows),
            "start": starts,
            "length": lengths,
        }
        self._rows.add(pa.table([columns[name] for name in _SCHEMA.names], schema=_SCHEMA))

    @property
    def num_rows(self) -> int:
        return self._rows.num_rows

    def settle(self, first: int, names: Sequence[str], where: str) -> Settled:
        """What the labels come to; arguments as :func:`counted_labels`'s."""
        counts: Counter[Text] = Counter(dict.fromkeys(self._numbers, 0))
        texts = list(self._numbers)
        for (_, number), count in self._counts.items():
            counts[texts[number]] += count
        labels = counted_labels(counts, first, names, where)
        by_split: dict[bool, Counter[str | None]] = {True: Counter(), False: Counter()}
        for (split, number), count in self._counts.items():
            by_split[labels.numbers[number] != NO_LABEL][split] += count
        kept = held_out(by_split[True], by_split[False])
        return Settled(self._rows, texts, labels, kept, by_split[True].total())


class Settled:
    """Labelled rows of the splits that are kept, and refusals of those without a label."""

    def __init__(self, raw: Rows, texts: Sequence[Text], labels: Labels, kept: Kept, labelled: int) -> None:
        self.labels, self.kept, self.labelled = labels, kept, labelled
        self.rows, self.ruled_out = Rows(LISTING_SCHEMA), Rows(REFUSALS)
        numbers = np.array([*labels.numbers, NO_LABEL], np.int32)
        for chunk in raw.chunks():
            found = numbers[chunk["label"].to_numpy()]
            self._keep(chunk.filter(pa.array(found != NO_LABEL)), found[found != NO_LABEL])
            self._refuse(chunk.filter(pa.array(found == NO_LABEL)), texts)

    def _keep(self, rows: pa.Table, labels: np.ndarray) -> None:
        columns = {name: rows[name] for name in LISTING_SCHEMA.names} | {"label": pa.array(labels, pa.int32())}
        if self.kept.test != "test":
            is_test = pc.fill_null(pc.equal(rows["split"], self.kept.test), False)
            columns["split"] = pc.if_else(is_test, "test", rows["split"])
        self.rows.add(pa.table([columns[name] for name in LISTING_SCHEMA.names], schema=LISTING_SCHEMA))

    def _refuse(self, rows: pa.Table, texts: Sequence[Text]) -> None:
        columns: Mapping[str, Iterable] = {name: rows[name].to_pylist() for name in ("key", "split", "label", "detail")}
        refused = []
        for key, split, number, own in zip(*columns.values(), strict=True):
            if split not in self.kept.hidden:
                reason, detail = why_not(texts[number])
                refused.append(Refusal(key, reason, detail or own or ""))
        self.ruled_out.add(refusal_table(refused))
