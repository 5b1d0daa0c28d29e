"""Memory of a GPU as it is planned: what is always there by the recipe, the micro-batch that fits, and refusals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from configs import Recipe, load_recipe
from flows.plan import make_plan
from tasks.networks import build_autoencoder, build_network
from tasks.plan import memory, networks
from tasks.plan.memory import memory_of
from tasks.training import launch

XL = "lightningdit_xl_64ep"


def planned(*overrides: str, recipe: str = XL, stage: str = "train_dit") -> memory.Memory:
    found = memory_of(load_recipe(recipe, overrides), stage)
    assert found is not None
    return found


def test_xl_takes_twenty_bytes_a_weight() -> None:
    recipe = load_recipe(XL)
    with torch.device("meta"):
        weights = sum(p.numel() for p in build_network(recipe, recipe.train_dit.model).parameters())
    assert planned().fixed == pytest.approx(20 * weights, rel=0.002)
    assert planned().fixed / 1e9 == pytest.approx(13.5, abs=0.1)
    assert planned("train_dit.ema_decays=[0.999]").fixed - planned().fixed == pytest.approx(4 * weights, rel=0.002)


def test_zero_leaves_a_worker_its_part() -> None:
    def a_weight(stage: int) -> float:
        return planned(f"compute.train.zero_stage={stage}").fixed / planned().fixed * 20

    assert a_weight(1) == pytest.approx(12 + 8 / 32)
    assert a_weight(2) == pytest.approx(8 + 12 / 32)
    assert a_weight(3) == pytest.approx(20 / 32)


def test_images_take_what_the_code_was_read_to_keep() -> None:
    compiled = planned("compute.train.compile=true").image
    assert compiled / 1e9 == pytest.approx(0.3, abs=0.01)
    assert planned("compute.train.compile=false").image / 1e9 == pytest.approx(0.6, abs=0.01)
    assert planned("compute.train.compile=true", "train_dit.precision=fp32").image == 2 * compiled
    assert planned("compute.train.recompute=true").image < compiled / 5


def test_a_measured_figure_replaces_the_constant(monkeypatch: pytest.MonkeyPatch) -> None:
    assert "not measured" in planned().source
    monkeypatch.setattr(memory, "MEASURED", {("train_dit", "XL", True): 0.25e9})
    found = planned("compute.train.compile=true")
    assert found.image == 0.25e9 and found.source.startswith("measured")
    assert "not measured" in planned("compute.train.compile=false").source


def test_the_largest_micro_batch_that_fits_is_taken_where_the_recipe_leaves_it_open() -> None:
    alone = planned("compute.train.workers=1", "compute.train.compile=true")
    assert alone.share == 1024
    micro = alone.fitting(80e9)
    assert micro == 128, "(0.94 × 80 - 13.5) / 0.3 is 207, and 128 the divisor below"
    assert alone.at(2 * micro) > 0.94 * 80e9
    named = planned("compute.train.workers=1", "compute.train.micro_batch=512")
    assert named.fitting(80e9) is None, "what a recipe names is not changed"
    assert alone.fitting(10e9) is None


def test_a_plan_refuses_what_does_not_fit() -> None:
    fits = make_plan(XL, cluster="aws")
    assert not fits.problems
    (trained,) = [each for each in fits.stages if each.memory is not None]
    assert trained.memory is not None and "micro-batch 32" in trained.memory.source
    wide = ["compute.train.micro_batch=256", "train_dit.batch=8192"]
    (why,) = [why for why in make_plan(XL, wide, cluster="aws").problems if "GB" in why]
    assert (
        why.startswith("train_dit: takes about 90 GB of a GPU with 80 GB") and "lower compute.train.micro_batch" in why
    )


@pytest.mark.parametrize("recipe", ["vavae_f16d32", "semvae_ch16"])
def test_tokenizers_fit_too(recipe: str) -> None:
    plan = make_plan(recipe, cluster="aws", flow="tokenizer-eval")
    assert not plan.problems
    assert any(each.memory is not None for each in plan.stages)


def test_frozen_networks_are_counted() -> None:
    recipe = load_recipe("sfd_xl_80ep")
    assert recipe.foundation is not None
    assert networks.foundation_values(recipe.foundation) == pytest.approx(86e6, rel=0.02)
    stored = ("encode.align_features=true", "train_dit.objective.align=stored")
    more = planned(recipe="sfd_xl_80ep").fixed - planned(*stored, recipe="sfd_xl_80ep").fixed
    assert more == 4 * networks.foundation_values(recipe.foundation)
    tokenizer = load_recipe("vavae_f16d32")
    with torch.device("meta"):
        own = sum(p.numel() for p in build_autoencoder(tokenizer.train_vavae.model).parameters())
    assert planned(recipe="vavae_f16d32", stage="train_vavae").fixed > 16 * own


def test_workers_take_the_micro_batch_that_their_gpu_holds(monkeypatch: pytest.MonkeyPatch) -> None:
    def chosen(gigabytes: float, *overrides: str, device: str = "cuda") -> int | None:
        properties = SimpleNamespace(total_memory=gigabytes * 1e9)
        monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
        recipe: Recipe = load_recipe(XL, ["compute.train.workers=1", "compute.train.compile=true", *overrides])
        return launch._fitted(recipe, "train_dit", torch.device(device)).micro_batch

    assert chosen(80) == 128
    assert chosen(24) == 16
    assert chosen(24, "compute.train.micro_batch=64") == 64
    assert chosen(80, device="cpu") is None
