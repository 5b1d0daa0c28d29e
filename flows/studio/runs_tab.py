"""Runs: what is running now, reports and comparisons, and curves of trainings side by side."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from typing import Any
from urllib.parse import quote

from nicegui import ui

from flows.plan import duration
from flows.studio.choosing import named
from flows.studio.running import LOSSES, Curves, Running, prices, running
from flows.studio.work import Line, as_url
from infra import inventory
from infra.inventory import Entry

FILES = "/file"
_SECONDS = 5.0
_TRAINED = ("train_dit", "train_vavae", "train_semvae")
_PAGES, _CURVES = 30, 4
_SCORES = 4


@dataclass(frozen=True)
class Finished:
    """What a root holds of runs that ended."""

    pages: list[tuple[Entry, dict[str, float]]]
    """Artifacts with a page and what was scored, the newest first."""
    trained: dict[str, Curves]
    """Curves of trainings by their names, the newest first."""


def finished(root: str) -> Finished:
    entries = sorted(inventory.read(root).values(), key=lambda each: -each.written)
    trained: dict[str, Curves] = {}
    for entry in entries:
        if entry.manifest is not None and entry.artifact.stage in _TRAINED:
            curves = {
                name: [(x, y) for x, y in curve] for name, curve in entry.manifest.facts.get("curves", {}).items()
            }
            trained[f"{entry.artifact.stage} · {named(entry.manifest)}"] = curves
    pages = [(each, _scores(each, entries)) for each in entries if page_of(each)]
    return Finished(pages[:_PAGES], trained)


def _scores(entry: Entry, entries: list[Entry]) -> dict[str, float]:
    """Those of a report are its evaluation's."""
    assert entry.manifest is not None  # else it has no page
    evaluated = f"evaluate/{entry.manifest.inputs.get('evaluate')}"
    found = next((each.manifest for each in entries if each.name == evaluated), None) or entry.manifest
    return {name: value for name, value in found.scores.items() if not name.startswith("floor_")}


def page_of(entry: Entry) -> str:
    """The name of an artifact's page; empty where it has none."""
    files = () if entry.manifest is None else entry.manifest.files
    return next((each.path for each in files if each.path.endswith(".html")), "")


class RunsTab:
    """Draws itself where it is made."""

    def __init__(self, root: str) -> None:
        self._root = root
        self.looked_at = True
        self._finished = Finished([], {})
        self._running: list[Running] = []
        self._prices = prices()
        self._line = Line()
        with ui.row().classes("items-center gap-4 w-full"):
            ui.label("Running now").classes("text-lg font-medium")
            ui.space()
            self._machine = ui.select(list(self._prices), value=next(iter(self._prices)), label="Dollars as if on")
            self._machine.props("dense outlined").classes("w-72")
            self._machines = ui.number("Machines", value=1, min=1, precision=0).props("dense outlined").classes("w-28")
        self._now = ui.column().classes("w-full gap-3")
        with ui.row().classes("items-center gap-2 mt-2"):
            ui.label("Reports and comparisons").classes("text-lg font-medium")
            ui.button(icon="refresh", on_click=self._read).props("flat round dense").tooltip("Look again")
        self._pages = ui.column().classes("w-full gap-0")
        with ui.row().classes("items-center gap-3 mt-2 w-full"):
            ui.label("Curves side by side").classes("text-lg font-medium")
            self._names = ui.select([], multiple=True, label="Trainings", on_change=self._draw)
            self._names.props("dense outlined use-chips").classes("grow")
            self._curve = ui.select([], label="Curve", on_change=self._draw).props("dense outlined").classes("w-56")
        self._chart = ui.echart(_chart({})).classes("w-full h-80")
        ui.timer(0, self._read, once=True)
        ui.timer(_SECONDS, self._follow)

    async def _read(self) -> None:
        found = await self._line.attempt(partial(finished, self._root))
        if found is None:
            return
        self._finished = found
        self._pages.clear()
        with self._pages:
            for entry, scores in found.pages:
                _row(entry, scores)
            if not found.pages:
                ui.label("No report under this root yet.").classes("opacity-70")
        self._offer([name for name in self._curves() if name.startswith(_TRAINED[0])][:_CURVES])
        await self._look()
        now = [name for name in self._curves() if name not in found.trained]
        self._offer([*now, *self._names.value])

    async def _follow(self) -> None:
        if self.looked_at:  # else nobody asks MLflow
            await self._look()

    async def _look(self) -> None:
        found = await self._line.attempt(running)
        if found is None:
            return
        self._running = found
        price = self._prices[self._machine.value] * (self._machines.value or 1)
        self._now.clear()
        with self._now:
            for each in found:
                _card(each, price)
            if not found:
                ui.label("Nothing is running.").classes("opacity-70")
        self._offer(self._names.value)

    def _curves(self) -> dict[str, Curves]:
        """By name: of what is running, then of what is trained."""
        now = {f"{each.stage} · {each.name} · running": each.curves for each in self._running if each.curves}
        return {**now, **self._finished.trained}

    def _offer(self, chosen: list[str]) -> None:
        known = self._curves()
        self._names.set_options(list(known), value=[name for name in chosen if name in known])
        names = list(dict.fromkeys(name for each in self._names.value for name in known[each]))
        first = next((name for name in LOSSES if name in names), next(iter(names), None))
        self._curve.set_options(names, value=self._curve.value if self._curve.value in names else first)
        self._draw()

    def _draw(self) -> None:
        known = self._curves()
        shown = {name: known.get(name, {}).get(self._curve.value or "", []) for name in self._names.value}
        self._chart.options.update(_chart(shown))
        self._chart.update()


