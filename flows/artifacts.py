"""What lies under a root: listed, shown, verified, pruned, and why two of them differ.

`python -m flows artifacts --help`.
"""

from __future__ import annotations

import json
import shlex
import sys
import time
from collections.abc import Iterable, Mapping
from typing import Annotated, Any

import typer
import yaml
from rich.console import Console
from rich.filesize import decimal
from rich.table import Column, Table

from configs import UserError
from configs.load import read_recorded
from infra import differences, integrity, inventory
from infra.home import default_root
from infra.inventory import Entry
from infra.locks import alone, held
from infra.progress import Bytes

app = typer.Typer(no_args_is_help=True, add_completion=False)

Root = Annotated[str | None, typer.Option("--root", help="A folder or a URL; this machine's default if unset.")]
Name = Annotated[str, typer.Argument(metavar="ARTIFACT", help="STAGE/FINGERPRINT, or its beginning, or its address.")]
AsJson = Annotated[bool, typer.Option("--json", help="Print JSON instead of a table.")]
_UNITS = {"h": 3600, "d": 86400, "w": 604800}


@app.command("list")
def list_all(
    root: Root = None,
    stage: Annotated[str | None, typer.Option("--stage", help="Only those of this stage.")] = None,
    as_json: AsJson = False,
) -> None:
    """List stage, name, age and size of every artifact, what it was made from and how many use it."""
    entries = inventory.read(root or default_root())
    users = inventory.users(entries)
    shown = [each for each in entries.values() if stage in (None, each.artifact.stage)]
    if as_json:
        print(json.dumps([_plain(each, users) for each in shown], indent=1))
        return
    whole = Column("artifact", no_wrap=True)  # which other commands take
    table = Table(
        whole, "age", "size", Column("made from", overflow="fold"), "users", title=str(root or default_root())
    )
    for each in shown:
        told = [each.fault.partition(";")[0]] if each.fault else []
        told += [_short(name) if name in entries else f"{_short(name)} (gone)" for name in each.made_from]
        age = _age(time.time() - each.written)
        table.add_row(each.name, age, decimal(each.bytes), "\n".join(told), str(len(users[each.name])))
    console = Console(markup=False)
    console.print(table)
    console.print(f"{len(shown)} artifacts, {decimal(sum(each.bytes for each in shown))}")


def _short(name: str) -> str:
    """`encode/6b43d7`, which tells artifacts apart."""
    stage, _, made = name.partition("/")
    return f"{stage}/{made[:6]}"


@app.command()
def show(
    name: Name,
    root: Root = None,
    recipe: Annotated[bool, typer.Option("--recipe", help="Print the whole recipe that made it, as YAML.")] = False,
) -> None:
    """Show what an artifact is: where, of what, when, with which libraries, and what it scored."""
    entries = inventory.read(root or default_root())
    entry = inventory.one(entries, name)
    if recipe:
        if entry.manifest is None:
            raise UserError(f"{entry.name}: {entry.fault}, so nothing says which recipe it is of")
        whole = read_recorded(entry.manifest.recipe, f"the recipe of {entry.name}").model_dump(mode="json")
        print(yaml.safe_dump(whole, sort_keys=False), end="")
        return
    told = _plain(entry, inventory.users(entries))
    if entry.manifest is not None:
        manifest = entry.manifest
        told |= {"recipe": manifest.recipe.get("name"), "version": manifest.stage_version, "rows": manifest.rows}
        told |= {"seconds": round(manifest.seconds, 1), "scores": manifest.scores, "libraries": manifest.libraries}
        told |= {"runs": manifest.runs, "sections": manifest.sections}
    print(yaml.safe_dump(told, sort_keys=False, allow_unicode=True), end="")


@app.command()
def verify(
    names: Annotated[list[str], typer.Argument(metavar="[ARTIFACT]…", help="All of them where none is named.")] = [],  # noqa: B006
    root: Root = None,
) -> None:
    """Read every file and hold it to its manifest's size and hash; ends with status 1 where one is another."""
    place = root or default_root()
    entries = inventory.read(place)
    chosen = [inventory.one(entries, name) for name in names] or list(entries.values())
    total = sum(each.manifest.size for each in chosen if each.manifest)
    with Bytes("verify", total) as bar:
        found = integrity.faults(chosen, bar.read)
    damaged = {name: faults for name, faults in found.items() if faults}
    for name, faults in damaged.items():
        print(f"{name}: " + "; ".join(faults[:5]) + (f" and {len(faults) - 5} more" if len(faults) > 5 else ""))
        print(f"  mend it: {_remedy(entries[name], place)}")
    print(f"{len(found) - len(damaged)} of {len(found)} artifacts are whole")
    if damaged:
        sys.exit(1)


