"""Which of a source's splits become its test split, where files or rows name more than two."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tasks.sources.base import Refusal, Row


@dataclass(frozen=True)
class Kept:
    """Rows of the splits train and test (or of none), and what is said of the others."""

    rows: list[Row]
    refused: list[Refusal]
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    faults: tuple[str, ...] = ()


def held_out(rows: list[Row], unlabelled: Sequence[tuple[str | None, Refusal]]) -> Kept:
    """Keep the training images and those of one other split, the one that has labels.

    Data sets are often published with the labels of one split hidden. A split without any label is left out, told
    and not counted as damaged.

    Args:
        rows: whose split is `train`, `validation`, `test`, or None.
        unlabelled: split and refusal of every image without a label.
    """
    counts = Counter(row[2] for row in rows)
    hidden = Counter(split for split, _ in unlabelled if split is not None and not counts[split])
    hidden.pop("train", None)
    refused = [refusal for split, refusal in unlabelled if split not in hidden]
    notes = tuple(
        f"the split {split} has no labels: its {count:,} images are left out" for split, count in hidden.items()
    )
    left_out = {f"without labels ({split})": count for split, count in hidden.items()}
    others = [split for split in ("validation", "test") if counts[split]]
    faults: tuple[str, ...] = ()
    if len(others) == 2:
        faults = (
            f"data.source.path names the splits train ({counts['train']:,} images), validation "
            f"({counts['validation']:,}) and test ({counts['test']:,}), all with labels: name the training files in "
            "path and those of one other split in test_path",
        )
    elif hidden and not others:
        faults = (
            f"data.source: no image outside the training split has a label ({', '.join(hidden)}): leave these files "
            "out (path as a glob of the training files) to have shard.test_share of the others set aside",
        )
    elif others == ["validation"]:
        rows = [(row[0], row[1], "test", *row[3:]) if row[2] == "validation" else row for row in rows]
    return Kept(rows, refused, notes, left_out, faults)
