"""Which sockets of this process belong to a group of gloo, and how they are shut down.

They are told apart for certain, by the addresses that the ranks publish through the store: the user's sockets and those
of other groups are never touched, and a listening socket is never shut down (that would end the process).
"""

from __future__ import annotations

import ipaddress
import os
import socket
import struct
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass

Endpoint = tuple[str, int]
"""An IP address in its shortest spelling, and a port."""


def parse_address(value: bytes) -> Endpoint | None:
    """Read the listening address off what gloo publishes for a rank; None if the value is something else.

    Two length-prefixed fields come first: the host's name, and a block that begins with a `sockaddr_storage`.
    """
    if len(value) < 8:
        return None
    (name_size,) = struct.unpack_from("=Q", value)
    start = 8 + name_size + 8
    if len(value) < start + 28:
        return None
    (family,) = struct.unpack_from("=H", value, start)
    (port,) = struct.unpack_from("!H", value, start + 2)
    if family == socket.AF_INET:
        return str(ipaddress.IPv4Address(value[start + 4 : start + 8])), port
    if family == socket.AF_INET6:
        return _plain(str(ipaddress.IPv6Address(value[start + 8 : start + 24]))), port
    return None


_LOOKING = threading.Lock()
"""Whoever looks makes short-lived duplicates, which must not be found by somebody else."""


@dataclass(frozen=True)
class Socket:
    """A socket of this process, known again by its inode even if the number was given to another file."""

    fd: int
    inode: int


def find_sockets(own: Endpoint | None, peers: Sequence[Endpoint]) -> list[Socket]:
    """Return the connections whose near end is our listening address or whose far end is that of a peer."""
    with _LOOKING:
        return _look_for_sockets(own, peers)


def _look_for_sockets(own: Endpoint | None, peers: Sequence[Endpoint]) -> list[Socket]:
    found: list[Socket] = []
    for name in os.listdir("/proc/self/fd"):
        with _borrow(int(name)) as borrowed:
            if borrowed is None or borrowed.type != socket.SOCK_STREAM:
                continue
            if borrowed.family not in (socket.AF_INET, socket.AF_INET6):
                continue
            if borrowed.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN):
                continue
            if _endpoint(borrowed.getsockname) == own or _endpoint(borrowed.getpeername) in peers:
                found.append(Socket(int(name), os.fstat(borrowed.fileno()).st_ino))
    return found


def shut_down(sockets: Sequence[Socket]) -> None:
    """Shut connections down both ways; those that are gone are left alone."""
    for known in sockets:
        with _borrow(known.fd) as borrowed:
            # The duplicate is examined, not the number, which can change hands between look and deed.
            if borrowed is None or os.fstat(borrowed.fileno()).st_ino != known.inode:
                continue
            try:
                borrowed.shutdown(socket.SHUT_RDWR)
            except OSError:
                continue  # the other side was faster


class _borrow:
    """A duplicate of a descriptor as a socket for the length of a `with`, or None if it is no socket."""

    def __init__(self, fd: int) -> None:
        self._socket: socket.socket | None = None
        try:
            duplicate = os.dup(fd)
        except OSError:
            return  # closed meanwhile
        try:
            self._socket = socket.socket(fileno=duplicate)
        except OSError:
            os.close(duplicate)

    def __enter__(self) -> socket.socket | None:
        return self._socket

    def __exit__(self, *_: object) -> None:
        if self._socket is not None:
            self._socket.close()


def _endpoint(name: Callable[[], object]) -> Endpoint | None:
    try:
        address = name()
    except OSError:
        return None  # not connected
    assert isinstance(address, tuple)
    return _plain(str(address[0])), int(address[1])


def _plain(address: str) -> str:
    """An IPv4 address that travels inside IPv6 is the same address."""
    parsed = ipaddress.ip_address(address.partition("%")[0])
    mapped = getattr(parsed, "ipv4_mapped", None)
    return str(mapped or parsed)
