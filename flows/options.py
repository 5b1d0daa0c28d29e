"""Options that several commands have."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated

import typer

from configs import UserError
from configs.errors import brief

RecipeName = Annotated[str, typer.Option("--recipe", help="A recipe's name (see `recipes`) or a path to a YAML file.")]
Overrides = Annotated[
    list[str], typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Lay a value upon the recipe; repeatable.")
]
Root = Annotated[
    str | None, typer.Option("--root", help="Where artifacts live: a folder or a URL such as s3://bucket/prefix.")
]


@contextmanager
def writing(path: Path, *more: type[Exception]) -> Iterator[None]:
    """While a file or folder is written that a person named; the folder that it lies in is made.

    more: what else than OSError a library raises where it cannot write.

    Raises:
        UserError: it cannot be written; half a file that was not there before is deleted.
    """
    kinds: tuple[type[Exception], ...] = (OSError, *more)
    new = False
    try:
        new = not path.exists()
        path.parent.mkdir(parents=True, exist_ok=True)
        yield
    except kinds as error:
        if new and path.is_file():
            path.unlink()
        said = getattr(error, "strerror", None) or brief(error)
        raise UserError(f"cannot write {path} ({said}): check the folder and the space left") from None


def numbers(option: str, text: str) -> list[int]:
    """`207,360` → [207, 360]. Raises UserError on anything else."""
    try:
        return [int(part) for part in text.split(",")]
    except ValueError:
        raise UserError(f"{option} {text}: expected numbers between commas, for example 207,360") from None


def labels(option: str, text: str, names: Callable[[], Sequence[str]]) -> list[int]:
    """`5,sneaker,ankle boot` → [5, 7, 9]: labels between commas, by number or by name.

    names: by label; asked only where a name is given. Raises UserError on a name that there is not.
    """
    parts = [part.strip() for part in text.split(",")]
    if all(part.lstrip("-").isdigit() for part in parts):
        return numbers(option, text)
    known = [name.strip().casefold() for name in names()]
    found = []
    for part in parts:
        if part.isdigit():
            found.append(int(part))
        elif known.count(part.casefold()) == 1:
            found.append(known.index(part.casefold()))
        else:
            near = difflib.get_close_matches(part.casefold(), known, 3) or known[:8]
            told = f"its classes are called {', '.join(near)} …" if known else "no names are known here: give numbers"
            raise UserError(f"{option}: no class {part!r}; {told}")
    return found
