"""What shells, containers and homes bring along is told by name before anything starts."""

from __future__ import annotations

import errno
import os
import shutil
import socket
import sqlite3
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from alembic.script import ScriptDirectory

from configs import UserError
from infra import databases, environment, machine, proxies, servers

REPOSITORY = Path(__file__).parents[2]


@contextmanager
def answering(status: int = 200, body: bytes = b"OK") -> Iterator[tuple[str, list[str]]]:
    """A real HTTP server on loopback that says the same to everyone; its HOST:PORT and what was asked of it."""
    asked: list[str] = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            asked.append(self.path)
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        do_CONNECT = do_GET

        def log_message(self, *_: object) -> None: ...

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield f"127.0.0.1:{server.server_port}", asked
    finally:
        server.shutdown()
        server.server_close()


@contextmanager
def speaking(words: bytes) -> Iterator[str]:
    """A server of another kind, which says so before it is asked anything; its HOST:PORT."""
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    with listener.accept()[0] as visitor:
                        visitor.sendall(words)
                        visitor.recv(1000)

        threading.Thread(target=serve, daemon=True).start()
        yield f"127.0.0.1:{listener.getsockname()[1]}"
        listener.shutdown(socket.SHUT_RDWR)


@pytest.fixture
def dead() -> str:
    """A port of loopback where nobody listens."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        return f"127.0.0.1:{listener.getsockname()[1]}"


@pytest.fixture
def no_proxies(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.lower().endswith("_proxy"):
            monkeypatch.delenv(name)


# --------------------------------------------------------------------------------------------------------- addresses


@pytest.mark.parametrize("address", ["http://127.0.0.1:8265", "https://ray.example.com"])
def test_an_address_of_the_jobs_api_is_no_ray_address(address: str) -> None:
    with pytest.raises(UserError, match=r"RAY_ADDRESS is http.*RAY_API_SERVER_ADDRESS"):
        servers.check_ray(address)


def test_dead_and_wrong_ray_addresses(dead: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UserError, match=r"RAY_ADDRESS is .*nothing answers.*unset it"):
        servers.check_ray(dead)
    with answering() as (place, _), pytest.raises(UserError, match=r"RAY_ADDRESS is .*something else than Ray"):
        servers.check_ray(place)
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    with pytest.raises(UserError, match=r"RAY_ADDRESS is auto, but no Ray runs"):
        servers.check_ray("auto")
    (tmp_path / "ray").mkdir()
    (tmp_path / "ray" / "ray_current_cluster").write_text(dead)  # of a Ray that has ended since
    with pytest.raises(UserError, match=rf"RAY_ADDRESS is auto \({dead}\), where nothing answers"):
        servers.check_ray("auto")
    with pytest.raises(UserError, match=r"expected HOST:PORT"):
        servers.check_ray("somewhere")
    with pytest.raises(UserError, match=r"Ray's client"):
        servers.check_ray("ray://127.0.0.1:10001")


def test_a_real_ray_passes(local_ray: None) -> None:
    import ray

    address = ray.get_runtime_context().gcs_address
    assert servers.check_ray(address) == f"a cluster at {address}"


def test_dead_servers(dead: str, no_proxies: None) -> None:
    with pytest.raises(UserError, match=r"PREFECT_API_URL is .*nothing answers.*unset it"):
        servers.check_prefect(f"http://{dead}/api")
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI is .*nothing answers.*unset it"):
        servers.check_mlflow(f"http://{dead}")
    with answering(404, b"") as (place, _):
        with pytest.raises(UserError, match=r"ends in /api"):
            servers.check_prefect(f"http://{place}")
        with pytest.raises(UserError, match=r"something else than MLflow"):
            servers.check_mlflow(f"http://{place}")
    with answering() as (place, asked):
        assert place in servers.check_prefect(f"http://{place}/api")
        assert place in servers.check_mlflow(f"http://{place}")
    assert asked == ["/api/health", "/health"]


def test_servers_that_speak_no_http(no_proxies: None) -> None:
    """Another service's port is told like a dead one: neither a run nor a report ends in a traceback."""
    with speaking(b"SSH-2.0-OpenSSH_9.2\r\n") as place:
        for check, url in ((servers.check_prefect, f"http://{place}/api"), (servers.check_mlflow, f"http://{place}")):
            with pytest.raises(UserError, match=r"nothing answers \(but something that speaks no HTTP\).*unset it"):
                check(url)
        assert servers.version_of(f"http://{place}") is None


def test_addresses_with_passwords_are_refused_without_them() -> None:
    with pytest.raises(UserError, match="PREFECT_API_AUTH_STRING") as told:
        servers.check_prefect("http://me:geheim@127.0.0.1:4200/api")
    assert "geheim" not in str(told.value)


