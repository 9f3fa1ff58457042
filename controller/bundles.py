"""Bundles: one directory of evidence per incident, beside the ledger, which can be attached to a bug report as it is.

    incidents/N/summary.txt       for a person
                incident.json     incident, findings, groups, and where each worker was, without stacks
                stacks/WORKER.txt all threads of all its processes
                logs/WORKER.txt   the end of its output
                status.json       the job as `elastic status` showed it
                ledger.jsonl      the newest records
                versions.json     of what runs on which node

The newest are kept. A bundle is written beside its place and then moved there, so that it is whole or not there.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from controller.events import KeepEvidence
from elastic.domain import Event, EvidenceReply, StackFrame, StatusReply, ThreadStack, WorkerEvidence
from elastic.errors import ConfigError
from elastic.wire.convert import to_plain

BUNDLES_KEPT = 50
RECORDS_MAX = 500  # of the ledger
RECORD_TEXT_MAX = 4096
WORKERS_IN_REPLY_MAX = 1024
NAMES_MAX = 16  # of workers in one line


class Bundles:
    """The bundles of one job."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def write(self, kept: KeepEvidence, status: StatusReply, records: Sequence[Event]) -> Path:
        """Write a bundle and return where it is; older ones beyond BUNDLES_KEPT go. Raises OSError."""
        final = self.folder / str(kept.incident.number)
        partial = self.folder / f".{final.name}.part"
        shutil.rmtree(partial, ignore_errors=True)
        for name in ("stacks", "logs"):
            (partial / name).mkdir(parents=True)
        for answer in kept.answers:
            for worker in answer.workers:
                file = f"{worker.worker.replace('/', '-')}.txt"
                (partial / "stacks" / file).write_text(stacks_text(worker))
                (partial / "logs" / file).write_text(worker.log_tail)
        (partial / "summary.txt").write_text(summary(kept))
        (partial / "incident.json").write_text(json.dumps(plain(kept), indent=2) + "\n")
        (partial / "status.json").write_text(json.dumps(to_plain(status), indent=2) + "\n")
        (partial / "ledger.jsonl").write_text("".join(f"{_record(event)}\n" for event in records[-RECORDS_MAX:]))
        versions = {node: dict(answer.versions) for node, answer in zip(kept.nodes, kept.answers, strict=True)}
        (partial / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")
        shutil.rmtree(final, ignore_errors=True)
        partial.replace(final)
        for number in self.numbers()[:-BUNDLES_KEPT]:
            shutil.rmtree(self.folder / str(number), ignore_errors=True)
        return final

    def numbers(self) -> list[int]:
        """Incidents of which there is a bundle, in order."""
        if not self.folder.exists():
            return []
        return sorted(int(path.name) for path in self.folder.iterdir() if path.name.isdigit())

    def read(self, number: int, incidents_total: int) -> EvidenceReply:
        """Return what a bundle says.

        Raises:
            ConfigError: there is no such incident, or no bundle of it (any more).
        """
        if not 1 <= number <= incidents_total:
            there_are = f"its incidents are 1 to {incidents_total}" if incidents_total else "it has had none"
            raise ConfigError(f"this job has no incident {number}: {there_are} (see `elastic incidents`)")
        path = self.folder / str(number)
        try:
            return EvidenceReply(str(path), (path / "summary.txt").read_text(), (path / "incident.json").read_text())
        except FileNotFoundError:
            there = ", ".join(map(str, self.numbers())) or "none"
            raise ConfigError(
                f"there is no evidence of incident {number}: it is kept of hangs, stopped workers and worlds that stood "
                f"still, the newest {BUNDLES_KEPT} of them (here: {there}); `elastic events` has what was decided"
            ) from None
        except OSError as error:
            raise ConfigError(f"the evidence of incident {number} at {path} cannot be read: {error.strerror}") from error


def _record(event: Event) -> str:
    return json.dumps({**to_plain(event), "json": event.json[:RECORD_TEXT_MAX], "text": event.text[:RECORD_TEXT_MAX]})


def plain(kept: KeepEvidence) -> dict[str, Any]:
    """What was found, as data that JSON can hold; stacks are files of their own."""
    workers = [replace(each, stacks=(), log_tail="") for answer in kept.answers for each in answer.workers]
    groups = [{**to_plain(group), "frames": [frame_text(f) for f in group.frames]} for group in kept.examination.groups]
    return {
        "incident": to_plain(kept.incident),
        "findings": [to_plain(finding) for finding in kept.examination.findings],
        "groups": groups,
        "workers": [to_plain(each) for each in workers[:WORKERS_IN_REPLY_MAX]],
        "silent": list(kept.silent[:WORKERS_IN_REPLY_MAX]),
    }


def summary(kept: KeepEvidence) -> str:
    """The bundle in words, for a person who knows nothing of it."""
    incident = kept.incident
    clock = time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(incident.at_unix_s))
    lines = [
        f"incident {incident.number}: {incident.kind}, {incident.subject}",
        f"since {clock}, after step {incident.step}: {incident.reason} (found by {incident.detected_by})",
        "",
    ]
    findings = kept.examination.findings
    lines += [f"* {finding}" for finding in findings] or ["* all workers are in the same place"]
    for number, group in enumerate(kept.examination.groups, 1):
        lines += ["", f"group {number}, {len(group.workers)} worker(s): {_names(group.workers)}", f"  {group.place}"]
        lines += [f"    {frame_text(frame)}" for frame in group.frames]
    faults = [f"{each.worker}: {each.fault}" for answer in kept.answers for each in answer.workers if each.fault]
    lines += ["", "not found:", *(f"  {fault}" for fault in faults[:NAMES_MAX])] if faults else []
    return "\n".join(lines) + "\n"


def _names(workers: Sequence[str]) -> str:
    more = f" and {len(workers) - NAMES_MAX} more" if len(workers) > NAMES_MAX else ""
    return ", ".join(workers[:NAMES_MAX]) + more


def stacks_text(worker: WorkerEvidence) -> str:
    """All stacks of a worker, the innermost line first."""
    slot = f", slot {worker.slot}" if worker.slot >= 0 else ""
    lines = [
        f"worker {worker.worker}, process {worker.pid} in state {worker.process_state}, seen by {worker.source or 'nobody'}",
        f"{worker.operation} (step {worker.step}{slot}), {'waits for others' if worker.waits else 'waits for nobody'}, "
        f"no progress for {worker.since_s:.1f} s",
        *([f"missing: {worker.fault}"] if worker.fault else []),
    ]
    for stack in worker.stacks:
        lines += ["", f"process {stack.pid}, {_thread(stack)}", *(f"    {frame_text(frame)}" for frame in stack.frames)]
    return "\n".join(lines) + "\n"


def _thread(stack: ThreadStack) -> str:
    return "main thread" if stack.is_main else f"thread {stack.thread or '(no name)'}"


def frame_text(frame: StackFrame) -> str:
    """A frame in one line."""
    code = f": {frame.code}" if frame.code else ""
    return f"{frame.file}:{frame.line} in {frame.function}{code}"
