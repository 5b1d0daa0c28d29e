"""Prefect's server and MLflow's on one PostgreSQL, as on a cluster (infra/kubernetes/servers.yaml)."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.conftest import free_port
from tests.flows.conftest import Workplace

pytestmark = pytest.mark.slow

_BINARIES = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
_PASSWORD = "not-a-secret-outside-tests"


@pytest.fixture(scope="module")
def postgres() -> Iterator[int]:
    """Port of a PostgreSQL on loopback with the databases `prefect` and `mlflow`, that wants a password."""
    if not _BINARIES:
        pytest.skip("no PostgreSQL under /usr/lib/postgresql: install the package `postgresql`")
    binaries, folder, port = _BINARIES[-1].parent, Path(tempfile.mkdtemp(prefix="lf-pg-")), free_port()
    data, password = folder / "data", folder / "password"
    password.write_text(_PASSWORD)
    prefix: list[str] = []
    if os.getuid() == 0:  # PostgreSQL refuses root
        prefix = ["runuser", "-u", "postgres", "--"]
        owner = pwd.getpwnam("postgres")
        for path in (folder, password):
            os.chown(path, owner.pw_uid, owner.pw_gid)
    make = ["initdb", "-D", data, "-U", "latentforge", "--auth=scram-sha-256", f"--pwfile={password}"]
    subprocess.run([*prefix, binaries / make[0], *make[1:]], check=True, capture_output=True, cwd=folder)
    serve = ["-D", data, "-p", str(port), "-k", folder, "-c", "listen_addresses=127.0.0.1"]
    with (folder / "log").open("wb") as log:
        server = subprocess.Popen([*prefix, binaries / "postgres", *serve], stdout=log, stderr=log, cwd=folder)
    try:
        for name in ("prefect", "mlflow"):
            _ask(port, "postgres", f"CREATE DATABASE {name}", patience=60)
        yield port
    finally:
        server.terminate()
        server.wait(timeout=60)
        shutil.rmtree(folder, ignore_errors=True)


def test_servers_on_postgres(alone: Workplace, postgres: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from flows.serve import running

    place = f"latentforge:{_PASSWORD}@127.0.0.1:{postgres}"
    for name, value in {
        **alone.environment,
        "PREFECT_SERVER_DATABASE_CONNECTION_URL": f"postgresql+asyncpg://{place}/prefect",
        "MLFLOW_BACKEND_STORE_URI": f"postgresql+psycopg2://{place}/mlflow",
    }.items():
        monkeypatch.setenv(name, value)
    with running(free_port(), free_port()) as environment:
        parameters = json.dumps({"root": str(tmp_path), "only": "shard"})
        command = ["deployment", "run", "sfd-full/demo-tiny", "--watch", "--params", parameters]
        done = subprocess.run(
            [str(Path(sys.executable).parent / "prefect"), *command],
            env={**os.environ, **environment}, capture_output=True, text=True, timeout=400, check=False,
        )  # fmt: skip
        assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    assert _ask(postgres, "prefect", "SELECT name FROM flow_run WHERE state_type = 'COMPLETED'") == [("demo_tiny",)]
    assert ("latentforge",) in _ask(postgres, "prefect", "SELECT name FROM work_pool")
    runs = _ask(postgres, "mlflow", "SELECT name, status FROM runs ORDER BY start_time")
    assert runs == [("demo_tiny", "FINISHED"), ("shard", "FINISHED")]
    assert _ask(postgres, "mlflow", "SELECT value FROM latest_metrics WHERE key = 'rows'") == [(640.0,)]
    assert _PASSWORD not in "".join(path.read_text(errors="replace") for path in alone.home.glob("*.log"))


def _ask(port: int, database: str, query: str, patience: float = 0.0) -> list[tuple[Any, ...]]:
    import psycopg2

    until = time.monotonic() + patience
    while True:
        try:
            reach = psycopg2.connect(
                host="127.0.0.1", port=port, dbname=database, user="latentforge", password=_PASSWORD
            )
            break
        except psycopg2.OperationalError:
            if time.monotonic() > until:
                raise
            time.sleep(0.3)
    reach.autocommit = True
    try:
        with reach.cursor() as cursor:
            cursor.execute(query)
            return cursor.fetchall() if cursor.description else []
    finally:
        reach.close()
