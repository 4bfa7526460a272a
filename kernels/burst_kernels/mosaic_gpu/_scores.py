"""Scores of one pair of blocks, with scale and soft cap: shared by the forward and the backward.

Exponentials are taken in base 2, which is what the hardware has; lse is a natural logarithm at the
boundary. A maximum (or lse) is kept in base 2 too, rounded once, so that scale and difference are
one multiply-add: the rounding of a row's maximum is a factor on all of the row's exponentials, and
`out` and lse, made with the same maximum, do not have it. Only where scores are beyond about 2**29
is that factor beyond float32, and such rows become NaN.
"""

import math
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from burst_kernels._tile import Tile

LOG2_E = math.log2(math.e)
LN_2 = math.log(2.0)


class Scores(NamedTuple):
    """How scores are made of q k^T; static.

    Attributes:
        scale: factor on q k^T, > 0.
        soft_cap: scores become `cap * tanh(scores / cap)`; None: no cap.
    """

    scale: float
    soft_cap: float | None

    @classmethod
    def of(cls, tile: Tile) -> "Scores":
        """Those of a tile."""
        return cls(float(tile.scale), tile.logits_soft_cap)

    @property
    def factor_2(self) -> float:
        """What `capped` scores are still to be multiplied by, for exponentials in base 2."""
        return LOG2_E * (self.scale if self.soft_cap is None else 1.0)

    def capped(self, raw: Float[Array, "m n"]) -> Float[Array, "m n"]:
        """Scores from q k^T, to be multiplied by `factor_2`."""
        if self.soft_cap is None:
            return raw
        # tanh(x) = 1 - 2 / (exp(2 x) + 1): the hardware's own tanh has but 11 bits. exp2 may reach
        # inf, and then the fraction is 0; where it is 0, the fraction is 2. The square of a
        # reciprocal root takes two instructions, a quotient of any two numbers six.
        root = jax.lax.rsqrt(jnp.exp2(raw * (2.0 * LOG2_E * self.scale / self.soft_cap)) + 1.0)
        return self.soft_cap - (2.0 * self.soft_cap) * (root * root)

    def cap_slope(self, capped: Float[Array, "m n"]) -> Float[Array, "m n"] | None:
        """d capped / d scores, from the capped scores; None where there is no cap."""
        if self.soft_cap is None:
            return None
        ratio = capped * (1.0 / self.soft_cap)
        return 1.0 - ratio * ratio

    def probability(
        self, capped: Float[Array, "m n"], bound: Float[Array, " _rows"], axis: int = 0
    ) -> Float[Array, "m n"]:
        """2 to the power of factor_2 scores - bound; bound is a row's maximum or lse in base 2.

        Args:
            capped: what `capped` returned, -inf where masked.
            bound: one number a query, finite or +inf (which gives 0).
            axis: the axis of `capped` that counts queries; 1 for transposed scores.
        """
        bound = jax.lax.broadcast_in_dim(bound, capped.shape, (axis,))
        return jnp.exp2(capped * self.factor_2 - bound)
