"""`latentforge export`: a trained model as a folder that others load, here or on a hub; and sampling from one."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, get_args

from configs import UserError, load_recipe
from configs.autoencoders import DiffusersModel
from configs.errors import brief
from flows.finding import evaluation_of
from flows.inputs import sample_job
from flows.options import labels, writing
from infra import hubs, registry
from infra.artifacts import MANIFEST, Artifact, Manifest
from infra.storage import Storage
from tasks.drawing import pictures
from tasks.sharing.card import GRID, card
from tasks.sharing.folder import write_folder
from tasks.stage import Context, Job

_HUB = "hf://"
_COMPONENTS = ("transformer", "vae", "scheduler", "guide")


def export(
    run: str | None,
    target: str,
    recipe: str,
    overrides: Sequence[str] = (),
    root: str | None = None,
    public: bool = False,
) -> str:
    """Write a model to a folder, push it to `hf://organisation/name`, or register it as a version of
    `models:/NAME` in MLflow; returns where it is.

    run: a finished run (as :func:`flows.finding.evaluation_of` takes it); None is the recipe's model.

    Raises:
        UserError: there is no such model, the folder is in use, or the hub refuses.
    """
    if run is None:
        context = Context(sample_job(load_recipe(recipe, overrides), recipe, root))
        evaluated = _scores_of(context)
    else:
        evaluation = evaluation_of(run)
        evaluated = evaluation.manifest
        context = Context(_job_of(Artifact(evaluation.root, "sample", evaluated.inputs["sample"])))
    if target.startswith((_HUB, registry.SCHEME)):
        send = _sender(target, evaluated, public)
        with tempfile.TemporaryDirectory(prefix="latentforge-export-") as folder:
            _write(context, evaluated, Path(folder))
            return send(Path(folder))
    place = Path(target).expanduser()
    if place.is_file():
        raise UserError(f"--to {target}: is a file; name a folder, an empty or a new one")
    if place.exists() and any(place.iterdir()) and not (place / "model_index.json").is_file():
        raise UserError(f"--to {target}: the folder holds other things; name an empty or a new one")
    with (
        writing(place),
        tempfile.TemporaryDirectory(dir=place.parent, prefix=".export-") as beside,
    ):
        _write(context, evaluated, Path(beside))
        if place.exists():
            shutil.rmtree(place)
        shutil.copytree(beside, place)
    return str(place)


def draw(source: str, classes: str, seed: int, output: Path, rows: int = 1) -> Path:
    """A picture as `latentforge sample` draws it, from an exported folder or repository; no code in it is run.

    classes: names or labels between commas.

    Raises:
        UserError: there is none, it is no export, or it has no such class.
    """
    import torch

    pipeline = load(source).to("cuda" if torch.cuda.is_available() else "cpu")
    pipeline.set_progress_bar_config(disable=True)
    chosen = labels("--classes", classes, lambda: pipeline.config.classes or [])
    try:
        images = pipeline(chosen, rows, seed, output_type="np").images
    except ValueError as error:
        raise UserError(f"--classes: {error}") from None
    with writing(output):
        output.write_bytes(pictures.png(pictures.grid(images, columns=len(chosen))))
    return output


def load(source: str) -> Any:
    """The pipeline of an exported folder, of `hf://organisation/name[@revision]` or of `models:/NAME[/VERSION]`, by
    this project's own code."""
    with tempfile.TemporaryDirectory(prefix="latentforge-registered-") as copied:
        if source.startswith(registry.SCHEME):
            return _loaded(source, registry.fetch("--from", source, Path(copied)))
        return _loaded(source, _fetched(source))


def _loaded(source: str, folder: Path) -> Any:
    import diffusers

    from tasks.sharing.code.network import LatentforgeNetwork
    from tasks.sharing.code.pipeline import LatentforgePipeline
    from tasks.sharing.code.scheduler import LatentforgeScheduler
    from tasks.sharing.code.tokenizer import LatentforgeTokenizer

    try:
        index = json.loads((folder / "model_index.json").read_bytes())
        kinds = {each.__name__: each for each in (LatentforgeNetwork, LatentforgeScheduler, LatentforgeTokenizer)}
        kinds |= {
            name: getattr(diffusers, name) for name in get_args(DiffusersModel.model_fields["class_name"].annotation)
        }
        parts = {}
        for name in (each for each in _COMPONENTS if index[each][1]):
            kind = kinds[index[name][1]]
            network = issubclass(kind, diffusers.ModelMixin)  # which else asks for a library that nothing here needs
            parts[name] = kind.from_pretrained(str(folder / name), **{"low_cpu_mem_usage": False} if network else {})
    except (OSError, KeyError, TypeError, ValueError) as error:
        said = brief(error, 160)
        raise UserError(f"--from {source}: no folder that `export` wrote, or a damaged one ({said})") from None
    told = {name: index[name] for name in ("classes", "latents", "pointwise", "unit") if name in index}
    return LatentforgePipeline(**parts, **told)


