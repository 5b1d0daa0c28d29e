"""Sample: classes, seed, guidance, steps, solver and lead; an image as it forms; a grid over two settings."""

from __future__ import annotations

import threading
from collections.abc import Callable
from functools import partial

import numpy as np
from nicegui import ui

from configs import UserError
from flows.studio.choosing import Choice
from flows.studio.command import command
from flows.studio.fields import Axis, Fields
from flows.studio.settings import cells, overrides
from flows.studio.work import Line, Picture, as_url
from infra import inventory
from infra.artifacts import Artifact
from tasks.data.pixels import Pixels
from tasks.drawing.pictures import grid, png
from tasks.sampling.playing import Moment, Player, Stopped, tokenizer_of

_CLASSES = 6
Look = Callable[[Moment], None]
Cells = list[tuple[list[str], int]]
_ONE_AT_A_TIME = threading.Lock()
"""Of all visitors: two would only share the processor."""


class Drawing:
    """A picture that is being made: what its thread tells, and that nobody waits for it any more."""

    def __init__(self) -> None:
        self.stopped = threading.Event()
        self.moments: list[Moment] = []
        self.done = ""

    def look(self, moment: Moment) -> None:
        if self.stopped.is_set():
            raise Stopped
        self.moments.append(moment)


class SampleTab:
    """Draws itself where it is made."""

    looked_at = True

    def __init__(self, root: str) -> None:
        self._root = root
        self._player: Player | None = None
        self._names: list[str] = []
        self._drawing: Drawing | None = None
        self._line = Line()
        with ui.row().classes("w-full gap-6 no-wrap items-start"):
            with ui.column().classes("w-80 shrink-0 gap-3"):
                self._lay_out_settings()
            with ui.column().classes("grow gap-3 min-w-0"):
                self._lay_out_picture()
        for each in (self._beside, self._slider, self._code, self._stop):
            each.set_visibility(False)
        self._timer = ui.timer(0.3, self._follow)
        ui.timer(0, self._choice.refresh, once=True)
        ui.context.client.on_delete(self._cancel)

    def _lay_out_settings(self) -> None:
        self._choice = Choice(self._root, "train_dit", "Model", self._line, self._opened)
        self._classes = ui.select({}, multiple=True, label="Classes").classes("w-full")
        self._classes.props("dense outlined use-chips")
        with ui.row().classes("no-wrap gap-3 w-full"):
            self._rows = ui.number("Images of a class", value=2, min=1, max=16, precision=0)
            self._seed = ui.number("Seed", value=0, min=0, precision=0)
            for each in (self._rows, self._seed):
                each.props("dense outlined").classes("w-1/2")
        self._settings = Fields()
        with ui.row().classes("gap-2"):
            self._go = ui.button("Sample", on_click=self._sample).props("no-caps unelevated")
            self._stop = ui.button("Stop", on_click=self._cancel).props("no-caps flat")
        with ui.expansion("A grid over two settings").classes("w-full border border-gray-400/50 rounded"):
            self._across = Axis("Columns", "guidance", "1, 2, 4")
            self._down = Axis("Rows", "steps", "4, 10, 20")
            ui.button("Draw the grid", on_click=self._grid).props("no-caps outline").classes("mt-2")

    def _lay_out_picture(self) -> None:
        self._told = ui.label("Choose classes and press Sample.").classes("text-sm opacity-70")
        self._bars = ui.column().classes("w-full gap-1")
        with ui.row().classes("w-full gap-6 items-end"):
            self._picture = Picture()
            self._beside = ui.column().classes("gap-1 min-w-0")
            with self._beside:
                ui.label("semantic latents: three channels as red, green, blue").classes("text-xs opacity-70")
                self._semantics = Picture()
        self._slider = ui.slider(min=0, max=1, value=0, on_change=self._turned).classes("w-96")
        self._slider.tooltip("How it formed")
        self._code = ui.code("", language="bash").classes("w-full text-sm")

    # ------------------------------------------------------------------------------------------------- choosing

    async def _opened(self) -> None:
        model = self._choice.artifact
        found = None if model is None else await self._line.attempt(partial(_opened, self._root, model))
        if model != self._choice.artifact:  # another is looked at meanwhile
            return
        if found is None:
            self._player = None
            return
        self._player, self._names = found
        recipe = self._player.recipe()
        labels = dict(enumerate(self._names))
        self._classes.set_options(labels, value=list(labels)[:_CLASSES])
        self._settings.show(recipe)

    def _asked(self) -> tuple[list[int], int, int]:
        classes = sorted(self._classes.value)
        if not classes:
            raise UserError("Choose at least one class.")
        if self._rows.value is None or self._seed.value is None:
            raise UserError("Images of each class and seed are numbers.")
        return classes, int(self._rows.value), int(self._seed.value)

    # ------------------------------------------------------------------------------------------------- drawing

    async def _sample(self) -> None:
        player = self._player
        if player is None:
            return
        try:
            classes, rows, seed = self._asked()
            settings = overrides(player.recipe(), *self._settings.asked())
        except UserError as error:
            self._line.say(str(error))
            return
        named = ",".join(map(str, classes))
        await self._draw(
            partial(player.draw, classes, rows, seed, settings),
            f"{rows * len(classes)} images, seed {seed}",
            lambda: command(player.model, named, rows, seed, settings, "sample.png"),
        )

    async def _grid(self) -> None:
        player = self._player
        if player is None:
            return
        try:
            (label, *_), _, seed = self._asked()
            across, down = self._across.asked(), self._down.asked()
            each_cell = cells(player.recipe(), *self._settings.asked(), seed, across, down)
        except UserError as error:
            self._line.say(str(error))
            return
        columns, rows = (f"{name} {', '.join(map(str, values))}" for name, values in (across, down))
        work = partial(_cells, player, label, each_cell, len(across[1]))
        lines = [(f"{number:02d}.png", *cell) for number, cell in enumerate(each_cell, 1)]
        await self._draw(
            work,
            f"{self._names[label]}: columns {columns}; rows {rows}",
            lambda: "\n".join(command(player.model, str(label), 1, own, given, name) for name, given, own in lines),
        )
        self._bars.clear()  # how the last cell formed says nothing of the grid
        for each in (self._beside, self._slider):
            each.set_visibility(False)

    async def _draw(self, work: Callable[[Look], Pixels], told: str, line: Callable[[], str]) -> None:
        """Make a picture in a thread, show it, and the command that makes it again."""
        if self._drawing is not None and not self._drawing.done and not self._drawing.stopped.is_set():
            return
        drawing = self._drawing = Drawing()
        self._code.set_visibility(False)
        self._slider.set_visibility(False)
        self._stop.set_visibility(True)
        self._go.disable()
        self._told.set_text(f"Waiting for the processor: {told}")
        made = await self._line.attempt(lambda: _alone(work, drawing, line))
        if drawing is not self._drawing:  # stopped, and another is made
            return
        self._go.enable()
        self._stop.set_visibility(False)
        if made is None:
            self._told.set_text("Stopped." if drawing.stopped.is_set() else "No picture.")
            drawing.stopped.set()
            return
        drawing.done = as_url(made[0])
        self._code.set_content(made[1])
        self._code.set_visibility(True)
        self._told.set_text(told)
        self._slider.set_visibility(bool(drawing.moments))
        self._slider.props(f"max={len(drawing.moments)}")
        self._slider.set_value(len(drawing.moments))
        self._turned()

    def _cancel(self) -> None:
        if self._drawing is not None:
            self._drawing.stopped.set()

    # ------------------------------------------------------------------------------------------------- showing

    def _follow(self) -> None:
        drawing = self._drawing
        if drawing is not None and drawing.moments and not drawing.done and not drawing.stopped.is_set():
            self._told.set_text("As it forms: what the model expects of the images now")
            self._show(drawing.moments[-1])

    def _turned(self) -> None:
        drawing = self._drawing
        if drawing is None or not drawing.done:
            return
        number = int(self._slider.value)
        if number < len(drawing.moments):
            self._show(drawing.moments[number])
            return
        if drawing.moments:
            self._show(drawing.moments[-1], dict.fromkeys(drawing.moments[-1].times, 1.0))
        self._picture.show(drawing.done)

    def _show(self, moment: Moment, times: dict[str, float] | None = None) -> None:
        self._picture.show(as_url(png(moment.texture)))
        self._beside.set_visibility(moment.semantics is not None)
        if moment.semantics is not None:
            self._semantics.show(as_url(png(moment.semantics)))
        self._bars.clear()
        with self._bars:
            for name, time in reversed((times or moment.times).items()):
                with ui.row().classes("items-center gap-2 no-wrap w-96"):
                    ui.label(name).classes("text-xs w-20")
                    ui.linear_progress(time, show_value=False).props("instant-feedback rounded").classes("grow")
                    ui.label(f"{time:.2f}").classes("text-xs w-8")


