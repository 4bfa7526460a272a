"""Our `attention_fn` in Flax's own modules: the same training, or a refusal that says why."""

import inspect

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import linen, nnx

import burst_jax as bj
import burst_jax.linen
import burst_jax.nnx

# Flax's modules promote dtypes and ranks implicitly (masks, cache, bfloat16); our function inside
# them is tested under strict promotion in test_flax_modules.py.
pytestmark = pytest.mark.usefixtures("ordinary_promotion")

D, T, N, R, STEPS = 16, 22, 4, 4, 3  # 22 tokens on 4 devices: zigzag pads
QUICKLY = {"xla_backend_optimization_level": 0}


def where(**fields):
    mesh = jax.make_mesh((R,), ("sp",))
    return bj.SequenceSharding(mesh, **{"layout": "zigzag", "length": T, **fields})


def losses_and_params(apply, params, x, target, counts):
    """Three steps of SGD with momentum on the mean squared error over the true tokens.

    Not Adam: a bias of the keys changes no softmax, so its gradient is zero but for rounding, which
    Adam would divide by itself.
    """
    optimizer = optax.sgd(0.1, momentum=0.9)

    def loss(params):
        error = ((apply(params, x) - target) ** 2).mean(-1)
        return (error * counts).sum() / counts.sum()

    def step(carry, _):
        params, state = carry
        value, gradient = jax.value_and_grad(loss)(params)
        update, state = optimizer.update(gradient, state)
        return (optax.apply_updates(params, update), state), value

    def train(params):
        (params, _), losses = jax.lax.scan(step, (params, optimizer.init(params)), length=STEPS)
        return losses, params

    return jax.jit(train, compiler_options=QUICKLY)(params)


def nnx_host(attention_fn, num_kv_heads=N):
    fields = {"num_kv_heads": num_kv_heads, "param_dtype": jnp.float64, "decode": False}
    return nnx.MultiHeadAttention(N, D, attention_fn=attention_fn, rngs=nnx.Rngs(0), **fields)


def trained_nnx(attention_fn, x, target, counts, **arguments):
    graph, params = nnx.split(nnx_host(attention_fn, num_kv_heads=2))

    def apply(params, x):
        return nnx.merge(graph, params)(x, **arguments)

    params = replicated(params, x)
    losses, params = losses_and_params(apply, params, x, target, counts)
    return losses, nnx.to_pure_dict(params)


def trained_linen(attention_fn, x, target, counts, **arguments):
    host = linen.MultiHeadDotProductAttention(N, param_dtype=jnp.float64, attention_fn=attention_fn)
    # The parameters do not depend on the function: initialised with Flax's own, on 4 tokens.
    params = host.clone(attention_fn=linen.dot_product_attention).init(
        jax.random.key(0), jnp.zeros((1, 4, D), jnp.float64)
    )
    return losses_and_params(
        lambda params, x: host.apply(params, x, **arguments),
        replicated(params, x), x, target, counts,
    )  # fmt: skip


def replicated(params, x):
    """Parameters on the devices of x: a scan over steps wants them to keep their place."""
    if len(x.sharding.device_set) == 1:
        return params
    return jax.device_put(params, jax.NamedSharding(x.sharding.mesh, jax.P()))


def batch(sharding=None):
    x, target = np.random.default_rng(0).normal(size=(2, 2, T, D))
    counts = np.ones((2, T))
    arrays = x, target, counts
    return [jnp.asarray(a) if sharding is None else sharding.place(a) for a in arrays]


def close(a, b, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), a, b)


def test_nnx_trains_the_same_sharded_as_with_flaxs_own_attention():
    """Grouped heads; causal because the host is told so."""
    sharding = where()
    ours = burst_jax.nnx.attention_fn(sharding)
    sharded = trained_nnx(ours, *batch(sharding), is_causal=True)
    truth = trained_nnx(nnx.dot_product_attention, *batch(), is_causal=True)
    close(sharded, truth, 1e-6)  # theirs takes the softmax in float32, whatever the dtype
    assert truth[0][-1] < truth[0][0]


def test_linen_trains_the_same_sharded_as_with_flaxs_own_attention():
    sharding = where()
    ours = burst_jax.linen.attention_fn(sharding, mask=bj.Mask.sliding_window(6))
    sharded = trained_linen(ours, *batch(sharding))
    at = np.arange(T)
    seen = (at[:, None] >= at) & (at[:, None] - at <= 6)
    truth = trained_linen(linen.dot_product_attention, *batch(), mask=seen[None, None])
    close(sharded, truth, 1e-9)
    assert truth[0][-1] < truth[0][0]


# What is passed on and honoured: called as the hosts call it.


def heads(sharding, dtype=np.float32):
    q, k, v = np.random.default_rng(1).normal(size=(3, 2, T, N, 4)).astype(dtype)
    return [sharding.place(x) for x in (q, k, v)]


def oracle(*arrays, sharding, mask, positions=None):
    """On one device: in one piece a T x S array cannot be sharded over the sequence twice."""
    arrays, mask, positions = jax.tree.map(
        lambda x: jnp.asarray(np.asarray(x)), (arrays, mask, positions)
    )
    return bj.reference.attention(*arrays, sharding=sharding, mask=mask, positions=positions)


