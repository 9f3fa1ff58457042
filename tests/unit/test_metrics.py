"""What Prometheus is shown: values that agree with the ledger, in its format; and an exporter that harms nobody."""

from __future__ import annotations

import asyncio
import re
import shutil
import socket
import subprocess
import urllib.error
import urllib.request
from collections.abc import Iterable, Mapping
from pathlib import Path

import pytest
import yaml
from prometheus_client import CollectorRegistry, generate_latest
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from controller.metrics import job_metrics
from elastic.errors import ConfigError
from monitoring import metrics
from monitoring.dashboards import BOARDS, FOLDER, Board, dashboard
from monitoring.exporter import Exporter, ExporterConfig
from monitoring.metrics import Definition, Page
from tests.unit.controllers import A, B, Job

RULES = Path(__file__).parents[2] / "monitoring" / "rules.yaml"
DOCUMENTED = (Path(__file__).parents[2] / "docs" / "metrics.md").read_text()
needs_promtool = pytest.mark.skipif(shutil.which("promtool") is None, reason="promtool is not here: install Debian's prometheus")


def text_of(families: Iterable[Metric]) -> str:
    class Given(Collector):
        def collect(self) -> Iterable[Metric]:
            return families

    registry = CollectorRegistry()
    registry.register(Given())
    return generate_latest(registry).decode()


def values(job: Job) -> Mapping[tuple[str, ...], float]:
    """The values that a job shows: (name, values of its labels) -> value."""
    shown = {}
    for family in job_metrics(job.machine, job.now):
        for sample in family.samples:
            shown[(sample.name, *list(sample.labels.values())[1:])] = sample.value
    return shown


def lost_and_back() -> Job:
    """Two workers train, one is killed, the other one goes on."""
    job = Job(join_timeout_s=5.0)
    job.running("n0", "n1")
    for step in range(4, 14):
        job.tick(1.0)
        job.train(1, step, A, B)
    job.tick(0.5)
    job.exits(B)
    job.tick(1.0)
    job.prepare(2, 13, A)
    job.tick(0.5)
    job.switch(2, 13, A)
    job.tick(1.5)
    job.train(2, 14, A)
    return job


def badput(shown: Mapping[tuple[str, ...], float]) -> float:
    return sum(value for key, value in shown.items() if key[0] == "elastic_badput_seconds_total")


def test_every_second_has_a_reason_and_totals_agree_with_the_ledger() -> None:
    job = lost_and_back()
    shown = values(job)
    lost_s = sum(data["incident"].seconds_lost for kind, data in job.ledger if kind == "incident")
    assert lost_s == pytest.approx(1.0 + 0.5 + 1.5 - 1.0)  # less one step
    assert shown["elastic_incident_seconds_total",] == pytest.approx(lost_s)
    assert shown["elastic_elapsed_seconds_total",] == pytest.approx(job.now)
    unsettled_s = shown["elastic_unsettled_seconds",]
    assert unsettled_s == 0.0 and shown["elastic_productive_seconds_total",] + badput(shown) == pytest.approx(job.now)
    assert badput(shown) == pytest.approx(lost_s + shown["elastic_badput_seconds_total", "startup"])
    assert shown["elastic_badput_seconds_total", "regroup"] == pytest.approx(1.0)
    assert shown["elastic_badput_seconds_total", "move"] == pytest.approx(0.5)
    assert shown["elastic_badput_seconds_total", "redo"] == pytest.approx(0.5)
    assert shown["elastic_recovery_seconds_sum", "regroup"] == pytest.approx(1.0)
    assert shown["elastic_incidents_total", "worker lost", "pidfd"] == 1 and shown["elastic_recoveries_total",] == 1
    assert shown["elastic_goodput_ratio", "all"] == pytest.approx(1 - badput(shown) / job.now)


def test_counters_continue_when_the_controller_was_restarted_from_its_ledger() -> None:
    before = lost_and_back()
    after = before.restarted()
    old, new = values(before), values(after)
    totals = [key for key in old if key[0].endswith(("_total", "_count", "_sum")) and key[0] != "elastic_samples_total"]
    assert len(totals) > 10
    for key in totals:
        assert new[key] == pytest.approx(old[key], abs=1e-5), key
    after.tick(0.5)
    assert values(after)["elastic_elapsed_seconds_total",] >= old["elastic_elapsed_seconds_total",]


def test_utilization_is_shown_where_the_peak_is_known() -> None:
    job = Job(join_timeout_s=5.0, flops_per_sample=1e9, peak_flops=1e10)
    job.running("n0", "n1")
    for step in range(4, 14):
        job.tick(1.0)
        job.train(1, step, A, B)
    assert values(job)["elastic_mfu_ratio",] == pytest.approx(4 * 1e9 / 1.0 / (2 * 1e10))  # four samples a step of 1 s
    assert ("elastic_mfu_ratio",) not in values(lost_and_back())


