"""`python -m tests.sim --seed N` replays one cluster, `--seeds M` runs many."""

from __future__ import annotations

import argparse
import sys
import time
from collections import Counter

from tests.sim.cluster import SeedFailed, run_seed


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.sim", description=__doc__)
    parser.add_argument("--seed", type=int, help="run this seed only, or the first of --seeds")
    parser.add_argument("--seeds", type=int, help="how many seeds to run")
    parser.add_argument("--verbose", action="store_true", help="print everything that happens")
    parser.add_argument("--hostile", action="store_true", help="lose, double and reorder messages of every seed")
    parser.add_argument("--keep-going", action="store_true", help="do not stop at the first failing seed")
    arguments = parser.parse_args()
    first = arguments.seed or 0
    count = arguments.seeds or (1 if arguments.seed is not None else 300)
    outcomes: Counter[str] = Counter()
    events, failed, began = 0, [], time.perf_counter()
    for seed in range(first, first + count):
        try:
            result = run_seed(seed, verbose=arguments.verbose, hostile=arguments.hostile or None)
        except SeedFailed as error:
            failed.append(seed)
            lines = str(error).splitlines()
            print("\n".join(lines[-4:] if arguments.keep_going or arguments.verbose else lines), flush=True)
            if not arguments.keep_going:
                break
            continue
        outcomes[result.outcome] += 1
        events += result.events
        if count == 1:
            print(f"seed {seed}: {result.outcome} after {result.seconds:.2f} s ({result.reason})")
            print(f"faults: {', '.join(result.faults) or 'none'}")
    seconds = time.perf_counter() - began
    summary = ", ".join(f"{number} {name}" for name, number in outcomes.most_common())
    print(
        f"{sum(outcomes.values())} seeds: {summary}; {events:,} events in {seconds:.1f} s ({events / seconds:,.0f}/s)"
    )
    if failed:
        print(f"failed: {failed}")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
