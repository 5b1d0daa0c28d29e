"""Formats beside the common ones: read where something that is installed reads them, else named with the way out."""

from __future__ import annotations

import base64
import struct
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, features

from configs import UserError
from tasks.data import formats
from tasks.data.decode import Undecodable, _to_rgb, decode
from tasks.sources.folder import FolderSource
from tests.helpers.odd_sources import listed, recipe_of, tree
from tests.helpers.piles import encoded, picture

# Real files of 16 × 16: red in the first quarter, else a ramp of greys. Written by libheif, libjxl and libavif.
HEIC = base64.b64decode(
    "AAAAHGZ0eXBoZWljAAAAAG1pZjFoZWljbWlhZgAAAXxtZXRhAAAAAAAAACFoZGxyAAAAAAAAAABwaWN0AAAAAAAAAA"
    "AAAAAAAAAAACJpbG9jAAAAAERAAAEAAQAAAAABoAABAAAAAAAAAK0AAAAjaWluZgAAAAAAAQAAABVpbmZlAgAAAAAB"
    "AABodmMxAAAAAA5waXRtAAAAAAABAAAA/GlwcnAAAADcaXBjbwAAAHVodmNDAQNwAAAAkAAAAAAAHvAA/P34+AAADw"
    "NgAAEAGEABDAH//wNwAAADAJAAAAMAAAMAHroCQGEAAQApQgEBA3AAAAMAkAAAAwAAAwAeoCCBBZbqrprm4CGgwIAA"
    "AAyAAAADAIRiAAEABkQBwXPBiQAAABNjb2xybmNseAABAA0ABoAAAAAUaXNwZQAAAAAAAABAAAAAQAAAAChjbGFwAA"
    "AAEAAAAAEAAAAQAAAAAf///9AAAAAC////0AAAAAIAAAAQcGl4aQAAAAADCAgIAAAAGGlwbWEAAAAAAAAAAQABBYEC"
    "AwWEAAAAtW1kYXQAAACpKAGvBjIe4QNQ8UZQKPb5Bv//8Bn0PtIom5g3aHldDy6vyflyDyW9WH33aa//xjEAJuxIn+"
    "Cfe5nTjNdE/P3EN/p/+i0Cxmq7XsxUiHD3vH7QS+E8Hwth6QK1GiZu2zjNgLui4f9AYvsJdVa1wb7cgIsdlpT7XPqj"
    "MsvUs392YkRw3I6pcnXjJVzgFplJPkq6E1DHixpU4cCp5CwsvBZoVQQmVeC6DSoJQw=="
)
JXL = base64.b64decode(
    "/wpDBgAViAIA9AG1nyAAABUqo4wbvJzr+fJDh8W0jesMbbVtYQljs70wSEg4g23zLphunqj73rdICqiPuiWQCwfngU"
    "XB2hDbdamQAhlwxJmRMeguRio9HBhA0w3tnkA3ZnGKKe7/CzQ66kV0ET386wY2iCFWonTAqGSbtwGdwSka9ir/M9jV"
    "AA=="
)
AVIF = base64.b64decode(
    "AAAAIGZ0eXBhdmlmAAAAAGF2aWZtaWYxbWlhZk1BMUIAAADrbWV0YQAAAAAAAAAhaGRscgAAAAAAAAAAcGljdAAAAA"
    "AAAAAAAAAAAAAAAAAOcGl0bQAAAAAAAQAAAB5pbG9jAAAAAEQAAAEAAQAAAAEAAAETAAAAVwAAAChpaW5mAAAAAAAB"
    "AAAAGmluZmUCAAAAAAEAAGF2MDFDb2xvcgAAAABqaXBycAAAAEtpcGNvAAAAFGlzcGUAAAAAAAAAEAAAABAAAAAQcG"
    "l4aQAAAAADCAgIAAAADGF2MUOBAAwAAAAAE2NvbHJuY2x4AAEADQAGgAAAABdpcG1hAAAAAAAAAAEAAQQBAoMEAAAA"
    "X21kYXQSAAoJGAz/2iAhoNCAMkgSB/f2qQCCCD5AAADJY33dVdxqjKC5vrvhNJ9YZ9m0kOv36i5T1SdSsm0MJYDZBy"
    "8ISJn8okAPnzSiiNnFZj6Qwkn7vaIs11A="
)
PACKAGES = {"heic": (HEIC, "pillow_heif", "HEIC image"), "jxl": (JXL, "pillow_jxl", "JPEG XL image")}


