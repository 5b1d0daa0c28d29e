"""Tokenizer: an image of one's own beside its reconstruction and error, and its latents by channel."""

from __future__ import annotations

from functools import partial
from typing import Any

import numpy as np
from nicegui import ui
from PIL import Image

from configs.errors import UserError
from configs.load import read_recorded
from flows.studio.choosing import Choice
from flows.studio.work import Line, Picture, as_url
from infra.artifacts import Artifact
from infra.device import default_device
from models.image_autoencoder import ImageAutoencoder
from tasks.data import browsing
from tasks.data.crops import Crop
from tasks.data.decode import Undecodable, decode
from tasks.data.pixels import Pixels
from tasks.drawing.latents import ERROR_TIMES, Reconstructed, reconstruct
from tasks.networks import trained_autoencoder

_MOST_BYTES, _MOST_PIXELS = 50_000_000, 100_000_000
_SIDE, _COLUMNS = 256, 16


class TokenizerTab:
    """Draws itself where it is made."""

    looked_at = True

    def __init__(self, root: str) -> None:
        self._root, self._number = root, 0
        self._network: ImageAutoencoder | None = None
        self._line = Line()
        with ui.row().classes("items-center gap-4 w-full"):
            self._choice = Choice(root, "train_vavae", "Tokenizer", self._line, self._opened)
            self._another = ui.button("Another test image", on_click=self._next).props("no-caps outline")
            upload = ui.upload(label="An image of your own", on_upload=self._given, auto_upload=True)
            upload.props("accept=image/* flat bordered").classes("w-64")
            upload.props(f"max-file-size={_MOST_BYTES}")
        self._told = ui.label("").classes("text-sm opacity-70")
        self._pictures: list[Picture] = []
        with ui.row().classes("gap-6 items-start"):
            for title in ("image", "reconstruction", f"error, {ERROR_TIMES} times as large"):
                with ui.column().classes("gap-1"):
                    ui.label(title).classes("text-sm")
                    self._pictures.append(Picture())
        self._channels_told = ui.label("").classes("text-sm mt-2")
        self._channels = Picture()
        ui.timer(0, self._choice.refresh, once=True)

    async def _opened(self) -> None:
        tokenizer, self._network = self._choice.artifact, None
        if tokenizer is not None:
            network = await self._line.attempt(partial(_loaded, tokenizer))
            if tokenizer != self._choice.artifact:  # another is looked at meanwhile
                return
            self._network, self._number = network, 0
            await self._next()

    async def _next(self) -> None:
        tokenizer, network = self._choice.artifact, self._network
        if tokenizer is None or network is None:
            return
        found = await self._line.attempt(partial(_of_test_split, tokenizer, network, self._number))
        if found is not None:
            self._number += 1
            self._show(found[1], found[0])

    async def _given(self, event: Any) -> None:
        data, tokenizer, network = await event.file.read(), self._choice.artifact, self._network
        event.sender.reset()
        if tokenizer is None or network is None:
            self._line.say("Choose a tokenizer first.")
            return
        found = await self._line.attempt(partial(_of_bytes, tokenizer, network, data))
        if found is not None:
            self._show(found, str(event.file.name))

    def _show(self, found: Reconstructed, name: str) -> None:
        self._told.set_text(f"{name}: peak signal-to-noise ratio {found.psnr:.1f} dB")
        for picture, pixels in zip(self._pictures, (found.original, found.again, found.error), strict=True):
            picture.show(as_url(_enlarged(pixels)))
        channels, height, width = found.latents.shape
        self._channels_told.set_text(f"latents: {channels} channels of {height} × {width}, each in its own range")
        self._channels.show(as_url(Image.fromarray(found.channels(min(_COLUMNS, channels)))))


def _loaded(tokenizer: Artifact) -> ImageAutoencoder:
    return trained_autoencoder(tokenizer).to(default_device())


def _of_test_split(tokenizer: Artifact, network: ImageAutoencoder, number: int) -> tuple[str, Reconstructed]:
    """The image of this number in the test split that the tokenizer never saw, and what comes of it."""
    shards = tokenizer.manifest.inputs.get("shard")
    if shards is None:
        raise UserError("This tokenizer came without images: give it one of your own.")
    shard = Artifact(tokenizer.root, "shard", shards)
    count = shard.manifest.facts["splits"].get("test", 0)
    if not count:
        raise UserError("There is no test split: give an image of your own.")
    found = browsing.find(shard, "test", browsing.of_class(None), 1, number % count)[0]
    return found.key, _of_bytes(tokenizer, network, found.data)


def _of_bytes(tokenizer: Artifact, network: ImageAutoencoder, data: bytes) -> Reconstructed:
    """An encoded image, cut to the square that the tokenizer takes, and what comes of it."""
    side = read_recorded(tokenizer.manifest.recipe).image.size
    try:
        pixels = np.asarray(Crop(side)(decode(data, _MOST_PIXELS)), np.uint8)
    except Undecodable as error:
        raise UserError(f"This is no image that can be read: {error}.") from None
    return reconstruct(network, pixels)


def _enlarged(pixels_HW3: Pixels) -> Image.Image:
    """Small ones by whole pixels."""
    times = max(1, _SIDE // pixels_HW3.shape[0])
    return Image.fromarray(pixels_HW3.repeat(times, axis=0).repeat(times, axis=1))
