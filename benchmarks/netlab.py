"""A small network on one machine: hosts in network namespaces on one switch, with faults made to order.

    with Lab("ctl", "a", "b") as lab:
        process = subprocess.Popen([*lab.inside("a"), "program", ...])    # runs on host a, as lab.address("a")
        lab.cut("b"); lab.heal("b")              # its cable pulled at the switch, and put back
        lab.drop("a", "b")                       # what a sends to b vanishes without a word; b still reaches a
        lab.part("a", "b"); lab.join("a", "b")   # both ways
        lab.rate("a", "20mbit"); lab.reset("a", "b")
        port = lab.door("ctl", 29400)            # 127.0.0.1:port outside leads to that port of host ctl

Wires with delay, jitter and loss are made by a relay in a process of its own, since not every kernel has netem:
`Lab("ctl", "a", wires={"a": Wire(delay_ms=5, loss=0.02)})`. Everything is gone at the end of the `with`, and nothing outside
the namespaces is touched. Needs root and iproute2; `obstacle()` says what is missing.
"""

from __future__ import annotations

import contextlib
import ctypes
import itertools
import os
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

NETWORK = "10.77.0"
DEADLINE_S = 10.0
_NOWHERE = "02:00:00:00:00:ff"  # a hardware address that nobody has
_CLONE_NEWNET = 0x40000000
_numbers = itertools.count()


@dataclass(frozen=True)
class Wire:
    """What a host's wire does to packets, in both directions."""

    delay_ms: float = 0.0
    jitter_ms: float = 0.0
    loss: float = 0.0


def obstacle() -> str:
    """Return why no lab can be built on this machine, or ""."""
    if os.geteuid() != 0:
        return "network namespaces need root"
    missing = [tool for tool in ("ip", "tc", "ss") if shutil.which(tool) is None]
    if missing:
        return f"iproute2 is not installed ({', '.join(missing)})"
    probe = f"elprobe{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True, text=True, timeout=DEADLINE_S)
    if made.returncode:
        return f"no network namespace can be made: {made.stderr.strip()}"
    subprocess.run(["ip", "netns", "del", probe], check=True, timeout=DEADLINE_S)
    return ""


