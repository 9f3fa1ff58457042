"""Flat memory for gradients: where each parameter lies, and in which bucket.

Gradients of one dtype and device lie one behind the other, in reverse order of the parameters (a backward
pass fills them from the front), cut into buckets that are exchanged as wholes. The layout is a function of
the parameters alone, so that it is the same on every worker. This file must never communicate, and must
never decide what is added to what.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import torch

from elastic.errors import ConfigError
from elastic.shared import NO_TOKEN, Region, place

NOTHING = -0.0
"""The identity of addition, bit for bit: `x + -0.0` is `x`, also where x is -0.0 (+0.0 would change that)."""

_ALIGNMENT = 16
"""Elements. Parameters begin at multiples of it, which vectorised loops like; so do chunks."""

_ROOM = 64 * _ALIGNMENT
"""Elements behind each bucket, so that up to 64 chunks of an aligned size fit into the memory of a bucket."""


def round_up(count: int) -> int:
    """The least multiple of the alignment that holds `count` elements."""
    return -(-count // _ALIGNMENT) * _ALIGNMENT


@dataclass(frozen=True)
class Bucket:
    """A run of the flat memory that is exchanged as a whole.

    Attributes:
        family: which flat tensor it lies in.
        start, size: its place there, in elements.
        parameters: the indices of the parameters in it; none in the last bucket, the tail.
    """

    family: int
    start: int
    size: int
    parameters: tuple[int, ...]


class Layout:
    """Where each parameter's gradient lies.

    Args:
        parameters: distinct parameters, all of which require a gradient.
        extras: length of the float64 vector that travels with the gradients.
        bucket_bytes: the most that a bucket holds; a larger parameter is a bucket by itself.
        shared: whether other workers of this node may read the memory (that on the CPU).

    Raises:
        ConfigError: a parameter is repeated, or requires no gradient.
    """

    def __init__(
        self, parameters: Sequence[torch.nn.Parameter], extras: int, bucket_bytes: int, *, shared: bool = False
    ) -> None:
        if len({id(p) for p in parameters}) != len(parameters):
            raise ConfigError("A parameter was given twice for reduction: give each one once.")
        if not all(p.requires_grad for p in parameters):
            raise ConfigError("A parameter that requires no gradient was given for reduction: leave it out.")
        self.parameters = tuple(parameters)
        self.extras = extras
        self._shared = shared
        self._places: list[tuple[int, int]] = [(0, 0)] * len(parameters)  # family, offset
        self._families: list[tuple[torch.dtype, torch.device, int]] = []
        buckets: list[Bucket] = []
        for dtype, device in dict.fromkeys((p.dtype, p.device) for p in reversed(parameters)):
            members = [i for i, p in enumerate(parameters) if (p.dtype, p.device) == (dtype, device)]
            buckets += self._lay_out(dtype, device, members[::-1], bucket_bytes)
        # The tail: the extras, and for each parameter whether it has a gradient at all.
        tail = extras + len(parameters)
        buckets.append(Bucket(len(self._families), 0, tail, ()))
        self._families.append((torch.float64, torch.device("cpu"), tail + _ROOM))
        self.buckets = tuple(buckets)

    def _lay_out(
        self, dtype: torch.dtype, device: torch.device, members: Iterable[int], bucket_bytes: int
    ) -> list[Bucket]:
        family = len(self._families)
        capacity = bucket_bytes // dtype.itemsize
        buckets: list[Bucket] = []
        inside: list[int] = []
        start = size = 0
        for index in members:
            needed = round_up(self.parameters[index].numel())
            if inside and size + needed > capacity:
                buckets.append(Bucket(family, start, size, tuple(inside)))
                start += round_up(size) + _ROOM
                size, inside = 0, []
            self._places[index] = (family, start + size)
            inside.append(index)
            size += needed
        buckets.append(Bucket(family, start, size, tuple(inside)))
        self._families.append((dtype, device, start + round_up(size) + _ROOM))
        return buckets

    def allocate(self) -> Memory:
        """One set of flat tensors, finite everywhere and with every page touched."""
        region, flats, begins = self._allocate_flats()
        for family, flat in enumerate(flats):
            if family not in begins:
                fill_with_nothing(flat)
        views = [
            _shaped(flats[family], offset, parameter)
            for parameter, (family, offset) in zip(self.parameters, self._places, strict=True)
        ]
        buckets = [flats[b.family][b.start : b.start + b.size + _ROOM] for b in self.buckets]
        tokens = [
            region.token(begins[b.family] + b.start * flats[b.family].element_size())
            if region is not None and b.family in begins
            else NO_TOKEN
            for b in self.buckets
        ]
        end = self.extras + len(views)
        return Memory(flats, buckets, views, flats[-1][: self.extras], flats[-1][self.extras : end], tokens, region)

    def _allocate_flats(self) -> tuple[Region | None, list[torch.Tensor], dict[int, int]]:
        """Return the flat tensors, and for those that lie in a region where in it they begin."""
        if not self._shared:
            return None, [torch.empty(n, dtype=dtype, device=device) for dtype, device, n in self._families], {}
        on_cpu = [i for i, (_, device, _) in enumerate(self._families) if device.type == "cpu"]
        sizes_bytes = [self._families[i][2] * self._families[i][0].itemsize for i in on_cpu]
        region, offsets = place(sizes_bytes)
        begins = dict(zip(on_cpu, offsets, strict=True))
        flats = [
            region.memory[begins[i] : begins[i] + n * dtype.itemsize].view(dtype)
            if i in begins
            else torch.empty(n, dtype=dtype, device=device)
            for i, (dtype, device, n) in enumerate(self._families)
        ]
        return region, flats, begins


@dataclass(frozen=True, eq=False)
class Memory:
    """One gradient-sized set of tensors.

    Attributes:
        flats: the tensors of each family.
        buckets: the memory of each bucket, with some room behind it.
        views: each parameter's gradient, in the parameter's own shape and strides.
        extras: the float64 vector that travels along.
        presence: float64, above zero for each parameter that has a gradient; it travels along, too.
        tokens: for each bucket what other workers of this node need to read it, or `NO_TOKEN`.
        region: keeps what the tokens name readable.
    """

    flats: list[torch.Tensor]
    buckets: list[torch.Tensor]
    views: list[torch.Tensor]
    extras: torch.Tensor
    presence: torch.Tensor
    tokens: list[torch.Tensor]
    region: Region | None = None


def is_finite(chunk: torch.Tensor) -> bool:
    """Whether all elements are finite, for the price of a sum.

    Only if the sum is not finite (it may just have overflowed) is each element looked at.
    """
    dtype = torch.float32 if chunk.dtype in (torch.float16, torch.bfloat16) else None
    return bool(chunk.sum(dtype=dtype).isfinite()) or bool(chunk.isfinite().all())


def fill_with_nothing(tensor: torch.Tensor) -> None:
    """Fill with the identity of addition."""
    tensor.fill_(complex(NOTHING, NOTHING) if tensor.is_complex() else NOTHING)


def _shaped(flat: torch.Tensor, offset: int, parameter: torch.Tensor) -> torch.Tensor:
    # Optimizers are fastest where gradient and parameter have the same strides. `empty_like` keeps them
    # exactly where they are dense and do not overlap, which is where they fit into `numel` elements.
    if torch.empty_like(parameter, device="meta").stride() == parameter.stride():
        return flat.as_strided(parameter.size(), parameter.stride(), offset)
    return flat[offset : offset + parameter.numel()].view(parameter.size())
