"""Block sizes for Hopper: what fits, what is taken, what its kernels refuse.

Two things bound a block. In the forward, shared memory holds the queries of both attending
warpgroups and a ring of `stages` blocks of keys and values; a thread's registers hold its part of
the scores, of the probabilities in 16 bit, and of the output, all of `block_q / 2` rows. In the
backward, shared memory holds a block of keys, a ring of `stages` blocks of queries, ds and dq on
its way out; registers hold dk and dv, the scores and their gradients.
"""

import dataclasses
import functools
import itertools
import re
from collections.abc import Callable, Iterator
from typing import NamedTuple

import jax.numpy as jnp

from burst_kernels._assembler import assembler
from burst_kernels._config import TileConfig
from burst_kernels._problem import Problem
from burst_kernels._problem import problem_of as problem_of
from burst_kernels.mosaic_gpu._winners import WINNERS

# A CTA's shared memory on sm_90 (227 KiB), without what Mosaic takes for reductions and barriers.
_SMEM_BYTES = 227 * 1024 - 4 * 1024
# Of a computing thread's 240 registers, those left for what the head of this file names.
# Empirical: there ptxas spills nothing in the forward, and a few addresses in the backward.
_REGISTERS = 192
ATTENDING = 2  # warpgroups; each takes 64 rows at a time, the height of a wgmma
_BLOCK_Q = 64 * ATTENDING
_GREATEST_HEAD_DIM = 256
# Head dims that the table of winners knows; others take the blocks of the next greater one.
HEAD_DIMS = (64, 128, 192, 256)

# For the assembler's sake jax's own attention for Hopper takes no causal mask from CUDA 12.8.0 to
# before 12.9.1, whose wheel is 12.9.86.
_MISCOMPILES = (12, 8, 0), (12, 9, 86)

_ELSEWHERE = "The `xla` tile computes it: implementation='xla', or None."


class Blocks(NamedTuple):
    """A kernel's sizes: tokens of a block of queries and of keys, slots of the ring."""

    block_q: int
    block_kv: int
    stages: int


def unavailable(chip_name: str) -> str | None:
    """Why a chip cannot run the kernels, in a sentence; None where it can."""
    if chip_name == "sm_90":
        has = assembler()
        if has is None or not _MISCOMPILES[0] <= has.release < _MISCOMPILES[1]:
            return None
        return (
            f"the assembler of CUDA {'.'.join(map(str, has.release))}, which JAX has here, is said "
            f"to miscompile masks: pip install '{has.wheel}>=12.9.86'. {_ELSEWHERE}"
        )
    found = re.fullmatch(r"sm_(\d+)", chip_name)
    if found is None:
        return f"its kernels are for NVIDIA Hopper (sm_90), and {chip_name!r} is none."
    if int(found.group(1)) < 90:
        return (
            f"its kernels need TMA and wgmma, which {chip_name} has not: they came with Hopper "
            f"(sm_90: H100, H200, H20). {_ELSEWHERE}"
        )
    return (
        f"its kernels use wgmma, which Hopper (sm_90) alone has, and {chip_name} is newer; kernels "
        f"for its tensor cores are not written yet. {_ELSEWHERE}"
    )


def refuses(problem: Problem, chip_name: str) -> str | None:
    """Why such tiles cannot be done on that chip, in a sentence; None where they can."""
    if (reason := unavailable(chip_name)) is not None:
        return reason
    dtype = jnp.dtype(problem.dtype)
    if dtype not in (jnp.bfloat16, jnp.float16):
        why = {
            "float32": "Hopper's tensor cores round float32 to 10 bits (TF32)",
            "float64": "Hopper's float64 is no faster in a kernel of its own",
        }.get(dtype.name, f"{dtype.name} has no kernel")
        return f"{why}; it takes bfloat16 and float16. {_ELSEWHERE}"
    if max(problem.H, problem.Hv) > _GREATEST_HEAD_DIM:
        return (
            f"head dims over {_GREATEST_HEAD_DIM} leave no registers for a row of the output, and "
            f"this has H={problem.H}, Hv={problem.Hv}. {_ELSEWHERE}"
        )
    if next(BACKWARD.all(problem), None) is None:
        return (
            f"{problem.kinds} kinds of segment ids leave no shared memory for a block of its "
            f"backward. {_ELSEWHERE}"
        )
    return None


