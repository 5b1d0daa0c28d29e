"""The tokenizers' trainees in the real loop, in this process: stages, the discriminator's start, resume, hand-over."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load, load_file, save_file
from torch import Tensor
from torch._dynamo.utils import counters
from torch.nn.modules.module import register_module_forward_hook

from configs import Recipe, UserError
from models.autoencoder import Decoder
from models.checkpoints import Checkpoint, write_authors
from tasks import train_semvae, train_vavae
from tasks.data.crops import Crop
from tasks.data.images import images
from tasks.data.pixels import to_tensor
from tasks.loading.loader import Batch
from tasks.stage import Context
from tasks.training.launch import OBJECTIVE, RESULT, build, export
from tasks.training.loop import Setting, fit
from tasks.training.metrics import Metrics
from tasks.training.trainee import HELD_OUT_NUMBERS
from tests.helpers.builders import at, context, put_shard, small_recipe

BATCH = 8
STAGES = (
    "train_vavae.images=96",
    f"train_vavae.batch={BATCH}",
    "train_vavae.learning_rate=0.001",
    "train_vavae.schedule=constant",
    "train_vavae.crop=random",
    "train_vavae.objective={gan_weight: 0.5, discriminator: {width: 4, layers: 2}}",
    "train_vavae.stages=[{images: 32, gan_start: 16, align_weight: 0.5, cos_margin: 0.0, distance_margin: 0.0}, "
    "{images: 32, gan_start: 0, align_weight: 0.0}, "
    "{images: 32, gan_weight: 0.0, align_weight: 0.1, cos_margin: 0.4}]",
    "foundation={weights: random}",
    "compute.train={workers: 1, engine: plain, checkpoint_every: 8, keep_checkpoints: 100, log_every: 8}",
)


class Interrupted(Exception):
    """Stands for whatever ends a worker."""


@pytest.fixture(scope="module")
def alone() -> Iterator[None]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory, alone: None) -> str:
    found = at(tmp_path_factory.mktemp("root"))
    put_shard(found, small_recipe(*STAGES))
    return found


def job(root: str, recipe: Recipe, stage: Any = train_vavae, name: str = "") -> Context:
    made = context(root, recipe, stage.STAGE, "shard")
    from dataclasses import replace

    return Context(replace(made.job, fingerprint=name or made.job.fingerprint))


def train(made: Context, stop_at: int | None = None, seen: list[dict[str, Any]] | None = None) -> None:
    """`fit` as a worker does; `seen` collects what every step was given and what came of it."""

    def trainee() -> Any:
        built: Any = build(made)
        inputs = built.inputs

        def watched(batch: Batch, device: torch.device) -> dict[str, Any]:
            if stop_at is not None and batch.images_seen > stop_at:
                raise Interrupted
            given: dict[str, Any] = inputs(batch, device)
            if seen is not None:
                seen.append({"images_seen": batch.images_seen, **given})
            return given

        built.inputs = watched
        return built

    section = build(made).section
    metrics = Metrics(made.job.stage, section.images, 8, made.tracker, torch.device("cpu"))
    fit(trainee, Setting(made.out, made.recipe.compute.train, torch.device("cpu"), metrics, partial(export, made)))


def checkpoint(made: Context, images: int, part: str) -> dict[str, Tensor]:
    return load_file(Path(made.out.path) / "checkpoints" / f"{images:014d}" / f"{part}.safetensors")


def equal(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(value, b[name]) for name, value in a.items())


@pytest.fixture(scope="module")
def whole(root: str) -> tuple[Context, list[dict[str, Any]]]:
    made, seen = job(root, small_recipe(*STAGES), name="whole"), list[dict[str, Any]]()
    train(made, seen=seen)
    return made, seen


def test_squares_are_cut_anywhere_in_training_and_from_the_centre_in_validation(root: str) -> None:
    built: Any = build(job(root, small_recipe(*STAGES)))
    assert built.loader.crop == Crop(32, "opencv", random=True) and built.held_out().crop == Crop(32, "opencv")
    plain: Any = build(job(root, small_recipe(*STAGES, "train_vavae.crop=center")))
    assert plain.loader.crop == Crop(32)


def test_what_looks_on_takes_no_random_numbers_of_what_is_trained(root: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights begin as they always did, however many numbers a foundation model is built with."""

    def begun() -> dict[str, Tensor]:
        torch.manual_seed(0)
        built: Any = build(job(root, small_recipe(*STAGES)))
        assert built.foundation is not None
        critic = {f"critic.{name}": value for name, value in built.critic.network.state_dict().items()}
        return {**built.module.state_dict(), **critic}

    load, before = train_vavae.load_foundation, begun()
    monkeypatch.setattr(train_vavae, "load_foundation", lambda section: (torch.rand(7), load(section))[1])
    assert equal(begun(), before)


