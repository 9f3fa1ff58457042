"""Memory that the workers of one node read from each other, instead of sending it.

A region is a memory file of its owner, who alone writes to it. Others on the node are given a token, six integers that
say where something begins, open the file through /proc/PID/fd and map it to read. Nothing has a name in a file system,
so nothing is left behind by a kill, and what was mapped stays readable when its owner is gone. This file must never
write to another's memory, and does not say when memory may be read or changed: whoever passes tokens around does.
"""

from __future__ import annotations

import mmap
import os

import torch
from torch import Tensor

from elastic.encoding import tensor_over
from elastic.errors import CollectiveAborted

_NAME = "elastic-gradients"
_ALIGNMENT_BYTES = 4096
TOKEN_LENGTH = 5
NO_TOKEN = torch.empty(0, dtype=torch.int64)
"""The token of memory that nobody else can read."""


class Region:
    """Zeroed memory of this process that the node's other workers can read for as long as this object lives.

    Attributes:
        memory: uint8, [size_bytes]; it outlives the region.
    """

    def __init__(self, size_bytes: int) -> None:
        self._fd = os.memfd_create(_NAME)
        os.ftruncate(self._fd, max(size_bytes, 1))
        # Populated at once: a page that is first touched inside a step costs ten times a warm one.
        self._map = mmap.mmap(self._fd, max(size_bytes, 1), flags=mmap.MAP_SHARED | mmap.MAP_POPULATE)
        self.memory = torch.frombuffer(self._map, dtype=torch.uint8)[:size_bytes]

    def token(self, offset_bytes: int) -> Tensor:
        """int64, [TOKEN_LENGTH]: what another worker of this node needs to read from here on."""
        status = os.fstat(self._fd)
        return torch.tensor([os.getpid(), self._fd, status.st_ino, status.st_size, offset_bytes])

    def __del__(self) -> None:
        if (fd := getattr(self, "_fd", -1)) >= 0:
            os.close(fd)


class Neighbours:
    """Regions of other workers on this node, mapped when first read and kept."""

    def __init__(self) -> None:
        self._maps: dict[tuple[int, ...], Tensor] = {}

    def read(self, token: Tensor, size: int, dtype: torch.dtype) -> Tensor:
        """Return what lies at a token, [size]; it must not be written to.

        Raises:
            CollectiveAborted: the owner is gone, or the token names no region of a worker.
        """
        *key, offset = token.tolist()
        memory = self._maps.get(tuple(key))
        if memory is None:
            memory = self._maps[tuple(key)] = _mapped(*key)
        end = offset + size * dtype.itemsize
        if not 0 <= offset <= end <= memory.numel():
            raise CollectiveAborted(f"Process {key[0]} offers memory that its region does not have; regroup without it.")
        return memory[offset:end].view(dtype)

    def forget_dead(self) -> None:
        """Unmap the memory of processes that have ended."""
        self._maps = {key: memory for key, memory in self._maps.items() if os.path.exists(f"/proc/{key[0]}")}


def _mapped(pid: int, fd: int, inode: int, size_bytes: int) -> Tensor:
    path = f"/proc/{pid}/fd/{fd}"
    try:
        file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        try:
            # Numbers of processes and files are used again: the inode tells whether it is the one that was meant.
            status = os.fstat(file)
            if _NAME not in os.readlink(path) or (status.st_ino, status.st_size) != (inode, size_bytes):
                raise CollectiveAborted(f"Process {pid} does not have the memory it spoke of; regroup without it.")
            mapped = mmap.mmap(file, size_bytes, mmap.MAP_SHARED | mmap.MAP_POPULATE, mmap.PROT_READ)
        finally:
            os.close(file)
    except OSError as error:
        raise CollectiveAborted(f"The memory of process {pid} cannot be read ({error.strerror}); regroup.") from error
    return tensor_over(mapped)


def obstacle() -> str:
    """Return why processes on this machine cannot read each other's regions, or "" if they can.

    Asks a child of this process, so it must have a single thread.
    """
    region = Region(_ALIGNMENT_BYTES)
    pid, fd, inode, size_bytes, _ = region.token(0).tolist()
    child = os.fork()
    if not child:
        try:
            _mapped(pid, fd, inode, size_bytes)
        except CollectiveAborted as error:
            os.write(2, f"elastic: {error}\n".encode())
            os._exit(1)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    return "" if status == 0 else "a process may not open the files of another one through /proc"


def place(sizes_bytes: list[int]) -> tuple[Region, list[int]]:
    """Return a region that holds pieces of these sizes, and where each begins (on a page of its own)."""
    offsets, end = [], 0
    for size_bytes in sizes_bytes:
        offsets.append(end)
        end += -(-size_bytes // _ALIGNMENT_BYTES) * _ALIGNMENT_BYTES
    return Region(end), offsets
