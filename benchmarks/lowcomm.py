"""What it costs and what it saves to agree rarely: losses at equal samples, steps over a slow link, and nodes that come and go.

    python -m benchmarks.lowcomm [--quick] [--json] [--seeds N] [--parts loss,link,churn] [--plot DIR]

Four ways to train the same byte-level GPT (0.2 million parameters) with four replicas: `ddp`, which sums the gradient of every
step, `diloco`, `streaming_diloco` (two fragments), both with an outer heavy ball of 0.7 and 0.3, and `noloco`; and diloco in few
bits. Each replica sees the same number of samples, with one cosine schedule over its local steps.

    loss        nats per byte on windows that are never trained on, after 400 local steps in 40 rounds, from where 1,200 steps of
                `ddp` have brought the model (with --scratch: from nothing); medians over seeds with order-statistic intervals,
                over ddp's of the same seed. `noloco` is the mean of all replicas; its spread is their root mean square distance
                from that, in the last round, and `spread_follows_rate` the correlation of both over the last half of the rounds.
                Most in one process, since the bits do not depend on the workers. `async` gives by two turns; in `half_dropped`
                half of what replicas give is lost, at random, and they go on from where they are: over `all_given`.
    link        four nodes with a worker each, on hosts of their own at 20 Mbit/s and 40 ms from one to another, 100 local steps
                from one exchange to the next (streaming: of a fragment, with an overlap of 20): samples a second, over ddp's,
                and the bytes that a node sends for an exchange, at its interface, over the formula: 2 P (N-1)/N x 4, a
                fragment's share of it, or 2 P x 4 for a pair; times what Ethernet, IP and TCP add to full packets and to their
                acknowledgements. Needs the right to make network namespaces.
    churn       `benchmarks.churn` for diloco and noloco, dealt by speed: goodput, hangs, and whether replicas stay together.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import subprocess
import sys
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks import churn
from benchmarks.logs import read_lines
from benchmarks.netlab import Lab, Wire, obstacle
from benchmarks.network import LabCluster
from benchmarks.paired import median_interval
from benchmarks.report import Reporter, command, main_of, pyplot
from benchmarks.train_sync import BATCH, CONTEXT, DIM, FRAGMENTS, LAYERS, REPLICAS
from elastic.sync.advice import Site, exchange_bytes, pair_bytes
from examples.cluster import ROOT, Cluster, ClusterError
from examples.gpt import GPT

WAYS: dict[str, tuple[str, ...]] = {
    "ddp": ("--sync", "ddp"),
    "diloco": ("--sync", "diloco"),
    "diloco_int8": ("--sync", "diloco", "--quantize", "int8"),
    "diloco_fp4": ("--sync", "diloco", "--quantize", "fp4"),
    "streaming_diloco": ("--sync", "streaming_diloco"),
    "noloco": ("--sync", "noloco"),
    "async": ("--sync", "async"),
    "all_given": ("--sync", "async", "--turns", "1"),
    "half_dropped": ("--sync", "async", "--turns", "1", "--drop", "0.5"),
}
TOGETHER = ("noloco", "async", "all_given", "half_dropped")
"""What takes a worker for each replica."""
NODES = ("a", "b", "c", "d")
RATE, DELAY_MS = "20mbit", 20.0
"""Of each host; from one to another there are two wires."""
ALONE_S, START_S, RUN_S = 900.0, 120.0, 300.0
LINK_EVERY = 100
LINK_ROUNDS = {"ddp": 24, "diloco": 8, "streaming_diloco": 14, "noloco": 8}
LINK_OVERLAP = 20
"""Local steps that streaming_diloco takes during an exchange."""
SETTLED = 2
"""Commits before which nothing is counted."""
SEGMENT, HEADERS = 1448, 66
"""Bytes of a full TCP segment on Ethernet, and of what is before it; every second one is acknowledged by headers alone."""
PRETRAINED_STEPS, PRETRAINED_SEED = 1200, 1000
CHURN_MINUTES = 10.0


def lines_of(folder: Path) -> list[dict[str, Any]]:
    """Return what the workers wrote, in the order of time."""
    return sorted(read_lines(folder), key=lambda line: line["clock_s"])


def alone(folder: Path, *flags: str) -> list[dict[str, Any]]:
    """Train in one process; returns what it wrote. Raises ClusterError if it fails."""
    script = [sys.executable, "-m", "benchmarks.train_sync", "--log", str(folder), *flags]
    done = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, timeout=ALONE_S, check=False)
    if done.returncode:
        raise ClusterError(f"{' '.join(flags)}: {done.stderr.strip().splitlines()[-1]}")
    return lines_of(folder)


def together(folder: Path, *flags: str) -> list[dict[str, Any]]:
    """Train with a worker for each replica; returns what they wrote. Raises ClusterError if they fail."""
    folder.mkdir()
    script = ["-m", "benchmarks.train_sync", "--log", str(folder / "steps"), *flags]
    with Cluster(folder, script) as cluster:
        cluster.start_controller()
        cluster.start_agent("n0", REPLICAS)
        if cluster.wait_for_end(ALONE_S) != 0:
            raise ClusterError(f"the job failed{cluster.last_words()}")
    return lines_of(folder / "steps")


def losses(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> dict[str, dict[str, Any]]:
    """Train all ways with several seeds; returns the figures of each."""
    seeds = arguments.seeds or (1 if arguments.quick else 5)
    begin: tuple[str, ...] = ()
    if not arguments.scratch:
        reporter.say(f"training {PRETRAINED_STEPS} steps to begin with")
        begin = ("--weights", str(folder / "begin.pt"))
        steps = ("--local-steps", str(PRETRAINED_STEPS), "--seed", str(PRETRAINED_SEED))
        alone(folder / "begin", "--sync", "ddp", *steps, "--save", begin[1])
    runs: dict[str, list[list[dict[str, Any]]]] = {name: [] for name in WAYS}
    for seed in range(seeds):
        flags = {name: (*way, *begin, "--seed", str(seed)) for name, way in WAYS.items()}
        with ThreadPoolExecutor(2) as pool:
            jobs = {
                name: pool.submit(alone, folder / f"{name}-{seed}", *flags[name]) for name in WAYS if name not in TOGETHER
            }
            for name, job in jobs.items():
                runs[name].append(job.result())
        for name in TOGETHER:
            runs[name].append(together(folder / f"{name}-{seed}", *flags[name]))
        said = ", ".join(f"{name} {found[-1][-1]['loss']:.4f}" for name, found in runs.items())
        reporter.say(f"seed {seed}: {said}")
    report: dict[str, dict[str, Any]] = {name: {} for name in WAYS}
    ddp = [run[-1]["loss"] for run in runs["ddp"]]
    for name, found in runs.items():
        last = [run[-1]["loss"] for run in found]
        report[name]["loss"], report[name]["loss_ci"] = _interval(last)
        paired = [mine / theirs for mine, theirs in zip(last, ddp, strict=True)]
        report[name]["loss_over_ddp"], report[name]["loss_over_ddp_ci"] = _interval(paired)
    given = [run[-1]["loss"] for run in runs["all_given"]]
    dropped = [run[-1]["loss"] / theirs for run, theirs in zip(runs["half_dropped"], given, strict=True)]
    report["half_dropped"]["loss_over_all_given"], report["half_dropped"]["loss_over_all_given_ci"] = _interval(dropped)
    told = [[line for line in run if line["rank"] == 0 and "spread" in line] for run in runs["noloco"]]
    report["noloco"]["spread"], report["noloco"]["spread_ci"] = _interval([run[-1]["spread"] for run in told])
    following = [_follows(run[len(run) // 2 :]) for run in told]
    report["noloco"]["spread_follows_rate"], report["noloco"]["spread_follows_rate_ci"] = _interval(following)
    if arguments.plot:
        _draw(runs, Path(arguments.plot))
    return report


def _follows(lines: Sequence[dict[str, Any]]) -> float:
    """Pearson's correlation of spread and learning rate; what a round tells is of the one before."""
    pairs = [(later["spread"], line["lr"]) for line, later in itertools.pairwise(lines)]
    return statistics.correlation(*zip(*pairs, strict=True))


