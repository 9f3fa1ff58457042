"""Every metric that the controller and the agents show, defined once: its name, kind, labels and meaning, and a page of values.

Units are in the names: seconds, bytes, ratios from 0 to 1. Labels are bounded: the job, nodes, ranks and stages of the present
world, and fixed words; what grows with a model's layers has no place here. `docs/metrics.md` is checked against this file. Pure:
values come in as arguments.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric

from monitoring.histograms import Histogram

JOB_LABEL = "elastic_job"
"""On every series. Not `job`, which Prometheus itself gives to what it scrapes."""


class Kind(Enum):
    """What Prometheus may do with the values."""

    GAUGE = "gauge"
    COUNTER = "counter"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Definition:
    """One metric. `labels` are those besides the job's name."""

    name: str
    kind: Kind
    help: str
    labels: tuple[str, ...] = ()


def _gauge(name: str, text: str, *labels: str) -> Definition:
    return Definition(f"elastic_{name}", Kind.GAUGE, text, labels)


def _counter(name: str, text: str, *labels: str) -> Definition:
    return Definition(f"elastic_{name}", Kind.COUNTER, text, labels)


def _histogram(name: str, text: str, *labels: str) -> Definition:
    return Definition(f"elastic_{name}", Kind.HISTOGRAM, text, labels)


# The controller's ---------------------------------------------------------------------------------------------------

JOB_STATE = _gauge("job_state", "1 for the state that the job is in, 0 for the others.", "state")
ELAPSED = _counter("elapsed_seconds_total", "Seconds since the job began.")
PRODUCTIVE = _counter("productive_seconds_total", "Seconds in which steps were trained that were kept.")
UNSETTLED = _gauge("unsettled_seconds", "Seconds of the step and the incident in progress, of which the reason is not known yet.")
BADPUT = _counter("badput_seconds_total", "Seconds that were not productive, by the reason.", "reason")
GOODPUT = _gauge("goodput_ratio", "Productive part of the time: of all of it, or of the last hour.", "window")
ETTR = _gauge("ettr_ratio", "Effective training time: new steps times the median step, as a part of the time.", "window")
STEP = _gauge("step", "Newest committed step.")
STEPS_REDONE = _counter("steps_redone_total", "Steps that recoveries had trained a second time.")
STEP_MEDIAN = _gauge("step_median_seconds", "Median seconds per step of late; 0 while unknown.")
MFU = _gauge("mfu_ratio", "Model FLOPs utilization, as the options give operations and peak, over all live workers.")
SAMPLES = _counter("samples_total", "Samples that committed steps have consumed.")
LOSS = _gauge("loss", "Loss of the newest committed step, as given to session.log or returned by the last slots.")
GRADIENT_NORM = _gauge("gradient_norm", "Norm of the newest gradient of a stage, where it is measured.", "stage")
GENERATION = _gauge("generation", "Number of the present world.")
WORLD_SIZE = _gauge("world_size", "Workers that train in the present world.")
SPARES = _gauge("spare_workers", "Live workers that do not train in the present world.")
NODE_STATE = _gauge("node_state", "1 for the state that a node is in: attached, draining, lost or left.", "node", "state")
HEARTBEAT_AGE = _gauge("heartbeat_age_seconds", "Seconds since an attached node was last heard of.", "node")
INCIDENTS = _counter("incidents_total", "Incidents that are over, by what happened and what found it.", "kind", "detector")
INCIDENTS_OPEN = _gauge("incidents_open", "Incidents after which no step has been committed yet.")
INCIDENT_SECONDS = _counter("incident_seconds_total", "Seconds that incidents have cost, as the ledger says it of each.")
RECOVERIES = _counter("recoveries_total", "Recoveries; incidents that were open together are one.")
RECOVERY = _histogram("recovery_seconds", "What recoveries have cost in each of their phases.", "phase")
APPROXIMATIONS = _counter("approximations_total", "Times that layers of a stage were made from others.", "stage")
SNAPSHOT_AGE = _gauge("snapshot_age_steps", "Steps since the newest snapshot that is safe on all nodes: the steps at risk.")
REDUNDANCY = _gauge("redundancy_level", "Nodes that may be lost now without loss of snapshots, where they are protected.")
VULNERABLE = _counter("vulnerable_seconds_total", "Seconds in which the present world had no safe snapshot of its own.")
CHECKPOINT_STEP = _gauge("checkpoint_step", "Step of the newest checkpoint; absent before there is one.")
CHECKPOINT_FAILED = _gauge("checkpoint_failed", "1 while the newest attempt to write a checkpoint has failed, else 0.")
COMPUTE = _gauge("worker_compute_seconds", "Seconds of forwards and backwards in a worker's newest step.", "node", "rank")
STRAGGLER = _gauge("straggler_score", "A worker's compute time per slot beside the median of its peers.", "node", "rank")

