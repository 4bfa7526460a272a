"""Operands and results of GPU kernels, as arrays of JAX."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Shaped

# Score gradients of float16 are scaled to stay below 2 to this power; its greatest is 2**16 - 32.
_FLOAT16_POWER = 15


def varying_as(x: Array, like: Array) -> Array:
    """x, of a type that varies over the mesh axes that the type of `like` varies over.

    What a kernel gives does not on some releases of jax, whatever type its results were declared
    with; and then gradients through a `shard_map` would be summed over devices.
    """
    axes = jax.typeof(like).manual_axis_type.varying - jax.typeof(x).manual_axis_type.varying
    return jax.lax.pcast(x, tuple(sorted(axes)), to="varying") if axes else x


def apart(
    k: Shaped[Array, "B K s H"] | Shaped[Array, "2 B K s H"], v: Shaped[Array, "B K s Hv"] | None
) -> tuple[Array, Array]:
    """k and v; slices, where they come stacked."""
    return (k[0], k[1]) if v is None else (k, v)


def powers_of_two(
    do: Float[Array, "B N t Hv"],
    v: Float[Array, "B K s Hv"],
    lse: Float[Array, "B N t"],
    delta: Float[Array, "B N t"],
) -> Float[Array, "2"]:
    """A power of two that brings score gradients into float16's range, and its inverse.

    |ds| <= |do v| + |delta| <= max |do| max |v| + max |delta|: rows of Euclidean length. So neither
    large gradients overflow nor those of a mean over many tokens vanish.
    """

    def longest(x: Array) -> Array:
        return jnp.sqrt(jnp.square(x.astype(jnp.float32)).sum(-1)).max()

    bound = longest(do) * longest(v) + jnp.where(jnp.isneginf(lse), 0.0, jnp.abs(delta)).max()
    bound = jnp.where((bound > 0.0) & jnp.isfinite(bound), bound, 1.0)
    power = jnp.clip(_FLOAT16_POWER - jnp.ceil(jnp.log2(bound)), -100.0, 100.0)
    return jnp.exp2(jnp.stack((power, -power)))
