"""The plan: its formulas against built networks, real solvers, real artifacts and a real tracker."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.flop_counter import FlopCounterMode
from typer.testing import CliRunner

from configs import Recipe, UserError, load_recipe, recipe_names
from configs.cluster import load_cluster
from flows.plan import make_plan
from tasks.plan import networks, sizes, work
from tasks.plan.actual import actuals
from tasks.plan.data import images_of
from tasks.plan.schedule import Plan, StagePlan
from tasks.plan.work import solver_evaluations, works
from tests.flows.conftest import REPOSITORY, Workplace

BIG = {
    "recipe": "sfd_xl_80ep",
    "overrides": ["compute.actors.actors=1000"],
    "cluster": "aws",
    "nodes": ["infer=1000", "decode=200"],
    "images": 100_000_000,
    "image_bytes": 110_000.0,
}


def stage(plan: Plan, name: str) -> StagePlan:
    return next(stage for stage in plan.stages if stage.work.stage == name)


# ------------------------------------------------------------------------------------------------------- networks


def same_state(cost: networks.Cost, network: torch.nn.Module) -> None:
    state = network.state_dict()
    assert (cost.values, cost.tensors) == (sum(tensor.numel() for tensor in state.values()), len(state))


@pytest.mark.parametrize("name", recipe_names())
def test_networks_cost_what_built_ones_do(name: str) -> None:
    """Values and tensors of the state dict, and FLOPs as `models/flops.py`, which is checked against torch's count."""
    from models import flops
    from models.lightningdit import LightningDiT
    from tasks.networks import build_autoencoder, build_network, build_semantic_vae

    recipe = load_recipe(name)
    with torch.device("meta"):
        network = build_network(recipe, recipe.train_dit.model)
        tokenizer = build_autoencoder(recipe.train_vavae.model)
    for side in recipe.sides if isinstance(network, LightningDiT) else recipe.sides[:1]:  # a UNet is counted, slowly
        backbone, head = networks.diffusion(recipe, recipe.train_dit.model, side)
        same_state(backbone + head, network)
        assert backbone.flops == flops.forward_flops(network, side=side)
        assert (backbone + head).flops == flops.forward_flops(network, side=side, alignment=True)
        if isinstance(network, LightningDiT):
            found = networks.blocks_flops(recipe, recipe.train_dit.model, side)
            assert found == flops.blocks_flops(network, side)
    encoder, decoder = networks.autoencoder(recipe.train_vavae.model, recipe.image.size)
    same_state(encoder + decoder, tokenizer)
    if not recipe.train_vavae.model.identity:
        assert encoder.flops == flops.encoder_flops(tokenizer, recipe.image.size)
        assert decoder.flops == flops.decoder_flops(tokenizer, recipe.image.size)
    if recipe.train_semvae is not None and recipe.foundation is not None:
        with torch.device("meta"):
            semantics = build_semantic_vae(recipe.train_semvae.model, recipe.foundation.feature_dim)
        cost = networks.semantic_vae(recipe.train_semvae.model, recipe.foundation.feature_dim, recipe.latent_size**2)
        same_state(cost[0] + cost[1], semantics)
        assert (cost[0] + cost[1]).flops == flops.forward_flops(semantics, side=recipe.latent_size)


SWITCHES = ["patch_size=2", "swiglu=false", "rope=false", "rmsnorm=false", "shift=false", "learn_sigma=true"]


@pytest.mark.parametrize("switch", [*SWITCHES, "qk_norm=false", "align_depth=null", "size=1p6B"])
def test_every_switch_of_the_transformer_counts(switch: str) -> None:
    from models import flops
    from tasks.networks import build_dit

    changes = [f"train_dit.model.{switch}", "train_dit.objective.align_weight=0"]
    recipe = load_recipe("sfd_xl_80ep", changes)
    with torch.device("meta"):
        dit = build_dit(recipe, recipe.train_dit.model)
    backbone, head = networks.dit(recipe, recipe.train_dit.model)
    same_state(backbone + head, dit)
    assert backbone.flops == flops.forward_flops(dit)


