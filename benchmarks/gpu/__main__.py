"""python -m benchmarks.gpu [--only training sampling] [--limit 465] [--smoke] [--sheet FILE] [--pack FOLDER]

Measures one GPU with the project's own code and writes `benchmarks/gpu.md`; figures lie in `--out` as JSON too. What
had no time is skipped by name: ask for it with `--only` in a second run, whose figures join those of the first.
`--smoke` runs all of it at toy size on a CPU and writes no sheet: it shows that it would run. `--sheet FILE` writes
the sheet of a measurement made elsewhere, `--sheet none` that of none. `--pack FOLDER` makes a folder of code, data
and wheels for a machine that has a GPU, torch and no network. Needs no Ray, Prefect or MLflow.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("PYTORCH_CUDA_ALLOC_CONF", "expandable_segments:True")
os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed asks for it
os.environ.setdefault("NCCL_SOCKET_IFNAME", "lo")  # a machine without a network has no other

import torch
import torch.distributed as dist

from benchmarks.gpu import sheet
from benchmarks.gpu.pack import pack
from benchmarks.gpu.records import Records, eager_graphs
from benchmarks.gpu.sections import SECTIONS
from infra.compiled import keep_compiled
from infra.device import group_of_one


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(".latentforge/gpu"), help="folder of records and results")
    parser.add_argument("--limit", type=float, default=465.0, help="seconds for everything")
    parser.add_argument("--only", nargs="+", default=list(SECTIONS), choices=list(SECTIONS))
    parser.add_argument("--smoke", action="store_true", help="toy size, on a CPU")
    parser.add_argument("--sheet", help="a measurement.json of another run, or `none`: only write the sheet")
    parser.add_argument("--pack", type=Path, metavar="FOLDER", help="for a machine without a network")
    given = parser.parse_args()
    if given.sheet:
        sheet.write(None if given.sheet == "none" else sheet.load(Path(given.sheet)))
        return
    if given.pack:
        for line in pack(given.pack):
            print(line)
        return
    cuda = torch.cuda.is_available() and not given.smoke
    if not cuda and not given.smoke:
        sys.exit("no GPU here: run this on a machine with one, or with --smoke for a look at what it does")
    device = torch.device("cuda", 0) if cuda else torch.device("cpu")
    if given.smoke:
        torch.set_num_threads(1)
        eager_graphs()
    keep_compiled()  # another process of this run finds them
    records = Records(given.out, device, given.limit, given.smoke)
    kept = given.out / "measurement.json"
    earlier = sheet.load(kept) if kept.is_file() else None

    def finish() -> None:
        found = sheet.measurement(records, earlier)
        kept.write_text(json.dumps(found, indent=1) + "\n")
        if not given.smoke:
            sheet.write(found)

    records.watch(finish)
    group_of_one(device)
    with tempfile.TemporaryDirectory(prefix="latentforge-gpu") as scratch:
        for name in given.only:
            section = SECTIONS[name]
            records.section(name, lambda section=section: section.run(records, f"file://{scratch}"), section.seconds)
    dist.destroy_process_group()
    finish()
    found = {"figures": records.figures, "skipped": records.skipped, "failed": records.failed}
    print(json.dumps(found))
    sys.stdout.flush()
    os._exit(1 if records.failed else 0)  # threads of a profiler must not keep the process alive


if __name__ == "__main__":
    main()
