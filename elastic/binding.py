"""How the user's objects are bound to the engine: the same objects, some of whose methods act once per step.

Nothing is wrapped and nothing is subclassed, so `state_dict` keys, types and identities stay as they were. What would
silently do the wrong thing inside the loop (clipping gradients that are not there, a forward between two optimizers'
steps) is refused with a sentence that says what to call instead.
"""

from __future__ import annotations

import functools
import importlib
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
import torch.nn.utils.clip_grad
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from elastic.errors import ConfigError
from elastic.progress import ProgressPage
from elastic.replica import ReplicaEngine

COMPILING_S_MAX = 600.0


def named(kind: str, things: list[Any]) -> dict[str, Any]:
    """Give things names: "model" for a single one, "model0", "model1", ... for several."""
    if len(things) == 1:
        return {kind: things[0]}
    return {f"{kind}{index}": thing for index, thing in enumerate(things)}


def kind_of(thing: object) -> str:
    """Return what a thing is to prepare(): "model", "optimizer", "loader", "scheduler" or "scaler".

    Raises:
        ConfigError: it is none of these.
    """
    kinds = {
        "model": nn.Module,
        "optimizer": Optimizer,
        "loader": DataLoader,
        "scheduler": torch.optim.lr_scheduler.LRScheduler | torch.optim.lr_scheduler.ReduceLROnPlateau,
        "scaler": torch.amp.GradScaler,
    }
    for kind, cls in kinds.items():
        if isinstance(thing, cls):
            return kind
    raise ConfigError(
        f"prepare() does not know what to do with a {type(thing).__name__}: pass models, optimizers, one DataLoader, LR "
        "schedulers and a GradScaler; other objects with a state_dict belong to session.extra_state()"
    )


def trainable(models: Mapping[str, nn.Module], optimizers: Mapping[str, Optimizer]) -> list[nn.Parameter]:
    """Return every parameter that is trained, once, in the models' order. Raises ConfigError if there is none."""
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


class _ForwardHook:
    """Calls something after a forward; a copy of it, of a copied or a saved model, calls nothing."""

    def __init__(self, call: Callable[[nn.Module], None] | None = None) -> None:
        self._call = call

    def __call__(self, module: nn.Module, *_: object) -> None:
        # Inside a compiled graph it would be traced, and what it counts would make each call another graph.
        if self._call is not None and not torch.compiler.is_compiling():
            self._call(module)

    def __deepcopy__(self, memo: object) -> _ForwardHook:
        return _ForwardHook()

    def __reduce__(self) -> tuple[type[_ForwardHook], tuple[()]]:
        return _ForwardHook, ()


def bind_model(model: nn.Module, engine: ReplicaEngine, *, trained: bool = True) -> None:
    """Let its forwards count as progress; those of a trained one must also come at a place where they can."""
    model.register_forward_hook(_ForwardHook(engine.on_forward if trained else lambda _: engine.beat()))


def excuse_compilers(page: ProgressPage) -> None:
    """Let the page say that a worker is busy while torch compiles something, which is no hang however long it takes."""
    callbacks = importlib.import_module("torch._dynamo.callback")  # a worker's standby has imported it

    def begin(_: object) -> None:
        page.busy_until(time.monotonic() + COMPILING_S_MAX)

    def end(_: object) -> None:
        page.busy_until(0.0)
        page.beat()

    callbacks.on_compile_start(begin)
    callbacks.on_compile_end(end)


def bind_optimizer(optimizer: Optimizer, index: int, engine: ReplicaEngine) -> None:
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

    if engine.zero is not None:
        optimizer.state_dict = optimizer.load_state_dict = _refuse_state_of_all  # type: ignore[method-assign]
    step._wrapped_by_lr_sched = True  # type: ignore[attr-defined]  # or schedulers made later would wrap it again
    optimizer.step = step  # type: ignore[method-assign, assignment]
    optimizer.zero_grad = zero_grad  # type: ignore[method-assign]


def _refuse_state_of_all(*_: object, **__: object) -> Any:
    raise ConfigError(
        "optimizer.state_dict() or load_state_dict() was called, but with shard_optimizer=True each worker holds a part of the "
        "state only: checkpoints of the whole are written with --checkpoint-dir, and read when a job starts there"
    )


