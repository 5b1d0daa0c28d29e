"""`latentforge plan`: what a run will take, stage by stage, before anything runs; afterwards, plan against actual.

Imports nothing that computes (no torch, no Ray), so that a plan of any size prints at once.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from configs import UserError, load_recipe
from configs.cluster import Cluster, load_cluster
from configs.reproduction import reproduction
from infra.home import default_root
from tasks.dag import FLOWS, REPRODUCE, reproducing
from tasks.plan.data import images_of
from tasks.plan.schedule import Plan, Rate, StagePlan, schedule
from tasks.plan.stages import works
from tasks.plan.work import Figure

if TYPE_CHECKING:
    from tasks.plan.actual import Actual  # reads Parquet's library, which a plan alone does not need

_RAISED = str.maketrans("0123456789", "⁰¹²³⁴⁵⁶⁷⁸⁹")


def command(
    flow: Annotated[str, typer.Argument(help="The flow: sfd-full, lowdiff-full, tokenizer-eval or reproduce.")],
    recipe: Annotated[str, typer.Option(help="A recipe's name (see `recipes`) or a path to a YAML file.")] = "demo",
    overrides: Annotated[
        list[str], typer.Option("--set", metavar="SECTION.FIELD=VALUE", help="Lay a value upon the recipe; repeatable.")
    ] = [],  # noqa: B006  # Typer copies it
    cluster: Annotated[str, typer.Option(help="A file in configs/clusters by its name, or a YAML file.")] = "local",
    nodes: Annotated[
        list[str], typer.Option(metavar="POOL=NODES", help="Nodes of a pool, in place of its max_nodes; repeatable.")
    ] = [],  # noqa: B006
    images: Annotated[int | None, typer.Option(min=1, help="Images of the source, all splits together.")] = None,
    image_bytes: Annotated[float | None, typer.Option(min=1, help="Mean size of an encoded image.")] = None,
    measured: Annotated[
        str | None,
        typer.Option(help="Take rates from finished runs on this cluster: a root of artifacts or an MLflow run id."),
    ] = None,
    against: Annotated[
        str | None, typer.Option(help="Compare with a finished run: a root of artifacts or an MLflow run id.")
    ] = None,
    root: Annotated[
        str | None, typer.Option(help="Where the artifacts of an MLflow run lie; this machine's default if unset.")
    ] = None,
    unguided: Annotated[bool, typer.Option("--unguided", help="Of reproduce: for the unguided score.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
) -> None:
    """Print rows, bytes, requests, FLOPs, GPU-hours, wall time, dollars and storage of a run that has not begun."""
    if flow not in FLOWS:
        raise UserError(f"no flow {flow!r}: choose one of {', '.join(FLOWS)}")
    if unguided and flow != REPRODUCE:
        raise UserError(f"--unguided goes with reproduce; of {flow} say --set 'sample.guidance={{method: none}}'")
    plan = make_plan(recipe, overrides, cluster, nodes, images, image_bytes, measured, root, flow, unguided)
    found: dict[str, Actual] = {}
    if against:
        from tasks.plan.actual import actuals

        found = actuals(against, root or default_root(), plan.recipe)
    if as_json:
        print(json.dumps(plain(plan, found), indent=1))
        return
    console = Console(markup=False)
    for line in render(plan, flow):
        console.print(line, soft_wrap=not isinstance(line, Table))
    if found:
        for each in compared(plan, found):
            console.print(each)


def make_plan(
    recipe: str,
    overrides: Sequence[str] = (),
    cluster: str = "local",
    nodes: Sequence[str] = (),
    images: int | None = None,
    image_bytes: float | None = None,
    measured: str | None = None,
    root: str | None = None,
    flow: str = "sfd-full",
    unguided: bool = False,
) -> Plan:
    """The plan of a run. Arguments as the command's.

    Raises:
        UserError: an unknown recipe, cluster or pool, or a source that is neither known nor here.
    """
    if flow == REPRODUCE:
        overrides = reproduction(recipe, unguided, overrides=overrides)
        flow = reproducing(recipe, overrides)
    loaded, place = load_recipe(recipe, overrides), load_cluster(cluster)
    planned = works(loaded, images_of(loaded, images, image_bytes, flow), place.assumed.dopri5_evaluations, flow)
    reached: dict[str, Rate] = {}
    if measured:
        from tasks.plan.actual import actuals, rates

        reached = rates(actuals(measured, root or default_root(), loaded.name), place)
    lead = loaded.compute.cluster.lead_seconds
    return schedule(loaded.name, planned, place, lead, _nodes(nodes, place), reached)


def _nodes(given: Sequence[str], cluster: Cluster) -> dict[str, int]:
    found: dict[str, int] = {}
    for each in given:
        pool, _, count = each.partition("=")
        if pool not in cluster.pools or not count.isdigit() or int(count) < 1:
            raise UserError(
                f"--nodes {each!r}: expected POOL=NODES, for example {next(iter(cluster.pools))}=2; cluster "
                f"{cluster.name} has the pools {', '.join(cluster.pools)}"
            )
        found[pool] = int(count)
    return found


# ------------------------------------------------------------------------------------------------------- printing


def render(plan: Plan, flow: str = "sfd-full") -> list[Table | Text | str]:
    """Tables and lines for a terminal of 80 columns; every figure carries the number of its source, raised."""
    sources: list[str] = []

    def cell(figure: Figure, shown: str) -> str:
        if figure.source not in sources:
            sources.append(figure.source)
        return f"{shown}{_raised(sources.index(figure.source) + 1)}"

    costs = _table(f"{flow}, recipe {plan.recipe}, on {plan.cluster.name}", "rows", "GPU-hours", "wall time", "dollars")
    costs.add_column("nodes")
    stored = _table("storage", "bytes", "reads", "writes", "at most")
    computed = _table("computing", "FLOPs", "GPU memory")
    computed.add_column("bound by")
    for stage in plan.stages:
        work = stage.work
        costs.add_row(
            work.stage,
            cell(work.rows, f"{work.rows.value:,.0f}"),
            cell(stage.gpu_hours, f"{stage.gpu_hours.value:,.1f}"),
            cell(stage.seconds, duration(stage.seconds.value)),
            cell(stage.dollars, f"{stage.dollars.value:,.2f}"),
            _where(stage),
        )
        stored.add_row(
            work.stage,
            cell(work.written, size(work.written.value)),
            cell(work.reads, count(work.reads.value)),
            cell(work.writes, count(work.writes.value)),
            cell(stage.storage, size(stage.storage.value)),
        )
        memory = "" if stage.memory is None else cell(stage.memory, size(stage.memory.value))
        computed.add_row(work.stage, cell(work.flops, count(work.flops.value)), memory, stage.bound)
    costs.add_section()
    costs.add_row("all", "", f"{plan.gpu_hours:,.1f}", duration(plan.seconds), f"{plan.dollars:,.2f}", "")
    stored.add_section()
    stored.add_row("all", size(plan.kept), "", "", size(plan.peak))
    lines: list[Table | Text | str] = [costs, stored, computed]
    lines += [Text.assemble(("does not fit:", "bold red"), f" {problem}") for problem in plan.problems]
    lines += [f"note: {note}" for note in plan.notes]
    if plan.waits:
        assumed = plan.cluster.assumed
        lines.append(
            f"of the dollars {plan.waits:,.2f} for nodes that start (in {assumed.start_seconds:.0f} s) or idle (at "
            f"most {assumed.idle_seconds:.0f} s after a stage)"
        )
    if plan.cluster.storage.dollars_per_gb_month:
        lines.append(f"keeping the artifacts: {plan.dollars_per_month:,.2f} dollars a month")
    lines += [f"{_raised(number)} {source}" for number, source in enumerate(sources, start=1)]
    machines = f"machines of {plan.cluster.name}: {plan.cluster.sources.machines}"
    return [
        *lines,
        machines,
        "spot machines are priced as if none were lost; images that the source keeps are not counted",
    ]


def _table(title: str, *figures: str) -> Table:
    """Of the stages, with columns of figures."""
    table = Table("stage", title=title, title_justify="left", box=box.SIMPLE_HEAD, pad_edge=False)
    for name in figures:
        table.add_column(name, justify="right", no_wrap=True)
    return table


def _raised(number: int) -> str:
    """A number of a source, which nobody takes for a figure: 0.0⁵."""
    return str(number).translate(_RAISED)


def compared(plan: Plan, found: Mapping[str, Actual]) -> list[Table | str]:
    """Plan against actual, for every stage that has finished, and where the actual figures are from."""
    done = [(stage, found[stage.work.stage]) for stage in plan.stages if stage.work.stage in found]
    rows, written, seconds = (
        _table(f"{what}: plan against actual", "planned", "actual", "off by") for what in ("rows", "bytes", "wall time")
    )
    for stage, actual in done:
        name, work = stage.work.stage, stage.work
        rows.add_row(name, *_against(work.rows.value, actual.rows, lambda value: f"{value:,.0f}"))
        written.add_row(name, *_against(work.written.value, actual.bytes, size))
        planned, real, off = _against(stage.seconds.value, actual.seconds, duration)
        # Measured on this very run: equal by construction.
        own = actual.source in stage.seconds.source
        seconds.add_row(name, planned, real, "its own rate" if own else off)
    sources = [f"{stage.work.stage} is from {actual.source}" for stage, actual in done]
    return [rows, written, seconds, *sources]


def _against(planned: float, real: float | None, show: Callable[[float], str]) -> tuple[str, str, str]:
    return show(planned), "unknown" if real is None else show(real), _off(planned, real)


def plain(plan: Plan, found: Mapping[str, Actual]) -> dict[str, Any]:
    """Everything as plain values."""
    stages = [
        {**asdict(stage.work), **{k: v for k, v in asdict(stage).items() if k != "work"}} for stage in plan.stages
    ]
    actual = {
        name: {key: value for key, value in vars(each).items() if key != "recipe"} for name, each in found.items()
    }
    names = ("dollars", "waits", "seconds", "gpu_hours", "kept", "peak", "dollars_per_month")
    return {
        "recipe": plan.recipe,
        "cluster": plan.cluster.model_dump(mode="json"),
        "stages": stages,
        "totals": {name: getattr(plan, name) for name in names},
        "problems": plan.problems,
        "notes": plan.notes,
        "actual": actual,
    }


def size(value: float) -> str:
    return _scaled(value, ("B", "kB", "MB", "GB", "TB", "PB"))


def count(value: float) -> str:
    return _scaled(value, ("", "k", "M", "G", "T", "P", "E", "Z")).strip()


def duration(seconds: float) -> str:
    minutes, hours = seconds / 60, seconds / 3600
    if minutes < 1.5:
        return f"{seconds:.0f} s"
    return f"{minutes:.0f} min" if hours < 1.5 else f"{hours:,.1f} h"


def _scaled(value: float, units: tuple[str, ...]) -> str:
    scaled, place = value, 0
    while scaled >= 999.5 and place < len(units) - 1:
        scaled, place = scaled / 1000, place + 1
    return f"{scaled:.3g} {units[place]}"


def _where(stage: StagePlan) -> str:
    return ", ".join(f"{nodes} {pool}" for pool, nodes in stage.nodes.items()) or "head"


def _off(planned: float, real: float | None) -> str:
    if not real:
        return ""
    return f"{100 * (planned / real - 1):+.1f} %"
