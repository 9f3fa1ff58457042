"""Which samples each slot of each step holds.

A slot's ids are a function of (seed, data epoch, step, slot) alone, so that any worker can compute any slot
without asking anybody, and a slot that is dealt to another worker holds the same samples there. This module
must never keep a position, draw from a global random state, or depend on torch, numpy, the platform or the
interpreter's version: the ids of a job that was started years ago must come out the same.
"""

from __future__ import annotations

import hashlib
import struct
from dataclasses import dataclass
from functools import lru_cache
from math import isqrt

from elastic.errors import ConfigError

# Part of the key: raise it if the algorithm ever changes, since a resumed job must not get other samples.
_SCHEME = 1
# With two pairs neighbours in a small dataset are measurably correlated, with three no more; one is margin.
_ROUND_PAIRS = 4
# The step in use, the one prefetched across an epoch's end, and as many for a second (evaluation) sampler.
_PERMUTATIONS_KEPT = 4


class Permutation:
    """A pseudo-random bijection of `range(size)`, O(1) per index, with O(sqrt(size)) memory.

    A generalized Feistel network with cycle walking (Black and Rogaway, "Ciphers with Arbitrary Finite
    Domains", CT-RSA 2002, section 5) over the grid rows x columns, the smallest near-square that holds
    `size`. The round functions are tables read from SHAKE-256 of the key, so that a round is one look-up, one
    sum and one remainder. The grid exceeds `size` by less than one column, so a second walk is rare.

    Args:
        size: number of elements, at least 1.
        key: any bytes; other keys give unrelated permutations.
    """

    __slots__ = ("_columns", "_rounds", "_rows", "size")

    def __init__(self, size: int, key: bytes) -> None:
        if size < 1:
            raise ValueError(f"a permutation needs at least one element, got {size}")
        self.size = size
        self._rows = rows = isqrt(size - 1) + 1
        self._columns = columns = -(-size // rows)
        words_per_pair = rows + columns
        stream = hashlib.shake_256(key).digest(4 * words_per_pair * _ROUND_PAIRS)
        words = struct.unpack(f"<{words_per_pair * _ROUND_PAIRS}I", stream)
        rounds: list[tuple[list[int], list[int]]] = []
        for start in range(0, len(words), words_per_pair):
            by_column = [word % rows for word in words[start : start + columns]]
            by_row = [word % columns for word in words[start + columns : start + words_per_pair]]
            rounds.append((by_column, by_row))
        self._rounds = tuple(rounds)

    def take(self, start: int, stop: int) -> tuple[int, ...]:
        """Images of the positions `start` (included) to `stop` (excluded), `0 <= start <= stop <= size`."""
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"positions {start} to {stop} are outside a permutation of {self.size}")
        size, rows, columns, rounds = self.size, self._rows, self._columns, self._rounds
        images: list[int] = []
        for position in range(start, stop):
            image = position
            while True:
                row, column = divmod(image, columns)
                for by_column, by_row in rounds:
                    row = (row + by_column[column]) % rows
                    column = (column + by_row[row]) % columns
                image = row * columns + column
                if image < size:  # Otherwise walk on: the cycle through `position` returns below `size`.
                    break
            images.append(image)
        return tuple(images)


@lru_cache(maxsize=_PERMUTATIONS_KEPT)
def _permutation_of_epoch(size: int, seed: int, epoch: int) -> Permutation:
    return Permutation(size, f"elastic.sampler/{_SCHEME} {size} {seed} {epoch}".encode())


@dataclass(frozen=True)
class SlotSampler:
    """The sample ids of every slot of every step, as a pure function.

    Steps are numbered from 1 through the whole job, data epochs from 0. A global batch is `slots *
    batch_size` consecutive positions of the epoch's order; slot j holds the j-th run of them. What is left at
    an epoch's end is spread over the slots as evenly as possible, earlier slots first, so some slots may be
    empty; or it is dropped.

    Args:
        dataset_size: samples in the dataset; ids are `range(dataset_size)`.
        batch_size: samples per slot (the micro-batch).
        slots: slots per step, fixed for the whole life of the job.
        seed: any integer; decides the order together with the data epoch.
        shuffle: whether each data epoch has its own order; otherwise it is 0, 1, 2, ...
        drop_last: whether an epoch's short last global batch is left out.

    Raises:
        ConfigError: a size is not positive, or the dataset does not fill one global batch.
    """

    dataset_size: int
    batch_size: int
    slots: int
    seed: int
    shuffle: bool = True
    drop_last: bool = False

    def __post_init__(self) -> None:
        for name in ("batch_size", "slots"):
            if getattr(self, name) < 1:
                raise ConfigError(f"{name} is {getattr(self, name)}, but a step needs at least 1: raise it.")
        if self.dataset_size < self.global_batch_size:
            raise ConfigError(
                f"The dataset has {self.dataset_size} samples, fewer than one global batch of "
                f"{self.global_batch_size} ({self.slots} slots of {self.batch_size}): use fewer slots, "
                f"a smaller batch size or more data."
            )

    @property
    def global_batch_size(self) -> int:
        """Samples of a full step."""
        return self.slots * self.batch_size

    @property
    def steps_per_epoch(self) -> int:
        """Steps of one data epoch, the short one included unless it is dropped."""
        full_steps, rest = divmod(self.dataset_size, self.global_batch_size)
        return full_steps if self.drop_last or not rest else full_steps + 1

    def epoch_of(self, step: int) -> int:
        """The data epoch, counted from 0, that step `step`, counted from 1, belongs to."""
        if step < 1:
            raise ValueError(f"steps are numbered from 1, got {step}")
        return (step - 1) // self.steps_per_epoch

    def samples(self, step: int) -> int:
        """Samples of step `step`: a global batch, or what is left at the epoch's end."""
        return min(self.global_batch_size, self.dataset_size - self._start_of(step))

    def samples_until(self, step: int) -> int:
        """Samples of the first `step` steps of the job together."""
        epochs, steps = divmod(step, self.steps_per_epoch)
        per_epoch = min(self.dataset_size, self.steps_per_epoch * self.global_batch_size)
        return epochs * per_epoch + steps * self.global_batch_size

    def sizes(self, step: int) -> tuple[int, ...]:
        """Samples in each slot of step `step`; a slot may be empty only in an epoch's short last step."""
        evenly, rest = divmod(self.samples(step), self.slots)
        return (evenly + 1,) * rest + (evenly,) * (self.slots - rest)

    def ids(self, step: int, slot: int) -> tuple[int, ...]:
        """Sample ids of slot `slot` (from 0) of step `step` (from 1), in the order of the batch."""
        if not 0 <= slot < self.slots:
            raise ValueError(f"slot {slot} is outside the {self.slots} slots of a step")
        evenly, rest = divmod(self.samples(step), self.slots)
        start = self._start_of(step) + slot * evenly + min(slot, rest)
        stop = start + evenly + (slot < rest)
        if not self.shuffle:
            return tuple(range(start, stop))
        return _permutation_of_epoch(self.dataset_size, self.seed, self.epoch_of(step)).take(start, stop)

    def _start_of(self, step: int) -> int:
        """Position in its data epoch of the first sample of `step`."""
        return (step - 1 - self.epoch_of(step) * self.steps_per_epoch) * self.global_batch_size
