"""Checksums: zlib's, whoever computes them, and nobody who errs is trusted."""

from __future__ import annotations

import ctypes
import mmap
import subprocess
import sys
import zlib
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from elastic import checksum, isal
from elastic.checksum import crc32, crc32_at, is_right, isal_carrier, zlib_carrier

ROOT = Path(__file__).parents[2]


def isal_or_skip() -> checksum.Carrier:
    for library in isal.libraries():
        try:
            return isal_carrier(library)
        except (OSError, AttributeError):
            continue
    pytest.skip("ISA-L is not on this machine")


@given(st.binary(max_size=5000), st.integers(0, 2**32 - 1), st.integers(0, 70))
def test_it_is_zlibs_from_any_address_and_after_any_value(data: bytes, value: int, offset: int) -> None:
    expected = zlib.crc32(data[offset:], value)
    memory = ctypes.create_string_buffer(data, len(data) or 1)
    size_bytes = len(data[offset:])
    address = ctypes.addressof(memory) + offset
    assert crc32(memoryview(data)[offset:], value) == expected
    assert crc32_at(address, size_bytes, value) == expected
    assert zlib_carrier(address, size_bytes, value) == expected


@given(st.binary(max_size=3000), st.integers(0, 3000))
def test_parts_one_after_the_other_make_the_whole(data: bytes, cut: int) -> None:
    assert crc32(data[cut:], crc32(data[:cut])) == crc32(data) == zlib.crc32(data)


def test_it_reads_whatever_lies_in_memory_writable_or_not() -> None:
    data = bytes(range(256)) * 40
    with mmap.mmap(-1, len(data)) as mapped:
        mapped[:] = data
        for buffer in (data, bytearray(data), memoryview(data), memoryview(bytearray(data)), mapped):
            assert crc32(buffer) == zlib.crc32(data)
    with pytest.raises(BufferError):
        crc32(memoryview(data)[::2])


def test_isal_is_what_carries_it_where_it_is_there() -> None:
    assert is_right(isal_or_skip())
    assert checksum.carrier() is not zlib_carrier


def test_a_library_that_errs_is_not_trusted(monkeypatch: pytest.MonkeyPatch) -> None:
    def errs(address: int, size_bytes: int, value: int) -> int:
        return zlib_carrier(address, size_bytes, value) ^ (size_bytes == 4099)

    assert not is_right(errs)
    monkeypatch.setattr(checksum, "isal_carrier", lambda _: errs)
    checksum.engine.cache_clear()
    try:
        assert checksum.carrier() is zlib_carrier
    finally:
        checksum.engine.cache_clear()


def test_without_a_library_zlib_does_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checksum, "libraries", lambda: ["no-such-library.so"])
    checksum.engine.cache_clear()
    try:
        assert crc32(b"snapshot") == zlib.crc32(b"snapshot")
        assert checksum.carrier() is zlib_carrier
    finally:
        checksum.engine.cache_clear()


@pytest.mark.parametrize("module", ["elastic.checksum", "elastic.memory", "agent.memory"])
def test_daemons_get_it_without_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, timeout=60).returncode == 0
