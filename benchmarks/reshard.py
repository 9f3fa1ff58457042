"""What it costs to cut a pipeline anew while it trains, and how good the cut and the prediction are.

    python -m benchmarks.reshard [--quick] [--json] [--rounds N]

One job of four nodes with one worker each, a stage on each, snapshots of each step with redundancy 2+1. Its layers are two
linear ones and between them 12 blocks that take 4 ms forward and 8 ms backward for each of 8 slots, without a processor (see
`benchmarks.train_waits`). A round takes it through three transitions, each at a random moment once the world is steady and
its newest snapshot is protected; then a node joins for the next round, which counts, too:

    4 -> 3 (node killed)    SIGKILL of a random node's agent, whose worker dies with it: back to a snapshot
    3 -> 4 (node joins)     a new agent: layers go to it between two steps
    4 -> 3 (node drained)   a random node leaves in order: its layers go to others between two steps

Each transition has, as medians over all times that it was made (`times`):

    stall_s                 the longest gap between the first commits of two consecutive steps, from the last one before the
                            transition until the new world is under way, less the median step before; of a kill with its
                            discovery (here at once, since the connection breaks) and with the steps that are done again, of
                            a join without the new process's start-up, during which the others train
    stall_s_max             the longest one
    stall_steps             the same over the median step before
    bytes_moved             state of the layers that go to workers that did not hold them, as the planner counts it (four
                            times the parameters), with what a leaver hands over; of a kill that which the survivors read
                            from the snapshot of layers that they did not hold
    step_over_best          a step of the chosen cut over one of the best of all cuts, found by trying each; both simulated,
                            with the profile that the job measured and workers that are alike
    predicted_over_actual   the step as the plan predicts it over the median step in the new world
    step_before_s, step_after_s   the median steps that these were compared with
    digest_equal            of the whole job: weights and optimizers against those of one worker, undisturbed, without waits

And of the planner alone, 96 random layers, 16 stages, 32 slots: `planner_ms` is the median time to cut them afresh,
`planner_held_ms` that with 15 workers that hold layers already and one that joins.
"""

from __future__ import annotations

import argparse
import contextlib
import itertools
import random
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from rich.table import Table

from benchmarks.logs import read_events
from benchmarks.report import Reporter, command, main_of
from controller.layouts import model_of
from elastic.cli.people import People
from elastic.domain import LayerProfile, Plan, PlanKind, PlanReply, Stage, TrainingSpec
from elastic.pipeline.moves import handovers
from examples.cluster import Cluster, ClusterError, run_undisturbed
from recovery.pipelines import Layout, Model, NoLayout, as_it_is, lay_out

NODES = 4
SCRIPT = ("-m", "benchmarks.train_waits")
WITHOUT_WAITS = ("--forward-ms", "0", "--backward-ms", "0")
CONTROLLER_OPTIONS = ("--snapshot-every", "1", "--redundancy", "2+1", "--join-timeout", "5")
KILLED, JOINED, DRAINED = "4 -> 3 (node killed)", "3 -> 4 (node joins)", "4 -> 3 (node drained)"
VALUES = (
    "stall_s",
    "stall_steps",
    "bytes_moved",
    "step_over_best",
    "predicted_over_actual",
    "step_before_s",
    "step_after_s",
)
STEADY_STEPS = 12
"""Of which medians are made, before and after each transition."""
UNDER_WAY_STEPS = 3
"""After so many commits of the new world a gap is no longer the transition's."""
MOMENT_S = 1.0
"""A transition comes at a random moment in this time."""
STEPS_AHEAD = 8
"""How far before the last step its number is written down."""
START_S, CHANGE_S = 120.0, 90.0
PLANNED_LAYERS, PLANNED_STAGES, PLANNED_SLOTS = 96, 16, 32

Found = TypeVar("Found")
"""What comes of taking a job through something."""


@dataclass(frozen=True, slots=True)
class Commit:
    """A step's first commit by any worker."""

    clock_s: float
    step: int
    generation: int


@dataclass(frozen=True, slots=True)
class Transition:
    """One change of the world.

    Attributes:
        began_s: when it was asked for. before, after: how the pipeline was cut. spec: with the profile.
    """

    name: str
    began_s: float
    before: Plan
    after: Plan
    spec: TrainingSpec


