"""The tile in pure JAX: chunked, memory O(block), on any device JAX runs on."""

from burst_kernels.xla._backward import tile_backward as tile_backward
from burst_kernels.xla._blocks import configure as configure
from burst_kernels.xla._blocks import refuses as refuses
from burst_kernels.xla._forward import tile_forward as tile_forward
