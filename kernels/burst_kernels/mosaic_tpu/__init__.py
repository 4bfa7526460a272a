"""Attention tiles for TPU: Pallas kernels for the Mosaic compiler."""

import dataclasses

from burst_kernels._config import TileConfig
from burst_kernels._problem import Problem
from burst_kernels.mosaic_tpu._backward import tile_backward as tile_backward
from burst_kernels.mosaic_tpu._config import configure_forward
from burst_kernels.mosaic_tpu._config import refuses as refuses_operands
from burst_kernels.mosaic_tpu._config_backward import configure_backward
from burst_kernels.mosaic_tpu._forward import tile_forward as tile_forward

_FORWARD = ("block_q", "block_kv", "block_compute", "block_compute_q")


def refuses(problem: Problem, chip: str) -> str | None:
    """Why these kernels cannot compute such tiles on that chip, in a sentence; None: they can."""
    if (reason := refuses_operands(problem, chip)) is not None:
        return reason
    try:  # Blocks of either pass that nobody gave may fit nowhere, or be too many.
        configure(problem, chip, TileConfig())
    except ValueError as error:
        return str(error)
    return None


def configure(problem: Problem, chip: str, config: TileConfig) -> TileConfig:
    """The config with every field filled in that these kernels ask for.

    Raises:
        ValueError: sizes that are given do not fit, with some that would.
    """
    # The backward follows what the caller gave to the forward, not what was chosen there.
    configured = configure_forward(problem, chip, config)
    backward = configure_backward(problem, chip, config)
    return dataclasses.replace(
        backward,
        **{name: getattr(configured, name) for name in _FORWARD},
    )
