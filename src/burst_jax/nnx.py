"""Sequence-sharded attention for `flax.nnx`: a module, and a function for Flax's own module."""

import dataclasses
import functools
from collections.abc import Callable
from typing import TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from flax.nnx.nn.dtypes import promote_dtype
from jax.nn.initializers import Initializer
from jaxtyping import Array, DTypeLike, Float, Int

from burst_jax import _flax, _flax_host
from burst_jax._masks import Mask
from burst_jax._plan import Plan
from burst_jax._sharding import SequenceSharding

# Flax's own defaults.
_KERNEL_INIT = nnx.initializers.lecun_normal()
_BIAS_INIT = nnx.initializers.zeros_init()

Arrays = TypeVar("Arrays", bound=tuple)


class BurstAttention(nnx.Module):
    """Multi-head self-attention over a sequence that is spread over many devices.

    The parameters are `query`, `key`, `value` and `out`, of the shapes that
    `nnx.MultiHeadAttention` gives them, and with `qk_norm` the scales of `query_norm` and
    `key_norm`. They do not depend on the sharding. With a `head_axis`, shard dimension 1 of the
    first three kernels and dimension 0 of the last over it, and no device holds them all.

    Args:
        in_features: D, features of the input and of the output.
        num_heads: N, query heads.
        num_kv_heads: K, a divisor of N; None: N.
        head_dim: H; None: D / N.
        sharding: where the tokens lie, and whence their positions.
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
        rngs: the stream `params` is used.

    Raises:
        ValueError: sizes that do not divide, an odd head dim with rotary embedding, or a mask with
            segment ids.
    """

    def __init__(
        self,
        in_features: int,
        *,
        num_heads: int,
        num_kv_heads: int | None = None,
        head_dim: int | None = None,
        sharding: SequenceSharding,
        mask: Mask | None = None,
        rope_theta: float | None = 10000.0,
        qk_norm: bool = False,
        use_bias: bool = False,
        dtype: DTypeLike | None = None,
        param_dtype: DTypeLike = jnp.float32,
        kernel_init: Initializer = _KERNEL_INIT,
        bias_init: Initializer = _BIAS_INIT,
        plan: Plan | None = None,
        implementation: str | None = None,
        rngs: nnx.Rngs,
    ) -> None:
        self.mask, K, H = _flax.check_module(
            sharding, mask, in_features=in_features, num_heads=num_heads,
            num_kv_heads=num_kv_heads, head_dim=head_dim, rope_theta=rope_theta,
        )  # fmt: skip
        self.in_features, self.num_heads, self.num_kv_heads, self.head_dim = (
            in_features, num_heads, K, H,
        )  # fmt: skip
        self.sharding = sharding
        self.rope_theta = rope_theta
        self.plan = plan
        self.implementation = implementation

        projection = functools.partial(
            nnx.LinearGeneral, use_bias=use_bias, dtype=dtype, param_dtype=param_dtype,
            kernel_init=kernel_init, bias_init=bias_init, rngs=rngs,
        )  # fmt: skip
        to_heads, of_heads = (_Promotion(sharding, sums_heads=sums) for sums in (False, True))
        self.query = projection(in_features, (num_heads, H), promote_dtype=to_heads)
        self.key = projection(in_features, (K, H), promote_dtype=to_heads)
        self.value = projection(in_features, (K, H), promote_dtype=to_heads)
        self.out = projection((num_heads, H), in_features, axis=(-2, -1), promote_dtype=of_heads)
        self.query_norm, self.key_norm = (
            nnx.data(nnx.RMSNorm(H, param_dtype=param_dtype, rngs=rngs) if qk_norm else None)
            for _ in range(2)
        )

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
            ValueError: as `burst_attention`; also for an x of another rank or size.
        """
        _flax.check_input(x, self.in_features)
        q, k, v = (self._heads(project, x) for project in (self.query, self.key, self.value))
        if self.query_norm is not None and self.key_norm is not None:
            q, k = _flax.normed(self.query_norm, q), _flax.normed(self.key_norm, k)
        out = _flax.attention(
            *_flax.heads_ready(
                q, k, v, sharding=self.sharding, positions=positions, rope_theta=self.rope_theta
            ),
            sharding=self.sharding,
            mask=_flax.both(self.mask, mask),
            positions=positions,
            plan=self.plan,
            implementation=self.implementation,
        )
        return self.out(out, out_sharding=_flax.laid_out(x.shape, self.sharding))

    def _heads(
        self, project: nnx.LinearGeneral, x: Float[Array, "B T D"]
    ) -> Float[Array, "B T N H"]:
        shape = (*x.shape[:2], *project.out_features)
        return project(x, out_sharding=_flax.laid_out(shape, self.sharding))


@dataclasses.dataclass(frozen=True)  # two modules alike have to compare equal: nnx asks
class _Promotion:
    """How a projection promotes dtypes: as Flax does, its parameters gathered on the way."""

    sharding: SequenceSharding
    sums_heads: bool

    def __call__(
        self, args: Arrays, /, *, dtype: DTypeLike | None = None, inexact: bool = True
    ) -> Arrays:
        x, kernel, bias = promote_dtype(args, dtype=dtype, inexact=inexact)
        parameters = _flax.gathered(
            kernel, bias, sharding=self.sharding, sums_heads=self.sums_heads
        )
        return (x, *parameters)  # pyright: ignore[reportReturnType]


def attention_fn(
    sharding: SequenceSharding,
    *,
    mask: Mask | None = None,
    plan: Plan | None = None,
    implementation: str | None = None,
) -> Callable[..., Float[Array, "B T N H"]]:
    """`burst_attention` for `nnx.MultiHeadAttention(attention_fn=...)`.

    It honours what the module passes on: `is_causal=True` adds `Mask.causal()`, a `burst_jax.Mask`
    given as `mask=` is taken together with the one given here, `input_positions` are the tokens'
    positions, arrays are promoted to `dtype` as Flax does. On a mesh with Explicit axes and a
    head axis, call the module with `qkv_sharding` and `out_sharding`.

    Args:
        sharding: where the tokens lie.
        mask: which keys a query may see; None: all, as in Flax.
        plan: see `burst_attention`.
        implementation: see `burst_attention`.

    Returns:
        The function. It raises ValueError for what it cannot honour: a dense mask (and so a
        decoding cache), dropout that is not deterministic, sown weights, a precision.
    """
    own = _flax_host.check_host(sharding, mask)

    def attend(
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
        module: nnx.Module | None = None,
        is_causal: bool = False,
        input_positions: Int[Array, "..."] | None = None,
    ) -> Float[Array, "B T N Hv"]:
        seen = _flax_host.honoured_mask(
            own, mask=mask, is_causal=is_causal, dropout_rate=dropout_rate,
            deterministic=deterministic, sows=module is not None, precision=precision,
        )  # fmt: skip
        query, key, value = promote_dtype((query, key, value), dtype=dtype)
        return _flax.attention(
            query, key, value, sharding=sharding, mask=seen, positions=input_positions, plan=plan,
            implementation=implementation,
        )  # fmt: skip

    return attend
