"""The erasure code of snapshots in memory: parity of k data shards, and any lost shard from any k that are left.

Shards are the caller's own buffers, and nothing but the wanted bytes is written. All work goes stripe by stripe, so
that it needs a few stripes of memory besides, and any byte range of the shards can be worked on by itself, in any
order: byte i of the parity depends on byte i of the data alone. This file must never hold or copy a whole shard.

`python -m recovery.codec` says which engine this machine has and how fast it encodes.
"""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence

import torch
from torch import Tensor

from elastic.errors import ConfigError
from recovery.choosing import choose_engine, describe
from recovery.engines import Engine
from recovery.galois import Matrix, parity_matrix, rebuilding_matrix

STRIPE_BYTES = 1 << 20
"""Of one shard, in one call of an engine: large enough to cost nothing, small enough for a processor's cache."""


class Codec:
    """The systematic Reed-Solomon code of k data and m parity shards; see `recovery.galois` for its definition.

    A shard is a uint8 tensor of one dimension, contiguous and writable, on the processor unless the engine is at home
    on accelerators too. Shards of one call have the same length, which may be 0 and need be no multiple of anything.
    Shards are numbered: data 0..k-1, parity k..k+m-1. Every method takes a range of bytes [start, stop) and then reads
    and writes only that range of each shard; the default is all of it.

    Every method raises ConfigError, before it writes a byte, when the shards it is given cannot work. A codec keeps
    nothing between calls, so threads may share it. How many threads the engines made of torch use is torch's setting:
    one is right where other processes keep the cores busy.
    """

    def __init__(self, k: int, m: int, engine: Engine | None = None) -> None:
        """Make the codec.

        Args:
            k, m: 1 <= k, 0 <= m, k + m <= 255.
            engine: what multiplies; the fastest that works on this machine if None.

        Raises:
            ConfigError: the code cannot be, or the engine cannot carry it.
        """
        self.k, self.m = k, m
        self._parity = parity_matrix(k, m)
        self.engine = choose_engine(k, m) if engine is None else engine
        if not self.engine.carries(self._parity):
            raise ConfigError(f"The engine {self.engine.name} cannot carry the code ({k},{m}); leave the choice open.")

    def encode(self, data: Sequence[Tensor], parity: Sequence[Tensor], start: int = 0, stop: int | None = None) -> None:
        """Write the parity of the data.

        Args:
            data: k shards.
            parity: m shards, overwritten.
        """
        self._count("data", data, self.k)
        self._count("parity", parity, self.m)
        stop = self._checked(_numbered("data", data), _numbered("parity", parity), start, stop)
        self._multiply(self._parity, data, parity, start, stop)

    def decode(
        self, shards: Mapping[int, Tensor], wanted: Mapping[int, Tensor], start: int = 0, stop: int | None = None
    ) -> None:
        """Write the wanted shards, data or parity, from any k others.

        Args:
            shards: what is left, by number; of more than k, those with the lowest numbers are read.
            wanted: where to write, by number; shards that are not named here are not rebuilt.
        """
        if len(shards) < self.k:
            raise ConfigError(
                f"Shards {sorted(shards)} are {len(shards)}, but the code ({self.k},{self.m}) needs any {self.k}; "
                "find more survivors, or restore from a checkpoint."
            )
        self._known(shards)
        self._known(wanted)
        survivors = sorted(shards)[: self.k]
        read = {f"shard {index}": shards[index] for index in survivors}
        stop = self._checked(read, {f"wanted shard {index}": part for index, part in wanted.items()}, start, stop)
        matrix = rebuilding_matrix(self.k, self.m, tuple(survivors), tuple(wanted))
        self._multiply(matrix, list(read.values()), list(wanted.values()), start, stop)

    def update(
        self,
        index: int,
        old: Tensor,
        new: Tensor,
        parity: Sequence[Tensor],
        start: int = 0,
        stop: int | None = None,
    ) -> None:
        """Bring the parity up to date after one data shard has changed, without reading the others.

        Args:
            index: of the data shard, 0..k-1.
            old, new: its bytes before and after; the parity belongs to `old`, and is overwritten with that of `new`.
            parity: m shards.
        """
        if not 0 <= index < self.k:
            raise ConfigError(f"Shard {index} is no data shard of the code ({self.k},{self.m}); name 0..{self.k - 1}.")
        self._count("parity", parity, self.m)
        stop = self._checked({"old": old, "new": new}, _numbered("parity", parity), start, stop)
        # The code is linear: taking the old bytes out is adding them once more, and then the new ones are added.
        column = tuple((row[index], row[index]) for row in self._parity)
        self._multiply(column, [old, new], parity, start, stop, accumulate=True)

    def fold(self, survivors: Sequence[int], wanted: Mapping[int, Tensor]) -> Fold:
        """Begin a decode whose survivors arrive piece by piece, see `Fold`.

        Args:
            survivors: the numbers of exactly k shards that will be added.
            wanted: where to write, by number; zeroed at once, and not to be read before the fold is complete.
        """
        if len(survivors) != self.k or len(set(survivors)) != self.k:
            raise ConfigError(
                f"Survivors {list(survivors)} are not {self.k} different shards, which the code ({self.k},{self.m}) "
                "needs; name as many."
            )
        if not wanted:
            raise ConfigError("A fold is begun in which nothing is wanted; name at least one shard to rebuild.")
        self._known(survivors)
        self._known(wanted)
        return Fold(self, survivors, wanted)

    def _multiply(
        self,
        matrix: Matrix,
        inputs: Sequence[Tensor],
        outputs: Sequence[Tensor],
        start: int,
        stop: int,
        accumulate: bool = False,
    ) -> None:
        if not outputs:
            return
        for here, there in _stripes(start, stop):
            sources, targets = [part[here:there] for part in inputs], [part[here:there] for part in outputs]
            self.engine.multiply(matrix, sources, targets, accumulate)

    def _count(self, what: str, shards: Sequence[Tensor], count: int) -> None:
        if len(shards) != count:
            raise ConfigError(
                f"The code ({self.k},{self.m}) has {count} {what} shards, but {len(shards)} were given; give all of them."
            )

    def _known(self, indices: Sequence[int] | Mapping[int, Tensor]) -> None:
        for index in indices:
            if not 0 <= index < self.k + self.m:
                raise ConfigError(
                    f"The code ({self.k},{self.m}) has no shard {index}; its shards are 0..{self.k + self.m - 1}."
                )

    def _checked(
        self, inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor], start: int, stop: int | None
    ) -> int:
        """Refuse buffers that cannot work; return where the range ends."""
        named = {**inputs, **outputs}
        first, length, device = "", 0, torch.device("cpu")
        for name, part in named.items():
            if part.dtype != torch.uint8 or part.dim() != 1:
                raise ConfigError(
                    f"{name} is {part.dtype} of {part.dim()} dimensions, but shards are torch.uint8 of one; "
                    "pass flat.view(torch.uint8)."
                )
            if not part.is_contiguous():
                raise ConfigError(f"{name} is not contiguous; pass the buffer itself, not every n-th byte of it.")
            if part.device.type != "cpu" and not self.engine.any_device:
                raise ConfigError(
                    f"{name} is on {part.device}, where {self.engine.name} cannot work; copy it to the CPU."
                )
            if not first:
                first, length, device = name, part.numel(), part.device
            elif part.numel() != length:
                raise ConfigError(
                    f"{name} has {part.numel()} bytes but {first} has {length}; pad all shards to one length."
                )
            elif part.device != device:
                raise ConfigError(f"{name} is on {part.device} but {first} is on {device}; bring them together.")
        stop = length if stop is None else stop
        if not 0 <= start <= stop <= length:
            raise ConfigError(f"The range {start}..{stop} is not within the shards' {length} bytes; name one that is.")
        _refuse_overlap(inputs, outputs)
        return stop


