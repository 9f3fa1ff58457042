"""A model taken apart into layers, each with its own optimizer and scheduler, of which a worker holds those of its stage.

A layer that is not held has no memory: its tensors are on the meta device, and its optimizer is gone. When it is held again
both are made anew, to be filled with what other workers or a snapshot have of it. A parameter that several layers use has a
copy in each: the gradients of all uses are added in the order of the layers, so that each copy is updated alike, and a cut
between the uses changes no bit. This file must never communicate.
"""

from __future__ import annotations

import copy
import enum
import itertools
import zlib
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from elastic.checksum import crc32
from elastic.encoding import flat_bytes, raw_view
from elastic.errors import ConfigError
from elastic.state import TrainingState

OptimizerFactory = Callable[[list[nn.Parameter]], Optimizer]
SchedulerFactory = Callable[[Optimizer], Any]

MODEL = "model"
"""What all layers together are called in the training state."""
HASTE, HASTE_STEPS = 0.1, 50
"""A layer that was made from others learns by a tenth faster (CheckFree), at first, and so many steps later no more."""


class Part(enum.Enum):
    """Of a layer's state: all of it, what its forward and backward need, or what only its optimizer and scheduler do."""

    ALL = enum.auto()
    MODEL = enum.auto()
    OPTIMIZER = enum.auto()


@runtime_checkable
class LayeredModel(Protocol):
    """A model that says how it is taken apart.

    Each layer gets what the one before returns (a tensor or a tuple of tensors), the first one the batch's inputs. A parameter
    may occur in several layers, as a tied embedding does.
    """

    def pipeline_layers(self) -> Sequence[nn.Module]:
        """Return the layers, in order."""

    def pipeline_key(self, layer: int, key: str) -> str:
        """Return the model's own name, as in its `state_dict()`, of what layer number `layer` calls `key`."""


@dataclass(frozen=True, slots=True)
class Use:
    """One place of a parameter."""

    layer: int
    name: str


class Layer:
    """One layer.

    Attributes:
        number: from 0.
        module: on the meta device while the layer is not held.
        optimizer, scheduler: None where there is none, or the layer is not held.
    """

    def __init__(
        self, number: int, module: nn.Module, optimizer_fn: OptimizerFactory, scheduler_fn: SchedulerFactory | None
    ) -> None:
        self.number = number
        self.module = module
        self.optimizer: Optimizer | None = None
        self.scheduler: Any = None
        self.is_held = False
        self._optimizer_fn, self._scheduler_fn = optimizer_fn, scheduler_fn
        self._is_empty = False

    @property
    def label(self) -> str:
        """The layer in words, for errors."""
        return f"layer {self.number} ({type(self.module).__name__})"

    @property
    def form(self) -> int:
        """Alike for layers whose tensors have the same names, shapes and dtypes; 0 where there is none."""
        tensors = itertools.chain(self.module.named_parameters(), self.module.named_buffers())
        described = [(name, tuple(tensor.shape), str(tensor.dtype)) for name, tensor in tensors]
        return (zlib.crc32(repr(described).encode()) or 1) if described else 0

    def hold(self, device: torch.device) -> None:
        """Have memory for the layer: the initial values if it was never released, otherwise whatever was there."""
        if self.is_held:
            return
        self.module = self.module.to_empty(device=device) if self._is_empty else self.module.to(device)
        parameters = self.parameters()
        if parameters:
            self.optimizer = self._optimizer_fn(parameters)
            self.check_optimizer(self.optimizer)
            if self._scheduler_fn is not None:
                self.scheduler = self._scheduler_fn(self.optimizer)
        self.is_held, self._is_empty = True, False

    def release(self) -> None:
        """Let go of the layer's memory and of its optimizer."""
        self.module = self.module.to("meta")
        self.optimizer = self.scheduler = None
        self.is_held, self._is_empty = False, True

    def parameters(self) -> list[nn.Parameter]:
        """Those that are trained, in the module's order."""
        return [parameter for parameter in self.module.parameters() if parameter.requires_grad]

    def check_optimizer(self, optimizer: object) -> None:
        """Raise ConfigError unless `optimizer_fn` gave an optimizer of exactly this layer's parameters."""
        if not isinstance(optimizer, Optimizer):
            raise ConfigError(
                f"optimizer_fn returned a {type(optimizer).__name__} for {self.label}: return a torch.optim.Optimizer of the "
                "parameters that it is given"
            )
        given = {id(p) for group in optimizer.param_groups for p in group["params"]}
        if given != {id(p) for p in self.parameters()}:
            raise ConfigError(
                f"optimizer_fn made an optimizer of other parameters than those it was given for {self.label}: it is called "
                "for each layer, and must take all of the list and nothing else"
            )

    def step(self, factor: float = 1.0) -> None:
        """Update the parameters from their gradients, with the learning rates times a factor."""
        if self.optimizer is None:
            return
        if factor == 1.0:
            self.optimizer.step()
            return
        rates = [group["lr"] for group in self.optimizer.param_groups]
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate * factor
        self.optimizer.step()
        for group, rate in zip(self.optimizer.param_groups, rates, strict=True):
            group["lr"] = rate

    def forget_optimizer(self) -> None:
        """What the optimizer has learnt belongs to other parameters."""
        if self.optimizer is not None:
            self.optimizer.state.clear()

    def state(self) -> TrainingState:
        """The state of this layer alone, under names that a like layer's have, too."""
        return TrainingState(
            {MODEL: self.module},
            {"optimizer": self.optimizer} if self.optimizer is not None else {},
            {"scheduler": self.scheduler} if self.scheduler is not None else {},
        )

    def schedule(self) -> None:
        """The step is over."""
        if self.scheduler is not None:
            self.scheduler.step()


