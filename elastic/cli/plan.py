"""`elastic plan`: how a pipeline is cut, what it would be with other workers, and on a cluster that does not exist."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import click
import yaml
from rich.console import Console
from rich.table import Table

from elastic.cli import options
from elastic.cli.people import People
from elastic.config import current_environment
from elastic.domain import PlanReply
from elastic.errors import ConfigError, ElasticError

TIMEOUT_S = 120.0
ACTIONS_SHOWN = 24
MIB, GIB = 2**20, 2**30

_SHORT = {
    "receive input": "<",
    "forward": "F",
    "send output": ">",
    "receive gradient": "<",
    "backward": "B",
    "send gradient": ">",
    "reduce": "R",
}

Question = dict[str, Any]


@click.group()
def plan() -> None:
    """Show, explain or simulate how a pipeline is cut."""


@plan.command()
@options.controller_address
@click.option("--actions", is_flag=True, help="Also every worker's actions in a step.")
@options.as_json
def show(controller: str, actions: bool, as_json: bool) -> None:
    """Show how the job's pipeline is cut now, and its step time beside the predicted one."""
    reply = People(controller).plan()
    stages = [[stage.first, stage.last, stage.ranks] for stage in reply.plan.stages]
    answer = ask(question_of(reply) | {"stages": stages})
    answer["measured_step_s"] = reply.step_s
    answer["actual_over_predicted"] = reply.step_s / reply.plan.predicted_s if reply.plan.predicted_s else None
    answer["why"] = reply.plan.reason
    if as_json:
        click.echo(json.dumps(answer))
        return
    console = Console()
    console.print(stages_table(answer, f"generation {reply.plan.generation}: {reply.plan.reason}"))
    if reply.step_s and reply.plan.predicted_s:
        ratio = reply.step_s / reply.plan.predicted_s
        console.print(
            f"a step takes {1000 * reply.step_s:.1f} ms, predicted {1000 * reply.plan.predicted_s:.1f} ms "
            f"(actual over predicted {ratio:.2f})"
        )
    console.print(losses_table(answer))
    if actions:
        console.print(actions_table(answer))


@plan.command()
@options.controller_address
@click.option("--workers", type=click.IntRange(1), help="How many; default: as many as there are.")
@options.as_json
def explain(controller: str, workers: int | None, as_json: bool) -> None:
    """Say what the plan would be with N workers, what else was considered, and what each loss would lead to."""
    reply = People(controller).plan()
    count = workers or reply.plan.world_size
    held = {m.rank: [*_ends(reply.plan.layers_of(m.rank))] for m in reply.plan.members if m.rank < count}
    answer = ask(question_of(reply) | {"workers": count, "held": held, "nodes": {}} | _nodes_of(reply, count))
    _print(answer, as_json, f"{count} worker(s)", actions=False)


@plan.command()
@click.argument("cluster", type=click.Path(path_type=Path, dir_okay=False))
@click.option("--workers", type=click.IntRange(1), help="Instead of the file's.")
@click.option("--actions", is_flag=True, help="Also every worker's actions in a step.")
@options.as_json
def simulate(cluster: Path, workers: int | None, actions: bool, as_json: bool) -> None:
    """Plan for the hypothetical CLUSTER in a YAML file (see docs/pipelines.md), and run a step in the simulator."""
    question = read_cluster(cluster)
    if workers is not None:
        question["workers"] = workers
        question["nodes"] = {name: [rank] for name, (rank,) in question["nodes"].items() if rank < workers}
    _print(ask(question), as_json, f"{cluster.name}: {question['workers']} worker(s)", actions)


def _print(answer: Mapping[str, Any], as_json: bool, title: str, actions: bool) -> None:
    if as_json:
        click.echo(json.dumps(answer))
        return
    console = Console()
    console.print(stages_table(answer, title))
    console.print(answer["layout"]["reason"])
    if answer["candidates"]:
        console.print(candidates_table(answer))
    if answer["losses"]:
        console.print(losses_table(answer))
    if actions:
        console.print(actions_table(answer))


# Questions ----------------------------------------------------------------------------------------------------------