CONTROLLER = (
    *(JOB_STATE, ELAPSED, PRODUCTIVE, BADPUT, UNSETTLED, GOODPUT, ETTR, STEP, STEPS_REDONE, STEP_MEDIAN, SAMPLES, LOSS, MFU),
    *(GRADIENT_NORM, GENERATION, WORLD_SIZE, SPARES, NODE_STATE, HEARTBEAT_AGE, INCIDENTS, INCIDENTS_OPEN, INCIDENT_SECONDS),
    *(RECOVERIES, RECOVERY, APPROXIMATIONS, SNAPSHOT_AGE, REDUNDANCY, VULNERABLE, CHECKPOINT_STEP, CHECKPOINT_FAILED),
    *(COMPUTE, STRAGGLER),
)

# The agents' --------------------------------------------------------------------------------------------------------

CONNECTED = _gauge("agent_connected", "1 while the agent's stream to the controller is open, else 0.", "node")
WORKERS = _gauge("agent_workers", "Worker processes that the agent supervises now.", "node")
STEP_SECONDS = _histogram("step_seconds", "Seconds per step of this node's workers, without user code between steps.", "node")
PHASE_SECONDS = _histogram("phase_seconds", "Seconds that each phase of a step took in this node's workers.", "node", "phase")
NONFINITE = _counter("nonfinite_steps_total", "Steps without an update, since something was not finite.", "node", "local_rank")
SPREAD = _gauge("replica_spread", "Root mean square distance of replicas that never agree in full.", "node", "local_rank")
SNAPSHOT_STEP = _gauge("snapshot_step", "Newest step whose snapshot the whole world holds, as this node knows it.", "node")
SNAPSHOT_BYTES = _gauge("snapshot_bytes", "Memory that snapshots take on this node, without parity.", "node")
SNAPSHOT_BUDGET = _gauge("snapshot_budget_bytes", "Memory that snapshots and parity may take on this node.", "node")
WORKER_CPU = _counter("worker_cpu_seconds_total", "Processor time of the workers of each place.", "node", "local_rank")
WORKER_MEMORY = _gauge("worker_memory_bytes", "Resident memory of a worker.", "node", "local_rank")
NODE_CPU = _counter("node_cpu_seconds_total", "Processor time of the node since it was started, by mode.", "node", "mode")
NODE_LOAD = _gauge("node_load1", "Processes that ran or waited to, as a mean over a minute.", "node")
NODE_MEMORY = _gauge("node_memory_bytes", "Memory of the node: all of it, and what is available.", "node", "kind")
NODE_DISK = _gauge("node_disk_free_bytes", "Free space where the workers' output is written.", "node")
NODE_NETWORK = _counter("node_network_bytes_total", "Bytes over all interfaces but the loopback.", "node", "direction")
NODE_NETWORK_ERRORS = _counter("node_network_errors_total", "Errors and drops on the same interfaces.", "node", "direction")

AGENT = (
    *(CONNECTED, WORKERS, STEP_SECONDS, PHASE_SECONDS, NONFINITE, SPREAD, SNAPSHOT_STEP, SNAPSHOT_BYTES, SNAPSHOT_BUDGET),
    *(WORKER_CPU, WORKER_MEMORY, NODE_CPU, NODE_LOAD, NODE_MEMORY, NODE_DISK, NODE_NETWORK, NODE_NETWORK_ERRORS),
)


class Page:
    """Values of metrics at one moment, as Prometheus reads them.

    Args:
        job: Name of the job that all of them are of.
    """

    def __init__(self, job: str) -> None:
        self._job = job
        self._families: dict[str, GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily] = {}

    def put(self, metric: Definition, value: float, *labels: str | int) -> None:
        """Set a gauge or a counter, for these values of its labels."""
        family = self._family(metric)
        assert not isinstance(family, HistogramMetricFamily)
        family.add_metric(self._labels(labels), value)

    def put_histogram(self, metric: Definition, histogram: Histogram, *labels: str | int) -> None:
        """Set a histogram, for these values of its labels."""
        family = self._family(metric)
        assert isinstance(family, HistogramMetricFamily)
        family.add_metric(self._labels(labels), histogram.buckets(), histogram.sum)

    def families(self) -> list[Metric]:
        """Return all that was set."""
        return list(self._families.values())

    def _labels(self, values: Sequence[str | int]) -> list[str]:
        return [self._job, *map(str, values)]

    def _family(self, metric: Definition) -> GaugeMetricFamily | CounterMetricFamily | HistogramMetricFamily:
        if metric.name not in self._families:
            names = (JOB_LABEL, *metric.labels)
            match metric.kind:
                case Kind.GAUGE:
                    self._families[metric.name] = GaugeMetricFamily(metric.name, metric.help, labels=names)
                case Kind.COUNTER:
                    self._families[metric.name] = CounterMetricFamily(metric.name, metric.help, labels=names)
                case Kind.HISTOGRAM:
                    self._families[metric.name] = HistogramMetricFamily(metric.name, metric.help, labels=names)
        return self._families[metric.name]
