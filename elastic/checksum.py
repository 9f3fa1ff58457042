"""CRC-32 as zlib computes it, at memory speed where ISA-L is there.

ISA-L reads 27 GB/s where zlib reads 4, and ctypes lets other Python threads run meanwhile. It is tried before it is
trusted; where it cannot be loaded or errs, zlib computes the same numbers. The CRC-32 of two strings one behind the other
follows from those of each without looking at a byte again (`joined`; zlib's crc32_combine(), which Python's module leaves
out): appending n bytes multiplies a CRC by x^8n modulo its polynomial over GF(2). This file must never import torch.
"""

from __future__ import annotations

import ctypes
import hashlib
import mmap
import zlib
from collections.abc import Callable
from functools import cache
from pathlib import Path

from elastic.isal import libraries

Buffer = bytes | bytearray | memoryview | mmap.mmap
Carrier = Callable[[int, int, int], int]
"""(address, size in bytes, value so far) -> CRC-32."""

_POLYNOMIAL = 0xEDB88320
"""CRC-32's, its bits in reverse: the highest bit stands for x^0."""
_ONE = 1 << 31
_X_TO_THE_8 = 1 << 23

_TEST_SIZES_BYTES = (0, 1, 15, 64, 255, 1057, 4099)  # below, at and above what its loops take at once


def crc32(data: Buffer, value: int = 0) -> int:
    """Return the CRC-32 of contiguous memory.

    Args:
        data: bytes-like, read-only or not; it must not change meanwhile.
        value: the CRC-32 of what comes before; `crc32(b, crc32(a))` is that of a and b together.

    Raises:
        BufferError: the memory is not contiguous.
    """
    view = _View()
    _get_buffer(data, ctypes.byref(view), _PyBUF_SIMPLE)
    try:
        return crc32_at(view.buf or 0, view.len, value)
    finally:
        _release_buffer(ctypes.byref(view))


def crc32_at(address: int, size_bytes: int, value: int = 0) -> int:
    """Return the CRC-32 of memory that the caller keeps mapped; arguments as above."""
    return carrier()(address, size_bytes, value)


def carrier() -> Carrier:
    """Return what computes in this process."""
    return engine()[1]


@cache
def engine() -> tuple[str, Carrier]:
    """Return the name and the function of the first library that is right, otherwise zlib's."""
    for library in libraries():
        try:
            candidate = isal_carrier(library)
        except (OSError, AttributeError):
            continue  # not on this machine, or an older one that lacks the function
        if is_right(candidate):
            return f"ISA-L ({Path(library).name})", candidate
    return "zlib", zlib_carrier


def isal_carrier(library: str) -> Carrier:
    """Return the function of one library, a path or a name that the dynamic linker knows.

    Raises:
        OSError: there is no such library.
        AttributeError: it lacks the function.
    """
    function = ctypes.CDLL(library).crc32_gzip_refl
    function.argtypes = [ctypes.c_uint32, ctypes.c_void_p, ctypes.c_uint64]
    function.restype = ctypes.c_uint32

    def carry(address: int, size_bytes: int, value: int) -> int:
        return int(function(value, address, size_bytes)) if size_bytes else value

    return carry


def zlib_carrier(address: int, size_bytes: int, value: int) -> int:
    """Python's own."""
    return zlib.crc32((ctypes.c_char * size_bytes).from_address(address), value) if size_bytes else value


def is_right(candidate: Carrier) -> bool:
    """Whether it computes what zlib does: for many sizes, at odd addresses, and continued."""
    noise = hashlib.shake_128(b"checksum").digest(max(_TEST_SIZES_BYTES) + 1)
    memory = ctypes.create_string_buffer(noise, len(noise))
    address = ctypes.addressof(memory)
    return all(
        candidate(address + offset, size, value) == zlib.crc32(noise[offset : offset + size], value)
        for size in _TEST_SIZES_BYTES
        for offset in (0, 1)
        for value in (0, 0x12345678)
    )


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


class _View(ctypes.Structure):
    """Python's Py_buffer (stable since 3.11): the only way to the address of read-only memory."""

    _fields_ = (
        ("buf", ctypes.c_void_p),
        ("obj", ctypes.py_object),
        ("len", ctypes.c_ssize_t),
        ("itemsize", ctypes.c_ssize_t),
        ("readonly", ctypes.c_int),
        ("ndim", ctypes.c_int),
        ("format", ctypes.c_char_p),
        ("shape", ctypes.c_void_p),
        ("strides", ctypes.c_void_p),
        ("suboffsets", ctypes.c_void_p),
        ("internal", ctypes.c_void_p),
    )


_PyBUF_SIMPLE = 0
_get_buffer = ctypes.pythonapi.PyObject_GetBuffer
_get_buffer.argtypes = [ctypes.py_object, ctypes.POINTER(_View), ctypes.c_int]
_get_buffer.restype = ctypes.c_int
_release_buffer = ctypes.pythonapi.PyBuffer_Release
_release_buffer.argtypes = [ctypes.POINTER(_View)]
_release_buffer.restype = None
