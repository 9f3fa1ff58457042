"""The user's side of elastic: `join()` gives a session, `prepare()` binds model, optimizer, loader and scheduler to it.

Nothing here wraps a model: state_dict keys stay as they are, and the same objects come back from `prepare`. Without an
agent the session is a world of one, so that a script runs unchanged on a laptop.
"""

from __future__ import annotations

import functools
import math
import sys
import traceback as traceback_module
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from elastic.config import WorkerConfig
from elastic.control import Coordinator
from elastic.domain import Failed, TrainingSpec
from elastic.engine import Engine, Parts
from elastic.errors import ConfigError
from elastic.loader import ElasticLoader, LoaderSpec
from elastic.progress import ProgressPage
from elastic.protocol import Register, UserCodeRaised
from elastic.records import SampleRecord
from elastic.reduction import Reduction
from elastic.sampler import SlotSampler
from elastic.seeding import seed_everything
from elastic.state import TrainingState

TRACEBACK_SIZE_BYTES_MAX = 16 * 1024
SAMPLE_IDS_MAX = 1024
FAREWELL_TIMEOUT_S = 2.0

_current: Session | None = None


def join() -> Session:
    """Return this process's session: a place in the job that started it, or a world of one.

    Randomness of the model's construction is seeded alike on all workers, so that replicas start with the same weights.

    Raises:
        ConfigError: the environment that the agent gave is damaged.
    """
    global _current
    if _current is None:
        _current = Session(WorkerConfig.from_environ())
    return _current


