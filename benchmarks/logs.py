"""Reading what the workers of training scripts have written, and the numbers that are made of it."""

from __future__ import annotations

import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Commit:
    """A step's first commit by any worker."""

    clock_s: float
    step: int
    world_size: int


def read_lines(folder: Path) -> list[dict[str, Any]]:
    """Return all workers' lines; one that is being written, or was as its worker was killed, is left out."""
    logs = sorted(folder.glob("*.jsonl"))
    return [json.loads(line) for log in logs for line in log.read_text().splitlines() if line.endswith("}")]


def read_events(folder: Path, event: str) -> list[dict[str, Any]]:
    """Return all workers' lines of one kind."""
    return [line for line in read_lines(folder) if line["event"] == event]


def read_commits(folder: Path) -> list[Commit]:
    """Return every step's first commit, in the order of time."""
    first: dict[int, Commit] = {}
    for line in sorted(read_events(folder, "commit"), key=lambda line: line["clock_s"]):
        first.setdefault(line["step"], Commit(line["clock_s"], line["step"], line["world_size"]))
    return sorted(first.values(), key=lambda commit: commit.clock_s)


def read_digests(folder: Path) -> dict[int, set[str]]:
    """Return the digests that workers logged after each step; a sound run has one per step."""
    digests: dict[int, set[str]] = {}
    for line in read_events(folder, "digest"):
        digests.setdefault(line["step"], set()).add(line["digest"])
    return digests


def spread(values: Sequence[float]) -> dict[str, float]:
    """Return min, median and max, rounded to a millisecond."""
    if not values:
        return {}
    return {
        "min": round(min(values), 3),
        "median": round(statistics.median(values), 3),
        "max": round(max(values), 3),
    }
