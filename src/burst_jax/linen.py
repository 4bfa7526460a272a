"""Sequence-sharded attention for `flax.linen`: a module, and a function for Flax's own module."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen
from flax.linen.dtypes import promote_dtype
from jax.nn.initializers import Initializer
from jaxtyping import Array, DTypeLike, Float, Int

from burst_jax import _flax, _flax_host
from burst_jax._masks import Mask
from burst_jax._plan import Plan
from burst_jax._sharding import SequenceSharding


class BurstAttention(linen.Module):
    """Multi-head self-attention over a sequence that is spread over many devices.

    The same as `burst_jax.nnx.BurstAttention`: parameters of the same names and shapes give the
    same numbers.

    Attributes:
        num_heads: N, query heads.
        sharding: where the tokens lie, and whence their positions.
        num_kv_heads: K, a divisor of N; None: N.
        head_dim: H; None: D / N.
        mask: which keys a query may see; None: `Mask.causal()`. No segment ids: they belong to a
            batch, and so to the call.
        rope_theta: base of the rotary embedding (arXiv 2104.09864) of queries and keys, component
            i paired with i + H/2; None: no rotary embedding.
        qk_norm: RMSNorm over each query's and key's head dim, before the rotation
            (arXiv 2302.05442).
        use_bias: whether the four projections have a bias.
        dtype: of the computation; None: inferred from the input and the parameters. Norm, rotation
            and softmax are computed in float32 at least, whatever it is.
        param_dtype: of the parameters.
        kernel_init: initialiser of the kernels, which it sees flattened to two dimensions.
        bias_init: initialiser of the biases.
        plan: see `burst_attention`.
        implementation: see `burst_attention`.

    Raises:
        ValueError: when called: sizes that do not divide, an odd head dim with rotary embedding,
            or a mask with segment ids.
    """

    num_heads: int
    sharding: SequenceSharding
    num_kv_heads: int | None = None
    head_dim: int | None = None
    mask: Mask | None = None
    rope_theta: float | None = 10000.0
    qk_norm: bool = False
    use_bias: bool = False
    dtype: DTypeLike | None = None
    param_dtype: DTypeLike = jnp.float32
    kernel_init: Initializer = linen.initializers.lecun_normal()
    bias_init: Initializer = linen.initializers.zeros_init()
    plan: Plan | None = None
    implementation: str | None = None

    @linen.compact
    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        mask: Mask | None = None,
        positions: Int[Array, "..."] | None = None,
    ) -> Float[Array, "B T D"]:
        """Attention of every token to the tokens that both masks let it see.

        Args:
            x: [B, T, D], in the layout order of the sharding (`sharding.place`).
            mask: a further mask, taken together (`&`) with the module's: for example
                `Mask.segments(ids)` of packed documents.
            positions: integers [T] or [B, T] in layout order, for mask and rotary embedding;
                None: those of the layout. Negative is padding.

        Returns:
            [B, T, D], laid out as x.

        Raises:
            ValueError: as `burst_attention`; also for an x of another rank.
        """
        _flax.check_input(x)
        B, T, D = x.shape
        own, K, H = _flax.check_module(
            self.sharding, self.mask, in_features=D, num_heads=self.num_heads,
            num_kv_heads=self.num_kv_heads, head_dim=self.head_dim, rope_theta=self.rope_theta,
        )  # fmt: skip
        q = self._projection("query", (B, T, self.num_heads, H))(x)
        k = self._projection("key", (B, T, K, H))(x)
        v = self._projection("value", (B, T, K, H))(x)
        if self.qk_norm:
            norms = (
                linen.RMSNorm(param_dtype=self.param_dtype, name=name)
                for name in ("query_norm", "key_norm")
            )
            q, k = (_flax.normed(norm, x) for norm, x in zip(norms, (q, k), strict=True))
        out = _flax.attention(
            *_flax.heads_ready(
                q, k, v, sharding=self.sharding, positions=positions, rope_theta=self.rope_theta
            ),
            sharding=self.sharding,
            mask=_flax.both(own, mask),
            positions=positions,
            plan=self.plan,
            implementation=self.implementation,
        )
        return self._projection("out", (B, T, D))(out)

    def _projection(self, name: str, shape: tuple[int, ...]) -> linen.DenseGeneral:
        """To an output of this shape, laid out as the sharding says."""
        sums_heads = name == "out"
        gathered = functools.partial(_flax.gathered, sharding=self.sharding, sums_heads=sums_heads)

        def promote(
            *args: Array | None, dtype: DTypeLike | None = None, inexact: bool = True
        ) -> list[Array | None]:
            """As Flax does, the parameters gathered on the way."""
            x, kernel, bias = promote_dtype(*args, dtype=dtype, inexact=inexact)
            assert kernel is not None
            return [x, *gathered(kernel, bias)]

        dot_general = functools.partial(
            jax.lax.dot_general, out_sharding=_flax.laid_out(shape, self.sharding)
        )
        return linen.DenseGeneral(
            shape[2:], axis=(-2, -1) if sums_heads else -1, use_bias=self.use_bias,
            dtype=self.dtype, param_dtype=self.param_dtype, kernel_init=self.kernel_init,
            bias_init=self.bias_init, promote_dtype=promote, dot_general=dot_general, name=name,
        )  # fmt: skip


def attention_fn(
    sharding: SequenceSharding,
    *,
    mask: Mask | None = None,
    plan: Plan | None = None,
    implementation: str | None = None,
) -> Callable[..., Float[Array, "B T N H"]]:
    """`burst_attention` for `linen.MultiHeadDotProductAttention(attention_fn=...)`.

    It honours what the module passes on: a `burst_jax.Mask` given as `mask=` is taken together
    with the one given here, arrays are promoted to `dtype` as Flax does, and the softmax is
    computed in float32 at least, with `force_fp32_for_softmax` and without.

    Args:
        sharding: where the tokens lie.
        mask: which keys a query may see; None: all, as in Flax.
        plan: see `burst_attention`.
        implementation: see `burst_attention`.

    Returns:
        The function. It raises ValueError for what it cannot honour: a dense mask (and so a
        decoding cache), dropout that is not deterministic, sown weights, a precision, einsums of
        the caller's own.
    """
    own = _flax_host.check_host(sharding, mask)

    # Flax drops, without a word, what a function does not name: so every argument is named here.
    def _attend(
        query: Float[Array, "B T N H"],
        key: Float[Array, "B S K H"],
        value: Float[Array, "B S K Hv"],
        *,
        mask: Array | np.ndarray | Mask | None = None,
        dropout_rng: Array | None = None,
        dropout_rate: float = 0.0,
        broadcast_dropout: bool = True,
        deterministic: bool = False,
        dtype: DTypeLike | None = None,
        precision: jax.lax.PrecisionLike = None,
        module: linen.Module | None = None,
        force_fp32_for_softmax: bool = False,
        qk_attn_weights_einsum: Callable[..., Array] | None = None,
        attn_weights_value_einsum: Callable[..., Array] | None = None,
    ) -> Float[Array, "B T N Hv"]:
        seen = _flax_host.honoured_mask(
            own, mask=mask, is_causal=False, dropout_rate=dropout_rate,
            deterministic=deterministic, sows=module is not None, precision=precision,
        )  # fmt: skip
        if qk_attn_weights_einsum is not None or attn_weights_value_einsum is not None:
            raise ValueError(
                "qk_attn_weights_einsum and attn_weights_value_einsum cannot be honoured, because "
                "attention weights are never stored: leave both classes None in the module."
            )
        query, key, value = promote_dtype(query, key, value, dtype=dtype)
        return _flax.attention(
            query, key, value, sharding=sharding, mask=seen, positions=None,
            plan=plan, implementation=implementation,
        )  # fmt: skip

    return _attend
