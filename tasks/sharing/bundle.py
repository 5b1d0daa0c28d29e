"""One file of source code that stands alone: a module of ours with all that it needs of our other modules.

diffusers fetches a single file for each component of a shared folder. What is copied are the definitions that are
reached from the module, in the order of the modules they come from, as they stand there. Where two modules have a
definition of one name, the later one is renamed after its module.
"""

from __future__ import annotations

import ast
import importlib.util
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path

_OURS = ("models", "tasks")
_NOTICE = '''\
# Part of latentforge, Apache-2.0: this file is made of its modules {modules}, and needs none of them.
"""{title}"""
from __future__ import annotations
'''

Place = tuple[str, str]
"""A module and the name of a definition in it."""


@dataclass
class _Module:
    name: str
    source: str
    ours: dict[str, Place] = field(default_factory=dict)
    """Names imported from other modules of ours."""
    imports: dict[str, str] = field(default_factory=dict)
    """Names imported from libraries, and the line that does it."""
    definitions: dict[str, ast.stmt] = field(default_factory=dict)

    @cached_property
    def lines(self) -> list[str]:
        return self.source.splitlines(keepends=True)

    @classmethod
    def read(cls, name: str) -> _Module:
        found = importlib.util.find_spec(name)
        assert found is not None and found.origin is not None  # it is a module of this project
        module = cls(name, Path(found.origin).read_text())
        for statement in ast.parse(module.source).body:
            module._take(statement)
        return module

    def _take(self, statement: ast.stmt) -> None:
        if isinstance(statement, ast.ImportFrom | ast.Import):
            source = statement.module or "" if isinstance(statement, ast.ImportFrom) else ""
            for each in statement.names:
                bound = each.asname or each.name.partition(".")[0]
                if source.partition(".")[0] in _OURS:
                    self.ours[bound] = (source, each.name)
                elif source != "__future__":
                    renamed = f" as {each.asname}" if each.asname else ""
                    origin = f"from {source} " if source else ""
                    self.imports[bound] = f"{origin}import {each.name}{renamed}"
        elif isinstance(statement, ast.FunctionDef | ast.ClassDef):
            self.definitions[statement.name] = statement
        elif isinstance(statement, ast.Assign | ast.AnnAssign):
            targets = statement.targets if isinstance(statement, ast.Assign) else [statement.target]
            for target in targets:
                for name in ast.walk(target):
                    if isinstance(name, ast.Name):
                        self.definitions[name.id] = statement

    def names_in(self, statement: ast.stmt) -> Iterator[ast.Name]:
        yield from (node for node in ast.walk(statement) if isinstance(node, ast.Name))


def bundle(name: str) -> str:
    """The source of module `name` and what it needs of ours. Imports of libraries stay imports."""
    modules = {name: _Module.read(name)}
    order, reached = [], set[Place]()

    def reach(place: Place) -> None:
        module_name, bound = place
        if module_name not in modules:
            modules[module_name] = _Module.read(module_name)
        module = modules[module_name]
        if bound in module.ours:
            reach(module.ours[bound])
        elif bound in module.definitions and place not in reached:
            reached.add(place)
            for node in module.names_in(module.definitions[bound]):
                reach((module_name, node.id))
            order.append(place)

    for bound in modules[name].definitions:
        reach((name, bound))
    final = _final_names(order)
    imports, pieces, done = set[str](), list[str](), set[int]()
    for module_name, bound in order:
        module = modules[module_name]
        statement = module.definitions[bound]
        if id(statement) in done:
            continue
        done.add(id(statement))
        imports |= {module.imports[node.id] for node in module.names_in(statement) if node.id in module.imports}
        pieces.append(_text(module, statement, final))
    root = modules[name]
    title = ast.get_docstring(ast.parse(root.source)) or name
    used = ", ".join(sorted({module_name for module_name, _ in order}))
    plain, others = (sorted(line for line in imports if line.startswith("from ") is part) for part in (False, True))
    return (
        _NOTICE.format(modules=used, title=title) + "\n" + "\n".join([*plain, *others]) + "\n\n\n" + "\n\n".join(pieces)
    )


def _final_names(order: list[Place]) -> dict[Place, str]:
    taken, final = set[str](), dict[Place, str]()
    for module, bound in order:
        new = bound if bound not in taken else f"{bound}_of_{module.rpartition('.')[2]}"
        taken.add(new)
        final[module, bound] = new
    return final


def _text(module: _Module, statement: ast.stmt, final: dict[Place, str]) -> str:
    """A definition's lines, comments above it included, with names as they are in the bundle."""
    changes: list[tuple[int, int, str, str]] = []
    for node in module.names_in(statement):
        place = module.ours.get(node.id, (module.name, node.id))
        if (new := final.get(place, node.id)) != node.id:
            changes.append((node.lineno - 1, node.col_offset, node.id, new))
    first = min([statement.lineno, *(each.lineno for each in getattr(statement, "decorator_list", []))]) - 1
    own = getattr(statement, "name", None)
    if own is not None and (new := final[module.name, own]) != own:
        line = module.lines[statement.lineno - 1]
        changes.append((statement.lineno - 1, line.index(own), own, new))
    lines = list(module.lines)
    for row, column, old, new in sorted(changes, reverse=True):
        text = lines[row].encode()  # the tree counts bytes
        assert text[column : column + len(old)] == old.encode()
        lines[row] = (text[:column] + new.encode() + text[column + len(old) :]).decode()
    while first and module.lines[first - 1].startswith("#"):
        first -= 1
    end = statement.end_lineno or statement.lineno
    after = _docstring_after(module, end)
    return "".join(lines[first : after or end]).rstrip() + "\n"


def _docstring_after(module: _Module, end: int) -> int | None:
    """The last line of the text that stands below an assignment and says what it is."""
    for statement in ast.parse(module.source).body:
        if statement.lineno == end + 1 and isinstance(statement, ast.Expr):
            return statement.end_lineno
    return None
