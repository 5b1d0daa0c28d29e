"""`look`: what a source of images holds, a sheet of some of it, and the section that names it. Makes no artifact."""

from __future__ import annotations

import io
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
import pyarrow as pa
import pyarrow.compute
import yaml
from PIL import Image, ImageDraw, ImageFont

from configs.data import Data, Shard
from configs.load import assign, checked
from flows.options import writing
from tasks.data.decode import Undecodable, decode
from tasks.data.rows import Rows
from tasks.sources import Account, Listing, ScannedSource, Source, listing_of, one_look, open_source
from tasks.sources.guess import guess

_TILE, _LINE, _GAP = 128, 14, 8
_COLUMNS = 8
_READ_BYTES = 1 << 28
"""No picture that is worth a tile is larger."""
_SCANNED_FILES = 3
"""Files of a source that is read file by file from which images are drawn."""


def section_of(path: str, test_path: str | None, kind: str | None, overrides: Sequence[str]) -> Data:
    """The `data` section for a source, with as many classes as it has.

    Args:
        kind: None tells it by what lies there.
        overrides: `field=value` strings for `data.source`.

    Raises:
        UserError: nothing is there, or it is not of this kind.
    """
    apart = {} if test_path is None else {"test_path": test_path}
    values: dict[str, Any] = {"kind": kind, "path": path, **apart} if kind else guess(path, test_path)
    for override in overrides:
        assign(values, override)
    return checked(Data, {"source": values, "classes": 1}, "data")


def look(data: Data, images: int, seed: int, output: Path) -> list[str]:
    """Lines for people, and the picture of so many random images at `output`.

    Raises:
        UserError: the source is missing or not of its kind.
    """
    source = open_source(data)
    with one_look():
        listing = listing_of(source)
    data = data.model_copy(update={"classes": max(1, len(listing.classes))})
    account = Account.of(data, listing, source.identity() if not listing.identity else "")
    lines = account.lines(data, Shard())
    lines += [f"to mend   {fault}" for fault in account.disagreements(data, Shard())]
    if listing.rows.num_rows:
        sheet = _sheet(source, listing, images, seed)
        with writing(output):
            output.write_bytes(sheet)
        lines.append(f"picture   {output}")
    written = yaml.safe_dump({"data": plain(data)}, sort_keys=False, allow_unicode=True)
    return [*lines, "", written.rstrip()]


def plain(data: Data) -> dict[str, Any]:
    """The section as a recipe holds it, without what is the default."""
    found = data.model_dump(mode="json", exclude_defaults=True, exclude_none=True)
    return found | {"source": {"kind": data.source.kind, **found["source"]}}


def _sheet(source: Source, listing: Listing, count: int, seed: int) -> bytes:
    """A PNG of random images, each with its label, class, size and mode."""
    font = ImageFont.truetype(Path(matplotlib.get_data_path()) / "fonts/ttf/DejaVuSans.ttf", 10)  # most scripts
    tiles = [
        _tile(data, f"{row['label']} · {listing.classes[row['label']]}", font)
        for row, data in _some(source, listing.rows, count, seed)
    ]
    columns = min(_COLUMNS, len(tiles))
    width, height = _TILE + _GAP, _TILE + 2 * _LINE + _GAP
    sheet = Image.new("RGB", (columns * width + _GAP, -(-len(tiles) // columns) * height + _GAP), "white")
    for number, tile in enumerate(tiles):
        row, column = divmod(number, columns)
        sheet.paste(tile, (_GAP + column * width, _GAP + row * height))
    buffer = io.BytesIO()
    sheet.save(buffer, "PNG")
    return buffer.getvalue()


def _some(source: Source, listed: Rows, count: int, seed: int) -> list[tuple[dict[str, Any], bytes]]:
    """Random rows in their order, with what is stored of them; nothing where it cannot be read."""
    random = np.random.default_rng(seed)
    if isinstance(source, ScannedSource):
        files = sorted({file for chunk in listed.chunks() for file in chunk["file"].unique().to_pylist()})
        some = pa.array(random.choice(files, min(_SCANNED_FILES, len(files)), replace=False).tolist())
        chunks, listed = listed.chunks(), Rows(listed.schema)
        for chunk in chunks:
            listed.add(chunk.filter(pyarrow.compute.is_in(chunk["file"], some)))
    rows = listed.take(np.sort(random.choice(listed.num_rows, min(count, listed.num_rows), replace=False)).tolist())
    if not isinstance(source, ScannedSource):
        return [(row, _read(source, row)) for row in rows]
    found = {}
    for file in sorted({row["file"] for row in rows}):
        wanted = {row["start"] for row in rows if row["file"] == file}
        for number, data in enumerate(source.scan(file)):
            if number in wanted:
                found[file, number] = data
            if number >= max(wanted):
                break
    return [(row, found[row["file"], row["start"]]) for row in rows]


def _read(source: Source, row: dict[str, Any]) -> bytes:
    try:
        return source.read(row["file"], row["start"], row["length"] or _READ_BYTES)
    except Exception:  # a sheet shows what can be shown; `shard` says what cannot
        return b""


def _tile(data: bytes, label: str, font: Any) -> Image.Image:
    """An image made to fit, above its label and what it is: `500 × 375 RGB`, or why there is none."""
    tile = Image.new("RGB", (_TILE, _TILE + 2 * _LINE), "white")
    draw = ImageDraw.Draw(tile)
    try:
        image = decode(data)
        text = _what(data, image)
        image.thumbnail((_TILE, _TILE))
        if max(image.size) < _TILE // 2:  # small ones by whole pixels
            times = _TILE // max(image.size)
            image = image.resize((times * image.width, times * image.height), Image.Resampling.NEAREST)
        tile.paste(image, ((_TILE - image.width) // 2, (_TILE - image.height) // 2))
    except Undecodable as error:
        text = error.reason
        draw.rectangle((0, 0, _TILE - 1, _TILE - 1), fill="#eeeeee")
    for number, line in enumerate((label, text)):
        draw.text((0, _TILE + number * _LINE), _fitting(draw, line, font), fill="black", font=font)
    return tile


def _what(data: bytes, image: Image.Image) -> str:
    """Size and mode as stored, or those it was decoded to where its metadata are broken."""
    try:
        with Image.open(io.BytesIO(data)) as stored:
            image = stored
    except Exception:  # whatever a broken header makes of it
        pass
    return f"{image.width} × {image.height} {image.mode}"


def _fitting(draw: ImageDraw.ImageDraw, text: str, font: Any) -> str:
    while text and draw.textlength(text, font=font) > _TILE:
        text = text[:-2] + "…"
    return text
