"""What goes from layer to layer, and what each layer costs: found by sending one slot through all of them, before training.

Every worker does it alone and comes to the same shapes, so that nobody has to ask or to announce what it sends. At no time
more than one layer is on the accelerator. Nothing of the layers is changed, and no generator moves.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from elastic.buffers import CommittedBuffers
from elastic.domain import LayerProfile
from elastic.errors import ConfigError
from elastic.pipeline.layers import Layer, Layers
from elastic.seeding import preserved

REPETITIONS = 3
STATE_FACTOR = 4
"""Bytes of state for each byte of a parameter: itself, its gradient, and two moments."""

Tensors = tuple[Tensor, ...]


@dataclass(frozen=True, slots=True)
class TensorSpec:
    """One tensor between two layers.

    Attributes:
        requires_grad: whether a gradient comes back.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype
    requires_grad: bool

    def empty(self) -> Tensor:
        """Memory for it, on the CPU."""
        return torch.empty(self.shape, dtype=self.dtype)

    @property
    def size_bytes(self) -> int:
        """Bytes of its elements."""
        return self.empty_meta().numel() * self.dtype.itemsize

    def empty_meta(self) -> Tensor:
        """The tensor without memory."""
        return torch.empty(self.shape, dtype=self.dtype, device="meta")

    def __str__(self) -> str:
        return f"{str(self.dtype).removeprefix('torch.')}{list(self.shape)}"


Boundary = tuple[TensorSpec, ...]
"""What leaves a layer."""


@dataclass(frozen=True, slots=True)
class Survey:
    """What was found with one size of a slot.

    Attributes:
        boundaries: for each layer what leaves it.
        clones: the layers that write into what they are given, which is therefore copied for them.
        profiles: for each layer what it costs.
    """

    boundaries: tuple[Boundary, ...]
    clones: frozenset[int]
    profiles: tuple[LayerProfile, ...]


def as_tensors(output: object, what: str) -> Tensors:
    """Return what a layer gave as a tuple. Raises ConfigError if it is not a tensor or several."""
    values = output if isinstance(output, tuple | list) else (output,)
    for value in values:
        if not isinstance(value, Tensor):
            raise ConfigError(
                f"{what} returned a {type(value).__name__}: only a tensor or a tuple of tensors can go on to the next layer"
            )
    return tuple(values)


def entering(tensors: Sequence[Tensor], clone: bool) -> tuple[Tensors, Tensors]:
    """Return leaves for a layer's inputs, and what the layer is given: the leaves, or copies that it may write into."""
    leaves = tuple(t.detach().requires_grad_(t.requires_grad) for t in tensors)
    return leaves, tuple(leaf.clone() for leaf in leaves) if clone else leaves


def leaving(tensors: Sequence[Tensor]) -> Tensors:
    """Return what goes on to the next layer: the same values in row-major order, as if they had been sent."""
    return tuple(t.detach().contiguous().requires_grad_(t.requires_grad) for t in tensors)


def survey(
    layers: Layers,
    loss_fn: Callable[..., Tensor],
    inputs: Tensors,
    target: Any,
    autocast: Callable[[], AbstractContextManager[Any]],
    repetitions: int = REPETITIONS,
) -> Survey:
    """Send a slot forward and backward through all layers, one by one.

    Args:
        layers: none of them held yet, and none released. loss_fn: of the last output and the target.
        inputs: what the first layer is given. target: what the loss is given. autocast: the context of each forward.

    Raises:
        ConfigError: a layer fails, or its output is not what the next one takes; names both.
    """
    with preserved():
        found = None
        for _ in range(repetitions):
            passed = _Pass(layers, loss_fn, autocast)
            passed.forward(inputs, target)
            passed.backward()
            found = passed if found is None else found.merged(passed)
    assert found is not None
    return found.result()


