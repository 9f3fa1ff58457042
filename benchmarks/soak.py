"""Hours of random faults, and at the end the proof that nothing was lost, repeated or changed.

    python -m benchmarks.soak --hours 8 [--json]

A controller and two nodes of two workers each train a small GPT. In the first half of the time, again and again,
at random moments, a worker is killed or stopped, the second node's agent is killed, or the controller is;
sometimes two of these at once. After each the world must be full again within a minute. In the second half nothing
is done to the job, and twice as many other processes as there are cores keep the machine busy: every incident
then is a false alarm. At the end two things are compared: the bits of weights and optimizer with those of an
undisturbed run of the same steps, and the record of consumed samples with what the sampler says; and it is shown
how much the first node's agent, which lives through all of it, has grown.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from benchmarks.logs import read_digests, spread
from benchmarks.report import Reporter, command, main_of
from elastic.domain import WorkerView
from elastic.records import read_record
from elastic.sampler import SlotSampler
from examples.cluster import Cluster, ClusterError, run_undisturbed
from examples.gpt import Windows

NODES = ("node1", "node2")
WORKERS_PER_NODE = 2
WORLD = len(NODES) * WORKERS_PER_NODE
MODEL = {"dim": 64, "layers": 2, "context": 64, "batch": 2, "slots": 8, "virtual-replicas": 4}
SCRIPT = ("-m", "benchmarks.train_gpt", *(f"--{name}={value}" for name, value in MODEL.items()))
PAUSE_S = 0.2  # sleep in each step, so that the undisturbed run takes a fraction of the time
START_S = 180.0
RECOVER_S = 60.0
QUICK_S = 50.0
STEPS_AHEAD = 20
SETTLING_SHARE = 0.1
SHARE_OF_PAIRS = 0.25  # of faults that come two at once
SECONDS_PER_STEP_MAX = 1.0  # of the undisturbed run, for its deadline

Mend = Callable[[], None]


class Saboteur:
    """Does random harm to a cluster; never so much at once that no worker with the state is left."""

    def __init__(self, cluster: Cluster, dice: random.Random) -> None:
        self._cluster = cluster
        self._dice = dice
        self._faults: dict[str, Callable[[], Mend | None]] = {
            "worker killed": lambda: self._hurt_worker(signal.SIGKILL),
            "worker stopped": lambda: self._hurt_worker(signal.SIGSTOP),
            "agent killed": self._kill_agent,
            "controller killed": self._kill_controller,
        }
        self._known: list[WorkerView] = []

    def strike(self) -> list[str]:
        """Do one or two things; returns their names. What a person would start again is started again."""
        self._known = self._cluster.members()
        number = 2 if self._dice.random() < SHARE_OF_PAIRS else 1
        names = self._dice.sample(sorted(self._faults), number)
        mends = []
        for name in names:
            mends.append(self._faults[name]())
            time.sleep(self._dice.uniform(0, 0.5))
        for mend in mends:
            if mend is not None:
                mend()
        return names

    def _hurt_worker(self, signum: signal.Signals) -> None:
        victim = self._dice.choice(self._known)
        with contextlib.suppress(ProcessLookupError):
            os.kill(victim.pid, signum)

    def _kill_agent(self) -> Mend:
        self._cluster.kill_node(NODES[1])
        return lambda: self._cluster.start_agent(NODES[1], WORKERS_PER_NODE)

    def _kill_controller(self) -> Mend:
        self._cluster.kill_controller()
        return self._cluster.start_controller


def disturb(
    cluster: Cluster, seconds: float, seed: int, reporter: Reporter
) -> tuple[Counter[str], list[float]]:
    """Let faults come for some time; returns how many of each, and the seconds until the world was full."""
    dice = random.Random(seed)
    saboteur = Saboteur(cluster, dice)
    counts: Counter[str] = Counter()
    recoveries_s = []
    cluster.wait_for_world(WORLD, START_S)
    ends_s = time.monotonic() + seconds
    while time.monotonic() < ends_s:
        time.sleep(dice.uniform(0, 3))
        generation = cluster.status().generation
        began_s = time.monotonic()
        names = saboteur.strike()
        counts.update(names)

        def regrouped(old: int = generation) -> bool:
            return cluster.status().generation > old

        if names != ["controller killed"]:
            cluster.wait(
                f"the world without its victim of {' and '.join(names)} is over",
                regrouped,
                RECOVER_S,
            )
        reply = cluster.wait_for_world(WORLD, RECOVER_S)
        recoveries_s.append(time.monotonic() - began_s)
        reporter.say(f"{' and '.join(names)}: full again after {recoveries_s[-1]:.1f} s, generation "
                     f"{reply.generation}, step {reply.step}")  # fmt: skip
    return counts, recoveries_s


def keep_busy(cluster: Cluster, seconds: float, reporter: Reporter) -> int:
    """Load the machine for some time; returns how many incidents the job had meanwhile."""
    cores = len(os.sched_getaffinity(0))
    before = cluster.wait_for_world(WORLD, RECOVER_S)
    reporter.say(f"{2 * cores} busy processes beside the job for {seconds:.0f} s")
    code = f"from elastic.lifeline import die_with_parent; die_with_parent({os.getpid()})\nwhile True: pass"
    hogs = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(2 * cores)]
    try:
        ends_s = time.monotonic() + seconds
        while time.monotonic() < ends_s:
            time.sleep(min(5.0, seconds))
            cluster.status()
    finally:
        for hog in hogs:
            hog.kill()
            hog.wait()
    after = cluster.wait_for_world(WORLD, RECOVER_S)
    return after.incidents_total - before.incidents_total


def size_of(pid: int) -> dict[str, int]:
    """Return what a process holds."""
    process = psutil.Process(pid)
    resident_kib = process.memory_info().rss // 1024
    return {"files": process.num_fds(), "threads": process.num_threads(), "resident_kib": resident_kib}


def record_fault(folder: Path, steps: int, seed: int = 0) -> str:
    """Return the first difference between the record of consumed samples and the sampler, or ""."""
    windows = Windows(MODEL["context"])
    sampler = SlotSampler(len(windows), MODEL["batch"], MODEL["slots"], seed)
    record = read_record(folder)
    for step in range(1, steps + 1):
        for slot in range(MODEL["slots"]):
            expected, found = sampler.ids(step, slot), record.pop((step, slot), ())
            if expected != found:
                return f"slot {slot} of step {step} consumed {found}, expected {expected}"
    return f"{len(record)} slots after the last step, such as {min(record)}" if record else ""


def soak(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
    """Run the job and both comparisons; returns the report."""
    seconds = QUICK_S if arguments.quick else 3600 * arguments.hours
    logs, until, record = folder / "steps", folder / "until", folder / "record"
    script = [*SCRIPT, "--log", str(logs), "--until", str(until), f"--pause={PAUSE_S}"]
    options = ["--record-samples", str(record)]
    with Cluster(folder, script, nodes_max=len(NODES), agent_options=options) as cluster:
        reporter.say(f"starting {len(NODES)} nodes of {WORKERS_PER_NODE} workers")
        cluster.start_controller()
        for node in NODES:
            cluster.start_agent(node, WORKERS_PER_NODE)
        cluster.wait_for_world(WORLD, START_S)
        agent = cluster.node(NODES[0]).agent_pid
        counts, recoveries_s = disturb(cluster, seconds * SETTLING_SHARE, arguments.seed, reporter)
        size_before = size_of(agent)  # not before it has seen every kind of fault
        more, more_s = disturb(cluster, seconds * (0.5 - SETTLING_SHARE), arguments.seed + 1, reporter)
        size_after = size_of(agent)
        false_alarms = keep_busy(cluster, seconds / 2, reporter)
        last_step = cluster.status().step + STEPS_AHEAD
        partial = until.with_suffix(".part")
        partial.write_text(str(last_step))
        partial.replace(until)
        if cluster.wait_for_end(RECOVER_S) != 0:
            raise ClusterError(f"the job failed{cluster.last_words()}")
        summary = cluster.summary()
    reporter.say(f"training {last_step} steps undisturbed, for the digest")
    flags = ["--log", str(folder / "alone" / "steps"), "--digest-at", str(last_step)]
    run_undisturbed(folder / "alone", [*SCRIPT, *flags], 1, START_S + SECONDS_PER_STEP_MAX * last_step)
    found, expected = read_digests(logs), read_digests(folder / "alone" / "steps")
    difference = record_fault(record, last_step)
    report: dict[str, Any] = {
        "hours": round(seconds / 3600, 3),
        "seed": arguments.seed,
        "faults": dict(sorted((counts + more).items())),
        "false_alarms": false_alarms,
        "agent_before": size_before,
        "agent_after": size_after,
        "steps": last_step,
        "generations": summary["generation"],
        "incidents": summary["incidents_total"],
        "goodput": round(summary["goodput"], 4),
        "full_again_s": spread(recoveries_s + more_s),
        "digest_equal": len(found.get(last_step, ())) == 1 and found[last_step] == expected.get(last_step),
        "record_exact": not difference,
        "record_difference": difference,
    }
    return report, bool(report["digest_equal"] and report["record_exact"] and not false_alarms)


def tabulate(report: dict[str, Any]) -> Table:
    """Return the report for people."""
    table = Table(show_header=False, title=f"{report['hours']} hours of faults")
    for name, value in report.items():
        table.add_row(name, str(value))
    return table


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--hours", type=float, default=1.0)
    parser.add_argument("--seed", type=int, default=0, help="of faults, victims and moments")
    return main_of(parser, soak, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())
