"""Rotary position embedding (arXiv 2104.09864) of tokens that lie in any order, by position.

Two differences from the usual code, in accuracy only: everything is computed in the accumulators'
dtype (float32 at least) whatever the dtype of the heads; and the angle is put together from a
coarse and a fine part, because `position * frequency` in float32 is wrong by 0.03 rad at a million
tokens, and so differs from what the same model computed at a shorter distance from the start.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, DTypeLike, Float, Int

# Positions that the fine part of an angle counts. Up to two million tokens both parts then stay
# below 2**13 rad, where float32 has steps of less than 1e-3.
FINE = 2**11


def rotation(
    positions: Int[Array, "b T"], head_dim: int, theta: float, dtype: DTypeLike
) -> tuple[Float[Array, "b T 1 h"], Float[Array, "b T 1 h"]]:
    """Cosine and sine of every token's angles; h = H / 2 pairs of components are rotated.

    Args:
        positions: int32, any order; that of padding only has to exist.
        head_dim: H, even.
        theta: pair i turns by theta^(-2i/H) rad from one position to the next.
        dtype: what the angles are computed in.
    """
    # On the host and in float64: a frequency's rounding error would be multiplied by the position.
    frequency = theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
    coarse = np.remainder(FINE * frequency, 2 * math.pi)

    def angle(count: Int[Array, "b T"], step: np.ndarray) -> Float[Array, "b T 1 h"]:
        return count.astype(dtype)[:, :, None, None] * jnp.asarray(step, dtype)[None, None, None]

    total = angle(positions // FINE, coarse) + angle(positions % FINE, frequency)
    return jnp.cos(total), jnp.sin(total)


def rotate(
    x: Float[Array, "B T N H"], turn: tuple[Float[Array, "b T 1 h"], Float[Array, "b T 1 h"]]
) -> Float[Array, "B T N H"]:
    """x with component i and component i + H/2 of every head rotated against each other."""
    cos, sin = turn
    first, second = jnp.split(x.astype(cos.dtype), 2, axis=-1)
    return jnp.concatenate((first * cos - second * sin, second * cos + first * sin), axis=-1)
