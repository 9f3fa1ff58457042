"""Planned garbage collection: at the same step boundary on all workers, instead of whenever one of them is due.

Everybody waits for the slowest in a reduction, so collections that come at different steps on different workers cost the job
all of them, one after the other; those that come together cost it one. After the first step what is alive then (the model, the
data set's index, all modules) is left out of later collections, which are short for that.
"""

from __future__ import annotations

import gc
import os


class Collector:
    """Collects cyclic garbage after every so many steps; 0 leaves that to Python."""

    def __init__(self, every: int) -> None:
        self._every = every
        self._has_begun = False

    def step_ended(self, step: int) -> None:
        """A step is over on this worker, and on all others at about the same time."""
        if not self._every:
            return
        if not self._has_begun:
            self._has_begun = True
            gc.disable()
            gc.collect()
            gc.freeze()
            os.register_at_fork(after_in_child=gc.enable)  # nobody plans for what is forked: data-loader workers, for one
        elif step % self._every == 0:
            gc.collect()