def _opened(root: str, model: Artifact) -> tuple[Player, list[str]]:
    """The model's networks, and the names of its classes."""
    samples = list(inventory.read(root, "sample").values()) if "encode" not in model.manifest.inputs else []
    player = Player(model, tokenizer_of(model, samples))
    recipe = player.recipe()
    latents = model.manifest.inputs.get("encode")
    named = [] if latents is None else Artifact(root, "encode", latents).manifest.facts.get("classes", [])
    count = recipe.data.classes
    return player, [str(named[label]) if label < len(named) else str(label) for label in range(count)]


def _cells(player: Player, label: int, cells: Cells, columns: int, look: Look) -> Pixels:
    """One image of a class for each cell. Raises UserError, before any is made, where a cell's settings cannot be."""
    for settings, _ in cells:
        player.recipe(settings)
    made = [player.draw([label], 1, seed, settings, look) for settings, seed in cells]
    return grid(np.stack(made), columns=columns)


def _alone(work: Callable[[Look], Pixels], drawing: Drawing, line: Callable[[], str]) -> tuple[bytes, str] | None:
    """The PNG of a picture that is made while no other is, and its command; None where it was stopped."""
    with _ONE_AT_A_TIME:
        if drawing.stopped.is_set():
            return None
        try:
            return png(work(drawing.look)), line()
        except Stopped:
            return None
