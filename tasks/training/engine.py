"""The engine of a training: gradients over accumulation steps and workers, and the optimizer's step.

DeepSpeed does it where it is installed, its configuration derived from the recipe and never written by hand; the
plain engine does the same with torch alone. Both give and take a whole state by parameter name, which knows nothing
of workers, accumulation or ZeRO stages: a checkpoint of one layout goes on in any other.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from importlib import import_module
from importlib.util import find_spec
from typing import Any, Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from configs.compute import TrainCompute
from configs.errors import UserError
from configs.load import merge
from configs.training import Training
from infra.device import HALVES
from tasks.training.buckets import Buckets
from tasks.training.muon import GuardedMuon, matrices
from tasks.training.optimizer import GuardedAdamW

MOMENTS = ("exp_avg", "exp_avg_sq")
ZERO_BUCKET = 50_000_000
"""Numbers in one of ZeRO's buckets. DeepSpeed's default of ten times as many holds three quarters of an XL network, so
that as much of the backward pass is over before the first gradient travels, in two buffers of 2 GB."""


@dataclass(frozen=True)
class Split:
    """How a global batch is cut: `workers` × `accumulation` × `micro` images."""

    workers: int
    accumulation: int
    micro: int

    @classmethod
    def of(cls, batch: int, workers: int, micro: int | None) -> Split:
        """Raises UserError where the batch does not divide."""
        share, rest = divmod(batch, workers)
        if rest:
            raise UserError(f"batch {batch} does not divide over compute.train.workers {workers}: change one of them")
        size = min(micro or share, share)
        if share % size:
            raise UserError(
                f"compute.train.micro_batch {size} does not divide a worker's {share} images (batch {batch} over "
                f"{workers} workers): choose a divisor"
            )
        return cls(workers, share // size, size)


class Engine(Protocol):
    """What the loop needs of an engine."""

    optimizer: GuardedAdamW

    def advance(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        """Forward and backward of one accumulation step, and the optimizer's step with the last; the loss terms."""
        ...

    def local(self) -> dict[str, Tensor]:
        """The trainable parameters as this worker holds them, by name: whole, or its shard (ZeRO 3)."""
        ...

    def changed(self) -> None:
        """The local parameters were written: let the network see it. All workers must call it."""
        ...

    def refresh(self) -> None:
        """The next step begins at the local parameters as they are; ZeRO steps flat copies of them."""
        ...

    def gather(self, name: str, shard: Tensor) -> Tensor:
        """The whole of a tensor held like parameter `name`, from all workers. All workers must call it."""
        ...

    def shard(self, name: str, whole: Tensor) -> Tensor:
        """This worker's shard of a tensor held like parameter `name`: the inverse of `gather`."""
        ...

    def moments(self) -> Iterator[tuple[str, str, Tensor]]:
        """(moment, parameter, whole tensor); all workers must iterate together."""
        ...

    def load_moments(self, values: Mapping[str, Mapping[str, Tensor]]) -> None: ...


def build_engine(module: nn.Module, section: Training, compute: TrainCompute, device: torch.device) -> Engine:
    """The engine that the recipe asks for, in the process group that is already there.

    Raises:
        UserError: a batch that does not divide, or settings of DeepSpeed without it.
    """
    split = Split.of(section.batch, dist.get_world_size(), compute.micro_batch)
    wanted = compute.engine
    if wanted == "auto":
        asked = compute.zero_stage or compute.deepspeed
        wanted = "deepspeed" if asked and find_spec("deepspeed") else "plain"
    if wanted == "plain" and compute.zero_stage:
        raise UserError(
            f"compute.train.zero_stage is {compute.zero_stage}, but only DeepSpeed shards (engine is plain or "
            "DeepSpeed is not installed): set zero_stage: 0, or install deepspeed"
        )
    optimizer = _optimizer(module, section, compute)
    if section.precision in HALVES:
        # Over float32 weights, as published: the master copy is the copy. In the module and not in DeepSpeed, whose
        # scaler of float16 losses asks the host at every step.
        half = torch.autocast(device.type, HALVES[section.precision])
        module.forward = half(module.forward)  # type: ignore[method-assign]
    if wanted == "plain":
        return PlainEngine(module, optimizer, split, HALVES.get(compute.communication))
    return DeepSpeedEngine(module, optimizer, split, deepspeed_config(section, compute, split))


def _optimizer(module: nn.Module, section: Training, compute: TrainCompute) -> GuardedAdamW:
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    options: dict[str, Any] = {
        "limit": section.guard.limit,
        "clip_norm": section.clip_norm or None,
        "sharded": compute.zero_stage > 0,
        "scaled": section.precision == "fp16",
        "lr": section.learning_rate,
        "betas": section.betas,
        "weight_decay": section.weight_decay,
    }
    if section.optimizer == "adamw":
        return GuardedAdamW(trained.values(), **options)
    if compute.zero_stage:
        raise UserError(
            f"optimizer is muon and compute.train.zero_stage {compute.zero_stage}, which cuts matrices into pieces "
            "that Muon cannot step: set zero_stage: 0, or optimizer: adamw"
        )
    taken = matrices(trained.items())
    if not taken:
        raise UserError("optimizer is muon, but the network has no `blocks` with matrices: set optimizer: adamw")
    return GuardedMuon(trained.values(), matrices=taken, **options)


