"""Blocks of the forward on each TPU generation: what fits, what is chosen, what cannot be done."""

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import Array

from burst_kernels._chips import chip_at_hand
from burst_kernels._config import TileConfig
from burst_kernels._problem import Problem
from burst_kernels._tile import Tile

LANES = 128
MIB = 2**20
# Steps of a grid that are listed in scalar memory, of 1 MiB: half of it is left to other things.
MAX_STEPS = 2**17
# Beyond it nobody has compiled the kernels.
MAX_HEAD_DIM = 512
_BLOCK = 1024


class Pieces(NamedTuple):
    """What of a pair of blocks is computed at once.

    Attributes:
        q, kv: tokens.
        ahead: whether the scores of a piece are computed before the softmax of the one before it.
    """

    q: int
    kv: int
    ahead: bool


class Generation(NamedTuple):
    """What kernels must know of a TPU generation.

    Attributes:
        vmem_bytes: vector memory that a kernel may use.
        pieces: those whose schedule was the shortest.
    """

    vmem_bytes: int
    pieces: Pieces


# Vector memory after `pltpu.get_tpu_info_for_chip`, less an eighth for the compiler's own use.
# Pieces: the compiler's bundles for a 1024 x 1024 pair, H = 128, bfloat16, no mask (libtpu 0.0.42).
# v5e and v5p have four matrix units of 128 x 128, which short rows of pieces feed evenly; v6e
# and tpu7x have two of 256 x 256, and there the softmax of a piece is long enough to hide the next
# one's scores behind it.
GENERATIONS = {
    "v4": Generation(14 * MIB, Pieces(1024, 256, ahead=False)),
    "v5e": Generation(112 * MIB, Pieces(256, 1024, ahead=False)),
    "v5p": Generation(56 * MIB, Pieces(256, 1024, ahead=False)),
    "v6e": Generation(112 * MIB, Pieces(512, 1024, ahead=True)),
    "tpu7x": Generation(56 * MIB, Pieces(512, 1024, ahead=True)),
}


def chip_name(config: TileConfig) -> str:
    """The generation to compile for; where it is none (interpreted on a CPU), the oldest."""
    name = config.chip or chip_at_hand().name
    return name if name in GENERATIONS else "v4"


def vmem_limit(chip: str) -> int:
    """Bytes of vector memory that a kernel may use."""
    return GENERATIONS[chip].vmem_bytes


def problem_of(q: Array, k: Array, v: Array, tile: Tile) -> Problem:
    """The sizes of a call."""
    (B, N, t, H), (_, K, s, _) = q.shape, k.shape
    return Problem(
        B=B, t=t, s=s, N=N, K=K, H=H, Hv=v.shape[3], dtype=q.dtype,
        soft_cap=tile.logits_soft_cap is not None,
        masked=tile.masked,
        kinds=0 if tile.q_segments is None else tile.q_segments.shape[0],
    )  # fmt: skip
def refuses(problem: Problem, chip: str) -> str | None:
    if problem.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{problem.dtype} no"
    return None
def _block(n: int, most: int) -> int:
    """A block of at most `most` tokens: little padding, few blocks, one cut in the middle.

    A zigzag shard is two chunks that lie far apart: a block across their boundary would be PARTIAL
    where its halves are EMPTY and FULL.
    """

    def cost(block: int) -> tuple[int, int]:
        blocks = -(-n // block)
        straddles = blocks > 1 and n % 2 == 0 and (n // 2) % block
        # What a step costs besides its tokens is about that of half a vector of lanes more.
        return blocks * block + blocks * LANES // 2 + (block if straddles else 0), -block

    return min(range(LANES, most + 1, LANES), key=cost)


def configure_forward(problem: Problem, chip: str, config: TileConfig) -> TileConfig:
    bq = config.block_q or _block(problem.t, 1024)
    bkv = config.block_kv or _block(problem.s, 1024)
    p=GENERATIONS[chip].pieces
    return dataclasses.replace(config, block_q=bq, block_kv=bkv, block_compute=min(config.block_compute or p.kv, bkv),
       block_compute_q=min(config.block_compute_q or p.q,bq))
configure = configure_forward
