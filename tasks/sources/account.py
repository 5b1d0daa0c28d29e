"""What is known of a source before its images are read: splits, classes with their counts, and what is left out.

One account for every kind. It is printed, kept in the manifest, and refuses a source that contradicts the recipe,
with all that is wrong told at once.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from rich.filesize import decimal

from configs import Recipe, UserError
from configs.data import Data, Shard
from configs.fits import TRAINED, check_batches
from configs.load import merge, validate
from tasks.data.formats import suffix
from tasks.sources.base import Listing

_SHOWN = 3
"""Classes, suffixes or notes that a line names of each kind."""


@dataclass(frozen=True)
class Account:
    """The same five questions of every source, and its answers."""

    kind: str
    place: str
    identity: str
    images: int
    bytes: int
    """Of all images; 0 where only reading tells."""
    splits: dict[str, list[int]]
    """Images of each label, by split; `all` where the source has none of its own."""
    classes: tuple[str, ...]
    suffixes: dict[str, int]
    """Images by the suffixes of their names; empty where names have none."""
    refused: dict[str, int]
    """Images that the listing already rules out, by reason."""
    examples: dict[str, str]
    """One key for each such reason, with what to do where that is known."""
    left_out: dict[str, int]
    """Files that are no images of the source, by what they are."""
    notes: tuple[str, ...]
    faults: tuple[str, ...]

    @classmethod
    def of(cls, data: Data, listing: Listing, identity: str = "") -> Account:
        """The account of a listing."""
        counts: dict[str, np.ndarray] = {}
        suffixes: Counter[str] = Counter()
        total, shortest = 0, None
        for chunk in listing.rows.chunks():
            labels, lengths = chunk["label"].to_numpy(), chunk["length"].to_numpy()
            named = chunk["split"].fill_null("all").combine_chunks().dictionary_encode()
            of = named.indices.to_numpy()
            for number, split in enumerate(named.dictionary.to_pylist()):
                here = np.bincount(labels[of == number], minlength=len(listing.classes))
                counts[split] = counts.get(split, 0) + here
            total += int(lengths.sum())
            shortest = int(lengths.min()) if shortest is None else min(shortest, int(lengths.min()))
            suffixes.update(suffix(key) for key in chunk["key"].to_pylist())
        refused: Counter[str] = Counter()
        examples: dict[str, str] = {}
        for one in listing.refusals():
            refused[one.reason] += 1
            examples[one.reason] = f"{one.key!r}{f' ({one.detail})' if one.detail else ''}"
        order = ("train", "validation", "test", "all").index
        return cls(
            data.source.kind,
            getattr(data.source, "path", None) or "",
            identity or listing.identity,
            listing.rows.num_rows,
            total if shortest else 0,
            {split: counts[split].tolist() for split in sorted(counts, key=order)},
            listing.classes,
            {name: count for name, count in suffixes.most_common() if name} if "" not in suffixes else {},
            dict(refused.most_common()),
            examples,
            dict(listing.left_out),
            tuple(listing.notes),
            tuple(listing.faults),
        )

    def counts(self) -> list[int]:
        """Images of each label that training may see."""
        parts = [counts for split, counts in self.splits.items() if split != "test"]
        return [sum(numbers) for numbers in zip(*parts, strict=True)] if parts else [0] * len(self.classes)

    def lines(self, data: Data, shard: Shard) -> list[str]:
        """Five lines for people."""
        size = f", {decimal(self.bytes)}" if self.bytes else ""
        kinds = _listed([f".{name} {count:,}" for name, count in self.suffixes.items()])
        out = [f"{count:,} {what}" for what, count in (*self.refused.items(), *self.left_out.items())]
        empty = [name for name, count in zip(self.classes, self.counts(), strict=True) if not count]
        remarks = [*self.notes, *([f"classes without images: {_listed(list(map(repr, empty)))}"] if empty else [])]
        if len(self.classes) < data.classes:
            remarks.append(
                f"labels {len(self.classes)} to {data.classes - 1} have no class: what is sampled for them was "
                "never learned"
            )
        if set(self.splits) <= {"all"}:
            splits = f"none of its own: {shard.test_share:g} of the images are set aside for testing"
        else:
            splits = " · ".join(f"{split} {sum(counts):,}" for split, counts in self.splits.items())
        return [
            f"source    {self.kind} {self.place} · {self.images:,} images{size} · {self.identity[:12]}",
            f"splits    {splits}",
            f"classes   {len(self.classes)}: {self._classes()}",
            f"pictures  {kinds or 'told by what they hold, not by names'}",
            f"left out  {' · '.join(out) or 'nothing'}{''.join(f' · {remark}' for remark in remarks)}",
        ]

    def facts(self, recipe: Recipe) -> dict[str, Any]:
        """For the manifest."""
        return {
            "lines": self.lines(recipe.data, recipe.shard),
            "identity": self.identity,
            "images": self.images,
            "bytes": self.bytes,
            "splits": {split: sum(counts) for split, counts in self.splits.items()},
            "counts": self.splits,
            "suffixes": self.suffixes,
            "refused": self.refused,
            "left_out": self.left_out,
            "notes": list(self.notes),
        }

    def check(self, recipe: Recipe) -> None:
        """Raises UserError that tells all in which this source and the recipe do not agree."""
        faults = self.disagreements(recipe.data, recipe.shard, recipe)
        if faults:
            told = faults[0] if len(faults) == 1 else " ".join(f"({n}) {each};" for n, each in enumerate(faults, 1))
            raise UserError(told.removesuffix(";"))

    def disagreements(self, data: Data, shard: Shard, recipe: Recipe | None = None) -> list[str]:
        """All that is wrong with the source for these sections, each with the way out; with a recipe, also what
        its own rules say next."""
        faults = [*self.faults, *self._nothing_there(), *self._too_much_refused(shard)]
        if self.images:
            faults += [*self._classes_disagree(data, recipe), *self._nothing_to_test_on(shard, recipe)]
        if self.images and recipe is not None and not faults:
            faults += self._less_than_a_batch(recipe)
        return faults

    # ------------------------------------------------------------------------------------------------ faults

    def _nothing_there(self) -> list[str]:
        if self.images or self.faults or self.refused:
            return []
        seen = ", ".join(f"{count:,} {what}" for what, count in self.left_out.items())
        return [
            f"data.source {self.place} holds no images{f' ({seen})' if seen else ''}: expected at least one of a class"
        ]

    def _too_much_refused(self, section: Shard) -> list[str]:
        count = sum(self.refused.values())
        whole = self.images + count
        if count <= section.max_bad_share * whole:
            return []
        reasons = ", ".join(f"{n:,} {reason}, such as {self.examples[reason]}" for reason, n in self.refused.items())
        return [
            f"{count:,} of {whole:,} images are unusable before any is read ({reasons}), more than "
            f"shard.max_bad_share {section.max_bad_share:g} allows: mend the source, or raise it to "
            f"{_above(count / whole)}"
        ]

    def _classes_disagree(self, data: Data, recipe: Recipe | None) -> list[str]:
        found = len(self.classes)
        faults = []
        if found > data.classes or (found < data.classes and not data.allow_empty_classes):
            hint = f"; {self.notes[0]}" if found == 1 and self.notes else ""
            next_ones = _with_classes(recipe, found) if recipe is not None and not hint else []
            after = "".join(f"; then {fault}" for fault in next_ones)
            faults.append(
                f"data.source has {found} {'class' if found == 1 else 'classes'} ({self._names()}) but data.classes is "
                f"{data.classes}: set data.classes to {found}{after}{hint}"
            )
        empty = [name for name, count in zip(self.classes, self.counts(), strict=True) if not count]
        if empty and not data.allow_empty_classes and not self.faults:
            faults.append(
                f"{len(empty)} of {found} classes have no images to learn from ({_listed(list(map(repr, empty)))}): "
                "add images, remove their folders or labels, or set data.allow_empty_classes to true to keep labels "
                "that are never learned"
            )
        return faults

    def _less_than_a_batch(self, recipe: Recipe) -> list[str]:
        loose, share = sum(self.splits.get("all", [])), recipe.shard.test_share
        train = sum(self.splits.get("train", [])) + loose - max(1 if share and loose > 1 else 0, round(share * loose))
        try:
            check_batches(recipe, train, f"{train:,} in the training split")
        except ValueError as fault:
            return [str(fault)]
        return []

    def _nothing_to_test_on(self, shard: Shard, recipe: Recipe | None) -> list[str]:
        scored = None if recipe is None or recipe.lacks("evaluate") else recipe.evaluate
        # As EDM scores FFHQ: against all images, which are those that it trained on.
        by_training = scored is not None and scored.reference == "train" and scored.classifier is None
        watched = [] if recipe is None else _watching(recipe)
        if self.faults or (by_training and not watched):
            return []
        if "all" in self.splits:
            if shard.test_share > 0 or "test" in self.splits:
                return []
            without = "set evaluate.reference to train and leave out evaluate.classifier"
            return [
                f"data.source {self.place} has no test split of its own and shard.test_share is 0, so there is "
                "nothing to score on: raise it, name a test split in data.source.test_path, or "
                + (f"leave out {' and '.join(watched)}" if by_training else without)
            ]
        missing = [split for split in ("train", "test") if not sum(self.splits.get(split, []))]
        if not missing:
            return []
        return [
            f"data.source {self.place}: the {missing[0]} split is empty: name files that have images, or leave "
            "data.source.test_path out to have shard.test_share of the training images set aside"
        ]

    def _names(self) -> str:
        return _listed([repr(name) for name in self.classes])

    def _classes(self) -> str:
        counted = enumerate(zip(self.classes, self._all(), strict=True))
        pairs = [f"{label} {name!r} {count:,}" for label, (name, count) in counted]
        if len(pairs) > 2 * _SHOWN:
            pairs = [*pairs[:_SHOWN], "…", *pairs[-_SHOWN:]]
        return " · ".join(pairs)

    def _all(self) -> list[int]:
        parts = list(self.splits.values())
        return [sum(numbers) for numbers in zip(*parts, strict=True)] if parts else [0] * len(self.classes)


def _watching(recipe: Recipe) -> list[str]:
    """Fields by which a training looks at test images."""
    sections = [(name, getattr(recipe, name)) for name in TRAINED]
    found = [f"{name}.validation" for name, each in sections if each and each.images and each.validation]
    compute, drawn = recipe.compute.train, not recipe.lacks("train_dit") and recipe.train_dit.images
    scored = drawn and compute.preview_every is not None and compute.preview_scored
    return found + ["compute.train.preview_scored"] * bool(scored)


def _with_classes(recipe: Recipe, classes: int) -> list[str]:
    """What the recipe's own rules would say next, once it has so many classes."""
    try:
        validate(merge(recipe.model_dump(mode="json"), {"data": {"classes": classes}}), "")
    except UserError as error:
        return [str(error).removeprefix(": ")]
    return []


def _listed(items: Sequence[str]) -> str:
    shown = ", ".join(items[: 2 * _SHOWN])
    return f"{shown}, … ({len(items)} in all)" if len(items) > 2 * _SHOWN else shown


def _above(share: float) -> str:
    """A share in two digits that is not below this one."""
    return f"{min(1.0, np.ceil(share * 100) / 100):.2f}"
