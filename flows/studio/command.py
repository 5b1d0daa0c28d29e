"""The command that makes a picture of the studio again."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence

from configs import Recipe, UserError, load_recipe
from configs.naming import flat
from infra.artifacts import Artifact
from infra.home import default_root
from infra.storage import Storage
from tasks.sampling.playing import laid_upon

_ALIKE = (
    *("data", "image", "foundation", "shard", "train_vavae", "train_semvae", "encode", "train_dit"),
    *("tune_fewstep", "sample"),
)
"""Sections that say which model is sampled, and how."""
_NEVER = ("sample.images",)
_MOST = 12


def command(model: Artifact, classes: str, rows: int, seed: int, settings: Sequence[str], output: str) -> str:
    """A line for a shell, or two where the model's recipe has no name that says it all.

    classes: as `--classes` takes them. settings: overrides of the model's own recipe.
    """
    wanted = laid_upon(model, settings)
    root = "" if model.root == Storage.at(default_root()).url else f" --root {shlex.quote(_plain(model.root))}"
    name, changes = str(wanted.name), _changes(wanted)
    before = ""
    if changes is None:
        name, changes = "model.yaml", list(settings)
        if model.manifest.recipe.get("tune_fewstep") is not None:
            changes = ["tune_fewstep=null", *changes]
        before = f"latentforge artifacts show {model.stage}/{model.fingerprint} --recipe{root} > {name}\n"
    given = ["latentforge", "sample", "--recipe", name, "--classes", classes, "--rows", str(rows), "--seed", str(seed)]
    given += [part for change in changes for part in ("--set", change)]
    return before + " ".join(map(shlex.quote, given)) + root + f" --output {shlex.quote(output)}"


def _changes(wanted: Recipe) -> list[str] | None:
    """Overrides that turn the recipe of this name into it; None where there is none or they do not."""
    try:
        base, now = (flat(_alike(each)) for each in (load_recipe(wanted.name), wanted))
        changed = {name: value for name, value in now.items() if name not in _NEVER and base.get(name, ...) != value}
        found = [f"{name}={json.dumps(value, ensure_ascii=False)}" for name, value in changed.items()]
        made = flat(_alike(load_recipe(wanted.name, found)))
    except UserError:
        return None
    same = {**made, **dict.fromkeys(_NEVER)} == {**now, **dict.fromkeys(_NEVER)}
    return found if same and len(found) <= _MOST else None


def _alike(recipe: Recipe) -> dict[str, object]:
    return recipe.model_dump(mode="json", include=set(_ALIKE))


def _plain(root: str) -> str:
    return root.removeprefix("file://")
