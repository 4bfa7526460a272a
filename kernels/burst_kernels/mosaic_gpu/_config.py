"""Block sizes for Hopper, and what its kernels refuse."""

from typing import NamedTuple

import jax.numpy as jnp
from jaxtyping import DTypeLike

from burst_kernels._config import TileConfig


class Blocks(NamedTuple):
    block_q: int
    block_kv: int
    stages: int


def forward_blocks(H: int, Hv: int, dtype: DTypeLike, config: TileConfig) -> Blocks:
    return Blocks(config.block_q or 128, config.block_kv or (64 if max(H, Hv) > 128 else 128), 2)
