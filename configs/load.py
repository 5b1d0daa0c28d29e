"""From a recipe's name, its YAML file and overrides to a validated :class:`Recipe`."""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, TypeVar

import yaml
from pydantic import BaseModel, ValidationError

from configs.addresses import holds_credentials
from configs.errors import UserError
from configs.recipe import WAS_RUN, Recipe
from configs.section import recorded

BASES = "bases"
"""Folder of incomplete files that others extend: one for each data set."""
RECIPES = Path(__file__).parent / "recipes"
M = TypeVar("M", bound=BaseModel)
_LONGEST = 300
"""Characters of somebody's text that a message repeats."""


class _Loader(yaml.SafeLoader):
    """Safe YAML that reads 1e-4 as a number and dates as texts (YAML 1.2), and refuses a key given twice, aliases that
    come to more values than anybody wrote, and what is nested without end (its scanner takes time by the square)."""

    def fetch_flow_collection_start(self, TokenClass: Any) -> None:
        self._check_depth(self.flow_level)
        super().fetch_flow_collection_start(TokenClass)

    def add_indent(self, column: int) -> bool:
        self._check_depth(len(self.indents))
        return bool(super().add_indent(column))

    def _check_depth(self, depth: int) -> None:
        if depth > _DEEPEST:
            raise yaml.YAMLError(f"it is nested deeper than {_DEEPEST}")

    def get_single_node(self) -> yaml.Node | None:
        node: yaml.Node | None = super().get_single_node()
        if node is not None and _written_out(node, {}) > _MOST_VALUES:
            raise yaml.YAMLError(f"its aliases come to more than {_MOST_VALUES:,} values")
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [str(self.construct_object(key, deep=True)) for key, _ in node.value]
        if len(set(keys)) < len(keys):
            twice = next(key for number, key in enumerate(keys) if key in keys[:number])
            raise UserError(f"{node.start_mark.name}: key {twice!r} is given twice; keep one")
        return super().construct_mapping(node, deep)


_MOST_VALUES = 100_000
_DEEPEST = 100


def _written_out(node: yaml.Node, known: dict[int, float]) -> float:
    """How many values a document has once its aliases are written out; infinite where one holds itself."""
    if id(node) not in known:
        known[id(node)] = math.inf
        below = node.value if isinstance(node, yaml.CollectionNode) else ()
        known[id(node)] = 1 + sum(
            _written_out(each, known) for pair in below for each in (pair if isinstance(pair, tuple) else (pair,))
        )
    return known[id(node)]


_Loader.yaml_implicit_resolvers = {
    first: [each for each in found if each[0] != "tag:yaml.org,2002:timestamp"]
    for first, found in yaml.SafeLoader.yaml_implicit_resolvers.items()
}
_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d[\d_]*)(\.[\d_]*)?[eE][-+]?\d+$"),
    list("-+0123456789"),
)


def recipe_names() -> list[str]:
    """Names of the recipes that come with the project."""
    return sorted(path.stem for path in RECIPES.glob("*.yaml"))


def described(folder: Path) -> dict[str, str]:
    """Names of the YAML files in a folder, each with the first sentence of the comment that it begins with."""
    return {path.stem: _first_sentence(path) for path in sorted(folder.glob("*.yaml"))}


def _first_sentence(path: Path) -> str:
    lines = takewhile(lambda line: line.startswith("#"), path.read_text(encoding="utf-8").splitlines())
    said = " ".join(line.removeprefix("#").strip() for line in lines)
    return re.split(r"(?<=[^.]\.) (?=[A-Z])", said, maxsplit=1)[0].removesuffix(".")


