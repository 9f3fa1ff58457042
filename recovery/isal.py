"""The fastest engine: Intel's ISA-L, called by ctypes on the caller's memory.

The library's expanded tables depend on its version and on the processor, so they live in this process only and are
never stored or sent; the matrix is what counts. ctypes lets other Python threads run during a call.
"""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from torch import Tensor

from elastic.errors import ConfigError
from recovery.galois import Matrix

_TABLE_BYTES = 32
"""What ec_init_tables writes for each coefficient (isa-l, include/erasure_code.h)."""


class IsalEngine:
    """One loaded library.

    Raises:
        ConfigError: there is no such library, or it lacks the functions.
    """

    any_device = False

    def __init__(self, library: str) -> None:
        """Load `library`, a path or a name that the dynamic linker knows."""
        self.name = f"ISA-L ({Path(library).name})"
        pointer, integer = ctypes.c_void_p, ctypes.c_int
        try:
            loaded = ctypes.CDLL(library)
            self._init, self._encode, self._update = (
                loaded.ec_init_tables,
                loaded.ec_encode_data,
                loaded.ec_encode_data_update,
            )
        except (OSError, AttributeError) as error:
            raise ConfigError(
                f"ISA-L cannot be loaded ({error}); pip install 'pyeclib>=1.6' or the system's libisal2 for a fast codec."
            ) from error
        self._init.argtypes = [integer, integer, pointer, pointer]
        self._encode.argtypes = [integer, integer, integer, pointer, pointer, pointer]
        self._update.argtypes = [integer, integer, integer, integer, pointer, pointer, pointer]
        self._init.restype = self._encode.restype = self._update.restype = None
        self._tables = lru_cache(maxsize=256)(self._expanded)

    def carries(self, matrix: Matrix) -> bool:
        return True

    def multiply(self, matrix: Matrix, inputs: Sequence[Tensor], outputs: Sequence[Tensor], accumulate: bool) -> None:
        tables, length, columns, rows = self._tables(matrix), inputs[0].numel(), len(inputs), len(outputs)
        targets = _pointers(outputs)
        if not accumulate:
            self._encode(length, columns, rows, tables, _pointers(inputs), targets)
            return
        for column, part in enumerate(inputs):
            self._update(length, columns, rows, column, tables, part.data_ptr(), targets)

    def _expanded(self, matrix: Matrix) -> ctypes.Array[ctypes.c_char]:
        rows, columns = len(matrix), len(matrix[0])
        tables = ctypes.create_string_buffer(_TABLE_BYTES * rows * columns)
        self._init(columns, rows, bytes(factor for row in matrix for factor in row), tables)
        return tables


def _pointers(tensors: Sequence[Tensor]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(tensors))(*(tensor.data_ptr() for tensor in tensors))