def test_a_long_quiet_job_writes_its_accounts() -> None:
    job = Job(join_timeout_s=5.0)
    job.running("n0", "n1")
    job.tick(700.0)
    assert [kind for kind, _ in job.ledger].count("time-accounted") == 2
    assert values(job.restarted())["elastic_elapsed_seconds_total",] > job.now - 301.0


@needs_promtool
def test_promtool_finds_nothing_to_complain_about() -> None:
    text = text_of(job_metrics(lost_and_back().machine, 30.0))
    done = subprocess.run(["promtool", "check", "metrics"], input=text, text=True, capture_output=True, timeout=60)
    assert done.returncode == 0 and not done.stdout and not done.stderr, done.stdout + done.stderr


@pytest.mark.parametrize("metric", metrics.CONTROLLER + metrics.AGENT, ids=lambda metric: metric.name)
def test_every_metric_is_documented(metric: Definition) -> None:
    labels = "".join(f" `{label}`" for label in metric.labels).replace("` `", "`, `")
    assert f"| `{metric.name}` | {metric.kind.value} |{labels} | {metric.help} |" in DOCUMENTED


def fetch(address: str) -> str:
    with urllib.request.urlopen(f"http://{address}/metrics", timeout=30) as reply:
        return str(reply.read().decode())


def test_a_port_in_use_is_one_clear_sentence() -> None:
    async def listen(port: int) -> None:
        with pytest.raises(ConfigError, match=rf"127\.0\.0\.1:{port} \(Address already in use\): choose another --metrics-port"):
            Exporter(ExporterConfig(port), list)

    with socket.create_server(("127.0.0.1", 0)) as taken:
        asyncio.run(listen(taken.getsockname()[1]))


def test_a_scrape_that_fails_is_the_scrapers_trouble_only(tmp_path: Path) -> None:
    page = Page("j")
    page.put(metrics.STEP, 7)
    broken = [True]

    def read() -> list[Metric]:
        if broken[0]:
            raise RuntimeError("broken")
        return page.families()

    async def scrape() -> str:
        exporter = Exporter(ExporterConfig(0, targets=tmp_path / "targets.json"), read)
        assert exporter.address in (tmp_path / "targets.json").read_text()
        with pytest.raises(urllib.error.HTTPError, match="500"):
            await asyncio.to_thread(fetch, exporter.address)
        broken[0] = False
        text = await asyncio.to_thread(fetch, exporter.address)
        await asyncio.to_thread(exporter.close)
        return text

    assert 'elastic_step{elastic_job="j"} 7.0' in asyncio.run(scrape())


@needs_promtool
def test_each_alert_fires_when_it_should_and_not_otherwise(tmp_path: Path) -> None:
    shutil.copy(RULES, tmp_path)
    shutil.copy(Path(__file__).with_name("rules_test.yaml"), tmp_path)
    done = subprocess.run(["promtool", "test", "rules", tmp_path / "rules_test.yaml"], text=True, capture_output=True, timeout=60)
    assert done.returncode == 0, done.stdout + done.stderr


def test_each_alert_is_tested_and_documented_and_reads_what_there_is() -> None:
    rules = [rule for group in yaml.safe_load(RULES.read_text())["groups"] for rule in group["rules"]]
    tested = Path(__file__).with_name("rules_test.yaml").read_text()
    known = {metric.name for metric in metrics.CONTROLLER + metrics.AGENT}
    for rule in rules:
        assert set(re.findall(r"elastic_\w+", rule["expr"])) - {"elastic_job"} <= known | {"elastic_step_seconds_bucket"}, rule
        name = rule.get("alert")
        assert name is None or (f"| `{name}` |" in DOCUMENTED and f"alertname: {name}\n" in tested), name


@pytest.mark.parametrize("board", BOARDS, ids=lambda board: board.name)
def test_the_dashboards_are_what_their_program_makes_and_show_what_there_is(board: Board) -> None:
    kept = (FOLDER / f"{board.name}.json").read_text()
    assert dashboard(board) == kept, "run python -m monitoring.dashboards"
    known = {metric.name for metric in metrics.CONTROLLER + metrics.AGENT}
    shown = {re.sub(r"(?<=_seconds)_(bucket|sum|count)$", "", name) for graph in board.graphs for query in graph.queries.values()
             for name in re.findall(r"elastic_\w+", query)} - {"elastic_job"}
    assert shown <= known
