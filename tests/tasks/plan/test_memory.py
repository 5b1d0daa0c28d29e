"""Memory of a GPU as it is planned: what is always there by the recipe, the micro-batch that fits, and refusals."""

from __future__ import annotations

from functools import partial
from types import SimpleNamespace

import pytest
import torch
from functorch.compile import make_boxed_func
from torch._dynamo.backends.common import aot_autograd
from torch._functorch.partitioners import min_cut_rematerialization_partition

from configs import Recipe, load_recipe
from flows.plan import make_plan
from models.execution import prepare
from tasks.networks import build_autoencoder, build_network, build_semantic_vae
from tasks.plan import memory, networks
from tasks.plan.memory import memory_of
from tasks.training import launch
from tests.helpers.allocations import kept

XL = "lightningdit_xl_64ep"


def planned(*overrides: str, recipe: str = XL, stage: str = "train_dit") -> memory.Memory:
    found = memory_of(load_recipe(recipe, overrides), stage)
    assert found is not None
    return found


def test_xl_takes_twenty_bytes_a_weight() -> None:
    recipe = load_recipe(XL)
    with torch.device("meta"):
        weights = sum(p.numel() for p in build_network(recipe, recipe.train_dit.model).parameters())
    full = planned("train_dit.precision=fp32").fixed
    assert full == pytest.approx(20 * weights, rel=0.002)
    assert full / 1e9 == pytest.approx(13.5, abs=0.1)
    assert planned().fixed - full == pytest.approx(2 * weights, rel=0.002), "and a copy in half precision"
    assert planned("train_dit.ema_decays=[0.999]").fixed - planned().fixed == pytest.approx(4 * weights, rel=0.002)


def test_zero_leaves_a_worker_its_part() -> None:
    def a_weight(stage: int) -> float:
        whole, some = ("train_dit.precision=fp32", f"compute.train.zero_stage={stage}")
        return planned(whole, some).fixed / planned(whole).fixed * 20

    assert a_weight(1) == pytest.approx(12 + 8 / 32)
    assert a_weight(2) == pytest.approx(8 + 12 / 32)
    assert a_weight(3) == pytest.approx(20 / 32)


def test_images_of_xl_take_a_third_of_a_gigabyte_compiled() -> None:
    compiled = planned("compute.train.compile=true").image
    assert compiled / 1e9 == pytest.approx(0.34, abs=0.01)
    assert planned("compute.train.compile=false").image / 1e9 == pytest.approx(0.54, abs=0.01)
    assert planned("compute.train.compile=true", "train_dit.precision=fp32").image > 1.8 * compiled
    assert planned("compute.train.recompute=true").image < compiled / 5


@pytest.fixture
def traced(monkeypatch: pytest.MonkeyPatch) -> None:
    """What is compiled is differentiated and parted in two as for a GPU, but no code is generated."""
    torch._dynamo.reset()
    backend = aot_autograd(
        fw_compiler=lambda graph, _given: make_boxed_func(graph.forward),
        bw_compiler=lambda graph, _given: make_boxed_func(graph.forward),
        partition_fn=min_cut_rematerialization_partition,
    )
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend=backend))


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("way", ["eager", "compiled", "recompute"])
@pytest.mark.parametrize("qk_norm", [False, True], ids=["plain", "qk_norm"])
def test_a_transformer_keeps_what_torch_counts(traced: None, way: str, half: bool, qk_norm: bool) -> None:
    """Of one image, and a copy of the weights in half precision."""
    if way == "compiled" and qk_norm:
        pytest.skip("tracing takes seconds, and queries and keys are the same there")
    sizes = {"size": "null", "hidden_size": 144, "heads": 2, "depth": 2, "qk_norm": str(qk_norm).lower()}
    settings = [f"train_dit.model.{key}={value}" for key, value in sizes.items()]
    settings += [f"compute.train.compile={way == 'compiled'}", f"compute.train.recompute={way == 'recompute'}"]
    settings += [f"train_dit.precision={'bf16' if half else 'fp32'}"]
    recipe = load_recipe(XL, [each.replace("True", "true").replace("False", "false") for each in settings])
    network = build_network(recipe, recipe.train_dit.model).train()
    prepare(network, compile=way == "compiled", checkpoint_activations=way == "recompute")

    def run(batch: int) -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return network(torch.zeros(batch, 32, 16, 16), torch.zeros(batch), torch.zeros(batch, dtype=torch.long))

    one, two = (kept(network, partial(run, batch)) for batch in (1, 2))
    found = memory_of(recipe, "train_dit")
    assert found is not None
    tokens = found.image - (0.0 if way != "recompute" else memory.KEPT[False, half] * 256 * 144)  # made later
    if way == "recompute" and qk_norm:
        tokens -= memory.KEPT_FOR_QK_NORM[False, half] * 256 * 144
    assert two - one == pytest.approx(tokens, rel=0.06)
    products = [each for each in network.modules() if isinstance(each, torch.nn.Linear)]
    weights = sum(each.weight.numel() for each in products)
    if way == "eager":
        assert 2 * one - two == pytest.approx(memory.CAST * weights if half else 0, rel=0.03, abs=4e5)


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
@pytest.mark.parametrize("compiled", [False, True], ids=["eager", "compiled"])
def test_a_wide_head_keeps_what_torch_counts(traced: None, compiled: bool, half: bool) -> None:
    sizes = ["size=null", "hidden_size=144", "heads=2", "depth=2", "head={hidden_size: 576, depth: 2, heads: 4}"]
    way = f"compute.train.compile={str(compiled).lower()}", f"train_dit.precision={'bf16' if half else 'fp32'}"
    recipe = load_recipe("ditdh_xl_rae", [*(f"train_dit.model.{each}" for each in sizes), *way])
    network = build_network(recipe, recipe.train_dit.model).train()
    prepare(network, compile=compiled)

    def run(batch: int) -> object:
        with torch.autocast("cpu", torch.bfloat16, enabled=half):
            return network(torch.zeros(batch, 768, 16, 16), torch.zeros(batch), torch.zeros(batch, dtype=torch.long))

    one, two = (kept(network, partial(run, batch)) for batch in (1, 2))
    image, source = memory._diffusion_image(recipe, half)
    assert two - one == pytest.approx(image, rel=0.06) and source == memory.COUNTED


