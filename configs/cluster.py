"""Clusters: pools of machines with their stated prices and speeds, one YAML each. In no fingerprint.

The files under `infra/ray` and `infra/kubernetes` start what these describe; tests hold both to the same numbers.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from configs.load import checked, merge, resolve
from configs.section import Positive, Precision, Section, Share, Weight

CLUSTERS = Path(__file__).parent / "clusters"
HEAD = "head"
POOLS = (HEAD, "decode", "infer", "train")

Rate = Annotated[float, Field(gt=0)]


class Pool(Section):
    """Machines of one kind."""

    machine: str
    """The provider's name for it."""
    cpus: Positive
    """CPUs that Ray gives away on one node: on GPU pools those of their workers only, so decoding goes elsewhere."""
    memory_gib: Positive
    gpus: Annotated[int, Field(ge=0)] = 0
    gpu: str | None = None
    bf16_tflops: Rate | None = None
    """Peak of one GPU, dense, in 10¹² FLOPs a second."""
    fp32_tflops: Rate | None = None
    """The same for float32 without TF32."""
    gpu_memory_gb: Rate | None = None
    """Of one GPU, in 10⁹ bytes; None checks no training against it."""
    local_disk_gb: Annotated[int, Field(ge=0)] = 0
    """Of disks inside the machine, for caches and spilled objects."""
    network_gbit: Rate
    """To the bucket, sustained, per node."""
    min_nodes: Annotated[int, Field(ge=0)] = 0
    max_nodes: Positive = 1
    spot: bool = False
    dollars_per_hour: Weight = 0.0
    """Of one node, at the market that `spot` says."""

    @model_validator(mode="after")
    def _whole(self) -> Pool:
        if self.min_nodes > self.max_nodes:
            raise ValueError(f"min_nodes {self.min_nodes} is above max_nodes {self.max_nodes}")
        if self.gpus and not (self.gpu and self.bf16_tflops and self.fp32_tflops):
            raise ValueError("a pool with gpus needs gpu, bf16_tflops and fp32_tflops")
        return self

    def tflops(self, precision: Precision) -> float:
        """Peak of one GPU, in 10¹² FLOPs a second; 0 without one. TF32 has half of bfloat16's on every card that knows
        it."""
        bf16 = self.bf16_tflops or 0.0
        return {"bf16": bf16, "tf32": bf16 / 2, "fp32": self.fp32_tflops or 0.0}[precision]


class StoragePrices(Section):
    dollars_per_gb_month: Weight = 0.0
    dollars_per_million_reads: Weight = 0.0
    dollars_per_million_writes: Weight = 0.0


class Assumed(Section):
    """Stated guesses that a plan uses where nothing was measured."""

    train_mfu: Share = 0.35
    """Share of a GPU's peak that training reaches."""
    inference_mfu: Share = 0.5
    """The same for encoding, sampling and scoring, of the peak in their precision."""
    gflops_per_cpu: Rate = 20.0
    """Reached, not peak, in 10⁹ FLOPs a second."""
    decode_mb_per_cpu: Rate = 12.0
    """10⁶ encoded bytes a second, beside `decode_overhead_ms`. Measured once on a development core: 12.6 (JPEG)."""
    decode_overhead_ms: Weight = 0.1
    """Of every image; the 9,300 small ones a second of docs/scale.md."""
    decoded_per_cpu: Rate = 226.0
    """Photographs a second, of about 104 kB and cropped to 256 pixels: measured on one development core
    (benchmarks/README.md, docs/scale.md). What a training that decodes images beside its step is said to take."""
    dopri5_evaluations: Positive = 150
    """Velocities that the adaptive solver asks for; its tolerances decide, not the recipe."""
    start_seconds: Weight = 180.0
    """From the demand to a node that works: machine, image, Ray."""
    idle_seconds: Weight = 300.0
    """A node that nobody uses is kept so long: the idle timeout in `infra/ray` and
    `infra/kubernetes`."""

    def decode_seconds(self, image_bytes: float) -> float:
        """CPU seconds to decode one image."""
        return self.decode_overhead_ms / 1e3 + image_bytes / (self.decode_mb_per_cpu * 1e6)


class Sources(Section):
    """Where the figures come from, as a plan prints them."""

    machines: str
    prices: str
    rates: str


class Cluster(Section):
    """One place to run."""

    name: str
    provider: Literal["local", "aws", "gcp"]
    region: str | None = None
    pools: dict[str, Pool]
    """`decode` for CPU work, `infer` for encoding and sampling, `train` for training; `head` drives."""
    storage: StoragePrices = StoragePrices()
    assumed: Assumed = Assumed()
    sources: Sources

    def pool(self, name: str) -> str:
        """The pool that does the work of `name`: itself, or the head where the cluster is one machine."""
        return name if name in self.pools else HEAD

    @model_validator(mode="after")
    def _has_a_head(self) -> Cluster:
        unknown = sorted(set(self.pools) - set(POOLS))
        if HEAD not in self.pools or unknown:
            raise ValueError(f"pools are {HEAD} and any of {', '.join(POOLS[1:])}, found {', '.join(self.pools)}")
        return self


def cluster_names() -> list[str]:
    return sorted(path.stem for path in CLUSTERS.glob("*.yaml"))


def load_cluster(name: str) -> Cluster:
    """A cluster that comes with the project by its name, or one in a YAML file by its path.

    Raises:
        UserError: there is none, or a field is unknown or wrong.
    """
    values = resolve("cluster", CLUSTERS, name)
    if values.get("provider") == "local":
        values = merge({"pools": {HEAD: {"cpus": os.cpu_count() or 1}}}, values)
    return checked(Cluster, values, f"cluster {name}")
