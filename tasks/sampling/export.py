"""A sample's images as other evaluators want them: ADM's `.npz`, or PNG files."""

from __future__ import annotations

import tempfile
import zipfile
from pathlib import Path

import numpy as np

from infra.artifacts import Artifact
from tasks.data.images import images
from tasks.drawing.pictures import png


def write_npz(sample: Artifact, target: Path, seed: int = 0) -> int:
    """All images of a sample for ADM's evaluator: `arr_0` uint8 (N, H, W, 3), and `arr_1` their labels.

    The order is a permutation drawn from the seed, whatever the label plan: that evaluator takes the Inception score
    of stretches of 5,000 images, and of stretches that hold few classes it would be far too low (papers.md 2.6).
    Memory does not grow with the sample; the disk beside `target` holds it twice while this runs.

    Returns the number of images. `target` appears only when it is whole.
    """
    count, (height, width, _) = sample.manifest.rows, sample.manifest.facts["shape"]
    place = np.random.default_rng(seed).permutation(count)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=".npz-") as folder:
        files = {name: Path(folder) / f"{name}.npy" for name in ("arr_0", "arr_1")}
        pixels = np.lib.format.open_memmap(files["arr_0"], "w+", np.uint8, (count, height, width, 3))
        labels = np.zeros(count, np.int64)
        first = 0
        for found_labels, found_pixels in images(sample, "", height):
            places = place[first : first + len(found_labels)]
            pixels[places], labels[places] = found_pixels, found_labels
            first += len(found_labels)
        pixels.flush()
        np.save(files["arr_1"], labels)
        whole = Path(folder) / "whole.npz"
        with zipfile.ZipFile(whole, "w", zipfile.ZIP_STORED) as archive:
            for file in files.values():
                archive.write(file, file.name)
        whole.replace(target)
    return count


def write_pngs(sample: Artifact, folder: Path) -> int:
    """One file per image, `<index>_<label>.png`; returns their number."""
    folder.mkdir(parents=True, exist_ok=True)
    size, index = sample.manifest.facts["shape"][0], 0
    for labels, pixels in images(sample, "", size):
        for label, image in zip(labels.tolist(), pixels, strict=True):
            (folder / f"{index:06d}_{label}.png").write_bytes(png(image))
            index += 1
    return index