@pytest.mark.parametrize("model", ["vit_base_patch14_reg4_dinov2.lvd142m", "vit_small_patch16_224.augreg_in21k"])
def test_vision_transformers_cost_what_torch_counts(model: str) -> None:
    section = load_recipe("sfd_xl_80ep").foundation
    assert section is not None
    section = section.model_copy(update={"name": model})
    formula, source = networks.foundation_flops(section)
    assert source.startswith("formula") and formula == networks._counted(section)


def test_judge_costs_what_torch_counts() -> None:
    from tasks.judge import build_judge

    recipe = load_recipe("demo")
    section = recipe.evaluate.classifier
    assert section is not None
    with torch.device("meta"):
        judge = build_judge(recipe, section).eval()
        pixels = torch.empty(1, 3, recipe.image.size, recipe.image.size)
    with FlopCounterMode(display=False) as counter:
        judge(pixels)
    cost = networks.judge(section, recipe.image.size, recipe.data.classes)
    same_state(cost, judge)
    assert cost.flops == counter.get_total_flops()


def test_what_the_plan_repeats_is_what_the_code_says() -> None:
    """Figures that are written down twice so that a plan need not import torch or Ray."""
    from models.lightningdit import SIZES
    from tasks import examine, judge, readout, sample, shard, train_semvae, train_vavae

    assert {
        size: dict(zip(("hidden_size", "depth", "num_heads"), values, strict=True))
        for size, values in networks.SIZES.items()
    } == SIZES
    assert sizes.SHARD_ROWS_PER_GROUP == shard.ROWS_PER_GROUP
    assert len(shard.SCHEMA) == sizes.SHARD_COLUMNS
    assert networks._JUDGE_GRID == judge._SIDE
    assert (work.SAMPLES_PER_PART, work.EXAMINED_AT_ONCE) == (sample._LEAST_PER_PART, examine._LENGTH)
    assert sample.GRID_ROWS == work.SHOWN_PER_CLASS
    assert readout.BATCH == work.EXAMINED_BATCH
    assert {
        "train_vavae": train_vavae._SCORED_IMAGES,
        "train_semvae": train_semvae._SCORED_IMAGES,
    } == work.SCORED


# ------------------------------------------------------------------------------------------------------- sampling


@pytest.mark.parametrize(
    "changes",
    [
        ["sample.solver=euler"],
        ["sample.solver=heun", "sample.shift=0.3"],
        ["sample.off_by_one=true", "sample.guidance={method: none}"],
        ["sample.guidance.interval_start=0.4", "sample.shift=0.3"],
        ["sample.guidance.interval_start=0.4", "sample.solver=heun", "train_dit.clock={kind: synchronous}"],
    ],
)
def test_evaluations_are_those_that_the_solver_makes(changes: list[str]) -> None:
    from models.guidance import ClassifierFree, NoGuidance
    from models.solvers import sample as solve
    from tasks.networks import build_clock, channel_groups

    recipe = load_recipe("demo_tiny", ["sample.steps=11", *changes])
    section, groups = recipe.sample, channel_groups(recipe)
    asked = {0: 0, 1: 0}

    def network(x_BCHW: torch.Tensor, t_BG: torch.Tensor, y_B: torch.Tensor) -> torch.Tensor:
        asked[int(y_B[0])] += 1
        return torch.zeros_like(x_BCHW)

    guidance: NoGuidance | ClassifierFree = NoGuidance()
    if section.guidance.method == "classifier_free":
        interval = (section.guidance.interval_start, 1.0)
        guidance = ClassifierFree(section.guidance.scale, null_label=1, interval=interval, groups=groups)
    solve(
        guidance(network),
        torch.zeros(1, groups.channels, 4, 4),
        torch.zeros(1, dtype=torch.long),
        clock=build_clock(recipe),
        groups=groups,
        solver=section.solver,
        steps=section.steps,
        shift=section.shift,
        steps_are_points=section.off_by_one,
    )
    main, guided, _ = solver_evaluations(recipe, section, adaptive=0)
    assert (main, guided) == (asked[0], asked[1])


# --------------------------------------------------------------------------------------------------- real artifacts


