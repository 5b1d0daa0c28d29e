"""Row groups of latents with the encoded image that each row was made of beside it.

Parts of latents hold the rows of the shards' parts in their order, so the place of a row in one is
its place in the other: nothing is looked up by key, and the order of rows is the latents' own.
"""

from __future__ import annotations

from configs.errors import UserError
from tasks.loading.row_groups import Columns, RowGroupReader

IMAGE = "image"


class ReaderWithImages:
    """Reads as the reader of latents, with the column `image` of the shards that they are from.

    Raises UserError where the shards do not hold the latents' rows.
    """

    def __init__(self, latents: RowGroupReader, shards: RowGroupReader) -> None:
        self._latents, self._shards = latents, shards
        self._numbers = {(part, group): at for at, (part, group, _) in enumerate(shards.index)}
        self._parts = {entry.path: part for part, entry in enumerate(shards.parts)}
        stored = {entry.path: entry.rows for entry in shards.parts}
        for entry in latents.parts:
            if (rows := stored.get(entry.path, "no")) != entry.rows:
                raise UserError(
                    f"{shards.artifact.uri}/{entry.path} has {rows} rows and the latents made of "
                    f"it in {latents.artifact.uri} have {entry.rows}: run encode again with these "
                    "shards"
                )

    def read(self, number: int) -> Columns:
        """Row group `number` of the latents. Raises UserError as both readers do."""
        latents, shards = self._latents, self._shards
        part, group, rows = latents.index[number]
        same = self._parts[latents.parts[part].path]
        first, per_group = group * latents.rows_per_group, shards.rows_per_group
        groups = range(first // per_group, -(-(first + rows) // per_group))
        images = [i for group in groups for i in shards.read(self._numbers[same, group])[IMAGE]]
        skipped = first % per_group
        return latents.read(number) | {IMAGE: images[skipped : skipped + rows]}
