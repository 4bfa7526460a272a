"""Operands and results of GPU kernels, as arrays of JAX."""

import jax
from jaxtyping import Array, Shaped


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
