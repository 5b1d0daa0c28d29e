"""A real S3 server (SeaweedFS) on loopback, for as long as a benchmark or the tests run."""

from __future__ import annotations

import json
import secrets
import shutil
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

BUCKET = "latents"


@contextmanager
def s3_server(folder: Path) -> Iterator[dict[str, str]]:
    """Give the environment that reaches a server with one bucket, :data:`BUCKET`, whose files lie in `folder`."""
    weed = shutil.which("weed") or str(Path(sys.executable).parent / "weed")
    key, secret = "benchmark", secrets.token_hex(16)
    identity = {
        "name": key,
        "credentials": [{"accessKey": key, "secretKey": secret}],
        "actions": ["Admin", "Read", "Write", "List", "Tagging"],
    }
    config = folder / "s3.json"
    config.write_text(json.dumps({"identities": [identity]}))
    roles = ("master", "volume", "filer", "s3")
    ports = dict(zip((f"{role}.port{kind}" for role in roles for kind in ("", ".grpc")), free_ports(8), strict=True))
    command = [weed, f"-logdir={folder}", "server", f"-dir={folder}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1", "-s3"]
    command += [f"-{name}={port}" for name, port in ports.items()]
    command += [f"-s3.config={config}", "-master.telemetry=false", "-master.volumeSizeLimitMB=256", "-volume.max=100"]
    command += ["-s3.port.iceberg=0", "-s3.port.lance=0"]  # services at fixed ports that nobody here asks for
    endpoint = f"http://127.0.0.1:{ports['s3.port']}"
    environment = {
        "AWS_ACCESS_KEY_ID": key,
        "AWS_SECRET_ACCESS_KEY": secret,
        "AWS_ENDPOINT_URL": endpoint,
        "AWS_DEFAULT_REGION": "us-east-1",
    }
    with (folder / "weed.log").open("wb") as log:
        server = subprocess.Popen(command, stdout=log, stderr=log)
    try:
        _make_bucket(endpoint, key, secret, server)
        yield environment
    finally:
        server.kill()  # its graceful end takes half a minute, and nothing of it is kept
        server.wait(timeout=30)


def _make_bucket(endpoint: str, key: str, secret: str, server: subprocess.Popen[bytes]) -> None:
    """Wait until the server writes what it is given."""
    import boto3
    from botocore.exceptions import BotoCoreError, ClientError

    client = boto3.client("s3", endpoint_url=endpoint, aws_access_key_id=key, aws_secret_access_key=secret)
    for _attempt in range(240):
        if server.poll() is not None:
            raise RuntimeError(f"{server.args!r} ended with {server.returncode}; see weed.log beside its data")
        try:
            client.create_bucket(Bucket=BUCKET)
            client.put_object(Bucket=BUCKET, Key="ready", Body=b"yes")
            return
        except (BotoCoreError, ClientError):
            time.sleep(0.5)
    raise RuntimeError("the S3 server did not answer within two minutes")


def free_ports(count: int) -> list[int]:
    """Ports that nobody listens at just now."""
    probes = [socket.socket() for _ in range(count)]  # all open at once, so that no two are the same
    try:
        for probe in probes:
            probe.bind(("127.0.0.1", 0))
        return [int(probe.getsockname()[1]) for probe in probes]
    finally:
        for probe in probes:
            probe.close()
