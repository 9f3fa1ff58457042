"""A worker's output: each line to its own file, and to the console with its rank."""

from __future__ import annotations

import asyncio
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from elastic.logs import Log, Where

CHUNK_SIZE_BYTES = 65536
LINE_SIZE_BYTES_MAX = 64 * 1024


class OutputPipe:
    """Copies one stream of one worker; holds no thread, only a reader of the event loop."""

    def __init__(self, path: Path, shown: Callable[[str], str], console: TextIO | None) -> None:
        read_fd, self.write_fd = os.pipe2(os.O_CLOEXEC)
        os.set_blocking(read_fd, False)
        self._read_fd = read_fd
        self._file = path.open("ab", buffering=0)
        self._shown = shown
        self._console = console
        self._partial = b""
        self._loop = asyncio.get_running_loop()
        self._loop.add_reader(read_fd, self._readable)
        self.closed = False

    def handed_over(self) -> None:
        """The worker holds the writing end now; ours must go, or the end of the stream would never come."""
        os.close(self.write_fd)

    def _readable(self) -> None:
        try:
            data = os.read(self._read_fd, CHUNK_SIZE_BYTES)
        except BlockingIOError:
            return
        if not data:
            self.close()
            return
        self._file.write(data)
        self._echo(data)

    def _echo(self, data: bytes) -> None:
        if self._console is None:
            return
        lines = (self._partial + data).split(b"\n")
        self._partial = lines.pop()
        if len(self._partial) > LINE_SIZE_BYTES_MAX:
            lines.append(self._partial)
            self._partial = b""
        for line in lines:
            print(self._shown(line.decode(errors="replace")), file=self._console)
        self._console.flush()

    def drain(self) -> None:
        """Copy what has been written so far (the worker has ended)."""
        while not self.closed:
            try:
                data = os.read(self._read_fd, CHUNK_SIZE_BYTES)
            except BlockingIOError:
                break
            if not data:
                break
            self._file.write(data)
            self._echo(data)
        self.close()

    def close(self) -> None:
        """Stop copying."""
        if self.closed:
            return
        self.closed = True
        self._loop.remove_reader(self._read_fd)
        if self._partial and self._console is not None:
            print(self._shown(self._partial.decode(errors="replace")), file=self._console, flush=True)
        os.close(self._read_fd)
        self._file.close()


def log_folder(log_dir: Path, worker: str) -> Path:
    """Where a worker's stdout.log and stderr.log are."""
    return log_dir / worker.replace("/", "-")


def open_outputs(
    log_dir: Path, worker: str, rank: int, log: Log, where: Where, *, quiet: bool
) -> tuple[OutputPipe, OutputPipe]:
    """Return the pipes for a worker's stdout and stderr, logged under log_dir/WORKER/, and shown as `log` shows lines."""
    folder = log_folder(log_dir, worker)
    folder.mkdir(parents=True, exist_ok=True)

    def pipe(stream: str, console: TextIO) -> OutputPipe:
        def shown(line: str) -> str:
            return log.line_of_worker(line, worker, rank, stream, where)

        return OutputPipe(folder / f"{stream}.log", shown, None if quiet else console)

    return pipe("stdout", sys.stdout), pipe("stderr", sys.stderr)
