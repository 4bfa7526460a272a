"""The other ways to spread attention over devices, written out so that they can be compared with.

Each computes the same attention layer, tokens sharded before and after: x [B, T, D] -> y [B, T, D].

    ring             k and v travel from device to device, or the queries do (BurstAttention)
    all_gather       each device gathers k and v whole (context parallelism as in Llama 3,
                     arXiv 2407.21783 section 3.3.2)
    tensor_parallel  each device has all tokens for its share of the heads: gathers x, scatters y
                     (Megatron-LM with sequence parallelism, arXiv 2205.05198 section 4.2.2)

So that nothing but the communication differs, all of them
  1. compute with the same tiles: where there is no ring, on a ring of one device;
  2. keep for the backward pass what is on the device anyway, attention's output and lse among it,
     and gather again what had been gathered. Keeping it would save its second gather (a third of
     all-gather's bytes, a fifth of tensor parallelism's) for memory that grows with T, not T / R;
  3. use the same layout of tokens.
"""

from collections.abc import Callable, Sequence
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import AxisType, PartitionSpec
from jaxtyping import Array, Float, Int32

from burst_jax import Mask, Plan, SequenceSharding, burst_attention_shard

# jax exports the class as a variable, which no annotation may hold.
Devices = Sequence[jax.Device]  # pyright: ignore[reportInvalidTypeForm]
Strategy = Literal["ring", "all_gather", "tensor_parallel"]

# The sequence is spread over the first axis. The second has one device: on it, attention among
# gathered tokens is a ring of one.
_AXES = ("sp", "one")
_PROJECTED = "baseline_projected"


class Weights(NamedTuple):
    """The matrices of one attention layer, without biases."""

    query: Float[Array, "D N H"]
    key: Float[Array, "D K H"]
    value: Float[Array, "D K H"]
    out: Float[Array, "N H D"]


Layer = Callable[[Float[Array, "B T D"], Weights], Float[Array, "B T D"]]


def make_sharding(devices: Devices, *, length: int, layout: str = "zigzag") -> SequenceSharding:
    """The sharding that `attention_layer` wants: tokens over all devices."""
    kinds = (AxisType.Explicit,) * len(_AXES)
    mesh = jax.make_mesh((len(devices), 1), _AXES, axis_types=kinds, devices=devices)
    return SequenceSharding(mesh, _AXES, layout=layout, length=length)


def weight_specs(strategy: Strategy) -> Weights:
    """How the weights lie: heads sharded for tensor parallelism, else the same on every device."""
    specs = [PartitionSpec()] * 4
    if strategy == "tensor_parallel":
        heads = PartitionSpec(None, _AXES, None)
        specs = [heads, heads, heads, PartitionSpec(_AXES, None, None)]
    return Weights._make(specs)


def attention_layer(
    strategy: Strategy, *, sharding: SequenceSharding, mask: Mask, plan: Plan | None = None
) -> Layer:
    """One attention layer `(x, weights) -> y`; x and y in the layout order of `sharding`.

    Args:
        strategy: what is communicated.
        sharding: as `make_sharding` makes it.
        mask: which keys a query may see.
        plan: of the ring, which side travels; None: the library's choice.

    Raises:
        ValueError: no such strategy, or a plan for one that has no ring. When called, for tensor
            parallelism: heads that the devices do not divide.
    """
    if plan is not None and strategy != "ring":
        raise ValueError(f"strategy={strategy!r} has no ring; plan={plan} would do nothing.")
    tokens = sharding.spec(3)

    def ring(x, positions, weights):
        q, k, v = _project(x, weights)
        out = burst_attention_shard(
            q, k, v, axis_name=_AXES, layout=sharding.layout, length=sharding.length, mask=mask,
            plan=plan,
        )  # fmt: skip
        assert isinstance(out, jax.Array), "no residual was asked for"
        return _join(out, weights)

    def all_gather(x, positions, weights):
        @_gathering_again
        def attend(q, k, v):
            k, v = _gather(k), _gather(v)
            return _alone(q, k, v, positions, _gather(positions, axis=0), mask)

        return _join(attend(*_project(x, weights)), weights)

    def tensor_parallel(x, positions, weights):
        @_gathering_again
        def attend(x):
            everywhere = _gather(positions, axis=0)
            q, k, v = checkpoint_name(_project(_gather(x), weights), _PROJECTED)
            return _alone(q, k, v, everywhere, everywhere, mask)

        y = _join(attend(x), weights)
        return jax.lax.psum_scatter(y, _AXES[0], scatter_dimension=1, tiled=True)

    shards = {"ring": ring, "all_gather": all_gather, "tensor_parallel": tensor_parallel}
    if strategy not in shards:
        raise ValueError(f"strategy={strategy!r} does not exist; choose one of {tuple(shards)}.")
    sharded = jax.shard_map(
        shards[strategy],
        mesh=sharding.mesh,
        in_specs=(tokens, sharding.spec(1, axis=0), weight_specs(strategy)),
        out_specs=tokens,
    )

    def layer(x: Float[Array, "B T D"], weights: Weights) -> Float[Array, "B T D"]:
        K, R = weights.key.shape[1], sharding.num_shards
        if strategy == "tensor_parallel" and K % R:
            raise ValueError(
                f"tensor parallelism cannot share {K} kv heads among {R} devices; use a number of "
                f"devices that divides them, or another strategy."
            )
        return sharded(x, sharding.positions(), weights)

    return layer


def _gathering_again(attend: Callable[..., Array]) -> Callable[..., Array]:
    """Lets the backward pass repeat the gathers, and nothing that costs more.

    It finds attention's output and lse, by the names that the library gives them, and the
    projected queries and keys.
    """
    kept = ("burst_out", "burst_lse", _PROJECTED)
    policy = jax.checkpoint_policies.save_only_these_names(*kept)
    return jax.checkpoint(attend, policy=policy)


def _project(x: Float[Array, "B t D"], weights: Weights) -> tuple[Array, Array, Array]:
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, w) for w in weights[:3])
    return q, k, v


def _join(out: Float[Array, "B t N H"], weights: Weights) -> Float[Array, "B t D"]:
    return jnp.einsum("btnh,nhd->btd", out, weights.out)


def _gather(x: Array, axis: int = 1) -> Array:
    return jax.lax.all_gather(x, _AXES[0], axis=axis, tiled=True)


def _alone(
    q: Float[Array, "B t N H"],
    k: Float[Array, "B s K H"],
    v: Float[Array, "B s K H"],
    q_positions: Int32[Array, " t"],
    kv_positions: Int32[Array, " s"],
    mask: Mask,
) -> Float[Array, "B t N H"]:
    """Attention among what is on this device; positions, not places, say what is masked."""
    positions = (q_positions, kv_positions)
    out = burst_attention_shard(q, k, v, axis_name=_AXES[1], positions=positions, mask=mask)
    assert isinstance(out, jax.Array), "no residual was asked for"
    return out
