"""A driver of stage `encode` in a process of its own, so that a test can kill it: `python -m … job.json`."""

from __future__ import annotations

import json
import sys
from pathlib import Path

from tasks.encode import STAGE
from tasks.stage import Job, perform

if __name__ == "__main__":
    perform(STAGE, Job(**json.loads(Path(sys.argv[1]).read_text())))