class Session:
    """One worker's place in the job.

    Attributes:
        rank: Number in the present world, from 0; before the first world, the number that is expected.
        world_size: Workers in the present world.
        generation: Number of the present world; 0 before the first.
        step: Steps committed so far.
    """

    def __init__(self, settings: WorkerConfig) -> None:
        self._settings = settings
        self._seed = settings.seed
        self._engine: Engine | None = None
        self._loader: ElasticLoader | None = None
        self._callbacks: list[Callable[[int], None]] = []
        self._norm = torch.tensor(math.nan)
        self._metrics: dict[str, float] = {}
        self._page = ProgressPage(settings.progress_fd) if settings.progress_fd >= 0 else None
        self._coordinator = Coordinator(settings)
        self._closed = False
        seed_everything(self._seed, 0, 0, "construction")

    # -- where am I ------------------------------------------------------------------------------------------------

    @property
    def rank(self) -> int:
        return self._engine.rank if self._engine is not None and self._engine.plan is not None else self._settings.rank

    @property
    def world_size(self) -> int:
        if self._engine is not None and self._engine.plan is not None:
            return self._engine.plan.world_size
        return self._settings.world_size

    @property
    def generation(self) -> int:
        return self._engine.plan.generation if self._engine is not None and self._engine.plan is not None else 0

    @property
    def local_rank(self) -> int:
        """Number on this node."""
        return self._settings.local_rank

    @property
    def is_main(self) -> bool:
        """Whether this worker is the one that writes and prints for all. It changes when that worker is lost."""
        return self.rank == 0

    @property
    def step(self) -> int:
        return self._engine.committed if self._engine is not None else 0

    @property
    def epoch(self) -> int:
        """Data epoch, from 0, of the step in progress."""
        return self._engine.epoch() if self._engine is not None else 0

    @property
    def committed(self) -> bool:
        """Whether the optimizer.step() of this iteration committed a step (else it only added a slot to one)."""
        return self._engine is not None and self._engine.committed_in_slot

    @property
    def loss(self) -> float:
        """Mean over the slots of the newest step of what was logged as loss; NaN before."""
        return self._engine.loss if self._engine is not None else math.nan

    # -- training --------------------------------------------------------------------------------------------------

    def prepare(
        self,
        *things: Any,
        slots: int = 0,
        virtual_replicas: int = 0,
        reduction: str = "ordered",
        seed: int | None = None,
    ) -> Any:
        """Bind models, optimizers, one training DataLoader and LR schedulers to this session.

        The loader yields this worker's slots of each step; `zero_grad`, `step` and the scheduler's `step` act once per
        step, as with gradient accumulation. The gradient is the mean over all samples of the global batch.

        Args:
            things: Any number of nn.Module, Optimizer and LR scheduler objects, and one map-style DataLoader, whose
                batch_size is one slot.
            slots: Micro-batches per global batch, for the whole life of the job; 0: the number of workers at the
                start. More and smaller slots deal better after a loss.
            virtual_replicas: Blocks of slots that are summed as one; 0: the number of workers at the start.
            reduction: "ordered" (the same bits whoever computes what) or "fast" (the backend's all-reduce).
            seed: For sampling and all randomness; None: the job's --seed.

        Returns:
            The same objects in the same order (the loader as an `ElasticLoader`); a single one is returned bare.

        Raises:
            ConfigError: something cannot be trained this way; one sentence says what and how to proceed.
        """
        if self._engine is not None:
            raise ConfigError("prepare() was called twice: pass everything to one call")
        if seed is not None:
            self._seed = seed
        models = _named("model", [thing for thing in things if isinstance(thing, nn.Module)])
        optimizers = _named("optimizer", [thing for thing in things if isinstance(thing, Optimizer)])
        loaders = [thing for thing in things if isinstance(thing, DataLoader)]
        schedulers = _named("scheduler", [thing for thing in things if _is_scheduler(thing)])
        for thing in things:
            if not isinstance(thing, nn.Module | Optimizer | DataLoader) and not _is_scheduler(thing):
                raise ConfigError(
                    f"prepare() does not know what to do with a {type(thing).__name__}: pass models, optimizers, one "
                    "DataLoader and LR schedulers"
                )
        if not models or not optimizers or len(loaders) != 1:
            raise ConfigError(
                f"prepare() needs at least one model, one optimizer and exactly one DataLoader, got {len(models)}, "
                f"{len(optimizers)} and {len(loaders)}: loaders for evaluation need not be prepared"
            )
        try:
            mode = Reduction(reduction)
        except ValueError:
            raise ConfigError(f'reduction={reduction!r} is unknown: choose "ordered" or "fast"') from None
        for name, value in (("slots", slots), ("virtual_replicas", virtual_replicas)):
            if value < 0:
                raise ConfigError(f"{name}={value} is negative: give a number, or 0 for as many as workers at the start")
        parameters = _trainable(models, optimizers)
        spec = LoaderSpec.of(loaders[0])
        parts = Parts(models, optimizers, schedulers, parameters)
        admitted = self._register(parts, spec, slots, virtual_replicas, mode)
        if admitted.virtual_replicas > admitted.slots:
            raise ConfigError(
                f"virtual_replicas={admitted.virtual_replicas} exceeds slots={admitted.slots}: give at most as many as slots"
            )
        sampler = SlotSampler(
            spec.dataset_size, spec.batch_size, admitted.slots, self._seed, spec.shuffle, spec.drop_last
        )
        record = (
            SampleRecord(Path(self._settings.record_dir), self._settings.worker) if self._settings.record_dir else None
        )
        self._engine = Engine(
            self._coordinator,
            parts,
            sampler,
            replicas=admitted.virtual_replicas,
            reduction=mode,
            joins=admitted.joins_running_world,
            page=self._page,
            record=record,
        )
        self._engine.committed = admitted.committed
        self._engine.on_commit = self._callbacks
        for index, optimizer in enumerate(optimizers.values()):
            _bind_optimizer(optimizer, index, self._engine)
        for scheduler in schedulers.values():
            _bind_scheduler(scheduler, self._engine)
        for model in models.values():
            model.register_forward_hook(self._engine.on_forward)
        self._loader = ElasticLoader(loaders[0], self._engine, self._seed)
        prepared = tuple(self._loader if isinstance(thing, DataLoader) else thing for thing in things)
        return prepared[0] if len(prepared) == 1 else prepared

    def _register(self, parts: Parts, loader: LoaderSpec, slots: int, replicas: int, mode: Reduction) -> Any:
        state = TrainingState(parts.models, parts.optimizers, parts.schedulers)
        self._coordinator.feed(
            Register(
                TrainingSpec(
                    slots=slots,
                    virtual_replicas=replicas,
                    reduction=mode.value,
                    seed=self._seed & (2**64 - 1),
                    dataset_size=loader.dataset_size,
                    batch_size=loader.batch_size,
                    shuffle=loader.shuffle,
                    drop_last=loader.drop_last,
                    layout_digest=state.digest_layout(),
                    state_digest=state.digest_model(),
                )
            )
        )
        self._coordinator.wait_until(lambda: self._coordinator.machine.admitted is not None)
        return self._coordinator.machine.admitted

    def epochs(self, count: int) -> Iterator[int]:
        """Yield data epochs 0 .. count-1, from the one in which the job is now.

        Leaving the loader early (break) ends the epochs too, since all workers leave at the same step.
        """
        engine, loader = self._prepared("epochs")
        while (epoch := engine.epoch()) < count:
            yield epoch
            if loader.left_early:
                return

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, parameters: Iterable[nn.Parameter] | None = None
    ) -> Tensor:
        """Clip the step's gradient (the mean over the global batch) to a norm; call it before optimizer.step().

        Norms are taken per parameter and then together, in a fixed order. Returns a 0-dim float tensor that holds the
        norm before clipping once optimizer.step() has committed the step (until then, the norm of the step before).
        """
        engine, _ = self._prepared("clip_grad_norm_")
        chosen = list(engine.parts.parameters) if parameters is None else list(parameters)

        def clip() -> None:
            self._norm.copy_(nn.utils.clip_grad_norm_(chosen, max_norm, norm_type))

        engine.clip(clip)
        return self._norm

    def log(self, **values: float | Tensor) -> None:
        """Show values to people. `loss` becomes the mean over all slots of the step; others are this worker's own.

        Raises:
            ConfigError: `loss` was logged after optimizer.step(), too late for its step.
        """
        engine, _ = self._prepared("log")
        for name, value in values.items():
            number = float(value.detach()) if isinstance(value, Tensor) else float(value)
            if name == "loss":
                engine.log_loss(number)
            self._metrics[name] = number

    def on_commit(self, callback: Callable[[int], None]) -> None:
        """Call `callback(step)` on the main worker after each committed step, when the next fetch begins.

        Survivors never take a committed step back; if the main worker dies around one, the next main worker may call
        again for it: at least once.
        """
        self._callbacks.append(callback)

    def _prepared(self, what: str) -> tuple[Engine, ElasticLoader]:
        if self._engine is None or self._loader is None:
            raise ConfigError(f"session.{what}() was called before session.prepare()")
        return self._engine, self._loader

    # -- the end ---------------------------------------------------------------------------------------------------

    def close(self) -> None:
        """Say that training is over here and wait for the others; called by itself when the script ends."""
        if self._closed:
            return
        self._closed = True
        if self._engine is not None:
            self._engine.close()
        self._coordinator.flush(FAREWELL_TIMEOUT_S)

    def report_failure(self, error: BaseException, summary: str) -> None:
        """Tell the controller what user code raised, and in which slot."""
        engine = self._engine
        slot = engine.slot if engine is not None else None
        # A ConfigError says by itself what to change.
        text = "" if isinstance(error, ConfigError) else "".join(traceback_module.format_exception(error))
        self._coordinator.feed(
            UserCodeRaised(
                Failed(
                    step=slot.step if slot is not None else 0,
                    slot=slot.slot if slot is not None else -1,
                    error=summary.splitlines()[0][:1000] if summary else type(error).__name__,
                    traceback=text[-TRACEBACK_SIZE_BYTES_MAX:],
                    sample_ids=slot.ids[:SAMPLE_IDS_MAX] if slot is not None else (),
                )
            )
        )
        self._coordinator.flush(FAREWELL_TIMEOUT_S)


