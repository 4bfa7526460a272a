"""Prints what `import burst_jax` costs on top of `import jax` (goal: at most 0.3 s).

Each import happens in a fresh process; the two are measured in turn, so that a busy moment of the
machine touches both. The first round fills the disk cache and is not counted. Wall time is what a
user waits; CPU time is the steadier of the two where other work runs.

    make bench BENCH=benchmarks/import_time.py
"""

import argparse
import statistics
import subprocess
import sys

STATEMENTS = ("import jax", "import burst_jax")
CLOCK = """
from time import perf_counter, process_time
begin = perf_counter(), process_time()
{statement}
print(perf_counter() - begin[0], process_time() - begin[1])
"""


def import_times_s(statement: str) -> tuple[float, float]:
    """Wall and CPU time of one import statement in a fresh interpreter."""
    command = [sys.executable, "-c", CLOCK.format(statement=statement)]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    wall_s, cpu_s = map(float, printed.split())
    return wall_s, cpu_s


def row(name: str, times_s: list[float]) -> str:
    return (
        f"  {name:<17} {statistics.median(times_s):6.3f}  "
        f"({min(times_s):.3f} to {max(times_s):.3f})"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=11)
    rounds = parser.parse_args().rounds
    runs = [[import_times_s(statement) for statement in STATEMENTS] for _ in range(rounds + 1)][1:]
    for clock, title in enumerate(("wall time, s", "CPU time, s")):
        jax, ours = ([run[statement][clock] for run in runs] for statement in range(2))
        print(f"{title}: median (range) of {rounds} rounds")
        print(row(STATEMENTS[0], jax))
        print(row(STATEMENTS[1], ours))
        print(row("burst_jax adds", [b - a for a, b in zip(jax, ours, strict=True)]))


if __name__ == "__main__":
    main()
