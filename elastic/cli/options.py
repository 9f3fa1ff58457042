"""Options that several commands share, each written once."""

from __future__ import annotations

import os
import socket
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click

from elastic.cadence import AUTO
from elastic.errors import ConfigError

DEFAULT_PORT = 29400
MEMORY_SHARE = 0.25  # of the machine's, for snapshots
F = TypeVar("F", bound=Callable[..., Any])


class NodeRange(click.ParamType[tuple[int, int]]):
    """`N` or `MIN:MAX`, as torchrun writes it."""

    name = "MIN:MAX"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        low, _, high = str(value).partition(":")
        try:
            span = int(low), int(high or low)
        except ValueError:
            self.fail(f"{value!r} is not a number or MIN:MAX", param, ctx)
        if not 1 <= span[0] <= span[1]:
            self.fail(f"{value!r} must have 1 <= MIN <= MAX", param, ctx)
        return span


class WorkerCount(click.ParamType[int]):
    """A number of workers, or `cpu` / `gpu` / `auto`, as torchrun writes it."""

    name = "N|cpu|gpu|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        if text in ("cpu", "gpu", "auto"):
            return _devices(text)
        if not text.isdigit() or int(text) < 1:
            self.fail(f"{value!r} is not a positive number, cpu, gpu or auto", param, ctx)
        return int(text)


class Cadence(click.ParamType[int]):
    """A number of steps, `auto`, or 0 for never."""

    name = "N|auto"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        if value == "auto" or value == AUTO:
            return AUTO
        if not str(value).isdigit():
            self.fail(f"{value!r} is not a number of steps, 0 or auto", param, ctx)
        return int(value)


AUTO_REDUNDANCY = (-1, -1)
"""In place of K and M: what the nodes allow."""


def automatic_redundancy(nodes: int) -> tuple[int, int]:
    """Return K and M for so many nodes: one of a few may be lost, two of six or more; of one alone, none."""
    if nodes < 2:
        return 0, 0
    return (4, 2) if nodes >= 6 else (nodes - 1, 1)


class Redundancy(click.ParamType[tuple[int, int]]):
    """`K+M` data and parity shards, `auto` or `off`."""

    name = "K+M|auto|off"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[int, int]:
        if isinstance(value, tuple):
            return value
        if value in ("off", "auto"):
            return (0, 0) if value == "off" else AUTO_REDUNDANCY
        data, _, parity = str(value).partition("+")
        if not data.isdigit() or not parity.isdigit() or not int(data) or not int(parity):
            self.fail(f"{value!r} is not K+M with at least one data and one parity shard, auto or off", param, ctx)
        return int(data), int(parity)


