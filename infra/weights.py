"""Weights from wherever they are: a path, any fsspec URL, or a model hub; fetched once, read safely.

A location is a local path, a URL that fsspec understands (`s3://…`, `https://…`), or
`hf://organisation/repository/path/in/it[@revision]` for the Hugging Face hub. Weights in shards go
by their index (`….index.json`), a local folder by the one file of weights in it. What is fetched is
kept in the project's home folder. Mistakes raise UserError.
"""

from __future__ import annotations

import hashlib
import os
import uuid
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.errors import UserError
from infra.addresses import refuse_credentials
from infra.home import home
from infra.storage import Storage
from models.checkpoints import Checkpoint, Statistics, Which, check_fits, load_into, read, read_statistics
from models.files import INDEX, file_in, read_content, shards_of
from models.formats import Kind, kind_for
from models.foundation import load_efficientnet_lite0

_HUB = "hf://"
_NAMES = ("hub", "package", "random")
"""What may stand where weights are named, and is no location."""


def fetch(location: str) -> Path:
    """A local file with the content at this location; remote ones are downloaded once.

    A downloaded file is fetched again when the source says that it changed. The shards of an index
    lie beside it.

    Raises:
        UserError: it does not exist, cannot be reached, or is not named as expected.
    """
    if "://" not in location or location.startswith("file://"):
        return _local(location)
    get = _from_hub if location.startswith(_HUB) else _from_url
    path = get(location)
    bare, at, revision = location.partition("@") if get is _from_hub else (location, "", "")
    return _with_shards(path, bare, at + revision, get) if bare.endswith(INDEX) else path


def identities(**locations: str | None) -> dict[str, str]:
    """What a fingerprint knows of weights besides their names: the content of files, by use.

    Packages' and hubs' names stand for themselves, as do no weights at all.

    Raises:
        UserError: a file does not exist, or cannot be reached.
    """
    found: dict[str, str] = {}
    for use, location in locations.items():
        if location and location not in _NAMES and not location.startswith(_HUB):
            found[use] = file_hash(fetch(location))
    return found


def file_hash(path: Path) -> str:
    """SHA-256 of a file, or of an index of weights with its shards; read again only when size or time changed.

    Raises:
        UserError: an index is damaged, or one of its shards is missing.
    """
    found = path.stat()
    own = _hash(path, found.st_size, found.st_mtime_ns)
    if not path.name.endswith(INDEX):
        return own
    try:
        shards = [file_hash(path.with_name(name)) for name in shards_of(path)]
    except ValueError as error:
        raise UserError(f"weights {error}") from None
    except FileNotFoundError as error:
        raise UserError(f"weights {path}: its shard {Path(error.filename).name} is not beside it; fetch it") from None
    return hashlib.sha256(" ".join([own, *shards]).encode()).hexdigest()


@lru_cache(maxsize=16)
def _hash(path: Path, _size: int, _time: int) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def load_checkpoint(
    location: str, *, kind: Kind | None = None, num_heads: int | None = None, semantic_channels: int | None = None
) -> Checkpoint:
    """The checkpoint at a location, in the authors' layout or ours (see `models.checkpoints.read`)."""
    path = fetch(location)
    try:
        return read(path, kind=kind, num_heads=num_heads, semantic_channels=semantic_channels)
    except ValueError as error:
        raise UserError(_told("weights", location, path, error)) from None


def load_pretrained(model: nn.Module, location: str, which: Which = "ema") -> Checkpoint:
    """Load the weights at a location into a network built by a recipe, and return the checkpoint, whose
    statistics may matter to the caller.

    Raises:
        UserError: the file cannot be had or read, or its tensors are not this network's.
    """
    checkpoint = load_checkpoint(location, kind=kind_for(model))
    try:
        load_into(model, checkpoint, location, which)
    except ValueError as error:
        raise UserError(str(error)) from None
    return checkpoint


def check_pretrained(build: Callable[[], nn.Module], location: str | None, field: str) -> None:
    """Refuse weights that do not fit the network a recipe describes, before anything runs.

    build: makes that network; it is called where memory costs nothing. location: None needs no check.

    Raises:
        UserError: naming the field, the file and what does not fit.
    """
    if location is None or location in _NAMES:
        return
    with torch.device("meta"):
        model = build()
    checkpoint = load_checkpoint(location, kind=kind_for(model))
    try:
        check_fits(model, checkpoint, f"{field} {location}")
    except ValueError as error:
        raise UserError(str(error)) from None


def load_statistics(location: str) -> Statistics:
    """The authors' latent statistics at a location."""
    path = fetch(location)
    try:
        return read_statistics(path)
    except ValueError as error:
        raise UserError(_told("statistics", location, path, error)) from None


def foundation_weights(name: str, weights: str) -> dict[str, Tensor] | None:
    """State dict for `FoundationModel`, or None where timm's hub, or no weights at all, are wanted.

    Args:
        name: the model's name, for errors.
        weights: `hub`, `random`, `package` (EfficientNet-Lite0 only), or a location.
    """
    if weights in ("hub", "random"):
        return None
    if weights == "package":
        if "efficientnet_lite0" not in name:
            raise UserError(
                f"foundation.weights is package but {name} is in no package: only efficientnet_lite0 is; "
                f"use hub, or a path to its weights"
            )
        try:
            return load_efficientnet_lite0()
        except (ImportError, ValueError) as error:
            raise UserError(str(error)) from None
    return load_tensors(weights, name)


