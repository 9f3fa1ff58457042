"""What the doctor says of memory, on machines unlike this one."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path

import pytest

from agent.doctor import Memory, group_limit_bytes, judge_memory, measure_memory, memory_file_obstacle

GIB = 2**30
ROOMY = Memory(machine=64 * GIB, group=math.inf, available=40 * GIB, promisable=math.inf)


@pytest.mark.parametrize(
    ("memory", "file_obstacle", "said", "advice", "hinders"),
    [
        (ROOMY, "", "16 GiB, 40 GiB are free now", "", False),
        (replace(ROOMY, available=2 * GIB), "", "2 GiB are free now", "free some", False),
        (replace(ROOMY, machine=15.5 * GIB), "", "but this machine has 15.5 GiB", "give less", True),
        (replace(ROOMY, group=GIB), "", "but the control group of this process may use 1 GiB", "container", True),
        (
            replace(ROOMY, promisable=GIB),
            "",
            "(vm.overcommit_memory = 2) still promises 1 GiB",
            "overcommit_ratio",
            True,
        ),
        (ROOMY, "File too large", "no memory file can be so large: File too large", "ulimit -f", True),
    ],
    ids=["roomy", "busy", "small machine", "container", "no overcommit", "ulimit"],
)
def test_what_stands_in_the_way_of_snapshots(
    memory: Memory, file_obstacle: str, said: str, advice: str, hinders: bool
) -> None:
    finding = judge_memory(16 * GIB, memory, file_obstacle)
    assert said in finding.result and advice in finding.advice
    assert finding.hinders == hinders
    assert bool(finding.advice) == bool(advice)


def test_this_machine_can_give_a_mebibyte() -> None:
    assert not judge_memory(2**20, measure_memory(), memory_file_obstacle(2**20)).hinders


@pytest.mark.parametrize("size_bytes", [2**60, 2**70])
def test_no_memory_file_is_larger_than_an_address_space(size_bytes: int) -> None:
    assert memory_file_obstacle(size_bytes) != ""


@pytest.mark.parametrize(
    ("groups", "files", "limit"),
    [
        ("0::/user/job\n", {"user/job/memory.max": "max\n", "user/memory.max": "4096\n"}, 4096),
        ("0::/\n", {"memory.max": "8192\n"}, 8192),
        ("4:memory:/job\n0::/\n", {"memory/job/memory.limit_in_bytes": "1024\n"}, 1024),
        ("4:cpu:/job\n", {"job/memory.max": "1\n"}, math.inf),
        ("0::/\n", {}, math.inf),
    ],
    ids=["a group above", "inside a container", "version 1", "of another kind", "none"],
)
def test_the_least_limit_of_the_control_groups_counts(
    tmp_path: Path, groups: str, files: dict[str, str], limit: float
) -> None:
    proc = tmp_path / "cgroup"
    proc.write_text(groups)
    for name, text in files.items():
        file = tmp_path / "mounted" / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(text)
    assert group_limit_bytes(proc, tmp_path / "mounted") == limit