class _Pass:
    """One slot's way through all layers and back."""

    def __init__(
        self, layers: Layers, loss_fn: Callable[..., Tensor], autocast: Callable[[], AbstractContextManager[Any]]
    ) -> None:
        self._layers, self._loss_fn, self._autocast = layers, loss_fn, autocast
        count = len(layers)
        self.forward_s, self.backward_s = [0.0] * count, [0.0] * count
        self.activation_bytes = [0] * count
        self.outputs: list[Tensors] = []
        self.clones: set[int] = set()
        self._leaves: list[Tensors] = []
        self._results: list[Tensors] = []
        self._specs: list[Boundary] = []

    def forward(self, inputs: Tensors, target: Any) -> None:
        tensors = inputs
        for number in range(len(self._layers)):
            layer = self._layers[number]
            with _on(layer, self._layers.device):
                began_s = self._now()
                leaves, results = self._run(layer, tensors)
                self.forward_s[number] = self._now() - began_s
            self._leaves.append(leaves)
            self._results.append(results)
            self.outputs.append(leaving(results))
            tensors = self.outputs[-1]
        last = self._layers[len(self._layers) - 1]
        leaves = tuple(t.detach().requires_grad_(t.requires_grad) for t in tensors)
        with self._autocast():
            loss = loss_of(self._loss_fn, leaves, target, last)
        torch.autograd.backward(loss)
        self._loss_gradients = [leaf.grad for leaf in leaves]

    def _run(self, layer: Layer, tensors: Tensors) -> tuple[Tensors, Tensors]:
        for clone in (False, True):
            leaves, given = entering(_to(tensors, self._layers.device), clone)
            counted = _Counted(layer.module)
            try:
                with buffers_kept(layer.module), self._autocast(), counted:
                    results = as_tensors(layer.module(*given), layer.label)
            except ConfigError:
                raise
            except Exception as error:
                if not clone and "in-place operation" in str(error):
                    continue
                raise ConfigError(self._mismatch(layer, tensors, error)) from error
            if clone:
                self.clones.add(layer.number)
            self.activation_bytes[layer.number] = counted.size_bytes
            return leaves, results
        raise AssertionError("a copy was written to in place")

    def _mismatch(self, layer: Layer, tensors: Tensors, error: Exception) -> str:
        what = ", ".join(str(spec_of(tensor, True)) for tensor in tensors)
        whence = f"layer {layer.number - 1} ({type(self._layers[layer.number - 1].module).__name__}) returns"
        giver = whence if layer.number else "the loader gives"
        reason = (str(error) or type(error).__name__).splitlines()[0]
        return f"{giver} {what}, which {layer.label} does not take ({reason}): make them fit"

    def backward(self) -> None:
        gradients = list(self._loss_gradients)
        for number in reversed(range(len(self._layers))):
            layer = self._layers[number]
            results = self._results[number]
            self._specs.append(
                tuple(
                    spec_of(result, result.requires_grad and gradient is not None)
                    for result, gradient in zip(results, gradients, strict=True)
                )
            )
            with _on(layer, self._layers.device):
                began_s = self._now()
                run_backward(results, gradients)
                self.backward_s[number] = self._now() - began_s
                for parameter in layer.module.parameters():
                    parameter.grad = None
            gradients = [leaf.grad for leaf in self._leaves[number]]
        self._leaves, self._results = [], []

    def merged(self, other: _Pass) -> _Pass:
        """The least time of both: what comes on top is other programs' doing."""
        other.forward_s = [min(pair) for pair in zip(self.forward_s, other.forward_s, strict=True)]
        other.backward_s = [min(pair) for pair in zip(self.backward_s, other.backward_s, strict=True)]
        return other

    def result(self) -> Survey:
        boundaries = tuple(reversed(self._specs))
        profiles = []
        for number in range(len(self._layers)):
            own = sum(p.numel() * p.element_size() for p in self._layers[number].parameters())
            profiles.append(
                LayerProfile(
                    forward_s=self.forward_s[number],
                    backward_s=self.backward_s[number],
                    state_bytes=STATE_FACTOR * own,
                    activation_bytes=self.activation_bytes[number],
                    output_bytes=sum(spec.size_bytes for spec in boundaries[number]),
                    form=self._layers[number].form,
                    changes_buffers=CommittedBuffers(self._layers.models([number])).extras > 0,
                )
            )
        return Survey(boundaries, frozenset(self.clones), tuple(profiles))

    def _now(self) -> float:
        if self._layers.device.type == "cuda":
            torch.cuda.synchronize(self._layers.device)
        return time.perf_counter()


def loss_of(loss_fn: Callable[..., Tensor], outputs: Tensors, target: Any, last: Layer) -> Tensor:
    """Return a slot's loss. Raises ConfigError if it is not one number that depends on the output."""
    loss = loss_fn(outputs[0] if len(outputs) == 1 else outputs, target)
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise ConfigError("loss_fn must return a tensor with one element, the mean loss of a slot")
    if torch.is_grad_enabled() and not loss.requires_grad:
        raise ConfigError(f"the loss does not depend on what {last.label} returns, so that nothing could be trained")
    return loss


def run_backward(results: Sequence[Tensor], gradients: Sequence[Tensor | None]) -> None:
    """Backward through one layer; outputs without a gradient are passed over."""
    pairs = [(r, g) for r, g in zip(results, gradients, strict=True) if g is not None and r.requires_grad]
    if pairs:
        torch.autograd.backward([r for r, _ in pairs], [g for _, g in pairs])


def spec_of(tensor: Tensor, requires_grad: bool) -> TensorSpec:
    """Describe a tensor."""
    return TensorSpec(tuple(tensor.shape), tensor.dtype, requires_grad)


class _Counted:
    """Counts the memory that autograd keeps of a forward, without that of parameters and buffers."""

    def __init__(self, module: nn.Module) -> None:
        self._own = {t.untyped_storage().data_ptr() for t in (*module.parameters(), *module.buffers())}
        self._seen: dict[int, int] = {}
        self._hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, lambda tensor: tensor)

    @property
    def size_bytes(self) -> int:
        return sum(self._seen.values())

    def _pack(self, tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in self._own:
            self._seen[storage.data_ptr()] = storage.nbytes()
        return tensor

    def __enter__(self) -> None:
        self._hooks.__enter__()

    def __exit__(self, *error: object) -> None:
        self._hooks.__exit__(*error)


@contextmanager
def _on(layer: Layer, device: torch.device) -> Iterator[None]:
    """Have a layer on a device for a while."""
    if device.type == "cpu":
        yield
        return
    layer.module.to(device)
    try:
        yield
    finally:
        layer.module.to("cpu")


@contextmanager
def buffers_kept(module: nn.Module) -> Iterator[None]:
    """Leave the buffers afterwards as they were before."""
    kept = [(buffer, buffer.clone()) for buffer in module.buffers()]
    try:
        yield
    finally:
        for buffer, before in kept:
            buffer.data.copy_(before)


def _to(tensors: Tensors, device: torch.device) -> Tensors:
    return tuple(t.to(device).requires_grad_(t.requires_grad) if t.requires_grad else t.to(device) for t in tensors)
