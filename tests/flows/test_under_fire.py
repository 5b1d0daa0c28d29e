"""A short run of `benchmarks.chaos`: whatever fails meanwhile, it ends by itself in the bytes of an undisturbed one."""

from __future__ import annotations

import shutil
import time
from contextlib import ExitStack
from pathlib import Path

import fsspec
import pytest

from benchmarks.chaos.__main__ import Place, measured
from benchmarks.chaos.account import standing
from benchmarks.chaos.gremlin import KINDS, Gremlin
from tests.flows.conftest import Workplace

SEED, FAULTS, EVERY = 5, 6, 12.0
"""MLflow away, the flow, storage cut off, a training's worker, answers cut short and the driver, within 65 seconds."""
SECONDS = 600.0
MADE = ("encode", "train_dit")
"""What is made under fire; the rest of an undisturbed run lies there."""


@pytest.mark.slow
def test_a_short_run_under_fire_ends_in_the_bytes_of_a_quiet_one(
    finished: Workplace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with ExitStack() as stack:
        place = Place(stack, tmp_path, finished.environment)
        for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_ENDPOINT_URL", "AWS_DEFAULT_REGION"):
            monkeypatch.setenv(name, place.environment[name])
        fsspec.get_filesystem_class("s3").clear_instance_cache()
        rest = tmp_path / "rest"
        shutil.copytree(finished.undisturbed, rest, ignore=lambda folder, names: _made(Path(folder), finished))
        fsspec.filesystem("s3").put(str(rest), "s3://latents/fired", recursive=True)
        gremlin = Gremlin(SEED, KINDS, EVERY, place.nodes, place.members, lambda: None, place.proxies, most=FAULTS)
        fired = measured(place, tmp_path, "fired", "demo_tiny", time.monotonic() + SECONDS, gremlin)
    assert fired["well"], (tmp_path / "fired.log").read_text()[-4000:]
    assert len({fault.kind for fault in gremlin.faults}) >= FAULTS - 1, gremlin.faults  # one may find nobody to kill
    assert fired["starts"] == 1 + sum(fault.kind == "flow" for fault in gremlin.faults), "nothing else ended a flow"
    quiet = standing(f"file://{finished.undisturbed}")
    for stage in MADE:
        assert fired["manifests"][stage].files == quiet[stage].files, stage
        assert sum(each.units - each.again for each in fired["done"] if each.stage == stage) > 0, stage


def _made(folder: Path, finished: Workplace) -> set[str]:
    return set(MADE) if folder == Path(finished.undisturbed) else set()