@pytest.mark.parametrize("there", [True, False])
@pytest.mark.parametrize("stage", [train_vavae, train_semvae])
def test_batches_lie_where_an_accelerator_copies_them_from(
    stage: Any, there: bool, root: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: there)
    built: Any = build(job(root, small_recipe(*STAGES), stage))
    assert built.loader.pin is there and built.held_out().pin is there


def test_every_stage_has_its_weights_and_its_start(whole: tuple[Context, list[dict[str, Any]]]) -> None:
    _, seen = whole
    assert [each["images_seen"] for each in seen] == list(range(BATCH, 97, BATCH))
    # Stage 1 of 32 images: the discriminator after 16 of them; stage 2: at once; stage 3: none.
    assert ["discriminator" in each for each in seen] == [False] * 2 + [True] * 2 + [True] * 4 + [False] * 4
    assert ["features_BDhw" in each for each in seen] == [True] * 4 + [False] * 4 + [True] * 4
    weights = [each["weights"] for each in seen]
    assert [(w.align, w.cosine_margin, w.adversarial) for w in weights[::4]] == [
        (0.5, 0, 0.5),
        (0, 0.5, 0.5),
        (0.1, 0.4, 0),
    ]
    assert len(set(weights)) == 3


def test_the_discriminator_learns_only_while_it_is_used(whole: tuple[Context, list[dict[str, Any]]]) -> None:
    made, _ = whole
    found = {images: checkpoint(made, images, "rival-weights") for images in (8, 16, 24, 64, 72, 88)}
    assert equal(found[8], found[16]) and not equal(found[16], found[24])
    assert not equal(found[24], found[64]) and equal(found[64], found[72]) and equal(found[72], found[88])


@pytest.mark.parametrize("stop", [8, 24, 40, 64, 88])
def test_interrupted_in_any_stage_and_resumed_is_the_same_in_every_bit(
    root: str, whole: tuple[Context, list[dict[str, Any]]], stop: int
) -> None:
    made = job(root, small_recipe(*STAGES), name=f"stop{stop}")
    with pytest.raises(Interrupted):
        train(made, stop_at=stop)
    train(made)
    for name in ("model.safetensors", OBJECTIVE):
        assert equal(load(made.out.read_bytes(name)), load(whole[0].out.read_bytes(name))), name  # headers name the run
    for part in ("weights", "exp_avg", "exp_avg_sq", "rival-weights", "rival-exp_avg", "rival-exp_avg_sq"):
        assert equal(checkpoint(made, 88, part), checkpoint(whole[0], 88, part)), part


def test_another_run_goes_on_from_all_that_was_trained(
    root: str, whole: tuple[Context, list[dict[str, Any]]], tmp_path: Path
) -> None:
    folder = Path(whole[0].out.path)
    taken = (
        f"train_vavae.pretrained={folder / 'model.safetensors'}",
        f"train_vavae.pretrained_objective={folder / OBJECTIVE}",
    )
    built: Any = build(job(root, small_recipe(*STAGES, *taken)))
    own = load_file(folder / OBJECTIVE)
    assert {"linear_proj.weight", "discriminator.main.0.weight"} <= own.keys()
    assert equal({name: value.detach() for name, value in built.objective_tensors().items()}, own)
    assert equal(dict(built.network.state_dict()), load_file(folder / "model.safetensors"))
    # A key that matches nothing, or one that is missing, is an error and never a fresh start.
    save_file(own | {"discriminator.main.99.weight": torch.zeros(1)}, tmp_path / "more.safetensors")
    save_file({"linear_proj.weight": own["linear_proj.weight"]}, tmp_path / "less.safetensors")
    for name, said in (("more", "main.99.weight belongs to nothing"), ("less", "main.0.bias is missing")):
        other = f"train_vavae.pretrained_objective={tmp_path / name}.safetensors"
        with pytest.raises(UserError, match=said):
            build(job(root, small_recipe(*STAGES, *taken, other)))
    renamed = {f"encode{name}": value for name, value in load_file(folder / "model.safetensors").items()}
    save_file(renamed, tmp_path / "renamed.safetensors")
    with pytest.raises(UserError, match="renamed"):
        build(job(root, small_recipe(*STAGES, f"train_vavae.pretrained={tmp_path / 'renamed.safetensors'}")))


