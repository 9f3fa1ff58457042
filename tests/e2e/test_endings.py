"""However a run ends, it leaves nothing behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import time
from pathlib import Path

import pytest

from tests.e2e.jobs import Job

pytestmark = pytest.mark.e2e

ORDERLY_S = 5.0


def shared_memory() -> set[str]:
    """Return the names of what is in shared memory now."""
    return {name for name in os.listdir("/dev/shm") if not name.startswith("sem.mp-")}


def assert_clean(job: Job) -> None:
    """Fail if the job left a process, or a directory of an agent."""
    job.assert_nothing_is_left(timeout_s=1.0)
    assert not list(job.folder.glob("elastic-agent-*"))


def test_ctrl_c_ends_everything_in_order_even_what_does_not_want_to(job: Job) -> None:
    before = shared_memory()
    run = job.run(3, train=(*job.held, "--stubborn"))
    job.wait_for_world(3, beyond_step=2)
    began = time.monotonic()
    run.send_signal(signal.SIGINT)
    done = job.ended(run)
    assert time.monotonic() - began < ORDERLY_S
    assert done.code == 130 and "Traceback" not in done.err
    assert_clean(job)
    assert shared_memory() <= before
    assert job.summary()["state"] == "stopped"


def test_ctrl_c_while_the_workers_are_being_started(job: Job) -> None:
    run = job.run(3, train=job.held)
    job.wait_for(lambda status: status["nodes"], "the agent")
    began = time.monotonic()
    run.send_signal(signal.SIGINT)
    done = job.ended(run)
    assert time.monotonic() - began < ORDERLY_S
    assert done.code == 130 and "Traceback" not in done.err
    assert_clean(job)


def test_a_second_ctrl_c_does_not_wait(job: Job) -> None:
    run = job.run(2, train=(*job.held, "--stubborn"))
    job.wait_for_world(2, beyond_step=2)
    run.send_signal(signal.SIGINT)
    time.sleep(0.3)  # one press, then another
    run.send_signal(signal.SIGINT)
    done = job.ended(run, timeout_s=ORDERLY_S)
    assert done.code == 130 and "Traceback" not in done.err
    assert_clean(job)


def test_nothing_outlives_a_run_that_is_killed(job: Job) -> None:
    before = shared_memory()
    run = job.run(3, train=job.held)
    job.wait_for_world(3, beyond_step=2)
    run.kill()
    run.wait(5)
    job.assert_nothing_is_left()
    assert shared_memory() <= before


def test_a_run_that_resumes_an_ended_job_is_refused_in_one_sentence(job: Job) -> None:
    run = job.run(1, train=job.held)
    job.wait_for(lambda status: status["nodes"], "the agent")
    run.send_signal(signal.SIGINT)
    job.ended(run)
    folder = job.folder / "run"
    done = job.elastic("run", "--port", 0, "--run-dir", folder, Path(__file__).with_name("train.py"))
    assert done.code != 0 and "Traceback" not in done.err
    assert "has stopped already" in done.err
    assert_clean(job)


def test_an_agent_that_cannot_start_ends_the_run(job: Job) -> None:
    options = ("--port", 0, "--run-dir", job.folder / "run", "--local-addr", "192.0.2.1")
    done = job.elastic("run", *options, Path(__file__).with_name("train.py"), timeout_s=20)
    assert done.code == 2 and "Traceback" not in done.err
    assert "elastic agent: the agent's peer service cannot listen on 192.0.2.1" in done.err
    assert_clean(job)


def test_a_port_in_use_is_said_in_one_sentence_and_leaves_nothing(job: Job) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        done = job.elastic("run", "--port", port, "--run-dir", job.folder / "run", Path(__file__).with_name("train.py"))
    assert done.code == 2 and "Traceback" not in done.err
    assert f"cannot listen on 127.0.0.1:{port}: the port is in use" in done.err
    assert_clean(job)


def test_with_json_each_line_says_of_which_job_node_generation_and_step_it_is(job: Job) -> None:
    run = job.run(2, "--log-format", "json", train=("--epochs", 1))
    done = job.ended(run)
    assert done.code == 0, done.err
    lines = [json.loads(line) for line in (done.err + done.out).splitlines()]
    assert all({"time", "source", "job", "node", "rank", "generation", "step", "message"} <= line.keys() for line in lines)
    assert {line["job"] for line in lines} == {"job"} and {line["source"] for line in lines} >= {"run", "controller"}
    ended = next(line for line in lines if line.get("kind") == "job-ended")
    assert ended["generation"] == 1 and ended["step"] == job.summary()["step"]
    assert lines[-1]["summary"]["state"] == "succeeded"
