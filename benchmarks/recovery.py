"""How long training stands still when a worker or a network fails, and when the world is whole again.

    python -m benchmarks.recovery [--quick] [--json] [--repetitions N]

One job for each fault, of four workers: the 5-million-parameter GPT, 12 slots, 4 virtual replicas, ordered
reduction, default settings (silence is believed for 2 s).

    kill, stop   SIGKILL and SIGSTOP of a random worker, all on one node
    cut, link    four nodes of one worker each, in network namespaces: the cable of a random node is pulled, the
                 link between two random nodes dies while both reach the controller; healed once a worker is out

Faults come at random moments, again and again, each time when the world is full and steady. All times come from
the workers' own logs of committed steps:

    total_s                 from the fault to the first commit of a step that was never committed before
    stall_s                 total_s less the median step of the smaller world: what the fault cost
    rejoin_s                from the fault to the first commit of the full world, less the script's own
                            start-up (from the new process's start until it calls prepare()); of a stopped
                            worker this begins with the two seconds for which silence is not believed, so the
                            report's own `rejoin_s` and `rejoin_survivor_stall_s` are those of kills
    rejoin_survivor_stall_s the longest pause between two commits around the rejoin, less the median step
    step_s                  the median step of the smaller world
    survivors_lost          workers that were not hurt and are gone all the same
    steps_redone            as the job's own incidents count them
    digest_equal            the bits of weights and optimizer against those of an undisturbed run
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import signal
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.logs import Commit, read_commits, read_digests, read_events, spread
from benchmarks.network import Lab, LabCluster, obstacle
from benchmarks.report import Reporter, command, main_of
from elastic.domain import WorkerView
from examples.cluster import Cluster, ClusterError, run_undisturbed

WORKERS = 4
SCRIPT = ("-m", "benchmarks.train_gpt", "--context", "32")  # steps of about 0.3 s on two cores
SIGNALS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP}
NETWORKS = ("cut", "link")
NODES = [f"node{number}" for number in range(1, WORKERS + 1)]
TIMES = ("stall_s", "total_s", "rejoin_s", "rejoin_survivor_stall_s", "step_s")
START_S = 120.0
RECOVER_S = 60.0
STEADY_STEPS = 4
MOMENT_S = 1.0  # a fault comes at a random moment in this time
STEPS_AHEAD = 8  # how far before the last step its number is written down


@dataclass(frozen=True)
class Fault:
    """One worker hurt, and what the world was like."""

    clock_s: float
    recovered_s: float  # when the full world was steady again
    survivors_lost: int


def signal_one(cluster: Cluster, fault: str, dice: random.Random) -> tuple[set[str], Callable[[], None]]:
    """Signal a random member; returns who may be lost for it, and how to mend it."""
    victim: WorkerView = dice.choice(cluster.members())
    with contextlib.suppress(ProcessLookupError):
        os.kill(victim.pid, SIGNALS[fault])
    return {victim.worker}, lambda: None


def cut_one(cluster: Cluster, fault: str, dice: random.Random) -> tuple[set[str], Callable[[], None]]:
    """Cut a random node's cable, or the link between two; likewise."""
    assert isinstance(cluster, LabCluster)
    lab = cluster.lab
    one, other = dice.sample(NODES, 2)
    named = (one,) if fault == "cut" else (one, other)
    hurt = {member.worker for member in cluster.members() if member.worker.partition("/")[0] in named}
    if fault == "cut":
        lab.cut(one)
        return hurt, lambda: lab.heal(one)
    lab.part(one, other)
    return hurt, lambda: lab.join(one, other)


