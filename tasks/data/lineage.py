"""Which set of images a grown one came from."""

from __future__ import annotations

from configs.errors import UserError
from infra.artifacts import Artifact


def grown_from(root: str, grows: str) -> Artifact:
    """The set of that name. Raises UserError where it is not complete."""
    artifact = Artifact(root, "shard", grows)
    if not artifact.is_complete():
        raise UserError(
            f"shard.grows names {grows}, but {artifact.uri} is not complete: `latentforge artifacts list` shows the "
            "shard artifacts of this root"
        )
    return artifact


def first_set(root: str, grows: str) -> str:
    """Fingerprint of the set, itself not grown, that a chain of grown sets began with. Raises as :func:`grown_from`."""
    first: str = grown_from(root, grows).manifest.facts.get("grown", {}).get("first", grows)
    return first
