"""The scripts that make what cloud files name, run with stand-ins for the clouds' command lines."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any

from tests.helpers.cluster_files import INFRA

SETTINGS = {
    "aws": {"ACCOUNT": "123456789012", "BUCKET": "artifacts", "IMAGES": "images"},
    "gcp": {"PROJECT": "project"},
}
_RECORD = """#!/bin/sh
exec {python} -c 'import json, sys; print(json.dumps(sys.argv[1:]), file=open("{log}", "a"))' "$@"
"""


def commands(cloud: str, folder: Path) -> list[list[str]]:
    """What the account's script asks the cloud's command line for, in order."""
    import sys

    log, program = folder / "commands", folder / {"aws": "aws", "gcp": "gcloud"}[cloud]
    program.write_text(_RECORD.format(python=sys.executable, log=log))
    program.chmod(0o755)
    environment = {**SETTINGS[cloud], "PATH": f"{folder}{os.pathsep}{os.environ['PATH']}"}
    subprocess.run(["sh", str(INFRA / "policies" / f"{cloud}.sh")], env=environment, check=True, timeout=60)
    return [json.loads(line) for line in log.read_text().splitlines()]


def options(command: list[str]) -> dict[str, str]:
    """`--name value` and `--name=value` of a command."""
    found: dict[str, str] = {}
    for number, word in enumerate(command):
        if word.startswith("--"):
            name, equals, value = word.removeprefix("--").partition("=")
            found[name] = value if equals else command[number + 1]
    return found


def created(cloud: str, folder: Path) -> set[tuple[str, str]]:
    """Kind and name of everything that the script makes."""
    made: set[tuple[str, str]] = set()
    for command in commands(cloud, folder):
        given = options(command)
        match command:
            case ["iam", "create-role", *_]:
                made.add(("role", given["role-name"]))
            case ["iam", "create-instance-profile", *_]:
                made.add(("instance profile", given["instance-profile-name"]))
            case ["iam", "create-service-linked-role", *_]:
                made.add(("service", given["aws-service-name"]))
            case ["ec2", "create-placement-group", *_]:
                made.add(("placement", given["group-name"]))
            case ["iam", "service-accounts", "create", name, *_]:
                made.add(("account", name))
            case ["secrets", "create", name, *_]:
                made.add(("secret", name))
            case ["compute", "resource-policies", "create", "group-placement", name, *_]:
                made.add(("placement", name))
    return made


def replay_on_aws(folder: Path) -> None:
    """The script's commands as calls of boto3, for a mocked account that refuses where AWS would.

    But for the placement group's: moto knows none.
    """
    import boto3

    for service, verb, *rest in commands("aws", folder):
        if verb == "create-placement-group":
            continue
        given = {_parameter(name): value for name, value in options(rest).items() if name != "region"}
        client: Any = boto3.client(service.removesuffix("api"), region_name="us-east-1")
        getattr(client, verb.replace("-", "_"))(**given)


def _parameter(option: str) -> str:
    return "".join(word.capitalize() for word in option.split("-")).replace("Aws", "AWS")
