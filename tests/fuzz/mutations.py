"""Damage for files of other people's making: at random, and below the checksums that would catch it."""

from __future__ import annotations

import gzip
import io
import json
import random
import re
import tarfile
import zipfile
import zlib
from collections.abc import Callable, Sequence

Mutation = Callable[[bytes, random.Random], bytes]

_NUMBERS = (0, 1, 2, *(2**bits + off for bits in (7, 8, 15, 16, 31, 32, 63, 64) for off in (-1, 0)))
_TEXTS = (
    "", "-1", "0", "1e999", "nan", ".inf", "null", "true", "~", "4000000000", str(-(2**63) - 1),
    "9" * 30, "9" * 5000, "[" * 200, "{" * 200, '{"a":' * 3000, "[" * 3000, '"', "'", ",", ":", "{}", "[]",
    "&a [*a, *a]", "*a", "<<: *a", "!!python/object:os.system", "!!binary x", "!!set {a}", "? [a]\n: b",
    "2020-01-01", "2020-13-45", "\n", "\r", "\x00", "\ufeff", "é", '"\\ud800"', "\x1b[2J",
    "=cmd|' /C calc'!A0", "<script>alert(1)</script>", "../../../etc/passwd", "/etc/passwd",
    "http://127.0.0.1:1/x", "file:///etc/passwd",
)  # fmt: skip
_LONGEST = 1 << 20
_KINDS = (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S", b"V")
_NAMES = ("../../up.jpg", "/etc/passwd", "a/../../b.jpg", "x" * 300, "\udcff.jpg", "")
_OTHER_NAMES = (".cls", "000000.json", "000000.cls", "a.tar", "000001.jpg", "n/0.jpg")


def mutated(data: bytes, others: Sequence[bytes], rng: random.Random) -> bytes:
    """One to six small damages; `others` are files of the same kind to take pieces from."""
    changed = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        _damage(changed, others, rng)
    return bytes(changed[:_LONGEST])


def _damage(data: bytearray, others: Sequence[bytes], rng: random.Random) -> None:
    at = _place(data, rng)
    match rng.randrange(9):
        case 0 if data:
            data[at % len(data)] ^= 1 << rng.randrange(8)
        case 1:
            width = rng.choice((1, 2, 4, 8))
            value = rng.choice(_NUMBERS) & (256**width - 1)
            data[at : at + width] = value.to_bytes(width, rng.choice(("little", "big")))
        case 2:
            del data[at:]
        case 3:
            del data[at : at + rng.choice((1, 4, 16, 512))]
        case 4:
            data[at:at] = data[at : at + rng.choice((1, 8, 64, 512))] * rng.choice((1, 2, 50))
        case 5:
            other = rng.choice(others)
            start = rng.randrange(len(other) + 1)
            data[at : at + rng.randrange(65)] = other[start : start + rng.randrange(513)]
        case 6:
            data[at:at] = rng.randbytes(rng.choice((1, 3, 16, 200)))
        case 7:
            data[at : at + rng.choice((0, 1, 4))] = rng.choice(_TEXTS).encode("utf-8", "surrogatepass")
        case _:
            data[at : at + 16] = bytes(16)


def _place(data: bytearray, rng: random.Random) -> int:
    """Anywhere, or among the first bytes, where headers are."""
    return rng.randrange(len(data) + 1) if rng.random() < 0.5 else rng.randrange(min(len(data), 128) + 1)


def text(data: bytes, rng: random.Random) -> bytes:
    """A word, number or line of a text replaced, left out or repeated."""
    pieces = re.split(r"(\W)", data.decode(errors="replace"))
    for _ in range(rng.choice((1, 1, 2, 4))):
        at = rng.randrange(len(pieces))
        match rng.randrange(4):
            case 0 | 1:
                pieces[at] = rng.choice(_TEXTS)
            case 2:
                pieces[at] = rng.choice(pieces)
            case _:
                pieces[at:at] = pieces[max(0, at - rng.randrange(40)) : at]
    return "".join(pieces).encode("utf-8", "replace")


def in_json(data: bytes, rng: random.Random) -> bytes:
    """One value of a JSON document replaced by another of any type."""
    document = {"": json.loads(data)}
    places: list[tuple[dict | list, str | int]] = []

    def walk(node: object) -> None:
        if isinstance(node, dict | list):
            for key, value in node.items() if isinstance(node, dict) else enumerate(node):
                places.append((node, key))
                walk(value)

    walk(document)
    for _ in range(rng.choice((1, 1, 2))):
        holder, key = rng.choice(places)
        odd = (None, True, -1, 0, 1.5, 2**63, 10**30, float("nan"), "", "../x", [], {}, [[]], {"a": 1}, "x" * 1000)
        holder[key] = rng.choice(odd)  # type: ignore[index]
    return json.dumps(document[""]).encode()


def in_zip(data: bytes, rng: random.Random) -> bytes:
    """A damaged member in a whole archive, whose checksum is of the damage."""
    with zipfile.ZipFile(io.BytesIO(data)) as archive:
        members = {info.filename: archive.read(info) for info in archive.infolist()}
    chosen = rng.choice(list(members))
    members[chosen] = mutated(members[chosen], list(members.values()), rng)
    if rng.random() < 0.1:
        members[rng.choice(("../../up", "/absolute", "x/../../y"))] = members.pop(chosen)
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w", rng.choice((zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED))) as archive:
        for name, content in members.items():
            archive.writestr(name, content)
    return out.getvalue()


def in_gzip(data: bytes, rng: random.Random) -> bytes:
    plain = gzip.decompress(data)
    return gzip.compress(mutated(plain, [plain], rng), 1, mtime=0)


def in_png(data: bytes, rng: random.Random) -> bytes:
    """Chunks of a PNG changed, with checksums that say they are right; other pictures as :func:`mutated`."""
    if not data.startswith(b"\x89PNG"):
        return mutated(data, [data], rng)
    at, chunks = 8, []
    while at + 12 <= len(data):
        length = int.from_bytes(data[at : at + 4], "big")
        chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + length]))
        at += 12 + length
    number = rng.randrange(len(chunks))
    kind, body = chunks[number]
    chunks[number] = kind, mutated(body, [body], rng)
    return data[:8] + b"".join(
        len(body).to_bytes(4, "big") + kind + body + zlib.crc32(kind + body).to_bytes(4, "big") for kind, body in chunks
    )