def ask(question: Question) -> dict[str, Any]:
    """Have the planner answer. Raises ElasticError where there is no plan."""
    command = [sys.executable, "-m", "elastic.launch", "planner"]
    try:
        done = subprocess.run(
            command,
            env=current_environment(),
            input=json.dumps(question),
            capture_output=True,
            text=True,
            timeout=TIMEOUT_S,
        )
    except subprocess.TimeoutExpired:
        raise ElasticError(f"the planner did not answer within {TIMEOUT_S:.0f} s: ask about fewer layers") from None
    if done.returncode:
        said = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        raise ElasticError(f"the planner failed: {said[-1]}")
    answer: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    if "error" in answer:
        raise ElasticError(f"there is no plan: {answer['error']}")
    return answer


def question_of(reply: PlanReply) -> Question:
    """Return what the planner is asked about a job."""
    spec = reply.spec
    return {
        "model": {
            "layers": [asdict(layer) for layer in spec.layers],
            "slots": spec.slots,
            "virtual_replicas": spec.virtual_replicas,
            "stages": spec.stages,
            "memory_bytes": spec.memory_bytes,
            "schedule": spec.schedule,
            "ways": {
                "paths": [path.layers for path in reply.plan.paths],
                "path_of": reply.plan.path_of,
                "copies_ends": bool(reply.plan.copies),
            },
        },
        "workers": reply.plan.world_size,
        "recovery": {
            "snapshots": reply.takes_snapshots,
            "parity": reply.plan.parity_shards,
            "checkpoints": reply.keeps_checkpoints,
            "approximates": reply.approximates,
            "norm_exponent": reply.norm_exponent,
            "norms": reply.norms,
        },
        **_nodes_of(reply, reply.plan.world_size),
    }


def _nodes_of(reply: PlanReply, count: int) -> Question:
    nodes: dict[str, list[int]] = {}
    for member in reply.plan.members:
        if member.rank < count:
            nodes.setdefault(member.node, []).append(member.rank)
    return {"nodes": nodes}


def _ends(layers: range) -> tuple[int, int]:
    return layers.start, layers.stop


_LAYER_FIELDS = {
    "forward_ms": ("forward_s", 1e-3),
    "backward_ms": ("backward_s", 1e-3),
    "state_mib": ("state_bytes", MIB),
    "activation_mib": ("activation_bytes", MIB),
    "output_mib": ("output_bytes", MIB),
}
_FIELDS = {"workers", "speeds", "stages", "slots", "virtual_replicas", "schedule", "memory_gib", "link", "layers"}


def read_cluster(path: Path) -> Question:
    """Read a hypothetical cluster.

    Raises:
        ConfigError: the file cannot be read, or something in it makes no sense; names it.
    """
    try:
        fields = yaml.safe_load(path.read_text())
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{path} is not valid YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise ConfigError(f"{path} holds no table of settings: see docs/pipelines.md")
    if unknown := sorted(set(map(str, fields)) - _FIELDS):
        raise ConfigError(f"{path} has the unknown setting {unknown[0]!r}: there are {', '.join(sorted(_FIELDS))}")
    workers = _number(path, fields, "workers", int, least=1)
    schedule = fields.get("schedule", "1f1b")
    if schedule not in ("1f1b", "gpipe"):
        raise ConfigError(f"{path}: schedule is {schedule!r}: choose 1f1b or gpipe")
    link = fields.get("link") or {}
    return {
        "model": {
            "layers": _layers(path, fields.get("layers")),
            "slots": _number(path, fields, "slots", int, least=1),
            "virtual_replicas": _number(path, fields, "virtual_replicas", int, 1, least=1),
            "stages": _number(path, fields, "stages", int, 0),
            "memory_bytes": int(_number(path, fields, "memory_gib", float, 0.0) * GIB),
            "schedule": schedule,
            "link": {
                "latency_s": _number(path, link, "latency_us", float, 0.0) / 1e6,
                "bytes_per_s": _number(path, link, "gbit", float, 16.0, least=1e-6) * 1e9 / 8,
            },
        },
        "workers": workers,
        "speeds": _speeds(path, fields.get("speeds") or {}, workers),
        "nodes": {f"node{rank}": [rank] for rank in range(workers)},
    }


def _number(path: Path, fields: Mapping[str, Any], name: str, kind: type, default: Any = None, least: float = 0) -> Any:
    value = fields.get(name, default)
    if value is None:
        raise ConfigError(f"{path} does not say {name}: add it")
    if (
        isinstance(value, bool)
        or not isinstance(value, int | float)
        or (kind is int and value != int(value))
        or value < least
    ):
        raise ConfigError(f"{path}: {name} is {value!r}: give a number of at least {least:g}")
    return kind(value)


