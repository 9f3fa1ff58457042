"""Whoever holds a job up is named with the line of code, while it still lives, and what was found can be read afterwards."""

from __future__ import annotations

import json
import signal
import time
from pathlib import Path

import pytest

from tests.e2e.jobs import Job, members_of
from tests.e2e.train_stuck import CASES

SCRIPT = Path(__file__).with_name("train_stuck.py")
HANG_TIMEOUT_S = 3.0


def line_of(case: str) -> str:
    """FILE:LINE where the script gets stuck in this way."""
    lines = SCRIPT.read_text().splitlines()
    return f"{SCRIPT}:{next(n for n, line in enumerate(lines, 1) if line.endswith(f'# stuck: {case}'))}"


@pytest.mark.e2e
@pytest.mark.slow
def test_the_stuck_are_named_with_their_line_of_code(job: Job) -> None:
    options = ("--hang-timeout", HANG_TIMEOUT_S, "--max-restarts", 9)
    job.run(3, *options, script=SCRIPT, train=(job.folder,))
    step = job.wait_for_world(3, beyond_step=3)["step"]
    for number, case in enumerate(CASES, 1):
        (job.folder / case).touch()
        began = job.eventually(lambda c=case: not (job.folder / c).exists() and time.monotonic(), "a worker to get stuck")
        found = shown(job, number)
        assert time.monotonic() - began < HANG_TIMEOUT_S + 5
        (finding,) = found["findings"]
        assert f"worker {finding['worker']}" == found["incident"]["subject"], found
        assert "while others wait" in finding["why"] and line_of(case) in finding["place"], found
        assert ("reading data" in finding["place"]) == (case == "reader"), found
        assert [len(group["workers"]) for group in found["groups"]] == [2, 1], found
        step = job.wait_for_world(3, beyond_step=step + 3)["step"]
    stopped = min(members_of(job.status() or {}).items())
    job.kill(stopped[1]["pid"], signal.SIGSTOP)
    found = shown(job, len(CASES) + 1)
    (finding,) = found["findings"]
    assert finding["worker"] == stopped[0] and "stopped" in finding["why"] and str(SCRIPT) in finding["place"], found
    job.wait_for_world(3, beyond_step=step + 3)
    check_what_people_see(job)
    (job.folder / "go").touch()
    assert job.ended(job.started["run"]).code == 0
    assert job.summary()["incidents_total"] == len(CASES) + 1


def shown(job: Job, number: int) -> dict[str, object]:
    """What is known of an incident, once it is."""

    def look() -> dict[str, object] | None:
        done = job.ask("incidents", "show", number, "--json")
        return json.loads(done.out) if done.code == 0 else None

    return job.eventually(look, f"the evidence of incident {number}")


def check_what_people_see(job: Job) -> None:
    listed = job.ask("incidents")
    assert listed.code == 0 and listed.out.count("no progress") == len(CASES), listed.out
    summary = job.ask("incidents", "show", 1)
    assert "other.acquire()" in summary.out and "s lost" in summary.out and "2 worker(s)" in summary.out
    folder = Path(summary.out.strip().splitlines()[-1].rpartition(": ")[2])
    stacks = "".join(path.read_text() for path in (folder / "stacks").iterdir())
    assert "one.acquire()" in stacks, "the other thread of the deadlock"
    files = {"summary.txt", "incident.json", "status.json", "ledger.jsonl", "versions.json", "stacks", "logs"}
    assert {path.name for path in folder.iterdir()} == files
    assert "workers-lost" in (folder / "ledger.jsonl").read_text()
    unknown = job.ask("incidents", "show", 99)
    assert unknown.code == 2 and "no incident 99" in unknown.err and "1 to 4" in unknown.err, unknown.err