def hurt_repeatedly(
    cluster: Cluster, fault: str, repetitions: int, dice: random.Random, reporter: Reporter
) -> list[Fault]:
    """Hurt the world again and again, each time after it has become full and steady."""
    hurt = signal_one if fault in SIGNALS else cut_one
    faults = []
    cluster.wait_for_world(WORKERS, START_S, steps=STEADY_STEPS)
    for number in range(1, repetitions + 1):
        time.sleep(dice.uniform(0, MOMENT_S))
        before = {member.worker for member in cluster.members()}
        began_s = time.monotonic()
        victims, mend = hurt(cluster, fault, dice)

        def somebody_is_out(victims: frozenset[str] = frozenset(victims)) -> bool:
            return not victims <= {member.worker for member in cluster.members()}

        cluster.wait(f"one of {', '.join(sorted(victims))} has been left out", somebody_is_out, RECOVER_S)
        if fault in NETWORKS:
            cluster.wait_for_world(WORKERS - 1, RECOVER_S, steps=1)
        mend()
        cluster.wait_for_world(WORKERS, RECOVER_S, steps=STEADY_STEPS)
        lost = before - {member.worker for member in cluster.members()}
        faults.append(Fault(began_s, time.monotonic(), max(0, len(lost) - 1)))
        reporter.say(f"{fault} {number} of {repetitions}: {', '.join(sorted(victims))}, steady after "
                     f"{faults[-1].recovered_s - began_s:.1f} s")  # fmt: skip
    return faults


def measure(fault: Fault, commits: list[Commit], prepares: list[dict[str, Any]]) -> dict[str, float]:
    """Return one fault's numbers from the workers' logs."""
    known = max(commit.step for commit in commits if commit.clock_s < fault.clock_s)
    after = [
        c for c in commits if c.clock_s >= fault.clock_s and c.step > known and c.clock_s <= fault.recovered_s
    ]
    small = [c for c in after if c.world_size < WORKERS]
    full = next(c for c in after if c.world_size == WORKERS and (not small or c.clock_s > small[0].clock_s))
    first = after[0]
    # A step that was committed while the fault was still unnoticed is no recovery.
    unhurt = [c for c in after if c.world_size == WORKERS and small and c.clock_s < small[0].clock_s]
    if unhurt:
        first = small[0]
    steps_s = [b.clock_s - a.clock_s for a, b in pairwise(after) if a.world_size == b.world_size < WORKERS]
    if not steps_s:
        steps_s = [b.clock_s - a.clock_s for a, b in pairwise(after) if a.clock_s >= full.clock_s]
    step_s = statistics.median(steps_s)
    joined = [p for p in prepares if fault.clock_s < p["clock_s"] < full.clock_s]
    startup_s = max((p["startup_s"] for p in joined), default=0.0)
    # Around the rejoin: from the first step of the small world until the full one is steady.
    around = [b.clock_s - a.clock_s for a, b in pairwise(after) if a.clock_s >= first.clock_s]
    return {
        "total_s": first.clock_s - fault.clock_s,
        "stall_s": first.clock_s - fault.clock_s - step_s,
        "rejoin_s": full.clock_s - fault.clock_s - startup_s,
        "rejoin_survivor_stall_s": max(0.0, max(around, default=0.0) - statistics.median(around or [0.0])),
        "step_s": step_s,
    }


def run_job(
    fault: str, folder: Path, repetitions: int, seed: int, reporter: Reporter
) -> tuple[dict[str, Any], list[dict[str, float]], int, set[str]]:
    """Run one job through its faults; returns counts, each fault's numbers, the last step, its digests."""
    folder.mkdir()
    logs, until = folder / "steps", folder / "until"
    script = [*SCRIPT, "--log", str(logs), "--until", str(until)]
    with contextlib.ExitStack() as stack:
        reporter.say(f"{fault}: starting {WORKERS} workers")
        if fault in SIGNALS:
            cluster = stack.enter_context(Cluster(folder, script))
            cluster.start_controller()
            cluster.start_agent("node", WORKERS)
        else:
            lab = stack.enter_context(Lab("controller", *NODES))
            cluster = stack.enter_context(LabCluster(lab, folder, script, WORKERS))
            cluster.start_controller()
            for node in NODES:
                cluster.start_agent(node)
        faults = hurt_repeatedly(cluster, fault, repetitions, random.Random(f"{seed} {fault}"), reporter)
        last_step = cluster.status().step + STEPS_AHEAD
        partial = until.with_suffix(".part")
        partial.write_text(str(last_step))
        partial.replace(until)
        if cluster.wait_for_end(RECOVER_S) != 0:
            raise ClusterError(f"the job of {fault} failed{cluster.last_words()}")
        summary = cluster.summary()
    commits, prepares = read_commits(logs), read_events(logs, "prepare")
    numbers = [measure(one, commits, prepares) for one in faults]
    counts = {
        "survivors_lost": sum(one.survivors_lost for one in faults),
        "steps_redone": sum(incident["steps_redone"] for incident in summary["incidents"]),
    }
    return counts, numbers, last_step, read_digests(logs).get(last_step, set())


