"""What kernels read from global memory without shared memory in between, on every release of jax.

What is read has the type of its array, mesh axes that it varies over included; what is computed in
a kernel has none of these, and a loop's carry must not change its type. Hence + 0 and * 1 below,
which no compiler keeps.
"""

import inspect
from typing import Any

import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jaxtyping import Array

# jax 0.10 takes an index beside the reference.
_INDEX = ((),) if "idx" in inspect.signature(plgpu.load).parameters else ()


def scalar(ref: Any, *index: Array | int) -> Array:
    """An integer, the same for all threads."""
    return ref[index] + jnp.int32(0)


def registers(ref: Any, layout: Any) -> Array:
    """An array, each thread its part of `layout`."""
    x = plgpu.load(ref, *_INDEX, layout=layout, optimized=False)
    return x * jnp.ones((), x.dtype)
