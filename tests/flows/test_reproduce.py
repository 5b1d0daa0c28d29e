"""From files in the authors' layouts to a table of published scores beside ours; nothing is trained, no image read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml

from configs import Recipe, UserError, load_recipe
from configs.published import departures
from configs.reproduction import reproducible, reproduction
from flows.plan import duration, make_plan
from flows.reproduce import verdict
from flows.run import preflight
from flows.stages import STAGES
from tasks.networks import build_autoencoder, build_network
from tests.flows.conftest import REPOSITORY, Workplace
from tests.helpers.builders import at
from tests.helpers.inceptions import put_inception
from tests.helpers.published import hub_cache, save_sfd, save_statistics, save_tokenizer
from tests.helpers.web import web_server

TOKENIZERS = ["ldm_f16d32", "vavae_f16d32"]
NAMES = [
    "lightningdit_xl_64ep",
    "lightningdit_xl_800ep",
    "sfd_xl_800ep",
    "sfd_xl_80ep",
    "sfd_xxl_800ep",
    "sfd_xxl_80ep",
]
IMAGES = 20


def put_released(folder: Path, places: Mapping[str, str] | None = None) -> Path:
    """Random weights as SFD's authors would leave them, and a recipe of ours that names them.

    places: where a file is served, by its name; the others are named by their paths.
    """

    def at_place(name: str) -> str:
        return f"{(places or {}).get(name, folder)}/{name}"

    base = load_recipe("demo_tiny")
    torch.manual_seed(3)
    tokenizer = build_autoencoder(base.train_vavae.model).state_dict()
    save_tokenizer(folder / "vavae.ckpt", tokenizer)
    for name in ("main", "guide"):
        network = build_network(base, base.train_dit.model)
        for parameter in network.parameters():
            if parameter.requires_grad:
                torch.nn.init.normal_(parameter, std=0.05)
        save_sfd(folder / f"{name}.pt", dict(network.state_dict()), dict(network.state_dict()), {})
    for group, channels in base.channel_groups.items():
        save_statistics(folder / f"{group}.pt", torch.zeros(channels), torch.ones(channels))
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (IMAGES, base.image.size, base.image.size, 3), np.uint8)
    np.savez(folder / "reference.npz", arr_0=pixels)
    model = {"hidden_size": 48, "depth": 3, "heads": 2, "qk_norm": True, "align_depth": 2, "align_hidden": 32}
    guidance = {"method": "autoguidance", "scale": 1.5, "weights": at_place("guide.pt"), "model": model}
    values = {
        "extends": "demo_tiny",
        "train_vavae": {"images": 0, "pretrained": at_place("vavae.ckpt")},
        "sample": {"images": IMAGES, "batch": 4, "solver": "dopri5", "guidance": guidance},
        "evaluate": {
            "images": IMAGES,
            "reference": at_place("reference.npz"),
            "inception": {"weights": str(put_inception(folder))},
            "classifier": None,
            "bootstrap": 0,
        },
        "published": {
            "source": "a test",
            "guided": {"fid": 1.25, "sfid": 3.5},
            "unguided": {"fid": 3.0},
            "released": {
                "weights": at_place("main.pt"),
                "statistics": {group: at_place(f"{group}.pt") for group in base.channel_groups},
            },
            "protocol": {"sample.images": 50_000, "sample.solver": "dopri5"},
        },
    }
    (folder / "released.yaml").write_text(yaml.safe_dump(values))
    return folder / "released.yaml"


@pytest.fixture
def served(tmp_path: Path) -> Iterator[dict[str, str]]:
    """A hub's cache with tokenizer and guide, a web server with all, the Inception weights in the folder alone."""
    put_released(tmp_path)
    given = {name: (tmp_path / name).read_bytes() for name in ("vavae.ckpt", "guide.pt")}
    hub = hub_cache(tmp_path / "hub", "Authors/files", given)
    with web_server(tmp_path) as url:
        yield dict.fromkeys(given, hub) | dict.fromkeys(("main.pt", "semantic.pt", "reference.npz"), url)