def bind_scheduler(scheduler: Any, engine: ReplicaEngine) -> None:
    """Make step() inside the loop act once per update; outside the loop it acts at once."""
    inner, inner_state_dict = scheduler.step, scheduler.state_dict

    @functools.wraps(inner)
    def step(*args: Any, **kwargs: Any) -> None:
        for _ in range(1 if engine.slot is None else engine.schedule_steps):
            inner(*args, **kwargs)

    @functools.wraps(inner_state_dict)
    def state_dict(*args: Any, **kwargs: Any) -> Any:
        # torch's schedulers return every attribute of the object, and these two are ours.
        state = inner_state_dict(*args, **kwargs)
        return {key: value for key, value in state.items() if value is not step and value is not state_dict}

    scheduler.step, scheduler.state_dict = step, state_dict


def bind_scaler(scaler: Any, optimizers: Iterable[Optimizer], engine: ReplicaEngine) -> None:
    """Let gradients be unscaled once, after the reduction, and the scale follow the verdict.

    Scaled gradients are reduced; a step that commits is unscaled, clipped and applied, one that is skipped because the
    sum is not finite goes through the same calls, finds that by itself, and lowers the scale at `update()`.
    """
    places = {id(optimizer): index for index, optimizer in enumerate(optimizers)}
    inner_unscale, inner_step, inner_update = scaler.unscale_, scaler.step, scaler.update
    scaled: set[int] = set()

    def place_of(optimizer: Optimizer) -> int:
        if id(optimizer) not in places:
            raise ConfigError(
                f"the GradScaler was given a {type(optimizer).__name__} that is not prepared: pass it to prepare() too"
            )
        return places[id(optimizer)]

    def take_over(optimizer: Optimizer) -> None:
        """From now on the engine unscales before it clips, and steps through the scaler."""
        index = place_of(optimizer)
        if index in scaled:
            return
        scaled.add(index)
        bound, inner = optimizer.step, engine.inner_steps[index]

        def step_inside() -> None:
            optimizer.step = inner  # type: ignore[method-assign, assignment]  # what the scaler will call
            try:
                inner_step(optimizer)
            finally:
                optimizer.step = bound  # type: ignore[method-assign]

        engine.before_clipping.append(functools.partial(inner_unscale, optimizer))
        engine.inner_steps[index] = step_inside
        engine.on_skip.append(step_inside)

    @functools.wraps(inner_unscale)
    def unscale_(optimizer: Optimizer) -> None:
        place_of(optimizer)  # it is done when the step has been reduced

    @functools.wraps(inner_step)
    def step(optimizer: Optimizer) -> None:
        take_over(optimizer)
        optimizer.step()

    @functools.wraps(inner_update)
    def update(new_scale: float | Tensor | None = None) -> None:
        if engine.committed_in_slot:
            inner_update(new_scale)

    # With a scale of its own it asks for nothing that the update would have recorded, and forgets what it did.
    engine.on_abandon.append(lambda: inner_update(scaler.get_scale()) if scaled else None)
    scaler.unscale_, scaler.step, scaler.update = unscale_, step, update


def refuse_clipping_outside(engine: ReplicaEngine) -> None:
    """Make torch's own clipping say that there is nothing to clip inside the loop, instead of clipping nothing."""
    module: Any = torch.nn.utils.clip_grad
    # Not the functions themselves: a script may have imported those before. These are what they call.
    for name in ("_get_total_norm", "_group_tensors_by_device_and_dtype"):
        inner = getattr(module, name, None)
        if inner is not None:
            setattr(module, name, _refusing(inner, engine))


def _refusing(inner: Callable[..., Any], engine: ReplicaEngine) -> Callable[..., Any]:
    @functools.wraps(inner)
    def guarded(gradients: Any, *args: Any, **kwargs: Any) -> Any:
        if engine.slot is not None and not any(len(each) if isinstance(each, list) else 1 for each in gradients):
            raise ConfigError(
                "torch.nn.utils.clip_grad_norm_() or clip_grad_value_() found no gradient inside the loop, since gradients are "
                "reduced over all workers first: call session.clip_grad_norm_(max_norm) before optimizer.step() instead"
            )
        return inner(gradients, *args, **kwargs)

    return guarded
