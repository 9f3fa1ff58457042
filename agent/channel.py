"""The line between an agent and its keeper: JSON messages with file descriptors, over an inherited unix socket.

Either side is trusted: it is the same program on the same machine. Messages keep their bounds and their order. This file
must never block, nor import torch.
"""

from __future__ import annotations

import array
import asyncio
import json
import os
import socket
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from elastic.errors import ProtocolError

MESSAGE_BYTES_MAX = 128 * 1024
FDS_MAX = 4
BACKLOG_MAX = 1024

Received = Callable[[dict[str, Any], list[int]], None]


def pair() -> tuple[socket.socket, socket.socket]:
    """Two connected ends; the first is this process's own, for a Channel."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    for end in (ours, theirs):
        end.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 2 * MESSAGE_BYTES_MAX)
    return ours, theirs


class Channel:
    """One end, inside a running loop."""

    def __init__(self, end: socket.socket, received: Received, ended: Callable[[], None]) -> None:
        """Begin to read.

        Args:
            end: it belongs to the channel from now on.
            received: takes each message, and owns the descriptors that came with it.
            ended: is called once when the other side is gone.
        """
        end.setblocking(False)
        self._end = end
        self._received, self._ended = received, ended
        self._backlog: deque[tuple[bytes, list[int]]] = deque()
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(end, self._read)

    def send(self, message: Mapping[str, Any], fds: Sequence[int] = ()) -> None:
        """Send a message; the descriptors stay the caller's. Nothing is sent to a side that is gone.

        Raises:
            ProtocolError: it is too large, or the other side has not read for long.
        """
        data = json.dumps(message, separators=(",", ":")).encode()
        if len(data) > MESSAGE_BYTES_MAX:
            raise ProtocolError(
                f"A message of {len(data)} bytes is longer than the {MESSAGE_BYTES_MAX} that fit: split it."
            )
        if self._end.fileno() < 0:
            return
        if len(self._backlog) == BACKLOG_MAX:
            raise ProtocolError(f"The other side has left {BACKLOG_MAX} messages unread: it must be replaced.")
        self._backlog.append((data, [os.dup(fd) for fd in fds]))
        self._write()

    def close(self) -> None:
        """Hang up; `ended` is not called for that."""
        if self._end.fileno() >= 0:
            self._loop.remove_reader(self._end)
            self._loop.remove_writer(self._end)
            self._end.close()
        while self._backlog:
            _close(self._backlog.popleft()[1])

    def _write(self) -> None:
        while self._backlog:
            data, fds = self._backlog[0]
            try:
                socket.send_fds(self._end, [data], fds)
            except BlockingIOError:
                self._loop.add_writer(self._end, self._write)
                return
            except OSError:
                self._hang_up()
                return
            self._backlog.popleft()
            _close(fds)
        self._loop.remove_writer(self._end)

    def _read(self) -> None:
        try:
            data, ancillary, flags, _ = self._end.recvmsg(
                MESSAGE_BYTES_MAX, socket.CMSG_LEN(FDS_MAX * array.array("i").itemsize), socket.MSG_CMSG_CLOEXEC
            )
        except BlockingIOError:
            return
        except OSError:
            self._hang_up()
            return
        fds = array.array("i")
        for level, kind, content in ancillary:
            if (level, kind) == (socket.SOL_SOCKET, socket.SCM_RIGHTS):
                fds.frombytes(content[: len(content) - len(content) % fds.itemsize])
        if not data:
            self._hang_up()
            return
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            _close(fds)
            raise ProtocolError("A message between agent and keeper was cut short: they are of different versions.")
        self._received(json.loads(data), list(fds))

    def _hang_up(self) -> None:
        self.close()
        self._ended()


def _close(fds: Sequence[int]) -> None:
    for fd in fds:
        os.close(fd)
