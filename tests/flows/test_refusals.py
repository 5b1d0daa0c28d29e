"""A person's mistakes: one clear line, exit status 1, nothing that a later run would trust."""

from __future__ import annotations

import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from benchmarks.s3_server import free_ports
from tests.flows.conftest import Workplace

Command = Callable[..., tuple[int, str]]


@pytest.fixture
def command(home: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Command:
    """The command line in this process: exit status and what it wrote to standard error."""
    from flows.__main__ import main

    def call(*arguments: str) -> tuple[int, str]:
        monkeypatch.setattr(sys, "argv", ["flows", *arguments])
        with pytest.raises(SystemExit) as ended:
            main()
        return int(ended.value.code or 0), capfd.readouterr().err

    return call


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["--root", "nosuch://bucket"], "nosuch"),
        (["--root", "/proc/nowhere"], "cannot write"),
        (["--recipe", "dmeo"], "did you mean demo"),
        (["--set", "train_dit.imagse=3"], "did you mean images"),
        (["--set", "data.source={kind: folder, path: /no/such/folder}"], "/no/such/folder"),
        (["--recipe", "vavae_f16d32"], "has no section train_dit"),
        (["--recipe", "imagenet256"], "is a base"),
        (["--from", "encoed"], "no such stage"),
        (["--only", "sample", "--from", "sample"], "exclude each other"),
    ],
)
def test_mistakes_are_one_line(command: Command, tmp_path: Path, arguments: list[str], words: str) -> None:
    root = [] if "--root" in arguments else ["--root", str(tmp_path / "root")]
    recipe = [] if "--recipe" in arguments else ["--recipe", "demo_tiny"]
    status, errors = command("run", "sfd-full", *recipe, *root, *arguments)
    assert status == 1
    (line,) = [line for line in errors.splitlines() if line.strip()]
    assert line.startswith("error: ") and words in line
    assert not list(tmp_path.rglob("manifest.json"))


@pytest.mark.parametrize("option", ["--prefect-port", "--mlflow-port"])
def test_a_taken_port_is_not_taken_for_ours(command: Command, home: Path, option: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        free = dict(zip(("--prefect-port", "--mlflow-port"), map(str, free_ports(2)), strict=True))
        arguments = [word for pair in (free | {option: str(port)}).items() for word in pair]
        status, errors = command("serve", *arguments)
    assert status == 1
    assert f"error: port {port} is taken" in errors and option in errors
    assert not list(home.glob("*.log")), "nothing was started"


def test_wrong_keys_are_refused_before_anything_starts(
    command: Command, s3_root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import s3fs

    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", "wrong-secret-value")
    s3fs.S3FileSystem.clear_instance_cache()
    status, errors = command("run", "sfd-full", "--recipe", "demo_tiny", "--root", s3_root)
    assert status == 1
    assert "AWS_ACCESS_KEY_ID" in errors
    assert "wrong-secret-value" not in errors


def test_an_unknown_flow_names_those_there_are(command: Command) -> None:
    status, errors = command("run", "sfd-ful")
    assert status == 1
    assert "sfd-full" in errors


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A real file system of 1 MiB, where this user may mount one."""
    folder = tmp_path / "small"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(folder)], capture_output=True, check=False
    )
    if mounted.returncode:
        pytest.skip("mounting a small file system needs privileges that this user lacks")
    yield folder
    subprocess.run(["umount", "-l", str(folder)], check=True)


@pytest.mark.slow  # a whole run up to the full disk
def test_a_full_disk_stops_the_run_and_leaves_nothing_to_trust(workplace: Workplace, small_disk: Path) -> None:
    refused = workplace.run(
        "--set", "shard.limit=4000", "--set", "shard.rows_per_shard=4000", root=str(small_disk), check=False
    )
    assert refused.returncode == 1
    (line,) = [line for line in refused.stderr.splitlines() if line.startswith("error: ")]
    assert "No space left on device" in line
    assert "Traceback" not in refused.stderr
    assert not list(small_disk.rglob("manifest.json"))


def test_a_read_only_root_is_refused_at_once(command: Command, small_disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    status, errors = command("run", "sfd-full", "--recipe", "demo_tiny", "--root", str(small_disk))
    assert status == 1
    (line,) = [line for line in errors.splitlines() if line.strip()]
    assert "cannot write" in line and "Read-only" in line
