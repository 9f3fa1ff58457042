"""Planned garbage collection: off between the planned steps, on again in what is forked, and Python's own with 0."""

from __future__ import annotations

import ast
import subprocess
import sys

SCRIPT = """
import gc, os, weakref
from elastic.collecting import Collector

class Ring:
    def __init__(self):
        self.me = self

def ring():
    return weakref.ref(Ring())

collector = Collector(EVERY)
before = ring()
seen = []
for step in range(5, 13):
    collector.step_ended(step)
    ref = ring()
    seen.append((step, gc.isenabled(), before() is None))
    before = ref
print(seen)
pid = os.fork()
if pid == 0:
    os._exit(0 if gc.isenabled() else 1)
print(os.waitpid(pid, 0)[1])
"""


def run(every: int) -> list[str]:
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.replace("EVERY", str(every))], capture_output=True, text=True, timeout=60, check=True
    )
    return done.stdout.splitlines()


def test_garbage_goes_after_the_planned_steps_only() -> None:
    seen, forked = run(4)
    expected = [(step, False, step in (5, 8, 12)) for step in range(5, 13)]  # 5: the first that ends here
    assert seen == str(expected) and forked == "0"


def test_without_a_plan_python_collects_as_ever() -> None:
    seen, forked = run(0)
    assert all(enabled for _, enabled, _ in ast.literal_eval(seen)) and forked == "0"
