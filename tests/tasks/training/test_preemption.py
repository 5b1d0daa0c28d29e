"""A machine's notice of its end makes training save, once."""

from __future__ import annotations

from pathlib import Path

import torch
import torch.distributed as dist

from infra.storage import Storage
from tasks.training.requests import LEAVE, SAVE, Requests, ask


def test_a_notice_asks_to_save_once(tmp_path: Path) -> None:
    notices = iter([False, True, True, True])
    out = Storage.at(str(tmp_path / "out"))
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/meeting", rank=0, world_size=1)
    try:
        requests = Requests(out, torch.device("cpu"), warned=lambda: next(notices))
        assert requests.look() == frozenset()
        assert requests.look() == {SAVE}
        assert requests.look() == frozenset(), "the same notice again"
        ask(out, LEAVE)
        assert requests.look() == {LEAVE} and not out.names()
    finally:
        dist.destroy_process_group()
