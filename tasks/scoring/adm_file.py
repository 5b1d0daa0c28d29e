"""Reference statistics and images in the `.npz` layout of ADM's evaluator, read without trusting them.

Arrays: `mu`, `sigma` of the pooled Inception features, `mu_s`, `sigma_s` of the spatial ones, `arr_0` uint8 images
(N, H, W, 3); a file has the statistics, the images, or both. Ours also say which `network` they are of.
"""

from __future__ import annotations

import io
import math
import tokenize
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from configs.errors import UserError, brief
from tasks.scoring.gaussian import Gaussian

_KEYS = {"pool": ("mu", "sigma"), "spatial": ("mu_s", "sigma_s")}
_IMAGES, _LABELS, _NETWORK = "arr_0", "arr_1", "network"
_MOST_BYTES = 256 << 20
"""Of an array that is read whole: a few kB of compressed zeros can say that they are a terabyte."""
_LARGEST_SIDE = 4096
_TOLERANCE = 1e-4
"""How far, of its largest value, a covariance may be off symmetry or below zero; float32 ones are off by rounding."""


@dataclass(frozen=True)
class ReferenceStatistics:
    """What a file says of the features of one set of images."""

    gaussians: dict[str, Gaussian] = field(default_factory=dict)
    """By kind of features: `pool`, `spatial`; empty where the file holds images only."""
    network: str | None = None
    """SHA-256 of the network's weights, where the file says it."""
    images: tuple[int, int] | None = None
    """Number and side in pixels of the images in it."""


def read_statistics(path: Path, widths: dict[str, int]) -> ReferenceStatistics:
    """The statistics in a file, and what images it has.

    Args:
        path: a local `.npz`.
        widths: dimensions that each kind of features must have.

    Raises:
        UserError: the file is damaged, holds pickled objects or something else, or what it says is no Gaussian of
            these features.
    """
    with _explained(path), zipfile.ZipFile(path) as archive:
        names = {name.removesuffix(".npy") for name in archive.namelist()}
        gaussians = {
            kind: _gaussian(path, kind, _array(archive, mean), _array(archive, covariance), widths[kind])
            for kind, (mean, covariance) in _KEYS.items()
            if {mean, covariance} <= names
        }
        network = str(_array(archive, _NETWORK)) if _NETWORK in names else None
        images = _image_shape(path, archive) if _IMAGES in names else None
    for keys in _KEYS.values():
        if len(names & set(keys)) == 1:
            raise UserError(
                f"{path}: has {' and '.join(sorted(names & set(keys)))} without its pair {' and '.join(keys)}"
            )
    if not gaussians and images is None:
        raise UserError(f"{path}: neither mu and sigma nor arr_0 in it; found {', '.join(sorted(names)) or 'nothing'}")
    return ReferenceStatistics(gaussians, network, images)


def write_statistics(gaussians: dict[str, Gaussian], network: str) -> bytes:
    """A file of statistics that ADM's evaluator and :func:`read_statistics` understand."""
    arrays: dict[str, Any] = {_NETWORK: np.array(network)}
    for kind, gaussian in gaussians.items():
        mean, covariance = _KEYS[kind]
        arrays |= {mean: gaussian.mean, covariance: gaussian.covariance}
    buffer = io.BytesIO()
    np.savez(buffer, **arrays)
    return buffer.getvalue()


def image_pieces(path: Path, rows: int) -> Iterator[tuple[NDArray[np.uint8], NDArray[np.int64]]]:
    """The images (N, H, W, 3) of a file and their labels (-1 where it has none), at most `rows` at a time.

    Reads on, so that memory does not grow with the file, and checks the archive's checksum at its end.

    Raises:
        UserError: the file is damaged or has no images.
    """
    with _explained(path), zipfile.ZipFile(path) as archive:
        count, side = _image_shape(path, archive)
        labels = _array(archive, _LABELS).astype(np.int64) if f"{_LABELS}.npy" in archive.namelist() else None
        if labels is not None and labels.shape != (count,):
            raise UserError(
                f"{path}: {_LABELS} has shape {labels.shape}, expected one label for each of {count} images"
            )
        with archive.open(f"{_IMAGES}.npy") as member:
            _header(member)
            each = side * side * 3
            for start in range(0, count, rows):
                wanted = min(rows, count - start)
                data = member.read(wanted * each)
                if len(data) != wanted * each:
                    raise UserError(f"{path}: {_IMAGES} ends after {start + len(data) // each} of {count} images")
                images = np.frombuffer(data, np.uint8).reshape(wanted, side, side, 3)
                yield images, np.full(wanted, -1) if labels is None else labels[start : start + wanted]
            member.read()  # to the end, where the checksum is looked at


