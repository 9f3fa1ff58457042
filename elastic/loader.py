"""The prepared loader: yields this worker's slots of each step, and nothing else decides what comes next.

It takes an ordinary map-style DataLoader apart (dataset, batch size, collation, pinning): one batch of it is one slot.
Which samples a slot holds is the sampler's word, which slot comes next the engine's.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, SequentialSampler

from elastic.engine import Engine
from elastic.errors import ConfigError, ProtocolError
from elastic.progress import Operation
from elastic.replica import ReplicaEngine
from elastic.seeding import seed_everything
from elastic.timers import Phase


@dataclass(frozen=True, slots=True)
class LoaderSpec:
    """What a DataLoader says about sampling.

    Raises (from `of`):
        ConfigError: the loader samples in a way that cannot be dealt to changing workers.
    """

    dataset_size: int
    batch_size: int
    shuffle: bool
    drop_last: bool

    @classmethod
    def of(cls, loader: DataLoader[Any]) -> LoaderSpec:
        """Read a loader's settings."""
        if isinstance(loader.dataset, IterableDataset):
            raise ConfigError(
                "the loader's dataset is an IterableDataset, whose samples have no numbers that could be dealt to other "
                "workers: wrap it in a map-style dataset (with __len__ and __getitem__)"
            )
        if loader.batch_size is None:
            raise ConfigError(
                "the loader has a batch sampler of its own (or batch_size=None): give DataLoader a plain batch_size; it "
                "is the size of one slot"
            )
        if isinstance(loader.sampler, RandomSampler):
            if loader.sampler.replacement or loader.sampler._num_samples is not None:
                raise ConfigError("the loader's RandomSampler draws with replacement or a subset: use shuffle=True")
            shuffle = True
        elif isinstance(loader.sampler, SequentialSampler):
            shuffle = False
        else:
            raise ConfigError(
                f"the loader has a sampler of its own ({type(loader.sampler).__name__}): drop it; which worker reads which "
                "sample is decided by elastic, and shuffling is by shuffle=True and the seed"
            )
        if type(loader).__iter__ is not DataLoader.__iter__:
            raise ConfigError(f"the loader is a {type(loader).__name__} with an __iter__ of its own: pass a DataLoader")
        return cls(len(loader.dataset), loader.batch_size, shuffle, loader.drop_last)  # type: ignore[arg-type]


Key = tuple[int, int, tuple[int, ...]]
"""Step, slot and sample ids of one fetch."""


class _SeededSlots(Dataset[Any]):
    """A dataset of slots: reads the samples of one, with everything random seeded by its coordinates alone."""

    def __init__(self, dataset: Any, seed: int) -> None:
        self._dataset = dataset
        self._seed = seed

    def __getitems__(self, keys: list[Key]) -> tuple[Key, list[Any]]:
        ((step, slot, ids),) = keys
        seed_everything(self._seed, step, slot, "fetch")
        if hasattr(self._dataset, "__getitems__"):
            return keys[0], self._dataset.__getitems__(list(ids))
        return keys[0], [self._dataset[index] for index in ids]


@dataclass(frozen=True, slots=True)
class _Collate:
    """The user's collation, behind which a batch still knows which slot it is."""

    collate: Callable[[list[Any]], Any]

    def __call__(self, fetched: tuple[Key, list[Any]]) -> tuple[Key, Any]:
        key, samples = fetched
        return key, self.collate(samples)


class _Foresight:
    """What the data-loader workers are told to read ahead: this worker's slots, step after step, as dealt now."""

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self.begin: Key | None = None

    def __iter__(self) -> Iterator[list[Key]]:
        assert self.begin is not None
        yield [self.begin]
        mine = self._engine.own_slots()  # a joiner has none, and one slot to warm up
        for step in itertools.count(self.begin[0]):
            pieces = [piece for slot in mine for piece in self._engine.pieces(step, slot)]
            if not pieces:
                return
            for place, ids in sorted(pieces):  # a pipeline takes those of several slots in turn
                if ids and (step, place) > self.begin[:2]:
                    yield [(step, place, ids)]


class SlotReader:
    """Reads the samples of slots, in this process or ahead in those of the loader's workers.

    Args:
        loader: whose dataset, collation and workers are used.
        engine: says what is read next.
        seed: the job's.
    """

    def __init__(self, loader: DataLoader[Any], engine: Engine, seed: int) -> None:
        self._loader = loader
        self._slots = _SeededSlots(loader.dataset, seed)
        self._collate = _Collate(loader.collate_fn)
        self._foresight = _Foresight(engine)
        self._readers: DataLoader[Any] | None = None
        self._ahead: Iterator[tuple[Key, Any]] = iter(())

    def fetch(self, key: Key) -> Any:
        """Return the batch of a slot."""
        if self._loader.num_workers > 0:
            return self._fetch_ahead(key)
        _, batch = self._collate(self._slots.__getitems__([key]))
        if self._loader.pin_memory and torch.cuda.is_available():
            return torch.utils.data._utils.pin_memory.pin_memory(batch)  # type: ignore[no-untyped-call]
        return batch

    def _fetch_ahead(self, key: Key) -> Any:
        """Take a batch from the readers; what they have read of slots that were dealt away is discarded."""
        for found, batch in self._ahead:
            if found == key:
                return batch
            if found[:2] > key[:2]:
                break  # dealt here after they had gone past it
        if self._readers is None:
            given = self._loader
            self._readers = DataLoader(
                self._slots,
                batch_sampler=cast(Any, self._foresight),
                num_workers=given.num_workers,
                collate_fn=cast(Any, self._collate),
                pin_memory=given.pin_memory,
                timeout=given.timeout,
                worker_init_fn=given.worker_init_fn,
                multiprocessing_context=given.multiprocessing_context,
                prefetch_factor=given.prefetch_factor,
                persistent_workers=True,
            )
        self._foresight.begin = key
        self._ahead = iter(self._readers)
        found, batch = next(self._ahead)
        if found != key:
            raise ProtocolError(f"the data-loader workers read {found} where {key} was asked for: a fault of the runtime")
        return batch


class ElasticLoader:
    """Iterates over this worker's slots of one data epoch; `len` is the number of steps in it."""

    def __init__(self, loader: DataLoader[Any], engine: ReplicaEngine, seed: int) -> None:
        self.dataset = loader.dataset
        self.batch_size = loader.batch_size
        self._engine = engine
        self._seed = seed
        self._reader = SlotReader(loader, engine, seed)
        self.left_early = False

    def __len__(self) -> int:
        return self._engine.sampler.steps_per_epoch

    def __iter__(self) -> Iterator[Any]:
        self._engine.begin_epoch()
        self.left_early = True
        while True:
            self._engine.timer.enter(Phase.VOTE)
            slot = self._engine.next_slot()
            self._engine.timer.enter(Phase.DATA if slot is not None else Phase.OUTSIDE)
            if slot is None:
                self.left_early = False
                return
            step, place, _ = slot.key
            batch = self._reader.fetch(slot.key)
            seed_everything(self._seed, step, place, "slot")
            self._engine.begin(Operation.SLOT)
            self._engine.timer.enter(Phase.FORWARD)
            yield batch
