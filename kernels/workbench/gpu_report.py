"""What the compiler makes of our Hopper tiles, beside jax's attention_mgpu; no GPU needed.

    python -m workbench.gpu_report                  in the environment of `make setup-aot`, with
                                                    ptxas, and nvdisasm (nvidia-cuda-nvdisasm)
    python -m workbench.gpu_report --only backward --head-dims 128 --masks causal

Forward and backward of each implementation are compiled for an H100 by the same compiler in the
same run: one JSON line a kernel, then a table, a line for each innermost loop around products. Of
a loop, as one warp goes through it once:

    tensor    cycles that its products need on the SM's tensor cores, at their published rate
    instr     instructions; a warpgroup has one warp on each of the SM's four schedulers, so as many
              issue slots are taken on each
    instr/t   instr over tensor: above 1, two warpgroups in turn cannot keep the tensor cores busy
    exp2      exponentials; in brackets those that are computed while products are under way
    fma, mul, add, max, conv, sel, shfl, smem, spill, addr, sync   other instructions by kind
    x jax     instructions a score over those of jax's attention at the same pass and head dim:
              kernels and warpgroups that make the same scores anew are added up, and loops with
              a mask are compared with each other

Of a kernel: registers as launched, bytes spilled, shared memory, and two things that must not be:
products that ptxas serializes, and registers touched while a product uses them (hazards).

It is static: it sees no wait, no memory and no clock.
"""

import argparse
import dataclasses
import itertools
import json
import subprocess
import sys
import time
from collections.abc import Sequence

import jax

from workbench import gpu_programs
from workbench.gpu_programs import IMPLEMENTATIONS, JAX, MASKS, PASSES, Kernel, Program
from workbench.gpu_sass import Loop

COLUMNS = ("fma", "mul", "add", "max", "convert", "select", "shuffle", "shared", "spill", "address",
           "sync")  # fmt: skip
HEADER = (
    "pass", "H", "mask", "of", "loop", "tensor", "instr", "instr/t", "exp2", "fma", "mul", "add",
    "max", "conv", "sel", "shfl", "smem", "spill", "addr", "sync", "x jax", "regs", "spilled",
    "KiB",
)  # fmt: skip


def main(argv: Sequence[str] | None = None) -> int:
    args = _arguments(argv)
    lines: list[tuple[str, ...]] = []
    wrong = failures = 0
    known: dict[tuple[str, int], dict[bool, float]] = {}
    for direction, head_dim, mask in itertools.product(args.passes, args.head_dims, args.masks):
        yardstick = known.setdefault((direction, head_dim), {})
        for name in args.of:
            program = Program(
                implementation=name, direction=direction, head_dim=head_dim, mask=mask,
                tokens=args.tokens, heads=args.heads, dtype=args.dtype,
            )  # fmt: skip
            try:
                kernels = gpu_programs.compile_program(program)
            except RuntimeError as error:
                failures += name == gpu_programs.OURS
                print(f"{direction} H={head_dim} {mask}: no {name}: {error}", file=sys.stderr)
                continue
            if name == JAX:
                yardstick.update(per_score(kernels))
            wrong += sum(kernel.serialized or kernel.hazards > 0 for kernel in kernels)
            for kernel in kernels:
                print(json.dumps(_line(program, kernel)), flush=True)
            lines += cells(program, kernels, yardstick)
    print(table(lines))
    if wrong:
        print(f"{wrong} kernels are serialized or touch registers of products under way.")
    return 1 if failures or wrong else 0


