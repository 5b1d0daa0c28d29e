"""A folder for a machine that has a GPU and no network: code, data and wheels, and how to run them."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from benchmarks.gpu.fashion import FILE, clothes
from benchmarks.gpu.records import Left

ROOT = Path(__file__).parents[2]
CODE = ("benchmarks", "configs", "infra", "models", "tasks", "tests")
"""Folders of the repository that the measurement imports, golden tensors among them."""
_LEFT_OUT = {"__pycache__", "older", "flows"}
FROM_LOCK = (
    "annotated-types", "einops", "fsspec", "hjson", "lpips", "msgpack", "ninja", "psutil", "py-cpuinfo", "pyarrow",
    "pydantic", "pydantic_core", "PyYAML", "safetensors", "timm", "torchdiffeq", "tqdm", "typing-inspection",
    "typing_extensions",
)  # fmt: skip
"""Wheels that are brought along, in the locked versions; torch and what came with it stay the machine's own."""
_BUILT = "deepspeed"
"""Published as source; without its native parts it is one wheel for every Python."""
_PLATFORMS = ("manylinux_2_28_x86_64", "manylinux_2_17_x86_64", "manylinux2014_x86_64")
_IMAGES = {"train": 20_000, "t10k": 2_000}
_RUN = """# One GPU, measured offline

On a machine with Python {python}, torch, torchvision, huggingface_hub, numpy, pillow and scipy, in this folder:

```sh
{install}python3 -m benchmarks.gpu --out out --limit 465
```

What it prints as `skipped` had no time; in a second run, `--only` and those names, on the same machine and into the
same `--out`. Bring `out/measurement.json` home: `python -m benchmarks.gpu --sheet measurement.json` writes the sheet.
"""
_INSTALL = "python3 -m pip install --no-index --no-deps --target site wheels/*.whl\nexport PYTHONPATH=$PWD/site\n"


def pack(folder: Path, python: str = "3.12") -> Iterator[str]:
    """Fill the folder; says what came along and what did not.

    Args:
        folder: new, or an earlier pack that is renewed.
        python: version of the machine's Python.
    """
    for name in CODE:
        shutil.rmtree(folder / name, ignore_errors=True)
        shutil.copytree(ROOT / name, folder / name, ignore=lambda _folder, names: _LEFT_OUT & set(names))
    for name in ("LICENSE", "requirements.lock", "pyproject.toml"):
        shutil.copy2(ROOT / name, folder / name)
    yield f"code: {', '.join(CODE)}"
    yield _data(folder / "benchmarks" / "gpu" / FILE)
    wheels = folder / "wheels"
    wheels.mkdir(exist_ok=True)
    yield from _wheels(wheels, python)
    install = _INSTALL if any(wheels.iterdir()) else ""
    (folder / "RUN.md").write_text(_RUN.format(python=python, install=install))
    size = sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
    yield f"{folder}: {size / 1e6:.0f} MB; RUN.md says how to go on"


def _data(file: Path) -> str:
    """Some of Fashion-MNIST, 10 MB."""
    try:
        found = clothes()
    except Left as error:
        return f"{error}: the section fashion will be skipped"
    kept = {name: values[: _IMAGES[name.partition("_")[0]]] for name, values in found.items()}
    np.savez_compressed(file, **kept)  # type: ignore[arg-type]
    return f"data: {file.name}, {len(kept['train_x']):,} images"


def _wheels(folder: Path, python: str) -> Iterator[str]:
    locked = dict(line.split("==") for line in (ROOT / "requirements.lock").read_text().splitlines() if "==" in line)
    pip = [sys.executable, "-m", "pip"]
    options = ["--quiet", "--no-deps", "--only-binary=:all:", "--implementation=cp", f"--python-version={python}"]
    options += [f"--platform={name}" for name in _PLATFORMS]
    missing: list[str] = []
    for name in FROM_LOCK:
        one = f"{name}=={locked[name]}"
        if not _done([*pip, "download", *options, f"--dest={folder}", one]):
            missing.append(one)
    native = os.environ | {"DS_BUILD_OPS": "0", "DS_ACCELERATOR": "cpu"}
    one = f"{_BUILT}=={locked[_BUILT]}"
    build = [*pip, "wheel", "--quiet", "--no-deps", "--no-build-isolation", f"--wheel-dir={folder}", one]
    if not _done(build, native):
        missing.append(one)
    yield f"wheels: {len(list(folder.iterdir()))} for Python {python}"
    if missing:
        yield f"no wheel came of {', '.join(missing)}: the machine must have them"


def _done(command: list[str], environment: dict[str, str] | None = None) -> bool:
    return subprocess.run(command, env=environment, capture_output=True, check=False).returncode == 0
