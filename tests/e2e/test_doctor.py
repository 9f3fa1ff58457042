"""`elastic doctor` as a person and as a machine read it, on this machine and on one that is not ready."""

from __future__ import annotations

import json
import os
from typing import Any

import pytest
import torch

from recovery.choosing import describe
from tests.e2e.jobs import ELASTIC, Done, Job

pytestmark = pytest.mark.e2e

CHECKS = [
    *("python", "torch", "same bits", "processes", "shared memory", "snapshot memory"),
    *("erasure code", "checksums", "network tools"),
]


def said_of(done: Done) -> dict[str, dict[str, Any]]:
    """Return the findings by check."""
    return {finding["check"]: finding for finding in json.loads(done.out)["checks"]}


def assert_not_ready(done: Done, *said: str) -> None:
    """Fail unless one sentence says what hinders a job here."""
    assert done.code == 1, done
    assert len(done.err.splitlines()) == 1 and done.err.startswith("elastic: this machine is not ready: "), done.err
    assert all(words in done.err for words in said), done.err


def test_a_person_is_shown_a_table(job: Job) -> None:
    done = job.elastic("doctor", "--snapshot-memory", "1MiB")
    assert (done.code, done.err) == (0, "")
    assert all(f" {check} " in done.out for check in ("what to do", *CHECKS)), done.out


def test_a_machine_is_told_what_workers_will_find(job: Job) -> None:
    done = job.elastic("doctor", "--json", "--snapshot-memory", "1MiB")
    assert (done.code, done.err) == (0, "")
    assert json.loads(done.out)["ready"] is True
    said = said_of(done)
    assert list(said) == CHECKS
    assert not any(finding["hinders"] for finding in said.values())
    assert said["same bits"]["result"].startswith(f"torch {torch.__version__}, 1 threads, ")
    assert said["erasure code"]["result"] == describe()
    assert "snapshots may take 1 MiB" in said["snapshot memory"]["result"]


def test_more_memory_than_the_machine_has_hinders_a_job(job: Job) -> None:
    done = job.elastic("doctor", "--json", "--snapshot-memory", "999999GiB")
    assert_not_ready(done, "snapshots may take 999999 GiB, but this machine has ", "give less --snapshot-memory")
    assert json.loads(done.out)["ready"] is False
    assert [check for check, finding in said_of(done).items() if finding["hinders"]] == ["snapshot memory"]


def test_a_limit_of_the_shell_hinders_a_job(job: Job) -> None:
    done = job.call("bash", "-c", f"ulimit -f 1024; exec {ELASTIC} doctor --snapshot-memory 64MiB")
    assert_not_ready(done, "no memory file can be so large: File too large", "ulimit -f")


def test_a_torch_that_cannot_be_imported_hinders_a_job(job: Job) -> None:
    (job.folder / "torch.py").write_text("raise ImportError('libtorch_cpu.so: cannot open shared object file')")
    path = os.pathsep.join(filter(None, (str(job.folder), os.environ.get("PYTHONPATH"))))
    done = job.call("env", f"PYTHONPATH={path}", ELASTIC, "doctor")
    assert_not_ready(done, "the checks could not be made: ImportError: libtorch_cpu.so: cannot open", "install")
