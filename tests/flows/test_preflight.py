"""What is given from outside is opened before anything runs: what a run of days would refuse is refused at once."""

from __future__ import annotations

import time
from pathlib import Path

import pytest
import torch

from configs import UserError, load_recipe
from flows.run import preflight
from flows.stages import STAGES
from models.checkpoints import Checkpoint, write_authors
from tasks.dag import stages_of
from tasks.networks import build_network
from tests.helpers.builders import at
from tests.helpers.published import save_statistics

GUIDED = "sample.guidance={{method: autoguidance, scale: 2.0, weights: '{0}', model: {{hidden_size: 48, depth: 3, heads: 2, qk_norm: true, align_depth: 2, align_hidden: 32}}}}"  # fmt: skip # noqa: E501


@pytest.fixture
def guide(tmp_path: Path) -> Path:
    recipe = load_recipe("demo_tiny")
    weights = dict(build_network(recipe, recipe.train_dit.model).state_dict())
    write_authors(tmp_path / "guide.pt", Checkpoint("lightningdit", weights))
    return tmp_path / "guide.pt"


def refused(tmp_path: Path, overrides: list[str], words: str, only: str | None = None) -> None:
    with pytest.raises(UserError, match=words) as refusal:
        preflight(STAGES, "demo_tiny", overrides, at(tmp_path / "root"), only=only)
    assert "\n" not in str(refusal.value)
    assert not list((tmp_path / "root").rglob("*.*")), "nothing ran"


def test_a_guide_is_opened_before_the_training(guide: Path, tmp_path: Path) -> None:
    fits = GUIDED.format(guide)
    started = time.monotonic()
    preflight(STAGES, "demo_tiny", [fits], at(tmp_path / "root"))
    assert time.monotonic() - started < 60
    wider = fits.replace("hidden_size: 48", "hidden_size: 64")
    refused(tmp_path, [wider], r"sample\.guidance\.weights .*guide\.pt does not fit this LightningDiT: .*another shape")
    refused(tmp_path, [fits.replace("depth: 3", "depth: 4")], r"guide\.pt does not fit .*missing")
    guide.write_bytes(guide.read_bytes()[:-5000])
    refused(tmp_path, [fits], r"weights .*guide\.pt: a torch file that is damaged or cut short")
    guide.write_text("<!DOCTYPE html><title>Not here</title>")
    refused(tmp_path, [fits], r"guide\.pt: a web page \(Not here\)")
    preflight(STAGES, "demo_tiny", [fits], at(tmp_path / "root"), only="shard")  # needs no guide
    guide.unlink()
    preflight(STAGES, "demo_tiny", [fits], at(tmp_path / "root"), only="shard")


def test_weights_and_statistics_are_opened_before_the_run(guide: Path, tmp_path: Path) -> None:
    given = f"train_dit.pretrained={guide}"
    preflight(STAGES, "demo_tiny", [given], at(tmp_path / "root"))
    refused(tmp_path, [given, "train_dit.model.depth=4"], r"train_dit\.pretrained .*guide\.pt does not fit")
    refused(tmp_path, [f"train_vavae.pretrained={guide}"], r"holds lightningdit under .* a network of kind autoencoder")
    wrong = save_statistics(tmp_path / "stats.pt", torch.zeros(3), torch.ones(3))
    named = [f"train_dit.statistics.{group}={wrong}" for group in ("texture", "semantic")]
    refused(tmp_path, [given, *named], r"train_dit\.statistics\.texture .*statistics of 3 channels")


def test_the_command_and_the_flow_know_the_same_stages(tmp_path: Path) -> None:
    """`run` looks at what its flow will run: no source that is not read, no stage that drops out."""
    given = ["train_vavae.images=0", "train_vavae.pretrained=v.pt", "train_dit.images=0", "train_dit.pretrained=d.pt"]
    given += [f"train_dit.statistics.{group}={group}.pt" for group in ("texture", "semantic")]
    aside = ["evaluate.reference=r.npz", "evaluate.classifier=null"]
    latents = ["data.source={kind: latents, path: nowhere}", "train_semvae.images=0", "train_semvae.pretrained=s.pt"]
    for overrides in ([], given, [*given, *aside], [*given[:2], *aside, *latents]):
        recipe = load_recipe("demo_tiny", overrides)
        names = [stage.name for stage in STAGES if stage.present(recipe)]
        for flow in ("sfd-full", "lowdiff-full", "reproduce"):
            assert [stage.name for stage in stages_of(flow) if stage.present(recipe)] == names
    everything = load_recipe("demo_tiny", [*given, *aside])
    tokenizers = [stage.name for stage in stages_of("tokenizer-eval") if stage.present(everything)]
    assert tokenizers == ["shard", "train_vavae", "train_semvae", "evaluate_tokenizer"]
