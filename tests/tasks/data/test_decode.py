from __future__ import annotations

import io
import struct
from collections.abc import Callable

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo

from tasks.data.decode import Undecodable, center_crop, decode, load, reencoded
from tests.helpers.piles import encoded, picture

GREY = np.tile(np.linspace(0, 255, 40).astype(np.uint8), (32, 1))


@pytest.mark.parametrize("kind", ["PNG", "JPEG", "WEBP", "BMP", "TIFF", "GIF", "PPM", "ICO"])
def test_common_formats(kind: str) -> None:
    image = decode(encoded(picture(3, 48, 48), kind, **({"quality": 95} if kind in ("JPEG", "WEBP") else {})))
    assert image.mode == "RGB" and image.size == (48, 48)
    difference = np.abs(np.asarray(image, float) - np.asarray(picture(3, 48, 48), float)).mean()
    assert difference < 12


def test_lossless_formats_keep_pixels() -> None:
    assert np.array_equal(np.asarray(decode(encoded(picture()))), np.asarray(picture()))


@pytest.mark.parametrize("orientation", [1, 3, 6, 8])
def test_exif_orientation_is_applied(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    image = decode(encoded(picture(), "JPEG", exif=exif.tobytes(), quality=95))
    turned = {1: 0, 3: 180, 6: 270, 8: 90}[orientation]
    expected = np.asarray(picture().rotate(turned, expand=True), float)
    assert image.size == expected.shape[1::-1]
    assert np.abs(np.asarray(image, float) - expected).mean() < 8


def test_cmyk_jpeg() -> None:
    image = decode(encoded(picture(1).convert("CMYK"), "JPEG", quality=95))
    assert image.mode == "RGB"
    assert np.abs(np.asarray(image, float) - np.asarray(picture(1), float)).mean() < 8


def test_sixteen_bit_grey_is_scaled_not_clipped() -> None:
    samples = GREY.astype(np.uint16) * 257
    for kind in ("PNG", "TIFF"):
        pixels = np.asarray(decode(encoded(Image.fromarray(samples), kind)))
        assert np.array_equal(pixels, np.repeat(GREY[..., None], 3, axis=2))


def test_float_tiff() -> None:
    pixels = np.asarray(decode(encoded(Image.fromarray((GREY / 255).astype(np.float32)), "TIFF")))
    assert np.array_equal(pixels[..., 0], GREY)


def test_palette_and_bilevel() -> None:
    palette = decode(encoded(picture().quantize(64)))
    assert palette.mode == "RGB" and len(np.unique(np.asarray(palette).reshape(-1, 3), axis=0)) > 16
    bilevel = np.asarray(decode(encoded(Image.fromarray(GREY).point(lambda v: 255 * (v > 127)).convert("1"))))
    assert set(np.unique(bilevel)) == {0, 255}


def test_alpha_is_composited_on_white() -> None:
    rgba = np.dstack([np.asarray(picture()), np.zeros((32, 40), np.uint8)])
    rgba[:, 20:, 3] = 255
    pixels = np.asarray(decode(encoded(Image.fromarray(rgba))))
    assert (pixels[:, :20] == 255).all()
    assert np.array_equal(pixels[:, 20:], np.asarray(picture())[:, 20:])


def test_palette_transparency_and_grey_alpha() -> None:
    palette = Image.fromarray(np.zeros((8, 8), np.uint8)).convert("P")
    assert (np.asarray(decode(encoded(palette, transparency=0))) == 255).all()
    grey_alpha = Image.merge("LA", [Image.new("L", (8, 8), 10), Image.new("L", (8, 8), 0)])
    assert (np.asarray(decode(encoded(grey_alpha))) == 255).all()


def test_first_frame_of_an_animation() -> None:
    frames = [Image.new("RGB", (16, 16), colour) for colour in ("red", "blue")]
    data = encoded(frames[0], "GIF", save_all=True, append_images=frames[1:])
    assert tuple(np.asarray(decode(data))[8, 8]) == (255, 0, 0)


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (b"", "empty file"),
        (b"these are words, not pixels", "not an image"),
        (b"\x89PNG\r\n\x1a\n", "not an image"),
        (encoded(picture(), "JPEG")[:-200], "truncated image"),
        (encoded(picture())[:-200], "truncated image"),
        (encoded(Image.new("RGB", (2000, 2))), "too elongated"),
    ],
)
def test_what_cannot_be_used_says_why(data: bytes, reason: str) -> None:
    with pytest.raises(Undecodable) as caught:
        decode(data)
    assert caught.value.reason == reason


