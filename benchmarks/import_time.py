"""Prints what `import burst_jax` costs on top of `import jax` (goal: at most 0.3 s).

Each import happens in a fresh process; the two are measured in turn, so that a busy moment of the
machine touches both. The first round fills the disk cache and is not counted.

    make bench BENCH=benchmarks/import_time.py
"""

import argparse
import statistics
import subprocess
import sys

STATEMENTS = ("import jax", "import burst_jax")
CLOCK = "from time import perf_counter; begin = perf_counter(); {}; print(perf_counter() - begin)"


def import_time_s(statement: str) -> float:
    """Wall time of one import statement in a fresh interpreter."""
    command = [sys.executable, "-c", CLOCK.format(statement)]
    return float(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    times_s = {statement: [] for statement in STATEMENTS}
    for counted in [False] + [True] * rounds:
        for statement in STATEMENTS:
            time_s = import_time_s(statement)
            if counted:
                times_s[statement].append(time_s)
    for statement in STATEMENTS:
        low, high = min(times_s[statement]), max(times_s[statement])
        median = statistics.median(times_s[statement])
        print(f"{statement:<18} {median:.3f} s   ({low:.3f} to {high:.3f}, {rounds} rounds)")
    extra = statistics.median(
        ours - jax for jax, ours in zip(*(times_s[s] for s in STATEMENTS), strict=True)
    )
    print(f"burst_jax adds     {extra:.3f} s   (median of the differences)")


if __name__ == "__main__":
    main()
