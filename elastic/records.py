"""The record of consumed samples: which ids each committed step used, one JSON line per (step, slot).

A line is written when this worker sees the verdict on a step. A worker may die after it wrote and before anybody else
saw that verdict; the step is then redone and written again under a newer generation. So for each (step, slot) the line
with the highest generation is the truth: `read_record` applies that rule.
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path


class SampleRecord:
    """Appends to one worker's file; a line is one write, so that a kill leaves no half of one."""

    def __init__(self, folder: Path, worker: str) -> None:
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{worker.replace('/', '-')}.jsonl"
        self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o644)

    def write(self, step: int, generation: int, slots: Mapping[int, tuple[int, ...]]) -> None:
        """Append the slots of one step."""
        lines = [
            json.dumps({"step": step, "slot": slot, "generation": generation, "ids": list(ids)}) + "\n"
            for slot, ids in slots.items()
        ]
        os.write(self._fd, "".join(lines).encode())


def read_record(folder: Path) -> dict[tuple[int, int], tuple[int, ...]]:
    """Return (step, slot) -> ids of the committed attempt, over all workers' files in a folder."""
    newest: dict[tuple[int, int], tuple[int, tuple[int, ...]]] = {}
    for path in sorted(folder.glob("*.jsonl")):
        for line in path.read_text().splitlines():
            entry = json.loads(line)
            key = (entry["step"], entry["slot"])
            if key not in newest or entry["generation"] > newest[key][0]:
                newest[key] = (entry["generation"], tuple(entry["ids"]))
    return {key: ids for key, (_, ids) in sorted(newest.items())}
