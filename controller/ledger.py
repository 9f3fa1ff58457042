"""The ledger: every decision of a controller, durable before it takes effect.

SQLite in WAL mode with `synchronous=FULL`; one row per event, in order. It is at once the controller's state, its
audit log and what `elastic events` shows. One controller holds it at a time (an advisory lock beside the file); a
second one is refused with a sentence.
"""

from __future__ import annotations

import fcntl
import json
import os
import sqlite3
import time
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from controller.events import Persist
from elastic.domain import Event, Incident, Plan, TrainingSpec
from elastic.errors import ConfigError, LedgerBusy
from elastic.wire.convert import from_plain, to_plain

SCHEMA_VERSION = 1
_TYPED = {"plan": Plan, "spec": TrainingSpec, "requested": TrainingSpec, "incident": Incident}


class Ledger:
    """The ledger of one job.

    Raises:
        LedgerBusy: another controller holds it.
        ConfigError: the file is of another job, of a newer version, or no ledger at all.
    """

    def __init__(self, path: Path, job: str) -> None:
        self.path = path
        path.parent.mkdir(parents=True, exist_ok=True)
        self._lock = os.open(f"{path}.lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            holder = os.pread(self._lock, 32, 0).decode(errors="replace").strip() or "unknown"
            os.close(self._lock)
            raise LedgerBusy(
                f"the ledger {path} is held by another controller (pid {holder}): stop that one first, or name another "
                "ledger with --ledger"
            ) from None
        os.ftruncate(self._lock, 0)
        os.pwrite(self._lock, str(os.getpid()).encode(), 0)
        try:
            self._db = self._open(path, job)
        except sqlite3.DatabaseError as error:
            os.close(self._lock)
            raise ConfigError(f"{path} is not a ledger ({error}): name another with --ledger, or move it away") from error
        except ConfigError:
            os.close(self._lock)
            raise

    @staticmethod
    def _open(path: Path, job: str) -> sqlite3.Connection:
        db = sqlite3.connect(path, isolation_level=None)
        db.execute("PRAGMA journal_mode=WAL")
        db.execute("PRAGMA synchronous=FULL")
        db.execute("CREATE TABLE IF NOT EXISTS job (name TEXT NOT NULL, version INTEGER NOT NULL)")
        db.execute(
            "CREATE TABLE IF NOT EXISTS events (sequence INTEGER PRIMARY KEY AUTOINCREMENT, at_unix_s REAL NOT NULL, "
            "kind TEXT NOT NULL, text TEXT NOT NULL, data TEXT NOT NULL)"
        )
        row = db.execute("SELECT name, version FROM job").fetchone()
        if row is None:
            db.execute("INSERT INTO job VALUES (?, ?)", (job, SCHEMA_VERSION))
        elif row[0] != job:
            raise ConfigError(f"the ledger {path} belongs to job {row[0]!r}, not {job!r}: check --job and --ledger")
        elif row[1] != SCHEMA_VERSION:
            raise ConfigError(
                f"the ledger {path} has version {row[1]}, this program writes {SCHEMA_VERSION}: use the program that "
                "wrote it"
            )
        return db

    def append(self, records: Iterable[Persist]) -> list[Event]:
        """Write records durably, in one transaction, and return them as people see them."""
        written: list[Event] = []
        now = time.time()
        self._db.execute("BEGIN IMMEDIATE")
        for record in records:
            text = json.dumps(to_plain(dict(record.data)), separators=(",", ":"))
            cursor = self._db.execute(
                "INSERT INTO events (at_unix_s, kind, text, data) VALUES (?, ?, ?, ?)",
                (now, record.kind, record.text, text),
            )
            written.append(Event(int(cursor.lastrowid or 0), now, record.kind, record.text, text))
        self._db.execute("COMMIT")
        return written

    def records(self) -> Iterator[tuple[str, Mapping[str, Any]]]:
        """Yield (kind, data) of every event, oldest first, data as the machine gave it."""
        for kind, text in self._db.execute("SELECT kind, data FROM events ORDER BY sequence"):
            data = json.loads(text)
            yield kind, {k: from_plain(v, _TYPED[k]) if k in _TYPED else v for k, v in data.items()}

    def events_after(self, sequence: int, limit: int = 1000) -> list[Event]:
        """Return up to `limit` events with a higher sequence number, oldest first."""
        rows = self._db.execute(
            "SELECT sequence, at_unix_s, kind, text, data FROM events WHERE sequence > ? ORDER BY sequence LIMIT ?",
            (sequence, limit),
        )
        return [Event(*row) for row in rows]

    def newest_events(self, limit: int) -> list[Event]:
        """Return the newest `limit` events, oldest first."""
        rows = self._db.execute(
            "SELECT sequence, at_unix_s, kind, text, data FROM events ORDER BY sequence DESC LIMIT ?", (limit,)
        )
        return [Event(*row) for row in rows][::-1]

    def is_new(self) -> bool:
        """Whether nothing has been written yet."""
        return self._db.execute("SELECT 1 FROM events LIMIT 1").fetchone() is None

    def close(self) -> None:
        """Close the file and let go of the lock."""
        self._db.close()
        os.close(self._lock)
