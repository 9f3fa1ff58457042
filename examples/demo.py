"""Four nodes on this machine train a GPT while nodes, workers and the controller are killed, stopped and added;
then four more train one as a pipeline, and lose a stage.

    make demo

Shows what each incident cost, and that the final weights are bit for bit those of a run that was left alone.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, ClassVar

from rich.console import Console
from rich.markup import escape
from rich.table import Table

from elastic.domain import Plan, Stage, StatusReply
from elastic.errors import ElasticError
from examples.cluster import Cluster, ClusterError, end_on_signals, run_undisturbed, temporary_folder

NODES = 4
SLOTS = 8  # divides well over 4, 3 and 2 workers
MODEL = {"dim": 96, "layers": 3, "context": 64, "batch": 2}
REDUNDANCY = "2+2"  # of four nodes, any two may be lost
TRAINING_S = 30.0  # how long the disturbed job should train on this machine, without its losses
STOPPED_S = 4.0  # twice the failure timeout
STEPS_WITHOUT_CONTROLLER = 8
STEPS_BETWEEN = 6
PIPELINE_MODEL = {"dim": 32, "layers": 6, "context": 16, "batch": 2}  # with its two ends, eight layers for the stages
PIPELINE_REDUNDANCY = "2+1"  # any one node may be lost
PIPELINE_STEPS = 60
WAIT_S = 60.0
START_S = 120.0
END_S = 240.0


@dataclass
class Act:
    """One thing that is done to the job, and when."""

    title: str
    found: str  # how the job learns of it, where that is no incident
    incidents_before: int
    incidents_after: int = 0
    began_s: float = field(default_factory=time.monotonic)
    ended_s: float = 0.0


class Demo:
    """The job, what is done to it, and what a person sees.

    Args:
        folder: For everything that the job writes.
        steps: How many it trains.
        console: Where a person looks.
        began_s: From when on time is told [now].
    """

    example = "examples/gpt.py"
    # Slots and virtual replicas fix how sums are formed.
    flags: ClassVar[dict[str, int]] = {**MODEL, "slots": SLOTS, "virtual-replicas": NODES}
    redundancy = REDUNDANCY
    workers_alone = 2  # of the run that is left alone

    def __init__(self, folder: Path, steps: int, console: Console, began_s: float | None = None) -> None:
        self.folder, self.steps, self.console = folder, steps, console
        self.timeline_file = folder / "timeline.jsonl"
        self.acts: list[Act] = []
        self._spinner: Any = None
        self._doing = ""
        self._began_s = time.monotonic() if began_s is None else began_s

    def script(self, *more: str) -> list[str]:
        """Return the training script with its flags."""
        flags = {**self.flags, "steps": self.steps}
        return [self.example, *(f"--{name}={value}" for name, value in flags.items()), *more]

    # -- what a person sees ----------------------------------------------------------------------------------

    def say(self, text: str) -> None:
        """Print one line, with the time since the start."""
        self.console.print(
            f"[dim]{time.monotonic() - self._began_s:6.1f} s[/dim]  {escape(text)}",
            highlight=False,
            soft_wrap=True,
        )

    @contextmanager
    def doing(self, text: str) -> Iterator[None]:
        """Say what is about to be done; a terminal shows the job's state meanwhile."""
        self.say(text)
        self._doing = text
        with self.console.status(escape(text)) as self._spinner:
            yield

    def show(self, reply: StatusReply) -> None:
        """Show the job's newest status."""
        if self._spinner is not None:
            self._spinner.update(
                f"{escape(self._doing)}  [dim]step {reply.step} of {self.steps}, world {reply.world_size}, "
                f"generation {reply.generation}[/dim]"
            )

    # -- the acts --------------------------------------------------------------------------------------------

    def run(self) -> dict[str, Any]:
        """Train with incidents; returns the job's summary."""
        script = self.script(f"--timeline={self.timeline_file}")
        memory = ("--snapshot-every", "1", "--redundancy", self.redundancy)
        with Cluster(self.folder, script, nodes_max=NODES, controller_options=memory) as cluster:
            cluster.on_status = self.show
            with self.doing(f"starting a controller and {NODES} nodes of one worker each"):
                cluster.start_controller()
                for number in range(1, NODES + 1):
                    cluster.start_agent(f"node{number}")
                cluster.wait_for_world(NODES, START_S)
            self.perform(cluster)
            with self.doing(f"nothing more is done to it: training to step {self.steps}"):
                code = cluster.wait_for_end(END_S)
            summary = cluster.summary()
            if code != 0 or summary["step"] != self.steps:
                raise ClusterError(f"the job {summary['state']} at step {summary['step']}: {summary['reason']}")
            self.say(f"the job ended after step {summary['step']}, digest {summary['digest']}")
            return summary

    def perform(self, cluster: Cluster) -> None:
        """Do to the job, which trains, all that is to be done to it."""
        self.kill_a_node(cluster)
        self.add_a_node(cluster)
        self.stop_a_node(cluster)
        self.kill_the_controller(cluster)
        self.kill_all_workers(cluster)
        self.lose_two_nodes(cluster)

    @contextmanager
    def act(self, cluster: Cluster, title: str, announcement: str, found: str = "") -> Iterator[None]:
        """Do something to the job and remember from when to when it mattered."""
        with self.doing(announcement):
            act = Act(title, found, cluster.status().incidents_total)
            yield
            act.ended_s, act.incidents_after = time.monotonic(), cluster.status().incidents_total
            self.acts.append(act)

    def kill_a_node(self, cluster: Cluster) -> None:
        pid = cluster.node("node2").agent_pid
        with self.act(cluster, "node2 killed (-9)", f"killing node2 with -9 (agent {pid}; its worker dies with it)"):
            cluster.kill_node("node2")
            reply = cluster.wait_for_world(NODES - 1, WAIT_S, steps=STEPS_BETWEEN)
        self.say(f"{reply.world_size} workers train on, step {reply.step}; none of them was restarted")

    def add_a_node(self, cluster: Cluster) -> None:
        with self.act(cluster, "node5 added", "adding node5", "its agent attached"):
            cluster.start_agent("node5")
            reply = cluster.wait_for_world(NODES, WAIT_S, steps=STEPS_BETWEEN)
        self.say(f"node5 was given the state and trains, step {reply.step}")

    def stop_a_node(self, cluster: Cluster) -> None:
        with self.act(cluster, "node3 stopped (SIGSTOP)", f"stopping every process of node3 for {STOPPED_S:.0f} s"):
            cluster.stop_node("node3")
            stopped_s = time.monotonic()
            reply = cluster.wait_for_world(NODES - 1, WAIT_S)
            cluster.wait("node3 has been stopped long enough", lambda: time.monotonic() > stopped_s + STOPPED_S, WAIT_S)
        self.say(f"the others went on without it, step {reply.step}")
        with self.act(cluster, "node3 continued", "letting node3 run again", "its agent attached again"):
            cluster.continue_node("node3")
            reply = cluster.wait_for_world(NODES, WAIT_S, steps=STEPS_BETWEEN)
        self.say(f"node3 is back in the world, step {reply.step}")

    def kill_the_controller(self, cluster: Cluster) -> None:
        with self.act(
            cluster,
            "controller killed (-9)",
            "killing the controller with -9",
            "the agents' streams ended; all trained on",
        ):
            cluster.kill_controller()
            before = len(self.commits())
            cluster.wait(
                "training goes on without a controller",
                lambda: len(self.commits()) >= before + STEPS_WITHOUT_CONTROLLER,
                WAIT_S,
            )
            self.say(f"{len(self.commits()) - before} steps were committed without it; starting it on its ledger")
            cluster.start_controller()
            reply = cluster.wait_for_world(NODES, WAIT_S, steps=STEPS_BETWEEN)
        self.say(f"the controller is back, generation {reply.generation}, step {reply.step}")

    def kill_all_workers(self, cluster: Cluster) -> None:
        with self.act(
            cluster, "all workers killed (-9)", "killing the workers of all nodes at once with -9; the agents live on"
        ):
            step = cluster.status().step
            cluster.kill_workers()
            reply = cluster.wait_for_world(NODES, WAIT_S, steps=STEPS_BETWEEN, beyond_step=step)
        self.say(cluster.newest_event("snapshot-chosen"))
        self.say(f"new workers train on from their agents' memory, step {reply.step}")

    def lose_two_nodes(self, cluster: Cluster) -> None:
        lost = ("node4", "node5")
        self.wait_until_protected(cluster)
        with self.act(
            cluster,
            "all workers and two nodes killed (-9)",
            f"killing all workers again, and with them the agents of {' and '.join(lost)}: half of the memory is gone",
        ):
            step = cluster.status().step
            cluster.kill_workers(*lost)
            reply = cluster.wait_for_world(NODES - len(lost), WAIT_S, steps=STEPS_BETWEEN, beyond_step=step)
        self.say(cluster.newest_event("snapshot-chosen"))
        self.say(f"{reply.world_size} new workers train on from what was decoded, step {reply.step}")
        with self.act(cluster, "both nodes back", f"starting {' and '.join(lost)} again", "their agents attached"):
            for node in lost:
                cluster.start_agent(node)
            reply = cluster.wait_for_world(NODES, WAIT_S, steps=STEPS_BETWEEN)
        self.say(f"both were given the state and train, step {reply.step}")

    def wait_until_protected(self, cluster: Cluster) -> None:
        step = cluster.status().step
        with self.doing(f"waiting until a snapshot of these workers is protected by the erasure code {self.redundancy}"):
            cluster.wait("a snapshot is protected", lambda: cluster.status().stable >= step, WAIT_S)

    # -- what it cost ----------------------------------------------------------------------------------------

    def commits(self) -> list[tuple[float, int]]:
        """Return (clock, step) of each committed step, in order."""
        if not self.timeline_file.exists():
            return []
        lines = [json.loads(line) for line in self.timeline_file.read_text().splitlines() if line.endswith("}")]
        first: dict[int, float] = {}
        for line in lines:
            first.setdefault(line["step"], line["clock_s"])
        return sorted((clock, step) for step, clock in first.items())

    def table(self, summary: dict[str, Any]) -> Table:
        """Return what each act cost."""
        clocks = [clock for clock, _ in self.commits()]
        median_s = statistics.median(after - before for before, after in pairwise(clocks))
        table = Table("incident", "how it was found", "seconds lost", "steps redone", title="what it cost")
        for act in self.acts:
            pauses = [b - a for a, b in pairwise(clocks) if act.began_s < b <= act.ended_s]
            lost_s = max(0.0, max(pauses, default=0.0) - median_s)
            own = summary["incidents"][act.incidents_before : act.incidents_after]
            found = "; ".join(dict.fromkeys(f"{i['detected_by']}: {i['reason']}" for i in own)) or act.found
            redone = {
                incident["generation"]: incident["steps_redone"] for incident in own
            }  # shared by all of one fence
            table.add_row(act.title, escape(found) or "not at all", f"{lost_s:.2f}", str(sum(redone.values())))
        table.caption = f"lost: the longest pause between two commits, less the median step ({median_s:.2f} s)"
        return table