def test_imported_weights_are_fine_tuned_at_another_size(root: str, tmp_path: Path) -> None:
    torch.manual_seed(5)
    recipe = small_recipe(*STAGES)
    from tasks.networks import build_autoencoder

    theirs = build_autoencoder(recipe.train_vavae.model)
    write_authors(tmp_path / "theirs.ckpt", Checkpoint("autoencoder", dict(theirs.state_dict())))
    larger = (
        "image.size=48",
        "foundation.input_size=96",  # a 6 × 6 grid, as the latents'
        "train_vavae.stages=[]",
        "train_vavae.images=16",
        f"train_vavae.pretrained={tmp_path / 'theirs.ckpt'}",
        "evaluate.classifier=null",
    )
    made, seen = job(root, small_recipe(*STAGES, *larger), name="larger"), list[dict[str, Any]]()
    train(made, seen=seen)
    assert seen[0]["images_B3HW"].shape == (BATCH, 3, 48, 48) and seen[0]["noise_BCHW"].shape == (BATCH, 8, 6, 6)
    tuned = load_file(Path(made.out.path) / "model.safetensors")
    gaps = [(tuned[name] - value).abs().max().item() for name, value in theirs.state_dict().items()]
    assert 0 < max(gaps) < 0.01, "two small steps away from what was imported"


@pytest.mark.parametrize("how", ["channels_last", pytest.param("compile", marks=pytest.mark.slow)])  # it traces
def test_the_loop_compiles_and_lays_out_as_it_is_asked_to(root: str, how: str, monkeypatch: pytest.MonkeyPatch) -> None:
    torch._dynamo.reset()
    counters.clear()
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    found: dict[str, list[float]] = {}
    for name, asked in {"plain": "false", how: "true"}.items():
        few = ("train_vavae.images=16", "train_vavae.stages=[]", f"compute.train.{how}={asked}")
        made, laid = job(root, small_recipe(*STAGES, *few), name=f"{how} {name}"), list[bool]()
        hook = register_module_forward_hook(
            lambda part, _, out, laid=laid: (
                laid.append(out.is_contiguous(memory_format=torch.channels_last)) if isinstance(part, Decoder) else None
            )
        )
        train(made)
        hook.remove()
        curve = json.loads(made.out.read_bytes(RESULT))["facts"]["curves"]["total"]
        found[name] = [value for _, value in curve]
        if how == "channels_last":
            assert laid[0] == (name == how)
    assert (counters["stats"]["unique_graphs"] > 0) == (how == "compile")
    assert len(found[how]) == 2 and found[how] == pytest.approx(found["plain"], rel=1e-3)


def test_perceptual_loss_is_trained_with_and_refused_without_weights(root: str) -> None:
    few = ("train_vavae.images=8", "train_vavae.stages=[]", "train_vavae.objective.align_weight=0.0")
    random = (*few, "train_vavae.objective.perceptual_weight=1.0", "train_vavae.objective.lpips_weights=random")
    made = job(root, small_recipe(*STAGES, *random), name="perceptual")
    train(made)
    module: Any = build(made).module
    images = torch.rand(2, 3, 32, 32) * 2 - 1
    terms = module(images, torch.zeros(2, 8, 4, 4))
    again = module.model.decode(module.model.encode(images).mean)
    by_hand = module.perceptual(images, again).mean() * 3 * 32 * 32
    torch.testing.assert_close(terms["perceptual"], by_hand.detach(), rtol=1e-4, atol=1e-3)
    nowhere = "train_vavae.objective.lpips_weights=/nowhere/vgg16.pth"
    with pytest.raises(UserError, match=r"/nowhere/vgg16\.pth.*perceptual_weight .* to 0"):
        build(job(root, small_recipe(*STAGES, *random, nowhere)))


def test_the_foundation_model_stands_in_for_lpips_and_looks_once_for_both_terms(root: str) -> None:
    objective = "train_vavae.objective={perceptual_weight: 0.5, perceptual_layers: [0, 2], align_weight: 0.1}"
    made = job(root, small_recipe(*STAGES, "train_vavae.images=8", "train_vavae.stages=[]", objective), name="layers")
    train(made)
    trainee: Any = build(made)
    batch = next(iter(trainee.loader.stream()))
    given = trainee.inputs(batch, torch.device("cpu"))
    torch.testing.assert_close(given["features_BDhw"], trainee.foundation(given["images_B3HW"]))
    once, twice = trainee.module(**given), trainee.module(**{n: v for n, v in given.items() if n != "seen"})
    assert len(given["seen"]) == 2 and once["perceptual"] > 0
    torch.testing.assert_close(once["perceptual"], twice["perceptual"])
    by_hand = trainee.perceptual(given["images_B3HW"], once["image"]).mean() * 3 * 32 * 32
    torch.testing.assert_close(once["perceptual"], by_hand, rtol=1e-4, atol=1e-3)