def over_the_link(folder: Path, strategy: str, reporter: Reporter) -> dict[str, float]:
    """Return samples per second over a slow link, and bytes per exchange over the formula."""
    folder.mkdir()
    every = 1 if strategy == "ddp" else LINK_EVERY // FRAGMENTS if strategy == "streaming_diloco" else LINK_EVERY
    rounds = LINK_ROUNDS[strategy]
    script = [
        *("-m", "benchmarks.train_sync", "--sync", strategy, "--every", str(every), "--log", str(folder / "steps")),
        *("--local-steps", str(rounds * every), "--mean-every", str(rounds + 1)),
        *(("--overlap", str(LINK_OVERLAP), "--mixing", "0.5") if strategy == "streaming_diloco" else ()),
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
    formula = _formula_bytes(strategy)
    bytes_each = statistics.mean(after[node] - sent[node] for node in NODES) / max(1, last - first)
    reporter.say(f"{strategy}: {samples / seconds:.1f} samples a second, {bytes_each / 2**20:.2f} MiB an exchange")
    return {"samples_per_s": samples / seconds, "bytes_over_formula": bytes_each / formula}


def _formula_bytes(strategy: str) -> float:
    """Bytes that a node sends for an exchange, with what they are packed in, and the acknowledgements of as many that come."""
    site = Site(sum(p.numel() for p in GPT(DIM, LAYERS, CONTEXT).parameters()), len(NODES), 1.0, 0.0, 1.0)
    exchanged = pair_bytes(site) if strategy == "noloco" else exchange_bytes(site)
    if strategy == "streaming_diloco":
        exchanged /= FRAGMENTS
    return exchanged * (1 + 1.5 * HEADERS / SEGMENT)


def _sent_bytes(lab: Lab) -> dict[str, int]:
    def read(node: str) -> int:
        show = [*lab.inside(node), "cat", "/sys/class/net/eth0/statistics/tx_bytes"]
        return int(subprocess.run(show, capture_output=True, text=True, timeout=30, check=True).stdout)

    return {node: read(node) for node in NODES}


def measure(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
    """Do all parts that are asked for; returns the report."""
    parts = arguments.parts.split(",")
    if arguments.plot:
        pyplot()  # before anything is trained for pictures that cannot be drawn
    report: dict[str, Any] = {"strategies": {name: {} for name in WAYS}}
    is_sound = True
    if "loss" in parts:
        for name, found in losses(arguments, folder, reporter).items():
            report["strategies"][name] |= found
    if "link" in parts and (why := obstacle()):
        reporter.say(f"no link: {why}")
    elif "link" in parts:
        for name in LINK_ROUNDS:
            report["strategies"][name] |= over_the_link(folder / f"link-{name}", name, reporter)
        slowest = report["strategies"]["ddp"]["samples_per_s"]
        for name in LINK_ROUNDS:
            found = report["strategies"][name]
            found["samples_per_s_over_ddp"] = found["samples_per_s"] / slowest
    if "churn" in parts:
        minutes = arguments.churn_minutes or (1.0 if arguments.quick else CHURN_MINUTES)
        several = {
            name: churn.run(folder / f"churn-{name}", name, minutes, reporter, dynamic=True) for name in ("diloco", "noloco")
        }
        report["churn"] = {
            "goodput": min(found["goodput"] for found in several.values()),
            "hangs": sum(found["hangs"] for found in several.values()),
            **several,
        }
        is_sound = all(churn.is_sound(found) for found in several.values())
    return report, is_sound


def _interval(values: Sequence[float]) -> tuple[float, list[float]]:
    low, high = median_interval(values)
    return round(statistics.median(values), 5), [round(low, 5), round(high, 5)]


def _draw(runs: dict[str, list[list[dict[str, Any]]]], folder: Path) -> None:
    """Write a picture: losses of all seeds over ddp's, and spread and rate of noloco's first."""
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4))
    ddp = [run[-1]["loss"] for run in runs["ddp"]]
    for place, found in enumerate(runs.values()):
        over = [100 * (run[-1]["loss"] / other - 1) for run, other in zip(found, ddp, strict=True)]
        left.plot([place] * len(over), over, "o", alpha=0.5)
        left.plot([place - 0.2, place + 0.2], [statistics.median(over)] * 2, "k-")
    left.set_xticks(range(len(runs)), [name.replace("_", "\n") for name in runs])
    left.set_ylabel("loss above ddp's, %")
    lines = [line for line in runs["noloco"][0] if line["rank"] == 0 and "spread" in line]
    right.plot([line["step"] for line in lines], [line["spread"] for line in lines], label="spread")
    right.set_xlabel("round of noloco")
    right.set_ylabel("spread of replicas")
    rate = right.twinx()
    rate.plot([line["step"] for line in lines], [line["lr"] for line in lines], "k--", label="learning rate")
    rate.set_ylabel("learning rate (dashed)")
    figure.tight_layout()
    figure.savefig(folder / "lowcomm.svg")
    plt.close(figure)


