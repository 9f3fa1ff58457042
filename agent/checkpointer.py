"""The child process that touches checkpoints: `python -m elastic.launch checkpointer SETTINGS` with one JSON object.

It writes a snapshot, reads one, or looks for the newest, and says on its standard output how far it is and, in the
last line, what came of it: one JSON object each. A disk that is slow, full or gone can hang or kill this process and
nothing else. It gives way to training: low priority, one thread, and it ends with the agent that started it.
"""

from __future__ import annotations

import json
import mmap
import os
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, TextIO

import psutil

from agent.catalog import newest_checkpoint
from elastic.errors import ElasticError
from elastic.lifeline import die_with_parent
from elastic.snapshots import numbers_of, slice_of

if TYPE_CHECKING:
    from torch import Tensor  # imported where it is needed, since looking around does without

NICENESS = 10
_IO_LEVEL_LOWEST = 7


def main() -> int:
    """Do what the settings say; the exit code is 0, or 2 with an error in a sentence."""
    # Whatever a library prints is no answer.
    answers, sys.stdout = sys.stdout, sys.stderr
    given = json.loads(sys.argv[1])
    die_with_parent(given["parent"])
    os.nice(NICENESS)
    psutil.Process().ionice(psutil.IOPRIO_CLASS_BE, _IO_LEVEL_LOWEST)
    try:
        answer = _TASKS[given["task"]](given, answers)
    except ElasticError as error:
        _say(answers, {"error": str(error)})
        return 2
    _say(answers, answer)
    return 0


def _write(given: dict[str, Any], answers: TextIO) -> dict[str, Any]:
    from agent.checkpoints import write_checkpoint

    told = -1

    def progress(done_bytes: int, total_bytes: int) -> None:
        nonlocal told
        percent = 100 * done_bytes // max(total_bytes, 1)
        if percent > told:
            told = percent
            _say(answers, {"done_bytes": done_bytes, "total_bytes": total_bytes})

    slices = [(slice_of(fields), _mapped(fd, mmap.MAP_PRIVATE)) for fields, fd in given["slices"]]
    path = write_checkpoint(given["target"], slices, job=given["job"], keep=given["keep"], progress=progress)
    return {"path": path}


def _read(given: dict[str, Any], answers: TextIO) -> dict[str, Any]:
    from agent.checkpoints import read_checkpoint

    # Populated at once, since pages that are touched one by one cost more than reading them.
    return {"slice": numbers_of(read_checkpoint(given["path"], _mapped(given["fd"], mmap.MAP_SHARED | mmap.MAP_POPULATE)))}


def _newest(given: dict[str, Any], answers: TextIO) -> dict[str, Any]:
    newest = newest_checkpoint(given["target"], given["job"], given["before"])
    found = newest.found and {"path": newest.found.path, "marker": newest.found.marker.to_json()}
    return {"found": found, "passed_over": newest.passed_over}


_TASKS: dict[str, Callable[[dict[str, Any], TextIO], dict[str, Any]]] = {
    "write": _write,
    "read": _read,
    "newest": _newest,
}


def _mapped(fd: int, flags: int) -> Tensor:
    """The memory file that an inherited descriptor names, uint8. Mapped privately it is never changed from here."""
    import torch

    torch.set_num_threads(1)
    return torch.frombuffer(mmap.mmap(fd, 0, flags=flags), dtype=torch.uint8)


def _say(answers: TextIO, answer: dict[str, Any]) -> None:
    print(json.dumps(answer), file=answers, flush=True)


if __name__ == "__main__":
    sys.exit(main())
