"""Which kind of source lies at a path: told by its name, or by the files that one finds first."""

from __future__ import annotations

import os
import re
import tarfile
from collections import Counter
from collections.abc import Iterator
from itertools import islice
from typing import Any

from configs.errors import UserError
from infra.storage import Storage
from tasks.data.formats import suffix
from tasks.sources.fashion_mnist import TRAILERS
from tasks.sources.files import at, check_there
from tasks.sources.names import is_leftover, split_in

_KINDS = {"csv": "csv", "parquet": "parquet", "tar": "webdataset"}
_LOOKED_AT = 2_000
_LABELS = re.compile(
    r"devkit|ground_truth|synset_labels|^(val|validation|test)[a-z_]*\.(txt|csv)$|^LOC_val", re.IGNORECASE
)
"""Names of files that have the labels of a test split, as ImageNet and its users call them."""


def guess(path: str, test_path: str | None = None) -> dict[str, Any]:
    """The fields of `data.source` for what lies there, with the kind.

    Raises:
        UserError: nothing lies there.
    """
    if path == "fashion-mnist":
        return {"kind": "fashion-mnist"}
    check_there(path)
    apart = {} if test_path is None else {"test_path": test_path}
    known = _KINDS.get(suffix(path))
    if known == "csv":
        return {"kind": known, "path": path}
    if known == "webdataset" and not any(sign in path for sign in "*?[{") and _holds_tars(path):
        return {"kind": "imagenet", "path": path, **apart}
    if known is not None:
        return {"kind": known, "path": path, **apart}
    names = list(islice(_names(Storage.at(path)), _LOOKED_AT))
    if set(TRAILERS) <= set(names):
        return {"kind": "fashion-mnist", "path": path}
    found = Counter(_KINDS.get(suffix(name), "") for name in names)
    for kind in ("parquet", "webdataset"):
        if found[kind]:
            return {"kind": kind, "path": path, **apart}
    splits = {} if apart else _splits(path)
    return {"kind": "folder", "path": path, **apart, **splits}


def _splits(path: str) -> dict[str, str]:
    """Training and test trees below a folder that holds nothing else but files, and perhaps a development kit."""
    storage, root = Storage.at(path), path.rstrip("/")
    listed = {each["name"].rstrip("/").rpartition("/")[2]: each["type"] for each in _list(storage, "")}
    folders = sorted(name for name, kind in listed.items() if kind == "directory" and not is_leftover(name))
    trees = [name for name in folders if "devkit" not in name.lower()]
    told = {split: name for name in trees if (split := split_in(name))}
    if "train" not in told or len(told) < 2 or len(told) < len(trees):
        return {}
    held_out = told.get("validation") or told["test"]
    found = {"path": f"{root}/{told['train']}", "test_path": f"{root}/{held_out}"}
    if any(each["type"] == "directory" for each in _list(storage, held_out)):
        return found
    labels = [name for name in sorted(listed) if _LABELS.search(name)]  # the test split lies in one folder
    return found | ({"test_labels_path": f"{root}/{labels[0]}"} if len(labels) == 1 else {})


def _list(storage: Storage, name: str) -> list[dict[str, Any]]:
    found: list[dict[str, Any]] = storage.fs.ls(storage.locate(name), detail=True)
    return found


def _names(storage: Storage) -> Iterator[str]:
    if not storage.local:
        yield from storage.names()
        return
    for folder, folders, files in os.walk(storage.path, followlinks=True):
        folders[:] = sorted(name for name in folders if not is_leftover(name))
        below = os.path.relpath(folder, storage.path)
        yield from (name if below == "." else f"{below}/{name}" for name in sorted(files) if not is_leftover(name))


def _holds_tars(path: str) -> bool:
    storage, name = at(path)
    try:
        with storage.open(name) as file, tarfile.open(fileobj=file, mode="r:") as archive:
            return any(member.name.endswith(".tar") for member in islice(archive, 3))
    except (tarfile.TarError, EOFError) as error:
        raise UserError(f"{path} is not a whole, uncompressed tar ({error}): decompress or fetch it again") from None