class Layers:
    """All layers of a model.

    Args:
        model: an nn.Sequential, a list of modules, or a `LayeredModel`.
        optimizer_fn: makes the optimizer of a list of parameters; called for each layer.
        scheduler_fn: makes the LR scheduler of an optimizer, which is stepped once a step; None for none.
        device: where layers that are held are.

    Attributes:
        uses: for each parameter that several layers have, its places in order.

    Raises:
        ConfigError: it cannot be taken apart.
    """

    def __init__(
        self,
        model: object,
        optimizer_fn: OptimizerFactory,
        scheduler_fn: SchedulerFactory | None,
        device: torch.device,
    ) -> None:
        modules, self._key_of = _taken_apart(model)
        self.device = device
        self.uses = _uses(modules)
        modules = _untied(modules)
        self._layers = [Layer(number, module, optimizer_fn, scheduler_fn) for number, module in enumerate(modules)]
        if not any(layer.parameters() for layer in self._layers):
            raise ConfigError("no layer has a parameter that requires a gradient: nothing could be trained")
        self.parameter_names = [[name for name, p in m.named_parameters() if p.requires_grad] for m in modules]
        counts = [len(names) for names in self.parameter_names]
        self._begins = [sum(counts[:number]) for number in range(len(counts) + 1)]

    def __len__(self) -> int:
        return len(self._layers)

    def __getitem__(self, number: int) -> Layer:
        return self._layers[number]

    @property
    def held(self) -> list[Layer]:
        """The layers that are held, in order."""
        return [layer for layer in self._layers if layer.is_held]

    def hold(self, numbers: Iterable[int]) -> None:
        """Have memory for these layers."""
        for number in numbers:
            self._layers[number].hold(self.device)

    def keep(self, numbers: Iterable[int]) -> None:
        """Release all other layers."""
        kept = set(numbers)
        for layer in self._layers:
            if layer.number not in kept and not layer._is_empty:
                layer.release()

    @property
    def count_of_parameters(self) -> int:
        """Trained parameters of all layers, each use counted."""
        return self._begins[-1]

    def parameter_numbers(self, numbers: Iterable[int]) -> list[int]:
        """The numbers, among those of all layers, of the trained parameters of some."""
        return [index for number in numbers for index in range(self._begins[number], self._begins[number + 1])]

    def number_of(self, use: Use) -> int:
        """The number of a use among the trained parameters of all layers."""
        return self._begins[use.layer] + self.parameter_names[use.layer].index(use.name)

    def state(
        self,
        numbers: Iterable[int],
        stateful: dict[str, Any] | None = None,
        buffers: dict[str, Tensor] | None = None,
        part: Part = Part.ALL,
    ) -> TrainingState:
        """Return the training state of some layers that are held, or a part of it, and of other things."""
        chosen = [self._layers[number] for number in numbers]
        if part is Part.MODEL:
            return TrainingState(self.models(numbers), {}, stateful or {}, buffers)
        schedulers = {f"scheduler.{layer.number}": layer.scheduler for layer in chosen if layer.scheduler is not None}
        return TrainingState(
            {} if part is Part.OPTIMIZER else self.models(numbers),
            {f"optimizer.{layer.number}": layer.optimizer for layer in chosen if layer.optimizer is not None},
            {**schedulers, **(stateful or {})},
            buffers,
        )

    def models(self, numbers: Iterable[int]) -> dict[str, nn.Module]:
        """Some layers as one model, named as in an nn.Sequential of all."""
        return {MODEL: nn.ModuleDict({str(number): self._layers[number].module for number in numbers})}

    def digest(self, number: int, buffers: dict[str, Tensor] | None = None) -> str:
        """Hex digest of a layer's parameters and buffers, which is held."""
        return TrainingState(self.models([number]), {}, {}, buffers).digest_model()

    def crc(self, numbers: Iterable[int], buffers: dict[str, Tensor] | None = None) -> int:
        """CRC-32 of all of the state of some layers that are held, optimizers' too, to compare with another worker's."""
        crc = 0
        for tensor in self.state(numbers, {}, buffers).tensors():
            data = flat_bytes(tensor).cpu()
            crc = crc32(raw_view(data), crc)
        return crc

    def key_of(self, number: int, key: str) -> str:
        """What the model itself calls a tensor of a layer."""
        return self._key_of(number, key)


