"""WebDataset tars: files of one name, up to the first dot of its last part, form a sample."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

from tasks.sources.base import Listing, Refusal, Row, identity_of_rows, listing_table
from tasks.sources.files import by_split, check_there, read_range
from tasks.sources.labels import NO_LABEL, read_labels, why_not
from tasks.sources.names import normal
from tasks.sources.splits import held_out
from tasks.sources.tars import Member, archives

_JSON_FIELDS = ("label", "class", "cls", "class_id", "class_name", "target")
"""Where a sample's JSON has its class, if one of them is there and the recipe names none."""


@dataclass
class _Sample:
    key: str
    split: str | None
    file: str
    parts: dict[str, Member] = field(default_factory=dict)
    """Members by their extension, all of it: `jpg`, `seg.png`."""


@dataclass(frozen=True)
class WebDatasetSource:
    """`image` and `label` are extensions of members; a label may lie in a JSON member, as `json.label`."""

    path: str
    test_path: str | None = None
    image: str | None = None
    label: str | None = None
    first_label: int = 0

    def check_there(self) -> None:
        check_there(self.path, self.test_path)

    def identity(self) -> str:
        return self.listing().identity

    def listing(self) -> Listing:
        samples, refused = self._samples()
        faults = list(self._ambiguous(samples))
        texts: list[str | int | None] = []
        labelled: list[tuple[_Sample, Member]] = []
        for sample in samples:
            image = self._image(sample)
            text = self._label(sample)
            if image is None:
                refused.append(Refusal(sample.key, "no image in the sample", ", ".join(sample.parts)[:200]))
            else:
                texts.append(text)
                labelled.append((sample, image))
        labels = read_labels(texts, self.first_label, where=f"data.source.path {self.path}")
        rows: list[Row] = []
        unlabelled: list[tuple[str | None, Refusal]] = []
        for (sample, image), label, text in zip(labelled, labels.numbers, texts, strict=True):
            if label == NO_LABEL:
                reason, detail = why_not(text)
                unlabelled.append((sample.split, Refusal(sample.key, reason, detail or _has(sample))))
            else:
                rows.append((sample.key, label, sample.split, sample.file, image.start, image.length))
        if labelled and not rows and not labels.faults:
            faults.append(
                f"data.source.path {self.path}: no sample has a label (the first has {_has(labelled[0][0])}): name the "
                "member that has it in data.source.label, such as cls or json.FIELD"
            )
        kept = held_out(rows, unlabelled)
        refused += kept.refused
        return Listing(
            listing_table(kept.rows),
            labels.classes,
            tuple(sorted(refused)),
            notes=kept.notes,
            left_out=kept.left_out,
            faults=(*faults, *labels.faults, *kept.faults),
            identity=identity_of_rows("webdataset", kept.rows, labels.classes, refused),
        )

    def read(self, file: str, start: int, length: int) -> bytes:
        return read_range(file, start, length)

    def _samples(self) -> tuple[list[_Sample], list[Refusal]]:
        files = by_split("webdataset", self.path, self.test_path, ".tar")
        found = archives(file for _, file in files)
        samples: list[_Sample] = []
        refused: list[Refusal] = []
        for split, file in files:
            here: dict[str, _Sample] = {}
            prefix = f"{split}/{file.name}" if self.test_path else file.name
            refused += found[file.path].refused
            for member in found[file.path].members:
                path = PurePosixPath(member.name)
                stem, _, extension = path.name.partition(".")
                name = str(path.parent / stem)
                sample = here.setdefault(name, _Sample(f"{prefix}/{name}", split, file.path))
                sample.parts[extension.lower()] = member
            samples += here.values()
        return samples, refused

    def _pictures(self, sample: _Sample) -> list[str]:
        return [extension for extension, member in sample.parts.items() if member.picture]

    def _image(self, sample: _Sample) -> Member | None:
        if self.image is not None:
            return sample.parts.get(self.image.lower())
        found = self._pictures(sample)
        return sample.parts[found[0]] if found else None

    def _ambiguous(self, samples: Sequence[_Sample]) -> list[str]:
        if self.image is not None:
            return []
        several = [found for sample in samples if len(found := self._pictures(sample)) > 1]
        if not several:
            return []
        return [
            f"data.source.path {self.path}: {len(several):,} samples have several pictures "
            f"({', '.join(sorted(several[0]))}): name the one to learn from in data.source.image, such as "
            f"{min(several[0], key=lambda name: (name.count('.'), name))}"
        ]

    def _label(self, sample: _Sample) -> str | int | None:
        if self.label is None:
            if "cls" in sample.parts:
                return _text(sample.parts["cls"])
            return _in_json(sample, None)
        member, _, name = self.label.partition(".")
        if member == "json" and name:
            return _in_json(sample, name)
        return _text(sample.parts[self.label.lower()]) if self.label.lower() in sample.parts else None


def _text(member: Member) -> str | None:
    return None if member.text is None else normal(member.text.decode(errors="replace").strip())


def _in_json(sample: _Sample, name: str | None) -> str | int | None:
    values = _json(sample)
    if name is not None:
        value: Any = values
        for part in name.split("."):
            value = value.get(part) if isinstance(value, dict) else None
    else:
        there = [known for known in _JSON_FIELDS if known in values]
        value = values[there[0]] if len(there) == 1 else None
    if isinstance(value, bool):
        return None
    return value if isinstance(value, int | str) else None


def _json(sample: _Sample) -> dict[str, Any]:
    member = sample.parts.get("json")
    try:
        values = json.loads(member.text) if member is not None and member.text is not None else {}
    except (ValueError, RecursionError):
        return {}
    return values if isinstance(values, dict) else {}


def _has(sample: _Sample) -> str:
    """What a sample consists of, for messages."""
    inside = f" with {', '.join(map(str, _json(sample)))}" if _json(sample) else ""
    return ", ".join(f"{name}{inside if name == 'json' else ''}" for name in sample.parts)[:200]
