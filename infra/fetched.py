"""Files from wherever they are: a path, any fsspec URL, or a model hub; fetched once. Imports nothing that computes.

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
from contextlib import suppress
from pathlib import Path

from configs.addresses import refuse_credentials
from configs.errors import UserError, brief
from infra import hubs
from infra.home import home
from infra.storage import Storage

HUB = "hf://"
_INDEX = ".index.json"


def fetch(location: str) -> Path:
    """A local file with the content at this location; remote ones are downloaded once.

    A downloaded file is fetched again when the source says that it changed. The shards of an index
    lie beside it.

    Raises:
        UserError: it does not exist, cannot be reached, or is not named as expected.
    """
    if "://" not in location or location.startswith("file://"):
        return _local(location)
    get = _from_hub if location.startswith(HUB) else _from_url
    path = get(location)
    bare, at, revision = location.partition("@") if get is _from_hub else (location, "", "")
    return _with_shards(path, bare, at + revision, get) if bare.endswith(_INDEX) else path


def told(what: str, location: str, path: Path, error: ValueError) -> str:
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
        from models.files import file_in

        try:
            return file_in(path)
        except ValueError as error:
            raise UserError(f"weights {error}") from None
    if not path.is_file():
        raise UserError(f"weights {location}: does not exist; give a checkpoint file, a URL or hf://org/repo/file")
    return path


def _with_shards(index: Path, location: str, revision: str, get: Callable[[str], Path]) -> Path:
    """An index of sharded weights with its shards beside it."""
    from models.files import shards_of

    try:
        names = shards_of(index)
    except ValueError as error:
        raise UserError(told("weights", location, index, error)) from None
    folder = location.rpartition("/")[0]
    shards = [get(f"{folder}/{name}{revision}") for name in names]
    if all(shard.parent == index.parent for shard in shards):
        return index
    key = hashlib.sha256(" ".join(map(str, [index, *shards])).encode()).hexdigest()[:16]
    together = home() / "weights" / key
    together.mkdir(parents=True, exist_ok=True)
    for path in (index, *shards):
        if not (together / path.name).exists():
            with suppress(FileExistsError):  # another actor of this machine was faster
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
        said = brief(reason, 160)
        raise UserError(f"weights {url}: reading stopped ({said}); check the address and the network") from None


def _check_whole(url: str, got: int, promised: int | None) -> None:
    if promised is not None and got != promised:
        raise UserError(f"weights {url}: {got:,} bytes came of {promised:,}; check the network and try again")


def _from_hub(location: str) -> Path:
    from huggingface_hub import hf_hub_download

    name, _, revision = location.removeprefix(HUB).partition("@")
    parts = name.split("/", 2)
    if len(parts) < 3 or not all(parts):
        raise UserError(f"weights {location}: expected hf://organisation/repository/file")
    repository, file = "/".join(parts[:2]), parts[2]
    silent = hubs.refusal()
    try:
        kept = silent is not None  # else it would ask again and again before it takes what is there
        return Path(hf_hub_download(repository, file, revision=revision or None, local_files_only=kept))
    except hubs.errors() as error:
        said = hubs.answered(error, repository, file, revision)
        if said is None:
            raise _unreachable(location, silent) from None
        raise UserError(f"weights {location}: {said}") from None


def _unreachable(location: str, why: str | None) -> UserError:
    return UserError(
        f"weights {location}: the hub cannot be reached and the file is not in its local cache"
        f"{f' ({why})' if why else ''}; download it elsewhere and give its path or URL instead"
    )
