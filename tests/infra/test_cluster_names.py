"""Every name in the files that start clusters is made by one of them, or stands in the page's list of what to make."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path
from typing import Any

import pytest

from tests.helpers.cloud_accounts import SETTINGS, created
from tests.helpers.cluster_files import CLOUDS, INFRA, REPOSITORY, manifests, pods, ray_up, walk

KINDS = {
    "aws": {
        r".*/IamInstanceProfile/Arn": "instance profile",
        r".*/Placement/GroupName": "placement",
    },
    "gcp": {
        r".*/serviceAccounts/\d+/email": "account",
        r".*/resourcePolicies/\d+": "placement",
        r".*/tags/items/\d+": "network tag",
    },
}
"""By path in a file for `ray up`: what the last part of a name there is the name of."""
NO_NAMES = (
    r"/cluster_name",
    r"/docker/(image|container_name)",
    r"/docker/run_options/\d+",
    r"/\w*commands/\d+",
)
"""Paths at which our name stands for something that Ray or the command itself makes, or the image."""


def listed() -> set[tuple[str, str]]:
    """Kind and name in the page's table of what must be there before."""
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    table = page.partition("| what must be there |")[2].partition("\n\n")[0]
    rows = [line.split("|")[1] for line in table.splitlines()[2:]]
    return {(kind.strip(), name) for row in rows for kind, _, names in [row.partition(":")] for name in _ticked(names)}


def _ticked(text: str) -> list[str]:
    return re.findall(r"`([^`]+)`", text)


@pytest.mark.parametrize("cloud", CLOUDS)
def test_ray_up_names_what_there_is(cloud: str, tmp_path: Path) -> None:
    there = created(cloud, tmp_path) | listed()
    used = set()
    for path, value in walk(ray_up(cloud)):
        if not isinstance(value, str):
            continue
        kind = next((kind for pattern, kind in KINDS[cloud].items() if re.fullmatch(pattern, path)), None)
        if kind is not None:
            used.add((kind, re.split(r"[/:@]", value.partition("@")[0])[-1]))
        elif "latentforge" in value:
            assert any(re.fullmatch(pattern, path) for pattern in NO_NAMES), f"{path}: who makes {value}?"
        used |= {("secret", name) for name in re.findall(r"--secret=([\w-]+)", value)}
    assert {kind for kind, _ in used} >= set(KINDS[cloud].values())
    assert used <= there, used - there


def test_aws_knows_spot_before_a_spot_machine_is_asked_for(tmp_path: Path) -> None:
    assert ("service", "spot.amazonaws.com") in created("aws", tmp_path)


def test_machines_by_ssh_have_what_the_file_takes_from_them() -> None:
    """Files of the operator and of each machine, and what its commands need, stand in their section of the page."""
    text = (INFRA / "ray" / "ssh.yaml").read_text()
    page = (REPOSITORY / "docs" / "operations.md").read_text()
    section = page.partition("## Machines by SSH")[2].partition("\n## ")[0]
    files = set(re.findall(r"~/[\w./]+", text)) - {"~/ray_bootstrap_config.yaml"}  # Ray's own
    assert files == {"~/.ssh/id_ed25519", "~/latentforge.env", "~/.ray/auth_token"}
    made = section.replace("`ray get-auth-token --generate`", "`~/.ray/auth_token`")
    assert files <= set(_ticked(made))
    assert set(re.findall(r"REPLACE-(?:HEAD|WORKER)", text)) == set(re.findall(r"REPLACE-(?:HEAD|WORKER)", section))
    assert ("sudo " in text) is ("`sudo` without a password" in section)
    assert ("--gpus all" in text) is ("container toolkit" in section)


def test_policies_speak_of_roles_that_there_are(tmp_path: Path) -> None:
    text = "\n".join(path.read_text() for path in (INFRA / "policies").glob("*.json"))
    roles = {("role", name) for name in re.findall(r":role/([\w-]+)", text)}
    assert roles and roles <= created("aws", tmp_path)