def test_the_decoder_is_shown_latents_with_noise_that_belongs_to_images(root: str) -> None:
    few = ("train_vavae.images=16", "train_vavae.batch=8", "train_vavae.stages=[]")
    made = job(root, small_recipe(*STAGES, *few, "train_vavae.objective.latent_noise=0.6"), name="noisy")
    trainee: Any = build(made)
    batch = next(iter(trainee.loader.stream()))
    whole = trainee.inputs(batch, torch.device("cpu"))["disturbance_BCHW"]
    turned = replace(batch, positions=batch.positions[::-1].copy())
    assert torch.equal(trainee.inputs(turned, torch.device("cpu"))["disturbance_BCHW"], whole.flip(0))
    shares = whole.flatten(1).std(dim=1)
    assert shares.max() < 0.75 and shares.max() > 2 * shares.min(), "from none to the whole share"
    held_out = replace(batch, positions=batch.positions + HELD_OUT_NUMBERS)
    assert "disturbance_BCHW" not in trainee.inputs(held_out, torch.device("cpu"))
    train(made)
    assert made.out.exists(RESULT)


def test_features_are_of_the_authors_squares_where_it_is_asked_for(root: str) -> None:
    """The shorter side to 72 pixels, 64 of the centre into the network as they are, and no flips."""
    assert small_recipe().foundation.input_size == 64  # type: ignore[union-attr]
    asked = ("train_semvae.resize=72", "image.flips=true")
    built: Any = build(job(root, small_recipe(*STAGES, *asked), train_semvae))
    assert built.loader.crop == Crop(64, "bicubic", shorter=72) and not built.loader.flips
    seen, own = list[Tensor](), built.foundation
    own.register_forward_pre_hook(lambda _, given: seen.append(given[0]))
    assert built.scores(built.network, torch.device("cpu"))["feature_mse"] > 0
    first = next(images(built.shards, "test", built.loader.crop, 4))[1]
    assert torch.equal(seen[0][:4], to_tensor(first))
    assert torch.equal(own.preprocess(seen[0]), ((seen[0] + 1) / 2 - own.mean) / own.std), "not scaled again"
    plain: Any = build(job(root, small_recipe(*STAGES, "image.flips=true"), train_semvae))
    assert plain.loader.crop == Crop(32) and plain.loader.flips
    with pytest.raises(UserError, match=r"train_semvae.resize is 48, .*foundation.input_size 64"):
        small_recipe(*STAGES, "train_semvae.resize=48")
    with pytest.raises(UserError, match=r"resize is 72 but features are read from"):
        small_recipe(*STAGES, "train_semvae.resize=72", "train_semvae.features=/root/encode/1")


def test_stored_features_train_as_streamed_ones(root: str) -> None:
    """Of the same images in the same order: the loader's order belongs to rows, whatever column is read."""
    from infra.artifacts import Artifact
    from tasks.data.tensors import WRITE_OPTIONS, latent_table
    from tests.helpers.builders import put

    steps = ("train_semvae.images=64", "train_semvae.batch=8", "train_semvae.schedule=constant")
    recipe = small_recipe(*STAGES, *steps)
    streamed = job(root, recipe, train_semvae, "streamed")
    train(streamed)
    shards, files = Artifact(root, "shard", "shard"), []
    foundation = build(streamed).foundation  # type: ignore[attr-defined]
    storage = Artifact(root, "encode", "stored").storage
    for number, (labels, pixels) in enumerate(images(shards, "train", 32, 200)):
        f = foundation(to_tensor(np.array(pixels)).contiguous()).half().numpy()
        table = latent_table([f"{number}/{row}" for row in range(len(labels))], labels, {"f": f})
        files.append(storage.write_table(f"train/part-{number:05d}.parquet", table, 32, **WRITE_OPTIONS))
    put(root, recipe, "encode", files, name="stored", facts={"shapes": {"f": [112, 4, 4]}, "rows_per_group": 32})
    from_store = f"train_semvae.features={root}/encode/stored"
    stored, seen = job(root, small_recipe(*STAGES, *steps, from_store), train_semvae, "stored"), list[dict[str, Any]]()
    train(stored, seen=seen)
    assert seen[0]["features_BDhw"].dtype == torch.float32 and seen[0]["features_BDhw"].shape == (8, 112, 4, 4)
    one, other = (load_file(Path(each.out.path) / "model.safetensors") for each in (streamed, stored))
    assert one.keys() == other.keys() and all(value.isfinite().all() for value in other.values())
    with pytest.raises(UserError, match="stored features"):
        build(job(root, small_recipe(*STAGES, *steps, f"train_semvae.features={root}/shard/shard"), train_semvae))
