"""What `session.pipeline()` returns: the user's side of a pipeline.

for epoch in session.epochs(3):
    for batch in pipeline:
        loss = pipeline.step()
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from elastic.errors import ConfigError
from elastic.loader import SlotReader
from elastic.pipeline.engine import PipelineEngine
from elastic.pipeline.executor import Batch

Split = Callable[[Any], Batch]


@dataclass(slots=True)
class GlobalBatch:
    """What the next `step()` will train on; after it, what was trained: an earlier step, if the job went back meanwhile.

    Attributes:
        step: from 1. epoch: from 0. slots: how many micro-batches. samples: in all of them.
    """

    step: int
    epoch: int
    slots: int
    samples: int

    def follow(self, other: GlobalBatch) -> None:
        """Become another one."""
        self.step, self.epoch, self.slots, self.samples = other.step, other.epoch, other.slots, other.samples


class Pipeline:
    """A model of which this worker holds some layers, and its training loop.

    Attributes:
        left_early: whether the loop was left before its epoch was over.
    """

    def __init__(self, engine: PipelineEngine, reader: SlotReader, split: Split | None) -> None:
        self._engine = engine
        self._reader = reader
        self._split = split or split_batch
        self._is_due = False
        self._batch = GlobalBatch(0, 0, 0, 0)
        self.left_early = False
        engine.batch = self._read

    def __len__(self) -> int:
        """Steps in a data epoch."""
        return self._engine.sampler.steps_per_epoch

    def __iter__(self) -> Iterator[GlobalBatch]:
        """Yield each global batch of the epoch; `step()` trains on it."""
        engine = self._engine
        engine.begin_epoch()
        self.left_early = True
        while engine.next_step():
            self._batch = self._batch_of(engine.step)
            self._is_due = True
            yield self._batch
            if self._is_due:
                raise ConfigError(
                    f"step {self._batch.step} was not trained: call pipeline.step() once for each batch of the pipeline"
                )
        self.left_early = False

    def step(self) -> float:
        """Train on the present global batch: forward, backward, reduction, update, scheduler.

        Every worker calls it. What breaks on the way is done again; no exception comes out of it for another's failure.

        Returns:
            The mean loss over the samples of the global batch, the same bits on every worker.

        Raises:
            ConfigError: it was called outside the loop over the pipeline, or twice for a batch.
        """
        if not self._is_due:
            raise ConfigError("pipeline.step() was called without a batch: call it once for each batch of the pipeline")
        self._is_due = False
        if self._engine.run_step():
            # All workers are to see the same one, also those that were ahead: they may make a call together depend on it.
            self._batch.follow(self._batch_of(self._engine.committed))
        return self._engine.loss

    def _batch_of(self, step: int) -> GlobalBatch:
        sampler = self._engine.sampler
        return GlobalBatch(step, sampler.epoch_of(step), sampler.slots, sampler.samples(step))

    @property
    def grad_norm(self) -> float:
        """The norm of the newest step's gradient before it was clipped; NaN without `clip_grad_norm`."""
        return self._engine.norm

    def eval(self, batch: Any) -> float:
        """Return the loss of a batch without training on it, in evaluation mode. Every worker calls it, with the same batch.

        Batch: as from the loader, and as large as a slot of it.

        Returns:
            The same value on every worker; NaN where a worker was lost meanwhile: then evaluate again after the next step.
        """
        return self._engine.evaluate(self._split(batch))

    def state_dict(self) -> dict[str, Tensor]:
        """Return the whole model's parameters and buffers, on the CPU, under the model's own names. Every worker calls it.

        Raises:
            CollectiveAborted: a worker was lost meanwhile; call it again after the next step.
        """
        return self._engine.whole_state()

    @property
    def layers(self) -> range:
        """The numbers of the layers that this worker holds at present."""
        plan = self._engine.plan
        return range(0) if plan is None else plan.layers_of(self._engine.rank)

    def _read(self, step: int, slot: int, ids: tuple[int, ...]) -> Batch:
        return self._split(self._reader.fetch((step, slot, ids)))


def split_batch(batch: Any) -> Batch:
    """Take a loader's batch apart: the last element is the target, all before are what the first layer is given.

    Raises:
        ConfigError: it is no tuple or list of at least two elements, or an input is no tensor.
    """
    if not isinstance(batch, tuple | list) or len(batch) < 2:
        raise ConfigError(
            f"the loader gives a {type(batch).__name__}, and a pipeline needs (input, ..., target): pass split= to say which "
            "part of a batch is what"
        )
    *inputs, target = batch
    for value in inputs:
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"an input of the first layer is a {type(value).__name__}, not a tensor: pass split= to say which part of a "
                "batch is what"
            )
    return tuple(inputs), target


def autocast_of(dtype: torch.dtype | None, device: torch.device) -> Callable[[], AbstractContextManager[Any]]:
    """Return what makes the context of a forward."""
    return lambda: torch.autocast(device.type, dtype or torch.bfloat16, enabled=dtype is not None)
