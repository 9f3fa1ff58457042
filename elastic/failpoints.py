"""Named places in the protocol at which a test may have a process die.

    ELASTIC_FAIL_POINTS=FOLDER    a process that passes the place NAME dies (SIGKILL) if it can remove the file FOLDER/NAME

Whoever removes the file is the one that dies, so a file is one death, of one process. Without the setting a place costs a
look at a global. Nothing but tests may depend on this file.
"""

from __future__ import annotations

import os
import signal
import threading
from enum import StrEnum

from elastic import config

DELAY_S = 0.0003


class FailPoint(StrEnum):
    """The places."""

    BEFORE_VOTE = "before-vote"
    VOTED = "voted"
    VERDICT_SEEN = "verdict-seen"
    APPLYING = "applying"
    """In the middle of optimizer.step()."""
    STEP_ENDED = "step-ended"
    """Before what is captured of a step would be."""
    PREPARED = "prepared"
    COMMIT_HALF_SENT = "commit-half-sent"
    """In the controller, when some workers have been told and others not."""
    JOINER_COPYING = "joiner-copying"
    JOINER_READY = "joiner-ready"
    LAYERS_MOVING = "layers-moving"
    """In a member of a pipeline, while layers go from worker to worker between two steps."""
    STATE_FOLLOWING = "state-following"
    """There, while the state of their optimizers follows and the next step is computed."""

    LOCAL_STEP = "local-step"
    """In a pipeline whose workers train by themselves for some steps: one of these is over."""
    PAIR_EXCHANGING = "pair-exchanging"
    """With `sync=NoLoCo(...)`: what the partner needs is on its way, and what it gives is not here."""


_folder = config.fail_points()


def read_environment() -> None:
    """Look at the setting again: a forked worker has an environment of its own."""
    global _folder
    _folder = config.fail_points()


def reach(place: FailPoint) -> None:
    """Die here if a test wants that."""
    if _folder and _is_wanted(place):
        os.kill(os.getpid(), signal.SIGKILL)


def reach_inside(place: FailPoint) -> None:
    """Die a moment later, inside what comes next."""
    if _folder and _is_wanted(place):
        threading.Timer(DELAY_S, os.kill, (os.getpid(), signal.SIGKILL)).start()


def _is_wanted(place: FailPoint) -> bool:
    try:
        os.unlink(os.path.join(_folder, place))
    except FileNotFoundError:
        return False
    return True
