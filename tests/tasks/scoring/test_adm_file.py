"""Reference files in ADM's layout: read as written, and whatever is damaged or of something else refused."""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from configs import UserError
from tasks.scoring.adm_file import image_pieces, read_statistics, write_statistics
from tasks.scoring.gaussian import Gaussian

WIDTHS = {"pool": 6, "spatial": 4}


def gaussian(width: int) -> Gaussian:
    return Gaussian.of(np.random.default_rng(width).standard_normal((50, width)))


def adm(**changed: Any) -> dict[str, Any]:
    pool, spatial = gaussian(6), gaussian(4)
    arrays = {"mu": pool.mean, "sigma": pool.covariance, "mu_s": spatial.mean, "sigma_s": spatial.covariance}
    return {name: value for name, value in (arrays | changed).items() if value is not None}


def saved(folder: Path, compressed: bool = False, **arrays: Any) -> Path:
    path = folder / "reference.npz"
    (np.savez_compressed if compressed else np.savez)(path, **arrays)
    return path


@pytest.mark.parametrize("compressed", [False, True])
def test_adms_layout_is_read(tmp_path: Path, compressed: bool) -> None:
    images = np.zeros((3, 8, 8, 3), np.uint8)
    found = read_statistics(saved(tmp_path, compressed, arr_0=images, **adm()), WIDTHS)
    assert set(found.gaussians) == {"pool", "spatial"} and found.images == (3, 8) and found.network is None
    np.testing.assert_allclose(found.gaussians["pool"].covariance, gaussian(6).covariance, rtol=1e-12)
    assert np.array_equal(found.gaussians["spatial"].mean, gaussian(4).mean)


def test_statistics_without_spatial_ones_and_in_float32_are_read(tmp_path: Path) -> None:
    half = adm(mu_s=None, sigma_s=None)
    path = saved(tmp_path, **{name: value.astype(np.float32) for name, value in half.items()})
    found = read_statistics(path, WIDTHS)
    assert set(found.gaussians) == {"pool"} and found.images is None
    assert found.gaussians["pool"].covariance.dtype == np.float64


def test_what_we_write_is_read(tmp_path: Path) -> None:
    path = tmp_path / "ours.npz"
    path.write_bytes(write_statistics({"pool": gaussian(6), "spatial": gaussian(4)}, "abc"))
    found = read_statistics(path, WIDTHS)
    assert found.network == "abc" and np.array_equal(found.gaussians["pool"].mean, gaussian(6).mean)
    with np.load(path) as file:
        assert {"mu", "sigma", "mu_s", "sigma_s"} <= set(file.files)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"mu": np.zeros(5)}, r"shapes \(5,\) and \(6, 6\), expected \(6,\).* another network"),
        ({"sigma": np.eye(7)}, "another network"),
        ({"sigma": None}, "mu without its pair"),
        ({"mu_s": None}, "sigma_s without its pair"),
        ({"mu": np.full(6, np.nan)}, "not finite"),
        ({"sigma": np.triu(np.ones((6, 6)))}, "not symmetric"),
        ({"sigma": np.diag([1.0, 1, 1, 1, 1, -1])}, "negative eigenvalues"),
        ({"sigma": np.eye(6, dtype=np.int64)}, "int64"),
        ({"arr_0": np.zeros((3, 8, 8, 3), np.float32)}, "float32"),
        ({"arr_0": np.zeros((3, 8, 9, 3), np.uint8)}, "square"),
        ({"mu": np.array([{}], dtype=object)}, "plain arrays"),
    ],
)
def test_what_is_no_reference_is_refused(tmp_path: Path, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        read_statistics(saved(tmp_path, **adm(**changed)), WIDTHS)


def test_a_file_of_other_things_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="neither mu and sigma nor arr_0 in it; found weights"):
        read_statistics(saved(tmp_path, weights=np.zeros(3)), WIDTHS)


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("place", [0.2, 0.5, 0.8])
def test_a_damaged_file_is_refused(tmp_path: Path, compressed: bool, place: float) -> None:
    path = saved(tmp_path, compressed, **adm())
    data = bytearray(path.read_bytes())
    with zipfile.ZipFile(path) as archive:
        members = archive.infolist()
    path.write_bytes(data[: int(place * len(data))])
    with pytest.raises(UserError, match="damaged"):
        read_statistics(path, WIDTHS)
    sigma, after = members[1], members[2].header_offset  # a member's values end where the next one's header begins
    data[after - int((1 - place) * sigma.compress_size)] ^= 0x01
    path.write_bytes(data)
    with pytest.raises(UserError):
        read_statistics(path, WIDTHS)


def test_images_come_in_pieces_in_their_order(tmp_path: Path) -> None:
    images = np.random.default_rng(0).integers(0, 256, (7, 4, 4, 3), dtype=np.uint8)
    path = saved(tmp_path, compressed=True, arr_0=images, arr_1=np.arange(7))
    pieces = list(image_pieces(path, 3))
    assert [len(labels) for _, labels in pieces] == [3, 3, 1]
    assert np.array_equal(np.concatenate([each for each, _ in pieces]), images)
    assert np.concatenate([labels for _, labels in pieces]).tolist() == list(range(7))
    unlabelled = next(image_pieces(saved(tmp_path, arr_0=images), 7))[1]
    assert unlabelled.tolist() == [-1] * 7


def test_damaged_images_are_refused(tmp_path: Path) -> None:
    images = np.zeros((7, 4, 4, 3), np.uint8)
    path = saved(tmp_path, arr_0=images)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 0xFF
    path.write_bytes(data)
    with pytest.raises(UserError, match="damaged"):
        list(image_pieces(path, 3))
    with pytest.raises(UserError, match="one label for each of 7 images"):
        list(image_pieces(saved(tmp_path, arr_0=images, arr_1=np.arange(3)), 3))