def tabulate(report: dict[str, Any]) -> Table:
    """Return the report for people."""
    table = Table("sync", "loss", "over ddp", "samples a second", "over ddp", "bytes over formula")
    for name, found in report["strategies"].items():
        texts = ["-", "-"]
        if "loss" in found:
            low, high = found["loss_over_ddp_ci"]
            texts = [f"{found['loss']:.4f}", f"{found['loss_over_ddp']:.4f} ({low:.4f} .. {high:.4f})"]
        keys = ("samples_per_s", "samples_per_s_over_ddp", "bytes_over_formula")
        table.add_row(name, *texts, *(f"{found[key]:.2f}" if key in found else "-" for key in keys))
    noloco, said = report["strategies"]["noloco"], []
    if "loss_over_all_given" in report["strategies"].get("half_dropped", {}):
        said.append(f"half dropped over all given {report['strategies']['half_dropped']['loss_over_all_given']:.4f}")
    if "spread" in noloco:
        said.append(f"noloco's spread {noloco['spread']:.2e}, follows the rate by {noloco['spread_follows_rate']:.2f}")
    for name in ("diloco", "noloco"):
        if "churn" in report:
            said.append(f"churn of {name}: {churn.told(report['churn'][name])}")
    table.caption = "\n".join(said)
    return table


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--seeds", type=int, default=0, help="[5; with --quick 1]")
    parser.add_argument("--parts", default="loss,link,churn", help="[all]")
    parser.add_argument("--scratch", action="store_true", help="begin with a model that has not learnt anything")
    parser.add_argument("--churn-minutes", type=float, default=0.0, help="for each of two [10; with --quick 1]")
    parser.add_argument("--plot", default="", metavar="DIR", help="write a picture here")
    return main_of(parser, measure, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())
