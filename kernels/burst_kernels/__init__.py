"""Attention tiles for one device: no mesh, no axis name, no Flax. Semi-public, see README.md."""

from burst_kernels._chips import CHIPS as CHIPS
from burst_kernels._chips import Chip as Chip
from burst_kernels._chips import chip_at_hand as chip_at_hand
from burst_kernels._chips import chip_named as chip_named
from burst_kernels._chips import chip_of as chip_of
from burst_kernels._config import TileConfig as TileConfig
from burst_kernels._dispatch import BACKENDS as BACKENDS
from burst_kernels._dispatch import Backend as Backend
from burst_kernels._dispatch import Chosen as Chosen
from burst_kernels._dispatch import select as select
from burst_kernels._dispatch import unavailable_reasons as unavailable_reasons
from burst_kernels._problem import Problem as Problem
from burst_kernels._tile import EMPTY as EMPTY
from burst_kernels._tile import FULL as FULL
from burst_kernels._tile import PARTIAL as PARTIAL
from burst_kernels._tile import Tile as Tile
from burst_kernels._tile import accumulator_dtype as accumulator_dtype
from burst_kernels._tile import classify as classify
from burst_kernels._tile import summarize as summarize
