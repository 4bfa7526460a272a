"""The ways to spread attention that Burst is compared with: exact, and as frugal as they can be."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding

import burst_jax as bj
from burst_jax.baselines import Weights, attention_layer, make_sharding, weight_specs
from burst_jax.inspect import collective_bytes

R, B, T, D, H = 4, 2, 32, 6, 4
STRATEGIES = {
    "keys travel": ("ring", bj.Plan(backward="kv")),
    "queries travel": ("ring", bj.Plan(backward="q")),
    "all-gather": ("all_gather", None),
    "tensor parallel": ("tensor_parallel", None),
}


@pytest.fixture
def where() -> bj.SequenceSharding:
    return make_sharding(jax.devices()[:R], length=T)


def layer_inputs(getkey, N: int, K: int):
    def normal(*shape: int) -> jax.Array:
        return jax.random.normal(getkey(), shape, jnp.float64)

    weights = Weights(normal(D, N, H), normal(D, K, H), normal(D, K, H), normal(N, H, D))
    return normal(B, T, D), weights, normal(B, T, D)


def plain_layer(x, weights: Weights, mask: bj.Mask):
    q, k, v = (jnp.einsum("btd,dnh->btnh", x, w) for w in weights[:3])
    return jnp.einsum("btnh,nhd->btd", bj.reference.attention(q, k, v, mask=mask), weights.out)


def placed(where, strategy, x, weights, dy):
    specs = weight_specs(strategy)
    weights = jax.tree.map(
        lambda w, spec: jax.device_put(w, NamedSharding(where.mesh, spec)), weights, specs
    )
    return where.place(x), weights, where.place(dy)


def forward_and_backward(layer):
    def run(x, weights, dy):
        y, pull = jax.vjp(layer, x, weights)
        return y, pull(dy)

    return run


@pytest.mark.parametrize("heads", [(8, 4), (4, 4)], ids=str)
@pytest.mark.parametrize("name", STRATEGIES)
def test_every_strategy_computes_the_same_layer_and_gradients(name, heads, where, getkey):
    strategy, plan = STRATEGIES[name]
    mask = bj.Mask.causal() if heads == (8, 4) else bj.Mask.sliding_window(5)
    x, weights, dy = layer_inputs(getkey, *heads)
    layer = attention_layer(strategy, sharding=where, mask=mask, plan=plan)
    got = jax.jit(forward_and_backward(layer))(*placed(where, strategy, x, weights, dy))
    y, (dx, dw) = got
    truth = forward_and_backward(lambda x, w: plain_layer(x, w, mask))(x, weights, dy)
    chex.assert_trees_all_close((where.restore(y), (where.restore(dx), dw)), truth, atol=1e-10)
    assert min(float(jnp.abs(a).max()) for a in jax.tree.leaves(truth)) > 0


@pytest.mark.parametrize("strategy", ["all_gather", "tensor_parallel"])
def test_what_is_sent_is_what_is_written_about_them(strategy, where, getkey):
    N, K, width = 8, 4, 8  # float64
    x, weights, dy = layer_inputs(getkey, N, K)
    layer = attention_layer(strategy, sharding=where, mask=bj.Mask.causal())
    arguments = placed(where, strategy, x, weights, dy)
    sent = collective_bytes(forward_and_backward(layer), *arguments)
    t, others = T // R, R - 1
    positions = 2 * 4 * t * others  # with them, each time
    if strategy == "all_gather":
        # k and v are gathered, and once more in the backward pass; dk and dv are scattered.
        keys = B * t * K * H * width * 2 * others
        assert sent["all_gather"] == 2 * keys + positions
        assert sent["reduce_scatter"] == keys
        parameters = sum(w.size for w in weights) * width
        assert sent["psum"] == 2 * parameters * others // R
    else:
        # x is gathered and y scattered; backward dy and again x are gathered, and dx scattered.
        tokens = B * t * D * width * others
        assert sent["all_gather"] == 3 * tokens + positions
        assert sent["reduce_scatter"] == 2 * tokens
        assert "psum" not in sent


def test_what_makes_no_sense_is_refused(where, getkey):
    mask = bj.Mask.causal()
    with pytest.raises(ValueError, match="has no ring"):
        attention_layer("all_gather", sharding=where, mask=mask, plan=bj.Plan(backward="q"))
    layer = attention_layer("tensor_parallel", sharding=where, mask=mask)
    x, weights, dy = layer_inputs(getkey, 4, 2)
    with pytest.raises(ValueError, match="2 kv heads"):
        layer(where.place(x), weights)


def test_one_device_sends_nothing(getkey):
    where = make_sharding(jax.devices()[:1], length=T)
    x, weights, dy = layer_inputs(getkey, 4, 2)
    want = np.asarray(plain_layer(x, weights, bj.Mask.causal()))
    for strategy, plan in STRATEGIES.values():
        layer = attention_layer(strategy, sharding=where, mask=bj.Mask.causal(), plan=plan)
        arguments = placed(where, strategy, x, weights, dy)
        assert collective_bytes(forward_and_backward(layer), *arguments)["total"] == 0
        np.testing.assert_allclose(where.restore(layer(*arguments[:2])), want, atol=1e-10)
