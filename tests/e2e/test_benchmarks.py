"""The benchmarks that are cheap run as a person would run them, and print what they promise."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from benchmarks.paired import median_interval, ratio

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT_S = 100.0


@pytest.mark.e2e
def test_the_codec_is_measured_beside_a_copy_and_with_every_engine() -> None:
    report = quick("benchmarks.codec")
    assert report["decoded_is_right"]
    for name in ("encode", "decode"):
        low, high = report[f"{name}_over_memcpy_ci"]
        assert 0 < low <= report[f"{name}_over_memcpy"] <= high
    measured = {(row["k"], row["m"]) for row in report["codes"] if row["encode_gbps"] > 0 < row["decode_gbps"]}
    assert measured == {(3, 1), (4, 2), (6, 2), (8, 3), (10, 4)}
    assert {"XOR", "torch", "reedsolo"} <= {row["engine"] for row in report["codes"]}


def test_a_ratio_is_that_of_pairs_and_its_interval_covers_it() -> None:
    assert ratio([2.0, 20.0, 3.0], [1.0, 10.0, 1.0]) == (2.0, [2.0, 3.0])
    assert median_interval(range(1, 7)) == (1, 6)
    assert median_interval(range(1, 11)) == (2, 9)  # 1 - 2 * (1 + 10) / 2**10 = 97.9 %


def quick(module: str) -> dict[str, Any]:
    """Run a benchmark with few repetitions; returns the one JSON object that it prints."""
    done = subprocess.run(
        [sys.executable, "-m", module, "--quick", "--json"],
        cwd=ROOT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    report: dict[str, Any] = json.loads(done.stdout)
    return report
