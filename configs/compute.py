"""Where and how fast a recipe runs, and where it is tracked; in no fingerprint."""

from __future__ import annotations

import re
from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from configs.section import Positive, Section

_FOLLOWING = (
    *("train_batch_size", "train_micro_batch_size_per_gpu", "gradient_accumulation_steps", "gradient_clipping"),
    *("fp16", "bf16", "bfloat16", "torch_autocast", "optimizer", "scheduler", "communication_data_type"),
)
"""Keys of DeepSpeed's configuration that are derived (`tasks/training/engine.py`)."""


class TrainCompute(Section):
    workers: Positive = 1
    gpus_per_worker: Annotated[int, Field(ge=0)] = 1
    cpus_per_worker: Positive = 8
    micro_batch: Positive | None = None
    """Images per worker and accumulation step; None takes the whole share of the batch at once, or on a GPU as
    much of it as fits by the plan's estimate (`tasks/plan/memory.py`)."""
    engine: Literal["auto", "deepspeed", "plain"] = "auto"
    """`auto` is DeepSpeed where it is installed and there is something that only it does (a ZeRO stage, settings of its
    own), and else `plain`: torch alone, on one device or with gradients that travel while the backward pass goes on."""
    zero_stage: Literal[0, 1, 2, 3] = 0
    communication: Literal["fp32", "bf16", "fp16"] = "fp32"
    """In which gradients travel between workers; the large recipes say `bf16`, half the bytes."""
    deepspeed: dict[str, Any] = Field(default_factory=dict)
    """Laid upon the DeepSpeed configuration that follows from the recipe, e.g. `{zero_optimization: {…}}`."""
    compile: bool = False
    """Compile the network that is trained."""
    channels_last: bool = False
    """Lay out activations with their channels side by side, as tensor cores like them (`train_vavae`). On CUDA only
    with `compile`: group norms answer with channels apart there, and each block would turn its activations twice."""
    deterministic: bool = False
    """Have an accelerator compute the same bits every time, at a price that was not measured yet (`docs/training.md`);
    a CPU does so anyway."""
    recompute: bool = False
    """Recompute each block's activations in the backward pass instead of keeping them (`train_dit`)."""
    checkpoint_every: Positive = 1_000_000
    """Images between checkpoints."""
    keep_checkpoints: Positive = 3
    keep_every: Positive | None = None
    """The first checkpoint at or after each multiple of so many images is kept until the stage is done; None keeps none
    but the newest."""
    log_every: Positive = 25_600
    """Images between logged metrics, looks at the guard's verdicts and at requests (`docs/training.md`)."""
    preview_every: Positive | None = None
    """Images between pictures sampled from the model in training at fixed seeds (`train_dit`); None draws none."""
    preview_scored: Annotated[int, Field(ge=0)] = 0
    """Images sampled for a Fréchet distance with each of them, by the network of `evaluate`; 0 leaves it out."""
    profile_at: Annotated[int, Field(ge=0)] | None = None
    """Images seen from which a few steps are profiled; None profiles on request only."""
    max_failures: Annotated[int, Field(ge=0)] = 3
    """Worker failures survived before the stage fails."""
    cache_gib: Annotated[float, Field(ge=0)] = 0.0
    """Local disk for copies of remote shards, GiB on every node; 0 reads them from storage again in every epoch."""

    @property
    def owned(self) -> list[str]:
        """Keys that `deepspeed` sets although they follow from other fields of the recipe."""
        found = [key for key in self.deepspeed if key in _FOLLOWING]
        zero = self.deepspeed.get("zero_optimization")
        return found + ["zero_optimization.stage"] * (isinstance(zero, dict) and "stage" in zero)


class ActorCompute(Section):
    """A Ray Data stage: decode tasks on CPUs, networks in actors."""

    actors: Positive = 1
    gpus_per_actor: Annotated[float, Field(ge=0)] = 1
    cpus_per_actor: Positive = 1
    batch: Positive = 64
    compile: bool = False
    """Compile the networks of `encode` (tokenizer's encoder, foundation model, the Semantic VAE's encoder), of `sample`
    (the model's and its guide's blocks, the decoder) and of scores (the features' network, the tokenizer); pays where
    there are many batches."""
    cuda_graphs: bool = False
    """Launch a pass of the sampled network, and of its guide, as one CUDA graph; pays where `sample.batch` is so small
    that the host is slower than the device. Without CUDA nothing changes (`sample`)."""


class ClusterCompute(Section):
    """A Ray cluster that takes each stage as one job; without one, stages run in the flow's own process."""

    jobs: Annotated[str, Field(pattern=r"^https?://[^/@\s]+$")] | None = None
    """Address of its Jobs API, as `http://host:8265`. RAY_API_SERVER_ADDRESS in the environment goes before it."""
    code: Annotated[str, Field(pattern=r"^/")] | None = None
    """Folder of this code on every machine of the cluster, as `/opt/latentforge` in our image; None sends the
    repository along with each job."""
    environment: tuple[str, ...] = ()
    """Names of variables of the flow's environment that jobs are given. Ray shows them to whoever sees its dashboard:
    credentials belong into the environment of the cluster's machines."""

    lead_seconds: Annotated[float, Field(ge=0)] = 180.0
    """How long before a stage's expected end the accelerators that only the next stage needs are asked for: what a
    machine takes to start. 0 has every stage ask for its own."""

    @model_validator(mode="after")
    def _no_secrets(self) -> ClusterCompute:
        secret = [name for name in self.environment if _SECRET.search(name)]
        if secret:
            raise ValueError(
                f"environment names {', '.join(secret)}, which Ray's dashboard would show: set it on the cluster's "
                "machines instead"
            )
        return self


_SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSW|CREDENTIAL", re.I)


class Compute(Section):
    train: TrainCompute = TrainCompute()
    actors: ActorCompute = ActorCompute()
    cluster: ClusterCompute = ClusterCompute()


class Tracking(Section):
    experiment: str = "latentforge"
