"""The plan before a run: what it counts, what it refuses, and that it needs nothing that computes."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

from configs import Recipe, UserError, load_recipe
from configs.cluster import load_cluster
from configs.reproduction import reproducible
from flows.plan import make_plan
from tasks.plan.data import images_of
from tasks.plan.schedule import Plan, StagePlan
from tasks.plan.stages import FLOWS, works
from tasks.plan.waits import HEAD_STARTS
from tests.flows.conftest import REPOSITORY

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


def test_every_flow_is_planned_with_the_stages_it_has() -> None:
    from flows.stages import STAGES
    from flows.tokenizer_eval import STAGES as TOKENIZERS

    for flow, stages in {"sfd-full": STAGES, "lowdiff-full": STAGES, "tokenizer-eval": TOKENIZERS}.items():
        assert FLOWS[flow] == tuple(each.name for each in stages)
    for recipe in ("vavae_tiny", "ldm_tiny", "vavae_f16d32"):
        loaded = load_recipe(recipe)
        planned = [each.work.stage for each in make_plan(recipe, flow="tokenizer-eval").stages]
        assert planned == [each.name for each in TOKENIZERS if each.present(loaded)]


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
    assumed = cluster.assumed
    waits = (assumed.start_seconds + assumed.idle_seconds) / 3600 * cluster.pools["train"].dollars_per_hour
    assert trained.dollars.value == pytest.approx(trained.seconds.value / 3600 * hourly + requests / 1e6 + waits)
    assert trained.gpu_hours.value == pytest.approx(8 * trained.seconds.value / 3600)
    assert plan.dollars == pytest.approx(sum(each.dollars.value for each in plan.stages))


def test_training_needs_room_for_all_its_workers() -> None:
    fits = make_plan("lightningdit_xl_64ep", cluster="aws")
    assert not fits.problems
    tight = make_plan("lightningdit_xl_64ep", cluster="aws", nodes=["train=3"])
    assert [why for why in tight.problems if "32 workers start together or not at all" in why and "room for 24" in why]
    wide = make_plan("sfd_xl_80ep", ["compute.train.gpus_per_worker=16"], cluster="aws")
    assert [why for why in wide.problems if "train_dit: a worker asks for 16 GPUs, and a node gives away 8:" in why]
    nowhere = make_plan("sfd_xl_80ep", cluster="local")
    assert [why for why in nowhere.problems if why.startswith("train_dit: asks for 1 GPUs")]


@pytest.mark.parametrize("cluster", ["aws", "gcp"])
@pytest.mark.parametrize("recipe", reproducible())
def test_no_driver_without_a_gpu_is_kept_busy(recipe: str, cluster: str) -> None:
    """Of published recipes, whether they train or take what was released."""
    for flow in ("reproduce", "tokenizer-eval" if "f16d32" in recipe else "sfd-full"):
        plan = make_plan(recipe, cluster=cluster, flow=flow)
        for each in plan.stages:
            alone = each.seconds.value - HEAD_STARTS
            assert each.nodes or alone < 60, f"{each.work.stage} takes {alone:.0f} s on a driver without a GPU"


@pytest.mark.parametrize("recipe", ["sfd_xl_80ep", "lightningdit_xl_64ep"])
def test_given_weights_are_scored_where_gpus_are(recipe: str) -> None:
    plan = make_plan(recipe, cluster="aws")
    given = [each for each in plan.stages if each.work.stage in ("train_vavae", "train_semvae")]
    for each in given:
        assert each.nodes == {"infer": 1} and each.gpu_hours.value > 0, each.work.stage
        assert each.seconds.value < 900, "of 10,000 images; hours on a head"


def test_targets_made_in_training_cost_cores_and_no_terabyte() -> None:
    online = make_plan("sfd_xl_80ep", cluster="aws")
    assert stage(online, "encode").work.written.value < 100e9
    trained = stage(online, "train_dit")
    assert trained.work.decodes == trained.work.rows.value
    (note,) = [note for note in online.notes if note.startswith("train_dit: decodes")]
    rate = trained.work.decodes / trained.seconds.value
    assert f"on {math.ceil(rate / 226)} of its workers' 64 cores (226 images/s a core: benchmarks/README.md)" in note
    stored = make_plan("sfd_xl_80ep", ["encode.align_features=true", "train_dit.objective.align=stored"], cluster="aws")
    assert stage(stored, "encode").work.written.value > 1e12
    assert not [note for note in stored.notes if "decodes" in note]
    more = trained.work.flops.value / stage(stored, "train_dit").work.flops.value
    assert 1.05 < more < 1.07, "DinoV2-B forward beside XL forward and backward"
    half = make_plan("sfd_xl_80ep", ["train_dit.objective.align_until=51_200_000"], cluster="aws")
    saved = trained.work.flops.value - stage(half, "train_dit").work.flops.value
    whole = trained.work.flops.value - stage(stored, "train_dit").work.flops.value
    assert saved == pytest.approx(whole / 2), "it rests from half of the images on"
    assert stage(half, "train_dit").work.decodes == 51_200_000 == trained.work.decodes / 2


def test_a_training_that_decodes_for_a_while_takes_that_and_the_rest_of_its_steps() -> None:
    """Of a small network decoding is the bound while it lasts, and compute afterwards."""
    plans = {
        until: stage(
            make_plan("speedrun_b_imagenet256", [f"train_dit.objective.align_until={until}"], cluster="aws"),
            "train_dit",
        )
        for until in (51_200_000, 20_480_000)
    }
    whole, partly = plans.values()
    assert (whole.bound, partly.bound) == ("decode", "decode")
    started = 180.0
    decoding = whole.seconds.value - started
    assert 0.4 * decoding < partly.seconds.value - started < 0.75 * decoding


@pytest.mark.parametrize(
    ("large", "small"),
    [("lightningdit_xl_512", "lightningdit_xl_800ep"), ("sfd_xl_512", "sfd_xl_800ep")],
)
def test_512_pixels_cost_what_four_times_the_tokens_do(large: str, small: str) -> None:
    """An image's FLOPs a little over four times (attention is quadratic), its bytes four times; and it fits, computed
    again in the backward pass."""
    plain = ["compute.train.recompute=false", "compute.train.micro_batch=8"]
    plans = [make_plan(name, plain, cluster="aws") for name in (large, small)]
    for name in ("encode", "train_dit"):
        more, less = (stage(plan, name).work.flops.value / stage(plan, name).work.rows.value for plan in plans)
        assert 4.0 < more / less < 4.6, name
    latents = [stage(plan, "encode").work.written.value for plan in plans]
    assert latents[0] == pytest.approx(4 * latents[1], rel=0.01)
    kept = [stage(plan, "train_dit").work.memory for plan in plans]
    assert kept[0] is not None and kept[1] is not None
    assert kept[0].image == pytest.approx(4 * kept[1].image)
    assert kept[0].fixed == pytest.approx(kept[1].fixed, rel=0.01), "only positions are more"
    own = make_plan(large, cluster="aws")
    assert own.problems == [], "not on GPUs of 24 GB either"
    again = stage(own, "train_dit")
    assert again.work.memory is not None and again.work.memory.image < 0.2 * kept[0].image
    assert again.work.memory.fitting(80e9) == again.work.memory.share


def test_latents_made_in_training_cost_cores_and_an_encoder_and_no_terabyte(tmp_path: Path) -> None:
    sizes = {"encoder_hidden_size": 768, "encoder_patch_size": 14, "encoder_input_size": 224, "patch_size": 16}
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "AutoencoderRAE", **sizes}))
    online, stored = (
        make_plan(
            "ditdh_xl_rae",
            [f"train_vavae.model.location={tmp_path}", f"encode.latents={latents}"],
            cluster="aws",
            images=1_331_167,
            image_bytes=110_000.0,
        )
        for latents in ("online", "stored")
    )
    assert stage(online, "encode").work.written.value < 1e8 < 1e12 < stage(stored, "encode").work.written.value
    looked, encoded = (stage(plan, "encode").work.flops.value for plan in (online, stored))
    assert encoded == 2 * looked, "of both views"
    beside, alone = (stage(plan, "train_dit").work for plan in (online, stored))
    assert beside.decodes == beside.rows.value and not alone.decodes
    made = beside.rows.value / 1_331_167  # times that every image is looked at
    assert beside.flops.value - alone.flops.value == pytest.approx(made * looked, rel=1e-6)
    assert 1.04 < beside.flops.value / alone.flops.value < 1.06, "DINOv2-B forward beside DiT-DH forward and backward"
    assert beside.memory is not None and alone.memory is not None
    weights = beside.memory.fixed - alone.memory.fixed
    assert weights == pytest.approx(stage(online, "encode").work.memory.fixed), "the same networks"  # type: ignore[union-attr]
    assert beside.memory.image > alone.memory.image
    assert [note for note in online.notes if note.startswith("train_dit: decodes")]


def test_given_weights_are_scored_by_the_driver_of_a_recipe_without_gpus() -> None:
    given = ["train_vavae.images=0", "train_vavae.pretrained=somewhere"]
    scored = stage(make_plan("demo", given), "train_vavae")
    assert scored.nodes == {} and scored.gpu_hours.value == 0
    assert any(note.startswith("train_vavae takes given weights") for note in make_plan("demo", given).notes)


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
    plan = make_plan("sfd_xl_80ep")
    held = sum(stage(plan, name).work.written.value for name in ("shard", "encode"))  # targets are made in training
    assert bytes_read < 8 * held < read(0.0)[0]
    assert requests == 8 * -(-1_281_167 // 2_000) < read(0.0)[1]


@pytest.mark.parametrize("test_share", [0.1, 0.26])
def test_a_local_folder_is_counted(tmp_path: Path, test_share: float) -> None:
    """As `shard` would split it, with the files' own sizes."""
    from tasks.sources import open_source
    from tasks.sources.ordering import ordered

    for number in range(23):
        folder = tmp_path / "images" / f"class {number % 2}"
        folder.mkdir(parents=True, exist_ok=True)
        Image.fromarray(np.full((8, 8 + number, 3), number, np.uint8)).save(folder / f"{number}.png")
    recipe = _own_images(tmp_path / "images", f"shard.test_share={test_share}")
    images, order = images_of(recipe), ordered(open_source(recipe.data).listing(), recipe.shard)
    assert {"train": images.train, "test": images.test} == order.counts
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


