"""Blocks of the backward, and whether one fused kernel makes dq, dk and dv or two kernels do."""

import dataclasses

from burst_kernels._config import TileConfig
from burst_kernels._problem import Problem
from burst_kernels.mosaic_tpu._config import _block


def configure_backward(problem: Problem, chip: str, config: TileConfig) -> TileConfig:
    """The config with the fields of the backward filled in."""
    block_q = config.block_q_backward or config.block_q or _block(problem.t, 1024)
    block_kv = config.block_kv_backward or config.block_kv or _block(problem.s, 1024)
    compute = config.block_compute_backward or config.block_compute or 512
    return dataclasses.replace(
        config,
        block_q_backward=block_q,
        block_kv_backward=block_kv,
        block_compute_backward=min(compute, block_kv),
        fused_backward=True if config.fused_backward is None else config.fused_backward,
    )
