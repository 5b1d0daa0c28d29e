"""The one command for one rented machine: refusals before anything is fetched, the plan's dollars, the run.

Every program it calls is a stand-in that writes down how it was called.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml
from typer.testing import CliRunner

from configs import load_recipe
from configs.cluster import load_cluster

REPOSITORY = Path(__file__).parents[2]


class Machine:
    """A bare machine with a clone of the repository; `calls` says what was asked of it."""

    def __init__(self, folder: Path, gpu: str | None) -> None:
        self.folder = folder
        self.programs = folder / "programs"
        for each in (self.programs, folder / "infra", folder / "home"):
            each.mkdir()
        shutil.copy(REPOSITORY / "infra" / "one_gpu.sh", folder / "infra")
        self.log = folder / "calls"
        self.log.touch()
        if gpu is not None:
            self.program("nvidia-smi", f'echo "{gpu}"')
        for name in ("apt-get", "g++", "python3", "python3.11", "sudo"):
            self.program(name, "true")
        self.program("nproc", "echo 26")
        self.program("df", "printf 'Avail\\n100G\\n'")
        python = 'mkdir -p .venv/bin; cp "$0" .venv/bin/python'
        self.program("make", f"{python}; true")
        self.answers("exit 0")

    def program(self, name: str, script: str) -> None:
        (self.programs / name).write_text(f'#!/bin/bash\necho "{name} $*" >> {self.log}\n{script}\n')
        (self.programs / name).chmod(0o755)

    def answers(self, to_run: str) -> None:
        """What our own command line does when it is asked to run a flow."""
        script = f'#!/bin/bash\necho "python $*" >> {self.log}\n[ "$3" != run ] || {{ {to_run}; }}\n'
        (self.folder / "python").write_text(script)
        self.program("make", f"mkdir -p .venv/bin; cp {self.folder}/python .venv/bin/python; chmod +x .venv/bin/python")

    def run(self, *arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
        given = {"PATH": f"{self.programs}:/usr/bin:/bin", "HOME": str(self.folder / "home"), **environment}
        command = ["bash", str(self.folder / "infra" / "one_gpu.sh"), *arguments]
        return subprocess.run(command, env=given, capture_output=True, text=True, timeout=60, check=False)

    @property
    def calls(self) -> list[str]:
        return self.log.read_text().splitlines()

    def call(self, start: str) -> list[str]:
        (found,) = [each for each in self.calls if each.startswith(start)]
        return found.split()


@pytest.mark.parametrize(
    ("gpu", "arguments", "words"),
    [
        (None, ("s3://b/p", "sfd-full"), "no NVIDIA driver"),
        ("NVIDIA H100, 570.133.20", ("s3://b/p", "sfd-full"), "driver 570.133.20 is older than 580"),
        ("NVIDIA H100, 580.82.07", ("s3://b/p",), "give a root and a flow"),
    ],
)
def test_what_will_not_do_is_refused_before_anything_is_fetched(
    tmp_path: Path, gpu: str | None, arguments: tuple[str, ...], words: str
) -> None:
    machine = Machine(tmp_path, gpu)
    ended = machine.run(*arguments)
    assert ended.returncode == 1 and ended.stderr.startswith("error: ") and words in ended.stderr
    assert not [each for each in machine.calls if each.startswith(("apt-get", "make", "python"))]


def test_a_full_disk_is_refused(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "NVIDIA H100, 580.82.07")
    machine.program("df", "printf 'Avail\\n 12G\\n'")
    assert "12 GB free" in machine.run("s3://b/p", "sfd-full").stderr


def test_from_a_bare_machine_to_a_run(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "NVIDIA A100-SXM4-80GB, 580.82.07")
    ended = machine.run("s3://bucket/prefix", "sfd-full", "--recipe", "demo", PRICE="1.29")
    assert ended.returncode == 0, ended.stderr
    kinds = [each.split()[0:4] for each in machine.calls if each.startswith("python -m")]
    assert kinds == [
        ["python", "-m", "infra.gpus", "1"],
        ["python", "-m", "latentforge", "plan"],
        ["python", "-m", "latentforge", "run"],
    ]
    assert "PYTHON=" + str(machine.programs / "python3.11") in machine.call("make")
    run, plan = machine.call("python -m latentforge run"), machine.call("python -m latentforge plan")
    assert run[-2:] == ["--root", "s3://bucket/prefix"] and run[4:-2] == plan[4:-2], "the plan is the run's"
    compute = load_recipe("sfd_xl_80ep", [run[n + 1] for n, word in enumerate(run) if word == "--set"]).compute
    assert (compute.train.workers, compute.train.gpus_per_worker, compute.train.cpus_per_worker) == (1, 1, 8)
    assert (compute.actors.actors, compute.actors.gpus_per_actor) == (1, 1)
    here = tmp_path / ".latentforge" / "one_gpu" / "here.yaml"
    head = load_cluster(str(here)).pools["head"]
    assert (head.cpus, head.gpu, head.bf16_tflops, head.dollars_per_hour) == (26, "NVIDIA A100-SXM4-80GB", 312.0, 1.29)


def test_an_unknown_gpu_is_told_and_planned_as_an_h100(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "NVIDIA B999, 600.1")
    ended = machine.run("s3://bucket/prefix", "sfd-full", PLAN_ONLY="1")
    assert ended.returncode == 0 and "the plan's times are an H100's" in ended.stdout
    head = load_cluster(str(tmp_path / ".latentforge" / "one_gpu" / "here.yaml")).pools["head"]
    assert (head.machine, head.bf16_tflops, head.dollars_per_hour) == ("NVIDIA B999", 989.0, 2.5)
    assert not [each for each in machine.calls if each.startswith("python -m latentforge run")]


def test_a_failed_run_ends_with_its_status_and_its_words(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "NVIDIA H100, 580.82.07")
    machine.answers("echo error: access denied; exit 3")
    ended = machine.run("s3://bucket/prefix", "sfd-full")
    assert ended.returncode == 3 and "error: access denied" in ended.stdout
    machine.answers("exit 0")
    assert machine.run("s3://bucket/prefix", "sfd-full").returncode == 0, "the same command again"


def test_a_second_terminal_follows_the_run_of_the_first(tmp_path: Path) -> None:
    machine = Machine(tmp_path, "NVIDIA H100, 580.82.07")
    work = tmp_path / ".latentforge" / "one_gpu"
    work.mkdir(parents=True)
    (work / "run.log").write_text("train_dit 1,000 images\n")
    run = ("-m", "latentforge", "run", "sfd-full")
    going_on = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(1)", *run])
    threading.Thread(
        target=going_on.wait, daemon=True
    ).start()  # as whoever started it would, else it stays in the table
    (work / "pid").write_text(str(going_on.pid))
    (work / "status").write_text("0")
    try:
        ended = machine.run("s3://bucket/prefix", "sfd-full")
        assert "a run goes on here already" in ended.stdout and "train_dit 1,000 images" in ended.stdout
        assert not [each for each in machine.calls if each.startswith("python -m")]
    finally:
        going_on.kill()
        going_on.wait()


def test_another_process_of_that_number_is_not_followed(tmp_path: Path) -> None:
    """After a restart the number of the run that ended with the machine may be anybody's."""
    machine = Machine(tmp_path, "NVIDIA H100, 580.82.07")
    work = tmp_path / ".latentforge" / "one_gpu"
    work.mkdir(parents=True)
    (work / "pid").write_text(str(os.getpid()))
    ended = machine.run("s3://bucket/prefix", "sfd-full")
    assert ended.returncode == 0 and "goes on here already" not in ended.stdout
    assert machine.call("python -m latentforge run")


