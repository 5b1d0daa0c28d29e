"""The driver's side of a training: workers by Ray Train, the result from storage."""

from __future__ import annotations

import json
import uuid
from dataclasses import asdict
from typing import Any

from configs.schema import Training
from infra.cluster import connect, user_errors
from infra.storage import FileEntry
from tasks.stage import Context, Outcome
from tasks.training import checkpoints
from tasks.training.loop import RESULT, build, export, work


def train(context: Context, section: Training) -> Outcome:
    """Train until the recipe's images are seen, surviving failures of workers; or take given weights as they are.

    Raises:
        UserError: a mistake that a worker found, or more failures than `compute.train.max_failures`.
    """
    if section.images == 0:
        from tasks.networks import default_device

        export(context, build(context), None, {}, default_device())
    else:
        _fit(context)
    result = json.loads(context.out.read_bytes(RESULT))
    context.out.delete(checkpoints.FOLDER)
    context.out.delete(RESULT)
    files = [FileEntry(**values) for values in result["files"]]
    return Outcome(files, rows=section.images, facts=result["facts"], scores=result["scores"])


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
    own = context.out.child("ray")
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
        context.out.delete("ray")
