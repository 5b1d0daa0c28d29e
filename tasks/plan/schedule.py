"""Time and money: works on a cluster's pools, at measured rates where there are any, else at assumed ones."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

from configs.cluster import HEAD, Cluster, Pool
from tasks.plan.waits import Nodes
from tasks.plan.work import Figure, Work


@dataclass(frozen=True)
class Rate:
    """What a finished run of a stage reached, all that it waited for included."""

    per_device: float
    """FLOPs a second of one device; images a second of one CPU where the stage has no FLOPs."""
    gpu: bool
    source: str


@dataclass(frozen=True)
class StagePlan:
    """One stage on a cluster."""

    work: Work
    nodes: dict[str, int]
    """Nodes in use by pool, the head left out."""
    gpu_hours: Figure
    seconds: Figure
    bound: str
    """What takes longest: compute, decode, transfer, one process, start, or `measured` as a whole."""
    dollars: Figure
    waits: Figure
    """Those of the dollars that are paid for nodes while they start or idle."""
    memory: Figure | None
    """Bytes of one GPU at the micro-batch that the training takes there; None where nothing is trained on GPUs."""
    storage: Figure
    """Bytes under the root at the stage's fullest moment, the source's own images not counted."""


@dataclass(frozen=True)
class Plan:
    """All stages, and what is true of them together."""

    recipe: str
    cluster: Cluster
    stages: list[StagePlan]
    problems: list[str]
    """Why it would not run as it is."""
    notes: list[str]

    @property
    def dollars(self) -> float:
        return sum(stage.dollars.value for stage in self.stages)

    @property
    def waits(self) -> float:
        """Dollars for nodes while they start or idle."""
        return sum(stage.waits.value for stage in self.stages)

    @property
    def seconds(self) -> float:
        return sum(stage.seconds.value for stage in self.stages)

    @property
    def gpu_hours(self) -> float:
        return sum(stage.gpu_hours.value for stage in self.stages)

    @property
    def kept(self) -> float:
        """Bytes that stay."""
        return sum(stage.work.written.value for stage in self.stages)

    @property
    def peak(self) -> float:
        return max(stage.storage.value for stage in self.stages)

    @property
    def dollars_per_month(self) -> float:
        """Of keeping what stays."""
        return self.kept / 1e9 * self.cluster.storage.dollars_per_gb_month


def schedule(
    recipe: str,
    works: list[Work],
    cluster: Cluster,
    lead: float,
    nodes: Mapping[str, int] | None = None,
    rates: Mapping[str, Rate] | None = None,
) -> Plan:
    """Stages one after the other, as the flow runs them.

    Args:
        recipe: its name.
        works: what there is to do.
        cluster: where.
        lead: `compute.cluster.lead_seconds`.
        nodes: nodes of a pool, in place of its `max_nodes`.
        rates: measured ones by stage; they count where they were reached on the same kind of device.
    """
    stages: list[StagePlan] = []
    problems: list[str] = []
    notes: list[str] = []
    kept = 0.0
    up = Nodes(cluster, lead)
    for work in works:
        pool_name = cluster.pool(work.pool)
        available = (nodes or {}).get(pool_name, cluster.pools[pool_name].max_nodes)
        placed = _place(work, cluster.pools[pool_name], available)
        problems += [f"{work.stage}: {why} (pool {pool_name})" for why in placed.problems]
        notes += [*work.notes, *(f"{work.stage}: {what} (pool {pool_name})" for what in placed.notes)]
        memory = cluster.pools[HEAD].memory_gib * 2**30
        if work.held > memory / 2:
            problems.append(
                f"{work.stage}: the flow's own process holds about {work.held / 1e9:.0f} GB, and the head has "
                f"{memory / 1e9:.0f} GB: give it a larger machine"
            )
        used = {pool_name: placed.nodes}
        decode_pool = cluster.pool("decode")
        apart = work.stage == "encode" and decode_pool != pool_name
        if apart:
            most = (nodes or {}).get(decode_pool, cluster.pools[decode_pool].max_nodes)
            used[decode_pool] = _decoders(work, placed, cluster, most)
        rate = (rates or {}).get(work.stage)
        start = up.start(pool_name, placed.gpu)
        seconds, bound = _seconds(work, placed, cluster, used, rate, apart, start.seen)
        gpu_memory, unfit = _memory(work, cluster.pools[pool_name])
        problems += unfit
        notes += _decoding(work, placed, cluster, seconds.value)
        storage = kept + work.written.value + work.beside
        kept += work.written.value
        used.pop(HEAD, None)
        up.work(work.stage, used, seconds.value, start)
        stages.append(
            StagePlan(
                work=work,
                nodes=used,
                gpu_hours=Figure(placed.devices * seconds.value / 3600 if placed.gpu else 0.0, "GPUs × wall time"),
                seconds=seconds,
                bound=bound,
                memory=gpu_memory,
                dollars=_dollars(work, cluster, used, seconds.value),
                waits=Figure(0.0, ""),
                storage=Figure(storage, "artifacts so far, and what lies beside them meanwhile"),
            )
        )
    up.end()
    stages = [_with_waits(each, up, cluster) for each in stages]
    return Plan(recipe, cluster, stages, problems, list(dict.fromkeys(notes)))


def _with_waits(stage: StagePlan, up: Nodes, cluster: Cluster) -> StagePlan:
    """With what is paid for nodes that do not work, which the stages after it decide, too."""
    name, dollars = stage.work.stage, stage.dollars
    waits = Figure(up.waits[name], f"{cluster.sources.rates}; {cluster.sources.prices}")
    return replace(stage, dollars=replace(dollars, value=dollars.value + up.beside[name]), waits=waits)


@dataclass(frozen=True)
class _Placed:
    gpu: bool
    devices: float
    """GPUs, or CPUs where there are none."""
    workers: int
    nodes: int
    peak: float
    """FLOPs a second of one device, before any share of it."""
    problems: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()


def _place(work: Work, pool: Pool, available: int) -> _Placed:
    """Workers on nodes. A training starts whole or not at all; actors start as far as there is room."""
    problems: list[str] = []
    notes: list[str] = []
    gpu = work.gpus > 0
    peak = 0.0
    if gpu and not pool.gpus:
        problems.append(f"asks for {work.gpus:g} GPUs for each of {work.workers} workers, and there are none")
        gpu = False
    if work.pool in ("decode", "head"):
        count = available if work.pool == "decode" else 1
        return _Placed(False, float(pool.cpus * count), count, count, 0.0, tuple(problems), tuple(notes))
    by_cpu = math.floor(pool.cpus / work.cpus) if work.cpus <= pool.cpus else 0
    per_node = min(by_cpu, math.floor(pool.gpus / work.gpus)) if gpu else by_cpu
    if per_node == 0:
        asked, given = (f"{work.cpus:g} CPUs", pool.cpus) if not by_cpu else (f"{work.gpus:g} GPUs", pool.gpus)
        problems.append(
            f"a worker asks for {asked}, and a node gives away {given}: ask for fewer, or name larger nodes"
        )
        per_node = 1
    wanted, room = work.workers, per_node * available
    running = wanted
    if wanted > room and work.pool == "train":
        problems.append(f"{wanted} workers start together or not at all, and there is room for {room}")
    elif wanted > room:
        running = room
        notes.append(f"room for {room} of the recipe's {wanted} actors")
    elif gpu and wanted < room and work.flops.value > work.alone:
        notes.append(f"the recipe uses {wanted} of {room} places for workers; more of them would be faster")
    if gpu:
        peak = pool.tflops(work.precision) * 1e12
    devices = running * work.gpus if gpu else min(running * work.cpus, pool.cpus * available)
    return _Placed(
        gpu, devices, running, min(available, math.ceil(running / per_node)), peak, tuple(problems), tuple(notes)
    )


def _memory(work: Work, pool: Pool) -> tuple[Figure | None, list[str]]:
    """What a stage takes of one GPU, all of its workers there together, and why it does not fit."""
    memory = work.memory
    if memory is None or not work.gpus or not pool.gpus:
        return None, []
    beside = max(1, math.floor(1 / work.gpus))  # actors that share a GPU

    def figure(micro: int) -> Figure:
        shown = f"{memory.source}; micro-batch {micro}" if memory.open or work.pool == "train" else memory.source
        return Figure(beside * memory.at(micro), shown)

    if pool.gpu_memory_gb is None:
        return figure(memory.micro), []
    micro = memory.fitting(pool.gpu_memory_gb * 1e9 / beside)
    if micro is not None:
        return figure(micro), []
    least = memory.least if memory.open else memory.micro
    way = "set compute.train.zero_stage or recompute" if memory.open else f"lower {memory.field}"
    if not memory.field:
        way = "name a GPU with more memory"
    if beside > 1:
        way += " or raise compute.actors.gpus_per_actor"
    all_of_them = "" if beside == 1 else f"{beside} actors of a GPU with "
    why = (
        f"{work.stage}: takes about {beside * memory.at(least) / 1e9:.0f} GB of a GPU with {pool.gpu_memory_gb:g} GB "
        f"({all_of_them}{memory.fixed / 1e9:.1f} GB, and {memory.image / 1e9:.2f} GB for each image of "
        f"{least} at once; {memory.source}): {way}"
    )
    return Figure(beside * memory.at(least), memory.source), [why]


def _decoding(work: Work, placed: _Placed, cluster: Cluster, seconds: float) -> list[str]:
    """The cores that a training on accelerators takes to decode images beside its steps."""
    if work.pool != "train" or not placed.gpu or not work.decodes:
        return []
    rate, core = work.decodes / seconds, cluster.assumed.decoded_per_cpu
    return [
        f"{work.stage}: decodes {rate:,.0f} images/s beside the step, on {math.ceil(rate / core)} of its workers' "
        f"{placed.workers * work.cpus:.0f} cores ({core:g} images/s a core: benchmarks/README.md)"
    ]


def _decoders(work: Work, placed: _Placed, cluster: Cluster, most: int) -> int:
    """Nodes of the decode pool that keep the actors busy, at least one."""
    flop_seconds = work.flops.value / _speed(placed, cluster, work)
    need = work.decodes * cluster.assumed.decode_seconds(work.image_bytes) / max(flop_seconds, 1e-9)
    return max(1, min(most, math.ceil(need / cluster.pools[cluster.pool("decode")].cpus)))


def _speed(placed: _Placed, cluster: Cluster, work: Work, devices: float | None = None) -> float:
    """FLOPs a second of all devices, at the assumed share."""
    count = placed.devices if devices is None else devices
    if not placed.gpu:
        return count * cluster.assumed.gflops_per_cpu * 1e9
    share = cluster.assumed.train_mfu if work.pool == "train" else cluster.assumed.inference_mfu
    return count * placed.peak * share


def _seconds(
    work: Work,
    placed: _Placed,
    cluster: Cluster,
    used: Mapping[str, int],
    rate: Rate | None,
    apart: bool,
    start: float,
) -> tuple[Figure, str]:
    """Wall time and what it is spent on. Compute, decoding and transfer overlap where they use different things."""
    assumed = cluster.assumed
    units = work.flops.value or work.decodes
    if rate is not None and rate.gpu == placed.gpu and units:
        return Figure(units / (rate.per_device * placed.devices), rate.source), "measured"
    single = placed.devices if work.pool == "head" else placed.devices / max(1, placed.workers)
    alone = work.alone / _speed(placed, cluster, work, single) if work.alone else 0.0
    one_decode = assumed.decode_seconds(work.image_bytes)
    alone += work.alone_decodes * one_decode
    flops = work.flops.value - work.alone
    compute = flops / _speed(placed, cluster, work) if flops > 0 else 0.0
    cores = cluster.pools[cluster.pool("decode")].cpus * used[cluster.pool("decode")] if apart else 0
    if not apart:
        cores = round(placed.workers * work.cpus) if placed.gpu else round(placed.devices)
    decode = work.decodes * one_decode / max(1, cores)
    gbit = sum(cluster.pools[name].network_gbit * count for name, count in used.items())
    transfer = (work.read + work.written.value) / (gbit / 8 * 1e9)
    if not placed.gpu:  # the same cores decode and compute
        compute, decode = compute + decode, 0.0
    if decode and work.decoded_share < 1:
        decode += (1 - work.decoded_share) * compute  # first one bounds the time, then the other
    terms = {"compute": compute, "decode": decode, "transfer": transfer}
    if not flops:
        terms["decode"], terms["compute"] = terms["decode"] + terms["compute"], 0.0
    longest = max(terms, key=lambda name: terms[name])
    total = start + alone + terms[longest]
    spent = {"start": start, "one process": alone, longest: terms[longest]}
    return Figure(total, _how(work, placed, cluster)), max(spent, key=lambda name: spent[name])


def _how(work: Work, placed: _Placed, cluster: Cluster) -> str:
    """The rates behind a wall time, in words."""
    assumed = cluster.assumed
    if placed.gpu:
        share = assumed.train_mfu if work.pool == "train" else assumed.inference_mfu
        rate = f"{share:.0%} of {placed.peak / 1e12:g} TFLOP/s ({work.precision}) a GPU"
    else:
        rate = f"{assumed.gflops_per_cpu:g} GFLOP/s a CPU"
    if work.decodes or work.alone_decodes:
        rate += f", decoding {assumed.decode_mb_per_cpu:g} MB/s a CPU"
    return f"{rate}: {cluster.sources.rates}"


def _dollars(work: Work, cluster: Cluster, used: Mapping[str, int], seconds: float) -> Figure:
    """Nodes for as long as the stage runs, the head with them, and requests; a month of storage is the plan's."""
    hours = seconds / 3600
    nodes = sum(cluster.pools[name].dollars_per_hour * count for name, count in used.items())
    requests = work.reads.value * cluster.storage.dollars_per_million_reads
    requests += work.writes.value * cluster.storage.dollars_per_million_writes
    total = hours * (nodes + cluster.pools[HEAD].dollars_per_hour) + requests / 1e6
    return Figure(total, cluster.sources.prices)


def devices(work: Work, cluster: Cluster) -> tuple[float, bool]:
    """Devices that a run of this work had on this cluster, and whether they were GPUs."""
    name = cluster.pool(work.pool)
    placed = _place(work, cluster.pools[name], cluster.pools[name].max_nodes)
    return placed.devices, placed.gpu
