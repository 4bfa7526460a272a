"""Attention tiles for TPU: Pallas kernels for the Mosaic compiler."""

from burst_kernels.mosaic_tpu._config import configure as configure
from burst_kernels.mosaic_tpu._config import refuses as refuses
from burst_kernels.mosaic_tpu._backward import tile_backward as tile_backward
from burst_kernels.mosaic_tpu._forward import tile_forward as tile_forward
