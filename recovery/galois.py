"""Arithmetic of the erasure code: the field GF(2^8), matrices over it, and the code's own matrix.

The code is the systematic Reed-Solomon code that the library `reedsolo` defines: bytes are polynomials over GF(2) modulo
x^8 + x^4 + x^3 + x^2 + 1 (0x11d), addition is XOR, and the m parity bytes of k data bytes are the remainder of dividing
by (x - 1)(x - 2)(x - 4)...; consecutive powers of a generator as roots make any k of the k + m bytes enough (the BCH
bound: Lin and Costello, Error Control Coding, 2nd ed., section 7.2). Whoever carries the code out, this file says what
the right bytes are. It is plain Python for small matrices and tests, and must never see whole shards.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cache, lru_cache, reduce
from operator import xor

from reedsolo import RSCodec

from elastic.errors import ConfigError

POLYNOMIAL = 0x11D
SHARDS_MAX = 255
"""A code word of this field has no more bytes than the field has elements other than zero."""

Matrix = tuple[tuple[int, ...], ...]
"""Rows of coefficients 0..255. Immutable, so that it can key a cache."""


def _powers() -> tuple[list[int], list[int]]:
    """exp[i] = 2^i for 0 <= i < 510 (twice around, so that no sum of two logarithms needs a modulus), and its inverse."""
    exp, log, value = [0] * 510, [0] * 256, 1
    for power in range(255):
        exp[power] = exp[power + 255] = value
        log[value] = power
        value <<= 1
        if value & 0x100:
            value ^= POLYNOMIAL
    return exp, log


_EXP, _LOG = _powers()


def product(a: int, b: int) -> int:
    """a times b, all 0..255."""
    return _EXP[_LOG[a] + _LOG[b]] if a and b else 0


def inverse(a: int) -> int:
    """1 / a, for a in 1..255."""
    if not a:
        raise ConfigError(
            "Zero has no inverse in GF(2^8): this matrix is no erasure code; take one of parity_matrix()."
        )
    return _EXP[255 - _LOG[a]]


@cache
def times_table(factor: int) -> bytes:
    """The products of `factor` with 0..255, made for `bytes.translate`."""
    return bytes(product(factor, value) for value in range(256))


def combine(matrix: Matrix, inputs: Sequence[bytes]) -> list[bytes]:
    """matrix times inputs, byte by byte: one output for each row, as long as the inputs are."""
    length = len(inputs[0]) if inputs else 0
    outputs = []
    for row in matrix:
        terms = (part.translate(times_table(factor)) for factor, part in zip(row, inputs, strict=True))
        total = reduce(xor, (int.from_bytes(term, "little") for term in terms), 0)
        outputs.append(total.to_bytes(length, "little"))
    return outputs


def matrix_product(left: Matrix, right: Matrix) -> Matrix:
    """left [a, b] times right [b, c] is [a, c]."""
    columns = tuple(zip(*right, strict=True))
    return tuple(
        tuple(reduce(xor, (product(a, b) for a, b in zip(row, column, strict=True)), 0) for column in columns)
        for row in left
    )


def matrix_inverse(matrix: Matrix) -> Matrix:
    """The inverse of a square matrix, by Gauss and Jordan.

    Raises:
        ConfigError: the matrix has none.
    """
    size = len(matrix)
    rows = [[*row, *(int(i == j) for j in range(size))] for i, row in enumerate(matrix)]
    for column in range(size):
        # A zero where no row has another value ends in the sentence of inverse().
        pivot = next((i for i in range(column, size) if rows[i][column]), column)
        rows[column], rows[pivot] = rows[pivot], rows[column]
        scale = inverse(rows[column][column])
        rows[column] = [product(scale, value) for value in rows[column]]
        for i in range(size):
            if i != column and (factor := rows[i][column]):
                rows[i] = [a ^ product(factor, b) for a, b in zip(rows[i], rows[column], strict=True)]
    return tuple(tuple(row[size:]) for row in rows)


def check_code(k: int, m: int) -> None:
    """Refuse numbers of shards that make no code.

    Raises:
        ConfigError: unless 1 <= k, 0 <= m and k + m <= 255.
    """
    if k < 1 or m < 0:
        raise ConfigError(f"A code of {k} data and {m} parity shards cannot be; ask for k >= 1 and m >= 0.")
    if k + m > SHARDS_MAX:
        raise ConfigError(
            f"A code of {k} data and {m} parity shards has {k + m} in all, but at most {SHARDS_MAX} are possible; "
            "use smaller protection groups."
        )


@cache
def parity_matrix(k: int, m: int) -> Matrix:
    """The matrix [m, k] that turns k data bytes into the m parity bytes of reedsolo's code word.

    Raises:
        ConfigError: see `check_code`.
    """
    check_code(k, m)
    if not m:
        return ()
    codec = RSCodec(m, nsize=k + m)
    # The code is linear: the parity of the unit vector i is the matrix's column i.
    columns = [bytes(codec.encode(bytes(int(i == j) for j in range(k))))[k:] for i in range(k)]
    return tuple(zip(*columns, strict=True))


@lru_cache(maxsize=1024)
def rebuilding_matrix(k: int, m: int, survivors: tuple[int, ...], wanted: tuple[int, ...]) -> Matrix:
    """The matrix [len(wanted), k] that turns surviving shards into wanted ones.

    With L the lost data shards, H those at hand and P the rows of the surviving parity p, all parity satisfies
    p = P[H] d[H] + P[L] d[L], hence d[L] = P[L]^-1 (p + P[H] d[H]): only a matrix as large as the loss is inverted.

    Args:
        survivors: exactly k different indices, data 0..k-1 and parity k..k+m-1, in the order of the columns.
        wanted: any indices, in the order of the rows.
    """
    parity = parity_matrix(k, m)
    place = {index: column for column, index in enumerate(survivors)}
    lost = [index for index in range(k) if index not in place]
    used = [index for index in survivors if index >= k]
    rows = {index: _unit(place[index], k) for index in survivors}
    if lost:
        solved = matrix_inverse(tuple(tuple(parity[p - k][index] for index in lost) for p in used))
        # p + P[H] d[H] in terms of the survivors: one for the parity itself, P for each data shard at hand.
        known = tuple(tuple(int(s == p) if s >= k else parity[p - k][s] for s in survivors) for p in used)
        rows |= dict(zip(lost, matrix_product(solved, known), strict=True))
    data = tuple(rows[index] for index in range(k))
    return tuple(rows[w] if w in rows else matrix_product((parity[w - k],), data)[0] for w in wanted)


def _unit(position: int, size: int) -> tuple[int, ...]:
    return tuple(int(position == i) for i in range(size))
