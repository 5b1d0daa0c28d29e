"""Damaged files thrown at one parser: nothing but a refusal, not for long, in little memory, and nothing outside."""

from __future__ import annotations

import argparse
import os
import random
import resource
import shutil
import signal
import sys
import tempfile
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

from tests.fuzz.targets import TARGETS

SECONDS = 10.0
"""Of all processors together that reading one file may take; a wall clock would measure who else is at work."""
MEMORY = 256 << 20
"""Bytes that reading any of these files, all far below a MiB, may add to the process."""
_LONGEST = 10_000
"""Characters of a refusal, which names every fault of a recipe."""
_CEILING = 6 << 30
"""Bytes of data beside what the process has (a gigabyte of threads' stacks, after other tests) at which the system
refuses more, so that a bomb kills nobody else."""


class Hangs(BaseException):
    """Reading took longer than :data:`SECONDS`; no parser's `except Exception` may take it for damage."""


def attacked(name: str, count: int, seed: int, keep: Path | None = None) -> list[str]:
    """What was found wrong, a line each.

    Args:
        name: of the target.
        count: inputs to try.
        seed: with the target's name and an input's number it gives the input.
        keep: a folder for the inputs that found something, and for the one being read.
    """
    found: list[str] = []
    with tempfile.TemporaryDirectory(prefix="fuzz-") as place, _watched():
        for number, whole in enumerate(TARGETS[name].seeds()):  # which also imports what reading needs
            if fault := read(name, whole, Path(place), number, whole=True):
                found.append(f"{name}: the whole file {number}: {fault}")
        for number in range(count):
            data = given(name, seed, number)
            if keep is not None:
                (keep / f"{name}.reading").write_bytes(data)
            if fault := read(name, data, Path(place), number):
                found.append(f"{name} {seed} {number}: {fault}")
                if keep is not None:
                    (keep / f"{name}-{seed}-{number}").write_bytes(data)
    return found


def given(name: str, seed: int, number: int) -> bytes:
    return TARGETS[name].input(random.Random(f"{name} {seed} {number}"))


def read(name: str, data: bytes, place: Path, number: int = 0, whole: bool = False) -> str:
    """What is wrong with how this input is read; empty where nothing is.

    whole: it is undamaged, so that even a refusal is wrong, and memory goes to imports.
    """
    target = TARGETS[name]
    inside = place / f"{number:06d}"
    inside.mkdir()
    path = inside / f"input{target.suffix}"
    path.write_bytes(data)
    before, told = _status("VmHWM"), ""
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        target.read(path)
    except target.refusals as refusal:
        told = f"refused: {refusal}" if whole else _plain(refusal)
    except Hangs:
        told = f"took more than {SECONDS:g} s"
    except BaseException as error:
        told = f"{type(error).__name__}: {str(error)[:300]}{_where(error)}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
    if (grown := _status("VmHWM") - before) > MEMORY and not whole:
        told = told or f"took {grown >> 20} MiB"
    if strange := [str(each.relative_to(place)) for each in place.iterdir() if each != inside]:
        told = told or f"wrote {strange} outside its folder"
    shutil.rmtree(inside)
    return told


def _plain(refusal: Exception) -> str:
    """A refusal is a line for people: of a length that is read, without what a terminal would obey."""
    text = str(refusal)
    if len(text) > _LONGEST:
        return f"refused in {len(text):,} characters"
    odd = sorted({char for char in text if not char.isprintable() and char not in "\n"})
    return f"refused with {odd} in the message" if odd and "\x1b" in odd else ""


def _where(error: BaseException) -> str:
    frames = traceback.extract_tb(error.__traceback__)
    own = [frame for frame in frames if "/tests/fuzz/" not in frame.filename and "site-packages" not in frame.filename]
    frame = (own or frames)[-1]
    return f" at {Path(frame.filename).name}:{frame.lineno} ({frame.line})"


@contextmanager
def _watched() -> Iterator[None]:
    """Time and memory are limited, and the peak of memory counts from here on."""

    def hangs(number: int, frame: FrameType | None) -> None:
        raise Hangs

    old_handler = signal.signal(signal.SIGPROF, hangs)
    old_limits = resource.getrlimit(resource.RLIMIT_DATA)
    hard = old_limits[1]
    ceiling = _status("VmData") + _CEILING
    resource.setrlimit(resource.RLIMIT_DATA, (ceiling if hard < 0 else min(ceiling, hard), hard))
    try:
        Path("/proc/self/clear_refs").write_text("5")  # the peak becomes what there is now
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_DATA, old_limits)
        signal.signal(signal.SIGPROF, old_handler)


def _status(field: str) -> int:
    """Bytes that the system says of this process: VmData has, VmHWM had at most in memory."""
    status = Path("/proc/self/status").read_text()
    return int(status.partition(f"{field}:")[2].split()[0]) << 10


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*")
    parser.add_argument("--count", type=int, default=1000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    arguments = parser.parse_args()
    os.environ["LATENTFORGE_HOME"] = tempfile.mkdtemp(prefix="fuzz-home-")

    found = []
    for name in arguments.names or TARGETS:
        found += attacked(name, arguments.count, arguments.seed, arguments.keep)
    print("\n".join(found))
    shutil.rmtree(os.environ["LATENTFORGE_HOME"])
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
