"""What failures cost a pipeline: the same trace of killed nodes with checkpoints, an erasure code, CheckFree and CheckFree+.

    python -m benchmarks.failures [--quick] [--json] [--rates 5,10,16] [--seeds N] [--steps N] [--plot DIR]

Six nodes with one worker each train a byte-level GPT of six blocks, a stage on each, from where 1,200 steps in one process have
brought it (past the plateau where it knows pairs of bytes only). A trace says after which step the node of which stage is
killed: its agent and worker by SIGKILL, with all that they have in memory, and the node is started again 6 s later. Failures are
drawn for each stage and step with one probability: that of the published 5, 10 and 16 % an hour, scaled alike so that 5 % has
five failures to expect, and drawn again if there are fewer; none before step 50. After step 40 each job
waits until its first checkpoint is written, and its clock begins. All methods are run on the same traces and batches:

    none         nothing is killed
    checkpoint   snapshots of every 25th step, written as checkpoints; every loss of a stage goes back to the newest one
    checkfree    the same, but a stage between two others is made from them (--approximate-recovery), and only the loss of the
                 first or the last one goes back to a checkpoint
    checkfree+   with swapped ends, too: nothing goes back
    erasure      snapshots of each step with a code of 4+2: nothing is approximated, at most two committed steps are redone
    redundant    modelled, not run: the losses of `none`, in the time of `none` times 151.04/91.35, what the paper's redundant
                 computation takes

Of each there are the seconds from step 40 to the last, the steps that were done again, the approximations, and two
losses on windows that are never trained on (straight through all layers): after the last step, and at the time when `none` was
done with it. Losses are given less that of `none` with the same seed; medians with order-statistic intervals over seeds.
`swap_cost` is what swapped ends cost without any failure, which is part of checkfree+'s losses. --plot writes the curves as
pictures, and needs matplotlib (pip install 'elastic-runtime[plots]').
"""

from __future__ import annotations

import argparse
import itertools
import random
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.table import Table

from benchmarks.logs import read_lines
from benchmarks.lone_gpt import CONTEXT, Training
from benchmarks.paired import median_interval
from benchmarks.report import Reporter, command, main_of, pyplot
from examples.cluster import Cluster, ClusterError
from examples.gpt import Windows

NODES = 6
EVERY = 25
BASE = ("--join-timeout", "10", "--max-restarts", "1000")
CHECKPOINTS = ("--snapshot-every", str(EVERY), "--checkpoint-every", str(EVERY))
METHODS: dict[str, tuple[str, ...]] = {
    "none": ("--snapshot-every", "0"),
    "checkpoint": CHECKPOINTS,
    "checkfree": (*CHECKPOINTS, "--approximate-recovery"),
    "checkfree+": (*CHECKPOINTS, "--approximate-recovery", "--swap-ends"),
    "erasure": ("--snapshot-every", "1", "--redundancy", "4+2"),
}
REDUNDANT = 151.04 / 91.35
"""How much longer an iteration takes with redundant computation (CheckFree, table 2, at 5 %)."""
PRETRAINED_STEPS = 1200
FAILURES_MIN = 5
LOWEST_RATE = 5.0
"""That rate, in per cent an hour, has so many failures to expect."""
HOLD_STEP, MARGIN_STEPS = 40, 10
"""After this step all wait until the first checkpoint is there; no node is killed before, or so late that it is not seen."""
START_S, RUN_S = 120.0, 900.0
REPLACED_S, POLL_S = 6.0, 0.1
"""A node that was killed is started again after so long."""

Trace = tuple[tuple[int, int], ...]
"""(step, stage): after this step the stage's node is killed."""


def draw_trace(rate: float, steps: int, seed: int) -> Trace:
    """Return which stages are lost when; at least `FAILURES_MIN`."""
    probability = FAILURES_MIN * rate / LOWEST_RATE / (NODES * (steps - HOLD_STEP - 2 * MARGIN_STEPS))
    for attempt in itertools.count():
        dice = random.Random(f"{rate} {seed} {attempt}")
        places = itertools.product(range(HOLD_STEP + MARGIN_STEPS, steps - MARGIN_STEPS), range(NODES))
        trace = tuple(place for place in places if dice.random() < probability)
        if len(trace) >= FAILURES_MIN:
            return trace
    raise AssertionError("dice are thrown for ever")


