"""Block sizes for Hopper: what fits, what is taken, what its kernels refuse.

Two things bound a block. Shared memory holds the queries of both attending warpgroups and a ring of
`stages` blocks of keys and values. A thread's registers hold its part of the scores, of the
probabilities in 16 bit, and of the output, all of `block_q / 2` rows.
"""

import dataclasses
import re
from typing import NamedTuple

import jax.numpy as jnp

from burst_kernels._config import TileConfig
from burst_kernels._problem import Problem
from burst_kernels._problem import problem_of as problem_of

# A CTA's shared memory on sm_90 (227 KiB), without what Mosaic takes for reductions and barriers.
_SMEM_BYTES = 227 * 1024 - 4 * 1024
# Of an attending thread's 240 registers, those left for scores, probabilities and output.
# Empirical: ptxas spills nothing at 192 (H = 64, 192 and 256 among others).
_REGISTERS = 192
ATTENDING = 2  # warpgroups; each takes 64 rows at a time, the height of a wgmma
_BLOCK_Q = 64 * ATTENDING
_GREATEST_HEAD_DIM = 256

# Blocks of keys and stages, the first that fits: FlashAttention-3's for sm_90 in multiples of 64,
# with a stage more where heads are small. Not measured by us: there was no GPU at hand.
_PREFERRED = ((128, 3), (128, 2), (64, 2))
_SMALL_HEAD_DIM = 64

_ELSEWHERE = "The `xla` tile computes it: implementation='xla', or None."


class Blocks(NamedTuple):
    """A forward kernel's sizes: tokens of a block of queries and of keys, slots of the ring."""

    block_q: int
    block_kv: int
    stages: int


def unavailable(chip_name: str) -> str | None:
    """Why a chip cannot run the kernels, in a sentence; None where it can."""
    if chip_name == "sm_90":
        return None
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
    return None


def configure(problem: Problem, chip_name: str, config: TileConfig) -> TileConfig:
    """`config` with block sizes and stages of the forward filled in.

    Raises:
        ValueError: what is given does not fit, with sizes that would.
    """
    block_q = config.block_q or _BLOCK_Q
    block_kv, stages = _preferred(problem)
    block_kv, stages = config.block_kv or block_kv, config.stages or stages
    if block_q % _BLOCK_Q:
        raise ValueError(
            f"TileConfig.block_q={block_q}: on {chip_name} it must be a multiple of {_BLOCK_Q}, "
            f"64 rows for each of {ATTENDING} warpgroups."
        )
    if block_kv % 64 or block_kv > 256:
        raise ValueError(
            f"TileConfig.block_kv={block_kv}: on {chip_name} it must be 64, 128, 192 or 256."
        )
    blocks = Blocks(block_q, block_kv, stages)
    if not _fits(problem, blocks):
        raise ValueError(
            f"TileConfig(block_q={block_q}, block_kv={block_kv}, stages={stages}) needs "
            f"{smem_bytes(problem, blocks)} bytes of shared memory (there are {_SMEM_BYTES}) and "
            f"{registers(problem, blocks)} registers a thread for scores and output (there are "
            f"{_REGISTERS}) at H={problem.H}, Hv={problem.Hv}. These fit: {_that_fit(problem)}."
        )
    return dataclasses.replace(config, block_q=block_q, block_kv=block_kv, stages=stages)


def blocks_of(config: TileConfig) -> Blocks:
    """The forward's sizes, of a config that `configure` has filled in."""
    assert config.block_q and config.block_kv and config.stages
    return Blocks(config.block_q, config.block_kv, config.stages)


def smem_bytes(problem: Problem, blocks: Blocks) -> int:
    """Shared memory of a forward CTA: queries, and the ring of keys and values."""
    H, Hv = _columns(problem.H), _columns(problem.Hv)
    return 2 * (blocks.block_q * H + blocks.stages * blocks.block_kv * (H + Hv))


def registers(problem: Problem, blocks: Blocks) -> int:
    """Registers of an attending thread for scores, probabilities and output."""
    # A thread has 1 / 128 of each array.
    elements = blocks.block_q // ATTENDING * (3 * blocks.block_kv // 2 + _columns(problem.Hv))
    return elements // 128


def _columns(head_dim: int) -> int:
    """A head dim as it lies in shared memory: 128 bytes are swizzled together."""
    return -(-head_dim // 64) * 64


def _fits(problem: Problem, blocks: Blocks) -> bool:
    memory, per_thread = smem_bytes(problem, blocks), registers(problem, blocks)
    return memory <= _SMEM_BYTES and per_thread <= _REGISTERS


def _preferred(problem: Problem) -> tuple[int, int]:
    small = max(problem.H, problem.Hv) <= _SMALL_HEAD_DIM
    tried = _PREFERRED if small else _PREFERRED[1:]
    return next(x for x in tried if _fits(problem, Blocks(_BLOCK_Q, *x)))


def _that_fit(problem: Problem) -> str:
    tried = (Blocks(q, kv, n) for q in (128, 256) for kv in (64, 128, 192, 256) for n in (2, 3, 4))
    return ", ".join(f"({b.block_q}, {b.block_kv}, {b.stages})" for b in tried if _fits(problem, b))
