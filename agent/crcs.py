"""CRC-32 of two strings of bytes one behind the other, from the CRC-32 of each: without looking at a byte again.

Appending n bytes multiplies a CRC by x^8n modulo its polynomial over GF(2); zlib does the same in crc32_combine(), which
Python's module leaves out. Pure arithmetic.
"""

from __future__ import annotations

_POLYNOMIAL = 0xEDB88320
"""CRC-32's, its bits in reverse: the highest bit stands for x^0."""
_ONE = 1 << 31
_X_TO_THE_8 = 1 << 23


def joined(first_crc: int, second_crc: int, second_bytes: int) -> int:
    """CRC-32 (zlib's) of the first string and the second behind it, which is `second_bytes` long."""
    factor, square = _ONE, _X_TO_THE_8
    while second_bytes:
        if second_bytes & 1:
            factor = _product(factor, square)
        square = _product(square, square)
        second_bytes >>= 1
    return _product(factor, first_crc) ^ second_crc


def _product(one: int, other: int) -> int:
    """Of two polynomials, modulo CRC-32's."""
    result = 0
    for power in range(32):
        if one & (_ONE >> power):
            result ^= other
        other = other >> 1 ^ (_POLYNOMIAL if other & 1 else 0)
    return result
