"""Artifacts: `{root}/{stage}/{fingerprint}/`, complete exactly when `manifest.json` is there.

A fingerprint hashes what determines an artifact's content and nothing else; a manifest, written last, is
the only proof that the content is whole. Whatever lies in a folder without a manifest may be resumed by
its own stage and is invisible to every other.

A whole artifact that is made anew stays in use meanwhile: the new one grows in `{fingerprint}.new` beside it
and takes its place once it is whole (:meth:`Artifact.replace`).
"""

from __future__ import annotations

import hashlib
import json
import sys
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, fields
from functools import cached_property
from importlib.metadata import PackageNotFoundError, version
from typing import Any

from configs.errors import UserError
from infra.storage import FileEntry, Storage

MANIFEST = "manifest.json"
FINAL = "final/"
"""How scores begin that are the last points of a training's curves."""
SIDE = ".new"
"""Ends the name of the folder beside an artifact in which its replacement grows."""
CLAIMS = "claims/"
"""Where machines say within an artifact's folder that they make it (`infra/claims.py`)."""
_WHOLE = "whole.json"
"""The manifest of a whole replacement; by another name, so that nobody takes the folder for an artifact."""
_AT_ONCE = 16
_RECORDED_LIBRARIES = ("latentforge", "torch", "ray", "deepspeed", "pyarrow", "timm", "prefect", "mlflow")


def fingerprint(stage: str, stage_version: int, sections: Mapping[str, Any], inputs: Mapping[str, str]) -> str:
    """Name of an artifact's content: 16 hex digits of a SHA-256.

    Args:
        stage: the stage's name.
        stage_version: raised whenever the stage's code changes what it writes.
        sections: the recipe sections it reads, and the identities of what it reads from outside.
        inputs: the fingerprint of each input artifact.
    """
    content = {"stage": stage, "version": stage_version, "sections": sections, "inputs": inputs}
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Manifest:
    """What an artifact is and what it was made from."""

    stage: str
    stage_version: int
    fingerprint: str
    recipe: dict[str, Any]
    """The whole resolved recipe."""
    sections: dict[str, Any]
    """The part of it that the fingerprint covers."""
    inputs: dict[str, str]
    files: tuple[FileEntry, ...]
    rows: int
    facts: dict[str, Any] = field(default_factory=dict)
    """What the stage found out and later stages need: label map, statistics, counts. Plain JSON."""
    scores: dict[str, float] = field(default_factory=dict)
    """Named figures for people; logged to the tracker."""
    seconds: float = 0.0
    created: str = ""
    libraries: dict[str, str] = field(default_factory=dict)
    runs: dict[str, str] = field(default_factory=dict)
    """Prefect and MLflow run ids that made it."""

    @property
    def size(self) -> int:
        """Bytes of all files together."""
        return sum(entry.bytes for entry in self.files)

    @property
    def figures(self) -> dict[str, float]:
        """What a tracker is told of it. The last point of a curve is on that curve already."""
        scores = {name: value for name, value in self.scores.items() if not name.startswith(FINAL)}
        return {**scores, "seconds": self.seconds, "rows": float(self.rows)}

    def to_json(self) -> bytes:
        return json.dumps(asdict(self), indent=1, sort_keys=True).encode()

    @classmethod
    def from_json(cls, data: bytes, where: str) -> Manifest:
        """Read a manifest; `where` names it in errors.

        Raises:
            UserError: it is damaged, or a newer version wrote it and says what this one does not know.
        """
        try:
            values = json.loads(data)
            if not isinstance(values, dict):
                raise TypeError(f"expected fields, found {type(values).__name__}")
            unknown = sorted(values.keys() - {each.name for each in fields(cls)})
            if unknown:
                by = values.get("libraries", {}).get("latentforge", "a newer version")
                raise UserError(
                    f"{where} was written by another latentforge ({by}) and says {', '.join(unknown)}, which this "
                    "version does not know: use that version, or another root"
                )
            values["files"] = tuple(_entry(entry) for entry in values["files"])
            found = cls(**values)
            _check_types(found)
            return found
        except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
            raise UserError(
                f"{where} is damaged ({error}); delete the artifact's folder and run its stage again"
            ) from None


def _entry(values: Any) -> FileEntry:
    """One file of a manifest. Raises TypeError or ValueError on what describes none, or none within its artifact."""
    entry = FileEntry(**values)
    if type(entry.path) is not str or type(entry.bytes) is not int or type(entry.sha256) is not str:
        raise TypeError(f"no path, size and hash: {str(values)[:100]}")
    if entry.rows is not None and type(entry.rows) is not int:
        raise TypeError(f"rows of {entry.path}: {str(entry.rows)[:100]}")
    if entry.bytes < 0 or not entry.path or entry.path.startswith("/") or ".." in entry.path.split("/"):
        raise ValueError(f"no file of an artifact: {entry.path[:100]!r}, {entry.bytes} bytes")
    return entry


def _check_types(manifest: Manifest) -> None:
    """Raises TypeError where a field is not of its type."""
    numbers = (int, float)
    wanted: dict[str, Any] = {"stage": str, "stage_version": int, "fingerprint": str, "rows": int, "created": str}
    wanted |= dict.fromkeys(("recipe", "sections", "inputs", "facts", "scores", "libraries", "runs"), dict)
    for name, kind in {**wanted, "seconds": numbers}.items():
        if not isinstance(getattr(manifest, name), kind):
            raise TypeError(f"{name} is {str(getattr(manifest, name))[:100]!r}")
    texts = {**manifest.inputs, **manifest.libraries, **manifest.runs}
    if strange := [name for name, value in texts.items() if not isinstance(value, str)]:
        raise TypeError(f"{strange[0]} is no text")
    if strange := [name for name, value in manifest.scores.items() if not isinstance(value, numbers)]:
        raise TypeError(f"score {strange[0]} is no number")


