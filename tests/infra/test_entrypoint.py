"""A job runs with the interpreter of the cluster's workers, not with the first Python on a shell's PATH."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from infra.entrypoint import cannot_begin, entrypoint

_RAYLET = "import subprocess, sys; sys.exit(subprocess.call([sys.executable, '-c', {supervisor!r}]))"
_SUPERVISOR = "import subprocess, sys; sys.exit(subprocess.call({line!r}, shell=True))"


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_the_workers_interpreter_is_found(tmp_path: Path) -> None:
    """A raylet, a supervisor below it and its shell, as Ray starts them; PATH leads to another Python."""
    module = tmp_path / "said.py"
    module.write_text("import sys; print(sys.executable, sys.argv[1:])")
    other = tmp_path / "bin"
    other.mkdir()
    (other / "python").write_text("#!/bin/sh\necho the wrong one\n")
    (other / "python").chmod(0o755)
    supervisor = _SUPERVISOR.format(line=entrypoint("said", ["s3://a bucket", "it's"]))
    raylet = [sys.executable, "-c", _RAYLET.format(supervisor=supervisor)]
    path = {"PATH": f"{other}:/usr/bin:/bin"}
    told = f"--python_worker_command={sys.executable} /somewhere/setup_worker.py"
    done = subprocess.run([*raylet, told], cwd=tmp_path, env=path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == f"{sys.executable} {['s3://a bucket', chr(39).join(['it', 's'])]}", done.stderr
    done = subprocess.run(raylet, cwd=tmp_path, env=path, capture_output=True, text=True, check=False)
    assert done.stdout.strip() == "the wrong one", "where no raylet tells, PATH decides"


@pytest.mark.parametrize(
    ("status", "said", "hopeless"),
    [
        (1, "ModuleNotFoundError: No module named 'fsspec'", True),
        (127, "sh: 1: exec: python: not found", True),
        (1, "Failed to connect to GCS within 60 seconds", False),
        (70, "ImportError: in a stage", False),
        (None, "No module named", False),
    ],
)
def test_what_cannot_begin_is_told_from_what_was_lost(status: int | None, said: str, hopeless: bool) -> None:
    assert cannot_begin(status, said) == hopeless
