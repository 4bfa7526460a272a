"""Block sizes on each TPU generation: what fits, what is chosen, what cannot be done at all."""

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array

from burst_kernels._chips import chip_at_hand
from burst_kernels._config import TileConfig
from burst_kernels._problem import Problem
from burst_kernels._tile import Tile

BLOCKS = ("block_q", "block_kv", "block_compute")
LANES = 128
# Steps that fit scalar memory, of 1 MiB, with room for what else lies there: 512 KiB.
MAX_STEPS = 2**17
MIB = 2**20


@dataclasses.dataclass(frozen=True)
class Limits:
    """What a generation gives a kernel.

    Attributes:
        vmem_bytes: vector memory that a kernel may use, of what a core has.
    """

    vmem_bytes: int


# After jax's pltpu.get_tpu_info_for_chip.
LIMITS = {
    "v4": Limits(16 * MIB),
    "v5e": Limits(96 * MIB),
    "v5p": Limits(56 * MIB),
    "v6e": Limits(96 * MIB),
    "tpu7x": Limits(56 * MIB),
}


def chip_name(config: TileConfig) -> str:
    """The chip to compile for. Interpreted with none named, the oldest: what fits it fits all."""
    name = config.chip or chip_at_hand().name
    return name if name in LIMITS else "v4"


def vmem_limit(chip: str) -> int:
    return LIMITS[chip].vmem_bytes


def problem_of(q: Array, k: Array, v: Array, tile: Tile) -> Problem:
    B, N, t, H = q.shape
    _, K, s, _ = k.shape
    kinds = 0 if tile.q_segments is None else tile.q_segments.shape[0]
    return Problem(
        B, t, s, N, K, H, v.shape[3], q.dtype, tile.logits_soft_cap is not None, tile.masked, kinds
    )


def refuses(problem: Problem, chip: str) -> str | None:
    if problem.dtype not in (jnp.bfloat16, jnp.float32):
        return f"{problem.dtype} no"
    return None


def _block(n: int, most: int) -> int:
    def cost(b):
        blocks = -(-n // b)
        straddles = blocks > 1 and n % 2 == 0 and (n // 2) % b
        return (blocks * b + 64 * blocks + (b if straddles else 0), -b)

    return min(range(LANES, most + 1, LANES), key=cost)


def configure(problem: Problem, chip: str, config: TileConfig) -> TileConfig:
    bq = config.block_q or _block(problem.t, 1024)
    bkv = config.block_kv or _block(problem.s, 1024)
    bc = config.block_compute or max(d for d in range(128, 513, 128) if bkv % d == 0)
    return dataclasses.replace(config, block_q=bq, block_kv=bkv, block_compute=bc)
