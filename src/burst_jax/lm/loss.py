"""Cross-entropy per token, as one mean over all real tokens of all devices."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Float32, Int32


def mean_loss(
    logits: Float[Array, "B T V"],
    labels: Int32[Array, "B T"],
    weights: Float32[Array, "B T"],
) -> Float32[Array, ""]:
    """Weighted mean of -log softmax(logits)[labels], in nats per token.

    Sum and count run over the global arrays, so a device that holds padding, or more of it than
    its neighbour, does not pull the mean: averaging each device's own mean would.

    Args:
        logits: of every symbol V; computed with in float32 whatever their dtype.
        labels: the symbol that came next.
        weights: 1 for a token that counts, 0 for padding.

    Returns:
        The mean, 0 if nothing counts.
    """
    logits = logits.astype(jnp.float32)
    # One comparison with every symbol instead of a gather: with few symbols it is as fast, and it
    # keeps the tokens where they lie on every kind of mesh axis.
    is_label = labels[..., None] == jax.lax.broadcasted_iota(jnp.int32, logits.shape, 2)
    of_label = jnp.where(is_label, logits, 0).sum(-1)
    loss = jax.nn.logsumexp(logits, axis=-1) - of_label
    return (loss * weights).sum() / jnp.maximum(weights.sum(), 1)
