"""Exact attention over sequences that no single device can hold: BurstAttention for JAX."""

from importlib.metadata import PackageNotFoundError, version

from burst_jax import inspect as inspect
from burst_jax import reference as reference
from burst_jax._attention import burst_attention as burst_attention
from burst_jax._attention import burst_attention_shard as burst_attention_shard
from burst_jax._masks import Mask as Mask
from burst_jax._partial import Partial as Partial
from burst_jax._partial import merge as merge
from burst_jax._plan import Plan as Plan
from burst_jax._planner import make_plan as make_plan
from burst_jax._sharding import SequenceSharding as SequenceSharding

__all__ = (
    "Mask",
    "Partial",
    "Plan",
    "SequenceSharding",
    "burst_attention",
    "burst_attention_shard",
    "inspect",
    "make_plan",
    "merge",
    "reference",
)

try:
    __version__ = version("burst-jax")
except PackageNotFoundError:  # a source tree that was never installed
    __version__ = "0+unknown"
