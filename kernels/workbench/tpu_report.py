"""How our TPU tiles are scheduled, beside JAX's splash attention: read off the compiler, no TPU.

    python -m workbench.tpu_report v5e                     in the environment of `make test-aot`
    python -m workbench.tpu_report all --only forward --mask causal --block-q 512 --block-kv 2048

A target is a chip (v4, v5e, v5p, v6e, tpu7x), a slice of it ("v5e:2x4": a tile knows one device of
it), or `all`. Forward and backward are compiled at equal block sizes by the same compiler in the
same run: one JSON line a kernel, then a table.

    mxu %    matrix-unit slots used, of those between a kernel's first product and its last
    bundles  VLIW bundles in that span, about cycles; of the tile, if the span runs once a step
    trips    how often it runs a tile, if the span is a loop that the compiler left rolled
    step     bundles that every grid step costs beside its tile
    spills, fills   registers stored to VMEM and read back in the span
    VMEM     MiB that the compiler gave the kernel: windows, scratch, spills
    x splash bundles of a tile of ours over those of splash; kernels of one pass are added up
             (not with a mask: the span then holds several kinds of tiles)

It is static: it sees neither waits for memory nor how often a branch is taken. Where a kernel has
code for several kinds of tiles (full, partial), each is a line of the table and one of `regions` in
the JSON line.
"""

import argparse
import dataclasses
import importlib.metadata
import json
import sys
import time
from collections.abc import Sequence

import jax

from workbench import tpu_programs
from workbench.tpu_programs import OURS, PASSES, SLICES, SPLASH, Program
from workbench.tpu_schedule import Kernel, Region

HEADER = (
    "chip", "pass", "kernel", "mxu %", "bundles", "trips", "step", "spills", "fills", "VMEM",
    "x splash",
)  # fmt: skip
# A region with fewer of a kernel's products than this does no tile's work.
_A_TILE = 0.1


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    lines, failures = [], 0
    for chip in args.chips:
        for direction in args.passes:
            program = Program(
                direction=direction, chip=chip, tokens=args.tokens, heads=args.heads,
                kv_heads=args.heads, head_dim=args.head_dim, dtype=args.dtype, mask=args.mask,
                block_q=args.block_q, block_kv=args.block_kv,
            )  # fmt: skip
            found: dict[str, list[Kernel]] = {}
            for name in (SPLASH, OURS):
                try:
                    compute = args.compute if name == OURS else args.splash_compute
                    one = dataclasses.replace(program, implementation=name, compute=compute)
                    found[name] = tpu_programs.compile_program(one)
                except RuntimeError as error:
                    failures += 1
                    print(f"{chip} {direction}: {name} did not compile: {error}", file=sys.stderr)
            rows = rows_of(program, found)
            for row in rows:
                print(json.dumps(row), flush=True)
            lines += [cells for row in rows for cells in table_cells(row)]
    print(table(lines))
    return 1 if failures else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("target", nargs="+", help="v5e, v5e:2x4, ..., or all")
    parser.add_argument("--only", choices=PASSES)
    parser.add_argument("--mask", choices=tpu_programs.MASKS, default="full")
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--head-dim", type=int, default=128)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float32"))
    parser.add_argument("--block-q", type=int, default=1024)
    parser.add_argument("--block-kv", type=int, default=1024)
    parser.add_argument("--compute", type=int, help="keys that ours takes at a time")
    parser.add_argument("--splash-compute", type=int, default=512, help="the same of splash")
    args = parser.parse_args(argv)
    args.chips = chips_of(parser, args.target)
    args.passes = [args.only] if args.only else list(PASSES)
    return args


def chips_of(parser: argparse.ArgumentParser, targets: Sequence[str]) -> list[str]:
    """The chips that targets name; the parser's error where they cannot be compiled for."""
    chips = [target.partition(":")[0] for target in targets]
    chips = list(SLICES) if "all" in chips else ["tpu7x" if c == "v7x" else c for c in chips]
    if unknown := [chip for chip in chips if chip not in SLICES]:
        parser.error(f"{unknown[0]!r} is no TPU of {', '.join(SLICES)}, or all.")
    try:
        importlib.metadata.version("libtpu")
    except importlib.metadata.PackageNotFoundError:
        parser.error(
            "it needs the TPU compiler: run it in the environment that `make setup-aot` makes, or "
            "pip install 'burst-jax[aot]'."
        )
    return chips


def rows_of(program: Program, found: dict[str, list[Kernel]]) -> list[dict]:
    """One dict a kernel, for a JSON line; ours with their ratio to splash."""
    splash = found.get(SPLASH, [])
    rows = []
    for name, kernels in found.items():
        spec = dataclasses.asdict(dataclasses.replace(program, implementation=name))
        trips = _trips(kernels, splash)
        whole, other = (sum(k.bundles for k in ks) for ks in (kernels, splash))
        for kernel in kernels:
            figures = dataclasses.asdict(kernel) | {"kernel": kernel.name.partition(".")[0]}
            figures["trips"] = trips
            # With a mask the span has the code of several kinds of tiles: no one figure for it.
            figures["ratio"] = round(whole * trips / other, 3) if _comparable(found) else None
            rows.append(spec | figures | versions())
    return rows


def tiles(kernel: Kernel) -> list[Region]:
    """The regions that compute tiles: one, or one a kind of tile (full, partial)."""
    return [r for r in kernel.regions if r.matmul_slots > _A_TILE * kernel.matmul_slots]


def _comparable(found: dict[str, list[Kernel]]) -> bool:
    every = [kernel for kernels in found.values() for kernel in kernels]
    return len(found) == 2 and all(len(tiles(kernel)) == 1 for kernel in every)


def _trips(ours: list[Kernel], splash: list[Kernel]) -> int:
    """How often our tiles' code must run to do splash's products, which splash has unrolled."""
    found, wanted = (
        sum(max(r.matmul_slots for r in k.regions) for k in kernels) for kernels in (ours, splash)
    )
    return max(1, round(wanted / found)) if found else 1


def versions() -> dict[str, str]:
    """What the figures depend on beside the program, and the day."""
    return {
        "jax": jax.__version__,
        "libtpu": importlib.metadata.version("libtpu"),
        "date": time.strftime("%Y-%m-%d"),
    }


def table_cells(row: dict) -> list[tuple[str, ...]]:
    """A line for the kernel, and one for each kind of tile where it has several."""
    vmem, ratio = row["vmem_bytes"], row["ratio"]
    cells = [
        (
            row["chip"], row["direction"], row["kernel"], f"{row['mxu_percent']:.1f}",
            str(row["bundles"]), str(row["trips"]), str(row["step_bundles"]),
            str(row["spill_stores"]), str(row["fill_loads"]),
            "-" if vmem is None else f"{vmem / 2**20:.1f}",
            f"{ratio:.3f}" if row["implementation"] == OURS and ratio else "",
        )
    ]  # fmt: skip
    kinds = [r for r in row["regions"] if r["matmul_slots"] > _A_TILE * row["matmul_slots"]]
    for number, r in enumerate(kinds if len(kinds) > 1 else [], start=1):
        spills = (str(r["spill_stores"]), str(r["fill_loads"]))
        cells.append(("", "", f"  tile {number}", "", str(r["bundles"]), "", "", *spills, "", ""))
    return cells


def table(lines: list[tuple[str, ...]]) -> str:
    """Columns of text; numbers to the right."""
    lines = [HEADER, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    return "\n".join(
        "  ".join(
            cell.ljust(width) if i < 3 else cell.rjust(width)
            for i, (cell, width) in enumerate(zip(line, widths, strict=True))
        ).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
