"""Row groups of latents with the encoded image that each row was made of beside it.

Parts of latents hold the rows of the shards' parts in their order, so the place of a row in one is
its place in the other: nothing is looked up by key, and the order of rows is the latents' own.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from configs.errors import UserError
from infra.artifacts import Artifact
from tasks.loading.row_groups import Columns, RowGroupReader, Wanted

IMAGE = "image"


class ReaderWithImages(RowGroupReader):
    """Reads latents, and the column `image` of the shards that they are from.

    Raises UserError where the shards do not hold the latents' rows.
    """

    def __init__(self, shards: Artifact, artifact: Artifact, split: str, *options: Any) -> None:
        super().__init__(artifact, split, *options)
        self._shards = RowGroupReader(shards, split, [IMAGE], {}, self.cache_bytes)
        self._parts = {entry.path: part for part, entry in enumerate(self._shards.parts)}
        self._numbers = {at[:2]: number for number, at in enumerate(self._shards.index)}
        stored = {entry.path: entry.rows for entry in self._shards.parts}
        for entry in self.parts:
            if (rows := stored.get(entry.path, "no")) != entry.rows:
                raise UserError(
                    f"{shards.uri}/{entry.path} has {rows} rows and the latents made of it in "
                    f"{artifact.uri} have {entry.rows}: run encode again with these shards"
                )

    def read(self, number: int, wanted: Wanted, kept: Columns | None = None) -> Columns:
        """As of latents alone. Raises UserError as both readers do."""
        return super().read(number, wanted, kept or {IMAGE: self._images(number)})

    def _images(self, number: int) -> np.ndarray:
        part, group, rows = self.index[number]
        same, per_group = self._parts[self.parts[part].path], self._shards.rows_per_group
        first, skipped = divmod(group * self.rows_per_group, per_group)
        groups = range(first, first - (-(skipped + rows) // per_group))
        read = [self._shards.read(self._numbers[same, group], {})[IMAGE] for group in groups]
        return np.concatenate(read)[skipped : skipped + rows]
