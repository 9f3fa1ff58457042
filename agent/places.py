"""Where checkpoints lie: a directory, or anything that fsspec has an address for. Nothing of torch is known here.

A directory's checkpoint is written beside and renamed when it is whole. An object store has no rename that is one
act, so there it is written in place. In both the marker is what makes it whole: it is written last and removed first.
Errors of the file system pass through; whoever calls says them in a sentence.
"""

from __future__ import annotations

import contextlib
import importlib
import os
import shutil
from pathlib import Path
from typing import Any, Protocol

from agent.rotation import MARKER, part_name
from elastic.errors import CheckpointError


class Place(Protocol):
    """The checkpoints of one job lie here, each a folder of files."""

    target: str

    def names(self) -> list[str]:
        """The names of what lies here; nothing where nothing has been written yet."""
        ...

    def path(self, name: str) -> str:
        """The whole path or address of a checkpoint."""
        ...

    def read(self, path: str, file: str) -> bytes | None:
        """The contents of a small file of a checkpoint, finished or not, by its path; None if there is no such file."""
        ...

    def sizes(self, path: str) -> dict[str, int]:
        """The files of a checkpoint, finished or not, by its path; their lengths in bytes."""
        ...

    def begin(self, name: str) -> str:
        """The path of an empty folder in which the checkpoint `name` is to be written."""
        ...

    def finish(self, path: str, name: str, marker: str) -> None:
        """Make what was written at `path` the checkpoint `name`, in place of one that has had that name."""
        ...

    def abandon(self, path: str) -> None:
        """Remove what was written at `path`."""
        ...

    def remove(self, name: str) -> None:
        """Remove a checkpoint, whole or not."""
        ...


def open_place(target: str) -> Place:
    """The place of a path, or of an address with "://". Raises CheckpointError where it takes what is not installed."""
    return Bucket(target) if "://" in target else Folder(target)


class Folder:
    """A directory of a file system."""

    def __init__(self, target: str) -> None:
        self.target = target
        self._folder = Path(target)

    def names(self) -> list[str]:
        try:
            return sorted(os.listdir(self._folder))
        except FileNotFoundError:
            return []

    def path(self, name: str) -> str:
        return str(self._folder / name)

    def read(self, path: str, file: str) -> bytes | None:
        try:
            return (Path(path) / file).read_bytes()
        except (FileNotFoundError, NotADirectoryError):
            return None

    def sizes(self, path: str) -> dict[str, int]:
        return {entry.name: entry.stat().st_size for entry in os.scandir(path)}

    def begin(self, name: str) -> str:
        path = self._folder / part_name(name, os.getpid())
        shutil.rmtree(path, ignore_errors=True)  # of a process that had this one's number; mkdir() says what is wrong
        path.mkdir(parents=True)
        return str(path)

    def finish(self, path: str, name: str, marker: str) -> None:
        with open(Path(path) / MARKER, "x") as file:
            file.write(marker)
            file.flush()
            os.fsync(file.fileno())
        _sync_folder(path)
        if (self._folder / name).exists():
            self.remove(name)  # the same step of an earlier attempt
        os.rename(path, self._folder / name)
        _sync_folder(self._folder)

    def abandon(self, path: str) -> None:
        shutil.rmtree(path, ignore_errors=True)  # without a marker it is ignored, and removed after the next one

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            (self._folder / name / MARKER).unlink()
        shutil.rmtree(self._folder / name)


def _sync_folder(path: str | Path) -> None:
    """Make sure that the names in a directory outlive a power cut."""
    folder = os.open(path, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(folder)
    finally:
        os.close(folder)


class Bucket:
    """An address of fsspec: an object store, mostly."""

    def __init__(self, target: str) -> None:
        try:
            fsspec: Any = importlib.import_module("fsspec")
            self._files, self._root = fsspec.core.url_to_fs(target)
        except (ImportError, ValueError) as error:
            raise CheckpointError(
                f"Checkpoints cannot be kept at {target} ({error}): install elastic-runtime[fsspec] and what fsspec asks "
                "for, or name a directory."
            ) from error
        self.target = target.rstrip("/")

    def names(self) -> list[str]:
        # Listings are cached, and other processes write here.
        self._files.invalidate_cache()
        try:
            return sorted(path.rstrip("/").rpartition("/")[2] for path in self._files.ls(self._root, detail=False))
        except FileNotFoundError:
            return []

    def path(self, name: str) -> str:
        return f"{self.target}/{name}"

    def read(self, path: str, file: str) -> bytes | None:
        try:
            contents: bytes = self._files.cat_file(f"{self._inside(path)}/{file}")
        except (FileNotFoundError, NotADirectoryError):
            return None
        return contents

    def sizes(self, path: str) -> dict[str, int]:
        self._files.invalidate_cache()
        return {
            entry["name"].rpartition("/")[2]: entry["size"] for entry in self._files.ls(self._inside(path), detail=True)
        }

    def begin(self, name: str) -> str:
        if self._files.exists(f"{self._root}/{name}"):
            self.remove(name)
        return self.path(name)

    def finish(self, path: str, name: str, marker: str) -> None:
        self._files.pipe_file(f"{self._inside(path)}/{MARKER}", marker.encode())

    def abandon(self, path: str) -> None:
        with contextlib.suppress(OSError):  # without a marker it is ignored, and removed after the next one
            self._files.rm(self._inside(path), recursive=True)

    def remove(self, name: str) -> None:
        with contextlib.suppress(FileNotFoundError):
            self._files.rm_file(f"{self._root}/{name}/{MARKER}")
        self._files.rm(f"{self._root}/{name}", recursive=True)

    def _inside(self, path: str) -> str:
        """An address as the file system itself names it."""
        return f"{self._root}{path.removeprefix(self.target)}"
