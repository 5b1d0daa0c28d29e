"""Two runs of the same recipe at once make each artifact once, and both go on with it."""

from __future__ import annotations

import threading
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from infra.storage import Storage
from tasks.stage import Context, Outcome, Stage, perform
from tests.helpers.builders import small_recipe


def test_a_stage_is_made_once_however_many_want_it(tmp_path: Path, home: Path) -> None:
    begun: list[str] = []
    both = threading.Barrier(2, timeout=60)

    def run(context: Context) -> Outcome:
        begun.append(context.artifact.fingerprint)
        time.sleep(0.2)
        entry = Storage.at(context.out.url).write_bytes("part", b"content")
        return Outcome(files=[entry], rows=1)

    stage = Stage("shard", 1, ("data",), (), run)
    job = stage.job(small_recipe(), f"file://{tmp_path}/root", {})

    def once() -> bytes:
        both.wait()
        return perform(stage, job).read("part")

    with ThreadPoolExecutor(2) as runs:
        made = [each.result() for each in [runs.submit(once) for _ in range(2)]]
    assert made == [b"content"] * 2
    assert begun == [job.fingerprint]