def in_safetensors(data: bytes, rng: random.Random) -> bytes:
    """Another header of the right length before the same tensors."""
    length = int.from_bytes(data[:8], "little")
    header = rng.choice((in_json, text))(data[8 : 8 + length], rng)
    return len(header).to_bytes(8, "little") + header + data[8 + length :]


def in_tar(data: bytes, rng: random.Random) -> bytes:
    """Members renamed, of other types, linked or damaged, in a tar whose checksums are right."""
    out = io.BytesIO()
    with tarfile.open(fileobj=io.BytesIO(data)) as given, tarfile.open(fileobj=out, mode="w") as made:
        for member in given:
            content = given.extractfile(member)
            body = content.read() if content else b""
            if rng.random() < 0.4:
                match rng.randrange(6):
                    case 0:
                        member.name = rng.choice(
                            ("../../up.jpg", "/etc/passwd", "a/../../b.jpg", "x" * 300, "\udcff.jpg", "")
                        )
                    case 1:
                        member.type = rng.choice(
                            (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.CHRTYPE, tarfile.FIFOTYPE, b"S", b"V")
                        )
                        member.linkname = rng.choice(("/etc/passwd", "../../x", member.name))
                    case 2:
                        body = mutated(body, [body], rng)
                    case 3:
                        member.name = member.name.replace("0", rng.choice(("", ".", "..", "/", "é", "<b>", "=1+1")))
                    case 4:
                        body = text(body, rng)
                    case _:
                        member.name = rng.choice(_OTHER_NAMES)
            member.size = len(body) if member.isreg() else 0
            made.addfile(member, io.BytesIO(body) if member.isreg() else None)
    return out.getvalue()


def in_facts(data: bytes, rng: random.Random) -> bytes:
    """What a safetensors file of ours says of its network."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    header["__metadata__"]["facts"] = in_json(header["__metadata__"]["facts"].encode(), rng).decode()
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data[8 + length :]