class Lab:
    """Hosts on one switch; see the module's docstring."""

    def __init__(self, *hosts: str, wires: Mapping[str, Wire] | None = None) -> None:
        self._prefix = f"el{os.getpid()}x{next(_numbers)}"
        self._switch = f"{self._prefix}sw"
        self._hosts = {host: number for number, host in enumerate(hosts, start=1)}
        self._wires = dict(wires or {})
        self._relays: list[subprocess.Popen[bytes]] = []
        self._doors: list[socket.socket] = []

    def __enter__(self) -> Lab:
        try:
            self._build()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- hosts -----------------------------------------------------------------------------------------------------

    def address(self, host: str) -> str:
        """Return a host's IP address."""
        return f"{NETWORK}.{self._hosts[host]}"

    def inside(self, host: str) -> list[str]:
        """Return what a command line begins with to run on a host."""
        return ["ip", "netns", "exec", self._namespace(host)]

    def door(self, host: str, port: int) -> int:
        """Return a port of 127.0.0.1, outside, that leads to a port of the host."""
        listener = socket.create_server(("127.0.0.1", 0))
        self._doors.append(listener)
        threading.Thread(target=self._keep_door, args=(listener, host, port), daemon=True).start()
        return int(listener.getsockname()[1])

    # -- faults ----------------------------------------------------------------------------------------------------

    def cut(self, host: str) -> None:
        """Pull a host's cable out of the switch."""
        _ip("-n", self._switch, "link", "set", self._port(host), "down")

    def heal(self, host: str) -> None:
        """Put it back."""
        _ip("-n", self._switch, "link", "set", self._port(host), "up")

    def drop(self, source: str, target: str) -> None:
        """Let what `source` sends to `target` vanish, without a word to either."""
        to = self.address(target), "lladdr", _NOWHERE, "dev", "eth0", "nud", "permanent"
        _ip("-n", self._namespace(source), "neigh", "replace", *to)

    def undrop(self, source: str, target: str) -> None:
        """Let it arrive again."""
        _ip("-n", self._namespace(source), "neigh", "del", self.address(target), "dev", "eth0")

    def part(self, one: str, other: str) -> None:
        """Cut the link between two hosts, both ways; each still reaches all others."""
        self.drop(one, other)
        self.drop(other, one)

    def join(self, one: str, other: str) -> None:
        """Mend it."""
        self.undrop(one, other)
        self.undrop(other, one)

    def rate(self, host: str, rate: str) -> None:
        """Limit what a host sends, as in "20mbit"."""
        shape = ("tbf", "rate", rate, "burst", "64kb", "latency", "200ms")
        _run("tc", "-n", self._namespace(host), "qdisc", "replace", "dev", "eth0", "root", *shape)

    def reset(self, host: str, peer: str) -> None:
        """Reset a host's open connections with a peer."""
        _run(*self.inside(host), "ss", "-K", "dst", self.address(peer))

    # -- inside ----------------------------------------------------------------------------------------------------

    def _namespace(self, host: str) -> str:
        return f"{self._prefix}h{self._hosts[host]}"

    def _port(self, host: str) -> str:
        return f"p{self._hosts[host]}"

    def _build(self) -> None:
        _ip("netns", "add", self._switch)
        _ip("-n", self._switch, "link", "add", "br0", "type", "bridge")
        _ip("-n", self._switch, "link", "set", "br0", "up")
        for host in self._hosts:
            namespace, port = self._namespace(host), self._port(host)
            _ip("netns", "add", namespace)
            if host in self._wires:
                self._lay_wire(namespace, port, self._wires[host])
            else:
                _ip("-n", namespace, "link", "add", "eth0", "type", "veth", "peer", "name", port, "netns", self._switch)
            _ip("-n", self._switch, "link", "set", port, "master", "br0", "up")
            _ip("-n", namespace, "addr", "add", f"{self.address(host)}/24", "dev", "eth0")
            _ip("-n", namespace, "link", "set", "eth0", "up")
            _ip("-n", namespace, "link", "set", "lo", "up")

    def _lay_wire(self, namespace: str, port: str, wire: Wire) -> None:
        numbers = (str(number) for number in (wire.delay_ms, wire.jitter_ms, wire.loss))
        relay = subprocess.Popen(
            [sys.executable, str(Path(__file__).with_name("netwire.py")), namespace, "eth0", self._switch, port, *numbers],
            stdout=subprocess.PIPE,
        )
        self._relays.append(relay)
        assert relay.stdout is not None and relay.stdout.readline() == b"up\n", "the relay did not start"

    def _keep_door(self, listener: socket.socket, host: str, port: int) -> None:
        while True:
            try:
                outside, _ = listener.accept()
            except OSError:
                return  # the lab is over
            threading.Thread(target=self._pass_through, args=(outside, host, port), daemon=True).start()

    def _pass_through(self, outside: socket.socket, host: str, port: int) -> None:
        with outside, contextlib.suppress(OSError):
            _enter(self._namespace(host))  # this thread's namespace only
            with socket.create_connection((self.address(host), port), timeout=DEADLINE_S) as within:
                within.settimeout(None)
                back = threading.Thread(target=_pump, args=(within, outside), daemon=True)
                back.start()
                _pump(outside, within)
                back.join()

    def close(self) -> None:
        """Take everything down."""
        for door in self._doors:
            door.close()
        for relay in self._relays:
            relay.kill()
            relay.wait()
        for namespace in (*map(self._namespace, self._hosts), self._switch):
            subprocess.run(["ip", "netns", "del", namespace], capture_output=True, timeout=DEADLINE_S)


def _pump(source: socket.socket, target: socket.socket) -> None:
    with contextlib.suppress(OSError):
        while data := source.recv(65536):
            target.sendall(data)
    with contextlib.suppress(OSError):
        target.shutdown(socket.SHUT_WR)


def _enter(namespace: str) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    fd = os.open(f"/run/netns/{namespace}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if libc.setns(fd, _CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), f"setns({namespace})")
    finally:
        os.close(fd)


def _ip(*arguments: str) -> None:
    _run("ip", *arguments)


def _run(*command: str) -> None:
    deadline = time.monotonic() + DEADLINE_S
    done = subprocess.run(command, capture_output=True, text=True, timeout=deadline - time.monotonic())
    if done.returncode:
        raise OSError(f"{' '.join(command)}: {done.stderr.strip()}")
