"""Where a process is, on demand: a signal at which it writes the stacks of all its threads to a descriptor, whatever it does.

Python's faulthandler writes from the signal handler itself, so neither the GIL nor the main thread is needed. A process that
is stopped answers only once it goes on. Forked children (data-loader workers) answer too, to the same descriptor.
"""

from __future__ import annotations

import faulthandler
import os
import re
import signal

from elastic.domain import StackFrame, ThreadStack

DUMP_SIGNAL = signal.SIGRTMIN + 5  # no library is known to use it; the first two belong to the C library
_THREAD = re.compile(r"^(?:Current thread|Thread) 0x[0-9a-f]+.*:$")
_FRAME = re.compile(r'^  File "(?P<file>.*)", line (?P<line>\d+) in (?P<function>.*)$')


def answer_with_stacks(fd: int) -> None:
    """Write the stacks of all threads to this descriptor whenever the signal comes."""
    faulthandler.register(DUMP_SIGNAL, file=fd, all_threads=True, chain=False)


def catches_signal(status: str, signum: int = DUMP_SIGNAL) -> bool:
    """Whether a process, of which this is /proc/PID/status, has a handler for a signal: else it would end of it."""
    caught = re.search(r"^SigCgt:\s*([0-9a-f]+)$", status, re.MULTILINE)
    return caught is not None and bool(int(caught[1], 16) >> (signum - 1) & 1)


def parse_dump(text: str, pid: int) -> tuple[ThreadStack, ...]:
    """Return what faulthandler has written, the main thread first (it comes last there)."""
    threads: list[list[StackFrame]] = []
    for line in text.splitlines():
        if _THREAD.match(line):
            threads.append([])
        elif threads and (found := _FRAME.match(line)):
            threads[-1].append(StackFrame(found["function"], found["file"], int(found["line"])))
    stacks = [ThreadStack(pid, is_main=index == len(threads) - 1, frames=tuple(f)) for index, f in enumerate(threads)]
    return tuple(reversed(stacks))


def ask_for_stacks(pid: int) -> None:
    """Have a process write its stacks. Raises ProcessLookupError where it is gone."""
    os.kill(pid, DUMP_SIGNAL)
