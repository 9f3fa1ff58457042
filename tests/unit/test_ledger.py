"""The ledger keeps what it was given, for one controller at a time."""

from __future__ import annotations

from pathlib import Path

import pytest

from controller.events import Persist
from controller.ledger import Ledger
from elastic.domain import Incident, Plan, PlanKind, TrainingSpec
from elastic.errors import ConfigError, LedgerBusy


def test_records_come_back_as_they_went_in(tmp_path: Path) -> None:
    plan = Plan(generation=2, kind=PlanKind.SWITCH, owners=(0, 1), virtual_replicas=2, reason="w joins")
    spec = TrainingSpec(slots=2, dataset_size=10)
    ledger = Ledger(tmp_path / "a" / "ledger.sqlite", "gpt")
    assert ledger.is_new()
    written = ledger.append(
        [
            Persist("job-fixed", "fixed", {"spec": spec, "requested": spec}),
            Persist("generation-opened", "opened", {"plan": plan}),
            Persist("incident", "incident", {"incident": Incident(kind="worker lost", seconds_lost=0.25)}),
        ]
    )
    ledger.close()
    again = Ledger(tmp_path / "a" / "ledger.sqlite", "gpt")
    records = list(again.records())
    assert [event.sequence for event in written] == [1, 2, 3]
    assert records[0] == ("job-fixed", {"spec": spec, "requested": spec})
    assert records[1] == ("generation-opened", {"plan": plan})
    assert records[2][1]["incident"].seconds_lost == 0.25
    assert [event.text for event in again.events_after(1)] == ["opened", "incident"]
    again.close()


def test_a_second_controller_is_refused_with_the_holder_named(tmp_path: Path) -> None:
    ledger = Ledger(tmp_path / "ledger.sqlite", "gpt")
    with pytest.raises(LedgerBusy, match=r"held by another controller \(pid \d+\)"):
        Ledger(tmp_path / "ledger.sqlite", "gpt")
    ledger.close()
    Ledger(tmp_path / "ledger.sqlite", "gpt").close()


def test_a_ledger_of_another_job_is_refused(tmp_path: Path) -> None:
    Ledger(tmp_path / "ledger.sqlite", "gpt").close()
    with pytest.raises(ConfigError, match="belongs to job 'gpt', not 'bert'"):
        Ledger(tmp_path / "ledger.sqlite", "bert")
    Ledger(tmp_path / "ledger.sqlite", "gpt").close()  # the refusal left no lock behind


def test_a_file_that_is_no_ledger_is_refused_and_kept(tmp_path: Path) -> None:
    path = tmp_path / "ledger.sqlite"
    path.write_bytes(b"something else entirely" * 100)
    with pytest.raises(ConfigError, match="is not a ledger"):
        Ledger(path, "gpt")
    assert path.read_bytes().startswith(b"something else")
