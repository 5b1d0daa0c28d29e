"""The page: a head with the root, and a tab for each question a person has."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from fastapi import Response
from nicegui import app, ui

from configs.errors import UserError
from flows.studio.data_tab import DataTab
from flows.studio.runs_tab import FILES, RunsTab
from flows.studio.sample_tab import SampleTab
from flows.studio.tokenizer_tab import TokenizerTab
from infra.artifacts import Artifact

TABS: dict[str, Any] = {"Data": DataTab, "Tokenizer": TokenizerTab, "Sample": SampleTab, "Runs": RunsTab}
_STYLE = """
.q-tab__label { font-size: 15px; text-transform: none } .nicegui-content { padding: 0 }
.q-uploader__list, .q-uploader__subtitle { display: none }
"""
_KINDS = {".html": "text/html; charset=utf-8", ".png": "image/png"}
_ALONE = {"content-security-policy": "sandbox; default-src 'none'; img-src data: 'self'; style-src 'unsafe-inline'"}
"""A report is looked at; nothing in it runs."""


def register(root: str) -> None:
    """The page over a root, drawn anew for each visitor."""

    @app.get(FILES + "/{stage}/{fingerprint}/{name}")
    def file(stage: str, fingerprint: str, name: str) -> Response:
        try:
            return _file(root, stage, fingerprint, name)
        except (KeyError, UserError, OSError) as error:
            return Response(f"no such page: {error}\n", 404, media_type="text/plain")

    @ui.page("/")
    def studio(tab: str = "") -> None:
        _draw(root, tab if tab in TABS else next(iter(TABS)))


def _file(root: str, stage: str, fingerprint: str, name: str) -> Response:
    """Raises KeyError or UserError where an artifact has no such page or picture."""
    if ".." in (stage, fingerprint):
        raise UserError("it lies outside of the root")
    kind = _KINDS[Path(name).suffix]
    return Response(Artifact(root, stage, fingerprint).read(name), 200, _ALONE, kind)


def _draw(root: str, first: str) -> None:
    """The head, and the tab that is looked at first."""
    ui.add_css(_STYLE)
    ui.colors(primary="#0072b2", negative="#b3261e")
    dark = ui.dark_mode(None)
    with ui.header().classes("items-center px-6 py-0 gap-6 no-wrap bg-slate-900 text-white"):
        ui.label("latentforge studio").classes("text-lg font-medium whitespace-nowrap")
        with ui.tabs().props("dense no-caps indicator-color=white") as tabs:
            for name in TABS:
                ui.tab(name)
        ui.space()
        ui.label(root).classes("text-xs opacity-80 truncate").tooltip(root)
        ui.button(icon="contrast", on_click=lambda: dark.set_value(not dark.value)).props(
            "flat round dense color=white"
        )
    drawn: dict[str, Any] = {}
    with ui.tab_panels(tabs, value=first, keep_alive=True).classes("w-full bg-transparent"):
        panels = {name: ui.tab_panel(name) for name in TABS}
    for panel in panels.values():
        panel.classes("w-full max-w-[1240px] mx-auto px-6 py-4 gap-3")

    def show(name: str) -> None:
        """A tab is drawn when it is first looked at, and told whether it is."""
        if name not in drawn:
            with panels[name]:
                drawn[name] = TABS[name](root)
        for each, tab in drawn.items():
            tab.looked_at = each == name

    tabs.on_value_change(lambda event: show(event.value))
    show(first)
