"""How soon a pipeline is relieved of a slow stage, how much of the loss that gives back, and what is left alone.

    python -m benchmarks.slow_stage [--quick] [--json] [--rounds N]

One job of four nodes with one worker each, a stage on each, snapshots of each step. Its layers are two linear ones and between
them 12 blocks that take 4 ms forward and 8 ms backward for each of 8 slots while their process runs (see
`benchmarks.train_waits`). A worker is slowed to half by stopping it for about 10 ms and letting it run for as long, in turns.
A round has a random worker, another one than the round before, and five stretches:

    undisturbed   60 steps; with --quick 30, and so below
    short         the worker is slow for 3 steps, and 24 more are trained; nothing should move
    slowed        the worker is slow, until the pipeline is cut anew
    relieved      it is still slow, for 60 steps in the new world
    after         it is as fast as before, for 120 steps; its layers may come back

As medians over all rounds, and of each round (`each`), there are:

    step_before_s, step_slowed_s, step_relieved_s   the median steps of the stretches
    step_after_s      the median of the last half of the steps after it
    named_steps       steps from the moment that the worker becomes slow until the controller names it, in its events
    detect_steps      the same until the first step of the new world is committed
    speed_measured    what the controller took the worker's speed for when it cut anew (it is a half)
    recovered_share   the share by which steps became shorter again, over the share that could be had: that between the
                      simulated step of the present cut with the worker at half its speed, and that of the best of all cuts into
                      four stages for the same workers, found by trying each
    step_over_best    a step of the chosen cut over one of that best one, both simulated with the worker at half its speed
    moves_undisturbed, moves_short   changes of the world in these stretches, which should be none; of all rounds the most
    moves_slowed      from the moment that the worker becomes slow until it is no longer: one, if the first was right
    moves_after       one, if the layers come back
    digest_equal      of the whole job: weights and optimizers against those of one worker, undisturbed, without waits
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import random
import re
import signal
import statistics
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from benchmarks.report import Reporter, command, main_of
from benchmarks.reshard import (
    NODES,
    SCRIPT,
    START_S,
    STEADY_STEPS,
    UNDER_WAY_STEPS,
    Commit,
    is_as_alone,
    median_step_s,
    read_commits,
    run_job,
    simulated_steps_s,
)
from elastic.cli.people import People
from elastic.domain import Member, Plan, TrainingSpec
from examples.cluster import Cluster, ClusterError

CONTROLLER_OPTIONS = ("--snapshot-every", "1")
SPEED = 0.5
TURN_S = 0.010
"""For about so long a slow worker is stopped, and then runs; never in time with those who look at it."""
STEPS, STEPS_QUICK = 60, 30
SHORT_STEPS, SETTLE_STEPS = 3, 24
STRETCH_S = 240.0
VALUES_S = ("step_before_s", "step_slowed_s", "step_relieved_s", "step_after_s")
VALUES = ("named_steps", "detect_steps", "speed_measured", "recovered_share", "step_over_best")
MOVES = ("moves_undisturbed", "moves_short", "moves_slowed", "moves_after")


@dataclass(frozen=True, slots=True)
class Stretch:
    """A part of a round.

    Attributes:
        moves: how often the world has changed in it.
    """

    began_s: float
    ended_s: float
    moves: int

    def among(self, commits: list[Commit]) -> list[Commit]:
        """Return those that were made in it."""
        return [commit for commit in commits if self.began_s <= commit.clock_s < self.ended_s]


@dataclass(frozen=True, slots=True)
class Round:
    """What was done to one worker, and what the controller did about it.

    Attributes:
        rank: of the worker, in both worlds. plan_before, plan_relieved: how the pipeline was cut. spec: with the profile.
        named_s: when the controller named it.
    """

    rank: int
    plan_before: Plan
    plan_relieved: Plan
    spec: TrainingSpec
    named_s: float
    undisturbed: Stretch
    short: Stretch
    slowed: Stretch
    relieved: Stretch
    after: Stretch


@contextlib.contextmanager
def slow(pid: int, dice: random.Random) -> Iterator[None]:
    """Have a process run half of the time."""
    is_over = threading.Event()

    def take_turns() -> None:
        with contextlib.suppress(ProcessLookupError):
            while not is_over.is_set():
                for signum in (signal.SIGSTOP, signal.SIGCONT):
                    os.kill(pid, signum)
                    time.sleep(dice.uniform(0.8, 1.2) * TURN_S)

    thread = threading.Thread(target=take_turns)
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


class Slowing:
    """The job, and what is done to its workers.

    Args:
        cluster: with a controller that runs. people: a connection to it. steps: of a stretch.
    """

    def __init__(self, cluster: Cluster, people: People, steps: int, seed: int, reporter: Reporter) -> None:
        self._cluster, self._people, self._steps, self._reporter = cluster, people, steps, reporter
        self._dice, self._turns = random.Random(f"{seed} workers"), random.Random(f"{seed} turns")
        self._relieved = ""  # the worker of the newest round

    def start(self) -> None:
        """Start the nodes, and wait until they train."""
        for number in range(NODES):
            self._cluster.start_agent(f"node{number + 1}")
        self._cluster.wait_for_world(NODES, START_S, steps=STEADY_STEPS)

    def round(self) -> Round:
        """Slow one worker shortly, and then until it is relieved and on."""
        member = self._dice.choice([m for m in self._plan().members if m.worker != self._relieved])
        self._relieved = member.worker
        (pid,) = (worker.pid for worker in self._cluster.members() if worker.worker == member.worker)
        undisturbed = self._stretch(lambda: self._train(self._steps))
        self._reporter.say(f"undisturbed; {member.worker} becomes slow for {SHORT_STEPS} steps")
        short = self._stretch(lambda: self._slow_shortly(pid))
        before = self._plan()
        self._reporter.say(f"{member.worker} becomes slow")
        with slow(pid, self._turns):
            slowed = self._stretch(lambda: self._await_move(before))
            reply = self._people.plan()
            named_s = self._named_s(member, slowed)
            self._reporter.say(reply.plan.reason)
            relieved = self._stretch(lambda: self._train(self._steps))
        self._reporter.say(f"{member.worker} is no longer slow")
        after = self._stretch(lambda: self._train(2 * self._steps))
        return Round(member.rank, before, reply.plan, reply.spec, named_s, undisturbed, short, slowed, relieved, after)

    def _plan(self) -> Plan:
        return self._people.plan().plan

    def _stretch(self, train: Callable[[], None]) -> Stretch:
        began_s, generation = time.monotonic(), self._plan().generation
        train()
        return Stretch(began_s, time.monotonic(), self._plan().generation - generation)

    def _train(self, steps: int) -> None:
        last = self._cluster.status().step + steps
        self._cluster.wait(f"step {last} is committed", lambda: self._cluster.status().step >= last, STRETCH_S)

    def _slow_shortly(self, pid: int) -> None:
        with slow(pid, self._turns):
            self._train(SHORT_STEPS)
        self._train(SETTLE_STEPS)

    def _await_move(self, before: Plan) -> None:
        self._cluster.wait("the pipeline is cut anew", lambda: self._plan().generation > before.generation, STRETCH_S)
        reason = self._plan().reason
        if not reason.startswith(("layers move", "slots are re-dealt")):
            raise ClusterError(f"the world has changed for another reason: {reason}")
        self._cluster.wait_for_world(NODES, STRETCH_S, steps=UNDER_WAY_STEPS)

    def _named_s(self, member: Member, slowed: Stretch) -> float:
        """When the controller said for the first time that a worker is slow; at once, if it had been said before."""
        clock_s = time.time() - time.monotonic()
        events = [event for event in self._people.events(0, follow=False) if event.kind == "speeds-changed"]
        named = (e.at_unix_s - clock_s for e in events if member.worker in json.loads(e.json)["speeds"])
        return next((at_s for at_s in named if at_s > slowed.began_s), slowed.began_s)


# What the numbers are made of ---------------------------------------------------------------------------------------


def numbers_of(one: Round, commits: list[Commit]) -> dict[str, float]:
    """Return a round's numbers."""
    old, new = one.plan_before.generation, one.plan_relieved.generation
    slow_world = [c for c in one.slowed.among(commits) if c.generation == old]
    new_world = [c for c in one.relieved.among(commits) if c.generation == new]
    undisturbed, after = one.undisturbed.among(commits), one.after.among(commits)
    if min(len(slow_world), len(new_world), len(undisturbed), len(after) // 2) < 2:
        raise ClusterError("too few steps were committed in one of a round's stretches to say anything")
    step_slowed_s, step_relieved_s = median_step_s(slow_world), median_step_s(new_world)
    slowed_s, best_s = simulated_steps_s(one.plan_before, one.spec, {one.rank: SPEED})
    relieved_s, _ = simulated_steps_s(one.plan_relieved, one.spec, {one.rank: SPEED})
    worker = one.plan_before.members[one.rank].worker
    speed = re.search(rf"{re.escape(worker)} at (\d+) %", one.plan_relieved.reason)
    first = next(commit for commit in commits if commit.generation > old)
    return {
        "step_before_s": median_step_s(undisturbed),
        "step_slowed_s": step_slowed_s,
        "step_relieved_s": step_relieved_s,
        "step_after_s": median_step_s(after[len(after) // 2 :]),
        "named_steps": sum(one.slowed.began_s <= commit.clock_s < one.named_s for commit in commits),
        "detect_steps": first.step - slow_world[0].step + 1,
        "speed_measured": int(speed[1]) / 100 if speed is not None else 1.0,
        "recovered_share": (1 - step_relieved_s / step_slowed_s) / (1 - best_s / slowed_s),
        "step_over_best": relieved_s / best_s,
        "moves_undisturbed": one.undisturbed.moves,
        "moves_short": one.short.moves,
        "moves_slowed": one.slowed.moves + one.relieved.moves,
        "moves_after": one.after.moves,
    }


# All together -------------------------------------------------------------------------------------------------------


def measure_all(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
    """Run both jobs; returns the report, and whether the digests are equal and nothing moved without a reason."""
    rounds = arguments.rounds or (1 if arguments.quick else 3)
    steps = STEPS_QUICK if arguments.quick else STEPS
    script = [*SCRIPT, "--running"]

    def through(cluster: Cluster, people: People) -> list[Round]:
        slowing = Slowing(cluster, people, steps, arguments.seed, reporter)
        slowing.start()
        return [slowing.round() for _ in range(rounds)]

    reporter.say(f"starting {NODES} nodes")
    found, summary = run_job(folder / "job", script, CONTROLLER_OPTIONS, through)
    is_equal = is_as_alone(folder / "alone", script, summary, reporter)
    commits = read_commits(folder / "job" / "steps")
    each = [{name: round(value, 3) for name, value in numbers_of(one, commits).items()} for one in found]
    report: dict[str, Any] = {"rounds": rounds, "nodes": NODES, "steps": summary["step"]}
    report |= {name: round(statistics.median(one[name] for one in each), 3) for name in (*VALUES_S, *VALUES)}
    report |= {name: max(one[name] for one in each) for name in MOVES}
    report |= {"digest_equal": is_equal, "each": each}
    return report, is_equal and not report["moves_undisturbed"] and not report["moves_short"]


def tabulate(report: dict[str, Any]) -> Table:
    """Return the report for people."""
    table = Table("", "median", "each round", title=f"a slow stage relieved, {report['rounds']} round(s)")
    for name in (*VALUES_S, *VALUES, *MOVES):
        table.add_row(name, f"{report[name]:g}", ", ".join(f"{one[name]:g}" for one in report["each"]))
    equal = "equal" if report["digest_equal"] else "DIFFERENT"
    table.caption = f"digest {equal} after {report['steps']} steps; of moves the most in a round instead of the median"
    return table


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--rounds", type=int, default=0, help="[3; with --quick 1]")
    parser.add_argument("--seed", type=int, default=0, help="of the workers that become slow")
    return main_of(parser, measure_all, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())