@dataclass(frozen=True, slots=True)
class Run:
    """One training.

    Attributes:
        seconds: from the step that all hold at to the last. curve: (seconds, step, loss) of each evaluation, in order of time.
        redone: steps that were done again, the interrupted ones among them. approximated: how often. killed: nodes.
    """

    seconds: float
    curve: tuple[tuple[float, int, float], ...]
    redone: int
    approximated: int
    killed: int

    def last_loss(self) -> float:
        """Return the loss after the last step."""
        return self.curve[-1][2]

    def loss_at(self, seconds: float) -> float:
        """Return the newest loss that was known at a time."""
        return [loss for at, _, loss in self.curve if at <= seconds][-1]


class Nodes:
    """A job, whose nodes are killed as a trace says."""

    def __init__(self, cluster: Cluster) -> None:
        self._cluster = cluster
        self._away: list[tuple[float, str]] = []  # when a node comes back
        self.killed = 0

    def _is_at(self, step: int) -> bool:
        self._replace()
        return self._cluster.status().step >= step

    def _are_all_here(self) -> bool:
        return self._is_at(0) and self._cluster.status().world_size == NODES

    def _replace(self) -> None:
        """Start the nodes whose time has come."""
        due = [node for at_s, node in self._away if at_s <= time.monotonic()]
        self._away = [(at_s, node) for at_s, node in self._away if node not in due]
        for node in due:
            self._cluster.start_agent(node)

    def start(self) -> None:
        """Start the nodes, and wait until they train."""
        for number in range(NODES):
            self._cluster.start_agent(f"n{number}")
        self._cluster.wait_for_world(NODES, START_S)

    def take_through(self, trace: Trace, *, is_calm: bool) -> None:
        """Kill what is due, each time a step is committed for the first time; `is_calm` waits until all nodes train."""
        for step, stage in trace:
            if is_calm:
                self._cluster.wait("all nodes train", self._are_all_here, RUN_S)
            self._cluster.wait(f"step {step} is committed", lambda step=step: self._is_at(step), RUN_S)
            plan = self._cluster.plan()
            if not plan.stages:
                continue
            rank = plan.stages[min(stage, len(plan.stages) - 1)].ranks[0]
            node = plan.members[rank].node
            self._cluster.kill_node(node)
            self.killed += 1
            self._away.append((time.monotonic() + REPLACED_S, node))
        while self._away:
            time.sleep(POLL_S)
            self._replace()


def run_once(
    folder: Path,
    options: Sequence[str],
    weights: Path,
    steps: int,
    seed: int,
    trace: Trace,
    *,
    eval_every: int = 20,
    is_calm: bool = False,
) -> tuple[Run, list[dict[str, Any]]]:
    """Train once; returns what came of it, and what the workers wrote. Raises ClusterError if the job failed."""
    folder.mkdir(parents=True)
    script = [
        *("-m", "benchmarks.train_failures", "--weights", str(weights), "--steps", str(steps), "--seed", str(seed)),
        *("--log", str(folder / "steps"), "--eval-every", str(eval_every)),
        *("--hold-after", str(HOLD_STEP), "--go", str(folder / "go")),
    ]
    where = ("--checkpoint-dir", str(folder / "checkpoints")) if "--checkpoint-every" in options else ()
    with Cluster(folder, script, nodes_max=NODES, controller_options=(*BASE, *options, *where)) as cluster:
        cluster.start_controller()
        nodes = Nodes(cluster)
        nodes.start()
        if where:
            # Of whichever step: a pipeline that was cut anew before captures at once, and not again until all hold.
            cluster.wait("a checkpoint is written", lambda: cluster.status().saved > 0, START_S)
        begin_s = time.monotonic()
        (folder / "go").touch()
        nodes.take_through(trace, is_calm=is_calm)
        if cluster.wait_for_end(RUN_S) != 0:
            raise ClusterError(f"the job failed{cluster.last_words()}")
        summary = cluster.summary()
    lines = read_lines(folder / "steps")
    done_s = max(line["clock_s"] for line in lines if line["step"] == steps) - begin_s
    evaluated = sorted((line["clock_s"] - begin_s, line["step"], line["loss"]) for line in lines if "loss" in line)
    # All workers say the same within a moment of each other.
    curve = [each for at, each in enumerate(evaluated) if at == 0 or each[1:] != evaluated[at - 1][1:]]
    redone = sum(incident["steps_redone"] for incident in summary["incidents"])
    return Run(done_s, tuple(curve), redone, len(summary["approximations"]), nodes.killed), lines