class PipelineDemo(Demo):
    """A job whose model is cut into stages, one on each node; a stage is lost with its node."""

    example = "examples/gpt_pipeline.py"
    flags: ClassVar[dict[str, int]] = {**PIPELINE_MODEL, "slots": SLOTS, "virtual-replicas": 1}
    redundancy = PIPELINE_REDUNDANCY
    workers_alone = 1

    def perform(self, cluster: Cluster) -> None:
        plan = cluster.plan()
        self.say(stages_of(plan))
        self.wait_until_protected(cluster)
        self.lose_a_stage(cluster, plan)

    def lose_a_stage(self, cluster: Cluster, plan: Plan) -> None:
        stage = plan.stages[1]
        node = plan.members[stage.ranks[0]].node
        with self.act(
            cluster,
            f"{node} with a stage killed (-9)",
            f"killing {node} with -9 (its worker dies with it): nobody else holds its layers, {layers_of(stage)}",
        ):
            cluster.kill_node(node)
            reply = cluster.wait_for_world(NODES - 1, WAIT_S, steps=STEPS_BETWEEN)
        self.say(cluster.newest_event("snapshot-chosen"))
        self.say(stages_of(cluster.plan()))
        self.say(f"{reply.world_size} workers train on with all layers, step {reply.step}; none of them was restarted")