def test_a_mask_of_ours_given_to_the_host_is_added_to_the_functions_own():
    sharding = where()
    q, k, v = heads(sharding)
    ids = sharding.place(np.arange(T) // 9, axis=0, pad_value=-1)
    for package in (burst_jax.nnx, burst_jax.linen):
        attend = package.attention_fn(sharding, mask=bj.Mask.causal())
        out = attend(q, k, v, mask=bj.Mask.segments(ids))
        both = bj.Mask.causal() & bj.Mask.segments(ids)
        close(out, oracle(q, k, v, sharding=sharding, mask=both), 1e-5)


def test_the_hosts_dtype_is_the_dtype_of_the_computation():
    sharding = where()
    q, k, v = heads(sharding)
    for package in (burst_jax.nnx, burst_jax.linen):
        attend = package.attention_fn(sharding)
        assert attend(q, k, v, dtype=jnp.bfloat16).dtype == jnp.bfloat16
        assert attend(q.astype(jnp.bfloat16), k, v).dtype == jnp.float32  # promoted


def test_what_changes_nothing_is_taken():
    sharding = where()
    q, k, v = heads(sharding)
    plain = {"dropout_rate": 0.5, "deterministic": True, "precision": jax.lax.Precision.DEFAULT}
    truth = bj.burst_attention(q, k, v, sharding=sharding)
    close(burst_jax.nnx.attention_fn(sharding)(q, k, v, **plain), truth, 0)
    plain["force_fp32_for_softmax"] = True
    close(burst_jax.linen.attention_fn(sharding)(q, k, v, **plain), truth, 0)


def test_input_positions_decide_what_is_causal():
    sharding = where()
    q, k, v = heads(sharding)
    at = sharding.place(np.arange(T)[::-1], axis=0, pad_value=-1)
    out = burst_jax.nnx.attention_fn(sharding)(q, k, v, is_causal=True, input_positions=at)
    close(out, oracle(q, k, v, sharding=sharding, mask=bj.Mask.causal(), positions=at), 1e-5)


@pytest.mark.parametrize(
    "ours, host, not_passed",
    [
        (burst_jax.nnx, nnx.dot_product_attention, {"bias", "promote_dtype"}),
        (burst_jax.linen, linen.dot_product_attention, {"bias", "einsum_dot_general"}),
    ],
    ids=["nnx", "linen"],
)
def test_every_argument_that_the_host_passes_is_named(ours, host, not_passed):
    """Linen drops what is not named without a word; a new argument of Flax's must be seen."""
    named = set(inspect.signature(ours.attention_fn(where())).parameters)
    assert set(inspect.signature(host).parameters) - not_passed <= named


# What cannot be honoured is refused, through the host.

DENSE = "mask is a dense array .* quadratic .* attention_fn\\(sharding, mask=Mask.causal\\(\\)\\)"
DROPOUT = "dropout_rate=0.5 on attention weights cannot be honoured.* use dropout_rate=0"
WEIGHTS = "sow_weights=True cannot be honoured.* leave it False"
PRECISION = "precision='highest' cannot be honoured.* jax.default_matmul_precision"
EINSUMS = "qk_attn_weights_einsum .* cannot be honoured.* leave both classes None"

REFUSED = {
    "dense mask": (DENSE, {}, {"mask": np.ones((1, 1, T, T), bool)}),
    "dropout": (DROPOUT, {"dropout_rate": 0.5, "deterministic": False}, {}),
    "weights": (WEIGHTS, {}, {"sow_weights": True}),
    "precision": (PRECISION, {"precision": "highest"}, {}),
}


@pytest.mark.parametrize("what", REFUSED)
def test_nnx_is_refused(what):
    message, fields, arguments = REFUSED[what]
    ours = burst_jax.nnx.attention_fn(where())
    host = nnx.MultiHeadAttention(
        N, D, attention_fn=ours, rngs=nnx.Rngs(0), **{"decode": False, **fields}
    )
    with pytest.raises(ValueError, match=message):
        host(jnp.zeros((1, 24, D)), **arguments)


def test_decoding_with_a_cache_is_refused_by_both():
    x = jnp.zeros((1, 1, D), jnp.float32)
    host = nnx.MultiHeadAttention(
        N, D, attention_fn=burst_jax.nnx.attention_fn(where()), decode=True, rngs=nnx.Rngs(0)
    )
    host.init_cache((1, T, D))
    with pytest.raises(ValueError, match="decode with Flax's own attention"):
        host(x)
    host = linen.MultiHeadDotProductAttention(N, decode=True)
    variables = host.init(jax.random.key(0), jnp.zeros((1, T, D), jnp.float32))
    host = host.clone(attention_fn=burst_jax.linen.attention_fn(where()))
    with pytest.raises(ValueError, match="decode with Flax's own attention"):
        host.apply(variables, x, mutable=["cache"])


@pytest.mark.parametrize("what", [*REFUSED, "einsums"])
def test_linen_is_refused(what):
    einsums = {
        "qk_attn_weights_einsum_cls": lambda: jnp.einsum,
        "attn_weights_value_einsum_cls": lambda: jnp.einsum,
    }
    message, fields, arguments = {**REFUSED, "einsums": (EINSUMS, einsums, {})}[what]
    host = linen.MultiHeadDotProductAttention(
        N, attention_fn=burst_jax.linen.attention_fn(where()), **fields
    )
    rngs = {"params": jax.random.key(0), "dropout": jax.random.key(1)}
    with pytest.raises(ValueError, match=message):
        host.init(rngs, jnp.zeros((1, 24, D)), **arguments)


def test_a_sharding_of_jaxs_is_no_sharding_of_ours():
    sharding = jax.NamedSharding(jax.make_mesh((1,), ("sp",)), jax.P())
    for make in (burst_jax.nnx.attention_fn, burst_jax.linen.attention_fn):
        with pytest.raises((ValueError, TypeError), match="SequenceSharding"):
            make(sharding)
