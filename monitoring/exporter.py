"""Shows a daemon's metrics to Prometheus over HTTP. Values are read when they are asked for, in the daemon's own loop.

Only who asks learns that something is wrong here: a scrape that fails is answered with an error, and the daemon goes on.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from prometheus_client import CollectorRegistry, start_http_server
from prometheus_client.core import Metric
from prometheus_client.registry import Collector

from elastic.errors import ConfigError
from elastic.wire.channels import join_address

READ_TIMEOUT_S = 5.0


@dataclass(frozen=True, slots=True)
class ExporterConfig:
    """Where metrics are shown.

    Attributes:
        port: Port to listen on; 0 for any; None: they are not shown.
        host: Address to listen on.
        targets: File to write the address to, as Prometheus reads it (`file_sd_configs`).
    """

    port: int | None = None
    host: str = "127.0.0.1"
    targets: Path | None = None


def exporter_config(given: Mapping[str, Any]) -> ExporterConfig:
    """Return what the commands hand to a daemon (`elastic.cli.daemons.metrics_settings`) as a config."""
    return ExporterConfig(given["port"], given["host"], Path(given["targets"]) if given["targets"] else None)


class _Reader(Collector):
    def __init__(self, loop: asyncio.AbstractEventLoop, read: Callable[[], Iterable[Metric]]) -> None:
        self._loop = loop
        self._read = read

    def collect(self) -> Iterable[Metric]:
        async def in_loop() -> list[Metric]:
            return list(self._read())

        return asyncio.run_coroutine_threadsafe(in_loop(), self._loop).result(READ_TIMEOUT_S)


class Exporter:
    """Answers scrapes from threads of its own, until it is closed. Must be made in a running loop.

    Args:
        read: Returns the values; called in the loop, once per scrape.

    Raises:
        ConfigError: nothing can listen there.
    """

    def __init__(self, where: ExporterConfig, read: Callable[[], Iterable[Metric]]) -> None:
        registry = CollectorRegistry()
        registry.register(_Reader(asyncio.get_running_loop(), read))
        assert where.port is not None
        try:
            self._server, self._thread = start_http_server(where.port, where.host, registry)
        except OSError as error:
            raise ConfigError(
                f"metrics cannot be shown at {join_address(where.host, where.port)} ({error.strerror}): choose another "
                "--metrics-port (0 for any that is free) or --metrics-host"
            ) from error
        self.address = join_address(where.host, self._server.server_port)
        if where.targets is not None:
            partial = where.targets.with_suffix(".part")
            partial.write_text(json.dumps([{"targets": [self.address]}]) + "\n")
            partial.replace(where.targets)

    def close(self) -> None:
        """Stop answering."""
        self._server.shutdown()
        self._server.server_close()
        self._thread.join(READ_TIMEOUT_S)
