"""Where compiled graphs are kept: what one process has compiled, another loads in seconds."""

from __future__ import annotations

import os
from pathlib import Path

from infra.home import home

FOLDER = "TORCHINDUCTOR_CACHE_DIR"
"""torch's own environment variable. A folder that several machines see serves them all: files are written whole, and
their names say code, shapes, torch and kind of device."""


def keep_compiled() -> Path:
    """Called before anything is compiled: graphs go to a folder of the home, or to where FOLDER says, and not to the
    temporary folder that torch would take, which a restarted machine or container has lost."""
    path = Path(os.environ.setdefault(FOLDER, str(home() / "compiled")))
    path.mkdir(parents=True, exist_ok=True)
    return path