def _card(run: Running, price: float) -> None:
    with ui.card().classes("w-full").props("flat bordered"), ui.row().classes("w-full no-wrap gap-4"):
        with ui.column().classes("grow gap-1"):
            ui.label(run.name).classes("font-medium")
            ui.label(run.told).classes("text-sm")
            ui.linear_progress(run.share, show_value=False).props("rounded").classes("w-full")
            since = f"began {duration(run.seconds)} ago · ${run.dollars(price):,.2f} so far"
            quiet = f" · silent for {duration(run.silent)}" if run.silent > 60 else ""
            ui.label(since + quiet).classes("text-sm opacity-70")
        if run.preview is not None:
            with ui.column().classes("gap-0 shrink-0"):
                ui.element("img").classes("w-96").props["src"] = as_url(run.preview)
                ui.label("what it makes now").classes("text-xs opacity-70")


def _row(entry: Entry, found: dict[str, float]) -> None:
    manifest, page = entry.manifest, page_of(entry)
    assert manifest is not None  # else it has no page
    address = f"{FILES}/{entry.artifact.stage}/{entry.artifact.fingerprint}/{quote(page)}"
    scores = " · ".join(f"{name} {value:.4g}" for name, value in list(found.items())[:_SCORES])
    with ui.row().classes("w-full items-center gap-4 py-1 border-b border-gray-400/30 no-wrap"):
        ui.label(entry.artifact.stage).classes("w-28 font-medium")
        ui.label(named(manifest)).classes("w-80")
        ui.label(scores).classes("text-sm opacity-70 truncate grow")
        ui.link("open", address, new_tab=True).classes("text-sm")


def _chart(curves: dict[str, list[tuple[float, float]]]) -> dict[str, Any]:
    """An ECharts figure over images seen."""
    return {
        "animation": False,
        "grid": {"left": 60, "right": 20, "top": 40, "bottom": 45},
        "tooltip": {"trigger": "axis"},
        "legend": {"data": list(curves), "top": 0, "textStyle": {"color": "#7c8594"}},
        "xAxis": {"type": "value", "name": "images seen", "nameLocation": "middle", "nameGap": 28},
        "yAxis": {"type": "value", "scale": True},
        "color": ["#0072b2", "#e69f00", "#009e73", "#d55e00", "#cc79a7", "#56b4e9"],
        "series": [
            {"name": name, "type": "line", "showSymbol": False, "data": [list(point) for point in points]}
            for name, points in curves.items()
        ],
    }