def load_tensors(location: str, whose: str) -> dict[str, Tensor]:
    """Tensors by name from a location, whatever they are of; `whose` names that in errors.

    Raises:
        UserError: it cannot be had, or holds something else.
    """
    path = fetch(location)
    try:
        content = read_content(path).values
    except ValueError as error:
        raise UserError(_told(f"weights of {whose} at", location, path, error)) from None
    for key in ("model", "state_dict"):
        if isinstance(content, dict) and isinstance(content.get(key), dict):
            content = content[key]
    if not isinstance(content, dict):
        raise UserError(
            f"weights of {whose} at {location}: expected a dictionary of tensors, found {type(content).__name__}"
        )
    return {name: value for name, value in content.items() if isinstance(value, Tensor)}


def _told(what: str, location: str, path: Path, error: ValueError) -> str:
    """An error about a file, named once where it was fetched from and where it lies."""
    said = str(error).removeprefix(f"{path}: ")
    return (
        f"{what} {location}: {said}"
        if str(path) in location
        else f"{what} {location}: {said} (kept as {path}; delete it to fetch again)"
    )


def _local(location: str) -> Path:
    path = Path(location.removeprefix("file://")).expanduser()
    if path.is_dir():
        try:
            return file_in(path)
        except ValueError as error:
            raise UserError(f"weights {error}") from None
    if not path.is_file():
        raise UserError(f"weights {location}: does not exist; give a checkpoint file, a URL or hf://org/repo/file")
    return path


def _with_shards(index: Path, location: str, revision: str, get: Callable[[str], Path]) -> Path:
    """An index of sharded weights with its shards beside it."""
    try:
        names = shards_of(index)
    except ValueError as error:
        raise UserError(_told("weights", location, index, error)) from None
    folder = location.rpartition("/")[0]
    shards = [get(f"{folder}/{name}{revision}") for name in names]
    if all(shard.parent == index.parent for shard in shards):
        return index
    key = hashlib.sha256(" ".join(map(str, [index, *shards])).encode()).hexdigest()[:16]
    together = home() / "weights" / key
    together.mkdir(parents=True, exist_ok=True)
    for path in (index, *shards):
        if not (together / path.name).exists():
            (together / path.name).symlink_to(path.absolute())
    return together / index.name


def _from_url(url: str) -> Path:
    refuse_credentials("the URL of weights", url)
    folder, _, name = url.rpartition("/")
    storage = Storage.at(folder)
    try:
        found = storage.fs.info(storage.locate(name))
        mark = storage.fs.ukey(storage.locate(name))  # changes with the content, as far as the source can tell
        key = hashlib.sha256(f"{url} {mark}".encode()).hexdigest()[:16]
        target = home() / "weights" / key / name
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            partial = target.with_name(f"{uuid.uuid4().hex[:8]}.partial")
            try:
                storage.fs.get_file(storage.locate(name), str(partial))
                _check_whole(url, partial.stat().st_size, found.get("size"))
                os.replace(partial, target)
            finally:
                partial.unlink(missing_ok=True)
        return target
    except UserError:
        raise
    except Exception as error:  # every kind of place has errors of its own
        reason = error.__cause__ or error  # fsspec calls whatever a web server answers "not found"
        if isinstance(reason, FileNotFoundError) or getattr(reason, "status", None) == 404:
            raise UserError(f"weights {url}: no such file; check the URL") from None
        said = (" ".join(str(reason).split()) or type(reason).__name__)[:160]
        raise UserError(f"weights {url}: reading stopped ({said}); check the address and the network") from None


def _check_whole(url: str, got: int, promised: int | None) -> None:
    if promised is not None and got != promised:
        raise UserError(f"weights {url}: {got:,} bytes came of {promised:,}; check the network and try again")


def _from_hub(location: str) -> Path:
    from huggingface_hub import hf_hub_download
    from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, RepositoryNotFoundError

    name, _, revision = location.removeprefix(_HUB).partition("@")
    parts = name.split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise UserError(f"weights {location}: expected hf://organisation/repository/file")
    repository, file = "/".join(parts[:2]), parts[2]
    try:
        return Path(hf_hub_download(repository, file, revision=revision or None))
    except (RepositoryNotFoundError, EntryNotFoundError) as error:
        if type(error).__name__ != "LocalEntryNotFoundError":
            raise UserError(f"weights {location}: the hub has no {file} in {repository}; check the name") from None
        raise _unreachable(location) from None
    except (HfHubHTTPError, OSError):
        raise _unreachable(location) from None


def _unreachable(location: str) -> UserError:
    return UserError(
        f"weights {location}: the hub cannot be reached and the file is not in its local cache; download it "
        f"elsewhere and give its path or URL instead"
    )
