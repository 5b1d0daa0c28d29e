"""Which of a source's splits become its test split, where files or rows name more than two."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Kept:
    """What becomes of each split, and what is said of those that are left out."""

    hidden: frozenset[str] = frozenset()
    """Splits whose labels are hidden: their images are left out."""
    test: str = "test"
    """The split that is called test from here on."""
    notes: tuple[str, ...] = ()
    left_out: Mapping[str, int] = field(default_factory=dict)
    faults: tuple[str, ...] = ()


def held_out(labelled: Mapping[str | None, int], unlabelled: Mapping[str | None, int]) -> Kept:
    """Keep the training images and those of one other split, the one that has labels.

    Data sets are often published with the labels of one split hidden. A split without any label is left out, told
    and not counted as damaged.

    Args:
        labelled, unlabelled: images with and without a label, by split: `train`, `validation`, `test`, or None.
    """
    counts = {split: labelled.get(split, 0) for split in ("train", "validation", "test")}
    hidden = {split: count for split, count in unlabelled.items() if split not in (None, "train") and count}
    hidden = {split: count for split, count in hidden.items() if not labelled.get(split)}
    names = frozenset(split for split in hidden if split is not None)
    notes = tuple(
        f"the split {split} has no labels: its {count:,} images are left out" for split, count in hidden.items()
    )
    left_out = {f"without labels ({split})": count for split, count in hidden.items()}
    others = [split for split in ("validation", "test") if counts[split]]
    among = ", ".join(map(str, hidden))
    faults: tuple[str, ...] = ()
    if len(others) == 2:
        faults = (
            f"data.source.path names the splits train ({counts['train']:,} images), validation "
            f"({counts['validation']:,}) and test ({counts['test']:,}), all with labels: name the training files in "
            "path and those of one other split in test_path",
        )
    elif hidden and not others:
        faults = (
            f"data.source: no image outside the training split has a label ({among}): leave these files out "
            "(path as a glob of the training files) to have shard.test_share of the others set aside",
        )
    return Kept(names, "validation" if others == ["validation"] else "test", notes, left_out, faults)
