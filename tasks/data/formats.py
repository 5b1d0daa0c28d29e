"""Which files are pictures, by their names and by how they begin; nothing is decoded."""

from __future__ import annotations

import re

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
PICTURES = frozenset(_PICTURES.split())
"""Suffixes of pictures, those that need a package more among them."""
OTHERS = frozenset(_OTHERS.split())
"""Suffixes of what is no picture whatever it holds; files with any other suffix are judged by how they begin."""
_HEADS = (
    b"\xff\xd8\xff", b"\x89PNG\r\n", b"GIF8", b"BM", b"II*\0", b"MM\0*", b"8BPS", b"\0\0\0\x0cjP  ", b"\0\0\0\x0cJXL ",
    b"\xff\x0a", b"qoif", b"DDS ",
)  # fmt: skip
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


def looks_like_picture(head: bytes) -> bool:
    """Whether a file that begins like this is a picture, readable here or not."""
    return (
        head.startswith(_HEADS)
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
    if head[4:8] == b"ftyp" and _BRANDS.get(head[8:12]) == "HEIC":
        return "HEIC image", "install pillow-heif to have it read, or convert it to JPEG or PNG"
    if head.startswith((b"\0\0\0\x0cJXL ", b"\xff\x0a")):
        return "JPEG XL image", "install pillow-jxl-plugin to have it read, or convert it to JPEG or PNG"
    return None
