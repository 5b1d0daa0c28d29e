"""The driver's side of a training: workers by Ray Train, the result from storage."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable, Mapping
from dataclasses import asdict
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from configs import Recipe
from configs.compute import TrainCompute
from configs.errors import Unreachable, UserError
from configs.training import Training
from infra import logs, stopping
from infra.artifacts import FINAL
from infra.cluster import connect, require_gpus
from infra.device import default_device, group_of_one, set_determinism, set_precision
from infra.storage import FileEntry, Storage
from tasks.data.receipts import RECEIPTS, finished
from tasks.plan.memory import memory_of
from tasks.snapshots import FOLDER as SNAPSHOTS
from tasks.snapshots import KEPT
from tasks.stage import Context, Job, Outcome
from tasks.training import checkpoints, requests
from tasks.training.checkpoints import Checkpoint
from tasks.training.ema import MAIN
from tasks.training.flops import flops_per_image
from tasks.training.loop import Setting, fit
from tasks.training.metrics import Curves, Metrics
from tasks.training.stage import trained_stage
from tasks.training.stamps import Stamp
from tasks.training.state import ADVERSARY, WEIGHTS
from tasks.training.trainee import Trainee

RESULT = "result.json"
OBJECTIVE = "objective.safetensors"
_BEST, _LAST = "best", "model"


def train(context: Context, section: Training, alone: bool = False, scored: bool = False) -> Outcome:
    """Train until the recipe's images are seen, surviving failures of workers; or take given weights as they are.

    scored: the network is scored on images when it is there. Of given weights an actor does it, as `compute.actors`
        says: on a head without an accelerator it would take hours.

    alone: in this process, as its only worker, instead of by Ray Train: for many small trainings, each an item of an
        actor (`tasks/comparing/trial.py`). The result is the same in every bit as with one worker of Ray Train's.

    Raises:
        UserError: a mistake that a worker found, more failures than `compute.train.max_failures`, or training left
            because it was asked to; the same command goes on.
    """
    if not context.out.exists(RESULT):  # else a run ended between its last file and its manifest
        context.out.delete(f"{requests.FOLDER}/{requests.LEAVE}")  # an earlier attempt did not live to see it
        if section.images == 0:
            _take(context, scored)
        elif alone:
            _fit_alone(context)
        else:
            _fit(context)
    result = json.loads(context.out.read_bytes(RESULT))
    for folder in (checkpoints.FOLDER, requests.FOLDER, RECEIPTS):
        context.out.delete(folder)
    files = [FileEntry(**values) for values in result["files"]]
    return Outcome(files, rows=result["images_seen"], facts=result["facts"], scores=result["scores"])


class Taker:
    """Takes given weights as they are, in an actor."""

    def __init__(self, job: Job) -> None:
        self._context = Context(job)

    def __call__(self, _item: Mapping[str, Any]) -> None:
        export(self._context, None, None, {})


def _take(context: Context, scored: bool) -> None:
    compute = context.recipe.compute.actors
    if not (scored and compute.gpus_per_actor):
        export(context, None, None, {})
        return
    from tasks.data.actors import spread

    for _ in spread([{}], Taker, (context.job,), compute):
        pass


def build(context: Context) -> Trainee:
    """The trainee of the job's stage, with the initial weights that its seed says."""
    stage = trained_stage(context.job.stage)
    torch.manual_seed(stage.section(context.recipe).seed)
    return stage.trainee(context)


def work(config: dict[str, Any]) -> None:
    """One Ray Train worker."""
    import ray.train

    from tasks.training.ray_parts import say_no_more

    context = Context(Job(**config["job"]))
    setting = _setting(context, warned=lambda: ray.train.get_preemption_info() is not None)
    try:
        fit(lambda: build(context), setting)
    except requests.Left:
        return  # the driver sees that there is no result, and says so
    except UserError as error:
        say_no_more()
        if isinstance(error, Unreachable):
            logs.say(f"{error}; starting anew", "warning")
        raise