def load_recipe(
    name: str, overrides: Sequence[str] = (), layers: Sequence[Mapping[str, Any]] = (), origin: str | None = None
) -> Recipe:
    """Load, merge, override and validate a recipe.

    Args:
        name: a recipe that comes with the project, or a path to a YAML file.
        overrides: `section.field=value` strings, the value in YAML, applied in order.
        layers: nested values that are laid upon the recipe one after the other, before the overrides.
        origin: what errors say it is; None is the recipe's name.

    Raises:
        UserError: no such recipe, or a field that is unknown, of a wrong type or impossible.
    """
    values = resolve("recipe", RECIPES, name)
    for layer in layers:
        values = merge(values, layer)
    for override in overrides:
        assign(values, override)
    return validate(_with_released_statistics(values), origin or f"recipe {name}")


def _with_released_statistics(values: dict[str, Any]) -> dict[str, Any]:
    """Where a recipe starts from the weights that its paper's authors released and says nothing of statistics, those
    that were released with them: the weights know latents so standardised and no others."""
    published, trained = values.get("published"), values.get("train_dit")
    released = published.get("released") if isinstance(published, dict) else None
    if not isinstance(released, dict) or not isinstance(trained, dict) or "statistics" in trained:
        return values
    weights, statistics = released.get("weights"), released.get("statistics")
    if statistics is None or weights is None or trained.get("pretrained") != weights:
        return values
    return {**values, "train_dit": {**trained, "statistics": statistics}}


def validate(values: Mapping[str, Any], origin: str = "recipe") -> Recipe:
    """Check plain values of a recipe; see :func:`checked`."""
    return checked(Recipe, values, origin)


def read_recorded(values: Mapping[str, Any], origin: str = "recipe") -> Recipe:
    """The recipe of a manifest or a tracked run, which may be older than some fields (`configs/section.py`) and than
    some rules between sections: those say what can be run, and this was."""
    return recorded(checked(Recipe, values, origin, {WAS_RUN: True}))


def checked(model: type[M], values: Mapping[str, Any], origin: str, context: Mapping[str, Any] | None = None) -> M:
    """Plain values as what they describe. Raises UserError that names every fault, each with its field, in one line;
    of addresses with credentials, which would be written into logs and manifests, only the fields.

    context: what validators are told.
    """
    if secret := list(_with_credentials(values)):
        raise UserError(f"{origin}: {', '.join(secret)}: holds credentials; give them by the environment")
    try:
        return model.model_validate_json(json.dumps(values), context=context)
    except ValidationError as error:
        faults = "; ".join(_explain(fault, model) for fault in error.errors())
        raise UserError(f"{origin}: {faults}") from None


def _with_credentials(values: Any, where: str = "") -> Iterator[str]:
    """Names of the fields whose texts hold credentials."""
    if isinstance(values, str):
        if holds_credentials(values):
            yield _cut(where)
    elif isinstance(values, (Mapping, list)):
        pairs = values.items() if isinstance(values, Mapping) else enumerate(values)
        for key, value in pairs:
            yield from _with_credentials(value, f"{where}.{key}" if where else str(key))


def resolve(kind: str, folder: Path, name: str, seen: tuple[str, ...] = ()) -> dict[str, Any]:
    """The plain values of a recipe, race or cluster (`kind`) laid upon those of what it extends.

    name: of a file in `folder`, or a path to a YAML file; what extends may also name one of the bases beside it,
        which are listed nowhere and cannot be run. Raises UserError where there is none, or it extends itself.
    """
    if name in seen:
        raise UserError(f"{kind} {name} extends itself: {' → '.join((*seen, name))}")
    path = Path(name) if name.endswith((".yaml", ".yml")) else folder / f"{name}.yaml"
    base = folder / BASES / f"{name}.yaml"
    if base.is_file() and not path.is_file():
        if not seen:
            raise UserError(f"{kind} {name} is a base and incomplete: extend it, or take one of those that do")
        path = base
    if not path.is_file():
        known = sorted(each.stem for each in folder.glob("*.yaml"))
        close = difflib.get_close_matches(name, known, n=1)
        hint = f" (did you mean {close[0]}?)" if close else ""
        raise UserError(f"no {kind} {name!r}{hint}: choose one of {', '.join(known)}, or give a .yaml file")
    values = read_yaml(path)
    values.setdefault("name", path.stem)
    parent = values.pop("extends", None)
    return values if parent is None else merge(resolve(kind, folder, str(parent), (*seen, name)), values)