def test_bytes_and_rows_of_a_real_run(finished: Workplace) -> None:
    """Every stage within 5 %; pictures of a sample and a report are compressed, so there the plan is an upper bound."""
    plan, found = make_plan("demo_tiny"), actuals(finished.undisturbed, recipe="demo_tiny")
    assert set(found) == {each.work.stage for each in plan.stages}
    for each in plan.stages:
        actual, name = found[each.work.stage], each.work.stage
        assert actual.bytes is not None
        if name == "report":
            continue  # its curves and text are no formula's
        assert each.work.rows.value == actual.rows, name
        if name == "sample":
            assert actual.bytes <= each.work.written.value
        else:
            assert each.work.written.value == pytest.approx(actual.bytes, rel=0.05), name


def test_bytes_of_mirrored_latents_and_moments(tmp_path: Path) -> None:
    """What the tiny run does not store: flips and standard deviations, written by the stage's own table."""
    from infra.storage import Storage
    from tasks.latents import WRITE_OPTIONS, latent_table

    given = ["train_dit.images=0", "train_dit.pretrained=given.safetensors"]  # moments are for another trainer
    recipe = load_recipe("demo_tiny", ["image.flips=true", "encode.posterior=moments", *given])
    images = images_of(recipe)
    cells, count = recipe.latent_size, images.train
    channels = {"z": 8, "z_std": 8, "s": 4, "s_std": 4, "f": 112}
    shapes = {name + flip: (channels[name], cells, cells) for name in channels for flip in ("", "_flip")}
    tensors = {name: np.zeros((count, *shape), np.float16) for name, shape in shapes.items()}
    keys = [f"train/{number:05d}" for number in range(count)]
    table = latent_table(keys, np.zeros(count, np.int32), tensors)
    entry = Storage.at(str(tmp_path)).write_table("part", table, recipe.encode.rows_per_group, **WRITE_OPTIONS)
    planned = sizes.latent_bytes(images, recipe) * images.train / images.all
    assert planned == pytest.approx(entry.bytes, rel=0.05)


def test_requests_to_write_are_the_files_of_a_real_run(finished: Workplace) -> None:
    """Files that are left, and the run's own file, which goes when the stage is done."""
    plan = make_plan("demo_tiny")
    for name in ("shard", "encode", "sample"):
        folder = Path(finished.undisturbed) / name / finished.first[name]
        files = [path for path in folder.rglob("*") if path.is_file()]
        assert stage(plan, name).work.writes.value == len(files) + 1, name


def test_measured_rates_give_back_the_measured_time_and_scale(finished: Workplace) -> None:
    found = actuals(finished.undisturbed, recipe="demo_tiny")
    plan = make_plan("demo_tiny", measured=finished.undisturbed)
    for name in ("shard", "train_vavae", "train_dit", "encode", "sample"):
        planned = stage(plan, name)
        assert planned.bound == "measured" and "measured" in planned.seconds.source
        assert planned.seconds.value == pytest.approx(found[name].seconds)
    twice = make_plan("demo_tiny", ["train_dit.images=1280"], measured=finished.undisturbed)
    ratio = stage(twice, "train_dit").seconds.value / stage(plan, "train_dit").seconds.value
    assert ratio == pytest.approx(2)


