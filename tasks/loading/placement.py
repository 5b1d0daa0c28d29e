"""Rows on their way to where they are wanted: from a file whose layout is known, in one copy from its pages.

Reads are by position, never through a mapping. A process that reads through a mapping is killed without a word when
the file is cut off under it; a read comes back short, and can be refused by name.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import BinaryIO

import numpy as np

_MOST_PLACES = os.sysconf("SC_IOV_MAX")
"""Buffers that one reading call takes."""


def read_into(file: BinaryIO, offset: int, places: Sequence[memoryview]) -> None:
    """Fill buffers of bytes, one after the other, with what a file holds from `offset` on.

    The file's own position does not move. Raises EOFError where the file ends earlier.
    """
    left = list(places)
    while left:
        some = left[:_MOST_PLACES]
        got = os.preadv(file.fileno(), some, offset)
        if not got:
            raise EOFError(f"it ends {sum(map(len, left))} bytes before the end of what was to be read")
        offset += got
        if got == sum(map(len, some)):
            left = left[len(some) :]
            continue
        while got >= len(left[0]):
            got -= len(left.pop(0))
        left[0] = left[0][got:]


@dataclass(frozen=True)
class Placement:
    """Some rows of a row group, and where the values of each go."""

    rows: np.ndarray
    """int (n,), ascending."""
    places: list[memoryview]
    """n times the bytes of one row."""

    def fill_from(self, values: np.ndarray) -> None:
        """From the whole group's values, (rows of the group, values of a row)."""
        data = values.view(np.uint8)
        for place, row in zip(self.places, self.rows.tolist(), strict=True):
            place[:] = data[row].data

    def fill_from_file(self, file: BinaryIO, offset: int) -> None:
        """From a file in which the group's rows begin at `offset`. Raises EOFError as :func:`read_into`."""
        width = len(self.places[0])
        cuts = np.flatnonzero(np.diff(self.rows) != 1) + 1  # what is not wanted is not read
        for start, stop in pairwise([0, *cuts.tolist(), len(self.rows)]):
            read_into(file, offset + int(self.rows[start]) * width, self.places[start:stop])
