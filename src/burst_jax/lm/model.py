"""The decoder: embedding, blocks of attention and SwiGLU, and a head of 257 symbols.

The blocks' parameters are stacked along a leading axis of layers and scanned over, so that one
block is traced and compiled however many there are. Nothing here knows how tokens lie on devices
but the attention, which has it from `sharding`: everything else works token by token.
"""

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Float, Int32

from burst_jax import SequenceSharding
from burst_jax.lm.config import ModelConfig, Remat
from burst_jax.lm.data import NUM_TOKENS
from burst_jax.nnx import BurstAttention

# Of a block, attention alone costs O(T^2) and communicates: keeping its two results makes the
# recomputation of everything else cheap.
_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "save_attention": jax.checkpoint_policies.save_only_these_names("burst_out", "burst_lse"),
}


class SwiGLU(nnx.Module):
    """`down(silu(gate(x)) * up(x))` (arXiv 2002.05202)."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs) -> None:
        def linear(features_in: int, features_out: int) -> nnx.Linear:
            dtype = jnp.dtype(config.dtype)
            return nnx.Linear(features_in, features_out, use_bias=False, dtype=dtype, rngs=rngs)

        self.gate = linear(config.width, config.hidden_size)
        self.up = linear(config.width, config.hidden_size)
        self.down = linear(config.hidden_size, config.width)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """Token by token."""
        return self.down(nnx.silu(self.gate(x)) * self.up(x))


class Block(nnx.Module):
    """Attention and SwiGLU, each on the normalised residual stream."""

    def __init__(self, config: ModelConfig, *, sharding: SequenceSharding, rngs: nnx.Rngs) -> None:
        dtype = jnp.dtype(config.dtype)
        self.attention_norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.attention = BurstAttention(
            config.width,
            num_heads=config.num_heads,
            num_kv_heads=config.num_kv_heads,
            head_dim=config.head_size,
            sharding=sharding,
            rope_theta=config.rope_theta,
            qk_norm=config.qk_norm,
            dtype=dtype,
            rngs=rngs,
        )
        self.mlp_norm = nnx.RMSNorm(config.width, dtype=dtype, rngs=rngs)
        self.mlp = SwiGLU(config, rngs=rngs)

    def __call__(self, x: Float[Array, "B T D"]) -> Float[Array, "B T D"]:
        """The residual stream before and after."""
        x = x + self.attention(self.attention_norm(x))
        return x + self.mlp(self.mlp_norm(x))


class Decoder(nnx.Module):
    """Bytes in, logits of the next byte out; tokens in the layout's order.

    Args:
        config: sizes and dtypes.
        sharding: how the sequence lies on the mesh. It decides nothing about the parameters, so
            the same ones serve any number of devices.
        rngs: for the parameters.
    """

    def __init__(self, config: ModelConfig, *, sharding: SequenceSharding, rngs: nnx.Rngs) -> None:
        self.remat: Remat = config.remat
        self.dtype = jnp.dtype(config.dtype)
        normal = nnx.initializers.normal(1.0)
        size = (NUM_TOKENS, config.width)
        self.embedding = nnx.Param(normal(rngs.params(), size, jnp.float32))

        @nnx.split_rngs(splits=config.num_layers)
        @nnx.vmap(in_axes=0, out_axes=0)
        def stacked_blocks(rngs: nnx.Rngs) -> Block:
            return Block(config, sharding=sharding, rngs=rngs)

        self.blocks = stacked_blocks(rngs)
        self.norm = nnx.RMSNorm(config.width, dtype=self.dtype, rngs=rngs)
        self.head = nnx.Linear(
            config.width, NUM_TOKENS, use_bias=False, dtype=self.dtype, rngs=rngs
        )

    def __call__(self, tokens: Int32[Array, "B T"]) -> Float[Array, "B T V"]:
        """Logits of the token after each token.

        Args:
            tokens: in layout order, sharded as the decoder's sharding says.

        Returns:
            [B, T, 257] in the config's dtype, laid out as the tokens.
        """
        # A product with one-hot rows, not a gather: for 257 symbols it costs nothing beside a
        # block, its gradient is a matrix product, and tokens stay where they lie on every mesh.
        one_hot = jax.nn.one_hot(tokens, NUM_TOKENS, dtype=self.dtype)
        x = one_hot @ self.embedding[...].astype(self.dtype)
        structure, layers = nnx.split(self.blocks)

        def block(x, layer):
            return nnx.merge(structure, layer)(x), None

        if self.remat != "none":
            # Inside a scan nothing can be merged with its recomputation, so no barrier is needed.
            block = jax.checkpoint(block, policy=_POLICIES[self.remat], prevent_cse=False)
        x, _ = jax.lax.scan(block, x, layers)
        return self.head(self.norm(x))