def deepspeed_config(section: Training, compute: TrainCompute, split: Split) -> dict[str, Any]:
    """DeepSpeed's configuration: batch split, ZeRO stage, communication, and what `compute.train.deepspeed` adds.
    Clipping, precision and the scale of losses are the optimizer's and the module's; recipes that would set these here
    are refused (`configs/fits.py`).
    """
    zero: dict[str, Any] = {"stage": compute.zero_stage}
    if compute.zero_stage:
        zero |= {"overlap_comm": torch.cuda.is_available(), "reduce_bucket_size": ZERO_BUCKET}
        zero["contiguous_gradients"] = True  # into one buffer as they are made: what overlapping needs
    if compute.zero_stage in (1, 2):
        zero["compute_grad_norm"] = False  # the optimizer's, which does not ask the host
    if compute.zero_stage == 3:
        zero["sub_group_size"] = 10**12  # one optimizer step for all, so that the guard judges once
    config: dict[str, Any] = {
        "train_batch_size": section.batch,
        "train_micro_batch_size_per_gpu": split.micro,
        "gradient_accumulation_steps": split.accumulation,
        "gradient_clipping": 0.0,  # its default is 1
        "communication_data_type": compute.communication,
        "zero_optimization": zero,
        "zero_allow_untested_optimizer": True,
        "steps_per_print": sys.maxsize,
        # On by default, and synchronises the device at every forward pass and every step.
        "timers": {"throughput": {"enabled": False, "synchronized": False}},
    }
    return merge(config, compute.deepspeed)