def _fit_alone(context: Context) -> None:
    group_of_one(default_device())
    try:
        fit(lambda: build(context), _setting(context))
    except requests.Left as left:
        raise UserError(f"{context.job.stage}: {left}") from None
    finally:
        dist.destroy_process_group()


def _setting(context: Context, warned: Callable[[], bool] = lambda: False) -> Setting:
    """Where and how this process trains."""
    device = default_device()
    compute = _fitted(context.recipe, context.job.stage, device)
    set_precision(*_precisions(context))
    set_determinism(compute.deterministic)
    if device.type == "cpu":
        torch.set_num_threads(compute.cpus_per_worker)
    stage = trained_stage(context.job.stage)
    images, flops = stage.section(context.recipe).images, flops_per_image(context.recipe, context.job.stage)
    return Setting(
        context.out,
        compute,
        device,
        Metrics(context.job.stage, images, compute.log_every, context.tracker, device, flops),
        partial(export, context),
        stamp=lambda trainee: Stamp(context, trainee.facts).snapshot,
        warned=warned,
        preview=None if stage.preview is None else partial(stage.preview, context),
    )


def _fitted(recipe: Recipe, stage: str, device: torch.device) -> TrainCompute:
    """`compute.train` with the largest micro-batch that the accelerator holds, where the recipe leaves it open."""
    compute, memory = recipe.compute.train, memory_of(recipe, stage)
    if device.type != "cuda" or memory is None or not memory.open:
        return compute
    size = torch.cuda.get_device_properties(device).total_memory
    micro = memory.fitting(size) or memory.least
    if micro < memory.share:
        logs.say(
            f"{stage}: {micro} of a worker's {memory.share} images at once, about {memory.at(micro) / 1e9:.0f} GB of "
            f"the GPU's {size / 1e9:.0f} GB ({memory.source}); compute.train.micro_batch says otherwise"
        )
    return compute.model_copy(update={"micro_batch": micro})


def _precisions(context: Context) -> tuple[str, ...]:
    """Of all that runs in a training, frozen networks that make latents of images too."""
    recipe, stage = context.recipe, context.job.stage
    beside = (recipe.encode.precision,) if stage == "train_dit" and recipe.online_latents else ()
    return (*trained_stage(stage).section(recipe).precisions, *beside)


def export(context: Context, end: Checkpoint | None, best: Checkpoint | None, curves: Curves) -> None:
    """Write networks, scores and facts to storage; `result.json` last. Without an `end` nothing was trained."""
    set_precision(*_precisions(context))  # also where nothing was trained
    trainee, device = build(context), default_device()  # a fresh one: the engine may hold the other in parts
    stamp, files = Stamp(context, trainee.facts), []

    def write(name: str, found: Checkpoint, average: str | None) -> None:
        _load_trained(trainee.module, found.tensors[WEIGHTS])
        _load(trainee.module, found.tensors[average] if average else {})
        files.append(_write(context.out, f"{name}.safetensors", trainee.kept, stamp))

    if best is not None:
        write(_BEST, best, MAIN if MAIN in best.tensors else None)
    if end is not None:
        for part in end.tensors:
            if part != WEIGHTS and not part.startswith(ADVERSARY):
                write(part, end, part)
        write(_LAST, end, None)
        files += _objective(context.out, trainee, end, stamp)
    else:
        files.append(_write(context.out, f"{_LAST}.safetensors", trainee.kept, stamp))
    files += _snapshots(context.out)
    files += [context.out.write_bytes(name, content) for name, content in trainee.documents().items()]
    trainee.network.to(device).eval()
    with torch.no_grad():
        scores = trainee.scores(trainee.network, device)
    scores |= {f"{FINAL}{name}": points[-1][1] for name, points in curves.items() if points}
    facts: dict[str, Any] = {**trainee.facts, "curves": curves}
    images_seen = 0 if end is None else end.images_seen
    if best is not None:
        scores["best/score"], scores["best/images"] = best.values["best"]["score"], float(best.images_seen)
    result = {
        "files": [asdict(entry) for entry in sorted(files, key=lambda entry: entry.path)],
        "images_seen": images_seen,
        "scores": scores,
        "facts": facts,
    }
    context.out.write_bytes(RESULT, json.dumps(result).encode())