def test_the_authors_files_lead_to_their_table(workplace: Workplace, served: dict[str, str], tmp_path: Path) -> None:
    """From a hub, from the web and from a folder."""
    recipe, root = put_released(tmp_path, served), tmp_path / "root"
    hub = {"HF_HUB_CACHE": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    workplace = replace(workplace, environment={**workplace.environment, **hub})
    first = workplace.flows("reproduce", str(recipe), "--root", str(root))
    made = {path.parts[-3] for path in root.glob("*/*/manifest.json")}
    assert made == {"train_vavae", "train_dit", "sample", "reference_images", "reference", "evaluate", "report"}
    (table,) = [line for line in first.stdout.splitlines() if line.startswith("│ fid ")]
    assert [cell.strip() for cell in table.strip("│").split("│")] == ["fid", "1.25", "–", "–"]
    said = first.stdout.splitlines()[-1]
    assert said.startswith("verdict  no score with a published name: the Inception weights are not the published file")
    for words in ("dopri5", "batch 4", "autoguidance", "20 images against reference.npz", "published with 50,000"):
        assert words in said, words
    (scored,) = root.glob("evaluate/*/manifest.json")
    scores = json.loads(scored.read_text())["scores"]
    assert any("inception" in name for name in scores) and "fid" not in scores
    before = {path: path.stat().st_mtime_ns for path in root.glob("*/*/manifest.json")}
    again = workplace.flows("reproduce", str(recipe), "--root", str(root))
    assert {path: path.stat().st_mtime_ns for path in root.glob("*/*/manifest.json")} == before
    assert again.stdout.splitlines()[-1] == said
    picture = tmp_path / "grid.png"
    asked = ["--recipe", str(recipe), "--reproduction", "--classes", "1,2", "--output", str(picture)]
    workplace.flows("sample", *asked, "--root", str(root))
    assert picture.read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize(
    ("field", "content", "words"),
    [
        ("texture.pt", {"mean": torch.zeros(1, 3, 1, 1), "std": torch.ones(1, 3, 1, 1)}, "statistics of 3 channels"),
        ("guide.pt", {"model": {}, "ema": {"x_embedder.proj.weight": torch.zeros(2)}}, "guide.pt"),
        ("main.pt", b"cut short", "main.pt"),
        ("vavae.ckpt", None, "vavae.ckpt"),
        ("reference.npz", b"<html>", "reference.npz"),
    ],
)
def test_what_does_not_fit_is_one_line_before_anything_runs(
    field: str, content: Mapping[str, object] | bytes | None, words: str, tmp_path: Path
) -> None:
    recipe = put_released(tmp_path)
    if content is None:
        (tmp_path / field).unlink()
    elif isinstance(content, bytes):
        (tmp_path / field).write_bytes(content)
    else:
        torch.save(content, tmp_path / field)
    with pytest.raises(UserError, match=words) as refused:
        preflight(STAGES, str(recipe), reproduction(str(recipe)), at(tmp_path / "root"))
    assert "\n" not in str(refused.value)
    assert not list((tmp_path / "root").rglob("*.*")), "nothing ran"


def test_a_place_that_fails_is_one_line_before_anything_runs(
    served: dict[str, str], tmp_path: Path, home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A hub that cannot be reached, a download that breaks off."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)

    def look(places: Mapping[str, str]) -> None:
        recipe = str(put_released(tmp_path, places))
        preflight(STAGES, recipe, reproduction(recipe), at(tmp_path / "root"))

    look(served)
    with web_server(tmp_path, short=["main.pt"]) as url:
        for places, words in (
            ({"main.pt": url}, r"main\.pt: reading stopped"),
            ({"guide.pt": "hf://Nobody/nothing"}, r"hf://Nobody/nothing/guide\.pt: the hub cannot be reached"),
        ):
            with pytest.raises(UserError, match=words) as refused:
                look(served | places)
            assert "\n" not in str(refused.value)
    assert not list((tmp_path / "root").rglob("*.*")), "nothing ran"


def test_all_published_checkpoints_can_be_reproduced() -> None:
    assert reproducible() == sorted([*NAMES, *TOKENIZERS])


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("unguided", [False, True])
def test_a_reproduction_trains_nothing_and_departs_from_nothing(name: str, unguided: bool) -> None:
    recipe = load_recipe(name, reproduction(name, unguided))
    assert recipe.train_dit.images == 0 and not recipe.needs_latents and not recipe.needs_images
    assert (recipe.sample.guidance.method == "none") == unguided
    assert departures(recipe) == []
    assert recipe.evaluate.inception is not None and recipe.sample.images == 50_000


@pytest.mark.parametrize("name", NAMES)
def test_the_plan_knows_what_a_reproduction_costs(name: str) -> None:
    """Guided and unguided; docs/reproduce.md says it, too."""
    plans = [make_plan(name, cluster="aws", flow="reproduce", unguided=unguided) for unguided in (False, True)]
    stages = ["train_vavae", "train_dit", "sample", "evaluate", "report"]
    assert all([each.work.stage for each in plan.stages] == stages for plan in plans)
    told = [f"{p.gpu_hours:.0f} GPU-hours, {duration(p.seconds)}, {p.dollars:.0f} dollars" for p in plans]
    assert f"| `{name}` | {told[0]} | {told[1]} |" in (REPOSITORY / "docs/reproduce.md").read_text()


def test_a_look_and_an_unknown_name_say_so() -> None:
    recipe = load_recipe("sfd_xl_80ep", reproduction("sfd_xl_80ep", images=1_000))
    assert departures(recipe) == ["sample.images is 1,000, published with 50,000"]
    with pytest.raises(UserError, match=r"recipe demo: names no files .*one of ldm_f16d32, lightningdit"):
        reproduction("demo")


def scored(recipe: Recipe, fid: float) -> str:
    return verdict(recipe, {"fid": fid, "sfid": 4.0})


def test_the_verdict_is_one_line_about_what_moves_a_score() -> None:
    recipe = load_recipe("lightningdit_xl_64ep", reproduction("lightningdit_xl_64ep"))
    said = scored(recipe, 2.25)
    assert said.startswith("fid 2.25, published 2.11 (+0.14); with euler, 249 steps, precision tf32, guidance")
    assert said.endswith("50,000 images against VIRTUAL_imagenet256_labeled.npz. All as published.")
    other = load_recipe("sfd_xl_80ep", reproduction("sfd_xl_80ep", overrides=["sample.batch=128"]))
    assert "batch 128 (it shares a step size)" in scored(other, 1.3)
    assert scored(other, 1.3).endswith("Not as published: sample.batch is 128, published with 4.")
