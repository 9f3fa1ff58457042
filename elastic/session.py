"""The user's side of elastic: `join()` gives a session, `prepare()` binds model, optimizer, loader and scheduler to it.

Nothing here wraps a model: state_dict keys stay as they are, and the same objects come back from `prepare`. Without an
agent the session is a world of one, so that a script runs unchanged on a laptop.
"""

from __future__ import annotations

import atexit
import functools
import math
import sys
import time
import traceback as traceback_module
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from elastic.agreement import digest_of_sample, numerics
from elastic.binding import (
    bind_model,
    bind_optimizer,
    bind_scaler,
    bind_scheduler,
    excuse_compilers,
    kind_of,
    named,
    refuse_clipping_outside,
    trainable,
)
from elastic.buffers import Rule
from elastic.collecting import Collector
from elastic.config import WorkerConfig
from elastic.control import Coordinator
from elastic.digests import digest_of_layers
from elastic.domain import Admitted, Failed, TrainingSpec
from elastic.engine import Engine
from elastic.errors import ConfigError
from elastic.loader import ElasticLoader, LoaderSpec, SlotReader
from elastic.measures import Measures
from elastic.memory import SnapshotMemory
from elastic.pipeline.actions import Schedule
from elastic.pipeline.api import Pipeline, Split, autocast_of, split_batch
from elastic.pipeline.engine import Parts as PipelineParts
from elastic.pipeline.engine import PipelineEngine
from elastic.pipeline.layers import Layers, OptimizerFactory, SchedulerFactory
from elastic.pipeline.rounds import Inner, RoundsEngine, outer_of
from elastic.pipeline.survey import REPETITIONS, Survey, survey
from elastic.progress import ProgressPage
from elastic.protocol import Register, UserCodeRaised, Warmed
from elastic.records import SampleRecord
from elastic.reduction import Reduction
from elastic.replica import Parts, ReplicaEngine
from elastic.sampler import SlotSampler
from elastic.seeding import preserved, seed_everything
from elastic.state import TrainingState
from elastic.sync import AllReduce, AsyncLocalSGD, DiLoCo, NoLoCo, Rounds, Sync, takes_crews
from elastic.sync.diloco import OuterEngine
from elastic.sync.noloco import SPREAD, PairEngine
from elastic.sync.turns import TurnEngine
from elastic.timers import Aside

TRACEBACK_SIZE_BYTES_MAX = 16 * 1024
SAMPLE_IDS_MAX = 1024
FAREWELL_TIMEOUT_S = 2.0
_clip_grad_norm_ = nn.utils.clip_grad_norm_

_current: Session | None = None


def join() -> Session:
    """Return this process's session: a place in the job that started it, or a world of one.

    Randomness of the model's construction is seeded alike on all workers, so that replicas start with the same weights.

    Raises:
        ConfigError: the environment that the agent gave is damaged.
    """
    global _current
    if _current is None:
        settings = WorkerConfig.from_environ()
        _current = Session(settings)
        if not settings.agent:
            atexit.register(_close_alone)  # otherwise the worker's own end does
    return _current


def _close_alone() -> None:
    if not hasattr(sys, "last_value"):  # the script has not ended by an exception
        close_current()


