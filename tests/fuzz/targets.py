"""Every parser of what others made, as the pipeline calls it, with whole files to start from."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path

from configs import UserError, load_recipe
from configs.cluster import load_cluster
from configs.race import load_race
from infra.artifacts import Manifest
from infra.storage import Storage
from models import checkpoints
from models.files import plain, read_content
from tasks.data.decode import Undecodable, decode, load, reencoded
from tasks.data.receipts import Receipt
from tasks.scoring import adm_file
from tasks.sources.base import Source
from tasks.sources.csv_file import CsvSource
from tasks.sources.fashion_mnist import FashionMnistSource
from tasks.sources.imagenet import ImageNetSource
from tasks.sources.label_files import classes_of_images
from tasks.sources.parquet import ParquetSource
from tasks.sources.ready_latents import ReadyLatentsSource
from tasks.sources.webdataset import WebDatasetSource
from tests.fuzz import mutations, seeds
from tests.fuzz.mutations import Mutation

MAX_PIXELS = 1 << 22


@dataclass(frozen=True)
class Target:
    """One parser: `read` may raise `refusals`, which people understand, and nothing else."""

    suffix: str
    """What the file's name ends with."""
    seeds: Callable[[], Sequence[bytes]]
    read: Callable[[Path], object]
    refusals: tuple[type[Exception], ...] = (UserError,)
    below: tuple[Mutation, ...] = ()
    """Damage that whole checksums and lengths hide."""

    def input(self, rng: random.Random) -> bytes:
        whole = self.seeds()
        data = rng.choice(whole)
        if self.below and rng.random() < 0.6:
            with suppress(Exception):  # a damage that cannot be laid on this one
                data = rng.choice(self.below)(data, rng)
            if rng.random() < 0.7:
                return data
        return mutations.mutated(data, whole, rng)


def _image(path: Path) -> None:
    data = path.read_bytes()
    load(data, 16, MAX_PIXELS)
    reencoded(decode(data, MAX_PIXELS), 16, 90)


def _listed(source: Source) -> None:
    """The listing, and the first images of it."""
    table = source.listing().images
    for row in table.slice(0, 3).to_pylist():
        with suppress(Undecodable):
            load(source.read(row["file"], row["start"], row["length"]), 8, MAX_PIXELS)


def _kit(path: Path) -> None:
    classes_of_images(str(path), ["ILSVRC_1.JPEG", "ILSVRC_2.JPEG"], ("n01", "n02"))


def _imagenet(path: Path) -> None:
    _listed(ImageNetSource(str(path)))


def _parquet(path: Path) -> None:
    source = ParquetSource(str(path))
    source.listing()
    for image in source.scan(str(path)):
        with suppress(Undecodable):
            load(image, 8, MAX_PIXELS)


def _our_parquet(path: Path) -> None:
    from tasks.data.images import Stretch, read_images

    for _ in read_images(Storage.at(str(path.parent)), Stretch(path.name, 0, 6, 0), 8):
        pass


def _latents(path: Path) -> None:
    for shard in ReadyLatentsSource(str(path)).shards():
        for name in ("latents", "labels"):
            shard.values(name, 0, min(shard.rows, 2))


def _weights(path: Path) -> None:
    checkpoints.facts_of(path), checkpoints.travelling_statistics(path)
    plain(read_content(path).values)
    checkpoint = checkpoints.read(path)
    checkpoints.check_whole(checkpoint)


def _statistics(path: Path) -> None:
    checkpoints.read_statistics(path)


def _reference(path: Path) -> None:
    found = adm_file.read_statistics(path, {"pool": 4, "spatial": 3})
    if found.images is not None:
        for _ in adm_file.image_pieces(path, 2):
            pass


def _idx(path: Path) -> None:
    folder = path.with_name(f"{path.name}.folder")
    folder.mkdir()
    for split in ("train", "t10k"):
        (folder / f"{split}-images-idx3-ubyte.gz").write_bytes(path.read_bytes())
        (folder / f"{split}-labels-idx1-ubyte.gz").write_bytes(seeds.idx_labels())
    _listed(FashionMnistSource(str(folder)))


def _manifest(path: Path) -> None:
    found = Manifest.from_json(path.read_bytes(), "manifest.json")
    _ = found.size, found.figures, found.to_json()
    assert not any(entry.path.startswith("/") or ".." in entry.path.split("/") for entry in found.files)


YAML = (mutations.text,)
TARGETS: dict[str, Target] = {
    "image": Target(".bin", seeds.images, _image, (Undecodable,), (mutations.in_png,)),
    "webdataset": Target(
        ".tar", seeds.webdatasets, lambda path: _listed(WebDatasetSource(str(path))), below=(mutations.in_tar,)
    ),
    "imagenet": Target(".tar", seeds.nested_tars, _imagenet, below=(mutations.in_tar,)),
    "imagenet-labels": Target(
        ".txt",
        seeds.label_lists,
        lambda path: classes_of_images(str(path), ["ILSVRC_1.JPEG", "ILSVRC_2.JPEG"], ("n01", "n02")),
        below=(mutations.text,),
    ),
    "imagenet-kit": Target(".tar.gz", seeds.kits, _kit, below=(mutations.in_tar, mutations.in_gzip)),
    "parquet": Target(".parquet", seeds.parquets, _parquet),
    "our-parquet": Target(".parquet", seeds.our_parquets, _our_parquet),
    "csv": Target(".csv", seeds.csvs, lambda path: _listed(CsvSource(str(path))), below=(mutations.text,)),
    "latents": Target(".safetensors", seeds.latents, _latents, below=(mutations.in_safetensors,)),
    "latents-tar": Target(".tar", seeds.latent_tars, _latents, below=(mutations.in_tar, mutations.in_gzip)),
    "safetensors": Target(
        ".safetensors",
        seeds.safetensors,
        _weights,
        (ValueError,),
        (mutations.in_safetensors, mutations.in_facts),
    ),
    "torch": Target(".pt", seeds.torch_networks, _weights, (ValueError,), (mutations.in_zip,)),
    "torch-statistics": Target(".pt", seeds.torch_statistics, _statistics, (ValueError,), (mutations.in_zip,)),
    "npz": Target(".npz", seeds.npzs, _reference, below=(mutations.in_zip,)),
    "recipe": Target(".yaml", seeds.recipes, lambda path: load_recipe(str(path)), below=YAML),
    "cluster": Target(".yaml", seeds.clusters, lambda path: load_cluster(str(path)), below=YAML),
    "race": Target(".yaml", seeds.races, lambda path: load_race(str(path)), below=YAML),
    "idx": Target(".gz", seeds.idx_files, _idx, below=(mutations.in_gzip,)),
    "manifest": Target(".json", seeds.manifests, _manifest, below=(mutations.in_json, mutations.text)),
    "receipt": Target(
        ".json",
        seeds.receipts,
        lambda path: Receipt.from_json(path.read_bytes()),
        (ValueError, KeyError, TypeError),
        (mutations.in_json, mutations.text),
    ),
}
"""By a name for messages."""
