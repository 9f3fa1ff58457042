"""What snapshots in memory cost: a step with them over one without, how long one blocks, and how much memory they take.

    python -m benchmarks.snapshot [--quick] [--json] [--rounds N] [--block N]

    step_ratio           the mean step of a job with snapshots over that of the same job without
    taken                how many snapshots were taken for each step of the measured blocks
    memory_overhead      bytes of slices and parity that agents and keepers of the protected job hold, over those of the
                         state; beside it the formula's, buffers x (1 + m/k)
    blocked_over_memcpy  one worker with 1.2 GB of state: a capture over a flat warm copy of as many bytes
    peers                for how long torch.save, dcp.save and dcp.async_save (until it returns) block that worker

Four jobs of three nodes with one worker each, all on this machine, train the 5-million-parameter GPT: without snapshots
(off), with one of every step (capture), the same with the code 2+1 between the nodes (protected), and as often as elastic
itself would, with that code (auto). Settings hold for a job's life, so the jobs take turns: one trains a block of steps
while the others stand still, in an order that is drawn anew each round. The job without snapshots has two blocks in a
round; the second is the control. A block's value is the mean step between its first and its last commit, as the workers
logged them, averaged over the workers; its ratio is that to the mean of the round's two blocks without snapshots.
Reported are the medians over all rounds and their 95 % intervals (distribution-free).

What a keeper has not done when its block ends, it does while the next job trains its first step, which is not counted. A
job that has stood still finds a snapshot due at once, so auto takes one in each block, more than it would otherwise.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
from collections.abc import Iterable
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import psutil
from rich.table import Table

from benchmarks.logs import read_events
from benchmarks.one_worker import make_state, measure_captures, measure_peers, one_worker, size_of
from benchmarks.paired import ratio
from benchmarks.report import Reporter, command, main_of
from elastic.memory import BUFFERS_MAX, SnapshotPage
from examples.cluster import Cluster, ClusterError
from examples.gpt import GPT

NODES = ("node1", "node2", "node3")
K, M = 2, 1
JOBS = {
    "off": ("--snapshot-every", "0"),
    "capture": ("--snapshot-every", "1"),
    "protected": ("--snapshot-every", "1", "--redundancy", f"{K}+{M}"),
    "auto": ("--snapshot-every", "auto", "--redundancy", f"{K}+{M}"),
}
MEASURED = ("capture", "protected", "auto")
SCRIPT = ("-m", "benchmarks.train_gpt", "--batch", "2", "--slots", "3", "--virtual-replicas", "3")
START_S = 120.0
STEP_S_MAX = 3.0
WARM_UP_BLOCKS_MAX = 20


class Job:
    """One of the jobs that take turns; it stands still but for its own."""

    def __init__(self, name: str, folder: Path, block: int) -> None:
        folder.mkdir()
        self.name = name
        self._block = block
        self._step = 0
        self._logs, self._pauses = folder / "steps", folder / "pauses"
        script = [*SCRIPT, "--log", str(self._logs), "--pauses", str(self._pauses)]
        self.cluster = Cluster(
            folder, script, nodes_min=len(NODES), nodes_max=len(NODES), controller_options=JOBS[name]
        )

    def start(self) -> None:
        """Start its daemons; they train a first block by themselves."""
        self._allow(self._block)
        self.cluster.start_controller()
        for node in NODES:
            self.cluster.start_agent(node)

    def warm_up(self) -> None:
        """Train until a snapshot is protected, so that every worker and keeper has its memory."""
        self._wait(START_S)
        for _ in range(WARM_UP_BLOCKS_MAX):
            if self.name == "off" or self.cluster.status().stable > 0:
                return
            self.run_block()
        raise ClusterError(f"{self.name}: no snapshot was protected in {self._step} steps{self.cluster.last_words()}")

    def run_block(self) -> range:
        """Train one block; returns its steps."""
        first = self._step + 1
        self._allow(self._step + self._block)
        self._wait(STEP_S_MAX * self._block)
        return range(first, self._step + 1)

    def _allow(self, step: int) -> None:
        self._step = step
        partial = self._pauses.with_suffix(".part")
        partial.write_text(str(step))
        partial.replace(self._pauses)

    def _wait(self, timeout_s: float) -> None:
        def is_done() -> bool:
            return self.cluster.status().step >= self._step

        self.cluster.wait(f"{self.name} has trained step {self._step}", is_done, timeout_s)

    def step_times(self, blocks: Iterable[range]) -> list[float]:
        """Return the mean step of each block, in seconds, averaged over the workers."""
        clocks = {(line["rank"], line["step"]): line["clock_s"] for line in read_events(self._logs, "commit")}
        ranks = range(len(NODES))
        return [
            statistics.mean(clocks[rank, block[-1]] - clocks[rank, block[0]] for rank in ranks) / (len(block) - 1)
            for block in blocks
        ]

    def taken(self) -> int:
        """Return how many slices its workers have captured so far."""
        agents = [self.cluster.processes(node)[0] for node in NODES]
        return sum(filled.turn for agent in agents for page in pages(agent) for filled in page.slices())

    def memory_bytes(self) -> tuple[int, int]:
        """Return what its nodes hold of slices and of parity."""
        processes = [process for node in NODES for process in self.cluster.processes(node)]
        return slices_bytes(processes), parity_bytes(processes)


def memory_files(processes: Iterable[psutil.Process], name: str) -> list[Path]:
    """Return a path to each memory file that some processes have opened and whose name begins so."""
    opened = [path for process in processes for path in Path(f"/proc/{process.pid}/fd").iterdir()]
    named = [path for path in opened if os.readlink(path).startswith(f"/memfd:{name}")]
    return list({path.stat().st_ino: path for path in named}.values())


def pages(agent: psutil.Process) -> Iterable[SnapshotPage]:
    """What the workers of an agent say they have captured."""
    for path in memory_files([agent], "elastic-snapshots-"):
        fd = os.open(path, os.O_RDWR)
        page = SnapshotPage(fd)
        os.close(fd)
        yield page
        page.close()


def slices_bytes(processes: Iterable[psutil.Process]) -> int:
    """Return the size of the files that workers write their slices to."""
    return sum(path.stat().st_size for path in memory_files(processes, "elastic-snapshot-"))


def parity_bytes(processes: Iterable[psutil.Process]) -> int:
    """Return the size of the memory that keepers have made for parity, which has no name."""
    sizes: dict[tuple[str, str], int] = {}
    for process in processes:
        for line in Path(f"/proc/{process.pid}/maps").read_text().splitlines():
            place, _, _, device, inode, *name = line.split()
            if name == ["/dev/zero", "(deleted)"]:
                begin, _, end = place.partition("-")
                sizes[device, inode] = int(end, 16) - int(begin, 16)
    return sum(sizes.values())


def take_turns(jobs: dict[str, Job], rounds: int, reporter: Reporter) -> dict[str, list[range]]:
    """Run the blocks of all rounds; returns each side's, of which "control" is the job without snapshots again."""
    dice = random.Random(0)
    blocks: dict[str, list[range]] = {side: [] for side in (*jobs, "control")}
    for number in range(rounds):
        for side in dice.sample(list(blocks), len(blocks)):
            blocks[side].append(jobs["off" if side == "control" else side].run_block())
        if (number + 1) % 5 == 0:
            reporter.say(f"{number + 1} of {rounds} rounds")
    return blocks