def test_kubernetes_names_what_there_is() -> None:
    there = {(each["kind"], each["metadata"]["name"]) for each in manifests().values()} | listed()
    there |= {
        ("key", f"{each['metadata']['name']}/{key}") for each in manifests().values() for key in each.get("data", {})
    }
    there |= {("Secret", each["metadata"]["name"]) for each in manifests().values() if each["kind"] == "RayCluster"}
    there |= {("Service", f"{each['metadata']['name']}-head-svc") for each in manifests().values()}
    used: set[tuple[str, str]] = set()
    for each in manifests().values():
        if "namespace" in each["metadata"]:
            used.add(("Namespace", each["metadata"]["namespace"]))
        role = each["metadata"].get("annotations", {}).get("eks.amazonaws.com/role-arn")
        if role:
            used.add(("role", role.rpartition("/")[2]))
        for path, value in walk(each):
            if path.endswith("namespaceSelector/matchLabels/kubernetes.io/metadata.name"):
                used.add(("Namespace", value))
            if path.endswith("clusterSelector/ray.io/cluster"):
                used.add(("RayCluster", value))
        if each["kind"] == "RoleBinding":
            used |= {(each["roleRef"]["kind"], each["roleRef"]["name"])}
            used |= {(subject["kind"], subject["name"]) for subject in each["subjects"]}
    for pod in pods().values():
        used |= _of_pod(pod["spec"])
    assert used <= there, used - there
    assert ("node label", "latentforge/pool=train") in used and ("Secret", "latentforge-databases") in used


def _of_pod(spec: dict[str, Any]) -> set[tuple[str, str]]:
    used = {("node label", f"{key}={value}") for key, value in spec.get("nodeSelector", {}).items()}
    used |= {("node taint", f"{each['key']}={each['value']}") for each in spec.get("tolerations", [])}
    if "serviceAccountName" in spec:
        used.add(("ServiceAccount", spec["serviceAccountName"]))
    for path, value in walk(spec):
        if re.search(r"configMap(Ref|KeyRef)?/name$", path):
            used.add(("ConfigMap", value))
        if re.search(r"secret(Ref|KeyRef)/name$|secret/secretName$", path):
            used.add(("Secret", value))
        if isinstance(value, str):
            used |= {
                ("Service", host) for host in re.findall(r"https?://([a-z][\w-]*)[:/]", value) if host != "localhost"
            }
    for container in spec["containers"]:
        for variable in container.get("env", []):
            reference = variable.get("valueFrom", {}).get("secretKeyRef")
            if reference:
                used.add(("key", f"{reference['name']}/{reference['key']}"))
    return used


def test_a_name_that_nobody_makes_is_found(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = ray_up("aws")
    config["available_node_types"]["train"]["node_config"]["Placement"]["GroupName"] = "latentforge-two"
    monkeypatch.setattr("tests.infra.test_cluster_names.ray_up", lambda _: config)
    with pytest.raises(AssertionError, match="latentforge-two"):
        test_ray_up_names_what_there_is("aws", tmp_path)


@pytest.mark.parametrize(
    ("cloud", "said", "status"),
    [
        ("aws", "An error occurred (EntityAlreadyExists) when calling the CreateRole operation", 0),
        ("aws", "An error occurred (AccessDenied) when calling the CreateRole operation", 1),
        ("gcp", "ERROR: (gcloud.secrets.create) ALREADY_EXISTS: Secret already exists", 0),
        ("gcp", "ERROR: (gcloud.secrets.create) PERMISSION_DENIED", 1),
    ],
)
def test_accounts_are_made_a_second_time_without_harm(tmp_path: Path, cloud: str, said: str, status: int) -> None:
    """Only what is there already is passed over; every other refusal ends the script with the cloud's own words."""
    program = tmp_path / {"aws": "aws", "gcp": "gcloud"}[cloud]
    program.write_text(f'#!/bin/sh\ncase "$*" in *create*) echo "{said}" >&2; exit 254;; esac\n')
    program.chmod(0o755)
    environment = {**SETTINGS[cloud], "PATH": f"{tmp_path}:/usr/bin:/bin"}
    script = str(INFRA / "policies" / f"{cloud}.sh")
    ended = subprocess.run(["sh", script], env=environment, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == status
    assert (said in ended.stderr) is (status != 0)