def _taken_apart(model: object) -> tuple[list[nn.Module], Callable[[int, str], str]]:
    if isinstance(model, LayeredModel):
        modules, key_of = list(model.pipeline_layers()), model.pipeline_key
    elif isinstance(model, nn.Sequential | nn.ModuleList | list | tuple):
        modules, key_of = list(model), _key_in_sequence
    else:
        raise ConfigError(
            f"session.pipeline() cannot take a {type(model).__name__} apart: pass an nn.Sequential, a list of modules, or a "
            "model with the methods pipeline_layers() and pipeline_key()"
        )
    if not modules:
        raise ConfigError("session.pipeline() was given no layer")
    for number, module in enumerate(modules):
        if not isinstance(module, nn.Module):
            raise ConfigError(f"layer {number} is a {type(module).__name__}, not an nn.Module: wrap it in one")
    return modules, key_of


def _key_in_sequence(layer: int, key: str) -> str:
    return f"{layer}.{key}"


def _uses(modules: Sequence[nn.Module]) -> list[tuple[Use, ...]]:
    """The places of each trained parameter that several layers have."""
    places: dict[int, list[Use]] = {}
    for number, module in enumerate(modules):
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                places.setdefault(id(parameter), []).append(Use(number, name))
    return [tuple(uses) for uses in places.values() if len(uses) > 1]


def _untied(modules: Sequence[nn.Module]) -> list[nn.Module]:
    """Give each layer tensors of its own."""
    seen: set[int] = set()
    own = []
    for module in modules:
        tensors = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
        own.append(copy.deepcopy(module) if tensors & seen else module)
        seen |= tensors
    return own


def norm_of(parameters: Sequence[nn.Parameter]) -> float:
    """The L2 norm of all gradients together."""
    norms = [torch.linalg.vector_norm(p.grad).double() for p in parameters if p.grad is not None]
    return float(torch.linalg.vector_norm(torch.stack(norms))) if norms else 0.0


def haste(step: int, since: int) -> float:
    """By how much faster a layer learns in a step that was made from others after step `since`."""
    return 1.0 if step <= since else 1.0 + HASTE * max(0.0, 1.0 - (step - since - 1) / HASTE_STEPS)
