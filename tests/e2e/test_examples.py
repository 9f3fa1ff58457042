"""The examples run as a person would run them, and say the same whatever the number of workers."""

from __future__ import annotations

import io
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console

from examples.cluster import temporary_folder
from examples.demo import PIPELINE_STEPS, Act, Demo, PipelineDemo, show

ROOT = Path(__file__).resolve().parents[2]
LINES_MAX = 150
TIMEOUT_S = 100.0

pytestmark = [pytest.mark.e2e, pytest.mark.timeout(2 * TIMEOUT_S)]


def execute(*command: str) -> str:
    """Run a command to its end; returns what it printed."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, *command],
        cwd=ROOT,
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout + done.stderr


def train(folder: Path, workers: int, *script: str) -> tuple[dict[str, Any], str]:
    """Run a script under `elastic run`; returns the job's summary and what was printed."""
    file = folder / f"summary{workers}.json"
    printed = execute(
        "-c", "from elastic.cli import main; main()", "run", "--port", "0", "--nproc-per-node", str(workers),
        "--run-dir", str(folder / f"run{workers}"), "--summary", str(file), *script,
    )  # fmt: skip
    summary: dict[str, Any] = json.loads(file.read_text())
    assert summary["state"] == "succeeded", printed
    return summary, printed


def test_digits_says_the_same_with_one_worker_and_two_and_three(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    script = ("examples/digits.py", "--epochs", "2")
    alone = execute(*script)
    two, printed = train(tmp_path, 2, *script)
    three, _ = train(tmp_path, 3, *script)
    assert two["digest"] == three["digest"] != ""
    assert two["step"] == three["step"] > 0
    assert two["samples"] == three["samples"]
    assert accuracy(alone) == accuracy(printed) > 90
    assert spoken_losses(alone) == spoken_losses(printed)


def test_gpt_trains_and_its_main_worker_tells_of_every_step(tmp_path: Path) -> None:
    timeline = tmp_path / "timeline.jsonl"
    small = ("--dim", "32", "--layers", "1", "--batch", "2", "--slots", "4", "--steps", "12")
    summary, printed = train(tmp_path, 2, "examples/gpt.py", *small, "--timeline", str(timeline))
    lines = [json.loads(line) for line in timeline.read_text().splitlines()]
    assert summary["step"] == 12
    assert [line["step"] for line in lines] == list(range(1, 13))
    assert {(line["world_size"], line["rank"]) for line in lines} == {(2, 0)}
    assert "step 12: loss" in printed


def test_two_sites_agree_on_the_same_however_many_workers_there_are(tmp_path: Path) -> None:
    small = ("--dim", "32", "--layers", "2", "--batch", "2", "--every", "4", "--fragments", "2", "--rounds", "6")
    script = ("examples/gpt_two_sites.py", *small, "--quantize", "int8")
    one, _ = train(tmp_path, 1, *script)
    two, printed = train(tmp_path, 2, *script)
    assert one["digest"] == two["digest"] != "" and one["step"] == two["step"] == 6
    assert "agreement 6: loss" in printed and "2 site(s)" in printed


def test_careful_stops_early_and_saves_once(tmp_path: Path) -> None:
    pytest.importorskip("sklearn")
    saved = [tmp_path / "alone.pt", tmp_path / "two.pt"]
    script = ("-m", "examples.careful", "--patience", "1", "--epochs", "8")
    alone = execute(*script, "--save", str(saved[0]))
    summary, printed = train(tmp_path, 2, *script, "--save", str(saved[1]))
    assert alone.count("saved after step") == printed.count(f"saved after step {summary['step']}") == 1
    assert accuracy(alone) == accuracy(printed) > 90
    first, second = (torch.load(path, weights_only=True) for path in saved)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)


def test_the_demo_loses_a_stage_and_ends_with_the_same_bits() -> None:
    said = io.StringIO()
    with temporary_folder() as folder:
        demo = PipelineDemo(folder, PIPELINE_STEPS, Console(file=said, width=200))
        assert show(demo), said.getvalue()
    printed = said.getvalue()
    cuts = [line.partition("s  ")[2] for line in printed.splitlines() if " stages: layers " in line]
    assert [cut.partition(":")[0] for cut in cuts] == ["4 stages", "3 stages"], printed
    lost = printed.partition("killing ")[2].split()[0]
    assert lost in cuts[0] and lost not in cuts[1], printed
    assert f"after {PIPELINE_STEPS} steps and 1 incident: equal, bit for bit" in printed


def test_the_demo_says_what_each_act_cost(tmp_path: Path) -> None:
    demo = Demo(tmp_path, 8, Console())
    clocks_s = {1: 1.0, 2: 2.0, 3: 3.0, 4: 4.0, 5: 5.0, 6: 13.5, 7: 14.5, 8: 15.5}  # 4 and 5 were redone before 6
    lines = [*clocks_s.items(), (4, 11.5), (5, 12.5)]
    demo.timeline_file.write_text("".join(json.dumps({"clock_s": s, "step": step}) + "\n" for step, s in lines))
    demo.acts = [
        Act("one killed", "", 0, 1, began_s=2.5, ended_s=4.5),
        Act("all killed", "", 1, 3, began_s=5.5, ended_s=14.0),
        Act("one added", "its agent attached", 3, 3, began_s=14.1, ended_s=16.0),
    ]
    fences = [(2, 1), (3, 3), (3, 3)]  # two losses, after which all went on in one generation
    incidents = [
        {"detected_by": "pidfd", "reason": "killed", "generation": generation, "steps_redone": redone}
        for generation, redone in fences
    ]
    columns = [list(column.cells) for column in demo.table({"incidents": incidents}).columns]
    assert columns == [
        ["one killed", "all killed", "one added"],
        ["pidfd: killed", "pidfd: killed", "its agent attached"],
        ["0.00", "7.50", "0.00"],
        ["1", "3", "0"],
    ]


@pytest.mark.parametrize("name", ["digits", "gpt", "careful"])
def test_an_example_fits_on_a_few_screens(name: str) -> None:
    assert len((ROOT / "examples" / f"{name}.py").read_text().splitlines()) < LINES_MAX


def accuracy(printed: str) -> float:
    """Return the last accuracy in per cent that a run of digits printed."""
    return float(printed.rpartition("accuracy ")[2].split()[0])


def spoken_losses(printed: str) -> list[str]:
    """Return the losses that a run of digits printed."""
    return [line.partition("loss ")[2].split(",")[0] for line in printed.splitlines() if "accuracy" in line]
