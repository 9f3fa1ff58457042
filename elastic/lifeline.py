"""Tie a process's life to its parent's, so that nothing is ever left running alone."""

from __future__ import annotations

import ctypes
import os
import signal

_PR_SET_PDEATHSIG = 1
_PR_SET_PTRACER = 0x59616D61


def die_with_parent(parent: int) -> None:
    """Have the kernel kill this process when its parent ends; ends at once if that has happened already.

    Raises:
        OSError: the kernel refused.
    """
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0) != 0:
        raise OSError(ctypes.get_errno(), "prctl(PR_SET_PDEATHSIG) failed")
    if os.getppid() != parent:
        os._exit(1)


def let_look(pid: int) -> None:
    """Let a process, and those that it starts, read this one's memory, where only parents may otherwise (Yama).

    A kernel without that rule refuses, and nothing is needed there.
    """
    ctypes.CDLL(None).prctl(_PR_SET_PTRACER, pid, 0, 0, 0)
