"""Channels and servers of the control plane: bounded messages, keep-alives, addresses, translated errors."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import grpc
import grpc.aio

from elastic.errors import ConfigError, Unreachable

if TYPE_CHECKING:
    Context = grpc.aio.ServicerContext[Any, Any]
else:
    Context = grpc.aio.ServicerContext

MESSAGE_SIZE_BYTES_MAX = 4 * 1024 * 1024

_OPTIONS = [
    ("grpc.max_send_message_length", MESSAGE_SIZE_BYTES_MAX),
    ("grpc.max_receive_message_length", MESSAGE_SIZE_BYTES_MAX),
    ("grpc.so_reuseport", 0),  # a port in use is an error, not a second listener
    ("grpc.enable_http_proxy", 0),
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.min_reconnect_backoff_ms", 2000),  # despite its name, how long one attempt to connect may take
    ("grpc.max_reconnect_backoff_ms", 500),
]


def parse_address(text: str, *, what: str) -> tuple[str, int]:
    """Return host and port of "HOST:PORT". Raises ConfigError naming `what` when it is not one."""
    host, colon, port = text.rpartition(":")
    if not colon or not host or not port.isdigit() or int(port) > 65535:
        raise ConfigError(f"{what} {text!r} is not HOST:PORT: give for example 127.0.0.1:29400")
    return host.strip("[]"), int(port)


def join_address(host: str, port: int) -> str:
    """Return "HOST:PORT", with brackets around an IPv6 host."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def client(target: str) -> grpc.aio.Channel:
    """Return an asyncio channel to HOST:PORT or unix:PATH."""
    return grpc.aio.insecure_channel(target, options=_OPTIONS)


def blocking_client(target: str) -> grpc.Channel:
    """Return a blocking channel to HOST:PORT or unix:PATH."""
    return grpc.insecure_channel(target, options=_OPTIONS)


def server() -> grpc.aio.Server:
    """Return an asyncio server; bind it with `listen`."""
    return grpc.aio.server(options=_OPTIONS)


def listen(target: grpc.aio.Server, host: str, port: int, *, what: str) -> int:
    """Bind a server and return its port. Raises ConfigError when the address cannot be used."""
    try:
        bound = target.add_insecure_port(join_address(host, port))
    except RuntimeError:
        bound = 0
    if bound == 0:
        raise ConfigError(
            f"{what} cannot listen on {join_address(host, port)}: the port is in use or the address is not of this "
            "machine; choose another with --port or --host"
        )
    return int(bound)


def explain(error: grpc.RpcError, target: str, what: str) -> Unreachable:
    """Translate a failed call into one sentence."""
    code = error.code() if hasattr(error, "code") else None
    detail = error.details() if hasattr(error, "details") else str(error)
    if code is grpc.StatusCode.UNAVAILABLE:
        return Unreachable(f"no {what} answers at {target}: check that it runs and that the address is right")
    if code is grpc.StatusCode.DEADLINE_EXCEEDED:
        return Unreachable(f"the {what} at {target} did not answer in time: it may be stopped or cut off")
    return Unreachable(f"the {what} at {target} refused: {detail}")
