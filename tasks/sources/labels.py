"""Labels as sources write them, and as the pipeline counts them: numbers from 0 on, or names in their order."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from tasks.sources.names import class_order, normal

NO_LABEL = -1
_LARGEST = 999_999
"""No number above is taken for a label: a class for each number up to it would fill the memory."""
_DIGITS = 18
Text = str | int | None


@dataclass(frozen=True)
class Labels:
    """What a source's labels come to."""

    numbers: list[int]
    """One per distinct text given, counted from 0; :data:`NO_LABEL` where there is none."""
    classes: tuple[str, ...]
    faults: tuple[str, ...] = field(default=())


def counted_labels(
    counts: Mapping[Text, int], first: int = 0, names: Sequence[str] = (), where: str = "data.source"
) -> Labels:
    """Numbers for labels of one source.

    Args:
        counts: how often each label occurs: whole numbers up to 999,999 (hub data sets write -1 where a label is
            hidden), or names of classes; None is no label.
        first: the number of the first class, `data.source.first_label`.
        names: of the classes, where the source has a list of them.
        where: the source, for messages.
    """
    given = [None if text is None or text == "" else text for text in counts]
    values = [NO_LABEL if (value := number_in(text)) is not None and value > _LARGEST else value for text in given]
    often = list(counts.values())
    numeric = sum(count for value, count in zip(values, often, strict=True) if value is not None)
    if 2 * numeric >= sum(count for text, count in zip(given, often, strict=True) if text is not None):
        return _numbers(values, often, first, names, where)  # names among them are mistakes
    words = [None if text is None else normal(str(text)) for text in given]
    classes = tuple(names) or tuple(class_order(word for word in words if word is not None))
    places = {name: label for label, name in enumerate(classes)}
    strangers = sorted({word for word in words if word is not None and word not in places})
    faults = (f"{where}: labels {strangers[:3]} are not among its own {len(classes)} classes",) if strangers else ()
    return Labels([NO_LABEL if word is None else places.get(word, NO_LABEL) for word in words], classes, faults)


def why_not(text: str | int | None) -> tuple[str, str]:
    """Reason and detail for an image whose label came to :data:`NO_LABEL`."""
    number = number_in(text)
    if text is None or text == "" or (number is not None and number < 0):
        return "no label", "" if text is None or text == "" else str(text)
    return ("label is not a number" if number is None else "label out of range"), str(text)[:100]


def number_in(text: str | int | None) -> int | None:
    """A whole number, as such or in digits."""
    if isinstance(text, bool) or text is None:
        return None
    if isinstance(text, int):
        return text
    digits = text.removeprefix("-")
    return int(text) if digits.isascii() and digits.isdigit() and len(digits) <= _DIGITS else None


def _numbers(
    values: Sequence[int | None], often: Sequence[int], first: int, names: Sequence[str], where: str
) -> Labels:
    shifted = [NO_LABEL if value is None or value < 0 else value - first for value in values]
    faults = []
    pairs = zip(shifted, values, often, strict=True)
    early = sum(count for number, value, count in pairs if value is not None and number < 0 <= value)
    if early:
        faults.append(f"{where}: {early:,} labels are below data.source.first_label {first}")
    used = [number for number in shifted if number >= 0]
    count = 1 + max(used, default=-1)
    if used and min(used) == 1 and first == 0:
        faults.append(
            f"{where}: labels run from 1 to {max(used)} and none is 0: set data.source.first_label to 1 (and "
            f"data.classes to {max(used)})"
        )
    if names and count > len(names):
        faults.append(f"{where}: label {count - 1 + first}, but the files name {len(names)} classes")
    classes = tuple(names) if names and count <= len(names) else tuple(str(n + first) for n in range(count))
    return Labels([max(number, NO_LABEL) for number in shifted], classes, tuple(faults))
