"""Lines for people and for machines."""

from __future__ import annotations

import json
from datetime import datetime

from elastic.logs import Log


def test_people_see_who_speaks() -> None:
    assert Log("controller", "j").line("all is well", kind="x") == "[controller] all is well"
    assert Log("agent", "j", "n0").line("all is well") == "[agent n0] all is well"
    assert Log("agent", "j", "n0").line_of_worker("hello", "n0/1.1", 3, "stdout", lambda: (1, 2)) == "[3] hello"


def test_machines_are_told_of_which_job_node_rank_generation_and_step() -> None:
    log = Log("agent", "j", "n0", as_json=True, where=lambda: (4, 17))
    line = json.loads(log.line('a "quoted" line', kind="x"))
    assert datetime.fromisoformat(line.pop("time")).tzinfo is not None
    assert line == {
        "source": "agent", "job": "j", "node": "n0", "rank": None, "generation": 4, "step": 17,
        "message": 'a "quoted" line', "kind": "x",
    }  # fmt: skip
    line = json.loads(log.line_of_worker("\u2603", "n0/1.1", 3, "stderr", lambda: (5, 18)))
    assert {key: line[key] for key in ("source", "rank", "worker", "stream", "generation", "step", "message")} == {
        "source": "worker", "rank": 3, "worker": "n0/1.1", "stream": "stderr", "generation": 5, "step": 18, "message": "\u2603",
    }  # fmt: skip
