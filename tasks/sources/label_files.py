"""Files with the classes of a test split's images: names, numbers, or ImageNet's development kit."""

from __future__ import annotations

import io
import tarfile
import zlib
from collections.abc import Mapping, Sequence
from pathlib import PurePosixPath
from typing import Any

from configs.errors import UserError
from tasks.sources.files import at
from tasks.sources.labels import number_in
from tasks.sources.names import normal

_TRUTH, _META = "ILSVRC2012_validation_ground_truth.txt", "meta.mat"
_SYNSETS = ("synsets.txt", "synset_words.txt", "LOC_synset_mapping.txt")
"""Files of others that name the classes by the order of their lines."""
_MOST_BYTES = 64 << 20
"""Of a file in the kit: a hundred times what the real ones have, and nothing that fills the memory."""
_OPTION = "data.source.test_labels_path"


def classes_of_images(path: str, images: Sequence[str], classes: Sequence[str]) -> list[str]:
    """The class of each image of a test split.

    Lines are `image class`, or one class each in the order of the images' names. A class is a name, or
    a number: the line (from 0) in `synsets.txt`, `synset_words.txt` or `LOC_synset_mapping.txt` beside
    the file, else the label. The ground truth of ImageNet's development kit counts in an order of its
    own, which is in the kit's `meta.mat`.

    Args:
        path: the file; a development kit as its folder or as its archive.
        images: names of the images' files, sorted.
        classes: names by label.

    Raises:
        UserError: it is missing, lacks images, or names what is no class.
    """
    files = _kit(path)
    truth = files.get(_TRUTH)
    if truth is None:
        found = _by_image(path, _text(path, files[""]), images)
        return _named(path, found, classes)
    if _META not in files:
        raise UserError(
            f"{_OPTION} {path}: {_TRUTH} counts classes in an order of its own, which is in {_META} of ImageNet's "
            f"development kit: put that beside it, or name the kit (ILSVRC2012_devkit_t12.tar.gz)"
        )
    ids = _ids(path, files[_META])
    numbers = _by_image(path, _text(path, truth), images)
    unknown = sorted(set(numbers) - ids.keys())
    if unknown:
        raise UserError(f"{_OPTION} {path}: {unknown[0]!r} is no class of its own {_META}: fetch the kit again")
    return _among(path, [ids[number] for number in numbers], classes)


def _kit(path: str) -> dict[str, bytes]:
    """The files of a development kit by name, or the one file under an empty name."""
    storage, name = at(path.rstrip("/"))
    folder = storage.child(name) if name else storage
    try:
        if storage.fs.isdir(storage.locate(name)):
            found = {each: folder.locate(each) for each in folder.names()}
            chosen = {PurePosixPath(each).name: each for each in found if PurePosixPath(each).name in (_TRUTH, _META)}
            if _TRUTH not in chosen:
                raise UserError(f"{_OPTION} {path} is a folder without {_TRUTH}: name a file of labels")
            return {last: folder.read_bytes(each) for last, each in chosen.items()}
        content = storage.read_bytes(name)
        if name == _TRUTH:
            beside = {_META: storage.read_bytes(_META)} if storage.exists(_META) else {}
            return {_TRUTH: content, **beside}
    except FileNotFoundError:
        raise UserError(f"{_OPTION} {path} does not exist") from None
    return _unpacked(path, content) if name.endswith((".tar", ".tar.gz", ".tgz")) else {"": content}


def _unpacked(path: str, content: bytes) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    try:
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            for member in archive:
                last = PurePosixPath(member.name).name
                if member.isreg() and last in (_TRUTH, _META) and (file := archive.extractfile(member)) is not None:
                    if member.size > _MOST_BYTES:
                        raise UserError(
                            f"{_OPTION} {path}: {last} in it has {member.size:,} bytes: fetch the kit again"
                        )
                    found[last] = file.read()
    except (tarfile.TarError, EOFError, OSError, ValueError, zlib.error) as error:
        raise UserError(f"{_OPTION} {path} is not a whole archive ({error}): fetch it again") from None
    if _TRUTH not in found:
        raise UserError(f"{_OPTION} {path} holds no {_TRUTH}: name ImageNet's development kit, or a file of labels")
    return found


def _ids(path: str, content: bytes) -> dict[str, str]:
    """Class names by the numbers that the ground truth has."""
    from scipy.io import loadmat

    try:
        synsets: Any = loadmat(io.BytesIO(content), squeeze_me=True, struct_as_record=False)["synsets"]
        return {str(int(each.ILSVRC2012_ID)): str(each.WNID) for each in synsets}
    except Exception as error:  # whatever a damaged file makes of the reader
        raise UserError(f"{_OPTION} {path}: {_META} cannot be read ({error}): fetch the kit again") from None


def _by_image(path: str, text: str, images: Sequence[str]) -> list[str]:
    """What the lines say of each image."""
    lines = [line.replace(",", " ").split() for line in text.splitlines() if line.strip()]
    single = bool(lines) and all(len(words) == 1 for words in lines)
    if single and len(lines) == len(images):
        return [words[0] for words in lines]
    if single:
        raise UserError(
            f"{_OPTION} {path} has {len(lines):,} lines of one class each, but there are {len(images):,} images: one "
            "line for each image, in the order of names, or lines of `image class`"
        )
    table = {PurePosixPath(normal(words[0])).stem: words[1] for words in lines if len(words) > 1}
    missing = [name for name in images if PurePosixPath(name).stem not in table]
    if missing:
        raise UserError(f"{_OPTION} {path} has no class for {missing[0]} and {len(missing) - 1} more")
    return [table[PurePosixPath(name).stem] for name in images]


def _named(path: str, found: Sequence[str], classes: Sequence[str]) -> list[str]:
    """Classes by name, whether they were given so or as numbers."""
    words = [normal(word) for word in found]
    numbers = [number_in(word) for word in words]
    if set(words) <= set(classes) or any(number is None for number in numbers):
        return _among(path, words, classes)
    given, beside = [number for number in numbers if number is not None], _synsets_beside(path)
    order = beside or list(classes)
    if max(given) >= len(order) or min(given) < 0 or (min(given) == 1 and not beside):
        raise UserError(
            f"{_OPTION} {path}: labels run from {min(given)} to {max(given)} and are expected from 0 to "
            f"{len(order) - 1}; which order they follow cannot be told: give names of classes (such as "
            f"{classes[0]!r}), or a {_SYNSETS[0]} beside it whose lines name the classes in that order"
        )
    return _among(path, [order[number] for number in given], classes)


def _among(path: str, names: Sequence[str], classes: Sequence[str]) -> list[str]:
    unknown = sorted(set(names) - set(classes))
    if unknown:
        raise UserError(
            f"{_OPTION} {path}: {unknown[0]!r} is not a class of the training images (such as {classes[0]!r}); give "
            "names of classes"
        )
    return list(names)


def _synsets_beside(path: str) -> list[str]:
    storage, _ = at(path)
    for name in _SYNSETS:
        if storage.exists(name):
            lines = _text(name, storage.read_bytes(name)).splitlines()
            return [normal(line.split()[0]) for line in lines if line.strip()]
    return []


def _text(path: str, content: bytes) -> str:
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise UserError(f"{_OPTION} {path} is not text in UTF-8 ({error})") from None


def as_pairs(labels: Mapping[str, str]) -> list[tuple[str, int | str]]:
    """For an identity: images and the names of their classes."""
    return [(f"{name} is", label) for name, label in labels.items()]
