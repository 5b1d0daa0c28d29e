"""The project's home folder on this machine: artifacts, tracking and servers of the embedded default."""

from __future__ import annotations

import os
from pathlib import Path

from configs.errors import UserError

HOME = "LATENTFORGE_HOME"


def place() -> Path:
    """LATENTFORGE_HOME, or `.latentforge` beside the project's code; it may not exist yet."""
    return Path(os.environ.get(HOME) or Path(__file__).parents[1] / ".latentforge").absolute()


def home() -> Path:
    """The home folder, made when missing.

    Raises:
        UserError: it cannot be made.
    """
    path = place()
    try:
        path.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(
            f"the home folder {path} cannot be made ({error.strerror}): set {HOME} to a folder where you may write"
        ) from None
    return path


def default_root() -> str:
    """Where artifacts go when no root is given: LATENTFORGE_ROOT, or `artifacts` in the home folder."""
    return os.environ.get("LATENTFORGE_ROOT") or str(home() / "artifacts")
