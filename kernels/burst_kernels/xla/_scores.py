"""Scores of one pair of blocks, with scale and soft cap: shared by the forward and the backward."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Float

from burst_kernels._tile import Tile


def matmul(
    a: Float[Array, "h a1 a2"],
    b: Float[Array, "h b1 b2"],
    contract: tuple[int, int],
    dtype: DTypeLike,
) -> Float[Array, "h m n"]:
    """Batched matrix product over the first axis, contracting one axis of each, in `dtype`.

    On CPU 16-bit operands are widened first: XLA decides for each product whether its library takes
    them, and then may turn or merge axes so that at run time it does not. The numbers are the same,
    since a product of two such operands is exact in float32.
    """
    dims = ((contract[:1], contract[1:]), ((0,), (0,)))

    def product(a: Array, b: Array) -> Array:
        return jax.lax.dot_general(a, b, dims, preferred_element_type=dtype)

    if a.dtype == dtype:
        return product(a, b)
    return jax.lax.platform_dependent(
        a, b, cpu=lambda a, b: product(a.astype(dtype), b.astype(dtype)), default=product
    )


def operand_dtype(dtype: DTypeLike) -> jnp.dtype:
    """What probabilities and score gradients are rounded to before they are multiplied.

    bfloat16 has float32's range, so rounding to it is what every flash kernel does. Score
    gradients overflow float16, so there they stay float32.
    """
    return jnp.dtype(jnp.float32) if dtype == jnp.float16 else jnp.dtype(dtype)


def factor(tile: Tile) -> float:
    """What `capped` scores are still to be multiplied by: the scale, or 1 where a cap used it."""
    return tile.scale if tile.logits_soft_cap is None else 1.0


def capped(raw: Float[Array, "..."], tile: Tile) -> Float[Array, "..."]:
    """Scores from q k^T, in units of 1 / `factor`.

    The scale waits until a maximum has been taken off. Applied before, it would be fused with the
    difference into one rounding, and where scores are so large that one ulp is hundreds, the
    greatest of a row would no longer differ from the maximum by zero.
    """
    if tile.logits_soft_cap is None:
        return raw
    return tile.logits_soft_cap * jnp.tanh(raw * tile.scale / tile.logits_soft_cap)


def cap_slope(scores: Float[Array, "..."], tile: Tile) -> Float[Array, "..."] | None:
    """d capped / d scores, from the capped scores; None where there is no cap."""
    if tile.logits_soft_cap is None:
        return None
    return 1.0 - (scores / tile.logits_soft_cap) ** 2


def probability(
    scores: Float[Array, "h m n"], bound: Float[Array, "h _m _n"], tile: Tile
) -> Float[Array, "h m n"]:
    """exp(factor (scores - bound)), where bound is a row's maximum or lse in the same units.

    It is at most 1; that is said, and not left to the rounding of an lse.
    """
    return jnp.exp(jnp.minimum(scores - bound, 0.0) * factor(tile))
