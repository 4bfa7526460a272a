"""Block sizes for each TPU, by the compiler's schedule: remakes the table of winners. No TPU.

    python -m workbench.tpu_sweep all --write        in the environment of `make test-aot`

Each candidate (block_q, block_kv, block_compute) is compiled for the chip with a causal mask, so
that the schedule of full tiles and of partial ones is known. Its score is the estimated time of a
device's part of a training step's attention: a causal zigzag ring over R devices, the home hop and
R - 1 others, in units of what a full matrix unit would take:

    tiles that are executed x (bundles of their kind + what a grid step costs)
    or, a step, the bytes that come and go at the speed of HBM, where that is more

What it does not see: waits for memory inside a step, the first and last step of a grid, what begins
and ends a block of queries or keys (counted as free, which favours small blocks a little), how two
cores share the work, and every stall that is no bundle. So it can tell 1.3 from 1.0, and not 1.03.
Candidates within 1 % of the best count as equal, and of those the one with the least VMEM wins.
"""

import argparse
import dataclasses
import itertools
import json
import math
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from jax.experimental.pallas import tpu as pltpu

from workbench import tpu_programs, tpu_report
from workbench.tpu_programs import PASSES, Program
from workbench.tpu_schedule import Kernel, Region

TABLE = Path(__file__).resolve().parents[1] / "burst_kernels" / "mosaic_tpu" / "_winners.py"
BLOCKS = (1024, 2048)
COMPUTE = (512, 1024)
RING = 8
_VERSIONS = {"v4": "v4", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "tpu7x": "7x"}
_ALIKE = 1.01


@dataclasses.dataclass(frozen=True)
class Score:
    """How a candidate does.

    Attributes:
        program: with its block sizes.
        slowdown: estimated time over that of a full matrix unit and no wasted work; 1 is ideal.
        full, partial: bundles of a tile of each kind, a grid step's own included.
        vmem_bytes: None where the compiler did not say.
    """

    program: Program
    slowdown: float
    full: int
    partial: int
    vmem_bytes: int | None


def main(argv: Sequence[str] | None = None) -> int:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="+", help="v5e, v6e, ..., or all")
    parser.add_argument("--only", choices=PASSES)
    parser.add_argument("--tokens", type=int, default=16384, help="of one device")
    parser.add_argument("--head-dim", type=int, nargs="+", default=[128])
    parser.add_argument("--blocks", type=int, nargs="+", default=BLOCKS)
    parser.add_argument("--compute", type=int, nargs="+", default=COMPUTE)
    parser.add_argument("--write", action="store_true", help=f"rewrite {TABLE.name}")
    args = parser.parse_args(argv)
    chips = tpu_report.chips_of(parser, args.target)
    winners = []
    for chip in chips:
        for head_dim, direction in itertools.product(args.head_dim, PASSES):
            if args.only not in (None, direction):
                continue
            program = Program(
                chip=chip, direction=direction, mask="causal", tokens=args.tokens,
                head_dim=head_dim,
            )  # fmt: skip
            if scores := list(_scored(program, args.blocks, args.compute)):
                winners.append(best(scores))
    for winner in winners:
        print(row(winner))
    if args.write:
        TABLE.write_text(updated(TABLE.read_text() if TABLE.exists() else "", winners))
        print(f"written: {TABLE}")
    return 0 if winners else 1


def _scored(program: Program, blocks: Sequence[int], compute: Sequence[int]) -> Iterable[Score]:
    """Every candidate that compiles; a JSON line for each, with the reason where it does not."""
    for block_q, block_kv, piece in itertools.product(blocks, blocks, compute):
        if block_kv % piece:
            continue
        one = dataclasses.replace(program, block_q=block_q, block_kv=block_kv, compute=piece)
        line = {
            "chip": one.chip, "pass": one.direction, "head_dim": one.head_dim,
            "block_q": block_q, "block_kv": block_kv, "block_compute": piece,
        }  # fmt: skip
        try:
            score = scored(one, tpu_programs.compile_program(one))
        except RuntimeError as error:  # too much VMEM, or one that the backend refuses
            print(json.dumps(line | {"error": str(error)[:200]}), flush=True)
            continue
        figures = dataclasses.asdict(score)
        del figures["program"]
        print(json.dumps(line | figures), flush=True)
        yield score


