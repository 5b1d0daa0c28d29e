"""Google's interfaces of projects, accounts and machines, as far as Ray speaks to them, in memory.

Requests are those of Google's own client, made from the descriptions that it brings along, and what
they send is checked against those descriptions: a field or a value that Compute Engine does not know
is refused.
"""

from __future__ import annotations

import json
import re
from functools import cache
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import pytest

_ROLES = ("storage.objectAdmin", "compute.admin", "iam.serviceAccountUser", "iam.roleViewer")
_ACCOUNT = "ray-autoscaler-sa-v1@project.iam.gserviceaccount.com"


class Google:
    """One project. `machines` are its instances by name, with the bodies that they were asked for with."""

    def __init__(self) -> None:
        self.machines: dict[str, dict[str, Any]] = {}
        self.deleted: list[str] = []
        self.rights_changed = False

    def installed(self, monkeypatch: pytest.MonkeyPatch) -> Google:
        """In place of the network and of whoever is logged in."""
        import google.auth
        import google.auth.credentials
        import httplib2

        login = (google.auth.credentials.AnonymousCredentials(), "project")
        monkeypatch.setattr(google.auth, "default", lambda *_, **__: login)
        monkeypatch.setattr(
            httplib2.Http,
            "request",
            lambda _, uri, method="GET", body=None, **__: self._answer(httplib2.Response, uri, method, body),
        )
        return self

    def addresses(self, machine: str) -> set[str]:
        """Of the machines of a type."""
        found = [each for each in self.machines.values() if each["machineType"].endswith(f"/{machine}")]
        return {each["networkInterfaces"][0]["networkIP"] for each in found}

    def __contains__(self, address: str) -> bool:
        """Whether the machine there has GPUs."""
        return address in self.addresses("g2-standard-8") | self.addresses("a3-highgpu-8g")

    def _answer(self, response: Any, uri: str, method: str, body: str | bytes | None) -> tuple[Any, bytes]:
        parts = urlsplit(uri)
        given = json.loads(body) if body else {}
        query = {name: values[0] for name, values in parse_qs(parts.query).items()}
        answer = self._call(parts.netloc, unquote(parts.path), method, given, query)
        return response({"status": "200", "content-type": "application/json"}), json.dumps(answer).encode()

    def _call(self, host: str, path: str, method: str, body: dict[str, Any], query: dict[str, str]) -> Any:
        if host == "cloudresourcemanager.googleapis.com":
            if path.endswith(":getIamPolicy"):
                return {"bindings": [{"role": f"roles/{r}", "members": [f"serviceAccount:{_ACCOUNT}"]} for r in _ROLES]}
            self.rights_changed |= path.endswith(":setIamPolicy")
            return {"projectId": "project", "lifecycleState": "ACTIVE"}
        if host == "iam.googleapis.com":
            return {"email": _ACCOUNT, "projectId": "project"}
        place = re.fullmatch(
            r"/compute/v1/projects/project/zones/us-central1-a/(instances|operations)/?([\w-]*)(/\w+)?", path
        )
        assert host == "compute.googleapis.com" and place, (host, path)
        kind, name, verb = place.groups()
        if kind == "operations":
            return {"name": name, "status": "DONE"}
        if method == "POST" and not name:
            check(body, "Instance")
            number = len(self.machines) + 1
            interfaces = [{**each, "networkIP": f"10.0.0.{number}"} for each in body["networkInterfaces"]]
            self.machines[body["name"]] = {
                **body, "networkInterfaces": interfaces, "status": "RUNNING", "labelFingerprint": "0", "id": str(number)
            }  # fmt: skip
        elif verb == "/setLabels":
            self.machines[name]["labels"] = body["labels"]
        elif method == "DELETE":
            self.deleted.append(name)
            self.machines[name]["status"] = "STOPPING"
        elif name:
            return self.machines[name]
        else:
            wanted = re.findall(r"labels\.([\w-]+) = ([\w-]+)", query["filter"])
            found = [each for each in self.machines.values() if each["status"] == "RUNNING"]
            return {"items": [each for each in found if all(each["labels"].get(key) == value for key, value in wanted)]}
        return {"name": "operation", "status": "RUNNING"}


def check(value: Any, schema: str | dict[str, Any], where: str = "instance") -> None:
    """What is sent has only fields, kinds and values that Compute Engine's description knows."""
    shape = _schemas()[schema] if isinstance(schema, str) else schema
    if "$ref" in shape:
        return check(value, shape["$ref"], where)
    if shape.get("enum"):
        assert value in shape["enum"], f"{where}: {value!r} is none of {shape['enum']}"
    if shape["type"] == "object":
        known = shape.get("properties")
        for name, each in value.items():
            assert known is None or name in known, f"{where}: no field {name}"
            check(each, known[name] if known is not None else shape["additionalProperties"], f"{where}.{name}")
    elif shape["type"] == "array":
        assert isinstance(value, list), where
        for each in value:
            check(each, shape["items"], f"{where}[]")
    else:
        kinds = {"string": (str, int), "integer": int, "boolean": bool, "number": (int, float)}
        assert isinstance(value, kinds[shape["type"]]), f"{where}: {value!r} is no {shape['type']}"
    return None


@cache
def _schemas() -> dict[str, Any]:
    from googleapiclient.discovery_cache import get_static_doc

    schemas: dict[str, Any] = json.loads(get_static_doc("compute", "v1"))["schemas"]
    return schemas
