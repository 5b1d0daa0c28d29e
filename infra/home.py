"""The project's home folder on this machine: artifacts, tracking and servers of the embedded default."""

from __future__ import annotations

import os
from pathlib import Path


def home() -> Path:
    """LATENTFORGE_HOME, or `.latentforge` beside the project's code; made when missing."""
    path = Path(os.environ.get("LATENTFORGE_HOME") or Path(__file__).parents[1] / ".latentforge").absolute()
    path.mkdir(parents=True, exist_ok=True)
    return path


def default_root() -> str:
    """Where artifacts go when no root is given: LATENTFORGE_ROOT, or `artifacts` in the home folder."""
    return os.environ.get("LATENTFORGE_ROOT") or str(home() / "artifacts")