def _is_ours(image: Image.Image) -> bool:
    pixels = np.asarray(image).astype(int)
    ramp = 8 * np.add(*np.mgrid[0:16, 0:16])[8:, 8:]
    near = np.abs(pixels[8:, 8:] - ramp[..., None]).max() < 12 and np.abs(pixels[3, 3] - (255, 0, 0)).max() < 12
    return image.mode == "RGB" and image.size == (16, 16) and bool(near)


@pytest.mark.parametrize("suffix", PACKAGES)
def test_formats_of_packages_are_read_where_those_are_installed(suffix: str, tmp_path: Path) -> None:
    data, package, _ = PACKAGES[suffix]
    pytest.importorskip(package)
    assert _is_ours(decode(data))
    tree(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / f"photo.{suffix}").write_bytes(data)
    listing = listed(recipe_of("folder", tmp_path, 2))
    assert f"a/photo.{suffix}" in listing.images["key"].to_pylist() and not listing.refused


@pytest.mark.parametrize("suffix", PACKAGES)
def test_and_named_with_the_package_where_they_are_not(suffix: str, tmp_path: Path) -> None:
    data, package, reason = PACKAGES[suffix]
    if find_spec(package) is not None:
        pytest.skip(f"{package} is installed")
    with pytest.raises(Undecodable) as caught:
        decode(data)
    assert caught.value.reason == reason and package.split("_")[1] in caught.value.detail
    tree(tmp_path, {"a": 1, "b": 1})
    for name in (f"a/photo.{suffix}", f"b/PHOTO.{suffix.upper()}", "b/no suffix"):
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UserError, match=rf"3 of 5 images are unusable before any is read \(3 {reason}.*install pillow"):
        listed(recipe_of("folder", tmp_path, 2))


@pytest.mark.skipif(not features.check("avif"), reason="this Pillow was built without AVIF")
def test_avif_is_read_by_pillow_itself(tmp_path: Path) -> None:
    assert _is_ours(decode(AVIF)) and formats.unreadable("avif") is None
    tree(tmp_path, {"a": 0, "b": 0})
    for name in ("a/photo.avif", "b/no suffix"):
        (tmp_path / name).write_bytes(AVIF)
    assert FolderSource(str(tmp_path)).listing().images.num_rows == 2


def test_avif_is_named_where_pillow_lacks_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(features, "check", lambda name: False)
    formats._reads.cache_clear()
    assert formats.unreadable("avif") == ("AVIF image", formats._AVIF[1])
    formats._reads.cache_clear()


def _tiff(*tags: tuple[int, int, int]) -> bytes:
    """A grey TIFF of 8 × 8, with more tags (number, type, value)."""
    own = [(256, 3, 8), (257, 3, 8), (258, 3, 8), (259, 3, 1), (262, 3, 1), (278, 3, 8), (279, 4, 64)]
    entries = sorted([*own, *tags, (273, 4, 0)])
    start = 8 + 2 + 12 * len(entries) + 4
    lines = [struct.pack("<HHII", n, kind, 1, start if n == 273 else value) for n, kind, value in entries]
    return b"II*\0\x08\0\0\0" + struct.pack("<H", len(entries)) + b"".join(lines) + bytes(4) + bytes(range(64))


