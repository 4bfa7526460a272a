"""Block sizes for each TPU, by the compiler's schedule: remakes the table of winners. No TPU.

    python -m workbench.tpu_sweep all --write        in the environment of `make setup-aot`

Each candidate (blocks, and the pieces they are computed in) is compiled for the chip with a causal
mask, so that the schedule of full tiles and of partial ones is known. Its score is the estimated
time of a device's part of a causal zigzag ring over 8 devices, the home hop and 7 others, over that
of a full matrix unit and no wasted work:

    tiles that are executed x (bundles of their kind + what a grid step costs)
    or, a step, the bytes that come and go at the speed of HBM, where that is more

What it does not see: waits for memory inside a step, the first and last step of a grid, what begins
and ends a block of queries or keys (counted as free, which favours small blocks a little), how two
cores share the work, code that is too long for instruction memory, and every stall that is no
bundle. A bundle is not quite a cycle either: some figures are below 1. So candidates within 10 % of
the best count as alike, and of those the one with the least VMEM wins: small blocks also compile
faster, and waste less where a window or documents mask finely.
"""

import argparse
import dataclasses
import itertools
import json
import math
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path

from jax.experimental.pallas import tpu as pltpu

from workbench import tpu_programs, tpu_report
from workbench.tpu_programs import PASSES, Program
from workbench.tpu_schedule import Kernel, Region

TABLE = Path(__file__).resolve().parents[1] / "burst_kernels" / "mosaic_tpu" / "_winners.py"
# (block_q, block_kv).
BLOCKS = ((1024, 1024), (1024, 2048), (2048, 2048))
# Queries and keys that a pass computes at once, None: our choice; with --pieces, those that were
# each the best of many for some chip, at 1024 x 1024. Our backward takes all queries of a block.
OUR_CHOICE = ((None, None),)
PIECES = {
    "forward": ((256, 1024), (512, 1024), (1024, 256)),
    "backward": ((None, 512), (None, 1024)),
}
RING = 8
_VERSIONS = {"v4": "v4", "v5e": "v5e", "v5p": "v5p", "v6e": "v6e", "tpu7x": "7x"}
_ALIKE = 1.1


@dataclasses.dataclass(frozen=True)
class Score:
    """How a candidate does.

    Attributes:
        program: with its block sizes.
        relative: estimated time over that of a full matrix unit and no wasted work.
        full, partial: bundles of a tile of each kind, a grid step's own included.
        vmem_bytes: None where the compiler did not say.
    """

    program: Program
    relative: float
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
    parser.add_argument("--pieces", action="store_true", help="also other pieces than our choice")
    parser.add_argument("--tokens", type=int, default=16384, help="of one device")
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument(
        "--write", action="store_true", help=f"rewrite {TABLE.name}, at head dim 128"
    )
    args = parser.parse_args(argv)
    chips = tpu_report.chips_of(parser, args.target)
    winners = []
    for chip, direction in itertools.product(chips, [args.only] if args.only else PASSES):
        program = Program(
            chip=chip, direction=direction, mask="causal", tokens=args.tokens,
            head_dim=args.head_dim,
        )  # fmt: skip
        if scores := list(_scored(program, PIECES[direction] if args.pieces else OUR_CHOICE)):
            winners.append(best(scores))
    for winner in winners:
        print(row(winner))
    if args.write and args.head_dim == 128:
        TABLE.write_text(updated(TABLE.read_text() if TABLE.exists() else "", winners))
        print(f"written: {TABLE}")
    return 0 if winners else 1


def _scored(program: Program, pieces: Iterable[tuple[int | None, int | None]]) -> Iterable[Score]:
    """Every candidate that compiles; a JSON line for each, with the reason where it does not."""
    for blocks, piece in itertools.product(BLOCKS, pieces):
        sizes = zip(("block_q", "block_kv", "compute_q", "compute"), blocks + piece, strict=True)
        one = dataclasses.replace(program, **dict(sizes))
        line = {"chip": one.chip, "pass": one.direction, "head_dim": one.head_dim} | fields(one)
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
    """The least relative; of those that are alike, the one with the least VMEM."""
    least = min(score.relative for score in scores)
    alike = [score for score in scores if score.relative <= _ALIKE * least]
    return min(alike, key=lambda score: (score.vmem_bytes or 0, score.relative))


def fields(program: Program) -> dict[str, int]:
    """The block sizes of a program by their names in `TileConfig`."""
    forward = program.direction == "forward"
    sizes = {
        "block_q": program.block_q,
        "block_kv": program.block_kv,
        "block_compute_q": program.compute_q,
        "block_compute": program.compute,
    }
    found = {name: size for name, size in sizes.items() if size is not None}
    return found if forward else {f"{name}_backward": size for name, size in found.items()}


def row(score: Score) -> str:
    """The lines of the table about a chip's pass."""
    p, versions = score.program, tpu_report.versions()
    sizes = ", ".join(f"{name}={size}" for name, size in fields(p).items())
    mib = (score.vmem_bytes or 0) / 2**20
    return (
        f"    # {score.relative:.3f}, {mib:.0f} MiB; {versions['libtpu']}, {versions['date']}\n"
        f'    ("{p.chip}", "{p.direction}"): dict(\n        {sizes}\n    ),\n'
    )


HEAD = '''\
"""Block sizes that won on each TPU; `python -m workbench.tpu_sweep all --write` remakes it.

By chip and pass, fields of `TileConfig`; swept at head dim 128, bfloat16. Above each: estimated
time over that of a full matrix unit and no wasted work, VMEM; libtpu, and the day. Estimated from
the compiler's schedule, not timed on a chip: `kernels/workbench/tpu_sweep.py` says what it misses.
"""

# fmt: off
WINNERS: dict[tuple[str, str], dict[str, int]] = {
'''


def updated(text: str, winners: Sequence[Score]) -> str:
    """The table with new rows in place of those about the same chip and pass."""
    found = re.findall(r'(    #.*\n    (\(".*"\)): .*\n.*\n.*\n)', text)
    rows = {key: lines for lines, key in found}
    for winner in winners:
        p = winner.program
        rows[f'("{p.chip}", "{p.direction}")'] = row(winner)
    return HEAD + "".join(rows[key] for key in sorted(rows)) + "}\n"


if __name__ == "__main__":
    sys.exit(main())