class PlainEngine:
    """Data parallel with torch alone: gradients travel while the backward pass goes on (`buckets.py`)."""

    def __init__(
        self, module: nn.Module, optimizer: GuardedAdamW, split: Split, communication: torch.dtype | None
    ) -> None:
        self.optimizer = optimizer
        self._module, self._split = module, split
        self._names = {name: p for name, p in module.named_parameters() if p.requires_grad}
        self._losses: list[Tensor] = []
        self._buckets = Buckets(list(self._names.values()), communication) if split.workers > 1 else None
        optimizer.allocate()
        optimizer.armed = True

    def advance(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self._module(**inputs)
        last = len(self._losses) + 1 == self._split.accumulation
        if last and self._buckets is not None:
            self._buckets.begin()
        (terms["total"] * self.optimizer.scale / self._split.accumulation).backward()
        self._losses.append(terms["total"].detach().float())
        if last:
            loss = torch.stack(self._losses).mean()
            self._losses = []
            if self._buckets is not None:
                self._buckets.finish()
                loss = _mean_over_workers(loss)
            # A weight that a batch did not use (another resolution's) has a gradient of zero, whatever the layout.
            for parameter in self._names.values():
                if parameter.grad is None:
                    parameter.grad = torch.zeros_like(parameter)
            self.optimizer.expect(loss)
            self.optimizer.step()
            self.optimizer.settle()
            self.optimizer.zero_grad(set_to_none=True)
        return terms

    def local(self) -> dict[str, Tensor]:
        return dict(self._names)

    def changed(self) -> None:
        pass

    def refresh(self) -> None:
        pass

    def gather(self, name: str, shard: Tensor) -> Tensor:
        return shard

    def shard(self, name: str, whole: Tensor) -> Tensor:
        return whole

    def moments(self) -> Iterator[tuple[str, str, Tensor]]:
        yield from _own_moments(self._names, self.optimizer)

    def load_moments(self, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        _load_own_moments(self._names, self.optimizer, values)


class DeepSpeedEngine:
    """DeepSpeed at any ZeRO stage, around an optimizer of ours."""

    def __init__(self, module: nn.Module, optimizer: GuardedAdamW, split: Split, config: dict[str, Any]) -> None:
        deepspeed = _deepspeed()
        self._names: dict[str, Any] = {n: p for n, p in module.named_parameters() if p.requires_grad}
        self.stage = config["zero_optimization"]["stage"]
        self.optimizer, self._split = optimizer, split
        self._losses: list[Tensor] = []
        group = optimizer.param_groups[0]
        rate, group["lr"] = group["lr"], 0.0  # it may step once to make its states
        self._engine, *_ = deepspeed.initialize(
            model=module, optimizer=optimizer, config=config, dist_init_required=False
        )
        group["lr"] = rate
        self._allocate()
        optimizer.armed = True

    def _allocate(self) -> None:
        """Make the moments of what this worker steps: in ZeRO 3 flat pieces of all parameters, which the optimizer is
        handed for the moment of a step only."""
        group = self.optimizer.param_groups[0]
        held = group["params"]
        if self.stage == 3:
            group["params"] = list(self._engine.optimizer.fp32_partitioned_groups_flat)
        self.optimizer.allocate()
        group["params"] = held

    def advance(self, inputs: Mapping[str, Any]) -> dict[str, Tensor]:
        terms: dict[str, Tensor] = self._engine(**inputs)
        self._engine.backward(terms["total"] * self.optimizer.scale)
        self._losses.append(terms["total"].detach().float())
        last = len(self._losses) == self._split.accumulation
        if last:
            self.optimizer.expect(_mean_over_workers(torch.stack(self._losses).mean()))
            self._losses = []
        self._engine.step()
        if last:
            self.optimizer.settle()
        return terms

    def local(self) -> dict[str, Tensor]:
        if self.stage < 3:
            return dict(self._names)
        return {name: parameter.ds_tensor for name, parameter in self._names.items()}

    def changed(self) -> None:
        """ZeRO 3 keeps small parameters whole on every worker; they are put together anew."""
        held = self._engine.optimizer.persistent_parameters if self.stage == 3 else []
        if held:
            held[0].partition(held)
            held[0].all_gather(held)

    def refresh(self) -> None:
        if self.stage:
            self._engine.optimizer.refresh_fp32_params()

    def gather(self, name: str, shard: Tensor) -> Tensor:
        if self.stage < 3:
            return shard
        shards = [torch.empty_like(shard) for _ in range(dist.get_world_size())]
        dist.all_gather(shards, shard.contiguous())
        parameter = self._names[name]
        return torch.cat(shards)[: parameter.ds_numel].view(parameter.ds_shape)

    def shard(self, name: str, whole: Tensor) -> Tensor:
        if self.stage < 3:
            return whole
        held = self._names[name].ds_tensor
        padded = torch.zeros(held.numel() * dist.get_world_size(), dtype=whole.dtype, device=held.device)
        padded[: whole.numel()] = whole.reshape(-1)
        return padded.chunk(dist.get_world_size())[dist.get_rank()]

    def moments(self) -> Iterator[tuple[str, str, Tensor]]:
        if self.stage == 0:
            yield from _own_moments(self._names, self.optimizer)
            return
        from deepspeed.utils import safe_get_full_optimizer_state

        self._link()
        for name, parameter in self._names.items():
            for moment in MOMENTS:
                yield moment, name, safe_get_full_optimizer_state(parameter, moment)

    def load_moments(self, values: Mapping[str, Mapping[str, Tensor]]) -> None:
        if self.stage == 0:
            _load_own_moments(self._names, self.optimizer, values)
            return
        from deepspeed.utils import safe_set_full_optimizer_state, safe_set_local_optimizer_state

        self._link()
        for moment in MOMENTS:
            for name, parameter in self._names.items():
                whole = values[moment][name]
                if self.stage < 3:
                    safe_set_full_optimizer_state(parameter, whole, moment)
                else:  # its function for the whole fails where the workers do not divide a parameter's numbers
                    safe_set_local_optimizer_state(parameter, self.shard(name, whole), moment)

    def _link(self) -> None:
        """ZeRO 1 and 2 connect parameters with their moments after the first step; a checkpoint may come before."""
        if self.stage < 3:
            self._engine.optimizer._lazy_init_hp_params_optimizer_state()


def _deepspeed() -> Any:
    """The library, in the process group that is there, without its chatter."""
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")
    import deepspeed
    from deepspeed.utils import logger

    logger.setLevel("WARNING")
    # A CPU op for inference that DeepSpeed compiles at start: 24 s, and a worker killed meanwhile leaves a lock
    # for which every later one waits without end. Training does not use it; DeepSpeed goes on where it is None.
    # (By import_module: `deepspeed.comm.torch` as an attribute is torch itself.)
    backend: Any = import_module("deepspeed.comm.torch")
    backend.build_shm_op = lambda: None
    deepspeed.init_distributed(dist_init_required=False, verbose=False)
    return deepspeed


def _mean_over_workers(value: Tensor) -> Tensor:
    dist.all_reduce(value)
    return value / dist.get_world_size()


def _own_moments(names: Mapping[str, nn.Parameter], optimizer: GuardedAdamW) -> Iterator[tuple[str, str, Tensor]]:
    for name, parameter in names.items():
        for moment in MOMENTS:
            yield moment, name, optimizer.state[parameter][moment]


@torch.no_grad()
def _load_own_moments(
    names: Mapping[str, nn.Parameter], optimizer: GuardedAdamW, values: Mapping[str, Mapping[str, Tensor]]
) -> None:
    for moment in MOMENTS:
        for name, parameter in names.items():
            optimizer.state[parameter][moment].copy_(values[moment][name])