@app.command()
def prune(
    names: Annotated[
        list[str], typer.Argument(metavar="[ARTIFACT]…", help="Only these; all where none is named.")
    ] = [],  # noqa: B006
    root: Root = None,
    keep_last: Annotated[
        int | None, typer.Option("--keep-last", min=0, help="Keep so many of each stage's newest, and what they need.")
    ] = None,
    older_than: Annotated[
        str | None, typer.Option("--older-than", metavar="AGE", help="Only what is older: 12h, 30d, 8w.")
    ] = None,
    unfinished: Annotated[
        bool, typer.Option("--unfinished", help="Also what is not finished; a killed stage would go on from it.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Delete. Without it this only says what would go.")] = False,
) -> None:
    """Delete artifacts that nothing needs: a dry run unless --yes is given.

    What a kept artifact was made from stays, and so does what a flow reads or writes now.
    """
    if keep_last is None and older_than is None and not names:
        raise UserError("prune of what? give --keep-last N, --older-than AGE, or the artifacts' names")
    seconds = None if older_than is None else _seconds(older_than)
    entries = inventory.read(root or default_root())
    named = [inventory.one(entries, name).name for name in names]
    choice = inventory.choose(entries, keep_last, seconds, named, unfinished, locked=held)
    for name in named:
        if name in choice.kept:
            print(f"keeps {name}: {choice.kept[name]}")
    gone, stay = list[int](), set[str]()
    for entry in choice.gone:
        if yes and (entry.name in stay or not _discarded(entry)):
            print(f"keeps {entry.name}: a flow began just now to write it, or what needs it")
            stay |= inventory.closure(entries, entry.made_from)
            continue
        print(f"{'deleted' if yes else 'would delete'} {entry.name}, {decimal(entry.bytes)}")
        gone.append(entry.bytes)
    verb = "deleted" if yes else "would delete"
    rest = "" if yes or not choice.gone else "; --yes does it"
    print(f"{verb} {len(gone)} of {len(entries)} artifacts, {decimal(sum(gone))}{rest}")


@app.command()
def why(first: Name, second: Name, root: Root = None) -> None:
    """Say which field, input or version makes one artifact another than a second one of its stage."""
    entries = inventory.read(root or default_root())
    a, b = inventory.one(entries, first), inventory.one(entries, second)
    if a.name == b.name:
        print(f"{a.name}: one and the same")
        return
    for each in differences.why(entries, a, b):
        print(each)


# ------------------------------------------------------------------------------------------------------------ parts


def _discarded(entry: Entry) -> bool:
    """Whether it is gone. Not where somebody writes it now, or has since it was chosen.

    To delete others first may have taken hours.
    """
    if held(entry.artifact.uri):
        return False
    with alone(entry.artifact.uri):
        if inventory.written_since(entry):
            return False
        entry.artifact.discard()
    return True


def _plain(entry: Entry, users: Mapping[str, Iterable[str]]) -> dict[str, Any]:
    return {
        "artifact": entry.name,
        "address": entry.artifact.uri,
        "state": entry.fault or "whole",
        "written": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(entry.written)),
        "bytes": entry.bytes,
        "made_from": list(entry.made_from),
        "used_by": list(users[entry.name]),
    }


def _remedy(entry: Entry, root: str) -> str:
    """The command that makes a damaged artifact anew, to be pasted."""
    from tasks.dag import FLOWS

    stage, root = entry.artifact.stage, shlex.quote(root)
    flow = next((flow for flow, stages in FLOWS.items() if stage in stages), None)
    if entry.manifest is None or flow is None:
        return f"latentforge artifacts prune {entry.name} --unfinished --yes --root {root}, then run again what uses it"
    if entry.manifest.recipe.get("train_dit", {}).get("cascade") and flow == "sfd-full":
        flow = "lowdiff-full"
    return (
        f"latentforge artifacts show {entry.name} --recipe --root {root} > mend.yaml; "
        f"latentforge run {flow} --recipe mend.yaml --force {stage} --only {stage} --root {root}"
    )


def _seconds(age: str) -> float:
    number, unit = age[:-1], age[-1:]
    if unit not in _UNITS or not number.isdigit():
        raise UserError(f"--older-than {age}: expected a number of hours, days or weeks, for example 12h, 30d or 8w")
    return float(int(number) * _UNITS[unit])


def _age(seconds: float) -> str:
    for unit, length in (("d", 86400), ("h", 3600), ("min", 60)):
        if seconds >= 2 * length:
            return f"{seconds / length:.0f} {unit}"
    return f"{max(0.0, seconds):.0f} s"
