"""What is put on the wire: trees of arrays, apart or joined into one message.

Joined, because on NVIDIA GPUs only one permute in flight is hidden behind a kernel, and because XLA
may combine neighbouring permutes of different dtypes into an invalid one (openxla/xla issue 32845).
A message is joined once, before the ring, and travels as it is.
"""

import dataclasses
import itertools
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, DTypeLike, Shaped

from burst_jax._sharding import AxisName


class Leaf(NamedTuple):
    """Shape and dtype of an array in a message."""

    shape: tuple[int, ...]
    dtype: jnp.dtype


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Message:
    """A tree of arrays as one array.

    Attributes:
        buffer: arrays of one shape and dtype stacked, [number of arrays, ...]: a kernel can read
            its part where it lies; otherwise bit patterns of all of them, one after another.
        leaves: what the arrays are. Static.
        structure: of the tree. Static.
    """

    buffer: Shaped[Array, "..."]
    leaves: tuple[Leaf, ...] = dataclasses.field(metadata={"static": True})
    structure: Any = dataclasses.field(metadata={"static": True})

    @property
    def stacked(self) -> bool:
        """Whether the arrays are stacked as they are, and not as bit patterns."""
        return len(set(self.leaves)) == 1 and self.buffer.ndim == len(self.leaves[0].shape) + 1


def join(tree: Any) -> Message:
    """All arrays of a tree in one message."""
    arrays, structure = jax.tree.flatten(tree)
    leaves = tuple(Leaf(x.shape, x.dtype) for x in arrays)
    if len(set(leaves)) == 1:
        return Message(jnp.stack(arrays), leaves, structure)
    # The widest integer that divides every element: 16 bit for a mix of bfloat16 and float32.
    word = jnp.dtype(f"uint{8 * min(x.dtype.itemsize for x in arrays)}")
    return Message(jnp.concatenate([_as_words(x, word) for x in arrays]), leaves, structure)


def part(message: Message) -> Any:
    """The tree that was joined."""
    buffer, leaves = message.buffer, message.leaves
    if message.stacked:
        return jax.tree.unflatten(message.structure, [buffer[i] for i in range(len(leaves))])
    sizes = [math.prod(x.shape) * x.dtype.itemsize // buffer.dtype.itemsize for x in leaves]
    words = jnp.split(buffer, list(itertools.accumulate(sizes))[:-1])
    arrays = [_from_words(w, x) for w, x in zip(words, leaves, strict=True)]
    return jax.tree.unflatten(message.structure, arrays)


def move(
    message: Any,
    onward: int | None,
    result: Any = None,
    behind: int | None = None,
    *,
    axis_name: AxisName,
    to: Callable[[int], list[tuple[int, int]]],
    joined: bool,
    as_bits: bool,
    dtype: DTypeLike | None,
) -> tuple[Any, Any]:
    """Moves a message on, and after it what its traveller has collected; None is nothing to move.

    Args:
        message: a `Message`, or a tree of arrays.
        onward: how far it moves.
        result: a tree of arrays.
        behind: how far that moves.
        axis_name: of the ring.
        to: sources and destinations of a move by so much.
        joined: whether all that moves alike is one message.
        as_bits: whether 16-bit floats travel as bit patterns.
        dtype: in which the result travels; None: its own.
    """

    def go(tree: Any, shift: int | None) -> Any:
        if tree is None or shift is None:
            return None
        apart = joined and not isinstance(tree, Message)
        tree = join(tree) if apart else tree
        moved = jax.tree.map(lambda x: _send(x, axis_name, to(shift), as_bits), tree)
        return part(moved) if apart else moved

    sent = result if dtype is None else jax.tree.map(lambda x: x.astype(dtype), result)
    if joined and result is not None and onward is not None and onward == behind:
        moved, sent = go((message, sent), onward)
    else:
        moved, sent = go(message, onward), go(sent, behind)
    if sent is not None:
        sent = jax.tree.map(lambda x, like: x.astype(like.dtype), sent, result)
    return moved, sent


def _send(x: Array, axis_name: AxisName, to: list[tuple[int, int]], as_bits: bool) -> Array:
    if not as_bits or x.dtype.itemsize != 2:
        return jax.lax.ppermute(x, axis_name, to)
    bits = jax.lax.bitcast_convert_type(x, jnp.uint16)
    return jax.lax.bitcast_convert_type(jax.lax.ppermute(bits, axis_name, to), x.dtype)


def _as_words(x: Array, word: jnp.dtype) -> Array:
    """x as a flat array of words; a wider element becomes several."""
    return jax.lax.bitcast_convert_type(x, word).reshape(-1)


def _from_words(words: Array, like: Leaf) -> Array:
    """The inverse of `_as_words`."""
    per_element = like.dtype.itemsize // words.dtype.itemsize
    shape = like.shape if per_element == 1 else (*like.shape, per_element)
    return jax.lax.bitcast_convert_type(words.reshape(shape), like.dtype)
