"""The shell's line that starts a job on a cluster with the interpreter that the cluster's own workers have.

Ray hands a job's line to a shell, whose PATH may lead to another Python than the one that Ray and its libraries are
installed for. The shell is a child of the job's supervisor, which is a worker of Ray's, a child of the raylet; and the
raylet was told how to start workers. Where none of that is to be seen (another system than Linux), `python` has to do.
"""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence

_FIND = (
    "raylet=$(sed 's/.*) . //; s/ .*//' /proc/$PPID/stat 2>/dev/null); "
    r"python=$(tr '\0' '\n' 2>/dev/null < /proc/$raylet/cmdline | "
    r"sed -n 's/^--python_worker_command=\([^ ]*\) .*/\1/p' | head -n 1); "
    '[ -x "$python" ] || python=python; '
)
_HOPELESS = {1, 2, 126, 127}
"""Exit statuses of a shell or a Python that could not even begin; ours are told apart by what they say."""
_SAID = re.compile(
    r"No module named|ModuleNotFoundError|ImportError|SyntaxError|can't open file|not found|Permission denied"
)


def entrypoint(module: str, arguments: Sequence[str]) -> str:
    """Run a module of ours on the cluster, as the process that the shell becomes."""
    return f'{_FIND}exec "$python" -m {shlex.join([module, *arguments])}'


def cannot_begin(status: int | None, said: str) -> bool:
    """Whether a job ended because its interpreter has not what it takes, which no other attempt would change."""
    return status in _HOPELESS and bool(_SAID.search(said))