def test_plan_against_a_tracked_run(finished: Workplace, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run id of MLflow is as good as a root: its parameters are the recipe, its children the stages."""
    from mlflow import MlflowClient

    uri = f"sqlite:///{finished.home / 'mlflow.db'}"
    monkeypatch.setenv("MLFLOW_TRACKING_URI", uri)
    client = MlflowClient(uri)
    experiment = client.get_experiment_by_name("latentforge")
    assert experiment is not None
    runs = client.search_runs([experiment.experiment_id], "tags.flow = 'sfd-full'", order_by=["start_time ASC"])
    run = next(run for run in runs if run.data.tags.get("stage.shard", "").startswith("made"))
    tracked, under = actuals(run.info.run_id, finished.undisturbed), actuals(finished.undisturbed, recipe="demo_tiny")
    assert set(tracked) == set(under)
    assert tracked["encode"].rows == under["encode"].rows
    assert tracked["encode"].bytes == under["encode"].bytes
    assert tracked["encode"].recipe == load_recipe("demo_tiny")
    assert actuals(run.info.run_id)["encode"].bytes is None, "nobody said where the artifact lies"
    with pytest.raises(UserError, match="no run"):
        actuals("0" * 32)


# ---------------------------------------------------------------------------------------------------- before a run


def test_a_large_plan_imports_nothing_that_computes() -> None:
    """What makes it print at once; the figures are those of docs/scale.md for 100 million images."""
    script = (
        "import json, sys\n"
        "from flows.plan import make_plan, plain, render\n"
        f"plan = make_plan(**json.loads({json.dumps(json.dumps(BIG))}))\n"
        "assert render(plan)\n"
        "heavy = {'torch', 'ray', 'prefect', 'mlflow', 'timm'} & set(sys.modules)\n"
        "print(json.dumps({'heavy': sorted(heavy), 'plan': plain(plan, {})}))\n"
    )
    done = subprocess.run([sys.executable, "-c", script], cwd=REPOSITORY, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["heavy"] == []
    stages = {each["stage"]: each for each in found["plan"]["stages"]}
    assert stages["shard"]["rows"]["value"] == BIG["images"]
    assert stages["shard"]["written"]["value"] == pytest.approx(11e12, rel=0.01)
    assert stages["shard"]["writes"]["value"] == pytest.approx(100_000, rel=0.01)
    assert stages["encode"]["nodes"]["infer"] == 1000
    for each in stages.values():
        for figure in (value for value in each.values() if isinstance(value, dict) and "source" in value):
            assert figure["source"], "no figure without its source"


def test_more_machines_take_less_time_for_the_same_work() -> None:
    few = make_plan(**{**BIG, "nodes": ["infer=100", "decode=200"]})  # type: ignore[arg-type]
    many = make_plan(**BIG)  # type: ignore[arg-type]
    assert stage(few, "encode").work == stage(many, "encode").work
    assert stage(many, "encode").seconds.value < stage(few, "encode").seconds.value / 5
    assert [note for note in few.notes if note.startswith("encode: room for 100 of the recipe's 1000 actors")]
    assert not [note for note in many.notes if note.startswith("encode")]


def test_dollars_are_nodes_by_hours_and_requests() -> None:
    plan = make_plan("sfd_xl_80ep", cluster="aws")
    cluster, trained = plan.cluster, stage(plan, "train_dit")
    assert trained.nodes == {"train": 1}
    hourly = cluster.pools["train"].dollars_per_hour + cluster.pools["head"].dollars_per_hour
    prices = cluster.storage
    requests = trained.work.reads.value * prices.dollars_per_million_reads
    requests += trained.work.writes.value * prices.dollars_per_million_writes
    assert trained.dollars.value == pytest.approx(trained.seconds.value / 3600 * hourly + requests / 1e6)
    assert trained.gpu_hours.value == pytest.approx(8 * trained.seconds.value / 3600)
    assert plan.dollars == pytest.approx(sum(each.dollars.value for each in plan.stages))


def test_training_needs_room_for_all_its_workers() -> None:
    fits = make_plan("lightningdit_xl_64ep", cluster="aws")
    assert not fits.problems
    tight = make_plan("lightningdit_xl_64ep", cluster="aws", nodes=["train=3"])
    assert [why for why in tight.problems if "32 workers start together or not at all" in why and "room for 24" in why]
    nowhere = make_plan("sfd_xl_80ep", cluster="local")
    assert [why for why in nowhere.problems if why.startswith("train_dit: asks for 1 GPUs")]


def test_a_large_listing_needs_a_large_head() -> None:
    plan = make_plan("sfd_xl_80ep", cluster="aws", images=100_000_000)
    assert [why for why in plan.problems if why.startswith("shard: the flow's own process holds about 30 GB")]
    assert not make_plan("sfd_xl_80ep", cluster="aws").problems


def test_checkpoints_lie_beside_the_artifact() -> None:
    def beside(*changes: str) -> float:
        return stage(make_plan("demo", ["train_dit.images=76800", *changes]), "train_dit").work.beside

    one = beside("compute.train.checkpoint_every=40000")
    assert one > 0
    assert beside("compute.train.checkpoint_every=80000") == 0, "none is due before the end"
    many = "compute.train.checkpoint_every=1000"
    assert beside(many) == pytest.approx(4 * one), "three are kept while a fourth is written"
    assert beside(many, "compute.train.keep_checkpoints=1") == pytest.approx(2 * one)


def test_a_cache_that_holds_all_reads_each_part_once_a_node() -> None:
    def read(gib: float) -> tuple[float, float]:
        trained = stage(make_plan("sfd_xl_80ep", [f"compute.train.cache_gib={gib}"]), "train_dit").work
        return trained.read, trained.reads.value

    assert read(10.0) == read(0.0), "a part of the latents saves nothing that a plan could count on"
    bytes_read, requests = read(2_000.0)
    latents = stage(make_plan("sfd_xl_80ep"), "encode").work
    assert bytes_read < 8 * latents.written.value < read(0.0)[0]
    assert requests == 8 * -(-1_281_167 // 2_000) < read(0.0)[1]


@pytest.mark.parametrize("test_share", [0.1, 0.26])
def test_a_local_folder_is_counted(tmp_path: Path, test_share: float) -> None:
    """As `shard` would split it, with the files' own sizes."""
    from tasks.shard import plan as split_plan
    from tasks.sources import open_source

    for number in range(23):
        folder = tmp_path / "images" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8 + number, 3), number, np.uint8)).save(folder / f"{number}.png")
    recipe = _own_images(tmp_path / "images", f"shard.test_share={test_share}")
    images, (splits, _) = images_of(recipe), split_plan(open_source(recipe.data).listing(), recipe.shard)
    assert {"train": images.train, "test": images.test} == {name: table.num_rows for name, table in splits.items()}
    total = sum(path.stat().st_size for path in tmp_path.rglob("*.png"))
    assert images.mean_bytes * images.all == pytest.approx(total)
    planned = works(recipe, images, evaluations=1)[0]
    assert planned.written.value > total


