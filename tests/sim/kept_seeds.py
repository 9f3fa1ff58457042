"""Seeds that once found something, and what; they run again with every change.

A seed replays the same run only as long as nothing draws another random number before its fault: what it found is also a
transcript in `tests/unit/test_*_machine.py`, which stays.
"""

KEPT_SEEDS: dict[int, str] = {
    416: "a controller that was stopped took what it had heard before for a standstill, and its last worker for an early leaver",
}
