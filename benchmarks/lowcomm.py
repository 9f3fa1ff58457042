"""What it costs and what it saves to agree rarely: losses at equal samples, and steps over a slow link.

    python -m benchmarks.lowcomm [--quick] [--json] [--seeds N]

Two ways to train the same byte-level GPT (0.2 million parameters) with four replicas: `ddp`, which sums the gradient of every
step, and `diloco` (every=10 for the losses, 100 for the link). Each replica sees the same number of samples, with one cosine
schedule over its local steps.

    loss        nats per byte on windows that are never trained on, after 400 local steps (40 rounds); medians over seeds with
                order-statistic intervals, and paired over ddp's. In one process: the bits do not depend on the workers.
    link        four nodes with a worker each, on hosts of their own at 20 Mbit/s and 40 ms from one to another: samples a second,
                over ddp's, and the bytes that a node sends for an exchange of the model, at its interface, over the formula
                2 P (N-1)/N x 4 bytes. Needs the right to make network namespaces.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.netlab import Lab, Wire, obstacle
from benchmarks.network import LabCluster
from benchmarks.paired import median_interval
from benchmarks.report import Reporter, command, main_of
from benchmarks.train_sync import BATCH, CONTEXT, REPLICAS
from elastic.sync.advice import Site, exchange_bytes
from examples.cluster import ROOT, ClusterError
from examples.gpt import GPT

STRATEGIES = ("ddp", "diloco")
NODES = ("a", "b", "c", "d")
RATE, DELAY_MS = "20mbit", 20.0
"""Of each host; from one to another there are two wires."""
ALONE_S, START_S, RUN_S = 600.0, 120.0, 300.0
LINK_ROUNDS = {"ddp": 24, "diloco": 4}
LINK_EVERY = 100
SETTLED = 2
"""Commits before which nothing is counted."""


def lines_of(folder: Path) -> list[dict[str, float]]:
    """Return what the workers wrote, in the order of time."""
    lines = [json.loads(line) for log in folder.glob("*.jsonl") for line in log.read_text().splitlines()]
    return sorted(lines, key=lambda line: line["clock_s"])


def loss_of(folder: Path, strategy: str, seed: int) -> float:
    """Return the loss that a training in one process ends with. Raises ClusterError if it fails."""
    script = [sys.executable, "-m", "benchmarks.train_sync", "--sync", strategy, "--seed", str(seed), "--log", str(folder)]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=ALONE_S, check=False)
    if done.returncode:
        raise ClusterError(f"{strategy}, seed {seed}: {done.stderr.strip().splitlines()[-1]}")
    return lines_of(folder)[-1]["loss"]


def over_the_link(folder: Path, strategy: str, reporter: Reporter) -> dict[str, float]:
    """Return samples per second over a slow link, and bytes per exchange over the formula."""
    folder.mkdir()
    every = LINK_EVERY if strategy == "diloco" else 1
    rounds = LINK_ROUNDS[strategy]
    script = [
        *("-m", "benchmarks.train_sync", "--sync", strategy, "--every", str(every), "--log", str(folder / "steps")),
        *("--local-steps", str(rounds * every)),
    ]
    wire = Wire(delay_ms=DELAY_MS)
    lab = Lab("controller", *NODES, wires=dict.fromkeys(NODES, wire))
    with lab, LabCluster(lab, folder, script, len(NODES)) as cluster:
        cluster.start_controller()
        for node in NODES:
            cluster.start_agent(node)
        cluster.wait("a world trains", lambda: cluster.status().world_size == len(NODES), START_S)
        for node in NODES:
            lab.rate(node, RATE)
        cluster.wait("some steps are committed", lambda: cluster.status().step >= SETTLED, RUN_S)
        first, sent = cluster.status().step, _sent_bytes(lab)
        cluster.wait("the last step comes near", lambda: cluster.status().step >= rounds - 1, RUN_S)
        last, after = cluster.status().step, _sent_bytes(lab)
        cluster.wait_for_end(RUN_S)
    commits = [line for line in lines_of(folder / "steps") if line["rank"] == 0 and "loss" not in line]
    timed = [line for line in commits if line["step"] >= SETTLED]
    seconds = timed[-1]["clock_s"] - timed[0]["clock_s"]
    samples = (timed[-1]["local_steps"] - timed[0]["local_steps"]) * BATCH * REPLICAS
    parameters = sum(p.numel() for p in GPT(64, 4, CONTEXT).parameters())
    formula = exchange_bytes(Site(parameters, len(NODES), 1.0, 0.0, 1.0))
    bytes_each = statistics.mean(after[node] - sent[node] for node in NODES) / max(1, last - first)
    reporter.say(f"{strategy}: {samples / seconds:.1f} samples a second, {bytes_each / 2**20:.2f} MiB an exchange")
    return {"samples_per_s": samples / seconds, "bytes_over_formula": bytes_each / formula}


def _sent_bytes(lab: Lab) -> dict[str, int]:
    def read(node: str) -> int:
        show = [*lab.inside(node), "cat", "/sys/class/net/eth0/statistics/tx_bytes"]
        return int(subprocess.run(show, capture_output=True, text=True, timeout=30, check=True).stdout)

    return {node: read(node) for node in NODES}


def measure(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
    """Train all ways; returns the report."""
    seeds = arguments.seeds or (1 if arguments.quick else 5)
    losses: dict[str, list[float]] = {strategy: [] for strategy in STRATEGIES}
    for seed in range(seeds):
        for strategy in STRATEGIES:
            losses[strategy].append(loss_of(folder / f"{strategy}-{seed}", strategy, seed))
        reporter.say(f"seed {seed}: " + ", ".join(f"{name} {values[-1]:.4f}" for name, values in losses.items()))
    report: dict[str, Any] = {"seeds": seeds, "strategies": {strategy: {} for strategy in STRATEGIES}}
    for strategy, found in report["strategies"].items():
        found["loss"], found["loss_ci"] = _interval(losses[strategy])
        paired = [mine / theirs for mine, theirs in zip(losses[strategy], losses["ddp"], strict=True)]
        found["loss_over_ddp"], found["loss_over_ddp_ci"] = _interval(paired)
    if why := obstacle():
        reporter.say(f"no link: {why}")
    else:
        for strategy, found in report["strategies"].items():
            found |= over_the_link(folder / f"link-{strategy}", strategy, reporter)
        slowest = report["strategies"]["ddp"]["samples_per_s"]
        for found in report["strategies"].values():
            found["samples_per_s_over_ddp"] = found["samples_per_s"] / slowest
    return report, True


def _interval(values: Sequence[float]) -> tuple[float, list[float]]:
    low, high = median_interval(values)
    return round(statistics.median(values), 4), [round(low, 4), round(high, 4)]


def tabulate(report: dict[str, Any]) -> Table:
    """Return the report for people."""
    table = Table("sync", "loss", "over ddp", "samples a second", "over ddp", "bytes over formula")
    for name, found in report["strategies"].items():
        low, high = found["loss_over_ddp_ci"]
        losses = (f"{found['loss']:.4f}", f"{found['loss_over_ddp']:.4f} ({low:.4f} .. {high:.4f})")
        keys = ("samples_per_s", "samples_per_s_over_ddp", "bytes_over_formula")
        table.add_row(name, *losses, *(f"{found[key]:.2f}" if key in found else "-" for key in keys))
    return table


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--seeds", type=int, default=0, help="[5; with --quick 1]")
    return main_of(parser, measure, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())
