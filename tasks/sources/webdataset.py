"""WebDataset tars: files of one name, up to the first dot of its last part, form a sample."""

from __future__ import annotations

import json
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from typing import Any

import numpy as np
import pyarrow as pa

from tasks.data.rows import Rows
from tasks.sources.base import REFUSALS, Listing, Refusal, identity_of_rows, refusal_table
from tasks.sources.files import by_split, check_there, read_range
from tasks.sources.labelled import Labelled
from tasks.sources.names import normal
from tasks.sources.tars import Archive, Member, archives

_JSON_FIELDS = ("label", "class", "cls", "class_id", "class_name", "target")
"""Where a sample's JSON has its class, if one of them is there and the recipe names none."""


@dataclass
class _Sample:
    key: str
    parts: dict[str, Member] = field(default_factory=dict)
    """Members by their extension, all of it: `jpg`, `seg.png`."""


@dataclass
class _Several:
    """Samples with more than one picture."""

    samples: int = 0
    first: list[str] = field(default_factory=list)
    """The extensions of the first one's pictures."""

    def see(self, pictures: Iterable[list[str]]) -> None:
        for found in pictures:
            if len(found) > 1:
                self.samples += 1
                self.first = self.first or found


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
        files = by_split("webdataset", self.path, self.test_path, ".tar")
        labelled, several, first = Labelled(), _Several(), ""
        ruled_out = Rows(REFUSALS)
        for (split, _), archive in zip(files, archives(file for _, file in files), strict=True):
            samples = self._samples(archive, split)
            several.see(self._pictures(sample) for sample in samples)
            pairs = [(sample, self._image(sample)) for sample in samples]
            ruled_out.add(refusal_table(archive.refused()))
            ruled_out.add(
                refusal_table(
                    Refusal(sample.key, "no image in the sample", ", ".join(sample.parts)[:200])
                    for sample, image in pairs
                    if image is None
                )
            )
            whole = [(sample, image) for sample, image in pairs if image is not None]
            if whole and not labelled.num_rows:
                first = _has(whole[0][0])
            self._add(labelled, whole, split, archive.file.path)
        settled = labelled.settle(self.first_label, (), f"data.source.path {self.path}")
        classes, kept, faults = settled.labels.classes, settled.kept, self._ambiguous(several)
        if labelled.num_rows and not settled.labelled and not settled.labels.faults:
            faults.append(
                f"data.source.path {self.path}: no sample has a label (the first has {first}): name the "
                "member that has it in data.source.label, such as cls or json.FIELD"
            )
        for chunk in settled.ruled_out.chunks():
            ruled_out.add(chunk)
        return Listing(
            settled.rows,
            classes,
            ruled_out,
            notes=kept.notes,
            left_out=kept.left_out,
            faults=(*faults, *settled.labels.faults, *kept.faults),
            identity=identity_of_rows("webdataset", settled.rows, classes, ruled_out),
        )

    def read(self, file: str, start: int, length: int) -> bytes:
        return read_range(file, start, length)

    def _samples(self, archive: Archive, split: str | None) -> list[_Sample]:
        prefix = f"{split}/{archive.file.name}" if self.test_path else archive.file.name
        here: dict[str, _Sample] = {}
        for member in archive.members():
            path = PurePosixPath(member.name)
            stem, _, extension = path.name.partition(".")
            name = str(path.parent / stem)
            sample = here.setdefault(name, _Sample(f"{prefix}/{name}"))
            sample.parts[extension.lower()] = member
        return list(here.values())

    def _add(self, labelled: Labelled, samples: list[tuple[_Sample, Member]], split: str | None, file: str) -> None:
        texts = [self._label(sample) for sample, _ in samples]
        both = list(zip(samples, texts, strict=True))
        distinct = {text: number for number, text in enumerate(dict.fromkeys(texts))}
        labelled.add(
            pa.array([sample.key for sample, _ in samples], pa.string()),
            list(distinct),
            np.array([distinct[text] for text in texts], np.int64),
            split,
            file,
            pa.array([image.start for _, image in samples], pa.int64()),
            pa.array([image.length for _, image in samples], pa.int64()),
            pa.array([_has(one) if text in (None, "") else None for (one, _), text in both], pa.string()),
        )

    def _pictures(self, sample: _Sample) -> list[str]:
        return [extension for extension, member in sample.parts.items() if member.picture]

    def _image(self, sample: _Sample) -> Member | None:
        if self.image is not None:
            return sample.parts.get(self.image.lower())
        found = self._pictures(sample)
        return sample.parts[found[0]] if found else None

    def _ambiguous(self, several: _Several) -> list[str]:
        if self.image is not None or not several.samples:
            return []
        return [
            f"data.source.path {self.path}: {several.samples:,} samples have several pictures "
            f"({', '.join(sorted(several.first))}): name the one to learn from in data.source.image, such as "
            f"{min(several.first, key=lambda name: (name.count('.'), name))}"
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
