"""Which files are pictures, by their names and by how they begin; nothing is decoded."""

from __future__ import annotations

import re
from functools import lru_cache
from importlib.util import find_spec

_PICTURES = """
jpg jpeg jpe jfif png webp gif bmp dib tif tiff ppm pgm pbm pnm jp2 j2k jpx tga ico icns avif avifs psd dds qoi pcx sgi
heic heif hif jxl
"""
_OTHERS = """
txt md rst json jsonl json5 xml yaml yml toml ini cfg csv tsv xls xlsx doc docx pdf html htm css js svg eps ai
py ipynb sh m mat c h cpp pkl pickle npy npz pt pth ckpt bin h5 hdf5 tfrecord parquet arrow lmdb mdb db sqlite
ogg mp3 wav flac m4a mp4 avi mov mkv webm mpg mpeg zip tar gz tgz bz2 xz 7z rar zst sha1 sha256 md5 log lock
dvc idx caffemodel cls
"""
_RAWS = """
3fr arw cr2 cr3 crw dng erf iiq kdc mef mos mrw nef nrw orf pef raf rw2 rwl sr2 srf srw x3f
"""
_RAW = frozenset(_RAWS.split())
"""Of cameras, whose pixels have to be developed."""
PICTURES = frozenset(_PICTURES.split()) | _RAW
"""Suffixes of pictures, those that need a package more, or to be developed, among them."""
OTHERS = frozenset(_OTHERS.split())
"""Suffixes of what is no picture whatever it holds; files with any other suffix are judged by how they begin."""
_HEADS = (
    b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"8BPS", b"\0\0\0\x0cjP  ", b"\0\0\0\x0cJXL ",
    b"\xff\x0a", b"qoif", b"DDS ",
)  # fmt: skip
_RAW_HEADS = (b"II*\0\x10\0\0\0CR", b"FUJIFILMCCD-RAW", b"IIU\0", b"IIRO", b"IIRS", b"FOVb", b"HEAPCCDR")
CAMERA_RAW = "camera raw image", "its pixels have to be developed: convert it to PNG or JPEG (darktable-cli does)"
_HEIC = "HEIC image", "install pillow-heif to have it read, or convert it to JPEG or PNG"
_JXL = "JPEG XL image", "install pillow-jxl-plugin to have it read, or convert it to JPEG or PNG"
_AVIF = "AVIF image", "this Pillow was built without it: install Pillow's own wheel, or convert it to JPEG or PNG"
_NEED = {"heic": _HEIC, "heif": _HEIC, "hif": _HEIC, "jxl": _JXL, "avif": _AVIF, "avifs": _AVIF}
_BRANDS = {b"avif": "AVIF", b"avis": "AVIF"} | dict.fromkeys(
    (b"heic", b"heix", b"hevc", b"heim", b"heis", b"mif1", b"msf1"), "HEIC"
)
HEAD_BYTES = 64
POINTER_BYTES = 200
"""No file above this is taken for a pointer."""


def suffix(name: str) -> str:
    """Of the last part of a name, small, without the dot; empty where there is none."""
    last = name.rpartition("/")[2]
    return last.rpartition(".")[2].lower() if "." in last else ""


def unreadable(suffix: str) -> tuple[str, str] | None:
    """Reason and remedy where nothing that is installed reads pictures of this suffix; None where something does."""
    if suffix in _RAW:
        return CAMERA_RAW
    found = _NEED.get(suffix)
    return None if found is None or _reads(found[0]) else found


@lru_cache
def _reads(what: str) -> bool:
    if what == _AVIF[0]:
        from PIL import features

        return bool(features.check("avif"))
    return find_spec("pillow_heif" if what == _HEIC[0] else "pillow_jxl") is not None


def looks_like_picture(head: bytes) -> bool:
    """Whether a file that begins like this is a picture, readable here or not."""
    return (
        head.startswith((*_HEADS, *_RAW_HEADS))
        or (head[:4] == b"RIFF" and head[8:12] == b"WEBP")
        or (head[4:8] == b"ftyp" and head[8:12] in _BRANDS)
        or bool(re.match(rb"P[1-6]\s", head))
    )


def what_instead(head: bytes) -> tuple[str, str] | None:
    """Reason and remedy where the head of an alleged picture shows what it is instead; None where it does not."""
    text = head.lstrip().lower()
    if head.startswith(b"version https://git-lfs"):
        return "Git LFS pointer", "the image was not downloaded: run `git lfs pull` in the clone"
    if re.match(rb"(\.\./)*(\.git/annex|/annex)/objects/", head):
        return "git-annex pointer", "the image was not downloaded: run `git annex get .` in the clone"
    if text.startswith((b"<!doctype html", b"<html")):
        return "HTML page", "a download was answered by a page: fetch the image again"
    if text.startswith((b"<?xml", b"<svg", b"<error")):
        return "XML or SVG, not pixels", "fetch the image again, or draw it as PNG"
    if head.startswith(_RAW_HEADS) or head[4:12] == b"ftypcrx ":
        return CAMERA_RAW
    if head[4:8] == b"ftyp" and (suffix := _BRANDS.get(head[8:12], "").lower()):
        return unreadable(suffix)
    if head.startswith((b"\0\0\0\x0cJXL ", b"\xff\x0a")):
        return unreadable("jxl")
    return None