def layers_of(stage: Stage) -> str:
    """Say which layers a stage has."""
    return f"{stage.first}-{stage.last - 1}" if stage.last > stage.first + 1 else f"{stage.first}"


def stages_of(plan: Plan) -> str:
    """Say which node holds which layers."""
    nodes = {member.rank: member.node for member in plan.members}
    stages = (f"{layers_of(stage)} on {' and '.join(nodes[rank] for rank in stage.ranks)}" for stage in plan.stages)
    return f"{len(plan.stages)} stages: layers {', '.join(stages)}"


def choose_steps() -> int:
    """Measure this machine for a moment; returns for how many steps the job should train on it."""
    import torch

    from examples.gpt import GPT

    torch.set_num_threads(1)
    model = GPT(MODEL["dim"], MODEL["layers"], MODEL["context"])
    window = torch.zeros(MODEL["batch"], MODEL["context"], dtype=torch.long)
    times_s = []
    for _ in range(30):
        began_s = time.perf_counter()
        model(window, window).backward()
        times_s.append(time.perf_counter() - began_s)
    cores = len(os.sched_getaffinity(0))
    step_s = SLOTS * statistics.median(times_s) / min(cores, NODES) + 0.03  # and what a step costs besides
    return max(300, min(3000, round(TRAINING_S / step_s)))