def test_unknown_images_are_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="--images"):
        images_of(_own_images("s3://bucket/pictures"))
    with pytest.raises(UserError, match=r"does not exist.*--images and --image-bytes"):
        images_of(_own_images(tmp_path / "missing"))
    given = images_of(_own_images("s3://bucket/pictures"), count=1_000, mean_bytes=5_000.0)
    assert (given.all, given.mean_bytes) == (1_000, 5_000.0)


def _own_images(path: Path | str, *changes: str) -> Recipe:
    source = json.dumps({"kind": "folder", "path": str(path)})
    return load_recipe("demo", [f"data.source={source}", *changes])


# --------------------------------------------------------------------------------------------------- the command


def test_the_command_prints_every_stage_with_sources(finished: Workplace) -> None:
    arguments = [
        "sfd-full",
        "--recipe",
        "demo_tiny",
        "--against",
        finished.undisturbed,
        "--measured",
        finished.undisturbed,
    ]
    done = finished.flows("plan", *arguments)
    for name in (each.work.stage for each in make_plan("demo_tiny").stages):
        assert name in done.stdout
    assert "plan against actual" in done.stdout and "its own rate" in done.stdout
    assert "models/flops" in done.stdout or "tasks/plan/networks.py" in done.stdout


def test_the_command_refuses_by_name() -> None:
    import typer

    from flows.plan import command

    app = typer.Typer()
    app.command()(command)
    for arguments, message in [
        (["sfd-half"], "no flow 'sfd-half'"),
        (["sfd-full", "--cluster", "gpc"], "did you mean gcp"),
        (["sfd-full", "--nodes", "trian=2"], "expected POOL=NODES"),
        (["sfd-full", "--against", os.devnull + "/nowhere"], "no finished stage"),
    ]:
        result = CliRunner().invoke(app, arguments)
        assert isinstance(result.exception, UserError) and message in str(result.exception)
    assert load_cluster("local").pools["head"].cpus == os.cpu_count()