def scored(program: Program, kernels: list[Kernel]) -> Score:
    """The estimate of the head of this file, over the kernels of a pass."""
    info = pltpu.get_tpu_info_for_chip(pltpu.ChipVersion(_VERSIONS[program.chip]), 1)
    flop_per_bundle = 2 * info.num_mxus * info.mxu_column_size**2
    bytes_per_bundle = info.mem_bw_bytes_per_second * flop_per_bundle / info.bf16_ops_per_second
    least = step_bytes(program) / bytes_per_bundle
    full_tiles, partial_tiles, area = ring_tiles(program)
    time = full = partial = 0.0
    for kernel in kernels:
        tiles = sorted(tpu_report.tiles(kernel), key=_bundles)
        each = [kernel.step_bundles + _bundles(tile) for tile in (tiles[0], tiles[-1])]
        full, partial = full + each[0], partial + each[1]
        time += full_tiles * max(each[0], least) + partial_tiles * max(each[1], least)
    products = 5 if program.direction == "backward" else 2
    ideal = area * products * 2 * program.head_dim / flop_per_bundle
    vmem = [kernel.vmem_bytes for kernel in kernels if kernel.vmem_bytes is not None]
    return Score(program, round(time / ideal, 4), int(full), int(partial), max(vmem, default=None))


def _bundles(region: Region) -> int:
    return region.bundles


def step_bytes(program: Program) -> int:
    """Bytes that a grid step moves: of the side that changes from step to step, what is fetched."""
    H, bf16, f32 = program.head_dim, 2, 4
    assert program.block_q and program.block_kv
    if program.direction == "forward":  # k, v
        return program.block_kv * 2 * H * bf16
    # q, do; lse, delta; dq read and written.
    return program.block_q * (2 * H * bf16 + 2 * f32 + 2 * H * f32)


def ring_tiles(program: Program, ring: int = RING) -> tuple[float, float, float]:
    """Tiles of each kind that a device executes in a causal zigzag ring; pairs that count.

    A shard is two chunks of t / 2 tokens. At home each chunk meets itself causally and the later
    one also meets the earlier; in every other hop half of the pairs count, in whole chunks.
    """
    assert program.block_q and program.block_kv
    chunk = program.tokens // 2
    rows, columns = math.ceil(chunk / program.block_q), math.ceil(chunk / program.block_kv)
    full = partial = 0
    for i in range(rows):
        first, last = i * program.block_q, min((i + 1) * program.block_q, chunk) - 1
        for j in range(columns):
            low, high = j * program.block_kv, min((j + 1) * program.block_kv, chunk) - 1
            if low <= last:
                full, partial = full + (high <= first), partial + (high > first)
    whole = rows * columns
    pairs = chunk * (chunk + 1) + chunk**2 + (ring - 1) * 2 * chunk**2
    return 2 * full + whole + (ring - 1) * 2 * whole, 2 * partial, pairs


def best(scores: Sequence[Score]) -> Score:
    """The least slowdown; of those that are alike, the one with the least VMEM."""
    least = min(score.slowdown for score in scores)
    alike = [score for score in scores if score.slowdown <= _ALIKE * least]
    return min(alike, key=lambda score: (score.vmem_bytes or 0, score.slowdown))


def row(score: Score) -> str:
    """A line of the table."""
    p = score.program
    key, blocks = (p.chip, p.direction, p.head_dim), (p.block_q, p.block_kv, p.compute)
    text = json.dumps(key)[1:-1], json.dumps(blocks)[1:-1]
    mib = (score.vmem_bytes or 0) / 2**20
    versions = tpu_report.versions()
    return (
        f"    ({text[0]}): ({text[1]}),  # {score.slowdown:.2f}, {mib:.0f} MiB; "
        f"{versions['libtpu']}, {versions['date']}"
    )


HEAD = '''\
"""Block sizes that won on each TPU; `python -m workbench.tpu_sweep all --write` remakes it.

By (chip, pass, head dim), for bfloat16: (block_q, block_kv, block_compute). Beside each: estimated
time over that of a full matrix unit, VMEM; libtpu, and the day. Estimated from the compiler's
schedule and not timed on a chip: `kernels/workbench/tpu_sweep.py` says what that does not see.
"""

WINNERS: dict[tuple[str, str, int], tuple[int, int, int]] = {
'''


def updated(text: str, winners: Sequence[Score]) -> str:
    """The table with new lines in place of those about the same chip, pass and head dim."""

    def key(line: str) -> str:
        return line.partition(":")[0]

    lines = {key(line): line for line in text.splitlines() if line.startswith("    (")}
    lines |= {key(line): line for line in map(row, winners)}
    return HEAD + "\n".join([*sorted(lines.values()), "}\n"])


if __name__ == "__main__":
    sys.exit(main())
