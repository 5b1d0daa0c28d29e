"""From encoded bytes to RGB pixels: any common format, or a reason why not.

Alpha is composited on white, EXIF orientation applied, 16-bit samples scaled to 8, palettes and CMYK converted;
of an animation the first frame counts. Embedded colour profiles are ignored, as the published pipelines do.
"""

from __future__ import annotations

import io
import warnings
from contextlib import suppress
from importlib import import_module

import numpy as np
from PIL import Image, ImageFile, ImageOps, UnidentifiedImageError

from configs.errors import brief
from tasks.data.crops import adm_scaled, center_crop
from tasks.data.formats import CAMERA_RAW, HEAD_BYTES, what_instead

MAX_ASPECT = 100
"""A strip longer than this many times its width is refused: cropped to a square it would show nothing."""

_PNG = b"\x89PNG\r\n\x1a\n"
_SUBFILE, _DNG_VERSION = 254, 50706
"""Tags of TIFF: whether an image is a smaller version of another one in the file, and what only Adobe's raw has."""
_PNG_METADATA = (b"tEXt", b"zTXt", b"iTXt", b"iCCP", b"eXIf")

warnings.filterwarnings("ignore", "Corrupt EXIF data", UserWarning)  # pixels are what counts
Image.MAX_IMAGE_PIXELS = None  # our own limit is checked from the header, before a pixel is decoded
ImageFile.LOAD_TRUNCATED_IMAGES = False
for _module, _register in (("pillow_heif", "register_heif_opener"), ("pillow_jxl", "")):
    with suppress(ImportError):  # formats that Pillow leaves to packages, where they are installed
        _package = import_module(_module)
        if _register:
            getattr(_package, _register)()


class Undecodable(Exception):
    """`reason` is a short phrase that can be counted, `detail` what was found."""

    def __init__(self, reason: str, detail: str = "") -> None:
        super().__init__(f"{reason}: {detail}" if detail else reason)
        self.reason, self.detail = reason, detail


def decode(data: bytes, max_pixels: int | None = None) -> Image.Image:
    """An RGB image, upright.

    Args:
        data: the encoded file.
        max_pixels: refuse what its header says is larger, without decoding it; None takes any size.

    Raises:
        Undecodable: empty, not an image, truncated, corrupt, too many pixels, or too elongated.
    """
    if not data:
        raise Undecodable("empty file")
    try:
        image = Image.open(io.BytesIO(data))
    except UnidentifiedImageError:
        raise Undecodable(*_what_is(data)) from None
    except Exception as error:
        if (pixels := _without_texts(data)) is not None:
            return decode(pixels, max_pixels)
        raise Undecodable("corrupt image", brief(error)) from None
    if _is_raw(image, data):
        raise Undecodable(*CAMERA_RAW)
    width, height = image.size
    if max_pixels is not None and width * height > max_pixels:
        raise Undecodable("too many pixels", f"{width} × {height}, at most {max_pixels}")
    if max(width, height) > MAX_ASPECT * min(width, height):
        raise Undecodable("too elongated", f"{width} × {height}, at most {MAX_ASPECT} : 1")
    try:
        image.load()
        return _to_rgb(ImageOps.exif_transpose(image))
    except Exception as error:  # decoders meet broken files with any exception at all
        if (pixels := _without_texts(data)) is not None:
            return decode(pixels, max_pixels)
        text = brief(error)
        reason = "truncated image" if "truncated" in text or isinstance(error, EOFError) else "corrupt image"
        raise Undecodable(reason, text) from None


def _is_raw(image: Image.Image, data: bytes) -> bool:
    """Whether this is a camera's raw file, of which Pillow would show the small preview."""
    if image.format != "TIFF":
        return False
    tags = getattr(image, "tag_v2", {})
    return bool(tags.get(_SUBFILE, 0) & 1) or _DNG_VERSION in tags or what_instead(data[:HEAD_BYTES]) == CAMERA_RAW


def _what_is(data: bytes) -> tuple[str, str]:
    """Reason and detail for what no decoder knows."""
    return what_instead(data[:HEAD_BYTES]) or ("not an image", f"starts with {data[:8]!r}")


def _without_texts(data: bytes) -> bytes | None:
    """A PNG without its texts, profile and metadata, whose size and form say nothing about its pixels.

    None where nothing is left out: not a PNG, cut short, or without such chunks.
    """
    if not data.startswith(_PNG):
        return None
    kept, at, dropped = [_PNG], len(_PNG), False
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        end = at + 12 + length
        if data[at + 4 : at + 8] in _PNG_METADATA:
            dropped = True
        else:
            kept.append(data[at:end])
        at = end
    return b"".join(kept) if dropped else None


def reencoded(image: Image.Image, size: int, quality: int) -> bytes:
    """A JPEG without colour subsampling whose shorter side is at most `size`, scaled as the ADM crop does.

    JPEG is our choice: every reader knows it, and it decodes faster than WebP. Raises Undecodable where the longer
    side is more than JPEG can hold.
    """
    if min(image.size) > size:
        image = adm_scaled(image, size)
    buffer = io.BytesIO()
    try:
        image.save(buffer, "JPEG", quality=quality, subsampling=0)
    except OSError as error:
        raise Undecodable("too elongated", brief(error)) from None
    return buffer.getvalue()


def load(data: bytes, size: int, max_pixels: int | None = None) -> np.ndarray:
    """Decode and crop: uint8 (size, size, 3). Raises Undecodable."""
    return center_crop(decode(data, max_pixels), size)


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode.startswith("I;16") or image.mode in ("I", "F"):
        image = _to_eight_bits(image)
    if image.mode == "RGB" and "transparency" not in image.info:
        return image
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, (255, 255, 255, 255))
        return Image.alpha_composite(white, image).convert("RGB")
    return image.convert("RGB")


def _to_eight_bits(image: Image.Image) -> Image.Image:
    """Grey of more than 8 bits: integers as 16 bits if any needs more than 8, floats as [0, 1] if all fit in it."""
    samples = np.nan_to_num(np.asarray(image).astype(np.float64))
    if image.mode == "F":
        scale = 255.0 if samples.max() <= 1.0 else 1.0
    else:
        scale = 255.0 / 65535.0 if image.mode.startswith("I;16") or samples.max() > 255 else 1.0
    return Image.fromarray(np.clip(np.rint(samples * scale), 0, 255).astype(np.uint8))