def measure_all(repetitions: int, seed: int, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """Run every fault's job and the undisturbed run; returns the report."""
    report: dict[str, Any] = {"repetitions": repetitions, "workers": WORKERS, "faults": {}}
    digests: dict[str, tuple[int, set[str]]] = {}
    network_repetitions = max(1, repetitions // 4)
    without = obstacle()
    if without:
        reporter.say(f"no cuts and no dead links here: {without}")
    for fault in (*SIGNALS, *(() if without else NETWORKS)):
        times_hurt = repetitions if fault in SIGNALS else network_repetitions
        counts, numbers, last_step, found = run_job(fault, folder / fault, times_hurt, seed, reporter)
        report["faults"][fault] = {"repetitions": times_hurt}
        times = {name: spread([one[name] for one in numbers]) for name in TIMES}
        report["faults"][fault] |= {**times, **counts, "steps": last_step}
        digests[fault] = (last_step, found)
    last_steps = sorted({step for step, _ in digests.values()})
    reporter.say(f"training {last_steps[-1]} steps undisturbed, for the digests")
    logs = folder / "alone" / "steps"
    flags = ["--log", str(logs), "--digest-at", *map(str, last_steps)]
    # Two workers do: which worker computes which slot changes no bit.
    run_undisturbed(folder / "alone", [*SCRIPT, *flags], 2, START_S + 2.0 * last_steps[-1])
    expected = read_digests(logs)
    for fault, (step, found) in digests.items():
        report["faults"][fault]["digest_equal"] = len(found) == 1 and found == expected.get(step)
    report |= {name: report["faults"]["kill"][name] for name in ("rejoin_s", "rejoin_survivor_stall_s")}
    return report


def tabulate(report: dict[str, Any]) -> Table:
    """Return the report for people."""
    table = Table(
        "", "min", "median", "max", title=f"seconds, {report['repetitions']} repetitions (of cut and link fewer)"
    )
    rows = {f"{fault}: {name}": values[name] for fault, values in report["faults"].items() for name in TIMES}
    for name, values in rows.items():
        table.add_row(name, *(f"{values[column]:.2f}" for column in ("min", "median", "max")))
    table.caption = "\n".join(
        f"{fault}: survivors lost {values['survivors_lost']}, steps redone {values['steps_redone']}, "
        f"digest {'equal' if values['digest_equal'] else 'DIFFERENT'} after {values['steps']} steps"
        for fault, values in report["faults"].items()
    )
    return table


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--repetitions", type=int, default=0, 
                        help="of kill and stop [20; with --quick 2]; a quarter, at least 1, of cut and link")  # fmt: skip
    parser.add_argument("--seed", type=int, default=0, help="of victims and moments")

    def work(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
        repetitions = arguments.repetitions or (2 if arguments.quick else 20)
        report = measure_all(repetitions, arguments.seed, folder, reporter)
        sound = all(v["digest_equal"] and not v["survivors_lost"] for v in report["faults"].values())
        return report, sound

    return main_of(parser, work, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())
