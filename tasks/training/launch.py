"""The driver's side of a training: workers by Ray Train, the result from storage."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict
from importlib import import_module
from typing import Any

import torch
from safetensors.torch import save as to_safetensors
from torch import Tensor, nn

from configs.schema import Training
from infra.cluster import connect, user_errors
from infra.storage import FileEntry, Storage
from tasks.networks import EMA_WEIGHTS, WEIGHTS, default_device
from tasks.stage import Context, Job, Outcome
from tasks.training import checkpoints
from tasks.training.loop import Curves, Trainee, fit
from tasks.training.metrics import Metrics

RESULT = "result.json"
_RAY = "ray"


def train(context: Context, section: Training) -> Outcome:
    """Train until the recipe's images are seen, surviving failures of workers; or take given weights as they are.

    Raises:
        UserError: a mistake that a worker found, or more failures than `compute.train.max_failures`.
    """
    if not context.out.exists(RESULT):  # else a run ended between its last file and its manifest
        if section.images == 0:
            export(context, {}, None, {})
        else:
            _fit(context)
    result = json.loads(context.out.read_bytes(RESULT))
    context.out.delete(checkpoints.FOLDER)
    files = [FileEntry(**values) for values in result["files"]]
    return Outcome(files, rows=section.images, facts=result["facts"], scores=result["scores"])


def build(context: Context) -> Trainee:
    """The trainee of the job's stage, with the initial weights that its seed says."""
    stage = import_module(f"tasks.{context.job.stage}")
    torch.manual_seed(stage.section(context.recipe).seed)
    trainee: Trainee = stage.trainee(context)
    return trainee


def work(config: dict[str, Any]) -> None:
    """One Ray Train worker."""
    context = Context(Job(**config["job"]))
    compute = context.recipe.compute.train
    device = default_device()
    if device.type == "cpu":
        torch.set_num_threads(compute.cpus_per_worker)
    metrics = None
    if torch.distributed.get_rank() == 0:
        images = import_module(f"tasks.{context.job.stage}").section(context.recipe).images
        metrics = Metrics(context.job.stage, images, compute.log_every, context.tracker, device)

    def finished(weights: dict[str, Tensor], averages: dict[str, Tensor] | None, curves: Curves) -> None:
        export(context, weights, averages, curves)

    fit(lambda: build(context), context.out, compute, device, metrics, finished)


def export(context: Context, weights: dict[str, Tensor], averages: dict[str, Tensor] | None, curves: Curves) -> None:
    """Write networks, scores and facts to storage; `result.json` last."""
    trainee, device = build(context), default_device()  # a fresh one: the engine may hold the other in parts
    _load_trained(trainee.module, weights)
    files = [_write(context.out, WEIGHTS, trainee.network)]
    if averages is not None:
        _load(trainee.module, averages)
        files.append(_write(context.out, EMA_WEIGHTS, trainee.network))
    trainee.network.to(device).eval()
    with torch.no_grad():
        scores = trainee.scores(trainee.network, device)
    scores |= {f"final/{name}": points[-1][1] for name, points in curves.items() if points}
    facts = {**trainee.facts, "curves": curves}
    result = {"files": [asdict(entry) for entry in files], "scores": scores, "facts": facts}
    context.out.write_bytes(RESULT, json.dumps(result).encode())


def _load(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """All that was trained; what is frozen is the same in every trainee. Raises KeyError where something is missing."""
    for name in (name for name, parameter in module.named_parameters() if parameter.requires_grad):
        if name not in weights:
            raise KeyError(f"training gave no weight {name}")
    module.load_state_dict(weights, strict=False)


def _load_trained(module: nn.Module, weights: dict[str, Tensor]) -> None:
    """Load what training changed. Frozen parameters (position tables) are as every fresh network has them; without
    any weights, nothing was trained and the network stays as it was built.
    """
    if not weights:
        return
    missing, unexpected = module.load_state_dict(weights, strict=False)
    trained = {name for name, parameter in module.named_parameters() if parameter.requires_grad}
    lost = trained.intersection(missing)
    if lost or unexpected:
        raise RuntimeError(f"the engine gave back other tensors than it was given: lost {lost}, new {unexpected}")


def _write(out: Storage, name: str, network: nn.Module) -> FileEntry:
    tensors = {key: value.detach().cpu().contiguous() for key, value in network.state_dict().items()}
    return out.write_bytes(name, to_safetensors(tensors))


def _fit(context: Context) -> None:
    import pyarrow.fs
    import ray.train
    from ray.train.torch import TorchConfig, TorchTrainer

    connect()
    compute = context.recipe.compute.train
    gpu = compute.gpus_per_worker > 0
    resources: dict[str, Any] = {"CPU": compute.cpus_per_worker}
    if gpu:
        resources["GPU"] = compute.gpus_per_worker
    own = context.out.child(_RAY)
    trainer = TorchTrainer(
        work,
        train_loop_config={"job": asdict(context.job)},
        torch_config=TorchConfig(backend="nccl" if gpu else "gloo"),
        scaling_config=ray.train.ScalingConfig(
            num_workers=compute.workers, use_gpu=gpu, resources_per_worker=resources
        ),
        run_config=ray.train.RunConfig(
            name=uuid.uuid4().hex[:8],
            storage_path=own.path,
            storage_filesystem=pyarrow.fs.PyFileSystem(pyarrow.fs.FSSpecHandler(own.fs)),
            failure_config=ray.train.FailureConfig(max_failures=compute.max_failures),
        ),
    )
    try:
        with user_errors():
            trainer.fit()
    finally:
        context.out.delete(_RAY)