@pytest.mark.parametrize(
    "data",
    [
        _tiff((50706, 1, 0x00000401)),
        _tiff((254, 4, 1)),
        b"II*\0\x10\0\0\0CR\x02\0" + bytes(60),
        b"FUJIFILMCCD-RAW 0201" + bytes(60),
        b"\0\0\0\x18ftypcrx \0\0\0\1crx isom",
        b"IIU\0" + bytes(60),
    ],
    ids=["DNG", "a preview before the rest (NEF, ARW)", "CR2", "RAF", "CR3", "RW2"],
)
def test_raw_files_of_cameras_are_not_taken_for_their_previews(data: bytes) -> None:
    with pytest.raises(Undecodable) as caught:
        decode(data)
    assert caught.value.reason == "camera raw image" and "PNG or JPEG" in caught.value.detail


def test_a_plain_tiff_is_none() -> None:
    assert decode(_tiff()).size == (8, 8)
    assert decode(_tiff((254, 4, 0))).size == (8, 8)


def test_raw_files_are_told_before_any_is_read(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 1, "b": 1})
    for name in ("a/DSC_0001.NEF", "b/IMG_0001.CR2", "b/IMG.dng"):
        (tmp_path / name).write_bytes(_tiff((254, 4, 1)))
    with pytest.raises(UserError, match=r"3 of 5 .*3 camera raw image.*convert it to PNG or JPEG"):
        listed(recipe_of("folder", tmp_path, 2))


def test_photoshop_files_show_all_their_layers(tmp_path: Path) -> None:
    header = b"8BPS" + struct.pack(">H6xHIIHH", 1, 3, 8, 16, 8, 3)
    planes = b"".join(bytes([value]) * 128 for value in (200, 100, 50))
    data = header + bytes(12) + b"\0\0" + planes
    image = decode(data)
    assert image.size == (16, 8) and image.getpixel((5, 5)) == (200, 100, 50)
    tree(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "poster.psd").write_bytes(data)
    assert listed(recipe_of("folder", tmp_path, 2)).images.num_rows == 3


def test_drawings_are_left_out_by_name_and_told_by_content(tmp_path: Path) -> None:
    svg = b'<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
    tree(tmp_path, {"a": 1, "b": 1})
    (tmp_path / "a" / "logo.svg").write_bytes(svg)
    listing = listed(recipe_of("folder", tmp_path, 2))
    assert listing.left_out == {"no picture (.svg)": 1} and listing.images.num_rows == 2
    (tmp_path / "b" / "logo.png").write_bytes(svg)
    with pytest.raises(UserError, match=r"1 XML or SVG, not pixels.*draw it as PNG"):
        listed(recipe_of("folder", tmp_path, 2))


def test_a_tiff_of_several_pages_gives_its_first() -> None:
    pages = [picture(1), picture(2)]
    data = encoded(pages[0], "TIFF", save_all=True, append_images=pages[1:])
    assert np.array_equal(np.asarray(decode(data)), np.asarray(pages[0]))


COLOUR, GREY = (200, 100, 50), (124, 124, 124)
MODES = {
    **dict.fromkeys(("RGB", "RGBA", "RGBX", "RGBa", "P", "PA", "CMYK", "YCbCr", "HSV"), COLOUR),
    **dict.fromkeys(("L", "LA", "I", "F", "I;16"), GREY),
}


@pytest.mark.parametrize("mode", MODES)
def test_every_mode_becomes_rgb(mode: str) -> None:
    """The fourteen modes that Pillow knows and files come in, beside black and white."""
    plain = Image.new("RGB", (8, 8), COLOUR)
    if mode == "I;16":
        image = Image.fromarray(np.full((8, 8), 124 * 257, np.uint16))
    elif mode in ("I", "F", "LA", "PA", "RGBa"):
        first = {"I": "L", "F": "L", "LA": "L", "RGBa": "RGBA"}.get(mode)
        image = (plain.quantize(4) if first is None else plain.convert(first)).convert(mode)
    elif mode == "P":
        image = plain.quantize(4)
    else:
        image = plain.convert(mode)
    assert image.mode == mode
    found = np.asarray(_to_rgb(image)).astype(int)
    assert found.shape == (8, 8, 3) and np.abs(found - MODES[mode]).max() <= 3
