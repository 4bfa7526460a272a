"""What the arguments that Flax's own attention modules pass on mean to us, and which are refused.

Imports no Flax, so that each side is loaded only by those who use it.
"""

import jax
import numpy as np
from jaxtyping import Array

from burst_jax import _checks, _flax
from burst_jax._masks import Mask
from burst_jax._sharding import SequenceSharding


def check_host(sharding: SequenceSharding, mask: Mask | None) -> Mask:
    """The arguments of `attention_fn`; returns the mask."""
    _flax.check_sharding(sharding)
    return _checks.check_mask(mask)


def honoured_mask(
    own: Mask,
    *,
    mask: Array | np.ndarray | Mask | None,
    is_causal: bool,
    dropout_rate: float,
    deterministic: bool,
    sows: bool,
    precision: jax.lax.PrecisionLike,
) -> Mask:
    """The mask that a host's arguments and our own ask for, if the rest can be honoured.

    Raises:
        ValueError: it cannot: a dense mask, dropout, sown weights or a precision.
    """
    if isinstance(mask, Mask):
        own = _flax.both(own, mask)
    elif mask is not None:
        raise ValueError(
            f"mask is a dense array of shape {tuple(mask.shape)}, quadratic in the sequence and "
            "not taken (decoding with a cache makes one too): say what it masks with "
            "attention_fn(sharding, mask=Mask.causal()), or with mask=Mask.segments(ids) in the "
            "call, and decode with Flax's own attention."
        )
    if dropout_rate > 0 and not deterministic:
        raise ValueError(
            f"dropout_rate={dropout_rate} on attention weights cannot be honoured, because they "
            "are never stored: use dropout_rate=0 or deterministic=True, and drop out what the "
            "module returns instead."
        )
    if sows:
        raise ValueError(
            "sow_weights=True cannot be honoured, because attention weights are never stored: "
            "leave it False, and look at them on a short sequence with Flax's own attention."
        )
    if precision not in (None, "default", jax.lax.Precision.DEFAULT):
        raise ValueError(
            f"precision={precision!r} cannot be honoured by every tile: leave precision=None in "
            "the module, and set it for the projections and the xla tile with "
            "jax.default_matmul_precision(...) around the call."
        )
    return own & Mask.causal() if is_causal else own