def _array(archive: zipfile.ZipFile, name: str) -> NDArray[Any]:
    """An array beside the images. Raises ValueError where it says that it is larger than any that is right."""
    with archive.open(f"{name}.npy") as member:
        shape, _, dtype = _header(member)
    if math.prod(shape) * dtype.itemsize > _MOST_BYTES:
        raise ValueError(f"{name} is {dtype} {shape}, more than {_MOST_BYTES >> 20} MiB")
    with archive.open(f"{name}.npy") as member:
        found: NDArray[Any] = np.lib.format.read_array(member, allow_pickle=False)
        member.read()  # to the end, where the checksum is looked at
        return found


def _header(member: Any) -> tuple[tuple[int, ...], bool, np.dtype[Any]]:
    """Shape, Fortran order and dtype of an array; leaves the file at its first value."""
    version = np.lib.format.read_magic(member)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    found: tuple[tuple[int, ...], bool, np.dtype[Any]] = read(member)
    return found


def _image_shape(path: Path, archive: zipfile.ZipFile) -> tuple[int, int]:
    """Number and side of the images."""
    if f"{_IMAGES}.npy" not in archive.namelist():
        raise UserError(f"{path}: no images ({_IMAGES}) in it")
    with archive.open(f"{_IMAGES}.npy") as member:
        shape, fortran, dtype = _header(member)
    square = len(shape) == 4 and shape[3] == 3 and shape[1] == shape[2] and 0 < shape[1] <= _LARGEST_SIDE
    if not square or dtype != np.uint8 or fortran or shape[0] < 1:
        raise UserError(f"{path}: {_IMAGES} is {dtype} {shape}, expected square uint8 images (N, H, W, 3)")
    return shape[0], shape[1]


def _gaussian(path: Path, kind: str, mean: NDArray[Any], covariance: NDArray[Any], width: int) -> Gaussian:
    names = " and ".join(_KEYS[kind])
    if mean.shape != (width,) or covariance.shape != (width, width):
        raise UserError(
            f"{path}: {names} have shapes {mean.shape} and {covariance.shape}, expected ({width},) and "
            f"({width}, {width}): these are statistics of another network's features"
        )
    if mean.dtype.kind != "f" or covariance.dtype.kind != "f":
        raise UserError(f"{path}: {names} are {mean.dtype} and {covariance.dtype}, expected floating point numbers")
    mean, covariance = mean.astype(np.float64), covariance.astype(np.float64)
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise UserError(f"{path}: {names} hold values that are not finite; the file is damaged, fetch it again")
    largest = float(np.abs(covariance).max())
    if float(np.abs(covariance - covariance.T).max()) > _TOLERANCE * largest:
        raise UserError(f"{path}: {_KEYS[kind][1]} is not symmetric, so it is no covariance; fetch the file again")
    covariance = (covariance + covariance.T) / 2
    try:
        np.linalg.cholesky(covariance + _TOLERANCE * largest * np.eye(width))
    except np.linalg.LinAlgError:
        text = f"{path}: {_KEYS[kind][1]} has negative eigenvalues, so it is no covariance; fetch it again"
        raise UserError(text) from None
    return Gaussian(mean, covariance)


_DAMAGE = (
    zipfile.BadZipFile, zlib.error, OSError, EOFError, ValueError, TypeError, LookupError, AttributeError,
    RuntimeError, RecursionError, SyntaxError, tokenize.TokenError, OverflowError,
)  # fmt: skip
"""What NumPy and zipfile raise of files that are no archives of arrays: a header is a Python literal to NumPy."""


@contextmanager
def _explained(path: Path) -> Iterator[None]:
    try:
        yield
    except _DAMAGE as error:
        found = brief(error, 160)
        raise UserError(f"{path}: not an .npz file of plain arrays, or damaged ({found}); fetch it again") from None
