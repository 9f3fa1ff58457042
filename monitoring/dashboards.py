"""Grafana dashboards, built from a few words each: `python -m monitoring.dashboards` writes `monitoring/grafana/*.json` anew.

A panel is a title, what it means, and queries with their legends. Every query is tried on a real job by
`tests/e2e/test_prometheus.py`. Needs grafana-foundation-sdk, which only this file uses.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from grafana_foundation_sdk.builders import dashboard as build
from grafana_foundation_sdk.builders import prometheus, timeseries
from grafana_foundation_sdk.cog.encoder import JSONEncoder
from grafana_foundation_sdk.models.dashboard import DataSourceRef, VariableRefresh

FOLDER = Path(__file__).with_name("grafana")
JOB = '{elastic_job="$elastic_job"}'
JOB_VARIABLE = "label_values(elastic_step, elastic_job)"


@dataclass(frozen=True, slots=True)
class Graph:
    """One panel: queries by their legends, and the unit of all of them as Grafana names it."""

    title: str
    description: str
    unit: str
    queries: dict[str, str]


@dataclass(frozen=True, slots=True)
class Board:
    """One dashboard."""

    name: str
    title: str
    graphs: tuple[Graph, ...]


def _by(labels: str, metric: str, window: str = "1m") -> str:
    return f"sum by ({labels}) (rate({metric}{JOB}[{window}]))"


BOARDS = (
    Board(
        "job",
        "Elastic: job",
        (
            Graph(
                "Goodput", "Productive part of the time.", "percentunit", {"{{window}}": f"elastic_goodput_ratio{JOB}"}
            ),
            Graph(
                "Effective training time",
                "Falls, too, where steps are slow.",
                "percentunit",
                {"{{window}}": f"elastic_ettr_ratio{JOB}"},
            ),
            Graph(
                "Where the time goes",
                "By reason; recoveries, start, end.",
                "percentunit",
                {
                    "productive": _by("elastic_job", "elastic_productive_seconds_total"),
                    "{{reason}}": _by("reason", "elastic_badput_seconds_total"),
                },
            ),
            Graph("Steps", "Newest committed step.", "none", {"step": f"elastic_step{JOB}"}),
            Graph("Loss", "As the script gives it.", "none", {"loss": f"elastic_loss{JOB}"}),
            Graph(
                "Samples", "Consumed by committed steps.", "reqps", {"samples": f"rate(elastic_samples_total{JOB}[1m])"}
            ),
            Graph(
                "World",
                "Workers that train, and others.",
                "none",
                {
                    "training": f"elastic_world_size{JOB}",
                    "spare": f"elastic_spare_workers{JOB}",
                },
            ),
            Graph(
                "Steps without an update",
                "Something in them was not finite.",
                "none",
                {
                    "{{node}}/{{local_rank}}": f"elastic_nonfinite_steps_total{JOB}",
                },
            ),
        ),
    ),
    Board(
        "steps",
        "Elastic: steps and stragglers",
        (
            Graph(
                "Step time",
                "By workers; median and tails.",
                "s",
                {
                    f"p{percent}": f"histogram_quantile({percent / 100}, {_by('le', 'elastic_step_seconds_bucket')})"
                    for percent in (50, 90, 99)
                },
            ),
            Graph(
                "Phases",
                "Mean seconds of each phase of a step.",
                "s",
                {
                    "{{phase}}": f"{_by('phase', 'elastic_phase_seconds_sum')} / {_by('phase', 'elastic_phase_seconds_count')}",
                },
            ),
            Graph(
                "Compute",
                "Forwards and backwards of the newest step.",
                "s",
                {"{{node}} rank {{rank}}": f"elastic_worker_compute_seconds{JOB}"},
            ),
            Graph(
                "Straggler score",
                "Per slot, beside the median of the peers.",
                "none",
                {"{{node}} rank {{rank}}": f"elastic_straggler_score{JOB}"},
            ),
        ),
    ),
    Board(
        "recovery",
        "Elastic: recovery",
        (
            Graph(
                "Incidents",
                "By what happened and what found it.",
                "none",
                {"{{kind}} by {{detector}}": f"elastic_incidents_total{JOB}"},
            ),
            Graph("Open incidents", "Not recovered from yet.", "none", {"open": f"elastic_incidents_open{JOB}"}),
            Graph(
                "Recoveries",
                "And the steps that they had redone.",
                "none",
                {
                    "recoveries": f"elastic_recoveries_total{JOB}",
                    "steps redone": f"elastic_steps_redone_total{JOB}",
                },
            ),
            Graph(
                "Seconds lost",
                "As the ledger says it of each incident.",
                "s",
                {"lost": f"elastic_incident_seconds_total{JOB}"},
            ),
            Graph(
                "By phase",
                "What recoveries have cost, by phase.",
                "s",
                {"{{phase}}": f"elastic_recovery_seconds_sum{JOB}"},
            ),
            Graph("Generation", "Number of the present world.", "none", {"generation": f"elastic_generation{JOB}"}),
        ),
    ),
    Board(
        "snapshots",
        "Elastic: snapshots",
        (
            Graph(
                "Steps at risk",
                "Since the newest safe snapshot.",
                "none",
                {"steps": f"elastic_snapshot_age_steps{JOB}"},
            ),
            Graph(
                "Vulnerable",
                "Seconds without a safe snapshot of the present world.",
                "s",
                {"seconds": f"elastic_vulnerable_seconds_total{JOB}"},
            ),
            Graph(
                "Memory",
                "Of snapshots, and what they may take.",
                "bytes",
                {
                    "{{node}}": f"elastic_snapshot_bytes{JOB}",
                    "{{node}} may take": f"elastic_snapshot_budget_bytes{JOB}",
                },
            ),
            Graph("Safe step", "As each node knows it.", "none", {"{{node}}": f"elastic_snapshot_step{JOB}"}),
        ),
    ),
    Board(
        "nodes",
        "Elastic: nodes",
        (
            Graph(
                "State",
                "1 for the state that a node is in.",
                "none",
                {"{{node}} {{state}}": f"elastic_node_state{JOB}"},
            ),
            Graph(
                "Heartbeats",
                "Seconds since a node was heard of.",
                "s",
                {"{{node}}": f"elastic_heartbeat_age_seconds{JOB}"},
            ),
            Graph(
                "Connected",
                "1 while an agent's stream to the controller is open.",
                "none",
                {"{{node}}": f"elastic_agent_connected{JOB}"},
            ),
            Graph(
                "Processors",
                "Busy, by mode.",
                "none",
                {"{{node}} {{mode}}": f'rate(elastic_node_cpu_seconds_total{JOB[:-1]},mode!="idle"}}[1m])'},
            ),
            Graph("Load", "Processes that run or wait to.", "none", {"{{node}}": f"elastic_node_load1{JOB}"}),
            Graph(
                "Memory",
                "Of the node and of its workers.",
                "bytes",
                {
                    "{{node}} {{kind}}": f"elastic_node_memory_bytes{JOB}",
                    "{{node}}/{{local_rank}}": f"elastic_worker_memory_bytes{JOB}",
                },
            ),
            Graph(
                "Workers",
                "Processor time of each.",
                "none",
                {"{{node}}/{{local_rank}}": f"rate(elastic_worker_cpu_seconds_total{JOB}[1m])"},
            ),
            Graph(
                "Network",
                "Over all interfaces but the loopback.",
                "Bps",
                {"{{node}} {{direction}}": f"rate(elastic_node_network_bytes_total{JOB}[1m])"},
            ),
            Graph(
                "Network errors",
                "Errors and drops.",
                "none",
                {"{{node}} {{direction}}": f"elastic_node_network_errors_total{JOB}"},
            ),
            Graph("Disk", "Free where output is written.", "bytes", {"{{node}}": f"elastic_node_disk_free_bytes{JOB}"}),
        ),
    ),
    Board(
        "pipeline",
        "Elastic: pipeline",
        (
            Graph(
                "Gradient norms",
                "Of each stage, where they are measured.",
                "none",
                {"stage {{stage}}": f"elastic_gradient_norm{JOB}"},
            ),
            Graph(
                "Compute",
                "Of each rank of a stage, per step.",
                "s",
                {"rank {{rank}}": f"elastic_worker_compute_seconds{JOB}"},
            ),
            Graph(
                "Approximations",
                "Times that layers were made from others.",
                "none",
                {"stage {{stage}}": f"elastic_approximations_total{JOB}"},
            ),
        ),
    ),
)


def dashboard(board: Board) -> str:
    """Return a dashboard as JSON for Grafana."""
    source = DataSourceRef(type_val="prometheus", uid="${datasource}")
    made = (
        build.Dashboard(board.title)
        .uid(f"elastic-{board.name}")
        .tags(["elastic"])
        .refresh("10s")
        .time("now-1h", "now")
        .with_variable(build.DatasourceVariable("datasource").label("Prometheus").type("prometheus"))
        .with_variable(
            build.QueryVariable("elastic_job")
            .label("Job")
            .datasource(source)
            .query(JOB_VARIABLE)
            .refresh(VariableRefresh.ON_TIME_RANGE_CHANGED)
        )
    )
    for graph in board.graphs:
        panel = timeseries.Panel().title(graph.title).description(graph.description).unit(graph.unit).datasource(source)
        for name, (legend, query) in zip("ABCDEFGH", graph.queries.items(), strict=False):
            panel = panel.with_target(prometheus.Dataquery().expr(query).legend_format(legend).ref_id(name))
        made = made.with_panel(panel.span(12).height(8))
    return JSONEncoder(sort_keys=True, indent=2).encode(made.build()) + "\n"


def main() -> None:
    """Write all of them."""
    FOLDER.mkdir(exist_ok=True)
    for board in BOARDS:
        file = FOLDER / f"{board.name}.json"
        file.write_text(dashboard(board))


if __name__ == "__main__":
    main()
