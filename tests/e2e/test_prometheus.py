"""A real Prometheus looks at a real job, through a kill, a join and a new controller: every panel of every dashboard has data."""

from __future__ import annotations

import json
import shutil
import socket
import urllib.parse
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from tests.e2e.jobs import Job, members_of

ROOT = Path(__file__).parents[2]
SCRIPT = Path(__file__).with_name("train_pipeline.py")
PROMETHEUS = shutil.which("prometheus")
WORKERS = 3
PANEL_FILES = sorted((ROOT / "monitoring" / "grafana").glob("*.json"))

pytestmark = [
    pytest.mark.e2e,
    pytest.mark.skipif(PROMETHEUS is None, reason="prometheus is not here: install Debian's package of that name"),
]


class Prometheus:
    """A Prometheus that scrapes the targets of a job's run directory."""

    def __init__(self, job: Job) -> None:
        with socket.create_server(("127.0.0.1", 0)) as free:
            self.address = f"127.0.0.1:{free.getsockname()[1]}"
        scrape = {
            "job_name": "elastic",
            "file_sd_configs": [{"files": [f"{job.folder}/run/metrics-*.json"], "refresh_interval": "1s"}],
        }
        config = {
            "global": {"scrape_interval": "1s", "evaluation_interval": "1s"},
            "rule_files": [str(ROOT / "monitoring" / "rules.yaml")],
            "scrape_configs": [scrape],
        }
        (job.folder / "prometheus.yml").write_text(json.dumps(config))  # which is YAML, too
        job.start(
            "prometheus",
            *(PROMETHEUS, f"--config.file={job.folder}/prometheus.yml", f"--web.listen-address={self.address}"),
            f"--storage.tsdb.path={job.folder}/prometheus",
        )

    def get(self, path: str, **parameters: str) -> Any:
        url = f"http://{self.address}/api/v1/{path}?{urllib.parse.urlencode(parameters)}"
        with urllib.request.urlopen(url, timeout=30) as reply:
            return json.load(reply)["data"]

    def value(self, query: str) -> float | None:
        """The sum of what a query returns; None for nothing, also where Prometheus does not answer yet."""
        try:
            found = self.get("query", query=query)["result"]
        except OSError:
            return None
        return sum(float(one["value"][1]) for one in found) if found else None


def queries() -> list[tuple[str, str]]:
    """All queries of all dashboards, with where they are."""
    found = []
    for file in PANEL_FILES:
        for panel in json.loads(file.read_text())["panels"]:
            for target in panel["targets"]:
                found.append((f"{file.stem}: {panel['title']}", target["expr"].replace("$elastic_job", "job")))
    return found


def test_every_panel_has_data_and_totals_agree_with_the_ledger(job: Job) -> None:
    assert len(PANEL_FILES) == 6
    job.run(
        WORKERS,
        *("--metrics-port", 0, "--snapshot-every", 1, "--approximate-recovery"),
        train=("--blocks", 6, "--plain", "--stages", WORKERS, *job.held, "--pause-ms", 60),
        script=SCRIPT,
    )
    prometheus = Prometheus(job)
    before = job.wait_for_world(WORKERS, beyond_step=3)
    job.kill(members_of(before).popitem()[1]["pid"])
    job.wait_for(lambda status: status["incidents_total"] == 1, "an incident")
    after = job.wait_for_world(WORKERS, beyond_step=before["step"] + 5)
    job.eventually(lambda: prometheus.value("elastic_incidents_total") == 1, "a scrape of the incident")
    job.kill(after["controller_pid"])
    again = job.wait_for(lambda s: s if s["controller_pid"] != after["controller_pid"] else None, "another controller")
    job.wait_for_world(WORKERS, beyond_step=again["step"] + 10)

    def without_data() -> list[tuple[str, str]]:
        return [(where, query) for where, query in queries() if prometheus.value(query) is None]

    try:
        job.eventually(lambda: not without_data(), "data for every panel")
    except AssertionError:
        raise AssertionError(f"these panels have no data: {without_data()}") from None
    assert prometheus.get("label/elastic_job/values") == ["job"], "what the variable of the dashboards asks for"
    assert {target["health"] for target in prometheus.get("targets")["activeTargets"]} == {"up"}
    # One instant for both, since time goes on.
    whole = "sum(elastic_productive_seconds_total) + sum(elastic_badput_seconds_total) + sum(elastic_unsettled_seconds)"
    assert prometheus.value(f"({whole}) / sum(elastic_elapsed_seconds_total)") == pytest.approx(1.0, abs=0.01)
    status = job.status()
    assert status is not None
    lost_s = sum(incident["seconds_lost"] for incident in status["incidents"])
    assert prometheus.value("elastic_incident_seconds_total") == pytest.approx(lost_s, abs=1e-6)
    assert prometheus.value("elastic_incidents_total") == len(status["incidents"]) == status["incidents_total"]
    # The counters went on: none of them was seen to fall back when the controller was started again.
    for counter in ("elapsed_seconds_total", "productive_seconds_total", "incident_seconds_total", "recovery_seconds_count"):
        assert prometheus.value(f"resets(max(elastic_{counter})[5m:1s])") == 0, counter
    assert (prometheus.value("elastic_elapsed_seconds_total") or 0.0) >= after["elapsed_s"]
    assert job.ask("stop").code == 0
    job.ended(job.started["run"])
    job.started["prometheus"].terminate()
    job.ended(job.started["prometheus"])
    job.assert_nothing_is_left()
