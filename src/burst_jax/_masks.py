"""`Mask`: which keys a query may see, as a few numbers and O(T) ids, never as a T x S array."""

import dataclasses
import numbers

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
    """Which pairs (query, key) count. Build with the static methods, combine with `&`.

    Attributes:
        left: keys more than `left` positions before the query are masked; None: no limit.
        right: keys more than `right` positions after the query are masked; 0 is causal.
        segment_ids: pairs (query ids, key ids); a pair of tokens counts where all of them agree.
    """

    left: int | None = dataclasses.field(default=None, metadata={"static": True})
    right: int | None = dataclasses.field(default=None, metadata={"static": True})
    segment_ids: tuple[tuple[Int[Array, "..."], Int[Array, "..."]], ...] = ()

    @staticmethod
    def full() -> "Mask":
        """Every query sees every key."""
        return Mask()

    @staticmethod
    def causal() -> "Mask":
        """A query sees the keys at its own position and before.

        Positions count from the start of each sequence, so with S != T the corner is the top left.
        For any other alignment give `positions` to the attention.
        """
        return Mask(right=0)

    @staticmethod
    def sliding_window(left: int, right: int = 0) -> "Mask":
        """A query at position i sees the keys at positions i - left to i + right, both included.

        Raises:
            ValueError: a bound is negative or not an integer.
        """
        for name, value in (("left", left), ("right", right)):
            integer = isinstance(value, numbers.Integral) and not isinstance(value, bool)
            if not integer or value < 0:
                raise ValueError(
                    f"Mask.sliding_window({name}={value!r}): a bound is a number of positions, an "
                    "integer >= 0; 0 is the query's own position. For no limit on the left use "
                    "Mask.causal(), for none at all Mask.full()."
                )
        return Mask(left=int(left), right=int(right))

    @staticmethod
    def segments(q_ids: Int[Array, "*B T"], kv_ids: Int[Array, "*B S"] | None = None) -> "Mask":
        """A query sees the keys of its own segment: packed documents, for example.

        Args:
            q_ids: integer ids, [T] or [B, T], laid out like the query: `sharding.place(ids)`.
            kv_ids: ids of the keys, [S] or [B, S]; None: the same as `q_ids`.

        Raises:
            ValueError: ids are not integers of rank 1 or 2.
        """
        kv_ids = q_ids if kv_ids is None else kv_ids
        for name, ids in (("q_ids", q_ids), ("kv_ids", kv_ids)):
            dtype, shape = getattr(ids, "dtype", None), getattr(ids, "shape", ())
            if dtype is None or not jnp.issubdtype(dtype, jnp.integer) or len(shape) not in (1, 2):
                raise ValueError(
                    f"Mask.segments({name}=...): segment ids are an integer array [T] or [B, T], "
                    f"got {'no array' if dtype is None else f'{dtype}{list(shape)}'}. Convert with "
                    "jnp.asarray(ids, jnp.int32)."
                )
        return Mask(segment_ids=((q_ids, kv_ids),))

    def __and__(self, other: "Mask") -> "Mask":
        """The pairs that count under both masks."""
        if not isinstance(other, Mask):
            return NotImplemented
        return Mask(
            left=_least(self.left, other.left),
            right=_least(self.right, other.right),
            segment_ids=self.segment_ids + other.segment_ids,
        )


def _least(a: int | None, b: int | None) -> int | None:
    return b if a is None else a if b is None else min(a, b)