def _layers(path: Path, entries: object) -> list[dict[str, float]]:
    if not isinstance(entries, list) or not entries:
        raise ConfigError(f"{path} has no list of layers: give each (or `count` alike) its costs")
    layers: list[dict[str, float]] = []
    for entry in entries:
        if not isinstance(entry, dict) or (unknown := sorted(set(map(str, entry)) - {*_LAYER_FIELDS, "count"})):
            named = f" ({unknown[0]!r})" if isinstance(entry, dict) else ""
            raise ConfigError(f"{path}: {entry!r} is no layer{named}: there are count, {', '.join(_LAYER_FIELDS)}")
        layer = {
            field: kind(_number(path, entry, name, float, 0.0) * unit)
            for name, (field, unit) in _LAYER_FIELDS.items()
            for kind in (float if field.endswith("_s") else int,)
        }
        layers += [layer] * _number(path, entry, "count", int, 1, least=1)
    return layers


def _speeds(path: Path, speeds: object, workers: int) -> dict[str, float]:
    if not isinstance(speeds, dict):
        raise ConfigError(f"{path}: speeds is {speeds!r}: give a table of worker: speed, such as 3: 0.5")
    for rank, speed in speeds.items():
        if not isinstance(rank, int) or not 0 <= rank < workers or not isinstance(speed, int | float) or speed <= 0:
            raise ConfigError(
                f"{path}: speeds has {rank!r}: {speed!r}: name a worker below {workers} and a speed above 0"
            )
    return {str(rank): float(speed) for rank, speed in speeds.items()}


# How a plan looks ---------------------------------------------------------------------------------------------------


def stages_table(answer: Mapping[str, Any], title: str) -> Table:
    """Return the stages of a layout."""
    layout = answer["layout"]
    table = Table("stage", "layers", "ranks", "computes ms", "MiB", title=title)
    for number, (first, last, ranks) in enumerate(layout["stages"]):
        busy = ", ".join(f"{1000 * layout['busy_s'][rank]:.1f}" for rank in ranks)
        memory = max(layout["memory_bytes"][rank] for rank in ranks)
        table.add_row(str(number), f"{first}-{last - 1}", ", ".join(map(str, ranks)), busy, f"{memory / MIB:.1f}")
    table.caption = f"a step: {1000 * layout['step_s']:.1f} ms, of which workers wait {100 * layout['bubble']:.0f} %"
    return table


def candidates_table(answer: Mapping[str, Any]) -> Table:
    """Return what was considered."""
    table = Table("", "cuts", "step ms", "moves MiB", title="considered")
    for candidate in answer["candidates"]:
        cuts = " | ".join(f"{first}-{last - 1}" for first, last, _ in candidate["stages"])
        chosen = "chosen" if candidate["is_chosen"] else ""
        table.add_row(chosen, cuts, f"{1000 * candidate['step_s']:.1f}", f"{candidate['moved_bytes'] / MIB:.1f}")
    return table


def losses_table(answer: Mapping[str, Any]) -> Table:
    """Return what the loss of each node would lead to."""
    table = Table("lost node", "state comes from", "step ms", "what then", title="if a node is lost")
    for loss in answer["losses"]:
        step = f"{1000 * loss['step_s']:.1f}" if "step_s" in loss else "-"
        what = [loss["costs"], *([f"not from: {'; '.join(loss['passed_over'])}"] if loss["passed_over"] else [])]
        table.add_row(loss["node"], loss["rung"], step, ". ".join([*what, loss.get("reason") or loss.get("error", "")]))
    return table


def actions_table(answer: Mapping[str, Any]) -> Table:
    """Return the workers' actions: F, B with their slot, > and < for what is sent and received, R for the reduction."""
    table = Table("rank", "actions", title="a step: F forward, B backward, < received, > sent, R reduced")
    for rank, actions in answer["layout"]["actions"].items():
        words: Sequence[str] = [
            _SHORT[kind] + (str(slot) if kind in ("forward", "backward") else "") for kind, slot, _ in actions
        ]
        table.add_row(rank, " ".join(words))
    return table