def test_the_page_is_true() -> None:
    page = (REPOSITORY / "docs" / "one_gpu.md").read_text()
    for name in re.findall(r"`((?:infra|configs|docs)/[\w./-]+\.\w+)`", page):
        assert (REPOSITORY / name).is_file(), name
    assert "bash infra/one_gpu.sh" in page and os.access(REPOSITORY / "infra" / "one_gpu.sh", os.R_OK)
    head = yaml.safe_load((REPOSITORY / "configs" / "clusters" / "one_gpu.yaml").read_text())["pools"]["head"]
    assert f"${head['dollars_per_hour']:.2f} an hour" in page


@pytest.mark.parametrize("recipe", ["sfd_xl_80ep", "lightningdit_xl_64ep"])
def test_the_pages_dollars_are_the_plans(recipe: str) -> None:
    """Within a third: a plan that has moved further than that needs another line on the page."""
    from flows.__main__ import app

    one = ["compute.train.workers=1", "compute.actors.actors=1", "compute.actors.gpus_per_actor=1"]
    words = [word for each in one for word in ("--set", each)]
    told = CliRunner().invoke(app, ["plan", "sfd-full", "--recipe", recipe, "--cluster", "one_gpu", "--json", *words])
    dollars = json.loads(told.stdout)["totals"]["dollars"]
    page = (REPOSITORY / "docs" / "one_gpu.md").read_text()
    row = next(line for line in page.splitlines() if line.startswith(f"| `{recipe}` |"))
    assert float(row.split("|")[3]) == pytest.approx(dollars, rel=0.33)
