"""Another project's `models`, `configs`, `flows` … lie where Python looks first: every door of ours takes our own."""

from __future__ import annotations

import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from infra import jobs, prefect_server
from infra.entrypoint import entrypoint

REPOSITORY = Path(__file__).parents[2]
PACKAGES = ("models", "configs", "tasks", "infra", "flows")
WHERE = ("on PYTHONPATH", "in the current folder")


@pytest.fixture
def other(tmp_path: Path) -> Path:
    """Packages with the names of ours, as research code often has them."""
    root = tmp_path / "other"
    for name in PACKAGES:
        (root / name).mkdir(parents=True)
        (root / name / "__init__.py").write_text('raise ImportError("this is another project")')
    return root


def _paths(*folders: Path | str) -> dict[str, str]:
    return {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, folders))}


def _done(command: list[str], cwd: Path, environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=cwd, env=environment, capture_output=True, text=True, check=False)


def _shows(done: subprocess.CompletedProcess[str]) -> None:
    assert done.returncode == 0, done.stderr
    assert "name: demo_tiny" in done.stdout and not done.stderr


def _console_script(*arguments: str) -> list[str]:
    """The command as pip's script starts it: PYTHONPATH comes first, and what is installed last."""
    with (REPOSITORY / "pyproject.toml").open("rb") as file:
        module, _, function = tomllib.load(file)["project"]["scripts"]["latentforge"].partition(":")
    code = f"import sys; sys.path.append({str(REPOSITORY)!r}); sys.argv = ['latentforge', *{list(arguments)!r}]\n"
    return [sys.executable, "-P", "-c", code + f"from {module} import {function}; {function}()"]


@pytest.mark.parametrize("where", WHERE)
def test_the_command(where: str, other: Path) -> None:
    given = _paths(other) if where == "on PYTHONPATH" else _paths()
    _shows(_done(_console_script("show", "--recipe", "demo_tiny"), other, given))


def _shows_as_a_module(module: str, where: str, other: Path, elsewhere: Path) -> None:
    first = [other] if where == "on PYTHONPATH" else []
    command = [sys.executable, "-m", module, "show", "--recipe", "demo_tiny"]
    _shows(_done(command, elsewhere if first else other, _paths(*first, REPOSITORY)))


@pytest.mark.parametrize("where", WHERE)
def test_the_command_as_a_module(where: str, other: Path, tmp_path: Path) -> None:
    _shows_as_a_module("latentforge", where, other, tmp_path)


@pytest.mark.parametrize("where", WHERE)
def test_python_m_flows_where_that_name_is_free(where: str, other: Path, tmp_path: Path) -> None:
    """Where it is not, Python itself has chosen before a line of ours runs (docs/troubleshooting.md)."""
    (other / "flows" / "__init__.py").unlink()
    (other / "flows").rmdir()
    _shows_as_a_module("flows", where, other, tmp_path)


@pytest.mark.parametrize("where", WHERE)
def test_a_temporary_server(where: str, other: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its process is another Python, which looks in the current folder first unless it is told not to."""
    monkeypatch.chdir(other)
    monkeypatch.setenv("PYTHONPATH", str(other) if where == "on PYTHONPATH" else "")
    found = prefect_server.command(0)
    assert found[1] == "-P"
    code = "import infra.prefect_server; print(infra.prefect_server.__file__)"
    done = _done([found[0], "-P", "-c", code], other, prefect_server.environment())
    assert done.stdout.strip() == prefect_server.__file__, done.stderr


def test_what_a_worker_of_prefect_runs(other: Path) -> None:
    """Its process stands in our folder (`pull` of prefect.yaml) and loads a flow by its file."""
    code = "from prefect.utilities.importtools import import_object; import_object('flows/serve.py:POOL')\n"
    code += "import models; print(models.__path__[0])"
    done = _done([sys.executable, "-P", "-c", code], REPOSITORY, _paths(other))
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == str(REPOSITORY / "models")


def test_workers_of_ray(local_ray: None) -> None:
    """Ray puts each path of a job's configuration before those in front of it."""
    import ray
    from ray.core.generated.common_pb2 import JobConfig

    from infra.cluster import job_config

    config = job_config()
    config._py_driver_sys_path.extend(["/scripts", "/current/folder"])  # as ray.init does it
    sent = JobConfig.FromString(config._serialize())
    assert list(sent.py_driver_sys_path) == ["/scripts", "/current/folder", str(REPOSITORY)]

    @ray.remote
    def path() -> str:
        return sys.path[0]

    assert ray.get(path.remote()) == str(REPOSITORY)


def test_a_job_of_ray(other: Path, tmp_path: Path) -> None:
    """The cluster's machines have another project on PYTHONPATH; a job stands in the code that came with it, which
    Ray names first."""
    from ray._private.runtime_env.context import RuntimeEnvContext
    from ray._private.runtime_env.working_dir import set_pythonpath_in_context

    context = RuntimeEnvContext(env_vars={"PYTHONPATH": str(other)})
    set_pythonpath_in_context(str(REPOSITORY), context)
    given = {**os.environ, **context.env_vars}
    given["PATH"] = os.pathsep.join([str(Path(sys.executable).parent), given["PATH"]])
    line = entrypoint("tasks.job", [str(tmp_path), "shard", "0123456789abcdef"])
    done = _done(["sh", "-c", line], REPOSITORY, given)
    assert done.returncode == 1, done.stderr
    assert f"does not see file://{tmp_path}/shard/0123456789abcdef/{jobs.DESCRIPTION}" in done.stdout, done.stderr
