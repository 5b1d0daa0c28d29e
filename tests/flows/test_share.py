"""A model as others use it: the exported folder alone gives the pixels that `latentforge sample` gives."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from importlib.metadata import distribution, distributions
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from packaging.requirements import Requirement
from safetensors.torch import save_file
from typer.testing import CliRunner

from configs import UserError, load_recipe
from flows import share
from flows.__main__ import app
from infra import tracking
from infra.artifacts import Artifact
from models.autoencoder import AutoencoderKL
from tasks.drawing import pictures
from tasks.networks import build_network
from tasks.sample import STAGE as SAMPLE
from tasks.sampling.sampler import Sampler
from tasks.sharing import autoencoder_kl
from tasks.sharing.bundle import bundle
from tasks.sharing.card import _loading, _way
from tasks.sharing.folder import _settings, write_folder
from tasks.stage import Context
from tests.helpers.builders import at, context, put, put_networks, put_shard
from tests.tasks.test_diffusers_stages import taken

LABELS, ROWS, SEED = [1, 3, 5], 2, 3
_ALONE = """
import sys
from importlib.util import find_spec
sys.path.append({site!r})
assert not any(map(find_spec, ("models", "tasks", "configs", "flows", "infra", "pydantic", "ray"))), "nothing of ours"
import numpy as np
from diffusers import DiffusionPipeline
pipeline = DiffusionPipeline.from_pretrained({folder!r}, trust_remote_code=True)
np.save({target!r}, pipeline({labels}, {rows}, {seed}, output_type="np").images)
"""


def made(tmp_path: Path, name: str, *overrides: str) -> tuple[str, np.ndarray[Any, Any]]:
    """The evaluation of a random model with a sample, and the pixels that sampling it gives."""
    asked = (f"sample.labels={LABELS}", f"sample.batch={ROWS * len(LABELS)}", f"sample.seed={SEED}")
    recipe, root = load_recipe(name, [*overrides, *asked]), at(tmp_path)
    put_networks(root, recipe)
    put_shard(root, recipe, 4, 4)
    latents = Artifact(root, "encode", "encode")
    facts = latents.manifest.facts
    latents.discard()
    put(root, recipe, "encode", [], facts=facts, inputs={"shard": "shard"})
    grid = Artifact(root, "sample", "sample").storage.write_bytes(
        "grid.png", pictures.png(np.zeros((4, 4, 3), np.uint8))
    )
    inputs = {stage: stage for stage in ("train_vavae", "encode", "train_dit")}
    sample = put(root, recipe, "sample", [grid], inputs=inputs)
    scores = {"frechet_x": 4.25, "floor_frechet_x": 1.5}
    facts = {"images": {"generated": 40, "test": 4}, "network": "x", "intervals": {"frechet_x": [4.0, 4.5]}}
    evaluated = put(root, recipe, "evaluate", [], inputs={"sample": "sample"}, scores=scores, facts=facts)
    context = Context(share._job_of(sample))
    return evaluated.uri, Sampler.of(context).images(np.arange(ROWS * len(LABELS)))[1]


@pytest.fixture
def exported(tmp_path: Path) -> tuple[Path, np.ndarray[Any, Any]]:
    run, pixels = made(tmp_path, "demo_tiny")
    return Path(share.export(run, str(tmp_path / "model"), "demo")), pixels


def test_the_folder_tells_all_about_the_model(exported: tuple[Path, Any]) -> None:
    folder, _ = exported
    index = json.loads((folder / "model_index.json").read_text())
    assert index["vae"] == ["diffusers", "AutoencoderKL"] and index["classes"][:2] == ["hoop", "cross"]
    assert set(json.loads((folder / "statistics.json").read_text())) == {"texture", "semantic"}
    page = (folder / "README.md").read_text()
    told = ("library_name: diffusers", "| frechet_x | 4.25 | 1.5 | – |", "4 to 4.5", "grid.png", "hoop, cross", "euler")
    assert [text for text in told if text not in page] == []
    assert str(folder.parent) not in page, "no place of this machine"
    assert (folder / "grid.png").is_file()


def test_sampling_from_the_folder_needs_no_artifact(exported: tuple[Path, Any], tmp_path: Path) -> None:
    folder, pixels = exported
    target = tmp_path / "picture.png"
    command = ["sample", "--from", str(folder), "--classes", "cross,3,Corner", "--rows", "2", "--seed", "3"]
    CliRunner().invoke(app, [*command, "--output", str(target)], catch_exceptions=False)
    assert target.read_bytes() == pictures.png(pictures.grid(pixels, columns=len(LABELS)))
    assert np.array_equal(share.load(str(folder))(LABELS, ROWS, SEED, output_type="np").images, pixels)
    with pytest.raises(UserError, match="no class 'hop'; its classes are called hoop"):
        share.draw(str(folder), "hop", 0, target)
    with pytest.raises(UserError, match="--classes: labels must be 0 to 9"):
        share.draw(str(folder), "11", 0, target)


@pytest.mark.parametrize(
    "overrides",
    [
        ("demo_tiny", "sample.solver=heun", "sample.guidance.interval_start=0.3"),
        ("demo_tiny", "sample.solver=dpmpp_2m", "sample.times=[0,0.2,0.6,1]"),
        ("demo_tiny", "sample.precision=bf16", "sample.guidance.groups=texture"),
        ("demo_tiny", "train_vavae.model.channel_multipliers=[2,2,2,2]"),
        ("lowdiff_tiny",),
        ("lowdiff_pixels_tiny",),
    ],
)
def test_every_way_of_sampling_gives_the_same_pixels(tmp_path: Path, overrides: tuple[str, ...]) -> None:
    run, pixels = made(tmp_path, *overrides)
    folder = share.export(run, str(tmp_path / "model"), "demo")
    assert np.array_equal(share.load(folder)(LABELS, ROWS, SEED, output_type="np").images, pixels)


@pytest.mark.parametrize("class_name", ["AutoencoderKL", "AutoencoderRAE"])
def test_a_tokenizer_of_diffusers_leaves_as_it_came(class_name: str, tmp_path: Path) -> None:
    tokenizer, recipe, _ = taken(tmp_path, class_name)
    put_networks(tokenizer.root, recipe)
    inputs = {"train_vavae": tokenizer.fingerprint, "encode": "encode", "train_dit": "train_dit"}
    sample = put(tokenizer.root, recipe, "sample", [], inputs=inputs)
    run = put(tokenizer.root, recipe, "evaluate", [], inputs={"sample": "sample"}).uri
    pixels = Sampler.of(Context(share._job_of(sample))).images(np.arange(recipe.sample.batch))[1]
    folder = share.export(run, str(tmp_path / "model"), "demo")
    pipeline = share.load(folder)
    assert type(pipeline.vae).__name__ == class_name
    found = pipeline(range(recipe.data.classes), -(-len(pixels) // 10), recipe.sample.seed, output_type="np").images
    assert np.array_equal(found[: len(pixels)], pixels)


_PLAIN = (
    "train_semvae=null",
    "train_dit.clock={kind: synchronous}",
    "train_dit.objective={semantic_weight: 1.0, align_weight: 0.0}",
    "train_dit.model.align_depth=null",
    "sample.guidance={method: none}",
)


@pytest.mark.parametrize(
    ("overrides", "said"),
    [
        (
            ("train_dit.model.head={hidden_size: 32, depth: 1, heads: 2}",),
            r"train_dit.model.head is set: .* no wide head",
        ),
        (
            (
                "sample.guidance={method: autoguidance, scale: 2.0, weights: weak.safetensors, model: {hidden_size: "
                "32, depth: 1, heads: 2, head: {hidden_size: 32, depth: 1, heads: 2}}}",
            ),
            r"sample.guidance.model.head is set: .* no wide head",
        ),
        (
            (
                "train_vavae.images=0",
                "train_vavae.model={kind: python, file: /mine.py, class_name: Mine, trusted: true, channels: 4, "
                "downscale: 8}",
            ),
            r"train_vavae.model.kind is python \(/mine.py\): code of your own is not shared",
        ),
        (
            (
                "train_dit.routing={first: 2, last: 2, drop: 0.5}",
                "sample.guidance={method: routed, scale: 2.0}",
            ),
            r"sample.guidance.method is routed: the shared code routes no tokens",
        ),
    ],
    ids=["wide head", "wide guide", "own code", "routed guidance"],
)
def test_parts_that_the_shared_code_does_not_know_are_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, overrides: tuple[str, ...], said: str
) -> None:
    """Before a network is built or a file is written."""
    monkeypatch.chdir(tmp_path)
    Path("weak.safetensors").touch()
    recipe = load_recipe("demo_tiny", [*_PLAIN, *overrides])
    job = context(at(tmp_path), recipe, SAMPLE, "train_vavae", "encode", "train_dit")
    with pytest.raises(UserError, match=said):
        write_folder(job, tmp_path / "model")
    assert not (tmp_path / "model").exists()


def test_a_shift_by_the_latents_dimension_leaves_with_the_model() -> None:
    """48 channels of 32 × 32 have four times the 12,288 numbers that it counts from."""
    assert [stage["shift"] for stage in _settings(load_recipe("sfd_xl_512"))["stages"]] == [0.5]


def test_a_card_says_how_every_resolution_is_sampled() -> None:
    stages = "[{side: 2, solver: dopri5, guidance: {method: none}}, {side: 4, steps: 3}]"
    guided = "sample.guidance={method: classifier_free, scale: 2.0}"
    recipe = load_recipe("lowdiff_tiny", [f"sample.stages={stages}", guided, "sample.steps=5", "sample.solver=heun"])
    assert _way(recipe) == ("2 × 2: dopri5, 5 steps, no guidance; 4 × 4: heun, 3 steps, classifier-free guidance 2")
    assert "pip install diffusers torch torchdiffeq`" in _loading(recipe)


def installed(folder: Path, *names: str) -> Path:
    """A folder of links to these distributions and all that they require, as `pip install` leaves them."""
    folder.mkdir()
    waiting, seen = list(names), set[str]()
    while waiting:
        name = waiting.pop()
        if name in seen or not any(distributions(name=name)):  # not for this system
            continue
        seen.add(name)
        found = distribution(name)
        for top in {path.parts[0] for path in found.files or ()} - {".."}:
            if not (folder / top).exists():
                (folder / top).symlink_to(found.locate_file(top))
        asked = [Requirement(text) for text in found.requires or ()]
        waiting += [each.name for each in asked if each.marker is None or each.marker.evaluate({"extra": ""})]
    return folder


def test_diffusers_loads_the_folder_where_pip_installed_what_the_card_says(
    exported: tuple[Path, Any], tmp_path: Path
) -> None:
    folder, pixels = exported
    assert "pip install diffusers torch`" in (folder / "README.md").read_text()
    site, target = installed(tmp_path / "site", "diffusers", "torch"), tmp_path / "pixels.npy"
    told = {"site": str(site), "folder": str(folder), "target": str(target)}
    program = _ALONE.format(**told, labels=LABELS, rows=ROWS, seed=SEED)
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment |= {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-I", "-S", "-c", program],
        env=environment,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert np.array_equal(np.load(target), pixels)


def test_a_weak_guide_leaves_with_the_model(tmp_path: Path) -> None:
    recipe = load_recipe("demo_tiny", ["train_dit.model.depth=2", "train_dit.model.align_depth=1"])
    weak, weights = build_network(recipe, recipe.train_dit.model), tmp_path / "weak.safetensors"
    for parameter in weak.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    save_file(weak.state_dict(), weights)
    model = recipe.train_dit.model.model_dump(mode="json", exclude_none=True)
    asked = {"method": "autoguidance", "scale": 3.0, "semantic_scale": 2.0, "weights": str(weights), "model": model}
    run, pixels = made(tmp_path, "demo_tiny", f"sample.guidance={json.dumps(asked)}")
    folder = Path(share.export(run, str(tmp_path / "model"), "demo"))
    weights.unlink()
    pipeline = share.load(str(folder))
    assert np.array_equal(pipeline(LABELS, ROWS, SEED, output_type="np").images, pixels)
    unlike = pipeline(LABELS, ROWS, SEED, guidance_scale=1.0, output_type="np").images
    assert not np.array_equal(unlike, pixels), "the guide has its say"
    assert str(tmp_path) not in (folder / "README.md").read_text(), "no place of this machine"


def test_code_in_the_folder_stands_alone() -> None:
    for name in ("network", "tokenizer", "scheduler", "pipeline"):
        source = bundle(f"tasks.sharing.code.{name}")
        lines = [line for line in source.splitlines() if line.lstrip().startswith(("from ", "import "))]
        assert [line for line in lines if line.lstrip().startswith(("from models", "from tasks", "from configs"))] == []
        names = [
            line.split("(")[0].split(":")[0] for line in source.splitlines() if line.startswith(("def ", "class "))
        ]
        assert len(names) == len(set(names)), "one definition of each name"


def test_our_tokenizer_is_theirs_where_they_have_it() -> None:
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL as Theirs

    arguments = {"base_channels": 32, "channel_multipliers": [1, 2], "blocks_per_level": 1, "z_channels": 4}
    arguments |= {"attention_levels": [1], "decoder_attention": False, "norm_groups": 8}
    config = autoencoder_kl.config_of(arguments)
    assert config is not None
    Theirs(**config).load_state_dict(autoencoder_kl.renamed(AutoencoderKL(**arguments).state_dict()))
    assert autoencoder_kl.config_of(arguments | {"channel_multipliers": [2, 2]}) is None
    assert autoencoder_kl.config_of(arguments | {"embed_dim": 8}) is None
    assert autoencoder_kl.config_of(arguments | {"patch_size": 2}) is None
    assert autoencoder_kl.config_of(arguments | {"linear_path": True}) is None


def test_what_cannot_be_exported_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run, _ = made(tmp_path, "demo_tiny")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("mine")
    (tmp_path / "model.zip").write_text("mine")
    with pytest.raises(UserError, match=r"model\.zip: is a file; name a folder"):
        share.export(run, str(tmp_path / "model.zip"), "demo_tiny")
    with pytest.raises(UserError, match="holds other things"):
        share.export(run, str(tmp_path / "full"), "demo")
    with pytest.raises(UserError, match="expected hf://organisation/name"):
        share.export(run, "hf://name", "demo")
    with pytest.raises(UserError, match="there; give a folder that"):
        share.load(str(tmp_path / "full"))
    monkeypatch.setattr("tasks.sharing.folder._KNOWN", {"images"})
    with pytest.raises(UserError, match="the code of a shared folder does not know it"):
        share.export(run, str(tmp_path / "new"), "demo")
    assert not (tmp_path / "new").exists()


def test_a_run_is_a_version_in_the_registry_and_sampled_from_there(tmp_path: Path, home: Path) -> None:
    from mlflow import MlflowClient

    evaluated, pixels = made(tmp_path, "demo_tiny")
    with pytest.raises(UserError, match="a version belongs to a run with scores"):
        share.export(evaluated, "models:/clothes", "demo")
    tags = {"root": at(tmp_path), "stage.evaluate": "made evaluate", "recipe": "demo_tiny", "overrides": ""}
    runs = [tracking.start_run("latentforge", name, {**tags, "mlflow.note.content": name}) for name in ("a", "b")]
    with pytest.raises(UserError, match="expected models:/NAME"):
        share.export(evaluated, "models:/clothes/1", "demo")
    assert share.export(evaluated, "models:/clothes", "demo") == "models:/clothes/1"
    assert share.export(evaluated, "models:/clothes", "demo") == "models:/clothes/1", "a run is one version"
    client = MlflowClient(tracking.tracking_uri())
    version = client.get_model_version("clothes", "1")
    assert version.run_id == runs[1].run and version.description == "b" and version.tags == {"recipe": "demo_tiny"}
    client.set_registered_model_alias("clothes", "best", "1")
    for address in ("models:/clothes", "models:/clothes/1", "models:/clothes@best"):
        assert np.array_equal(share.load(address)(LABELS, ROWS, SEED, output_type="np").images, pixels)
    client.create_registered_model("hats")
    for name, said in (("hats", r"\(it has no version\)"), ("shoes", "")):
        with pytest.raises(UserError, match=f"models:/{name}: not in the registry of MLflow at sqlite.*{said}"):
            share.load(f"models:/{name}")
