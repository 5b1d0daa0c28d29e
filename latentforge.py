"""The command `latentforge`, under a name of its own.

Our packages have names that other projects have too (`models`, `configs`, `flows` …), and PYTHONPATH may lead to such a
project. Whoever starts here finds ours first.
"""

from __future__ import annotations

import sys
from pathlib import Path


def main() -> None:
    sys.path.insert(0, str(Path(__file__).parent))
    from flows.__main__ import main as command

    command()


if __name__ == "__main__":
    main()
