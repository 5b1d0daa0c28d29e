"""The page: a head with the root, and a tab for each question a person has."""

from __future__ import annotations

from typing import Any

from nicegui import ui

from flows.studio.data_tab import DataTab

TABS: dict[str, Any] = {"Data": DataTab}
_STYLE = """
.q-tab__label { font-size: 15px; text-transform: none } .nicegui-content { padding: 0 }
img { image-rendering: auto }
"""


def register(root: str) -> None:
    """The page over a root, drawn anew for each visitor."""

    @ui.page("/")
    def studio() -> None:
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
        with ui.tab_panels(tabs, value=next(iter(TABS)), keep_alive=True).classes("w-full bg-transparent"):
            for name, draw in TABS.items():
                with ui.tab_panel(name).classes("w-full max-w-[1240px] mx-auto px-6 py-4 gap-3"):
                    draw(root)
