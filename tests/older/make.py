"""Makes the sample of a release that later versions are held to: `python -m tests.older.make FOLDER` on its check-out.

FOLDER/sample.tar.xz gets the artifacts of recipe.yaml before `train_dit`, the checkpoint that training wrote in its
middle, and figures of every tensor that it ended with: below 300 kB.
"""

from __future__ import annotations

import json
import shutil
import sys
import tarfile
import threading
import time
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

from configs import load_recipe
from infra.storage import Storage
from tasks.dag import load_stage
from tasks.stage import perform

RECIPE = Path(__file__).with_name("recipe.yaml")
STAGES = ("shard", "train_vavae", "encode", "train_dit")
MIDDLE = 64
"""Images after which the checkpoint is taken."""


def make(folder: Path) -> None:
    recipe, root = load_recipe(str(RECIPE)), folder / "root"
    made: dict[str, str] = {}
    for name in STAGES:
        stage = load_stage(name)
        job = stage.job(recipe, Storage.at(str(root)).url, {each: made[each] for each in stage.inputs if each in made})
        made[name] = job.fingerprint
        if name == "train_dit":
            checkpoint = root / name / job.fingerprint / "checkpoints" / f"{MIDDLE:014d}"
            threading.Thread(target=_keep, args=(checkpoint, folder / "half" / checkpoint.name), daemon=True).start()
        perform(stage, job)
    pack(folder)


def pack(folder: Path) -> None:
    """`root` and `half` as one file, the trained weights as figures of them."""
    (trained,) = (folder / "root" / "train_dit").iterdir()
    told = {"fingerprint": trained.name, "weights": figures(trained)}
    (folder / "trained.json").write_text(json.dumps(told))
    with tarfile.open(folder / "sample.tar.xz", "w:xz") as archive:
        for name in (*(f"root/{stage}" for stage in STAGES[:-1]), "half", "trained.json"):
            archive.add(folder / name, name)


def figures(artifact: Path) -> dict[str, dict[str, list[float]]]:
    """Mean, deviation and the first values of every tensor, by file and name."""
    found: dict[str, dict[str, list[float]]] = {}
    for path in sorted(artifact.glob("*.safetensors")):
        tensors = {name: each.astype(np.float64) for name, each in load_file(path).items()}
        found[path.name] = {
            name: [float(each.mean()), float(each.std()), *map(float, each.ravel()[:4])]
            for name, each in tensors.items()
        }
    return found


def _keep(checkpoint: Path, copy: Path) -> None:
    """Copy a checkpoint once it is whole: a finished training leaves none."""
    while not (checkpoint / "complete.json").exists():
        time.sleep(0.01)
    shutil.copytree(checkpoint, copy)


if __name__ == "__main__":
    make(Path(sys.argv[1]))
