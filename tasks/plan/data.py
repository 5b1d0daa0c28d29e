"""How many images a run will see and how large they are: given, known, or listed; never decoded."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

from configs import Recipe, UserError
from configs.data import FashionMnist, ImageFolder, ReadyLatents
from tasks.dag import FLOWS, PIPELINE

_SAMPLED = 200
_JPEG, _ASPECT = 0.6, 4 / 3
"""Bytes a pixel and longer over shorter side of what `shard.reencode` writes at quality 95; of photographs, ours."""


@dataclass(frozen=True)
class Images:
    """The images of a recipe after `shard.limit`, by split."""

    train: int
    test: int
    mean_bytes: float
    """Of one encoded image."""
    key_bytes: float
    """Of one image's key."""
    source: str
    """Where the counts come from."""
    bytes_source: str

    @property
    def all(self) -> int:
        return self.train + self.test


_KNOWN = {
    "fashion-mnist": (60_000, 10_000, 525.3, 10.9, "mean of the 70,000 PNGs that stage shard writes"),
    "imagenet-1k": (1_281_167, 50_000, 110_000.0, 36.0, "mean assumed as in docs/scale.md"),
    "cifar-10": (50_000, 10_000, 2_300.0, 20.0, "assumed: PNGs of 2.3 kB"),
    "ffhq": (70_000, 0, 8_000.0, 20.0, "assumed: PNGs of 8 kB at 64 × 64"),
}
"""Train and test images (none: what `shard.test_share` takes), bytes of an image and of a key, and where the bytes come
from."""
_CLASSES = {"imagenet-1k": 1_000, "cifar-10": 10, "ffhq": 1}


def images_of(
    recipe: Recipe, count: int | None = None, mean_bytes: float | None = None, flow: str = "sfd-full"
) -> Images:
    """The images that `shard` would find.

    Args:
        recipe: names the source; a local one is listed where it is not a known set.
        count: take this many images instead, `shard.test_share` of them for testing.
        mean_bytes: take this size of an encoded image instead.
        flow: what they are for; the tokenizers by themselves are always looked at on images.

    Raises:
        UserError: the source is neither known nor here, and no count was given.
    """
    if FLOWS[flow] is PIPELINE and not recipe.needs_images and not recipe.ready_latents:
        return Images(0, 0, 0.0, 0.0, "the recipe reads no images", "no images")
    known = _KNOWN.get(_name(recipe))
    if count is not None:
        test = round(recipe.shard.test_share * count)
        size, key = (known[2], known[3]) if known else (110_000.0, 36.0)
        found = Images(count - test, test, size, key, "given (--images)", known[4] if known else "assumed: 110 kB")
    elif known is not None:
        total, test = known[0] + known[1], known[1] or round(recipe.shard.test_share * known[0])
        if recipe.shard.test_share == 1.0 and known[1]:  # nothing is trained on: the source is the test images alone
            total = test
        found = Images(total - test, test, known[2], known[3], f"the published set {_name(recipe)}", known[4])
    else:
        found = _listed(recipe)
    if recipe.ready_latents:  # all of them are trained on
        return replace(found, train=found.all, test=0)
    if mean_bytes is not None:
        found = replace(found, mean_bytes=mean_bytes, bytes_source="given (--image-bytes)")
    if recipe.shard.reencode is not None and mean_bytes is None:
        pixels = _ASPECT * recipe.shard.reencode.size**2
        found = replace(found, mean_bytes=_JPEG * pixels, bytes_source=f"assumed: {_JPEG} bytes a pixel of a JPEG")
    if recipe.shard.limit is None:
        return found
    train, test = min(recipe.shard.limit, found.train), min(recipe.shard.limit, found.test)
    return replace(found, train=train, test=test, source=f"{found.source}, shard.limit")


def _name(recipe: Recipe) -> str:
    """Of the known set that the recipe is about; empty where its images are its own, or are here to be counted."""
    data, published = recipe.data, recipe.published
    if isinstance(data.source, FashionMnist):
        return "fashion-mnist"
    name = published.data if published is not None else None
    if name is None or data.classes != _CLASSES[name]:
        return ""
    here = isinstance(data.source, ImageFolder) and Path(data.source.path).is_dir()
    return "" if here else name


def _listed(recipe: Recipe) -> Images:
    import pyarrow.compute as pc

    from infra.storage import Storage
    from tasks.sources import Account, ScannedSource, open_source
    from tasks.sources.ordering import test_images
    from tasks.sources.ready_latents import ReadyLatentsSource

    section = recipe.data.source
    path = getattr(section, "path", None) or ""
    if not Storage.at(path).local:
        raise UserError(
            f"data.source {path} is remote and listing it may take long: say how many images it has with --images "
            "and how large they are with --image-bytes"
        )
    if isinstance(section, ReadyLatents):
        shards = list(ReadyLatentsSource(section.path).shards())
        rows = sum(shard.rows for shard in shards)
        mean = sum(shard.size for shard in shards) / max(1, rows)
        return Images(rows, 0, mean, 40.0, f"headers of {len(shards)} shards in {path}", "sizes of the shards")
    try:
        source = open_source(recipe.data)
        listing = source.listing()
    except UserError as error:
        raise UserError(f"{error}; to plan without the images give --images and --image-bytes") from None
    account, rows = Account.of(recipe.data, listing), listing.rows.num_rows
    if not rows:
        raise UserError(f"data.source {path} holds no images: give --images and --image-bytes")
    counts = {split: sum(labels) for split, labels in account.splits.items()}
    loose = counts.get("all", 0)
    test = test_images(loose, recipe.shard)
    train, test = counts.get("train", 0) + loose - test, counts.get("test", 0) + test
    keys = sum(pc.sum(pc.binary_length(chunk["key"])).as_py() for chunk in listing.rows.chunks()) / rows
    if account.bytes:
        return Images(train, test, account.bytes / rows, keys, f"listed: {path}", "listed: sizes of all files")
    if isinstance(source, ScannedSource):
        how = "size of the Parquet files over their rows"
        files = {file for chunk in listing.rows.chunks() for file in chunk["file"].unique().to_pylist()}
        total = sum(Storage.at(file).size("") for file in files)
        return Images(train, test, total / rows, keys, f"listed: {path}", how)
    chosen = listing.rows.take(range(0, rows, max(1, rows // _SAMPLED)))
    lengths = [len(source.read(row["file"], row["start"], row["length"])) for row in chosen]
    return Images(train, test, sum(lengths) / len(lengths), keys, f"listed: {path}", f"mean of {len(lengths)} read")
