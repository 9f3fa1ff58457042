"""Lines that daemons write about themselves and their workers: for people, or as JSON for machines.

Each JSON line says when, who says it (`source`), of which `job` and `node`, of which `rank` where it is a worker's, and in which
`generation` and after which `step`: what it takes to put the lines of many nodes together.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any

Where = Callable[[], tuple[int, int]]
"""Returns generation and newest committed step as they are known now."""


def nowhere() -> tuple[int, int]:
    """Before there is a world."""
    return 0, 0


@dataclass(slots=True)
class Log:
    """Writes lines to stderr.

    Attributes:
        source: "controller", "agent", "run". job, node: whose; node is empty where there is none.
        as_json: whether lines are JSON; otherwise they are for people. where: what they say of the job.
    """

    source: str
    job: str
    node: str = ""
    as_json: bool = False
    where: Where = nowhere

    def say(self, message: str, **more: Any) -> None:
        """Write a line; `more` is said in JSON only."""
        print(self.line(message, **more), file=sys.stderr, flush=True)

    def line(self, message: str, **more: Any) -> str:
        """Return the line that `say` writes."""
        if not self.as_json:
            return f"[{self.source} {self.node}] {message}" if self.node else f"[{self.source}] {message}"
        generation, step = self.where()
        return self._json(message, generation, step, more)

    def line_of_worker(self, message: str, worker: str, rank: int, stream: str, where: Where) -> str:
        """Return a line that a worker wrote, as the console shows it."""
        if not self.as_json:
            return f"[{rank}] {message}"
        generation, step = where()
        more = {"source": "worker", "rank": rank, "worker": worker, "stream": stream}
        return self._json(message, generation, step, more)

    def _json(self, message: str, generation: int, step: int, more: dict[str, Any]) -> str:
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        line = {"time": now, "source": self.source, "job": self.job, "node": self.node, "rank": None}
        return json.dumps({**line, "generation": generation, "step": step, "message": message, **more})