class Pass(NamedTuple):
    """What of block sizes differs between forward and backward.

    Attributes:
        name: of the table of winners.
        fields: of `TileConfig`: block of queries, block of keys, stages.
        blocks: what (block of queries, block of keys) may be.
        stages: what the stages may be, in the order that they are tried in.
        smem_bytes: (problem, blocks) -> shared memory of a CTA.
        registers: (problem, blocks) -> what `_REGISTERS` bounds.
        has: (problem, blocks) -> whether there is such a kernel.
    """

    name: str
    fields: tuple[str, str, str]
    blocks: tuple[tuple[int, int], ...]
    stages: tuple[int, ...]
    smem_bytes: Callable[[Problem, Blocks], int]
    registers: Callable[[Problem, Blocks], int]
    has: Callable[[Problem, Blocks], bool] = lambda problem, blocks: True

    def all(self, problem: Problem) -> Iterator[Blocks]:
        """Sizes that fit: the winners first, then those of more registers first."""
        won = WINNERS["sm_90", self.name, _known(problem)]
        first = Blocks(*(won[field] for field in self.fields))
        rest = [Blocks(*x, n) for x in self.blocks for n in self.stages]
        rest.sort(key=functools.partial(self.registers, problem), reverse=True)
        return (x for x in (first, *rest) if self.fits(problem, x))

    def fits(self, problem: Problem, blocks: Blocks) -> bool:
        """Whether there is such a kernel, with shared memory and registers enough."""
        memory, per_thread = self.smem_bytes(problem, blocks), self.registers(problem, blocks)
        enough = memory <= _SMEM_BYTES and per_thread <= _REGISTERS
        return enough and self.has(problem, blocks)


def configure(problem: Problem, chip_name: str, config: TileConfig) -> TileConfig:
    """`config` with block sizes and stages of both passes filled in.

    Raises:
        ValueError: what is given does not fit, with sizes that would.
    """
    chosen = {
        field: size
        for one in (FORWARD, BACKWARD)
        for field, size in zip(one.fields, _chosen(one, problem, chip_name, config), strict=True)
    }
    return dataclasses.replace(config, **chosen)


def _chosen(one: Pass, problem: Problem, chip_name: str, config: TileConfig) -> Blocks:
    given = [getattr(config, field) for field in one.fields]
    sizes = (*map(sorted, map(set, zip(*one.blocks, strict=True))), sorted(one.stages))
    for field, size, known in zip(one.fields, given, sizes, strict=True):
        if size not in (None, *known):
            raise ValueError(
                f"TileConfig.{field}={size}: on {chip_name} it must be one of "
                f"{', '.join(map(str, known))}."
            )

    def asked(blocks: Blocks) -> bool:
        return all(want in (None, size) for want, size in zip(given, blocks, strict=True))

    fitting = list(dict.fromkeys(one.all(problem)))
    if (found := next(filter(asked, fitting), None)) is not None:
        return found
    what = ", ".join(f"{f}={x}" for f, x in zip(one.fields, given, strict=True) if x is not None)
    why = f"is no size that its kernels have at H={problem.H}, Hv={problem.Hv}"
    sizes_of = (Blocks(*pair, n) for pair in one.blocks for n in one.stages)
    if tried := [x for x in sizes_of if asked(x) and one.has(problem, x)]:
        memory = min(one.smem_bytes(problem, x) for x in tried)
        per_thread = min(one.registers(problem, x) for x in tried)
        why = (
            f"needs at least {memory} bytes of shared memory (there are {_SMEM_BYTES}) and "
            f"{per_thread} registers a thread for scores and sums (there are {_REGISTERS}) at "
            f"H={problem.H}, Hv={problem.Hv}"
        )
    raise ValueError(
        f"TileConfig({what}) {why}. These ({', '.join(one.fields)}) fit: "
        f"{', '.join(str(tuple(x)) for x in sorted(fitting))}."
    )