class Changing:
    """The job, and what is done to its nodes.

    Args:
        cluster: with a controller that runs. people: a connection to it.
    """

    def __init__(self, cluster: Cluster, people: People, dice: random.Random, reporter: Reporter) -> None:
        self._cluster, self._people, self._dice, self._reporter = cluster, people, dice, reporter
        self._nodes: list[str] = []
        self._started = 0

    def start(self) -> None:
        """Start the nodes, and wait until they train."""
        for _ in range(NODES):
            self._add()
        self._cluster.wait_for_world(NODES, START_S, steps=STEADY_STEPS)

    def rounds(self, count: int) -> list[Transition]:
        """Take the job through all transitions, again and again."""
        made = []
        for number in range(1, count + 1):
            made.append(self._change(KILLED, self._kill))
            made.append(self._change(JOINED, self._add))
            made.append(self._change(DRAINED, self._drain))
            if number < count:
                made.append(self._change(JOINED, self._add))
        return made

    def _change(self, name: str, change: Callable[[], None]) -> Transition:
        step = self._cluster.status().step
        self._cluster.wait("a new snapshot is protected", lambda: self._cluster.status().stable > step, CHANGE_S)
        time.sleep(self._dice.uniform(0, MOMENT_S))
        before = self._people.plan().plan
        began_s = time.monotonic()
        change()
        self._cluster.wait_for_world(len(self._nodes), CHANGE_S, steps=STEADY_STEPS + UNDER_WAY_STEPS)
        reply: PlanReply = self._people.plan()
        cuts = ", ".join(f"{stage.first}-{stage.last - 1}" for stage in reply.plan.stages)
        self._reporter.say(f"{name}: layers {cuts}, steady after {time.monotonic() - began_s:.1f} s")
        if reply.plan.generation != before.generation + 1:
            self._reporter.say(f"generation {before.generation} became {reply.plan.generation}: {reply.plan.reason}")
        return Transition(name, began_s, before, reply.plan, reply.spec)

    def _add(self) -> None:
        self._started += 1
        self._nodes.append(f"node{self._started}")
        self._cluster.start_agent(self._nodes[-1])

    def _kill(self) -> None:
        self._cluster.kill_node(self._leaving())

    def _drain(self) -> None:
        self._people.drain(self._leaving())

    def _leaving(self) -> str:
        node = self._dice.choice(self._nodes)
        self._nodes.remove(node)
        return node


# What the numbers are made of ---------------------------------------------------------------------------------------


def read_commits(folder: Path) -> list[Commit]:
    """Return every step's first commit, in the order of the steps."""
    first: dict[int, Commit] = {}
    for line in sorted(read_events(folder, "commit"), key=lambda line: line["clock_s"]):
        first.setdefault(line["step"], Commit(line["clock_s"], line["step"], line["generation"]))
    return [first[step] for step in sorted(first)]


def median_step_s(commits: list[Commit]) -> float:
    """Return the median time of the steps that lie between these commits."""
    return statistics.median(b.clock_s - a.clock_s for a, b in itertools.pairwise(commits))


def bytes_moved(transition: Transition) -> int:
    """Return how much state went to workers that did not have it."""
    before, after, layers = transition.before, transition.after, transition.spec.layers
    if after.kind is PlanKind.SWITCH:
        moves = (*handovers(before, after), *after.moves)
        return sum(len(m.targets) * layer.state_bytes for m in moves for layer in layers[m.first : m.last])
    total = 0
    for member in after.members:
        old = before.rank_of(member.worker)
        held = before.layers_of(old) if old is not None else range(0)
        total += sum(layers[number].state_bytes for number in after.layers_of(member.rank) if number not in held)
    return total


def simulated_steps_s(plan: Plan, spec: TrainingSpec, speeds: dict[int, float]) -> tuple[float, float]:
    """Return the simulated step of a plan, and that of the best of all cuts into as many stages for the same workers.

    `speeds` are those of the ranks, 1.0 where there is none.
    """
    model = model_of(spec)

    def step_s(cuts: tuple[int, ...]) -> float:
        ends = zip(itertools.pairwise(cuts), plan.stages, strict=True)
        stages = [Stage(first, last, stage.ranks) for (first, last), stage in ends]
        return as_it_is(model, stages, plan.all_routes(), speeds).step_s

    count = len(spec.layers)
    inner = itertools.combinations(range(1, count), len(plan.stages) - 1)
    best_s = min(step_s((0, *between, count)) for between in inner)
    return step_s((0, *(stage.last for stage in plan.stages))), best_s


