"""python -m benchmarks.gpu [--only training sampling] [--limit 465] [--smoke] [--sheet FILE]

Measures one GPU with the project's own code and writes `benchmarks/gpu.md`; figures lie in `--out` as JSON too.
`--smoke` runs all of it at toy size on a CPU in a minute, and writes no sheet: it shows that it would run. `--sheet
FILE` writes the sheet of a measurement made elsewhere, `--sheet none` that of none. Needs no Ray, Prefect or MLflow.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")

import torch
import torch.distributed as dist

from benchmarks.gpu import sheet
from benchmarks.gpu.records import Records
from benchmarks.gpu.sections import SECTIONS


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".latentforge/gpu"), help="folder of records and results")
    parser.add_argument("--limit", type=float, default=465.0, help="seconds for everything")
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--smoke", action="store_true", help="toy size, on a CPU")
    parser.add_argument("--sheet", help="a measurement.json of another run, or `none`: only write the sheet")
    given = parser.parse_args()
    if given.sheet:
        sheet.write(None if given.sheet == "none" else sheet.load(Path(given.sheet)))
        return
    cuda = torch.cuda.is_available() and not given.smoke
    if not cuda and not given.smoke:
        sys.exit("no GPU here: run this on a machine with one, or with --smoke for a look at what it does")
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if given.smoke:
        torch.set_num_threads(1)
        compile_ = torch.compile  # a CPU's slow code generator says nothing of a GPU's: trace, and run eagerly
        torch.compile = lambda *args, **options: compile_(*args, **{**options, "backend": "aot_eager"})
    records = Records(given.out, device, given.limit, given.smoke)

    def finish() -> None:
        found = sheet.measurement(records.figures, device)
        (given.out / "measurement.json").write_text(json.dumps(found, indent=1) + "\n")
        if not given.smoke:
            sheet.write(found)

    records.watch(finish)
    dist.init_process_group("nccl" if cuda else "gloo", store=dist.HashStore(), rank=0, world_size=1)
    with tempfile.TemporaryDirectory(prefix="latentforge-gpu") as scratch:
        for name in given.only:
            with records.guarded(name):
                SECTIONS[name](records, f"file://{scratch}")
    dist.destroy_process_group()
    finish()
    print(json.dumps({"figures": records.figures, "failed": records.failed}))
    sys.exit(1 if records.failed else 0)


if __name__ == "__main__":
    main()