def pretrain(folder: Path, reporter: Reporter, text: Windows, steps: int = PRETRAINED_STEPS, swapped: bool = False) -> Path:
    """Train in one process, and write the layers to a file."""
    reporter.say(f"training {steps} steps in one process" + (", with swapped ends" if swapped else ""))
    training = Training(0, text, swapped=swapped)
    training.train(steps)
    path = folder / f"weights{'-swapped' if swapped else ''}.pt"
    torch.save([training.layers[number].module.state_dict() for number in range(len(training.layers))], path)
    return path


def embedding_is_kept(folder: Path, reporter: Reporter) -> bool:
    """Return whether the embedding has the same bits wherever it is held, before and after its stage is killed."""
    text = Windows(CONTEXT)
    weights = pretrain(folder, reporter, text, steps=1)
    reporter.say("a job of six workers loses its first stage twice")
    options, trace, steps = METHODS["checkfree+"], ((60, 0), (90, 0)), 400
    _, lines = run_once(folder / "embedding", options, weights, steps, 0, trace, eval_every=1000, is_calm=True)
    # Whoever is killed may have been the only one to commit its last step: in the next world that is another one.
    seen: dict[tuple[int, int], set[int]] = {}
    owners: dict[tuple[int, int], set[bool]] = {}
    for line in lines:
        if "embedding" in line:
            where = line["step"], line["generation"]
            seen.setdefault(where, set()).add(line["embedding"])
            owners.setdefault(where, set()).add(line["is_owner"])
    both = sum(len(each) == 2 for each in owners.values())
    is_whole = {step for step, _ in seen} == set(range(1, steps + 1))
    return is_whole and all(len(crcs) == 1 for crcs in seen.values()) and both > steps // 2