def measure(transition: Transition, commits: list[Commit]) -> dict[str, float]:
    """Return one transition's numbers."""
    earlier = [c for c in commits if c.clock_s < transition.began_s][-STEADY_STEPS - 1 :]
    world = [c for c in commits if c.generation == transition.after.generation][: STEADY_STEPS + UNDER_WAY_STEPS]
    if len(earlier) < 2 or len(world) <= UNDER_WAY_STEPS:
        raise ClusterError(f"{transition.name}: too few steps were committed before or after it to say anything")
    around = [c for c in commits if earlier[-1].step <= c.step <= world[UNDER_WAY_STEPS - 1].step]
    simulated_s, best_s = simulated_steps_s(transition.after, transition.spec, {})
    step_before_s, step_after_s = median_step_s(earlier), median_step_s(world[UNDER_WAY_STEPS - 1 :])
    stall_s = max(b.clock_s - a.clock_s for a, b in itertools.pairwise(around)) - step_before_s
    return {
        "stall_s": stall_s,
        "stall_steps": stall_s / step_before_s,
        "bytes_moved": bytes_moved(transition),
        "step_over_best": simulated_s / best_s,
        "predicted_over_actual": transition.after.predicted_s / step_after_s,
        "step_before_s": step_before_s,
        "step_after_s": step_after_s,
    }


# The planner alone --------------------------------------------------------------------------------------------------


def time_planner(repetitions: int, seed: int) -> dict[str, float]:
    """Return the median times of cutting random models."""
    dice = random.Random(f"{seed} planner")
    times_s: dict[str, list[float]] = {"planner_ms": [], "planner_held_ms": []}
    for _ in range(repetitions):
        model = Model(tuple(_layers(dice)), slots=PLANNED_SLOTS)
        fewer = _layout(lay_out(model, PLANNED_STAGES - 1))
        held = {rank: range(stage.first, stage.last) for stage in fewer.stages for rank in stage.ranks}
        for name, holding in (("planner_ms", None), ("planner_held_ms", held)):
            began_s = time.perf_counter()
            _layout(lay_out(model, PLANNED_STAGES, holding))
            times_s[name].append(time.perf_counter() - began_s)
    return {name: round(1000 * statistics.median(values), 2) for name, values in times_s.items()}


def _layers(dice: random.Random) -> Iterator[LayerProfile]:
    for _ in range(PLANNED_LAYERS):
        forward_s, parameters = dice.uniform(0.5e-3, 5e-3), dice.randrange(1 << 18, 1 << 22)
        yield LayerProfile(forward_s, 2 * forward_s, 16 * parameters, 1 << 20, 1 << 18)


def _layout(found: Layout | NoLayout) -> Layout:
    if isinstance(found, NoLayout):
        raise ClusterError(found.reason)
    return found


# All together -------------------------------------------------------------------------------------------------------


def run_job(
    folder: Path, script: list[str], options: Sequence[str], through: Callable[[Cluster, People], Found]
) -> tuple[Found, dict[str, Any]]:
    """Run a job, take it through something and end it; returns what came of that, and the job's summary.

    Args:
        folder: for everything; the workers' logs are in `steps`. script: of the pipeline. options: of the controller.
        through: is given the cluster, whose controller runs, and a connection to it.
    """
    folder.mkdir()
    until = folder / "until"
    script = [*script, "--log", str(folder / "steps"), "--until", str(until)]
    with contextlib.ExitStack() as stack:
        cluster = stack.enter_context(Cluster(folder, script, nodes_min=1, nodes_max=NODES, controller_options=options))
        cluster.start_controller()
        people = People(f"127.0.0.1:{(folder / 'controller.port').read_text().strip()}")
        stack.callback(people.close)
        found = through(cluster, people)
        partial = until.with_suffix(".part")
        partial.write_text(str(cluster.status().step + STEPS_AHEAD))
        partial.replace(until)
        if cluster.wait_for_end(CHANGE_S) != 0:
            raise ClusterError(f"the job failed{cluster.last_words()}")
        return found, cluster.summary()


