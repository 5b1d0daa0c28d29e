"""Data: shards as pictures by class, what was set aside and why, duplicates, and a search by key."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any

from nicegui import ui

from flows.studio.choosing import Choice
from flows.studio.work import Line, as_url
from infra.artifacts import Artifact
from tasks.data import browsing
from tasks.data.browsing import Shown
from tasks.shard import DUPLICATES, QUARANTINE
from tasks.sources.ordering import SPLITS

_SIDE, _AT_ONCE, _PAIRS, _ROWS = 96, 55, 12, 1000
_EVERY = -1


@dataclass(frozen=True)
class Beside:
    """What a shard's tables say."""

    reasons: dict[str, int]
    refused: list[dict[str, Any]]
    counts: dict[str, int]
    duplicates: list[dict[str, Any]]
    pictures: dict[str, Shown]
    """Of the first duplicates, by key."""


def _beside(shard: Artifact) -> Beside:
    facts = shard.manifest.facts
    duplicates = browsing.table_beside(shard, DUPLICATES, _ROWS)
    keys = [key for row in duplicates[:_PAIRS] for key in (row["key"], row["same_as"])]
    found = [
        each
        for split in SPLITS
        for each in (browsing.find(shard, split, browsing.one_of(keys), len(keys)) if keys else [])
    ]
    return Beside(
        dict(facts.get("quarantine", {})),
        browsing.table_beside(shard, QUARANTINE, _ROWS),
        dict(facts.get("duplicates", {})),
        duplicates,
        {each.key: each for each in found},
    )


class DataTab:
    """Draws itself where it is made."""

    looked_at = True

    def __init__(self, root: str) -> None:
        self._shown = 0
        self._asked: object = None
        self._line = Line()
        with ui.row().classes("items-center gap-3 w-full"):
            self._choice = Choice(root, "shard", "Shards", self._line, self._opened)
            self._split = ui.toggle(list(SPLITS), value=SPLITS[0], on_change=self._anew).props("no-caps")
            self._class = ui.select({_EVERY: "every class"}, value=_EVERY, label="Class", on_change=self._anew)
            self._class.classes("w-44").props("dense outlined")
            self._search = ui.input("Search by key", on_change=self._anew).classes("w-56")
            self._search.props("dense outlined clearable debounce=500")
        self._told = ui.label().classes("text-sm opacity-70")
        self._gallery = ui.element("div").classes("flex flex-wrap gap-2")
        self._more = ui.button("More", on_click=self._next).props("flat dense no-caps")
        with ui.element("div").classes("grid grid-cols-2 gap-4 w-full mt-2 items-start"):
            self._refused = ui.card().classes("w-full").props("flat bordered")
            self._same = ui.card().classes("w-full").props("flat bordered")
        ui.timer(0, self._choice.refresh, once=True)

    async def _opened(self) -> None:
        shard = self._choice.artifact
        found = None if shard is None else await self._line.attempt(partial(_beside, shard))
        if shard is None or found is None:
            return
        facts = shard.manifest.facts
        self._class.set_options(
            {_EVERY: "every class", **{label: f"{label} · {name}" for label, name in enumerate(facts["classes"])}},
            value=_EVERY,
        )
        splits = ", ".join(f"{count:,} {name}" for name, count in facts["splits"].items())
        self._told.set_text(f"{splits} images in {len(facts['classes'])} classes")
        self._tell_refused(found)
        self._tell_duplicates(found)
        await self._anew()

    async def _anew(self) -> None:
        self._shown = 0
        self._gallery.clear()
        await self._next()

    async def _next(self) -> None:
        shard = self._choice.artifact
        if shard is None:
            return
        asked = self._asked = object()
        label, text = self._class.value, (self._search.value or "").strip()
        wanted = browsing.with_key(text) if text else browsing.of_class(None if label == _EVERY else label)
        given = shard, self._split.value, wanted, _AT_ONCE, self._shown
        found = await self._line.attempt(
            lambda: [(each, as_url(each.picture(_SIDE))) for each in browsing.find(*given)]
        )
        if found is None or asked is not self._asked:  # or for others meanwhile
            return
        self._shown += len(found)
        self._more.set_visibility(len(found) == _AT_ONCE)
        if not self._shown:
            self._line.say("No such image in this split.")
        with self._gallery:
            for each, address in found:
                _tile(each, address, shard.manifest.facts["classes"])

    def _tell_refused(self, found: Beside) -> None:
        self._refused.clear()
        with self._refused:
            ui.label(f"Quarantine: {sum(found.reasons.values()):,} images set aside").classes("font-medium")
            for reason, count in found.reasons.items():
                ui.label(f"{count:,} · {reason}").classes("text-sm")
            if found.refused:
                _table(found.refused, ("key", "reason", "detail"))

    def _tell_duplicates(self, found: Beside) -> None:
        self._same.clear()
        with self._same:
            ui.label(f"Duplicates: {found.counts.get('images', 0):,} images have the content of an earlier one")
            across = ", ".join(
                f"{found.counts.get(name, 0):,} {name.replace('_', ' ')}"
                for name in ("across_splits", "across_classes")
            )
            ui.label(across).classes("text-sm")
            with ui.row().classes("gap-3"):
                for row in found.duplicates[:_PAIRS]:
                    pair = [found.pictures.get(row[name]) for name in ("key", "same_as")]
                    if None not in pair:
                        with ui.row().classes("gap-0").tooltip(f"{row['key']} = {row['same_as']}"):
                            for each in filter(None, pair):
                                ui.image(as_url(each.picture(_SIDE // 2))).classes("w-12 h-12")
            if found.duplicates:
                _table(found.duplicates, ("key", "same_as", "across_splits", "across_classes"))


def _tile(each: Shown, address: str, classes: list[str]) -> None:
    name = classes[each.label] if each.label < len(classes) else str(each.label)
    with ui.column().classes("gap-0 items-center w-24"):
        with ui.image(address).props("no-spinner fit=contain").classes("w-24 h-24 rounded"):
            ui.tooltip(f"{each.key} · {name}")
        ui.label(name).classes("text-xs opacity-70 w-full truncate text-center")


def _table(rows: list[dict[str, Any]], names: tuple[str, ...]) -> None:
    columns = [{"name": name, "label": name.replace("_", " "), "field": name, "align": "left"} for name in names]
    ui.table(rows=rows, columns=columns, pagination=8).classes("w-full").props("flat dense wrap-cells")
