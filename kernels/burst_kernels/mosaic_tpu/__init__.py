"""Attention tiles for TPU: Pallas kernels for the Mosaic compiler."""

from burst_kernels._config import TileConfig
from burst_kernels._problem import Problem
from burst_kernels.mosaic_tpu._backward import tile_backward as tile_backward
from burst_kernels.mosaic_tpu._config import configure_forward
from burst_kernels.mosaic_tpu._config import refuses as refuses
from burst_kernels.mosaic_tpu._config_backward import configure_backward
from burst_kernels.mosaic_tpu._forward import tile_forward as tile_forward


def configure(problem: Problem, chip: str, config: TileConfig) -> TileConfig:
    """The config with every field filled in that these kernels ask for.

    Raises:
        ValueError: sizes that are given do not fit, with some that would.
    """
    # The backward first: it follows what the caller gave to the forward, not what was chosen there.
    return configure_forward(problem, chip, configure_backward(problem, chip, config))
