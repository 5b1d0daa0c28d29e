"""python -m benchmarks.gpu.first_step FOLDER DEVICE: a training up to its first step, in a process of its own.

The folder holds `recipe.json` and latents of an earlier step. The last line is JSON: seconds until libraries are
there, until the network is built, and until the first step is done, each from the beginning.
"""

from __future__ import annotations

import time

began = time.monotonic()

import json  # noqa: E402
import sys  # noqa: E402
from pathlib import Path  # noqa: E402

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from benchmarks.gpu.records import eager_graphs  # noqa: E402
from benchmarks.gpu.steps import Step  # noqa: E402
from configs import Recipe  # noqa: E402
from infra.device import set_precision  # noqa: E402


def main() -> None:
    root, device = sys.argv[1], torch.device(sys.argv[2])
    if device.type == "cpu":
        eager_graphs()
    recipe = Recipe.model_validate_json((Path(root.removeprefix("file://")) / "recipe.json").read_text())
    found = {"libraries": time.monotonic() - began}
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    set_precision("bf16")
    step = Step(recipe, f"{root}/again", device, 2 * recipe.train_dit.batch)
    found["built"] = time.monotonic() - began
    step()
    if device.type == "cuda":
        torch.cuda.synchronize()
    found["first_step"] = time.monotonic() - began
    print(json.dumps({name: round(seconds, 2) for name, seconds in found.items()}))
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
