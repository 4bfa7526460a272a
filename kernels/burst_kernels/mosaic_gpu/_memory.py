"""Global memory of a kernel, on every release of jax: reads without shared memory, and types.

What is read has the type of its array, mesh axes that it varies over included; what is computed in
a kernel has none of these, and a loop's carry must not change its type. Hence + 0 and * 1 below,
which no compiler keeps.
"""

import inspect
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from burst_kernels._operands import apart as apart
from burst_kernels._operands import varying_as as varying_as

# jax 0.10 demands an index beside the reference; jax 0.11 still takes one, and warns of it.
_idx = inspect.signature(plgpu.load).parameters.get("idx")
_INDEX = ((),) if _idx is not None and _idx.default is inspect.Parameter.empty else ()


def scalar(ref: Any, *index: Array | int) -> Array:
    """An integer, the same for all threads."""
    return ref[index] + jnp.int32(0)


def registers(ref: Any, layout: Any) -> Array:
    """An array, each thread its part of `layout`."""
    x = plgpu.load(ref, *_INDEX, layout=layout, optimized=False)
    return x * jnp.ones((), x.dtype)


def together(k: Shaped[Array, "2 B K s H"], rows: int, columns: int) -> Array | None:
    """Stacked k and v as an array [2 B, K, s, H] that a kernel reads, or None if it needs padding.

    Sequence b of v is then row B + b.
    """
    _, B, K, s, H = k.shape
    return None if s % rows or H % columns else k.reshape(2 * B, K, s, H)