def _saved_at(context: Context) -> str:
    """How far the newest whole checkpoint is, for a person."""
    return f"{max(checkpoints.whole(context.out), default=0):,} images"


def _load(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """An average of trained weights, or nothing; the rest stays as it is."""
    lost = [name for name in weights if name not in module.state_dict()]
    if lost:
        raise RuntimeError(f"the engine gave back averages of no weight: {lost}")
    module.load_state_dict(weights, strict=False)


def _load_trained(module: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """What training changed. Frozen parameters (position tables) are as every fresh network has them."""
    missing, unexpected = module.load_state_dict(weights, strict=False)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    lost = trained.intersection(missing)
    if lost or unexpected:
        raise RuntimeError(f"the engine gave back other tensors than it was given: lost {lost}, new {unexpected}")


def _write(out: Storage, name: str, network: nn.Module, stamp: Stamp) -> FileEntry:
    tensors = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    return out.write_bytes(name, stamp.network(to_safetensors(tensors), name))


def _objective(out: Storage, trainee: Trainee, end: Checkpoint, stamp: Stamp) -> list[FileEntry]:
    """What another training can go on from beside the network: the trained parts of the objective."""
    if (adversary := trainee.adversary) is not None:
        adversary.module.load_state_dict(end.tensors[ADVERSARY + WEIGHTS])
    tensors = {name: value.detach().cpu().clone() for name, value in trainee.objective_tensors().items()}
    if not tensors:
        return []
    said = "the trained parts of an objective"
    return [out.write_bytes(OBJECTIVE, stamp.tensors(to_safetensors(tensors), said, OBJECTIVE))]


def _snapshots(out: Storage) -> list[FileEntry]:
    """Of averages, stored while training went on."""
    names = [*out.names(SNAPSHOTS), *out.names(KEPT)]
    return [receipt.entry for receipt in finished(out, [(name, name) for name in names])]


def _fit(context: Context) -> None:
    import ray.train
    from ray.train.torch import TorchTrainer

    from tasks.training.ray_parts import Mistakes, heedful_torch, meaning, nowhere

    connect()
    compute = context.recipe.compute.train
    require_gpus("compute.train.gpus_per_worker", compute.gpus_per_worker)
    gpu = compute.gpus_per_worker > 0
    resources: dict[str, Any] = {"CPU": compute.cpus_per_worker}
    if gpu:
        resources["GPU"] = compute.gpus_per_worker
    trainer = TorchTrainer(
        work,
        train_loop_config={"job": asdict(context.job)},
        torch_config=heedful_torch("nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=compute.workers, use_gpu=gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            storage_path="/ray",
            storage_filesystem=nowhere(),
            failure_config=ray.train.FailureConfig(max_failures=compute.max_failures),
            callbacks=[Mistakes()],  # type: ignore[list-item]  # the annotation is of Ray Tune's
        ),
    )
    trainer._register_sigint_handler = lambda controller: None  # type: ignore[attr-defined]  # Ctrl-C is the command's
    try:
        with stopping.saving_first(lambda: requests.ask(context.out, requests.LEAVE)) as told:
            trainer.fit()
    except KeyboardInterrupt:  # not only our own kind: Ray, in the midst of waiting, raises Python's instead
        if not stopping.asked():
            raise
        raise stopping.Stopped(stopping.asked(), _saved_at(context)) from None
    except ray.train.ControllerError as error:
        raise meaning(error.controller_failure) or error from None
    if not context.out.exists(RESULT):
        if told() and stopping.asked():
            raise stopping.Stopped(stopping.asked(), _saved_at(context))
        if told():
            raise SystemExit(128 + signal.SIGTERM)
        raise UserError(
            f"training was asked to leave ({context.out.url}/{requests.FOLDER}/{requests.LEAVE}) and saved what it "
            "had: the same command goes on (without --from and --force, which begin anew)"
        )
