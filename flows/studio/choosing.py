"""Which artifact of a stage a tab looks at, read anew whenever somebody asks for it."""

from __future__ import annotations

from collections.abc import Awaitable, Callable

from nicegui import ui

from flows.studio.work import Line
from infra import inventory
from infra.artifacts import Artifact, Manifest


def finished(root: str, stage: str) -> dict[str, Manifest]:
    """Whole artifacts of a stage by fingerprint, the newest first."""
    entries = inventory.read(root, stage)
    whole = [each for each in entries.values() if each.manifest is not None]
    newest = sorted(whole, key=lambda each: -each.written)
    return {each.artifact.fingerprint: each.manifest for each in newest if each.manifest is not None}


def named(manifest: Manifest) -> str:
    """`demo · 4cc726 · 2026-11-26 22:41`."""
    return (
        f"{manifest.recipe.get('name', '?')} · {manifest.fingerprint[:6]} · {manifest.created[:16].replace('T', ' ')}"
    )


class Choice:
    """A list of a stage's finished artifacts; calls `chosen` with the one that is looked at."""

    def __init__(self, root: str, stage: str, label: str, line: Line, chosen: Callable[[], Awaitable[None]]) -> None:
        self._root, self._stage, self._line, self._chosen = root, stage, line, chosen
        self.artifact: Artifact | None = None
        with ui.row().classes("items-center gap-0 no-wrap"):
            self._select = ui.select({}, label=label, on_change=self._changed).classes("w-72").props("dense outlined")
            ui.button(icon="refresh", on_click=self.refresh).props("flat round dense").tooltip("Look again")

    async def refresh(self) -> None:
        """Read what there is; keeps what is chosen where that is still there, else takes the newest."""
        found = await self._line.attempt(lambda: finished(self._root, self._stage))
        if found is None:
            return
        if not found:
            self._line.say(f"No finished {self._stage} under {self._root} yet.")
        before = self._select.value
        value = before if before in found else next(iter(found), None)
        self._select.set_options({name: named(each) for name, each in found.items()}, value=value)
        if value == before and value is not None:
            await self._changed()

    async def _changed(self) -> None:
        name = self._select.value
        self.artifact = None if name is None else Artifact(self._root, self._stage, name)
        if self.artifact is not None:
            await self._chosen()