def measure(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
    """Run all methods on all traces; returns the report."""
    rates = [float(rate) for rate in (arguments.rates or ("10" if arguments.quick else "5,10,16")).split(",")]
    if arguments.plot:
        pyplot()  # before anything is trained for pictures that cannot be drawn
    seeds, text = arguments.seeds or (1 if arguments.quick else 5), Windows(CONTEXT)
    torch.set_num_threads(1)
    weights = {swapped: pretrain(folder, reporter, text, swapped=swapped) for swapped in (False, True)}
    undisturbed = {}
    for seed in range(seeds):
        for swapped in (False, True):
            options = ("--swap-ends",) if swapped else ()
            where = folder / f"none-{seed}-{swapped}"
            undisturbed[seed, swapped], _ = run_once(
                where, (*METHODS["none"], *options), weights[swapped], arguments.steps, seed, ()
            )
        reporter.say(f"seed {seed}: {undisturbed[seed, False].seconds:.1f} s, {undisturbed[seed, False].last_loss():.4f}")
    report: dict[str, Any] = {"seeds": seeds, "steps": arguments.steps, "rates": {}}
    report["loss"] = round(statistics.median(undisturbed[seed, False].last_loss() for seed in range(seeds)), 4)
    report["swap_cost"] = _interval(
        [undisturbed[seed, True].last_loss() - undisturbed[seed, False].last_loss() for seed in range(seeds)]
    )
    curves: dict[float, dict[str, dict[int, Run]]] = {}
    for rate in rates:
        runs: dict[str, dict[int, Run]] = {"none": {seed: undisturbed[seed, False] for seed in range(seeds)}}
        failed: dict[str, int] = {}
        for seed in range(seeds):
            trace = draw_trace(rate, arguments.steps, seed)
            for method, options in METHODS.items():
                if method == "none":
                    continue
                try:
                    run, _ = run_once(
                        folder / f"{method}-{rate:g}-{seed}",
                        options,
                        weights[method == "checkfree+"],
                        arguments.steps,
                        seed,
                        trace,
                    )
                except ClusterError as error:
                    failed[method] = failed.get(method, 0) + 1
                    reporter.say(f"{rate:g} %, seed {seed}, {method}: {error}")
                    continue
                runs.setdefault(method, {})[seed] = run
                reporter.say(
                    f"{rate:g} %, seed {seed}, {method}: {run.killed} kills, {run.seconds:.1f} s, {run.redone} steps redone, "
                    f"{run.approximated} approximations, loss {run.last_loss():.4f}"
                )
        runs["redundant"] = {seed: _modelled(run) for seed, run in runs["none"].items()}
        report["rates"][f"{rate:g}"] = {
            method: _figures(runs.get(method, {}), runs["none"]) | {"failed": failed.get(method, 0)}
            for method in (*METHODS, "redundant")
        }
        curves[rate] = runs
    if arguments.plot:
        draw(curves, Path(arguments.plot))
    is_sound = not any(figures["failed"] for methods in report["rates"].values() for figures in methods.values())
    return report, is_sound


def _modelled(run: Run) -> Run:
    curve = tuple((seconds * REDUNDANT, step, loss) for seconds, step, loss in run.curve)
    return Run(run.seconds * REDUNDANT, curve, 0, 0, 0)


def _figures(runs: Mapping[int, Run], undisturbed: Mapping[int, Run]) -> dict[str, Any]:
    """Of one method and rate; seeds whose run failed are left out."""
    pairs = [(run, undisturbed[seed]) for seed, run in runs.items()]
    if not pairs:
        return {}
    return {
        "runs": len(pairs),
        "killed": statistics.median(run.killed for run, _ in pairs),
        "seconds": _interval([run.seconds for run, _ in pairs]),
        "redone": _interval([float(run.redone) for run, _ in pairs]),
        "approximated": statistics.median(run.approximated for run, _ in pairs),
        "loss_at_steps": _interval([run.last_loss() - other.last_loss() for run, other in pairs]),
        "loss_at_time": _interval([run.loss_at(other.seconds) - other.last_loss() for run, other in pairs]),
    }


def _interval(values: Sequence[float]) -> dict[str, Any]:
    low, high = median_interval(values)
    return {"median": round(statistics.median(values), 4), "interval": [round(low, 4), round(high, 4)]}


def tabulate(report: dict[str, Any]) -> Table:
    """Return the report for people."""
    title = f"above {report['loss']:.4f} nats per byte, {report['seeds']} seed(s), {report['steps']} steps"
    columns = ("% an hour", "method", "kills", "seconds", "steps redone", "made anew", "at equal steps", "at equal time")
    table = Table(*columns, title=title)
    for rate, methods in report["rates"].items():
        for method, found in methods.items():
            if "runs" not in found:
                table.add_row(rate, method, *["-"] * 5, "failed")
                continue
            told = [_told(found[key], form) for key, form in (("seconds", ".1f"), ("redone", ".0f"))]
            losses = [_told(found[key], "+.4f") for key in ("loss_at_steps", "loss_at_time")]
            table.add_row(rate, method, f"{found['killed']:g}", *told, f"{found['approximated']:g}", *losses)
    table.caption = f"swapped ends alone: {_told(report['swap_cost'], '+.4f')}"
    return table


def _told(figure: dict[str, Any], form: str) -> str:
    low, high = figure["interval"]
    return f"{figure['median']:{form}} ({low:{form}} .. {high:{form}})"


def draw(curves: Mapping[float, Mapping[str, Mapping[int, Run]]], folder: Path) -> None:
    """Write a picture for each rate: the losses over time and over steps, of the first seed."""
    plt = pyplot()
    folder.mkdir(parents=True, exist_ok=True)
    for rate, runs in curves.items():
        figure, axes = plt.subplots(1, 2, figsize=(11, 4), sharey=True)
        for method, found in runs.items():
            at, steps, losses = zip(*found[min(found)].curve, strict=True)
            axes[0].plot(at, losses, label=method, linewidth=1.2)
            if method != "redundant":
                axes[1].plot(steps, losses, label=method, linewidth=1.2)
        axes[0].set_xlabel("seconds")
        axes[1].set_xlabel("step")
        axes[0].set_ylabel("nats per byte, never trained on")
        axes[0].legend()
        figure.suptitle(f"the trace of {rate:g} % an hour, first seed")
        figure.tight_layout()
        figure.savefig(folder / f"failures-{rate:g}.svg")
        plt.close(figure)


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--rates", default="", help="per cent an hour [5,10,16; with --quick 10]")
    parser.add_argument("--seeds", type=int, default=0, help="[5; with --quick 1]")
    parser.add_argument("--steps", type=int, default=280, help="of each run [280]")
    parser.add_argument("--plot", default="", metavar="DIR", help="write pictures here")
    return main_of(parser, measure, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())