def is_as_alone(folder: Path, script: list[str], summary: dict[str, Any], reporter: Reporter) -> bool:
    """Return whether a job's digest is that of one worker that trains as many steps undisturbed and without waits."""
    reporter.say(f"training {summary['step']} steps undisturbed, for the digest")
    alone = [*script, *WITHOUT_WAITS, "--log", str(folder / "steps"), "--steps", str(summary["step"])]
    undisturbed = run_undisturbed(folder, alone, 1, START_S + summary["step"])
    return bool(summary["digest"]) and summary["digest"] == undisturbed["digest"]


def measure_all(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
    """Run both jobs and time the planner; returns the report, and whether the digests are equal."""
    rounds = arguments.rounds or (1 if arguments.quick else 5)
    script = [*SCRIPT, "--uneven", str(arguments.uneven)]
    dice = random.Random(f"{arguments.seed} nodes")

    def through(cluster: Cluster, people: People) -> list[Transition]:
        changing = Changing(cluster, people, dice, reporter)
        changing.start()
        return changing.rounds(rounds)

    reporter.say(f"starting {NODES} nodes")
    transitions, summary = run_job(folder / "job", script, CONTROLLER_OPTIONS, through)
    is_equal = is_as_alone(folder / "alone", script, summary, reporter)
    commits = read_commits(folder / "job" / "steps")
    numbers: dict[str, list[dict[str, float]]] = {}
    for transition in transitions:
        numbers.setdefault(transition.name, []).append(measure(transition, commits))
    report: dict[str, Any] = {"rounds": rounds, "nodes": NODES, "steps": summary["step"], "transitions": []}
    for name, found in numbers.items():
        medians = {value: round(statistics.median(one[value] for one in found), 3) for value in VALUES}
        medians["bytes_moved"] = int(medians["bytes_moved"])
        longest = {"stall_s_max": round(max(one["stall_s"] for one in found), 3)}
        report["transitions"].append(
            {"name": name, "times": len(found), **medians, **longest, "digest_equal": is_equal}
        )
    reporter.say("timing the planner")
    report |= time_planner(5 if arguments.quick else 20, arguments.seed)
    return report, is_equal


def tabulate(report: dict[str, Any]) -> Table:
    """Return the report for people."""
    rows: dict[str, Callable[[dict[str, Any]], str]] = {
        "times": lambda one: f"{one['times']}",
        "stall s (longest)": lambda one: f"{one['stall_s']:.2f} ({one['stall_s_max']:.2f})",
        "stall in steps": lambda one: f"{one['stall_steps']:.1f}",
        "MiB moved": lambda one: f"{one['bytes_moved'] / 2**20:.1f}",
        "step over best": lambda one: f"{one['step_over_best']:.3f}",
        "predicted over actual": lambda one: f"{one['predicted_over_actual']:.2f}",
        "step before, after ms": lambda one: f"{1000 * one['step_before_s']:.0f}, {1000 * one['step_after_s']:.0f}",
    }
    names = [one["name"].replace(" (", "\n").rstrip(")") for one in report["transitions"]]
    table = Table("", *names, title=f"a pipeline cut anew, medians of {report['rounds']} round(s)")
    for name, shown in rows.items():
        table.add_row(name, *(shown(one) for one in report["transitions"]))
    equal = "equal" if all(one["digest_equal"] for one in report["transitions"]) else "DIFFERENT"
    table.caption = (
        f"digest {equal} after {report['steps']} steps; {PLANNED_LAYERS} layers on {PLANNED_STAGES} stages are cut in "
        f"{report['planner_ms']:.0f} ms, in {report['planner_held_ms']:.0f} ms if some are held already"
    )
    return table


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--rounds", type=int, default=0, help="[5; with --quick 1]")
    parser.add_argument("--uneven", type=float, default=0.0, help="how much the blocks' times differ, from 0 to 1")
    parser.add_argument(
        "--seed", type=int, default=0, help="of the nodes that are killed or drained, and of random layers"
    )
    return main_of(parser, measure_all, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())
