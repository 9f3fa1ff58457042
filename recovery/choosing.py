"""Which engine carries the erasure code on this machine, and why.

Every candidate is tried before it is trusted: it encodes, rebuilds and accumulates known bytes, and what it writes is
held against the plain tables of `recovery.galois`. One that cannot be loaded or writes a wrong byte is not used, and
its reason is kept. Nothing is chosen by a measurement: the order is fixed, so a job's choice is the same each time.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, partial
from itertools import combinations

import torch
from torch import Tensor

from elastic.errors import ConfigError
from elastic.isal import libraries
from recovery.engines import Engine, ReedsoloEngine, TorchEngine, XorEngine
from recovery.galois import Matrix, combine, parity_matrix, rebuilding_matrix
from recovery.isal import IsalEngine

Loader = Callable[[], Engine]

_LENGTHS = (1, 15, 64, 1057)  # below, at and above the widths of vector registers; none but one a multiple of them


@dataclass(frozen=True)
class Trial:
    """What became of one candidate.

    Attributes:
        engine: it, or None if it could not be loaded.
        obstacle: why it is not to be used, a sentence; "" if it may be.
    """

    engine: Engine | None
    obstacle: str = ""


def self_test(engine: Engine) -> str:
    """Return "" if the engine writes the right bytes, otherwise what it got wrong.

    It encodes and rebuilds every loss pattern of small codes, (3, 1) and (3, 2), and multiplies by a matrix with more
    rows than any kernel of ISA-L takes at once; to odd addresses; plainly and accumulating.
    """
    trials = [("a matrix of 7 rows", _noise_matrix(7, 5))]
    for k, m in ((3, 1), (3, 2)):
        trials.append((f"encoding ({k},{m})", parity_matrix(k, m)))
        for lost in (lost for count in range(1, m + 1) for lost in combinations(range(k + m), count)):
            survivors = tuple(index for index in range(k + m) if index not in lost)[:k]
            trials.append((f"rebuilding {list(lost)} of ({k},{m})", rebuilding_matrix(k, m, survivors, lost)))
    for what, matrix in trials:
        for length in _LENGTHS if engine.carries(matrix) else ():
            if not _agrees(engine, matrix, length):
                return f"{engine.name} wrote wrong bytes in its self-test ({what}, {length} bytes) and is not used."
    return ""


def survey(loaders: Sequence[Loader]) -> tuple[Trial, ...]:
    """Load and test each candidate, in this order."""
    trials = []
    for loader in loaders:
        try:
            engine = loader()
        except ConfigError as error:
            trials.append(Trial(None, str(error)))
        else:
            trials.append(Trial(engine, self_test(engine)))
    return tuple(trials)


@cache
def candidates() -> tuple[Trial, ...]:
    """Those of this machine, fastest first; tried once a process."""
    return survey([*(partial(IsalEngine, library) for library in libraries()), XorEngine, TorchEngine, ReedsoloEngine])


def choose_engine(k: int = 4, m: int = 2, trials: Sequence[Trial] | None = None) -> Engine:
    """Return the fastest engine that works here and carries this code.

    Args:
        k, m: data and parity shards.
        trials: the candidates, fastest first; those of this machine if None.

    Raises:
        ConfigError: no code has these sizes, or no candidate works.
    """
    matrix = parity_matrix(k, m)
    trials = candidates() if trials is None else trials
    for trial in trials:
        if trial.engine is not None and not trial.obstacle and trial.engine.carries(matrix):
            return trial.engine
    reasons = " ".join(trial.obstacle for trial in trials)
    raise ConfigError(f"No engine carries the erasure code here: {reasons} Install pyeclib, or turn protection off.")


def describe(k: int = 4, m: int = 2, trials: Sequence[Trial] | None = None) -> str:
    """Return in words which engine carries this code, and why none of the faster ones does. Arguments as above."""
    engine = choose_engine(k, m, trials)
    passed_over = []
    for trial in candidates() if trials is None else trials:
        if trial.engine is engine:
            break
        if trial.obstacle:
            passed_over.append(trial.obstacle)
        elif trial.engine is not None:
            passed_over.append(f"{trial.engine.name} cannot carry it: its matrix has coefficients other than one.")
    chosen = f"The erasure code ({k},{m}) is carried by {engine.name}, the fastest engine that passed its self-test."
    return " ".join([chosen, *passed_over])


def _agrees(engine: Engine, matrix: Matrix, length: int) -> bool:
    inputs = [_noise(f"input {i}", length) for i in range(len(matrix[0]))]
    before = [_noise(f"output {i}", length) for i in range(len(matrix))]
    right = combine(matrix, inputs)
    added = [bytes(a ^ b for a, b in zip(old, new, strict=True)) for old, new in zip(before, right, strict=True)]
    for accumulate, expected in ((False, right), (True, added)):
        sources, targets = [_at_odd_address(part) for part in inputs], [_at_odd_address(part) for part in before]
        engine.multiply(matrix, sources, targets, accumulate)
        if [bytes(target.tolist()) for target in targets] != expected:
            return False
        if [bytes(source.tolist()) for source in sources] != inputs:
            return False
    return True


def _noise(what: str, length: int) -> bytes:
    """Bytes that look random and are the same each time, without anybody's generator."""
    return hashlib.shake_128(what.encode()).digest(length)


def _noise_matrix(rows: int, columns: int) -> Matrix:
    flat = _noise("matrix", rows * columns)
    return tuple(tuple(flat[row * columns : (row + 1) * columns]) for row in range(rows))


def _at_odd_address(content: bytes) -> Tensor:
    return torch.frombuffer(bytearray(b"\0" + content), dtype=torch.uint8)[1:]
