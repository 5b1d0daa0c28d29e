"""What a tab waits for is done in a thread; what goes wrong there is one line on the page."""

from __future__ import annotations

import io
import traceback
from collections.abc import Callable
from typing import TypeVar

from nicegui import run, ui
from PIL import Image

from configs.errors import UserError
from infra import logs
from tasks.drawing import pages

T = TypeVar("T")


class Line:
    """Where a tab says what is wrong; takes no room while nothing is."""

    def __init__(self) -> None:
        self._label = ui.label().classes("text-negative text-sm whitespace-pre-wrap").props("role=alert")
        self.say("")

    def say(self, text: str) -> None:
        self._label.set_text(text)
        self._label.set_visibility(bool(text))

    async def attempt(self, work: Callable[[], T]) -> T | None:
        """What `work` gives, done in a thread; None where it fails, which the line then tells."""
        self.say("")
        try:
            return await run.io_bound(work)
        except Exception as error:  # of any kind: a page goes on when a run's files vanish under it
            self.say(said(error))
        return None


def said(error: Exception) -> str:
    """One line for people; of what nobody foresaw the traceback goes to the console."""
    if isinstance(error, UserError):
        return str(error)
    logs.say("".join(traceback.format_exception(error)).rstrip(), "warning")
    text = " ".join(str(error).split())[:200]
    return f"{type(error).__name__}: {text or 'no more is known'}; the console has the rest"


class Picture:
    """An image in its own size, or as wide as there is room."""

    def __init__(self) -> None:
        self._image = ui.element("img").classes("rounded max-w-full")
        self._image.style("image-rendering: pixelated")
        self.show("")

    def show(self, address: str) -> None:
        """As :func:`as_url` gives it; nothing is shown of an empty one."""
        self._image.props["src"] = address
        self._image.update()
        self._image.set_visibility(bool(address))


def as_url(picture: Image.Image | bytes) -> str:
    """A picture, or the bytes of a PNG, as an address that needs no further request."""
    if isinstance(picture, Image.Image):
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        picture = buffer.getvalue()
    return pages.as_url(picture)