class MemorySize(click.ParamType[int]):
    """Bytes, such as 512MiB or 2GiB."""

    name = "SIZE"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> int:
        text = str(value)
        for unit, factor in {"KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "": 1}.items():
            number = text.removesuffix(unit).strip()
            if text.endswith(unit) and number.replace(".", "", 1).isdigit():
                return int(float(number) * factor)
        self.fail(f"{value!r} is not a number of bytes, KiB, MiB or GiB, such as 2GiB", param, ctx)


def _devices(kind: str) -> int:
    gpus = len([name for name in os.listdir("/dev") if name.removeprefix("nvidia").isdigit()])
    if kind == "gpu" and not gpus:
        raise ConfigError("--nproc-per-node gpu was given, but this machine shows no GPU: give a number or cpu")
    return gpus if gpus and kind != "cpu" else os.cpu_count() or 1


def together(*options: Callable[[F], F]) -> Callable[[F], F]:
    """Apply several options as one decorator."""

    def apply(command: F) -> F:
        for option in reversed(options):
            command = option(command)
        return command

    return apply


job_name = click.option("--job", "--rdzv-id", "--rdzv_id", "job", help="Name of the job.", default="job", show_default=True)

job_settings = together(
    click.option("--nnodes", type=NodeRange(), default="1:1", show_default="1:1", help="Nodes, or MIN:MAX."),
    click.option("--max-restarts", "--max_restarts", type=click.IntRange(0), default=3, show_default=True,
                 help="Restarts of one worker that fails by its own fault."),
    click.option("--failure-timeout", type=click.FloatRange(0.2, 600), default=2.0, show_default=True,
                 help="Longest silence that is believed, in seconds; the protocol's deadlines derive from it."),
    click.option("--start-timeout", type=click.FloatRange(1), default=600.0, show_default=True,
                 help="Longest wait for the first world, in seconds."),
    click.option("--hang-timeout", type=click.FloatRange(0), default=0.0, show_default="five steps, at least 10",
                 help="Longest time without progress in the script, in seconds."),
    click.option("--join-timeout", type=click.FloatRange(0), default=30.0, show_default=True,
                 help="With MIN nodes present, seconds that the first world waits for MAX."),
    click.option("--snapshot-every", type=Cadence(), default="auto", show_default=True,
                 help="Steps from one snapshot in the nodes' memory to the next; 0 for none."),
    click.option("--checkpoint-dir", default="", metavar="DIR|URL",
                 help="Where checkpoints are written and looked for: a directory, or an address of fsspec."),
    click.option("--checkpoint-every", type=click.IntRange(0), default=0, show_default="only when asked", metavar="STEPS",
                 help="Steps from one checkpoint to the next."),
    click.option("--keep", "checkpoint_keep", type=click.IntRange(1), default=2, show_default=True,
                 help="How many checkpoints stay."),
    click.option("--redundancy", type=Redundancy(), default="off", show_default=True,
                 help="Erasure code over the nodes' snapshots: K data and M parity shards; any M nodes may be lost."),
    click.option("--approximate-recovery", is_flag=True,
                 help="Of a pipeline: where nothing exact can be had, make a lost stage from its neighbours and go on."),
    click.option("--norm-exponent", type=click.FloatRange(0, 8), default=1.0, show_default=True,
                 help="To which gradient norms are raised where they weigh the neighbours of a lost stage."),
    click.option("--approximate-moments", type=click.Choice(["fresh", "averaged"]), default="fresh", show_default=True,
                 help="What the optimizer of an approximated layer begins with."),
    click.option("--swap-ends", is_flag=True,
                 help="Of a pipeline: every other slot passes the blocks at both ends in swapped order, so that the first and "
                 "the last stage, too, can be made from others; embedding and head are kept in duplicate."),
    click.option("--skip-ratio", type=click.FloatRange(0, 1, max_open=True), default=0.0, show_default=True,
                 help="Of a pipeline: the share of the stages that each slot passes by, never the first or the last."),
    click.option("--flops-per-sample", type=click.FloatRange(0), default=0.0, show_default="not known",
                 help="Floating-point operations that training on one sample takes (forward and backward); for the MFU metric."),
    click.option("--peak-flops", type=click.FloatRange(0), default=0.0, show_default="not known",
                 help="Floating-point operations per second that the devices of one worker can do; for the MFU metric."),
)  # fmt: skip

snapshot_memory = click.option(
    "--snapshot-memory", type=MemorySize(), default=None, show_default="a quarter of the machine's",
    help="Most memory of this node that snapshots may take.",
)  # fmt: skip

agent_settings = together(
    click.option("--nproc-per-node", "--nproc_per_node", "nproc_per_node", type=WorkerCount(), default="1",
                 show_default=True, help="Workers on this node."),
    click.option("--node-id", default=None, help="Name of this node [default: the host name]."),
    click.option("--local-addr", "--local_addr", default="127.0.0.1", show_default=True,
                 help="Address at which other nodes reach this one."),
    click.option("--log-dir", "--log_dir", type=click.Path(path_type=Path), default=None,
                 help="Directory for the workers' output [default: under the run directory]."),
    click.option("--quiet", is_flag=True, help="Keep the workers' output out of the console."),
    click.option("--connect-timeout", type=click.FloatRange(0.1), default=30.0, show_default=True,
                 help="Seconds that the first attach to the controller may take."),
    click.option("--controller-timeout", type=click.FloatRange(0.1), default=600.0, show_default=True,
                 help="Seconds that workers wait for a controller that does not answer any more."),
    click.option("--record-samples", type=click.Path(path_type=Path, file_okay=False), default=None,
                 help="Directory for a record of (step, slot, generation, sample ids)."),
    click.option("--seed", type=int, default=0, show_default=True, help="Seed of sampling and all randomness."),
    click.option("--share-memory/--no-share-memory", default=True, show_default=True,
                 help="Let workers of this node read each other's gradients in shared memory."),
    click.option("--gc-every", type=click.IntRange(0), default=0, show_default=True,
                 help="Steps from one garbage collection to the next, at the same step on all workers; 0: Python decides."),
    snapshot_memory,
    click.option("--label", "labels", multiple=True, metavar="KEY=VALUE", help="Label of this node (domain=..., island=...)."),
    click.option("-m", "--module", is_flag=True, help="SCRIPT is a module's name, as in python -m."),
)  # fmt: skip

metrics_settings = together(
    click.option("--metrics-port", type=click.IntRange(0, 65535), default=None, show_default="none",
                 help="Show metrics to Prometheus on this port; 0 for any that is free."),
    click.option("--metrics-host", default="127.0.0.1", show_default=True, help="Address that metrics are shown at."),
)  # fmt: skip

log_format = click.option(
    "--log-format", type=click.Choice(["text", "json"]), default="text", show_default=True,
    help="Lines for people, or as JSON with job, node, rank, generation and step.",
)  # fmt: skip

script_arguments = together(
    click.argument("script"),
    click.argument("arguments", nargs=-1, type=click.UNPROCESSED),
)

SCRIPT_CONTEXT = {"allow_interspersed_args": False}  # what follows SCRIPT is its own

controller_address = click.option(
    "--controller", default=f"127.0.0.1:{DEFAULT_PORT}", show_default=True, metavar="HOST:PORT",
    envvar="ELASTIC_CONTROLLER", help="Address of the controller.",
)  # fmt: skip

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON for machines.")


def check_script(script: str, *, module: bool) -> None:
    """Raise ConfigError when the script is not there."""
    if not module and not Path(script).is_file():
        raise ConfigError(f"there is no script {script!r}: check the path (or use -m for a module)")


def default_snapshot_memory() -> int:
    """Return how many bytes snapshots may take unless told otherwise."""
    return int(MEMORY_SHARE * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def default_node_id() -> str:
    """Return this machine's name."""
    return socket.gethostname()


def parse_labels(labels: tuple[str, ...]) -> dict[str, str]:
    """Return KEY=VALUE options as a dictionary."""
    parsed = {}
    for label in labels:
        key, equals, value = label.partition("=")
        if not equals or not key:
            raise ConfigError(f"--label {label!r} is not KEY=VALUE")
        parsed[key] = value
    return parsed