def read_yaml(path: Path) -> dict[str, Any]:
    """The plain values of a YAML file. Raises UserError on anything but `key: value` at its top."""
    try:
        values = _parsed(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path.name} is not YAML: {' '.join(str(error).split())[:_LONGEST]}") from None
    if not isinstance(values, dict):
        raise UserError(f"{path.name}: expected sections (key: value), found {type(values).__name__}")
    return values


def _parsed(text: str) -> Any:
    """Plain values of a YAML text. Raises ValueError, or RecursionError where it is nested without end."""
    try:
        values = yaml.load(text, Loader=_Loader)
        json.dumps(values)  # tags can ask for values that are not plain: bytes, sets, dates
    except (yaml.YAMLError, TypeError, ArithmeticError, LookupError, AttributeError) as error:
        raise ValueError(str(error)) from None
    return values


def merge(base: Mapping[str, Any], over: Mapping[str, Any]) -> dict[str, Any]:
    """`over` laid upon `base`, section by section; a section whose `kind` or `method` changes is replaced."""
    result = dict(base)
    for key, value in over.items():
        old = result.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _changes_kind(old, value):
            result[key] = merge(old, value)
        else:
            result[key] = value
    return result


def _changes_kind(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return any(tag in new and new[tag] != old.get(tag) for tag in ("kind", "method"))


def assign(values: dict[str, Any], override: str) -> None:
    """Lay a `section.field=value` upon plain values. Raises UserError where it is none."""
    path, separator, text = override.partition("=")
    if not separator or not path.strip():
        raise UserError(f"--set {override!r}: expected section.field=value, for example train_dit.images=50000")
    *parents, field = path.strip().split(".")
    try:
        value = _parsed(text)
    except (ValueError, RecursionError):
        raise UserError(f"--set {path}: {text[:_LONGEST]!r} is not a YAML value") from None
    target = values
    for parent in parents:
        if target.get(parent) is None:
            target[parent] = {}
        target = target[parent]
        if not isinstance(target, dict):
            raise UserError(f"--set {path}: {parent} is a value, not a section")
    old = target.get(field)
    if field in ("kind", "method") and value != old:
        target.clear()  # the fields of another kind mean nothing to this one
    target[field] = merge({field: old}, {field: value})[field]


def _explain(fault: Any, model: type[BaseModel]) -> str:
    """One validation fault as `field: what was found and what would be right`."""
    where = _cut(".".join(str(part) for part in fault["loc"] if not str(part).startswith("function-")))
    message = str(fault["msg"]).removeprefix("Value error, ")
    match fault["type"]:
        case "extra_forbidden":
            return f"{where}: no such field{_similar(fault['loc'], model)}"
        case "missing":
            return f"{where}: missing; give a value"
        case "value_error":
            return f"{where}: {message}" if where else message
    found = fault["input"]
    shown = f" (found {_cut(repr(found))})" if isinstance(found, (str, int, float, bool, type(None), list)) else ""
    return f"{where}: {message[:1].lower()}{message[1:]}{shown}"


def _cut(text: str) -> str:
    return text if len(text) <= _LONGEST else f"{text[:_LONGEST]}…"


def _similar(location: Sequence[Any], section: Any) -> str:
    """A hint at the field that was probably meant."""
    for part in location[:-1]:
        field = getattr(section, "model_fields", {}).get(part)
        if field is None:
            return ""
        kinds = [field.annotation, *getattr(field.annotation, "__args__", ())]
        section = next((kind for kind in kinds if hasattr(kind, "model_fields")), None)
    names = list(getattr(section, "model_fields", {}))
    close = difflib.get_close_matches(str(location[-1]), names, n=1)
    return f"; did you mean {close[0]}?" if close else f"; there are {', '.join(names)}" if names else ""
