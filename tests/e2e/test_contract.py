"""What a real training loop does, in worlds of several workers that lose some: the same bits, one stop, one save."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable

import pytest
import torch

from tests.e2e.jobs import Job, Status, members_of, pids_of

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(600)]

TRAINED = ("--epochs", 3)
STEPS = 3 * 51
BUSY_S = 30.0
RECOVERIES = 25
COMPILING_S = 150.0  # several processes compile at once, on a busy machine


def finish(job: Job, steps: int = STEPS, timeout_s: float = 90) -> Status:
    job.let_go()
    done = job.ended(job.started["run"], timeout_s=timeout_s)
    assert done.code == 0, done.err
    summary = job.summary()
    assert summary["state"] == "succeeded" and summary["step"] == steps
    job.assert_nothing_is_left()
    return summary


@pytest.mark.parametrize(
    "features",
    [("amp", "average"), ("readers", "weights"), ("odd", "checkpoint", "evaluate")],
    ids=" ".join,
)
def test_real_loops_end_with_the_same_bits_whoever_is_killed(
    job: Job, undisturbed: Callable[..., str], features: tuple[str, ...]
) -> None:
    train = (*TRAINED, "--with", *features)
    job.run(3, train=(*train, *job.held))
    for _ in range(3):
        before = job.wait_for_world(3, beyond_step=(job.status() or {"step": 0})["step"] + 3)
        job.kill(random.choice(list(pids_of(before))))
        job.wait_for(lambda status: status["world_size"] == 2, "a world of two")
    job.wait_for_world(3)
    finish(job)
    assert job.fingerprint() == undisturbed(*train)
    assert len({(result["loss"], result["zeros"]) for result in job.results()}) == 1


@pytest.mark.slow
def test_a_compiled_model_ends_with_the_same_bits_after_a_kill(job: Job, undisturbed: Callable[..., str]) -> None:
    train = ("--epochs", 1, "--with", "compile")
    alone = undisturbed(*train)
    job.run(2, train=(*train, *job.held))
    before = job.wait_for_world(2, beyond_step=2, timeout_s=COMPILING_S)
    job.kill(random.choice(list(pids_of(before))))
    job.wait_for(lambda status: status["world_size"] == 1, "a world of one")
    job.wait_for_world(2, timeout_s=COMPILING_S)
    finish(job, steps=51, timeout_s=COMPILING_S)
    assert job.fingerprint() == alone


def test_one_worker_stops_all_after_the_same_step(job: Job) -> None:
    done = job.ended(job.run(3, train=("--epochs", 9, "--stop-at", 60, "--out", job.folder / "out")))
    assert done.code == 0, done.err
    summary = job.summary()
    assert summary["state"] == "succeeded" and summary["step"] == 61
    assert [result["step"] for result in job.results()] == [61] * 3
    job.assert_nothing_is_left()


def saving(job: Job) -> list[int]:
    """Pids of the processes that have begun to save."""
    return [int(path.name.partition("-")[2]) for path in job.folder.glob("saving-*")]


def test_on_end_runs_once(job: Job) -> None:
    file = job.folder / "saved.pt"
    done = job.ended(job.run(3, train=("--epochs", 1, "--save", file)))
    assert done.code == 0, done.err
    assert torch.load(file, weights_only=True)["step"] == 51
    assert len(saving(job)) == 1
    job.assert_nothing_is_left()


def test_a_save_that_is_killed_is_done_by_another_worker(job: Job) -> None:
    file, now = job.folder / "saved.pt", job.folder / "now"
    job.run(3, train=("--epochs", 1, "--save", file, "--hold-save", now))
    first = job.eventually(lambda: saving(job), "somebody to save")
    job.kill(first[0])
    second = job.eventually(lambda: [pid for pid in saving(job) if pid not in first], "somebody else to save")
    assert not file.exists()
    now.touch()
    done = job.ended(job.started["run"])
    assert done.code == 0, done.err
    assert file.exists() and len(first) == len(second) == 1
    job.assert_nothing_is_left()


def test_a_job_whose_save_fails_everywhere_fails(job: Job) -> None:
    nowhere = job.folder / "no" / "such" / "folder.pt"
    done = job.ended(job.run(2, train=("--epochs", 1, "--save", nowhere)))
    assert done.code == 1
    summary = job.summary()
    assert summary["state"] == "failed" and "on_end()" in summary["reason"]
    assert "FileNotFoundError" in summary["reason"] and "in save" in summary["traceback"]


# -- hangs ---------------------------------------------------------------------------------------------------------


def test_a_worker_that_hangs_in_user_code_is_replaced(job: Job, undisturbed: Callable[..., str]) -> None:
    job.run(3, "--hang-timeout", 2, train=(*TRAINED, *job.held, "--hang", "20:1", "--failed", job.folder / "hung"))
    before = job.wait_for_world(3, beyond_step=3)
    job.wait_for(lambda status: status["incidents"], "the hang to be found")
    after = job.wait_for_world(3, beyond_step=25)
    assert len(pids_of(before) & pids_of(after)) == 2
    (incident,) = finish(job)["incidents"]
    assert incident["detected_by"] == "progress" and "no progress for 2." in incident["reason"]
    assert job.fingerprint() == undisturbed(*TRAINED)


def test_a_long_evaluation_and_an_announced_pause_are_no_hangs(job: Job) -> None:
    train = (*TRAINED, *job.held, "--pause-ms", 10, "--long", "10:evaluate", "20:busy", "30:heartbeat")
    job.run(2, "--hang-timeout", 1, train=train)
    job.wait_for_world(2, beyond_step=32)
    assert finish(job)["incidents_total"] == 0


def test_a_rank_that_leaves_the_loop_alone_is_named(job: Job) -> None:
    done = job.ended(job.run(3, train=(*TRAINED, "--leave", "20:1")))
    assert done.code == 1
    reason = job.summary()["reason"]
    assert "left the training loop after step 20" in reason and "session.stop()" in reason
    job.assert_nothing_is_left()


# -- what cannot work ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("train", "words"),
    [
        (("--differ", "lr"), "do not agree on the optimizers' settings"),
        (("--differ", "mean"), "call session.mean() with the same names"),
        (("--differ", "data"), "the first samples of the dataset differ"),
        (("--differ", "threads"), "what bits depend on"),
        (("--differ", "dist"), "use session.mean() in place of an all-reduce"),
    ],
    ids=["learning rates", "measures", "data", "threads", "torch.distributed"],
)
def test_workers_that_differ_end_the_job_with_a_sentence(job: Job, train: tuple[object, ...], words: str) -> None:
    done = job.ended(job.run(2, train=(*TRAINED, *train)))
    assert done.code == 1
    summary = job.summary()
    assert summary["state"] == "failed" and words in summary["reason"], summary["reason"]
    job.assert_nothing_is_left()


# -- leaks ---------------------------------------------------------------------------------------------------------


def size_of(pid: int) -> tuple[int, int, int]:
    """Open files, threads, and resident kilobytes of a process."""
    with open(f"/proc/{pid}/statm") as file:
        resident = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") // 1024
    return len(os.listdir(f"/proc/{pid}/fd")), len(os.listdir(f"/proc/{pid}/task")), resident


@pytest.mark.slow
def test_recoveries_leave_nothing_behind(job: Job) -> None:
    job.run(3, "--snapshot-every", 1, train=("--epochs", 3 * RECOVERIES, *job.held, "--pause-ms", 5))
    before = job.wait_for_world(3, beyond_step=3)
    survivor = members_of(before)["a/0.1"]["pid"]
    agent = before["nodes"][0]["agent_pid"]
    sizes = []
    for number in range(RECOVERIES):
        status = job.wait_for_world(3, beyond_step=(job.status() or {"step": 0})["step"] + 2)
        if number % 5 == 4:
            sizes.append((size_of(survivor), size_of(agent)))
        victims = pids_of(status) - {survivor}
        job.kill(random.choice(list(victims)))
        job.wait_for(lambda s: s["world_size"] == 2, "a world of two")
    job.ask("stop")
    job.ended(job.started["run"])
    for process in (0, 1):
        files, threads, resident = zip(*(size[process] for size in sizes), strict=True)
        assert files[-1] <= files[0] + 2, files
        assert threads[-1] <= threads[0] + 2, threads
        assert resident[-1] <= resident[0] * 1.1 + 4096, resident
    job.assert_nothing_is_left()


def test_a_busy_machine_raises_no_alarm(job: Job) -> None:
    job.run(3, train=("--epochs", 200, *job.held, "--pause-ms", 5))
    before = job.wait_for_world(3, beyond_step=3)
    hogs = [job.start(f"hog{number}", "sh", "-c", "while :; do :; done") for number in range(2 * (os.cpu_count() or 1))]
    until = time.monotonic() + BUSY_S
    while time.monotonic() < until:
        status = job.wait_for(lambda s: s, "a status")
        assert status["incidents_total"] == 0 and pids_of(status) == pids_of(before)
        time.sleep(0.5)
    for hog in hogs:
        hog.send_signal(signal.SIGKILL)
        hog.wait()
    job.ask("stop")
    job.ended(job.started["run"])
    assert job.summary()["incidents_total"] == 0