class Fold:
    """A decode into the wanted buffers while pieces of survivors arrive, in any order: nothing but them is kept.

    Made by `Codec.fold`. Each byte of each survivor is added exactly once.
    """

    def __init__(self, codec: Codec, survivors: Sequence[int], wanted: Mapping[int, Tensor]) -> None:
        self._codec = codec
        self._wanted = {f"wanted shard {index}": part for index, part in wanted.items()}
        self._length = codec._checked({}, self._wanted, 0, None)
        matrix = rebuilding_matrix(codec.k, codec.m, tuple(survivors), tuple(wanted))
        self._columns = {index: tuple((row[i],) for row in matrix) for i, index in enumerate(survivors)}
        self._added: dict[int, list[tuple[int, int]]] = {index: [] for index in survivors}
        for part in wanted.values():
            part.zero_()

    def add(self, index: int, chunk: Tensor, offset: int = 0) -> None:
        """Take in one piece of one survivor; it may be reused when this returns.

        Args:
            index: which survivor.
            chunk: uint8, [n], contiguous.
            offset: where in the shard the piece begins, in bytes.

        Raises:
            ConfigError: the piece is of no survivor, reaches beyond the shard, or was added before; nothing changed.
        """
        if index not in self._columns:
            raise ConfigError(f"Shard {index} is none of the survivors {sorted(self._columns)}; begin another fold.")
        stop = offset + chunk.numel()
        if offset < 0 or stop > self._length:
            raise ConfigError(
                f"Bytes {offset}..{stop} of shard {index} are not within the shards' {self._length} bytes; "
                "the sender and this fold disagree about the length."
            )
        targets = {name: part[offset:stop] for name, part in self._wanted.items()}
        self._codec._checked({f"chunk of shard {index}": chunk}, targets, 0, None)
        self._added[index] = _with_range(self._added[index], offset, stop, index)
        self._codec._multiply(self._columns[index], [chunk], list(targets.values()), 0, chunk.numel(), accumulate=True)

    @property
    def missing(self) -> dict[int, int]:
        """How many bytes of each survivor have not been added yet, by number; without those that are complete."""
        left = {i: self._length - sum(b - a for a, b in ranges) for i, ranges in self._added.items()}
        return {index: count for index, count in left.items() if count}

    @property
    def is_complete(self) -> bool:
        """Whether the wanted shards hold their bytes."""
        return not self.missing


