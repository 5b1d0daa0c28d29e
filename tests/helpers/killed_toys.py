"""Toy trainings whose workers are killed at random moments; run as a program, so that forked workers start at once.

`python -m tests.helpers.killed_toys FOLDER KILLS` trains undisturbed, then again and again with a SIGKILL now and then,
and leaves every result in FOLDER.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time
import traceback
from pathlib import Path

import torch
import torch._dynamo  # the optimizer would import it in every fork: a second and a half
import torch.distributed as dist

from tests.helpers.toy_training import BATCH, Run, perform

WORLD = 2
RUN = {"images": 60 * BATCH, "validation": {"every": 10 * BATCH, "images": 20}}
KNOBS = {"checkpoint_every": 3 * BATCH, "keep_checkpoints": 2}


def start(folder: Path, name: str, attempt: int) -> list[int]:
    """Fork the workers of one attempt; they train to the end or die."""
    pids = []
    for rank in range(WORLD):
        pid = os.fork()
        if pid == 0:
            try:
                out = os.open(str(folder / "said.txt"), os.O_WRONLY | os.O_CREAT | os.O_APPEND)
                os.dup2(out, 1)
                os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(WORLD)}
                meeting = f"file://{folder}/meeting-{name}-{attempt}"
                dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=WORLD)
                perform(Run(name, name, KNOBS, section=RUN), folder)
                os._exit(0)
            except BaseException:
                traceback.print_exc()
            finally:
                os._exit(1)
        pids.append(pid)
    return pids


def wait(pids: list[int]) -> bool:
    """Whether all ended well."""
    ends = [os.waitpid(pid, 0)[1] for pid in pids]
    return not any(ends)


def main(folder: Path, kills: int) -> None:
    torch.set_num_threads(1)
    chance = random.Random(20)
    began = time.monotonic()
    assert wait(start(folder, "undisturbed", 0))
    length = time.monotonic() - began
    done = number = 0
    while done < kills:
        name, attempt, finished = f"disturbed{number}", 0, False
        while not finished:
            pids = start(folder, name, attempt)
            if done < kills:
                time.sleep(chance.uniform(0.0, length))
                victim = chance.choice(pids)
                if os.waitpid(victim, os.WNOHANG) == (0, 0):
                    os.kill(victim, signal.SIGKILL)
                    done += 1
                else:
                    pids.remove(victim)
                    finished = wait(pids)
                    break
                # As Ray Train does: the others of the group do not outlive one of them for long.
                for pid in pids:
                    os.kill(pid, signal.SIGKILL)
                wait(pids)
            else:
                finished = wait(pids)
            attempt += 1
        number += 1
    print(done)


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