def compare(demo: Demo, summary: dict[str, Any], undisturbed: dict[str, Any]) -> bool:
    """Print the table and both digests; returns whether they are equal."""
    equal = bool(summary["digest"]) and summary["digest"] == undisturbed["digest"]
    demo.console.print(demo.table(summary))
    demo.console.print(f"digest of this job's weights      {summary['digest']}", highlight=False)
    demo.console.print(f"digest of the run left alone      {undisturbed['digest']}", highlight=False)
    verdict = "[green]equal, bit for bit[/green]" if equal else "[red]the weights differ[/red]"
    incidents = f"{len(demo.acts)} incident{'s' * (len(demo.acts) != 1)}"
    demo.console.print(f"after {summary['step']} steps and {incidents}: {verdict}", highlight=False)
    return equal


def show(demo: Demo) -> bool:
    """Run a job with its incidents, and the same left alone; returns whether both end with the same bits."""
    summary = demo.run()
    workers = "one worker" if demo.workers_alone == 1 else "two workers"
    with demo.doing(f"training the same once more, on one node with {workers}, left alone"):
        undisturbed = run_undisturbed(demo.folder / "alone", demo.script(), demo.workers_alone, END_S, demo.show)
    return compare(demo, summary, undisturbed)


def attempt(action: Callable[[], int], console: Console) -> int:
    """Turn what may go wrong into one message and an exit code."""
    try:
        return action()
    except (ClusterError, ElasticError, OSError) as error:
        console.print(f"[red]demo: {escape(str(error))}[/red]", highlight=False, soft_wrap=True)
        return 1
    except KeyboardInterrupt:
        console.print("demo: interrupted; everything it started has ended", highlight=False)
        return 130


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=0, help="steps to train in the first job [about a minute of training]")
    steps: int = parser.parse_args().steps
    end_on_signals()
    console = Console()

    def show_both() -> int:
        enough = steps or choose_steps()
        began_s = time.monotonic()
        with temporary_folder() as folder:
            equal = show(Demo(folder, enough, console, began_s))
        with temporary_folder() as folder:
            equal &= show(PipelineDemo(folder, PIPELINE_STEPS, console, began_s))
        return 0 if equal else 1

    return attempt(show_both, console)


if __name__ == "__main__":
    sys.exit(main())