def _numbered(what: str, shards: Sequence[Tensor]) -> dict[str, Tensor]:
    return {f"{what}[{i}]": shard for i, shard in enumerate(shards)}


def _stripes(start: int, stop: int) -> Iterator[tuple[int, int]]:
    for here in range(start, stop, STRIPE_BYTES):
        yield here, min(here + STRIPE_BYTES, stop)


def _refuse_overlap(inputs: Mapping[str, Tensor], outputs: Mapping[str, Tensor]) -> None:
    """Two inputs may be the same memory, anything with an output may not: engines read after they have written."""
    spans = sorted(
        (part.data_ptr(), part.data_ptr() + part.numel(), name)
        for name, part in (*inputs.items(), *outputs.items())
        if part.numel()
    )
    reached, reached_written = (0, ""), (0, "")  # the furthest end so far, and that of an output
    for begin, end, name in spans:
        other_end, other = reached if name in outputs else reached_written
        if begin < other_end:
            raise ConfigError(f"{name} shares memory with {other}, and one of them is written; give it its own buffer.")
        reached = max(reached, (end, name))
        if name in outputs:
            reached_written = max(reached_written, (end, name))


def _with_range(ranges: list[tuple[int, int]], start: int, stop: int, index: int) -> list[tuple[int, int]]:
    """Add [start, stop) to sorted disjoint ranges and join those that touch."""
    joined: list[tuple[int, int]] = []
    for here, there in sorted([*ranges, (start, stop)] if stop > start else ranges):
        if joined and here < joined[-1][1]:
            raise ConfigError(
                f"Bytes {start}..{stop} of shard {index} were added before, at least in part; add each byte once, "
                "or begin another fold."
            )
        if joined and here == joined[-1][1]:
            joined[-1] = (joined[-1][0], there)
        else:
            joined.append((here, there))
    return joined


def _encoding_rate(k: int, m: int) -> float:
    """GB of data per second, the best of a few passes over 16 MiB shards within half a second."""
    codec = Codec(k, m)
    shards = [torch.ones(16 * STRIPE_BYTES, dtype=torch.uint8) for _ in range(k + m)]
    best_s, begin = float("inf"), time.perf_counter()
    while time.perf_counter() - begin < 0.5:
        before = time.perf_counter()
        codec.encode(shards[:k], shards[k:])
        best_s = min(best_s, time.perf_counter() - before)
    return k * shards[0].numel() / best_s / 1e9


if __name__ == "__main__":
    torch.set_num_threads(1)  # a busy machine makes several slower than one
    print(describe())
    print(f"Encoding (4,2): {_encoding_rate(4, 2):.1f} GB/s of data, one thread.")