def blocks_of(config: TileConfig) -> Blocks:
    """The forward's sizes, of a config that `configure` has filled in."""
    return _blocks(FORWARD, config)


def backward_blocks_of(config: TileConfig) -> Blocks:
    """The backward's sizes, of a config that `configure` has filled in."""
    return _blocks(BACKWARD, config)


def _blocks(one: Pass, config: TileConfig) -> Blocks:
    blocks = Blocks(*(getattr(config, field) for field in one.fields))
    assert all(blocks)
    return blocks


def _known(problem: Problem) -> int:
    widest = max(problem.H, problem.Hv)
    return next((H for H in HEAD_DIMS if H >= widest), HEAD_DIMS[-1])


def _columns(head_dim: int) -> int:
    """A head dim as it lies in shared memory: 128 bytes are swizzled together."""
    return -(-head_dim // 64) * 64


def _forward_smem(problem: Problem, blocks: Blocks) -> int:
    H, Hv = _columns(problem.H), _columns(problem.Hv)
    return 2 * (blocks.block_q * H + blocks.stages * blocks.block_kv * (H + Hv))


def _forward_registers(problem: Problem, blocks: Blocks) -> int:
    # A thread has 1 / 128 of each array.
    elements = blocks.block_q // ATTENDING * (3 * blocks.block_kv // 2 + _columns(problem.Hv))
    return elements // 128


def _backward_smem(problem: Problem, blocks: Blocks) -> int:
    H, Hv = _columns(problem.H), _columns(problem.Hv)
    (q, kv, stages), both = blocks, H + Hv
    exchanged = 2 * 64 * 64 + 2 * 64 * 32 * 4  # ds, and two halves of 64 columns of dq
    if kv > 64:
        columns = H if q > 64 else H // 2
        exchanged = 2 * 2 * q * kv + 2 * 64 * columns * 4
    rows = 2 * _placed(4 * stages * q)
    if problem.masked:
        queries, keys = 2 + problem.kinds, 1 + problem.kinds
        rows += _placed(4 * stages * q * queries) + _placed(4 * kv * keys)
    return 2 * (kv + stages * q) * both + exchanged + rows


def _placed(size: int) -> int:
    return -(-size // 1024) * 1024  # what each array begins at a multiple of


def _backward_has(problem: Problem, blocks: Blocks) -> bool:
    # 64 queries of dq are shared by columns, and shared memory is swizzled by 64 of them.
    return blocks[:2] != (64, 128) or problem.H > 64


def _backward_registers(problem: Problem, blocks: Blocks) -> int:
    # dk and dv, scores and their gradients, each of 64 rows: half a register a column.
    H, Hv = _columns(problem.H), _columns(problem.Hv)
    sums = H + Hv if blocks.block_kv > 64 else max(H, Hv)
    return (sums + 2 * blocks.block_q) // 2


FORWARD = Pass(
    "forward",
    ("block_q", "block_kv", "stages"),
    # Values of one block are multiplied while those of the next are waited for: two stages.
    tuple(itertools.product((128, 256), (64, 128, 192, 256))),
    (2, 3, 4, 5, 6),
    _forward_smem,
    _forward_registers,
)
# Of 64 keys a warpgroup makes dk and dv; or, with 64 in all, one makes dk and the other dv.
BACKWARD = Pass(
    "backward",
    ("block_q_backward", "block_kv_backward", "stages_backward"),
    ((64, 64), (64, 128), (128, 128)),
    (2, 1, 3, 4, 5, 6),
    _backward_smem,
    _backward_registers,
    _backward_has,
)