def close_current() -> None:
    """Close this process's session, if it has one."""
    if _current is not None:
        _current.close()


def report_failure(error: BaseException, summary: str) -> None:
    """Report through this process's session; joins first, since a script may fail before it does."""
    try:
        join().report_failure(error, summary)
    except ConfigError as problem:
        print(f"elastic: the failure could not be reported: {problem}", file=sys.stderr)


# How the user's objects are bound -----------------------------------------------------------------------------------


def _named(kind: str, things: list[Any]) -> dict[str, Any]:
    """Give things names: "model" for a single one, "model0", "model1", ... for several."""
    if len(things) == 1:
        return {kind: things[0]}
    return {f"{kind}{index}": thing for index, thing in enumerate(things)}


def _is_scheduler(thing: object) -> bool:
    return isinstance(thing, torch.optim.lr_scheduler.LRScheduler | torch.optim.lr_scheduler.ReduceLROnPlateau)


def _trainable(models: dict[str, nn.Module], optimizers: dict[str, Optimizer]) -> list[nn.Parameter]:
    """Return every parameter that is trained, once, in the models' order."""
    parameters: dict[int, nn.Parameter] = {}
    for model in models.values():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameters.setdefault(id(parameter), parameter)
    for name, optimizer in optimizers.items():
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                if parameter.requires_grad and id(parameter) not in parameters:
                    raise ConfigError(
                        f"{name} holds a parameter of shape {tuple(parameter.shape)} that no prepared model has: pass its "
                        "model to prepare() too"
                    )
    if not parameters:
        raise ConfigError("the prepared models have no parameter that requires a gradient: nothing could be trained")
    return list(parameters.values())


def _bind_optimizer(optimizer: Optimizer, index: int, engine: Engine) -> None:
    """Make step() act once per step of the job and zero_grad() leave gradients to the reducer."""

    @functools.wraps(optimizer.step)
    def step(closure: Callable[[], float] | None = None) -> None:
        if closure is not None:
            raise ConfigError(
                "optimizer.step(closure) would run the model again inside a step: compute the loss in the loop and call "
                "step() without a closure"
            )
        engine.optimizer_step(index)

    @functools.wraps(optimizer.zero_grad)
    def zero_grad(set_to_none: bool = True) -> None:
        return None

    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # or schedulers made later would wrap it again
    optimizer.step = step  # type: ignore[method-assign, assignment]
    optimizer.zero_grad = zero_grad  # type: ignore[method-assign]


def _bind_scheduler(scheduler: Any, engine: Engine) -> None:
    """Make step() inside the loop act once per committed step; outside the loop it acts at once."""
    inner, inner_state_dict = scheduler.step, scheduler.state_dict

    @functools.wraps(inner)
    def step(*args: Any, **kwargs: Any) -> None:
        if engine.slot is None or engine.committed_in_slot:
            inner(*args, **kwargs)

    @functools.wraps(inner_state_dict)
    def state_dict(*args: Any, **kwargs: Any) -> Any:
        # torch's schedulers return every attribute of the object, and these two are ours.
        state = inner_state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if value is not step and value is not state_dict}

    scheduler.step, scheduler.state_dict = step, state_dict