def test_a_plan_says_what_is_published_and_what_is_not_as_published() -> None:
    told = make_plan("sfd_xl_80ep", ["sample.batch=128"]).notes
    assert "evaluate: published fid 1.3, sfid 3.87, inception_score 233.4" in "; ".join(told)
    assert "not as published: sample.batch is 128, published with 4" in told
    assert not any("not as published" in note for note in make_plan("lightningdit_xl_64ep").notes)
    assert "fid 5.14" in "; ".join(make_plan("lightningdit_xl_64ep", ["sample.guidance={method: none}"]).notes)
    tokenizer = make_plan("vavae_f16d32", flow="tokenizer-eval").notes
    assert any("reconstruction_fid 0.28" in note for note in tokenizer)


@pytest.mark.parametrize(
    ("recipe", "words"),
    [
        ("lowdiff_cifar10", "21.9 effective evaluations an image against 35 (EDM's 18 steps of Heun): 1.60 times"),
        ("lowdiff_ffhq64", "50.2 effective evaluations an image against 79 (EDM's 40 steps of Heun): 1.57 times"),
        ("lowdiff_b_imagenet256", "159.2 effective evaluations an image against 249"),
    ],
)
def test_a_plan_says_what_a_cascade_saves(recipe: str, words: str) -> None:
    assert any(words in note for note in make_plan(recipe, flow="lowdiff-full").notes)


def test_images_are_those_of_the_papers_set_until_there_are_others() -> None:
    assert stage(make_plan("lowdiff_ffhq64"), "shard").work.rows.value == 70_000
    assert stage(make_plan("lowdiff_cifar10"), "shard").work.rows.value == 60_000
    for overrides in (["data.classes=3"], ["data.classes=3", "data.source.path=s3://my/images"]):
        with pytest.raises(UserError, match="--images"):
            make_plan("lightningdit_xl_64ep", [*overrides, "sample.images=300"])


def test_a_plan_of_given_weights_and_statistics_needs_no_images() -> None:
    given = [
        "train_dit.images=0",
        "train_dit.pretrained=w.pt",
        "train_dit.statistics.texture=latents_stats.pt",
        "train_dit.statistics.semantic=latents_sv_stats.pt",
        "evaluate.reference=r.npz",
    ]
    found = make_plan("sfd_xl_80ep", given)
    assert [each.work.stage for each in found.stages] == ["train_vavae", "train_dit", "sample", "evaluate", "report"]
    assert stage(found, "train_vavae").work.flops.value == 0, "there is nothing to score it on"