def test_damaged_pixels_are_refused() -> None:
    data = bytearray(encoded(picture()))
    data[len(data) // 2] ^= 0xFF
    with pytest.raises(Undecodable):
        decode(bytes(data))


def test_a_bomb_is_refused_from_its_header() -> None:
    bomb = encoded(Image.new("1", (30_000, 30_000)), "PNG")
    assert len(bomb) < 200_000
    with pytest.raises(Undecodable, match=r"too many pixels: 30000 × 30000"):
        decode(bomb, max_pixels=100_000_000)
    assert decode(encoded(picture()), max_pixels=40 * 32).size == (40, 32)


@pytest.mark.parametrize("shape", [(32, 32), (40, 32), (31, 90), (500, 333), (28, 28), (1, 40)])
def test_crop_has_the_asked_size(shape: tuple[int, int]) -> None:
    pixels = center_crop(picture(2, *shape), 32)
    assert pixels.shape == (32, 32, 3) and pixels.dtype == np.uint8


def test_crop_halves_then_scales_then_cuts_the_centre() -> None:
    image = picture(5, 150, 140)
    halved = image.resize((75, 70), Image.Resampling.BOX).resize((37, 35), Image.Resampling.BOX)
    scaled = halved.resize((round(37 * 32 / 35), 32), Image.Resampling.BICUBIC)
    expected = np.asarray(scaled)[:, (scaled.width - 32) // 2 :][:, :32]
    assert np.array_equal(center_crop(image, 32), expected)


def test_load_does_both() -> None:
    buffer = io.BytesIO(encoded(picture(7, 64, 48), "JPEG"))
    assert np.array_equal(load(buffer.getvalue(), 16), center_crop(decode(buffer.getvalue()), 16))


def test_reencoded_at_the_crop_size_is_what_the_crop_would_have_seen() -> None:
    image = picture(5, 150, 140)
    again = center_crop(decode(reencoded(image, 32, quality=100)), 32)
    assert np.abs(again.astype(float) - center_crop(image, 32)).mean() < 1.5  # JPEG's rounding


def test_what_jpeg_cannot_hold_is_refused() -> None:
    with pytest.raises(Undecodable, match="too elongated"):
        reencoded(Image.new("RGB", (66_000, 700)), 700, quality=50)


def _with_segment(data: bytes, marker: int, payload: bytes) -> bytes:
    return data[:2] + bytes([0xFF, marker]) + struct.pack(">H", len(payload) + 2) + payload + data[2:]


def _exif(*entries: bytes) -> bytes:
    header = b"Exif\x00\x00II*\x00\x08\x00\x00\x00" + struct.pack("<H", len(entries))
    return header + b"".join(entries) + bytes(4)


_ORIENTATION = struct.pack("<HHII", 0x0112, 3, 1, 1)


@pytest.mark.parametrize(
    "payload",
    [
        b"http://ns.adobe.com/xap/1.0/\x00<x:xmpmeta><t>caf\xa8\xff</t></x:xmpmeta>",
        b"Exif\x00\x00",
        b"Exif\x00\x00" + bytes(range(200)),
        _exif(struct.pack("<HHII", 0x0112, 2, 4, 0x00363636)),
        _exif(struct.pack("<HHII", 0x0112, 3, 0, 0)),
        _exif(_ORIENTATION, struct.pack("<HHII", 0x011A, 5, 1, 38)) + struct.pack("<II", 72, 0),
        _exif(_ORIENTATION, struct.pack("<HHII", 0x8769, 4, 1, 0x7FFFFFF0)),
        _exif(_ORIENTATION, _ORIENTATION)[:30],
    ],
    ids=["xmp", "empty", "noise", "text", "no value", "division by zero", "past the end", "cut"],
)
def test_broken_metadata_of_a_jpeg_spoils_no_pixels(payload: bytes) -> None:
    plain = encoded(picture(), "JPEG", quality=95)
    image = decode(_with_segment(plain, 0xE1, payload))
    assert np.array_equal(np.asarray(image), np.asarray(decode(plain)))


def _png(**options: object) -> bytes:
    return encoded(picture(), "PNG", **options)


def _texts(count: int, length: int) -> bytes:
    info = PngInfo()
    for number in range(count):
        info.add_text(f"k{number}", "y" * length, zip=True)
    return _png(pnginfo=info)


@pytest.mark.parametrize(
    "make",
    [lambda: _texts(1, 3_000_000), lambda: _texts(70, 1_000_000), lambda: _png(icc_profile=bytes(2_000_000))],
    ids=["long text", "many texts", "long profile"],
)
def test_texts_and_profiles_of_a_png_spoil_no_pixels(make: Callable[[], bytes]) -> None:
    assert np.array_equal(np.asarray(decode(make())), np.asarray(picture()))


def test_damage_of_a_png_with_a_long_text_is_still_damage() -> None:
    whole = _texts(1, 3_000_000)
    with pytest.raises(Undecodable, match=r"truncated image|corrupt image"):
        decode(whole[: len(whole) - 2000])


@pytest.mark.parametrize(
    ("data", "reason", "remedy"),
    [
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 90405\n", "Git LFS pointer", "git lfs pull"),
        (b"/annex/objects/SHA256E-s90405--0.jpg\n", "git-annex pointer", "git annex get"),
        (b"\n<!DOCTYPE html><html><body>404</body>", "HTML page", "fetch the image again"),
        (b"<?xml version='1.0'?><Error><Code>AccessDenied</Code>", "XML or SVG, not pixels", "fetch"),
        (b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "HEIC image", "pillow-heif"),
        (b"\xff\x0a\x00\x00", "JPEG XL image", "pillow-jxl-plugin"),
        (b"words and words", "not an image", "starts with b'words an'"),
    ],
)
def test_what_is_no_picture_is_named_with_the_way_out(data: bytes, reason: str, remedy: str) -> None:
    with pytest.raises(Undecodable) as caught:
        decode(data)
    assert caught.value.reason == reason and remedy in caught.value.detail