def measure_steps(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> dict[str, Any]:
    """Measure the jobs; returns their part of the report."""
    rounds = arguments.rounds or (5 if arguments.quick else 25)
    block = arguments.block or (8 if arguments.quick else 12)
    with ExitStack() as stack:
        jobs = {name: Job(name, folder / name, block) for name in JOBS}
        for job in jobs.values():
            reporter.say(f"{job.name}: starting {len(NODES)} nodes with {' '.join(JOBS[job.name])}")
            stack.enter_context(job.cluster)
            job.start()
        for job in jobs.values():
            job.warm_up()
        reporter.say(f"{rounds} rounds of {len(JOBS) + 1} blocks of {block} steps")
        take_turns(jobs, 1, reporter)
        before = {name: jobs[name].taken() for name in MEASURED}
        blocks = take_turns(jobs, rounds, reporter)
        taken = {name: jobs[name].taken() - before[name] for name in MEASURED}
        held_bytes = jobs["protected"].memory_bytes()
        times_s = {name: jobs[name].step_times(blocks[name]) for name in JOBS}
        control_s = jobs["off"].step_times(blocks["control"])
        for job in jobs.values():
            if job.cluster.status().incidents_total:
                raise ClusterError(f"{job.name}: a worker was lost while measuring: nothing is reported")
    plain_s = [(one + other) / 2 for one, other in zip(times_s["off"], control_s, strict=True)]
    ratios = {name: ratio(times_s[name], plain_s) for name in MEASURED}
    state_bytes = size_of(make_state(GPT()))
    report: dict[str, Any] = {"nodes": len(NODES), "rounds": rounds, "block_steps": block}
    report["step_ratio"] = {name: value for name, (value, _) in ratios.items()}
    report["step_ratio_ci"] = {name: interval for name, (_, interval) in ratios.items()}
    report["control_ratio"], report["control_ratio_ci"] = ratio(control_s, times_s["off"])
    report["step_ms"] = {name: round(1e3 * statistics.median(values), 1) for name, values in times_s.items()}
    report["taken"] = {name: round(taken[name] / len(NODES) / (rounds * block), 3) for name in MEASURED}
    report["state_bytes"], (report["slices_bytes"], report["parity_bytes"]) = state_bytes, held_bytes
    report["memory_overhead"] = round(sum(held_bytes) / state_bytes, 2)
    report["memory_overhead_formula"] = round(BUFFERS_MAX * (1 + M / K), 2)
    return report


def measure(arguments: argparse.Namespace, folder: Path, reporter: Reporter) -> tuple[dict[str, Any], bool]:
    """Measure one worker, then the jobs; returns the report."""
    reporter.say("one worker: captures and flat copies in turns, and what torch offers")
    with one_worker(folder) as worker:
        report = measure_captures(worker, 8 if arguments.quick else 40)
        report["peers"] = measure_peers(worker.state, folder, 1 if arguments.quick else 5)
    report |= measure_steps(arguments, folder, reporter)
    return report, all(report["taken"].values())  # a job that takes none costs nothing


def tabulate(report: dict[str, Any]) -> Table:
    """Return the report for people."""
    title = f"a step with snapshots over one without, {report['nodes']} nodes, {report['rounds']} rounds"
    table = Table("", "ratio", "95 %", "ms", "snapshots a step", title=title)
    for name in MEASURED:
        low, high = report["step_ratio_ci"][name]
        values = (f"{report['step_ms'][name]:.1f}", f"{report['taken'][name]:.2f}")
        table.add_row(name, f"{report['step_ratio'][name]:.3f}", f"{low:.3f} .. {high:.3f}", *values)
    low, high = report["control_ratio_ci"]
    plain = f"{report['step_ms']['off']:.1f}"
    table.add_row("off (control)", f"{report['control_ratio']:.3f}", f"{low:.3f} .. {high:.3f}", plain, "0")
    low, high = report["blocked_over_memcpy_ci"]
    peers = ", ".join(f"{name.removesuffix('_blocked_ms')} {ms:.0f} ms" for name, ms in report["peers"].items())
    table.caption = (
        f"memory: {report['memory_overhead']:.2f} times the state, by the formula {report['memory_overhead_formula']:.2f}\n"
        f"a snapshot of {report['state_gb']} GB blocks for {report['blocked_ms']:.0f} ms, {report['blocked_over_memcpy']:.2f} "
        f"of a copy ({low:.2f} .. {high:.2f}); {peers}"
    )
    return table


def main() -> int:
    parser = command(__doc__)
    parser.add_argument("--rounds", type=int, default=0, help="[25; with --quick 5]")
    parser.add_argument("--block", type=int, default=0, help="steps in a block [12; with --quick 8]")
    return main_of(parser, measure, tabulate)


if __name__ == "__main__":
    raise SystemExit(main())
