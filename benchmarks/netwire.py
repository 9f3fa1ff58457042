"""A wire between two network namespaces that delays, jitters and loses packets: `netwire.py NS TAP NS TAP MS MS LOSS`.

Makes a TAP device of the given name in each namespace, says "up", and carries what one sends to the other until it is
killed. Delay and jitter are in milliseconds, loss is a fraction.
"""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import heapq
import itertools
import os
import random
import select
import struct
import sys
import time

_CLONE_NEWNET = 0x40000000
_TUNSETIFF = 0x400454CA
_TAP_WITHOUT_HEADER = 0x0002 | 0x1000


def tap(namespace: str, name: str) -> int:
    """Enter a namespace and return a new TAP device there."""
    libc = ctypes.CDLL(None, use_errno=True)
    inside = os.open(f"/run/netns/{namespace}", os.O_RDONLY)
    if libc.setns(inside, _CLONE_NEWNET):
        raise OSError(ctypes.get_errno(), f"setns({namespace})")
    os.close(inside)
    device = os.open("/dev/net/tun", os.O_RDWR | os.O_NONBLOCK)
    fcntl.ioctl(device, _TUNSETIFF, struct.pack("16sH22x", name.encode(), _TAP_WITHOUT_HEADER))
    return device


def carry(ends: tuple[int, int], delay_s: float, jitter_s: float, loss: float) -> None:
    """Carry packets for ever."""
    other = {ends[0]: ends[1], ends[1]: ends[0]}
    order = itertools.count()
    under_way: list[tuple[float, int, int, bytes]] = []
    while True:
        while under_way and under_way[0][0] <= time.monotonic():
            _, _, end, packet = heapq.heappop(under_way)
            with contextlib.suppress(OSError):  # the device is down: its cable is cut
                os.write(end, packet)
        patience_s = max(0.0, under_way[0][0] - time.monotonic()) if under_way else None
        for end in select.select(ends, [], [], patience_s)[0]:
            try:
                while packet := os.read(end, 65536):
                    if random.random() >= loss:
                        due_s = time.monotonic() + delay_s + random.uniform(0, jitter_s)
                        heapq.heappush(under_way, (due_s, next(order), other[end], packet))
            except OSError:
                continue  # nothing more to read now


def main() -> None:
    one, one_name, two, two_name, delay_ms, jitter_ms, loss = sys.argv[1:]
    ends = tap(one, one_name), tap(two, two_name)
    print("up", flush=True)
    carry(ends, float(delay_ms) / 1e3, float(jitter_ms) / 1e3, float(loss))


if __name__ == "__main__":
    main()