@dataclass(frozen=True)
class Artifact:
    """A reference to a stage's output: small, plain, safe to pass anywhere. Content is read on demand."""

    root: str
    stage: str
    fingerprint: str

    @property
    def uri(self) -> str:
        return self.storage.url

    @cached_property
    def storage(self) -> Storage:
        return Storage.at(self.root).child(self.stage, self.fingerprint)

    @cached_property
    def beside(self) -> Storage:
        """Where its replacement grows while this artifact stays in use."""
        return Storage.at(self.root).child(self.stage, self.fingerprint + SIDE)

    def __getstate__(self) -> dict[str, str]:
        return {"root": self.root, "stage": self.stage, "fingerprint": self.fingerprint}

    def is_complete(self) -> bool:
        return self.storage.exists(MANIFEST)

    @cached_property
    def manifest(self) -> Manifest:
        """The proof of completeness.

        Raises:
            UserError: the artifact is missing, unfinished, damaged, or another stage's.
        """
        where = f"{self.uri}/{MANIFEST}"
        try:
            data = self.storage.read_bytes(MANIFEST)
        except FileNotFoundError:
            raise UserError(f"{where} is missing: artifact {self.stage} is not complete; run its stage again") from None
        manifest = Manifest.from_json(data, where)
        if (manifest.stage, manifest.fingerprint) != (self.stage, self.fingerprint):
            raise UserError(
                f"{where} belongs to {manifest.stage}/{manifest.fingerprint}; the folder was moved or copied"
            )
        return manifest

    def files(self, prefix: str = "", suffix: str = "") -> list[FileEntry]:
        """The manifest's files with a name like this, in the manifest's order."""
        return [e for e in self.manifest.files if e.path.startswith(prefix) and e.path.endswith(suffix)]

    def read(self, name: str) -> bytes:
        """A file of this artifact, checked against the manifest's size and hash.

        Raises:
            UserError: the file is missing, or is not the one the manifest describes.
        """
        entry = next((e for e in self.manifest.files if e.path == name), None)
        if entry is None:
            raise UserError(f"{self.uri}: no file {name!r} in the manifest")
        try:
            data = self.storage.read_bytes(name)
        except FileNotFoundError:
            raise UserError(f"{self.uri}/{name} is missing; {self._remedy}") from None
        found = hashlib.sha256(data).hexdigest()
        if len(data) != entry.bytes or found != entry.sha256:
            sizes = f"{entry.bytes:,} bytes", f"{len(data):,}"
            hashes = f"SHA-256 {entry.sha256[:12]}…", f"{found[:12]}…"
            expected, there = sizes if len(data) != entry.bytes else hashes
            raise UserError(
                f"{self.uri}/{name} is not the file that the manifest describes (expected {expected}, found {there}); "
                f"{self._remedy}"
            )
        return data

    @property
    def _remedy(self) -> str:
        return f"run again with --force {self.stage} or, where that is no stage of the flow, without the folder"

    def complete(self, manifest: Manifest) -> bool:
        """Write the manifest: from here on the artifact exists. False where it does already, which is left as it is."""
        self.__dict__.pop("manifest", None)
        return self.storage.create_bytes(MANIFEST, manifest.to_json())

    def mark(self) -> str:
        """What tells this artifact from one made anew under its name; empty where it is not complete."""
        try:
            return hashlib.sha256(self.storage.read_bytes(MANIFEST)).hexdigest()
        except FileNotFoundError:
            return ""

    def replace(self, manifest: Manifest) -> None:
        """Let what was made :attr:`beside` this artifact take its place: from here on it is the artifact."""
        self.beside.write_bytes(_WHOLE, manifest.to_json())
        self.settle()

    def settle(self) -> None:
        """Let a whole replacement take this artifact's place, also where a killed process had begun to.

        Between the first file and the manifest, which comes last, there is no complete artifact, and this
        can be called again. A replacement that has lost files since is no longer taken for whole.
        """
        try:
            data = self.beside.read_bytes(_WHOLE)
        except FileNotFoundError:
            return
        manifest = Manifest.from_json(data, f"{self.beside.url}/{_WHOLE}")
        new, here = self.beside.sizes(), self.storage.sizes()
        if any(new.get(each.path, here.get(each.path)) != each.bytes for each in manifest.files):
            self.beside.delete(_WHOLE)
            return
        del new[_WHOLE]
        listed = {each.path for each in manifest.files}
        self.storage.delete(MANIFEST)
        with ThreadPoolExecutor(_AT_ONCE) as pool:
            gone = [name for name in here if name not in listed and name != MANIFEST and not name.startswith(CLAIMS)]
            list(pool.map(self.storage.delete, gone))
            list(pool.map(lambda name: self.storage.take(name, self.beside), new))
        self.storage.write_bytes(MANIFEST, data)
        self.__dict__.pop("manifest", None)
        self._forget_beside()

    def discard(self) -> None:
        """Forget the artifact: the manifest first, so that a partial deletion is never trusted."""
        self._forget_beside()
        self.storage.delete(MANIFEST)
        self.storage.delete()

    def _forget_beside(self) -> None:
        self.beside.delete(_WHOLE)
        self.beside.delete()


def library_versions(names: Sequence[str] = _RECORDED_LIBRARIES) -> dict[str, str]:
    found = {"python": sys.version.split()[0]}
    for name in names:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def timestamp() -> str:
    return time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
