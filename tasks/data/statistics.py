"""Mean and standard deviation of latents by channel, exact over all rows: float64 sums of each part, merged in the
parts' order.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeVar

import numpy as np

from configs.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class ChannelSums:
    """Count, sum and sum of squares per channel, float64, of one part of the data. Plain JSON by `vars`."""

    count: int
    """Values per channel: rows × height × width."""
    total: list[float]
    squares: list[float]

    @classmethod
    def of(cls, values_NChw: np.ndarray) -> ChannelSums:
        """Of the values as they are stored, so that what was rounded to float16 counts as rounded."""
        channels = values_NChw.shape[1]
        total, squares = np.zeros(channels), np.zeros(channels)
        for start in range(0, len(values_NChw), 256):  # a float64 copy of a whole part would be four times its size
            piece = values_NChw[start : start + 256].astype(np.float64)
            total += piece.sum(axis=(0, 2, 3))
            squares += np.square(piece).sum(axis=(0, 2, 3))
        return cls(values_NChw.size // max(1, channels), total.tolist(), squares.tolist())

    @classmethod
    def of_averages(cls, values_NChw: np.ndarray) -> dict[int, ChannelSums]:
        """Of averages over 2 × 2, 4 × 4 … cells, by the side that leaves, for as long as a side halves."""
        found: dict[int, list[ChannelSums]] = {}
        for start in range(0, len(values_NChw), 256):
            piece = values_NChw[start : start + 256].astype(np.float64)
            while piece.shape[-1] % 2 == 0:
                pairs = piece.reshape(*piece.shape[:2], piece.shape[2] // 2, 2, piece.shape[3] // 2, 2)
                piece = pairs.mean(axis=(3, 5))
                found.setdefault(piece.shape[-1], []).append(cls.of(piece))
        return {side: cls.merged(pieces) for side, pieces in found.items()}

    @classmethod
    def merged(cls, parts: Iterable[ChannelSums]) -> ChannelSums:
        """The sums of all parts. The order of the parts fixes the last bit, so give them in theirs."""
        merging = Merging()
        for part in parts:
            merging.add(part)
        return merging.sums()

    def mean_and_std(self) -> dict[str, Any]:
        """`mean`, `std` (population) and `count`, as a manifest's facts store them."""
        mean = np.array(self.total) / self.count
        variance = np.maximum(np.array(self.squares) / self.count - np.square(mean), 0.0)
        return {"mean": mean.tolist(), "std": np.sqrt(variance).tolist(), "count": self.count}


class Merging:
    """:meth:`ChannelSums.merged` of parts that come one by one, in their order."""

    def __init__(self) -> None:
        self._count = 0
        self._total: list[np.ndarray] = []
        self._squares: list[np.ndarray] = []

    def add(self, part: ChannelSums) -> None:
        self._count += part.count
        for held, values in ((self._total, part.total), (self._squares, part.squares)):
            held.append(np.array(values))
            if len(values) > 1:  # added one after the other, as numpy does; it adds plain numbers in pairs
                held[:] = [np.sum(held, axis=0)]

    def sums(self) -> ChannelSums:
        total, squares = np.sum(self._total, axis=0), np.sum(self._squares, axis=0)
        return ChannelSums(self._count, total.tolist(), squares.tolist())


def statistics_hash(statistics: Mapping[str, Any]) -> str:
    """A name for exactly these statistics; stored beside them and in every checkpoint trained on them."""
    return hashlib.sha256(json.dumps(statistics, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class LatentStatistics:
    """Mean and standard deviation per channel of each latent column, texture `z` first, semantic `s` last."""

    values: Mapping[str, Mapping[str, Any]]
    """{"z": {"mean": [C], "std": [C], "count": n}, "s": …} in the columns' order."""

    @classmethod
    def from_facts(cls, facts: Mapping[str, Any], where: str = "the latents") -> LatentStatistics:
        """From a manifest's facts.

        Raises:
            UserError: they are missing, do not have the hash stored beside them, or cannot normalise anything.
        """
        if "statistics" not in facts or "statistics_hash" not in facts:
            raise UserError(f"{where}: the manifest has no latent statistics; run stage encode again")
        values = {name: facts["statistics"][name] for name in ("z", "s") if name in facts["statistics"]}
        found = cls(values)
        if found.hash != facts["statistics_hash"]:
            raise UserError(
                f"{where}: latent statistics have hash {found.hash} but {facts['statistics_hash']} is stored beside "
                "them: they were changed; run stage encode again"
            )
        return found

    @classmethod
    def of_averages(cls, facts: Mapping[str, Any], side: int, where: str = "the latents") -> LatentStatistics:
        """Of the latents' averages on a coarser grid of this side, from a manifest's facts.

        Raises:
            UserError: there are none of this side, or they were changed.
        """
        try:
            stored = facts["averages"][str(side)]
        except KeyError:
            raise UserError(f"{where}: no statistics of averages of side {side}; run stage encode again") from None
        values = {name: stored["statistics"][name] for name in ("z", "s") if name in stored["statistics"]}
        return cls.from_facts({"statistics": values, "statistics_hash": stored["statistics_hash"]}, where)

    @property
    def columns(self) -> tuple[str, ...]:
        return tuple(self.values)

    @cached_property
    def hash(self) -> str:
        return statistics_hash(self.values)

    def check(self, other: str, where: str) -> None:
        """Refuse to go on with something made for other statistics, by their hash. Raises UserError."""
        if other != self.hash:
            raise UserError(
                f"{where} was made for latents with statistics {other}, but these latents have {self.hash}: "
                "use the artifacts of one run, or train again"
            )

    def mean(self, columns: Sequence[str] | None = None) -> np.ndarray:
        """float32 (C,) over the concatenated `columns` (all by default)."""
        return self._joined("mean", columns)

    def std(self, columns: Sequence[str] | None = None) -> np.ndarray:
        """float32 (C,); a channel that never changes counts as 1."""
        std = self._joined("std", columns)
        return np.where(std > 0, std, 1.0).astype(np.float32)

    def normalise(self, x_BCHW: T, columns: Sequence[str] | None = None) -> T:
        """(x − mean) / std in float32, for numpy and torch alike; channels are those of `columns`, concatenated."""
        mean, std = self._like(x_BCHW, columns)
        return (_float32(x_BCHW) - mean) / std

    def denormalise(self, x_BCHW: T, columns: Sequence[str] | None = None) -> T:
        """x × std + mean in float32: the inverse of :meth:`normalise`."""
        mean, std = self._like(x_BCHW, columns)
        return _float32(x_BCHW) * std + mean

    def _joined(self, name: str, columns: Sequence[str] | None) -> np.ndarray:
        chosen = self.columns if columns is None else columns
        return np.concatenate([np.asarray(self.values[column][name]) for column in chosen]).astype(np.float32)

    def _like(self, x: Any, columns: Sequence[str] | None) -> tuple[Any, Any]:
        """Mean and std as (C, 1, 1) of the kind of `x`. Raises ValueError on another number of channels."""
        mean, std = (values.reshape(-1, 1, 1) for values in (self.mean(columns), self.std(columns)))
        if x.shape[-3] != len(mean):
            raise ValueError(f"latents have {x.shape[-3]} channels, their statistics {len(mean)} ({self.columns})")
        if isinstance(x, np.ndarray):
            return mean, std
        import torch

        return torch.from_numpy(mean).to(x.device), torch.from_numpy(std).to(x.device)


def _float32(x: Any) -> Any:
    return x.astype(np.float32) if isinstance(x, np.ndarray) else x.float()
