"""`elastic controller` and `elastic agent`: check the options, then become the daemon."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from elastic.cli import options
from elastic.config import default_run_dir
from elastic.errors import ConfigError
from elastic.wire.channels import parse_address


def daemon_command(name: str, settings: dict[str, Any]) -> list[str]:
    """Return the command line of a daemon."""
    return [sys.executable, "-m", "elastic.launch", name, json.dumps(settings)]


def metrics_settings(port: int | None, host: str, targets: Path | None = None) -> dict[str, Any]:
    """Return where a daemon shows its metrics, as its `__main__` reads it."""
    return {"port": port, "host": host, "targets": str(targets) if targets else ""}


def controller_settings(
    *,
    job: str,
    nnodes: tuple[int, int],
    max_restarts: int,
    failure_timeout: float,
    start_timeout: float,
    hang_timeout: float,
    join_timeout: float,
    snapshot_every: int,
    redundancy: tuple[int, int],
    approximate_recovery: bool,
    norm_exponent: float,
    approximate_moments: str,
    swap_ends: bool,
    skip_ratio: float,
    flops_per_sample: float,
    peak_flops: float,
    checkpoint_dir: str,
    checkpoint_every: int,
    checkpoint_keep: int,
    ledger: Path,
    host: str,
    port: int,
    port_file: Path | None = None,
    summary: Path | None = None,
    metrics_port: int | None = None,
    metrics_host: str = "127.0.0.1",
    metrics_targets: Path | None = None,
    log_format: str = "text",
    parent: int = 0,
) -> dict[str, Any]:
    """Check a controller's options and return what `controller.__main__` reads. Raises ConfigError."""
    if redundancy == options.AUTO_REDUNDANCY:
        redundancy = options.automatic_redundancy(nnodes[1])
    if sum(redundancy) > nnodes[1]:
        raise ConfigError(
            f"--redundancy {redundancy[0]}+{redundancy[1]} needs {sum(redundancy)} nodes, and --nnodes allows {nnodes[1]}: "
            f"with so many, K+M may be at most {nnodes[1]}; auto takes what they allow"
        )
    if checkpoint_dir and not snapshot_every:
        raise ConfigError("--checkpoint-dir writes snapshots from memory, and --snapshot-every 0 takes none: leave one out")
    if checkpoint_every and not checkpoint_dir:
        raise ConfigError("--checkpoint-every was given without a place for checkpoints: add --checkpoint-dir")
    if bool(flops_per_sample) != bool(peak_flops):
        raise ConfigError("--flops-per-sample and --peak-flops make the MFU together: give both, or neither")
    if swap_ends and skip_ratio:
        raise ConfigError("--swap-ends and --skip-ratio each say which way the slots of a pipeline go: leave one out")
    return {
        "settings": {
            "job": job,
            "nodes_min": nnodes[0],
            "nodes_max": nnodes[1],
            "max_restarts": max_restarts,
            "failure_timeout_s": failure_timeout,
            "start_timeout_s": start_timeout,
            "hang_timeout_s": hang_timeout,
            "join_timeout_s": join_timeout,
            "snapshot_every": snapshot_every,
            "data_shards": redundancy[0],
            "parity_shards": redundancy[1],
            "approximate": approximate_recovery,
            "norm_exponent": norm_exponent,
            "averages_moments": approximate_moments == "averaged",
            "swap_ends": swap_ends,
            "skip_ratio": skip_ratio,
            "flops_per_sample": flops_per_sample,
            "peak_flops": peak_flops,
            "checkpoint_target": _target(checkpoint_dir),
            "checkpoint_every": checkpoint_every,
            "checkpoint_keep": checkpoint_keep,
        },
        "ledger": str(ledger.absolute()),
        "host": host,
        "port": port,
        "port_file": str(port_file) if port_file else "",
        "summary": str(summary) if summary else "",
        "metrics": metrics_settings(metrics_port, metrics_host, metrics_targets),
        "log_format": log_format,
        "parent": parent,
    }


def _target(checkpoint_dir: str) -> str:
    """An address as it is, a directory from the root: daemons may run elsewhere."""
    return checkpoint_dir if not checkpoint_dir or "://" in checkpoint_dir else os.path.abspath(checkpoint_dir)


def agent_settings(
    *,
    controller: str,
    job: str,
    node_id: str | None,
    nproc_per_node: int,
    local_addr: str,
    log_dir: Path | None,
    quiet: bool,
    connect_timeout: float,
    controller_timeout: float,
    record_samples: Path | None,
    seed: int,
    share_memory: bool,
    gc_every: int,
    snapshot_memory: int | None,
    labels: tuple[str, ...],
    module: bool,
    script: str,
    arguments: tuple[str, ...],
    metrics_port: int | None = None,
    metrics_host: str = "127.0.0.1",
    metrics_targets: Path | None = None,
    log_format: str = "text",
    parent: int = 0,
) -> dict[str, Any]:
    """Check an agent's options and return what `agent.__main__` reads. Raises ConfigError."""
    options.check_script(script, module=module)
    parse_address(controller, what="--controller")
    return {
        "controller": controller,
        "job": job,
        "node": node_id or options.default_node_id(),
        "nproc": nproc_per_node,
        "local_addr": local_addr,
        "log_dir": str((log_dir or default_run_dir(job) / "logs").absolute()),
        "quiet": quiet,
        "connect_timeout_s": connect_timeout,
        "controller_timeout_s": controller_timeout,
        "record_dir": str(record_samples.absolute()) if record_samples else "",
        "seed": seed,
        "share_memory": share_memory,
        "gc_every": gc_every,
        "snapshot_memory_bytes": options.default_snapshot_memory() if snapshot_memory is None else snapshot_memory,
        "labels": options.parse_labels(labels),
        "metrics": metrics_settings(metrics_port, metrics_host, metrics_targets),
        "log_format": log_format,
        "script": {
            "argv": [script if module else str(Path(script).absolute()), *arguments],
            "module": module,
            "cwd": os.getcwd(),
        },
        "parent": parent,
    }


@click.command()
@options.job_name
@options.job_settings
@options.metrics_settings
@options.log_format
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option("--port", type=click.IntRange(0, 65535), default=options.DEFAULT_PORT, show_default=True,
              help="Port to listen on; 0 for any.")  # fmt: skip
@click.option("--ledger", type=click.Path(path_type=Path, dir_okay=False), default=None,
              help="File of the job's ledger [default: under the run directory].")  # fmt: skip
@click.option("--port-file", type=click.Path(path_type=Path), default=None, help="File to write the port to.")
@click.option("--summary", type=click.Path(path_type=Path), default=None, help="File for the summary, as JSON.")
def controller(ledger: Path | None, job: str, **given: Any) -> None:
    """Run the controller of a job; started again on its ledger, it resumes."""
    path = ledger or default_run_dir(job) / "ledger.sqlite"
    command = daemon_command("controller", controller_settings(job=job, ledger=path, **given))
    os.execv(command[0], command)


@click.command(context_settings=options.SCRIPT_CONTEXT)
@options.controller_address
@options.job_name
@options.agent_settings
@options.metrics_settings
@options.log_format
@options.script_arguments
def agent(**given: Any) -> None:
    """Run this node's agent: it starts SCRIPT in the job's workers and keeps them going."""
    command = daemon_command("agent", agent_settings(**given))
    os.execv(command[0], command)