def test_a_wide_heads_block_is_the_largest_that_is_computed_again() -> None:
    width, ways = 1152, ("compute.train.recompute=true", "compute.train.compile=false")
    heads = (f"train_dit.model.head={{hidden_size: {size}, depth: 2, heads: 16}}" for size in (width, 2 * width))
    recipes = (load_recipe("ditdh_xl_rae", [*ways, head]) for head in heads)
    narrow, wide = (memory._diffusion_image(recipe, half=True)[0] for recipe in recipes)
    block, entering = memory.KEPT_IN_HEAD[False, True], 2 * memory.FLOAT32
    assert wide - narrow == pytest.approx(256 * width * (block + entering + memory.KEPT_AROUND_HEAD[True]))


@pytest.mark.parametrize("half", [False, True], ids=["fp32", "bf16"])
def test_tokenizers_keep_what_torch_counts(half: bool) -> None:
    model = load_recipe("vavae_f16d32").train_vavae.model
    networks_ = {
        "autoencoder": (build_autoencoder(model), lambda network, batch: network.decode(
            network.encode(torch.zeros(batch, 3, 32, 32)).mean)),
    }  # fmt: skip
    semantic = load_recipe("sfd_xl_80ep").train_semvae
    assert semantic is not None
    own = semantic.model
    networks_["semantic"] = (
        build_semantic_vae(own, 768),
        lambda network, batch: network(torch.zeros(batch, 768, 16, 16)),
    )
    planned_ = {
        "autoencoder": memory.KEPT_CONVOLVED[half] * memory.activations(model, 32),
        "semantic": memory.KEPT_SEMANTIC[half] * 2 * own.depth * 256 * own.width,
    }
    for name, (network, call) in networks_.items():
        found = []
        for batch in (1, 2):
            with torch.autocast("cpu", torch.bfloat16, enabled=half):
                found.append(kept(network, partial(call, network.train(), batch)))
        assert found[1] - found[0] == pytest.approx(planned_[name], rel=0.06), name


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
    assert micro == 128, "(0.94 × 80 - 14.9) / 0.34 is 177, and 128 the divisor below"
    assert alone.at(2 * micro) > 0.94 * 80e9
    named = planned("compute.train.workers=1", "compute.train.micro_batch=512")
    assert named.fitting(80e9) is None, "what a recipe names is not changed"
    assert alone.fitting(10e9) is None


def test_a_pair_of_images_is_not_cut() -> None:
    batch = ("compute.train.workers=1", "train_dit.batch=6")
    plain, paired = planned(*batch), planned(*batch, "train_dit.objective.contrastive_weight=0.05")
    room = [1.01 * plain.at(images) / memory.USABLE for images in (1, 3)]
    assert [plain.fitting(size) for size in room] == [1, 3]
    assert [paired.fitting(size) for size in room] == [None, 2]
    assert paired.least == 2


def test_a_plan_refuses_what_does_not_fit() -> None:
    fits = make_plan(XL, cluster="aws")
    assert not fits.problems
    (trained,) = [each for each in fits.stages if each.work.stage == "train_dit"]
    assert trained.memory is not None and "micro-batch 32" in trained.memory.source
    wide = ["compute.train.micro_batch=256", "train_dit.batch=8192"]
    (why,) = [why for why in make_plan(XL, wide, cluster="aws").problems if "GB" in why]
    assert (
        why.startswith("train_dit: takes about 101 GB of a GPU with 80 GB") and "lower compute.train.micro_batch" in why
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


def test_a_perceptual_term_counts_the_network_that_gives_it() -> None:
    plain = ("train_vavae.objective.align_weight=0", "train_vavae.objective.gan_weight=0")
    without = planned(*plain, "train_vavae.objective.perceptual_weight=0", recipe="vavae_f16d32", stage="train_vavae")
    layers = (*plain, "train_vavae.objective.perceptual_weight=1", "train_vavae.objective.perceptual_layers=[2, 5]")
    recipe = load_recipe("vavae_f16d32", layers)
    assert recipe.foundation is not None
    more = planned(*layers, recipe="vavae_f16d32", stage="train_vavae").fixed - without.fixed
    assert more == 4 * networks.foundation_values(recipe.foundation)


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