def _arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    first, _, rest = (__doc__ or "").partition("\n")
    parser = argparse.ArgumentParser(
        description=first, epilog=rest, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", choices=PASSES)
    parser.add_argument("--head-dims", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--masks", nargs="+", choices=MASKS, default=list(MASKS))
    # jax's first: others are compared with it.
    parser.add_argument("--of", nargs="+", choices=IMPLEMENTATIONS, default=list(IMPLEMENTATIONS))
    parser.add_argument("--tokens", type=int, default=8192)
    parser.add_argument("--heads", type=int, default=8)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    args = parser.parse_args(argv)
    args.passes = [args.only] if args.only else list(PASSES)
    if (reason := gpu_programs.missing()) is not None:
        parser.error(f"{reason}.")
    return args


def per_score(kernels: Sequence[Kernel]) -> dict[bool, float]:
    """Instructions of a thread a score, without and with a mask; loops are added up."""
    found: dict[bool, float] = {}
    for loop in (x for kernel in kernels for x in distinct(kernel.loops)):
        # Beside one for each score there are a few exponentials for each row.
        scores = loop.kinds.get("exp2", 0) // 32 * 32
        found[loop.masked] = found.get(loop.masked, 0.0) + loop.instructions / max(scores, 1)
    return found


def cells(
    program: Program, kernels: Sequence[Kernel], yardstick: dict[bool, float]
) -> list[tuple[str, ...]]:
    """A line for each loop; the compiler's copies of one loop, for each warpgroup, are one."""
    lines = []
    own = per_score(kernels)
    for kernel in kernels:
        for i, loop in enumerate(distinct(kernel.loops)):
            ratio = ""
            if yardstick.get(loop.masked) and program.implementation != JAX:
                ratio = f"{own[loop.masked] / yardstick[loop.masked]:.3f}"
            first = (program.direction, str(program.head_dim), program.mask, program.implementation)
            shared = "-" if kernel.shared_bytes is None else f"{kernel.shared_bytes / 1024:.0f}"
            kernels_own = (str(kernel.registers), str(kernel.spill_bytes), shared)
            lines.append(
                (
                    *(first if i == 0 else ("",) * 4),
                    "partial" if loop.masked else "full",
                    *(str(n) for n in (loop.tensor_cycles, loop.instructions)),
                    f"{loop.instructions / loop.tensor_cycles:.3f}",
                    f"{loop.kinds.get('exp2', 0)} ({loop.exp2_under})",
                    *(str(loop.kinds.get(kind, 0)) for kind in COLUMNS),
                    ratio,
                    *(kernels_own if i == 0 else ("",) * 3),
                )
            )
    return lines


def distinct(loops: Sequence[Loop]) -> list[Loop]:
    """Of loops with the same products and mask the longest."""
    found: dict[tuple, Loop] = {}
    for loop in loops:
        kinds = tuple(loop.kinds.get(kind, 0) for kind in ("exp2", "fma", "convert"))
        key = (loop.products, loop.tensor_cycles, loop.masked, kinds)
        if key not in found or found[key].instructions < loop.instructions:
            found[key] = loop
    return list(found.values())


def _line(program: Program, kernel: Kernel) -> dict:
    spec = dataclasses.asdict(program)
    del spec["config"]
    return spec | dataclasses.asdict(kernel) | versions()


def versions() -> dict[str, str]:
    """What the figures depend on beside the program, and the day."""
    ptxas = gpu_programs.tool("ptxas")
    said = subprocess.run([ptxas, "--version"], capture_output=True, text=True) if ptxas else None
    release = [x for x in (said.stdout if said else "").splitlines() if "release" in x]
    found = {"jax": jax.__version__, "date": time.strftime("%Y-%m-%d")}
    if release:
        found["ptxas"] = release[0].rpartition(" ")[2]
    return found


def table(lines: Sequence[tuple[str, ...]]) -> str:
    """Columns of text; numbers to the right."""
    lines = [HEADER, *lines]
    widths = [max(len(line[i]) for line in lines) for i in range(len(HEADER))]
    left = ("pass", "mask", "of", "loop")
    return "\n".join(
        "  ".join(
            cell.ljust(width) if name in left else cell.rjust(width)
            for name, cell, width in zip(HEADER, line, widths, strict=True)
        ).rstrip()
        for line in lines
    )


if __name__ == "__main__":
    sys.exit(main())
