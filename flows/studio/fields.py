"""The fields of a sample's settings, and those of one axis of a grid."""

from __future__ import annotations

from typing import Any, get_args

from nicegui import ui

from configs import Recipe, UserError
from configs.diffusion import UnetModel
from configs.sampling import Solver
from flows.studio.settings import AXES, LEAD, current, steps_of, values_of

_UNET_SOLVERS = ("euler", "heun", "dpmpp_2m", "unipc")


class Fields:
    """Fields for all of it; those that a model does not know are not shown."""

    def __init__(self) -> None:
        with ui.row().classes("no-wrap gap-3 w-full"):
            self._scale = ui.number("Guidance", min=1, step=0.5).props("dense outlined")
            self._steps = ui.number("Steps", min=1, precision=0).props("dense outlined")
        with ui.row().classes("no-wrap gap-3 w-full"):
            self._solver = ui.select(list(get_args(Solver)), label="Solver").props("dense outlined").classes("w-1/2")
            self._lead = ui.number(f"{LEAD} (semantics ahead)", min=0, max=1, step=0.1).props("dense outlined")
            self._lead.classes("w-1/2")
        self._stages = ui.column().classes("w-full gap-2")
        self._sides: list[tuple[int, Any, Any]] = []

    def show(self, recipe: Recipe) -> None:
        """A recipe's own values."""
        own = current(recipe)
        unet = isinstance(recipe.train_dit.model, UnetModel)
        self._solver.set_options(list(_UNET_SOLVERS if unet else get_args(Solver)), value=own["solver"])
        for field, name in ((self._scale, "guidance"), (self._steps, "steps"), (self._lead, LEAD)):
            field.set_value(own[name])
        self._lead.set_visibility(own[LEAD] is not None)
        self._show_stages(recipe)

    def asked(self) -> tuple[dict[str, Any], list[dict[str, Any]] | None]:
        """What :func:`flows.studio.settings.overrides` takes. Raises UserError on a field that is empty."""
        given = {"guidance": self._scale.value, "steps": self._steps.value, "solver": self._solver.value}
        if None in given.values():
            raise UserError("Guidance, steps and solver need a value.")
        wanted = {**given, "steps": int(given["steps"]), "guidance": float(given["guidance"]), LEAD: self._lead.value}
        stages = [{"side": side, "steps": int(steps.value)} for side, on, steps in self._sides if on.value]
        return wanted, stages if self._sides else None

    def _show_stages(self, recipe: Recipe) -> None:
        self._stages.clear()
        self._sides = []
        known = {each["side"]: each["steps"] for each in steps_of(recipe)}
        with self._stages:
            for side in recipe.sides if recipe.train_dit.cascade is not None else ():
                with ui.row().classes("items-center no-wrap gap-2"):
                    on = ui.checkbox(f"{side} × {side}", value=side in known).classes("w-24")
                    steps = ui.number("Steps", value=known.get(side, recipe.sample.steps), min=1, precision=0)
                    self._sides.append((side, on, steps.props("dense outlined").classes("w-24")))


class Axis:
    """A setting and its values, between commas."""

    def __init__(self, label: str, name: str, values: str) -> None:
        with ui.row().classes("no-wrap gap-2 w-full"):
            self._name = ui.select(list(AXES), value=name, label=label).props("dense outlined").classes("w-28")
            self._values = ui.input(f"{label}: values", value=values).props("dense outlined").classes("grow")

    def asked(self) -> tuple[str, list[Any]]:
        """Name and values. Raises UserError where they are none."""
        return str(self._name.value), values_of(self._name.value, self._values.value or "")
