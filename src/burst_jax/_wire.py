"""What is put on the wire: a tree of arrays, apart or packed into one message."""

from typing import TypeVar

import jax
import jax.numpy as jnp
from jaxtyping import Array

from burst_jax._sharding import AxisName

Tree = TypeVar("Tree")


def send(tree: Tree, axis_name: AxisName, to: list[tuple[int, int]], *, packed: bool) -> Tree:
    """Moves every array of the tree from each source to its destination.

    Packed, arrays of different dtypes are bitcast to one integer type and concatenated: on NVIDIA
    GPUs only one permute in flight is hidden behind a kernel, and XLA may combine neighbouring
    permutes of different dtypes into an invalid one (openxla/xla issue 32845).
    """
    leaves, structure = jax.tree.flatten(tree)
    if not packed or len(leaves) < 2:
        return jax.tree.map(lambda x: _send_one(x, axis_name, to), tree)
    # The widest integer that divides every leaf's element: 16 bit for a mix of bf16 and float32.
    word = jnp.dtype(f"uint{8 * min(x.dtype.itemsize for x in leaves)}")
    words = [_as_words(x, word) for x in leaves]
    message = jax.lax.ppermute(jnp.concatenate(words), axis_name, to)
    ends = [sum(w.size for w in words[: i + 1]) for i in range(len(words) - 1)]
    arrived = [_from_words(w, x) for w, x in zip(jnp.split(message, ends), leaves, strict=True)]
    return jax.tree.unflatten(structure, arrived)


def _send_one(x: Array, axis_name: AxisName, to: list[tuple[int, int]]) -> Array:
    """One array; 16-bit floats as bit patterns, or XLA on CPU sends them as float32."""
    if x.dtype.itemsize != 2:
        return jax.lax.ppermute(x, axis_name, to)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16)
    return jax.lax.bitcast_convert_type(jax.lax.ppermute(bits, axis_name, to), x.dtype)


def _as_words(x: Array, word: jnp.dtype) -> Array:
    """x as a flat array of words; a wider element becomes several."""
    return jax.lax.bitcast_convert_type(x, word).reshape(-1)


def _from_words(words: Array, like: Array) -> Array:
    """The inverse of `_as_words`."""
    per_element = like.dtype.itemsize // words.dtype.itemsize
    shape = like.shape if per_element == 1 else (*like.shape, per_element)
    return jax.lax.bitcast_convert_type(words.reshape(shape), like.dtype)