@pytest.mark.parametrize("uri", ["mlruns", "/data/mlruns", "file:///data/mlruns"])
def test_folders_of_runs_are_refused(uri: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_ALLOW_FILE_STORE", raising=False)
    with pytest.raises(UserError, match=r"MLFLOW_TRACKING_URI is .*a folder.*migrate-filestore"):
        servers.check_mlflow(uri)
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    assert servers.check_mlflow(uri) == uri


# ----------------------------------------------------------------------------------------------------------- proxies


def test_loopback_goes_through_no_proxy(no_proxies: None, monkeypatch: pytest.MonkeyPatch) -> None:
    with answering(502) as (refusing, asked), answering() as (server, _):
        monkeypatch.setenv("http_proxy", f"http://{refusing}")
        monkeypatch.setenv("NO_PROXY", "internal.example.com")
        with pytest.raises(UserError, match=r"the proxy of http_proxy answers 502"):
            servers.check_mlflow(f"http://{server}")
        proxies.spare_loopback()
        assert os.environ["no_proxy"] == os.environ["NO_PROXY"] == "internal.example.com,127.0.0.1,localhost,::1"
        asked.clear()
        servers.check_mlflow(f"http://{server}")
        assert not asked
        with pytest.raises(UserError, match=r"http_proxy.*NO_PROXY"):
            servers.check_mlflow("http://mlflow.example.com")
        assert asked == ["http://mlflow.example.com/health"]


def test_a_shell_without_proxies_stays_as_it_is() -> None:
    environment_of: dict[str, str] = {"PATH": "/bin"}
    proxies.spare_loopback(environment_of)
    assert environment_of == {"PATH": "/bin"}


# --------------------------------------------------------------------------------------------------------- databases


def _database(path: Path, revision: str) -> Path:
    with closing(sqlite3.connect(path)) as base:
        base.execute("CREATE TABLE alembic_version (version_num VARCHAR(32) NOT NULL)")
        base.execute("INSERT INTO alembic_version VALUES (?)", [revision])
        base.commit()
    return path


@pytest.mark.parametrize("kind", [databases.PREFECT, databases.MLFLOW], ids=lambda kind: kind.name)
def test_databases_of_another_version_are_refused(kind: databases.Kind, tmp_path: Path) -> None:
    known, newest = databases.revisions(kind)
    databases.check(tmp_path / "none.db", kind, "VARIABLE")
    databases.check(_database(tmp_path / "same.db", newest), kind, "VARIABLE")
    with pytest.raises(UserError, match=r"another version.*ffffffffffff.*VARIABLE"):
        databases.check(_database(tmp_path / "newer.db", "ffffffffffff"), kind, "VARIABLE")
    older = _database(tmp_path / "older.db", min(known - {newest}))
    if kind.migrates:
        databases.check(older, kind, "VARIABLE")
    else:
        with pytest.raises(UserError, match=r"older version.*mlflow db upgrade sqlite:///"):
            databases.check(older, kind, "VARIABLE")
    (tmp_path / "text.db").write_text("no database at all, but a text that is long enough " * 10)
    with pytest.raises(UserError, match=r"damaged or none.*VARIABLE"):
        databases.check(tmp_path / "text.db", kind, "VARIABLE")


def test_revisions_are_those_that_alembic_finds(tmp_path: Path) -> None:
    from importlib.util import find_spec

    for kind in (databases.PREFECT, databases.MLFLOW):
        spec = find_spec(kind.package)
        assert spec is not None and spec.submodule_search_locations
        folder = Path(spec.submodule_search_locations[0]) / kind.migrations
        script = ScriptDirectory(str(tmp_path), version_locations=[str(folder)])
        assert databases.revisions(kind)[1] == script.get_current_head()


# ----------------------------------------------------------------------------------------------- folders and machines


def test_temporary_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    environment.check_temporary(local_ray=True)
    long = tmp_path / "_".join(["scratch_of_the_job"] * 3)
    long.mkdir()
    monkeypatch.setenv("TMPDIR", str(long))
    with pytest.raises(UserError, match=r"TMPDIR is .* characters long.*RAY_TMPDIR"):
        environment.check_temporary(local_ray=True)
    environment.check_temporary(local_ray=False)
    monkeypatch.setenv("RAY_TMPDIR", "/tmp")
    environment.check_temporary(local_ray=True)
    monkeypatch.setenv("TMPDIR", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"TMPDIR is .*no folder"):
        environment.check_temporary(local_ray=False)


def test_a_home_that_cannot_be_made_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setenv("LATENTFORGE_HOME", str(tmp_path / "file" / "home"))
    with pytest.raises(UserError, match=r"home folder .*LATENTFORGE_HOME"):
        environment.check_home()


def test_a_home_on_a_disk_without_locks_is_told(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some file systems of clusters are: every command would end in a traceback at its first lock."""

    def refuse(file: object, kind: int) -> None:
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    assert environment.check_home() == str(home)
    monkeypatch.setattr("fcntl.flock", refuse)
    with pytest.raises(UserError, match=r"without locks \(No locks available\): set LATENTFORGE_HOME"):
        environment.check_home()


@pytest.mark.skipif(os.geteuid() != 0 or not shutil.which("setpriv"), reason="only root becomes somebody else")
def test_a_user_without_a_name_and_a_home() -> None:
    """As containers run with --user: no entry in /etc/passwd, and HOME is / or not set."""
    given = {name: value for name, value in os.environ.items() if name not in ("USER", "LOGNAME", "PREFECT_HOME")}
    code = "import sys; sys.path.append(sys.argv[1]); import flows; from infra import environment\n"
    code += "print([f'{each.name}: {each.text}' for each in environment.look() if each.level == 'refused'])"
    somebody = ["setpriv", "--reuid", "54321", "--regid", "54321", "--clear-groups"]
    if subprocess.run([*somebody, sys.executable, "-c", "import yaml"], capture_output=True, check=False).returncode:
        pytest.skip("others cannot read this Python's packages")
    with tempfile.TemporaryDirectory(dir="/tmp") as folder:
        Path(folder).chmod(0o777)
        given |= {"HOME": "/", "LATENTFORGE_HOME": f"{folder}/home", "TMPDIR": "/tmp"}
        command = [*somebody, sys.executable, "-P", "-c", code, str(REPOSITORY)]
        told = subprocess.run(command, cwd=folder, env=given, capture_output=True, text=True, check=False)
    assert told.stdout.strip() == "[]", told.stderr


def test_little_shared_memory_is_a_note(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(machine, "free", lambda folder: 64 * 2**20)
    with pytest.raises(environment.Note, match=r"64 MiB left.*--shm-size"):
        environment.check_shared_memory(tmp_path)


@pytest.mark.parametrize(
    ("files", "quota"),
    [
        ({"cpu.max": "150000 100000"}, 1.5),
        ({"cpu.max": "max 100000"}, None),
        ({"cpu/cpu.cfs_quota_us": "400000", "cpu/cpu.cfs_period_us": "100000"}, 4.0),
        ({"cpu/cpu.cfs_quota_us": "-1", "cpu/cpu.cfs_period_us": "100000"}, None),
        ({}, None),
    ],
)
def test_quotas_of_containers(files: dict[str, str], quota: float | None, tmp_path: Path) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"{text}\n")
    assert machine.cpu_quota(tmp_path) == quota
    allowed = len(os.sched_getaffinity(0))
    assert machine.cpus(tmp_path) == (allowed if quota is None else max(1, min(allowed, int(quota))))


def test_memory_of_containers(tmp_path: Path) -> None:
    whole = machine.memory(tmp_path)
    (tmp_path / "memory.max").write_text("1073741824\n")
    assert machine.memory(tmp_path) == 2**30 < whole
    (tmp_path / "memory.max").write_text("max\n")
    assert machine.memory(tmp_path) == whole


# ------------------------------------------------------------------------------------------------------- all together


def test_all_that_is_wrong_is_told_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def wrong(text: str) -> environment.Check:
        def check() -> str:
            raise UserError(text)

        return check

    monkeypatch.setattr(environment, "checks", lambda: {"one": wrong("first"), "two": wrong("second")})
    with pytest.raises(UserError, match="first\nerror: second"):
        environment.require()
    environment.require("three")


def test_a_check_that_does_not_end_is_told_and_holds_nobody() -> None:
    release = threading.Event()
    started = time.monotonic()
    stuck, fine = environment.look({"stuck": lambda: str(release.wait(60)), "fine": lambda: "well"}, seconds=0.2)
    assert time.monotonic() - started < 30
    assert (stuck.level, fine.level) == ("refused", "fine")
    assert "stuck did not answer" in stuck.text
    release.set()


def test_a_check_that_fails_itself_stands_in_nobodys_way() -> None:
    def broken() -> str:
        raise KeyError("odd")

    (finding,) = environment.look({"broken": broken})
    assert finding.level == "note" and "KeyError" in finding.text


def test_doctor_tells_all_and_keeps_secrets(dead: str, tmp_path: Path) -> None:
    """The command itself, in an environment with everything wrong."""
    given = {
        **{name: value for name, value in os.environ.items() if not name.lower().endswith("_proxy")},
        "LATENTFORGE_HOME": str(tmp_path / "home"),
        "RAY_ADDRESS": dead,
        "PREFECT_API_URL": f"http://{dead}/api",
        "MLFLOW_TRACKING_URI": f"http://{dead}",
        "https_proxy": f"http://me:geheim@{dead}",
        "all_proxy": f"me:geheim@{dead}",
        "HTTP_PROXY": f"http://me:geheim?@{dead}",
        "AWS_SECRET_ACCESS_KEY": "geheim",
    }
    command = [sys.executable, "-m", "latentforge", "doctor"]
    done = subprocess.run(command, cwd=REPOSITORY, env=given, capture_output=True, text=True, check=False)
    assert done.returncode == 1, done.stderr
    assert not done.stderr
    wrong = [line for line in done.stdout.splitlines() if ": WRONG" in line]
    assert [line.split(":")[0] for line in wrong] == ["Prefect", "MLflow", "Ray"]
    assert "geheim" not in done.stdout
    assert done.stdout.count(f"…@{dead}") == 3
    assert {"python", "CPUs", "memory", "libraries"} <= {line.split(" ")[0] for line in done.stdout.splitlines()}
