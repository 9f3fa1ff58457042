"""What an agent measures of its workers and its machine, for Prometheus. Nobody acts on it."""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import psutil

from agent.processes import WorkerProcess
from elastic.timers import Phase
from monitoring import metrics
from monitoring.histograms import Histogram
from monitoring.metrics import Page

STEP_BUCKETS_S = (0.001, 0.003, 0.01, 0.03, 0.1, 0.2, 0.3, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0, 30.0, 100.0)
LOOPBACK = "lo"


@dataclass(slots=True)
class _Place:
    """What the workers of one place, one after the other, have used."""

    worker: str = ""
    process: WorkerProcess | None = None
    timed: int = 0  # steps of the present worker that were read
    compute_s: float = 0.0  # of the newest of them
    cpu_s: float = 0.0  # of the present worker ...
    cpu_before_s: float = 0.0  # ... and of those before it
    memory_bytes: int = 0
    skipped: int = 0
    skipped_before: int = 0


class WorkerMeter:
    """Reads workers' pages, and keeps sums over all workers that there ever were on the node."""

    def __init__(self) -> None:
        self._places: dict[int, _Place] = {}
        self._steps = Histogram(STEP_BUCKETS_S)
        self._phases = {phase: Histogram(STEP_BUCKETS_S) for phase in Phase}

    def look(self, worker: str, process: WorkerProcess) -> None:
        """Take what a worker has timed since the last look."""
        place = self._places.setdefault(_local_rank(worker), _Place())
        if place.worker != worker:
            self._turn_over(place)
            place.worker, place.process = worker, process
        place.timed, steps = process.steps(place.timed)
        place.skipped = process.progress().skipped
        for step in steps:
            place.compute_s = step.seconds[Phase.FORWARD] + step.seconds[Phase.BACKWARD]
            self._steps.observe(sum(step.seconds) - step.seconds[Phase.OUTSIDE])
            for phase, histogram in self._phases.items():
                histogram.observe(step.seconds[phase])

    def compute_s(self, worker: str) -> float:
        """Return what forwards and backwards of a worker's newest step took; 0 before there is one."""
        place = self._places.get(_local_rank(worker))
        return place.compute_s if place is not None and place.worker == worker else 0.0

    def ended(self, worker: str) -> None:
        """A worker's process has ended."""
        place = self._places.get(_local_rank(worker))
        if place is not None and place.worker == worker:
            self._turn_over(place)

    @staticmethod
    def _turn_over(place: _Place) -> None:
        place.cpu_before_s, place.cpu_s = place.cpu_before_s + place.cpu_s, 0.0
        place.skipped_before, place.skipped = place.skipped_before + place.skipped, 0
        place.worker, place.process, place.timed, place.memory_bytes, place.compute_s = "", None, 0, 0, 0.0

    def put(self, page: Page, node: str) -> None:
        """Show all of it."""
        page.put_histogram(metrics.STEP_SECONDS, self._steps, node)
        for phase, histogram in self._phases.items():
            page.put_histogram(metrics.PHASE_SECONDS, histogram, node, phase.name.lower())
        for rank, place in sorted(self._places.items()):
            if place.process is not None:
                usage = place.process.usage()
                if usage is not None:
                    place.cpu_s, place.memory_bytes = usage
                spread = place.process.progress().spread
                if not math.isnan(spread):
                    page.put(metrics.SPREAD, spread, node, rank)
            page.put(metrics.NONFINITE, place.skipped_before + place.skipped, node, rank)
            page.put(metrics.WORKER_CPU, place.cpu_before_s + place.cpu_s, node, rank)
            page.put(metrics.WORKER_MEMORY, place.memory_bytes, node, rank)


def _local_rank(worker: str) -> int:
    """The place of a worker, which is named NODE/LOCAL_RANK.NUMBER."""
    return int(worker.rpartition("/")[2].partition(".")[0])


def put_node(page: Page, node: str, log_dir: Path) -> None:
    """Show what the machine is doing."""
    for mode, seconds in psutil.cpu_times()._asdict().items():
        page.put(metrics.NODE_CPU, seconds, node, mode)
    page.put(metrics.NODE_LOAD, psutil.getloadavg()[0], node)
    memory = psutil.virtual_memory()
    page.put(metrics.NODE_MEMORY, memory.total, node, "total")
    page.put(metrics.NODE_MEMORY, memory.available, node, "available")
    if log_dir.is_dir():
        page.put(metrics.NODE_DISK, psutil.disk_usage(str(log_dir)).free, node)
    links = [counted for name, counted in psutil.net_io_counters(pernic=True).items() if name != LOOPBACK]
    page.put(metrics.NODE_NETWORK, sum(link.bytes_recv for link in links), node, "receive")
    page.put(metrics.NODE_NETWORK, sum(link.bytes_sent for link in links), node, "transmit")
    page.put(metrics.NODE_NETWORK_ERRORS, sum(link.errin + link.dropin for link in links), node, "receive")
    page.put(metrics.NODE_NETWORK_ERRORS, sum(link.errout + link.dropout for link in links), node, "transmit")
