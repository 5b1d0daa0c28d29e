"""Which engine a recipe gets, and what DeepSpeed is told: nothing that makes an accelerator wait."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.distributed as dist

from configs.load import load_recipe, recipe_names
from tasks.training.engine import DeepSpeedEngine, PlainEngine, Split, build_engine, deepspeed_config
from tests.helpers.toy_training import BATCH, Toy, compute, section

CPU = torch.device("cpu")


@pytest.fixture
def alone(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A process group of this process only."""
    for name in ("RANK", "LOCAL_RANK"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("WORLD_SIZE", "1")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def derived(**knobs: Any) -> dict[str, Any]:
    return deepspeed_config(section(), compute(engine="deepspeed", **knobs), Split.of(BATCH, 2, 4))


@pytest.mark.parametrize("stage", [0, 1, 2, 3])
def test_no_timer_of_deepspeed_runs(stage: int) -> None:
    assert derived(zero_stage=stage)["timers"]["throughput"] == {"enabled": False, "synchronized": False}


@pytest.mark.parametrize("stage", [1, 2, 3])
def test_zero_reduces_in_small_buckets_of_contiguous_memory(stage: int) -> None:
    zero = derived(zero_stage=stage)["zero_optimization"]
    assert zero["reduce_bucket_size"] == 50_000_000 and zero["contiguous_gradients"]


def test_what_a_recipe_says_of_deepspeed_goes_before_what_follows() -> None:
    config = derived(zero_stage=2, deepspeed={"zero_optimization": {"reduce_bucket_size": 7}})
    assert config["zero_optimization"]["reduce_bucket_size"] == 7
    assert config["zero_optimization"]["stage"] == 2


def test_gradients_travel_in_bfloat16_where_the_recipe_says_so() -> None:
    assert derived()["communication_data_type"] == "fp32"
    assert derived(communication="bf16")["communication_data_type"] == "bf16"


@pytest.mark.parametrize("name", ["lightningdit_xl_64ep", "sfd_xl_80ep", "sfd_xxl_800ep", "vavae_f16d32"])
def test_large_recipes_say_so(name: str) -> None:
    assert load_recipe(name).compute.train.communication == "bf16"


@pytest.mark.parametrize("name", [name for name in recipe_names() if load_recipe(name).image.size >= 256])
def test_imagenets_recipes_are_compiled_and_take_what_fits(name: str) -> None:
    """Uncompiled, XL trains at half the pace; cut where it need not be, it casts all weights once more a cut."""
    recipe = load_recipe(name)
    assert recipe.compute.train.compile and recipe.compute.actors.compile
    if not recipe.lacks("train_dit"):
        assert recipe.compute.train.micro_batch is None


def test_deepspeed_is_taken_for_what_only_it_does_and_its_timer_is_off(alone: None) -> None:
    assert isinstance(build_engine(Toy(), section(), compute(engine="auto"), CPU), PlainEngine)
    sharded = build_engine(Toy(), section(), compute(engine="auto", zero_stage=1), CPU)
    assert isinstance(sharded, DeepSpeedEngine)
    assert sharded.stage == 1
    assert not sharded._engine.tput_timer.config.enabled