_EVERY_STEP = AllReduce()


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
        self._loop: ElasticLoader | Pipeline | None = None
        self._callbacks: list[Callable[[int], None]] = []
        self._norm = torch.tensor(math.nan)
        self._more_models: dict[str, nn.Module] = {}
        self._stateful: dict[str, Any] = {}
        self._rules: dict[str, Rule] = {}
        self._on_end: list[Callable[[], None]] = []
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

    @property
    def spread(self) -> float:
        """How far apart the replicas of `sync=NoLoCo(...)` are: their root mean square distance, by parameter, from the mean.

        As of the newest mean behind which another round was committed; NaN before, and where replicas agree.
        """
        return math.sqrt(self._engine.measures.mean(SPREAD)) if self._engine is not None else math.nan

    # -- training --------------------------------------------------------------------------------------------------

    def prepare(
        self,
        *things: Any,
        slots: int = 0,
        virtual_replicas: int = 0,
        reduction: str = "ordered",
        seed: int | None = None,
        shard_optimizer: bool = False,
        sync: Sync = _EVERY_STEP,
    ) -> Any:
        """Bind models, optimizers, one training DataLoader, LR schedulers and a GradScaler to this session.

        The loader yields this worker's slots of each step; `zero_grad`, `step` and the scheduler's `step` act once per
        step, as with gradient accumulation. The gradient is the mean over all samples of the global batch.

        Args:
            things: Any number of nn.Module, Optimizer, LR scheduler and GradScaler objects, and one map-style
                DataLoader, whose batch_size is one slot.
            slots: Micro-batches per global batch, for the whole life of the job; 0: the number of workers at the
                start. More and smaller slots deal better after a loss.
            virtual_replicas: Blocks of slots that are summed as one; 0: the number of workers at the start.
            reduction: "ordered" (the same bits whoever computes what) or "fast" (the backend's all-reduce).
            seed: For sampling and all randomness; None: the job's --seed.
            shard_optimizer: Hold each part of the optimizers' state on one worker only (ZeRO-1), with the same bits. For
                elementwise optimizers; a lost worker's part comes from a snapshot, so start agents with --snapshot-every.
            sync: How replicas agree: `elastic.sync.AllReduce()`, each step on its gradient, or `elastic.sync.DiLoCo(...)`,
                `StreamingDiLoCo(...)`, `NoLoCo(...)` or `AsyncLocalSGD(...)`: then a slot is a replica that takes some steps by
                itself, and a step of the job the round after which all agree, or pairs.

        Returns:
            The same objects in the same order (the loader as an `ElasticLoader`); a single one is returned bare.

        Raises:
            ConfigError: something cannot be trained this way; one sentence says what and how to proceed.
        """
        if self._engine is not None:
            raise ConfigError("prepare() was called twice: pass everything to one call")
        if seed is not None:
            self._seed = seed
        kinds: dict[str, list[Any]] = {kind: [] for kind in ("model", "optimizer", "loader", "scheduler", "scaler")}
        for thing in things:
            kinds[kind_of(thing)].append(thing)
        models, optimizers = named("model", kinds["model"]), named("optimizer", kinds["optimizer"])
        if not models or not optimizers or len(kinds["loader"]) != 1:
            raise ConfigError(
                f"prepare() needs at least one model, one optimizer and exactly one DataLoader, got {len(models)}, "
                f"{len(optimizers)} and {len(kinds['loader'])}: loaders for evaluation need not be prepared"
            )
        mode = _checked_numbers(slots, virtual_replicas, reduction)
        (loader,) = kinds["loader"]
        spec = LoaderSpec.of(loader)
        if not isinstance(sync, AllReduce):
            if shard_optimizer or any(scaler.is_enabled() for scaler in kinds["scaler"]):
                other = "shard_optimizer=True" if shard_optimizer else "a GradScaler"
                raise ConfigError(f"sync={sync} and {other} exclude each other: leave one out")
            spec = _of_rounds(spec, sync)
        stateful = named("scheduler", kinds["scheduler"]) | named("scaler", kinds["scaler"]) | self._stateful
        trained = trainable(models, optimizers)
        parts = Parts(models, optimizers, stateful, trained, self._more_models, self._rules, shard_optimizer)
        admitted = self._register(parts, loader, spec, slots, virtual_replicas, mode, sync)
        if admitted.virtual_replicas > admitted.slots:
            raise ConfigError(
                f"virtual_replicas={admitted.virtual_replicas} exceeds slots={admitted.slots}: give at most as many as slots"
            )
        if shard_optimizer and self._settings.agent and not admitted.snapshot_every and self.is_main:
            _warn(
                "shard_optimizer=True, and no snapshots are taken: the loss of any worker goes back to a checkpoint, or "
                "ends the job; start it with --snapshot-every"
            )
        sampler = SlotSampler(
            spec.dataset_size, spec.batch_size, admitted.slots, self._seed, spec.shuffle, spec.drop_last
        )
        kind = _engine_of(sync)
        engine = self._engine = kind(
            self._coordinator,
            parts,
            sampler,
            replicas=admitted.virtual_replicas,
            reduction=mode,
            joins=admitted.joins_running_world,
            page=self._page,
            record=self._sample_record(),
            memory=self._snapshot_memory(),
            snapshot_every=admitted.snapshot_every,
        )
        engine.committed = admitted.committed
        engine.on_commit, engine.on_end = self._callbacks, self._on_end
        engine.collector = Collector(self._settings.gc_every)
        for index, optimizer in enumerate(optimizers.values()):
            bind_optimizer(optimizer, index, engine)
        for scaler in kinds["scaler"]:
            bind_scaler(scaler, optimizers.values(), engine)
        for scheduler in kinds["scheduler"]:
            bind_scheduler(scheduler, engine)
        for model in models.values():
            bind_model(model, engine)
        for model in self._more_models.values():
            bind_model(model, engine, trained=False)
        refuse_clipping_outside(engine)
        if self._page is not None:
            excuse_compilers(self._page)
        self._loop = ElasticLoader(loader, engine, self._seed)
        prepared = tuple(self._loop if thing is loader else thing for thing in things)
        return prepared[0] if len(prepared) == 1 else prepared

    def pipeline(
        self,
        layers: Any,
        loss_fn: Callable[..., Tensor],
        optimizer_fn: OptimizerFactory,
        loader: Any,
        *,
        scheduler_fn: SchedulerFactory | None = None,
        slots: int = 0,
        virtual_replicas: int = 0,
        stages: int = 0,
        schedule: str = "1f1b",
        reduction: str = "ordered",
        seed: int | None = None,
        clip_grad_norm: float = 0.0,
        autocast: torch.dtype | None = None,
        recompute: bool = False,
        device: str | torch.device = "cpu",
        memory_bytes: int = 0,
        split: Split | None = None,
        sync: Sync = _EVERY_STEP,
        random_routing: bool = False,
    ) -> Pipeline:
        """Cut a model into stages, one on each worker or on several, and train it as a pipeline that is cut anew as needed.

        Each worker builds the whole model in host memory, and from the first step on holds only the layers of its stage.

        Args:
            layers: An nn.Sequential, a list of modules, or a model with `pipeline_layers()` and `pipeline_key()` (see
                `elastic.pipeline.layers.LayeredModel`). Each gets what the one before returns: a tensor or a tuple of them.
            loss_fn: loss_fn(output, target), the mean loss of a slot.
            optimizer_fn: Makes an optimizer of a list of parameters; called for each layer.
            loader: A map-style DataLoader, whose batch_size is one slot and whose batches are (input, ..., target).
            scheduler_fn: Makes an LR scheduler of an optimizer; it is stepped after each step.
            slots: Micro-batches per global batch, for the whole life of the job; 0: twice the workers at the start.
            virtual_replicas: Blocks of slots that are summed as one; 0: as many as the widest stage has workers.
            stages: How many stages, if there are as many workers; 0: one for each worker. More workers than stages share them.
            schedule: "1f1b" or "gpipe".
            reduction, seed: As in `prepare`.
            clip_grad_norm: The norm to which the whole model's gradient is clipped; 0: it is not.
            autocast: The dtype of torch.autocast for all forwards; None: without.
            recompute: Compute forwards again for their backward instead of keeping what they computed.
            device: Where the stage's layers are.
            memory_bytes: What a worker has for the state and the activations of its layers; 0: enough.
            split: Takes a batch apart: split(batch) -> (inputs as a tuple of tensors, target).
            sync: How workers of a stage agree: `elastic.sync.AllReduce()`, each step, or `elastic.sync.DiLoCo(...)` after some
                local ones: then a step of the job is a round, and a slot's batches are one for each local step.
            random_routing: With DiLoCo, whether each local step sends slots to other workers of the next stage.

        Raises:
            ConfigError: something cannot be trained this way; one sentence says what and how to proceed.
        """
        if self._engine is not None:
            raise ConfigError("session.pipeline() was called after prepare() or pipeline(): a session trains one thing")
        if not isinstance(loader, DataLoader):
            raise ConfigError(f"session.pipeline() was given a {type(loader).__name__} as loader: pass a DataLoader")
        if seed is not None:
            self._seed = seed
        mode = _checked_numbers(slots, virtual_replicas, reduction)
        if schedule not in tuple(Schedule):
            raise ConfigError(f"schedule={schedule!r} is unknown: choose one of {', '.join(Schedule)}")
        for name, value in (("stages", stages), ("memory_bytes", memory_bytes), ("clip_grad_norm", clip_grad_norm)):
            if not value >= 0:
                raise ConfigError(f"{name}={value} is negative: give 0 or more")
        if self._more_models:
            raise ConfigError(
                f"session.extra_state({min(self._more_models)!r}) is a module, which a pipeline does not hold as a whole: keep "
                "it outside, or pass an object with small values"
            )
        spec = LoaderSpec.of(loader)
        batch_size, rounds = spec.batch_size, _rounds_of_pipeline(sync, random_routing)
        if rounds is not None:
            spec = _of_rounds(spec, rounds)
            inner = Inner(optimizer_fn, scheduler_fn, float(clip_grad_norm), random_routing)
            optimizer_fn, scheduler_fn, clip_grad_norm = outer_of(rounds), None, 0.0
        taken = Layers(layers, optimizer_fn, scheduler_fn, torch.device(device))
        if stages > len(taken):
            raise ConfigError(f"stages={stages}, but the model has {len(taken)} layer(s): ask for at most as many stages")
        context = autocast_of(autocast, taken.device)
        take_apart = split or split_batch
        numbers = range(len(taken))
        whole = TrainingState(taken.models(numbers), {}, {})

        def look(ids: Sequence[int], repetitions: int) -> Survey:
            with preserved():
                seed_everything(self._seed, 0, 0, "survey")
                batch = take_apart(loader.collate_fn([loader.dataset[index] for index in ids]))
                return survey(taken, loss_fn, *batch, context, repetitions)

        full = min(batch_size, spec.dataset_size)
        surveys = {full: look(range(full), REPETITIONS)}
        local_steps = 1 if rounds is None else rounds.every
        admitted = self._admit(
            TrainingSpec(
                slots=slots,
                virtual_replicas=virtual_replicas,
                layout_digest=whole.digest_layout(),
                state_digest=digest_of_layers([taken.digest(number) for number in numbers]),
                schedule=schedule,
                stages=stages,
                memory_bytes=memory_bytes,
                layers=tuple(profile.times(local_steps) for profile in surveys[full].profiles),
                sync="" if rounds is None else f"{rounds}{', random routing' * random_routing}",
                **self._common_spec(loader, spec, mode),
            )
        )
        if self._settings.agent and not admitted.snapshot_every and not admitted.measures_norms and self.is_main:
            _warn(
                "session.pipeline(): no snapshots are taken, so that the loss of a worker whose stage nobody else holds goes "
                "back to a checkpoint, or ends the job; start it with --snapshot-every"
            )
        sampler = SlotSampler(
            spec.dataset_size, spec.batch_size, admitted.slots, self._seed, spec.shuffle, spec.drop_last
        )
        last = sampler.sizes(sampler.steps_per_epoch)
        for size in {size % full if rounds is not None else size for size in last} - {0, full}:
            surveys[size] = look(range(size), 1)
        kind = PipelineEngine if rounds is None else functools.partial(RoundsEngine, sync=rounds, inner=inner)
        engine: PipelineEngine = kind(
            self._coordinator,
            PipelineParts(
                taken,
                surveys,
                loss_fn,
                context,
                Schedule(schedule),
                self._seed,
                float(clip_grad_norm),
                recompute,
                self._stateful,
                self._rules,
            ),
            sampler,
            replicas=admitted.virtual_replicas,
            reduction=mode,
            page=self._page,
            record=self._sample_record(),
            memory=self._snapshot_memory(),
            snapshot_every=admitted.snapshot_every,
            measures_norms=admitted.measures_norms,
        )
        engine.committed = admitted.committed
        engine.on_commit, engine.on_end = self._callbacks, self._on_end
        engine.collector = Collector(self._settings.gc_every)
        if self._page is not None:
            excuse_compilers(self._page)
        if admitted.joins_running_world:
            self._coordinator.feed(Warmed())  # its layers have run in the survey
        self._engine = engine
        self._loop = pipeline = Pipeline(engine, SlotReader(loader, engine, self._seed), split)
        return pipeline

    def _common_spec(self, loader: Any, spec: LoaderSpec, mode: Reduction) -> dict[str, Any]:
        """What a job trains, whoever holds the model."""
        return {
            "reduction": mode.value,
            "seed": self._seed & (2**64 - 1),
            "dataset_size": spec.dataset_size,
            "batch_size": spec.batch_size,
            "shuffle": spec.shuffle,
            "drop_last": spec.drop_last,
            "data_digest": digest_of_sample(loader.dataset, self._seed),
            "numerics": numerics(),
        }

    def _sample_record(self) -> SampleRecord | None:
        folder = self._settings.record_dir
        return SampleRecord(Path(folder), self._settings.worker) if folder else None

    def _snapshot_memory(self) -> SnapshotMemory | None:
        return SnapshotMemory(self._settings.memory, self._settings.worker) if self._settings.memory else None

    def _register(
        self, parts: Parts, loader: Any, spec: LoaderSpec, slots: int, replicas: int, mode: Reduction, sync: Sync
    ) -> Admitted:
        state = parts.state(Measures())
        return self._admit(
            TrainingSpec(
                slots=slots,
                virtual_replicas=replicas,
                layout_digest=state.digest_layout(),
                state_digest=state.digest_model(),
                shard_optimizer=parts.shards_optimizer,
                sync="" if isinstance(sync, AllReduce) else repr(sync),
                crews=takes_crews(sync),
                **self._common_spec(loader, spec, mode),
            )
        )

    def _admit(self, spec: TrainingSpec) -> Admitted:
        """Say what this worker trains, and wait until the job's fixed numbers are known."""
        self._coordinator.feed(Register(spec))
        self._show_waiting(True)
        self._coordinator.wait_until(lambda: self._coordinator.machine.admitted is not None)
        self._show_waiting(False)
        admitted = self._coordinator.machine.admitted
        assert admitted is not None
        return admitted

    def _show_waiting(self, waits: bool) -> None:
        if self._page is not None:
            self._page.waits(waits)

    # -- before prepare() ------------------------------------------------------------------------------------------

    def extra_state(self, name: str, thing: Any) -> None:
        """Let an object's state belong to the training state, so that a worker that joins is given it.

        Args:
            name: Any name that is not taken.
            thing: An nn.Module that is not trained by itself (an average of weights), or anything else with `state_dict()`
                and `load_state_dict()` whose values are numbers, strings, containers and small tensors. What the loop does
                to it must be the same on every worker.

        Raises:
            ConfigError: the name is taken, the object has no state, or prepare() has been called.
        """
        self._refuse_after_prepare("extra_state")
        if name in self._more_models or name in self._stateful or name.startswith("elastic."):
            raise ConfigError(f"session.extra_state({name!r}, ...): the name is taken, use another")
        if isinstance(thing, nn.Module):
            self._more_models[name] = thing
        else:
            self._stateful[name] = thing

    def buffer_rule(self, name: str, rule: Rule) -> None:
        """Say what a commit makes of the values that a step's slots leave in a buffer; each slot starts from the committed one.

        Args:
            name: "<model>.<buffer>" with "model", "model0", ... as the first part, or a pattern such as "*.queue".
            rule: "mean" (of the slots; the default for small floating buffers), "first" (slot 0's; for integers), "delta" (the
                sum of all slots' changes), "constant" (never exchanged), or a function of (committed copy, values of all
                slots as [slots, *shape]) that returns the new copy.

        Raises:
            ConfigError: prepare() has been called (which checks the name and the rule).
        """
        self._refuse_after_prepare("buffer_rule")
        self._rules[name] = rule

    def _refuse_after_prepare(self, what: str) -> None:
        if self._engine is not None:
            raise ConfigError(f"session.{what}() was called after session.prepare(): call it before")

    # -- in the loop -----------------------------------------------------------------------------------------------

    def epochs(self, count: int) -> Iterator[int]:
        """Yield data epochs 0 .. count-1, from the one in which the job is now.

        Leaving the loader early (break) ends the epochs too, since all workers leave at the same step.
        """
        engine, loop = self._training("epochs")
        while (epoch := engine.epoch()) < count and not engine.stopping:
            yield epoch
            if loop.left_early:
                return

    def clip_grad_norm_(
        self, max_norm: float, norm_type: float = 2.0, parameters: Iterable[nn.Parameter] | None = None
    ) -> Tensor:
        """Clip the step's gradient (the mean over the global batch) to a norm; call it before optimizer.step().

        Norms are taken per parameter and then together, in a fixed order. Returns a 0-dim float tensor that holds the
        norm before clipping once optimizer.step() has committed the step (until then, the norm of the step before).
        """
        engine = self._prepared("clip_grad_norm_")
        chosen = list(engine.parts.parameters) if parameters is None else list(parameters)

        def clip() -> None:
            graded = [parameter for parameter in chosen if parameter.grad is not None]
            self._norm.copy_(_clip_grad_norm_(graded, max_norm, norm_type) if graded else torch.zeros(()))

        engine.clip(clip)
        return self._norm

    def log(self, **values: float | Tensor) -> None:
        """Show values to people: each becomes the mean over the samples of the step, as by `mean`.

        Raises:
            ConfigError: they were logged after optimizer.step(), too late for their step.
        """
        self._prepared("log")
        for name, value in values.items():
            self._measure(name, value, f"session.log({name}=...)")

    def mean(self, name: str, value: float | Tensor | None = None) -> float:
        """Give a slot's value, and get the mean over all slots of the newest committed step, weighted as gradients are.

        In place of an all-reduce by hand. Every worker must use the same names in the same order; where a slot has nothing to
        say, give NaN. Without a value it only asks.

        Returns:
            The mean of the newest committed step that had values, the same bits on every worker; NaN before.

        Raises:
            ConfigError: the value came after optimizer.step(), too late for its step.
        """
        engine, _ = self._training("mean")
        if value is not None:
            self._measure(name, value, f"session.mean({name!r}, ...)")
        return engine.measures.mean(name)

    def _measure(self, name: str, value: float | Tensor, call: str) -> None:
        engine = self._prepared(call.partition("(")[0].removeprefix("session."))
        engine.measure(name, float(value.detach()) if isinstance(value, Tensor) else float(value), call)

    def weight(self, weight: float) -> None:
        """Say what this slot weighs among the slots of the step: the number of its tokens, where losses are token means.

        The gradient is then the mean over all tokens of the global batch. Call it in every slot, before backward().

        Raises:
            ConfigError: it came too late or is no weight.
        """
        engine = self._prepared("weight")
        engine.weigh(float(weight))

    def stop(self, flag: bool = True) -> bool:
        """Ask for the end of training after the present step (early stopping); one worker's word is enough.

        The verdict on the step decides it, so that all workers leave their loops after the same step.

        Returns:
            Whether it is decided.
        """
        engine, _ = self._training("stop")
        engine.stop_asked |= bool(flag)
        return engine.stopping

    def heartbeat(self) -> None:
        """Count as progress, in a section without forwards, backwards or fetches (see --hang-timeout)."""
        if self._engine is not None:
            self._engine.beat()
        elif self._page is not None:
            self._page.beat()

    def busy(self, seconds: float) -> None:
        """Announce a section of at most so many seconds that shows no progress and is no hang."""
        if self._page is not None:
            self._page.busy_until(time.monotonic() + seconds)
        if self._engine is not None:
            self._engine.timer.goes_aside(Aside.BUSY)

    def on_end(self, save: Callable[[], None]) -> None:
        """Call `save()` once after the loop has ended on all workers, on the main worker.

        If that worker dies in it or raises, it is called on another one; the job fails if none finishes it.
        """
        self._on_end.append(save)

    def on_commit(self, callback: Callable[[int], None]) -> None:
        """Call `callback(step)` on the main worker after each committed step, when the next fetch begins.

        Survivors never take a committed step back; if the main worker dies around one, the next main worker may call
        again for it: at least once.
        """
        self._callbacks.append(callback)

    def _training(self, what: str) -> tuple[Engine, ElasticLoader | Pipeline]:
        if self._engine is None or self._loop is None:
            raise ConfigError(f"session.{what}() was called before session.prepare()")
        return self._engine, self._loop

    def _prepared(self, what: str) -> ReplicaEngine:
        engine, _ = self._training(what)
        if not isinstance(engine, ReplicaEngine):
            raise ConfigError(
                f"session.{what}() is for what session.prepare() was given; a pipeline computes its slots by itself, see "
                "session.pipeline()"
            )
        return engine

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
        # What cannot work cannot work in any slot: a second worker that says so ends the job.
        number = slot.slot if slot is not None and not isinstance(error, ConfigError) else -1
        # A ConfigError says by itself what to change.
        text = "" if isinstance(error, ConfigError) else "".join(traceback_module.format_exception(error))
        self._coordinator.feed(
            UserCodeRaised(
                Failed(
                    step=slot.step if slot is not None else 0,
                    slot=number,
                    error=summary.splitlines()[0][:1000] if summary else type(error).__name__,
                    traceback=text[-TRACEBACK_SIZE_BYTES_MAX:],
                    sample_ids=slot.ids[:SAMPLE_IDS_MAX] if slot is not None and number >= 0 else (),
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


def _warn(sentence: str) -> None:
    print(f"elastic: {sentence}", file=sys.stderr, flush=True)


def _of_rounds(spec: LoaderSpec, sync: Rounds) -> LoaderSpec:
    """Return what is sampled for rounds: a slot has a batch for each local step. Raises ConfigError if there is too little."""
    spec = replace(spec, batch_size=spec.batch_size * sync.local_steps)
    if spec.batch_size > spec.dataset_size:
        raise ConfigError(
            f"{sync} takes {spec.batch_size} samples for a round of one replica, and the dataset has {spec.dataset_size}: use a "
            "smaller every"
        )
    return spec


def _rounds_of_pipeline(sync: Sync, random_routing: bool) -> DiLoCo | None:
    """Return the rounds that a pipeline's stages are to agree in; None for each step. Raises ConfigError for others."""
    if isinstance(sync, AllReduce):
        if random_routing:
            raise ConfigError("random_routing=True is for workers that train by themselves: pass sync=elastic.sync.DiLoCo(...)")
        return None
    if not isinstance(sync, DiLoCo) or sync.dynamic or sync.feedback:
        raise ConfigError(
            f"session.pipeline(sync={sync}): the stages of a pipeline agree by AllReduce() or DiLoCo(), without dynamic and "
            "feedback"
        )
    return sync


def _engine_of(sync: Sync) -> Callable[..., ReplicaEngine]:
    """What drives the steps of a worker whose replicas agree like this."""
    if isinstance(sync, AllReduce):
        return ReplicaEngine
    kinds = {NoLoCo: PairEngine, AsyncLocalSGD: TurnEngine}
    return functools.partial(kinds.get(type(sync), OuterEngine), sync=sync)


def _checked_numbers(slots: int, virtual_replicas: int, reduction: str) -> Reduction:
    for name, value in (("slots", slots), ("virtual_replicas", virtual_replicas)):
        if value < 0:
            raise ConfigError(f"{name}={value} is negative: give a number, or 0 for as many as workers at the start")
    try:
        return Reduction(reduction)
    except ValueError:
        raise ConfigError(f'reduction={reduction!r} is unknown: choose "ordered" or "fast"') from None

