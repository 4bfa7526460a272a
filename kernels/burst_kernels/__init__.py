"""Attention tiles for one device: no mesh, no axis name, no Flax. Semi-public, see README.md."""

from burst_kernels._config import TileConfig as TileConfig
from burst_kernels._dispatch import BACKENDS as BACKENDS
from burst_kernels._dispatch import select as select
from burst_kernels._dispatch import unavailable_reasons as unavailable_reasons
from burst_kernels._tile import EMPTY as EMPTY
from burst_kernels._tile import FULL as FULL
from burst_kernels._tile import PARTIAL as PARTIAL
from burst_kernels._tile import Tile as Tile
from burst_kernels._tile import accumulator_dtype as accumulator_dtype
from burst_kernels._tile import classify as classify
from burst_kernels._tile import summarize as summarize
