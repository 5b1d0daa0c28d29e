"""SQLite databases of Prefect and MLflow: whether the installed library can work with what lies there.

Both keep the revision of their schema in a table `alembic_version`. The revisions that a library knows are read from
its files, so that nothing of it is imported.
"""

from __future__ import annotations

import re
import shlex
import sqlite3
from contextlib import closing
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path

from configs.errors import UserError

_REVISION = re.compile(r"^(down_)?revision(?:\s*:[^=]*)?\s*=\s*[\"']([0-9a-z]+)[\"']", re.MULTILINE)
_SECONDS = 5.0


@dataclass(frozen=True)
class Kind:
    """Whose database it is."""

    name: str
    package: str
    migrations: str
    """Folder of its revisions, within the package."""
    migrates: bool
    """Whether it brings an older database up to date by itself."""


PREFECT = Kind("Prefect", "prefect", "server/database/_migrations/versions/sqlite", migrates=True)
MLFLOW = Kind("MLflow", "mlflow", "store/db_migrations/versions", migrates=False)


def check(path: Path, kind: Kind, variable: str) -> None:
    """Refuse a database that the installed library would stumble over. One that is not there is fine.

    Args:
        path: of the SQLite file.
        kind: whose.
        variable: the environment variable that names another place.

    Raises:
        UserError: it is of a newer (or, where nobody would migrate it, older) version, no database, or not readable.
    """
    if not path.exists():
        return
    found = _revision(path, kind, variable)
    known, newest = revisions(kind)
    if found is None or not known:
        return
    if found not in known:
        raise UserError(
            f"{kind.name}'s database {path} was made by another version of {kind.name} (revision {found}; this one "
            f"knows up to {newest}): set {variable} to a place of your own, or unset it"
        )
    if found != newest and not kind.migrates:
        raise UserError(
            f"{kind.name}'s database {path} is of an older version (revision {found}, and this one is {newest}): "
            f"bring it up to date with `{kind.package} db upgrade {shlex.quote(f'sqlite:///{path}')}` "
            f"after a copy, or set {variable} to another place"
        )


def revisions(kind: Kind) -> tuple[frozenset[str], str]:
    """Every revision that the installed library knows, and the newest of them."""
    spec = find_spec(kind.package)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    known: set[str] = set()
    followed: set[str] = set()
    for folder in folders:
        for file in (Path(folder) / kind.migrations).glob("*.py"):
            for down, revision in _REVISION.findall(file.read_text(errors="replace")):
                (followed if down else known).add(revision)
    newest = sorted(known - followed)
    return frozenset(known), newest[-1] if newest else ""


def _revision(path: Path, kind: Kind, variable: str) -> str | None:
    """What the file says; None where it has no table of revisions."""
    try:
        with closing(sqlite3.connect(f"{path.absolute().as_uri()}?mode=ro", uri=True, timeout=_SECONDS)) as base:
            rows = base.execute("SELECT version_num FROM alembic_version").fetchall()
    except sqlite3.OperationalError as error:
        if "no such table" in str(error) or "locked" in str(error):  # fresh, or in use this very moment
            return None
        raise UserError(
            f"{kind.name}'s database {path} cannot be read ({error}): check its rights, or set {variable} to another "
            "place"
        ) from None
    except sqlite3.DatabaseError as error:
        raise UserError(
            f"{kind.name}'s database {path} is damaged or none ({error}): move it away, or set {variable} to another "
            "place"
        ) from None
    return str(rows[0][0]) if rows else None