def _write(context: Context, evaluated: Manifest | None, folder: Path) -> None:
    write_folder(context, folder)
    if context.artifact.is_complete() and context.artifact.files(GRID):
        (folder / GRID).write_bytes(context.artifact.read(GRID))
    (folder / "README.md").write_text(card(context, evaluated))


def _sender(target: str, evaluated: Manifest | None, public: bool) -> Callable[[Path], str]:
    """What pushes or registers a folder. Raises UserError, before one is written, where that cannot be."""
    if target.startswith(_HUB):
        _check_repository(target)
        return lambda folder: _push(folder, target, public)
    name = registry.name_of("--to", target)
    run = registry.run_of("--to", target, None if evaluated is None else evaluated.fingerprint)
    return lambda folder: registry.register(name, run, folder)


def _job_of(sample: Artifact) -> Job:
    made = sample.manifest
    return Job("sample", sample.fingerprint, sample.root, made.recipe, made.inputs, made.sections)


def _scores_of(context: Context) -> Manifest | None:
    """The newest evaluation of this sample under the root, if there is one."""
    root = Storage.at(context.job.root)
    names = {name.split("/")[1] for name in root.names("evaluate") if name.endswith(MANIFEST)}
    found = [Artifact(root.url, "evaluate", name).manifest for name in sorted(names)]
    ours = [each for each in found if each.inputs.get("sample") == context.job.fingerprint]
    return max(ours, key=lambda each: each.created, default=None)


# ------------------------------------------------------------------------------------------------------------ hub


def _check_repository(target: str) -> str:
    name = target.removeprefix(_HUB)
    if len(name.split("/")) != 2 or not all(name.split("/")):
        raise UserError(f"--to {target}: expected hf://organisation/name")
    return name


def _push(folder: Path, target: str, public: bool) -> str:
    """Needs the usual token: `HF_TOKEN`, or what `hf auth login` left."""
    from huggingface_hub import HfApi

    name, api = _check_repository(target), HfApi()
    if (silent := hubs.refusal()) is not None:
        raise UserError(f"--to {target}: the hub refused or cannot be reached ({silent})")
    try:
        api.create_repo(name, private=not public, exist_ok=True)
        if not public and not api.repo_info(name).private:
            raise UserError(f"--to {target}: that repository is public; add to it with --public, or name another")
        return str(api.upload_folder(repo_id=name, folder_path=str(folder), commit_message="A model from latentforge"))
    except hubs.errors() as error:
        token = "" if os.environ.get("HF_TOKEN") else "; set HF_TOKEN or log in with `hf auth login`"
        said = brief(error)
        raise UserError(f"--to {target}: the hub refused or cannot be reached ({said}){token}") from None


def _fetched(source: str) -> Path:
    """A local folder with the export's weights and settings, and none of its code."""
    if not source.startswith(_HUB):
        folder = Path(source.removeprefix("file://")).expanduser()
        if not (folder / "model_index.json").is_file():
            raise UserError(
                f"--from {source}: no model_index.json there; give a folder that `latentforge export` wrote"
            )
        return folder
    from huggingface_hub import snapshot_download

    name, _, revision = source.removeprefix(_HUB).partition("@")
    repository, silent = _check_repository(_HUB + name), hubs.refusal()
    try:
        return Path(
            snapshot_download(
                repository,
                revision=revision or None,
                allow_patterns=["*.json", "*.safetensors"],
                local_files_only=silent is not None,  # else it would ask again and again
            )
        )
    except hubs.errors() as error:
        said = silent or hubs.answered(error, repository, "", revision) or brief(error)
        raise UserError(f"--from {source}: not on the hub, or it cannot be reached ({said})") from None
