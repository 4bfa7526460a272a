"""`burst_jax.nnx.BurstAttention` and `burst_jax.linen.BurstAttention` against one oracle."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import burst_jax as bj
import burst_jax.linen
import burst_jax.nnx
from burst_jax import _rotary

D, T, R = 16, 22, 4  # 22 tokens on 4 devices: every layout pads
# These tests compile much and compute little.
QUICKLY = {"xla_backend_optimization_level": 0}
KINDS = pytest.mark.parametrize("kind", [AxisType.Auto, AxisType.Explicit], ids=lambda k: k.name)


def where(kind=AxisType.Explicit, shape=(R,), names=("sp",), **fields):
    mesh = jax.make_mesh(shape, names, axis_types=(kind,) * len(shape))
    return bj.SequenceSharding(mesh, **{"length": T, "layout": "zigzag", **fields})


def module_pair(sharding, **fields):
    """The same attention for nnx and for linen, and parameters for both: none of them 0 or 1."""
    fields = {"num_heads": 4, "sharding": sharding, "param_dtype": jnp.float64, **fields}
    ours = burst_jax.nnx.BurstAttention(D, rngs=nnx.Rngs(0), **fields)
    params = nnx.to_pure_dict(nnx.state(ours, nnx.Param))
    leaves, structure = jax.tree.flatten(params)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    leaves = [
        0.3 * jax.random.normal(key, x.shape, x.dtype) for key, x in zip(keys, leaves, strict=True)
    ]
    return ours, burst_jax.linen.BurstAttention(**fields), jax.tree.unflatten(structure, leaves)


def apply_nnx(module, params, x, **arguments):
    graph, state = nnx.split(module)
    nnx.replace_by_pure_dict(state, params)
    return nnx.merge(graph, state)(x, **arguments)


def apply_linen(module, params, x, **arguments):
    return module.apply({"params": params}, x, **arguments)


def oracle(params, x, *, mask=None, theta=1e4):
    """The same in natural order, in one piece, with rotations as complex numbers."""

    def project(name, equation, x):
        y = jnp.einsum(equation, x, params[name]["kernel"], precision="highest")
        return y + params[name]["bias"] if "bias" in params[name] else y

    def turned(name, x):
        if name in params:
            x = x / jnp.sqrt(jnp.mean(x**2, axis=-1, keepdims=True) + 1e-6)
            x = x * params[name]["scale"]
        if theta is None:
            return x
        half = x.shape[-1] // 2
        turn = np.exp(1j * np.arange(x.shape[1])[:, None] * theta ** (-np.arange(half) / half))
        z = (x[..., :half] + 1j * x[..., half:]) * turn[:, None, :]
        return jnp.concatenate((z.real, z.imag), axis=-1)

    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        q, k, v = (project(name, "btd,dnh->btnh", x) for name in ("query", "key", "value"))
        q, k = turned("query_norm", q), turned("key_norm", k)
        mask = bj.Mask.causal() if mask is None else mask
        return project("out", "btnh,nhd->btd", bj.reference.attention(q, k, v, mask=mask))


def tokens(dtype=np.float64, seed=2):
    return np.random.default_rng(seed).normal(size=(2, T, D)).astype(dtype)


def close(a, b, tolerance):
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=tolerance), a, b)


CASES = {
    "as_it_comes": (AxisType.Explicit, "zigzag", {}),
    "grouped_normed_biased": (
        AxisType.Auto,
        "striped",
        {"num_kv_heads": 2, "head_dim": 6, "qk_norm": True, "use_bias": True, "rope_theta": 500.0},
    ),
    "one_kv_head_windowed_without_rotary": (
        AxisType.Explicit,
        "contiguous",
        {"num_kv_heads": 1, "rope_theta": None, "mask": bj.Mask.sliding_window(5, 2)},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_both_modules_match_the_oracle(case):
    kind, layout, fields = CASES[case]
    sharding = where(kind, layout=layout)
    ours, theirs, params = module_pair(sharding, **fields)
    x = tokens()
    truth = oracle(params, x, mask=fields.get("mask"), theta=fields.get("rope_theta", 1e4))
    for apply, module in ((apply_nnx, ours), (apply_linen, theirs)):
        run = jax.jit(lambda p, x: apply(module, p, x), compiler_options=QUICKLY)  # noqa: B023
        out = run(params, sharding.place(x))
        assert out.sharding.is_equivalent_to(NamedSharding(sharding.mesh, sharding.spec(3)), 3)
        close(sharding.restore(out), truth, 1e-10)


def test_linen_and_nnx_name_and_shape_their_parameters_alike():
    ours, theirs, params = module_pair(where(), num_kv_heads=2, qk_norm=True, use_bias=True)
    x = jnp.zeros((1, 24, D), jnp.float64)
    made = jax.eval_shape(theirs.init, jax.random.key(0), x)["params"]
    assert jax.tree.map(jnp.shape, made) == jax.tree.map(jnp.shape, params)
    assert params["query"]["kernel"].shape == (D, 4, 4)
    assert params["out"]["kernel"].shape == (4, 4, D)


def test_outside_jit_and_with_plain_arrays_the_numbers_are_the_same():
    """Contiguous arrays need not be placed; T = 22 is padded inside."""
    for kind in (AxisType.Auto, AxisType.Explicit):
        sharding = where(kind, layout="contiguous", length=None)
        ours, _, params = module_pair(sharding)
        close(apply_nnx(ours, params, jnp.asarray(tokens())), oracle(params, tokens()), 1e-10)


def test_gradients_through_a_scan_over_rematerialised_layers_match_a_loop_over_the_oracle():
    sharding = where()

    @nnx.split_rngs(splits=2)
    @nnx.vmap
    def stacked(rngs):
        return burst_jax.nnx.BurstAttention(
            D, num_heads=4, sharding=sharding, param_dtype=jnp.float64, rngs=rngs
        )

    graph, layers = nnx.split(stacked(nnx.Rngs(0)))
    x, do = tokens(), tokens(seed=3)

    def scanned(layers, x, do):
        def layer(x, params):
            return x + nnx.merge(graph, params)(x), None

        policy = jax.checkpoint_policies.save_only_these_names("burst_out", "burst_lse")
        x, _ = jax.lax.scan(jax.checkpoint(layer, policy=policy, prevent_cse=False), x, layers)
        return (x * do).sum()

    def looped(params, x, do):
        for i in range(2):
            x = x + oracle(jax.tree.map(lambda leaf: leaf[i], params), x)  # noqa: B023
        return (x * do).sum()

    run = jax.jit(jax.value_and_grad(scanned, argnums=(0, 1)), compiler_options=QUICKLY)
    loss, (d_layers, dx) = run(layers, sharding.place(x), sharding.place(do))
    truth, (d_params, dx_truth) = jax.value_and_grad(looped, argnums=(0, 1))(
        nnx.to_pure_dict(layers), jnp.asarray(x), do
    )
    close((loss, sharding.restore(dx)), (truth, dx_truth), 1e-9)
    close(nnx.to_pure_dict(d_layers), d_params, 1e-9)


def test_a_scan_over_layers_takes_no_part_of_the_ring_out_of_its_loop():
    """Two programs for a device, forward and backward; no third that makes masks beforehand."""
    sharding = where()

    def layers(x):
        def layer(x, _):
            return x + bj.burst_attention(x, x, x, sharding=sharding, mask=bj.Mask.causal()), None

        return (jax.lax.scan(layer, x, length=2)[0] ** 2).sum()

    x = sharding.place(tokens().reshape(2, T, 4, 4))
    program = jax.jit(jax.grad(layers)).lower(x).as_text()
    assert program.count("sdy.manual_computation(") == 2


def stored(params, mesh, how):
    """Parameters on one device, or kernels spread over the heads' devices, or over the batch's."""

    def put(path, x):
        layer, kind = (key.key for key in path)
        if kind != "kernel" or how == "one device":
            return x
        heads = ("tp", None, "dp") if layer == "out" else ("dp", "tp", None)
        axes = [axis if axis == "tp" or how == "heads and batch" else None for axis in heads]
        return jax.device_put(x, NamedSharding(mesh, PartitionSpec(*axes)))

    return jax.tree_util.tree_map_with_path(put, params)


@KINDS
@pytest.mark.parametrize("how", ["one device", "heads", "heads and batch"])
def test_heads_and_batch_may_be_sharded_too_and_gradients_lie_as_their_parameters_do(kind, how):
    sharding = where(kind, (2, 2, 2), ("dp", "sp", "tp"), batch_axis="dp", head_axis="tp")
    fields = {"num_kv_heads": 2, "qk_norm": True, "use_bias": True}
    ours, theirs, params = module_pair(sharding, **fields)
    apply, module = (apply_nnx, ours) if how != "heads" else (apply_linen, theirs)
    x, do = tokens(), tokens(seed=3)
    params = stored(params, sharding.mesh, how)

    def loss(params, x, do):
        return (apply(module, params, x) * do).sum()

    run = jax.jit(jax.grad(loss, argnums=(0, 1)), compiler_options=QUICKLY)
    d_params, dx = run(params, sharding.place(x), sharding.place(do))
    truth = jax.grad(lambda p, x: (oracle(p, x) * do).sum(), argnums=(0, 1))(
        jax.device_get(params), jnp.asarray(x)
    )
    close((d_params, sharding.restore(dx)), truth, 1e-9)
    if kind == AxisType.Explicit and how != "one device":
        kernels = ((params[name]["kernel"], d_params[name]["kernel"]) for name in ("query", "out"))
        assert all(p.sharding.is_equivalent_to(d.sharding, 3) for p, d in kernels)


@pytest.mark.parametrize("param_dtype", [jnp.float32, jnp.bfloat16])
def test_in_bfloat16_norm_and_rotation_are_computed_in_float32(param_dtype):
    """And nothing is promoted by accident: promotion is strict in this suite."""
    sharding = where()
    ours, theirs, params = module_pair(
        sharding, param_dtype=param_dtype, dtype=jnp.bfloat16, qk_norm=True
    )
    x = tokens(np.float32)
    truth = np.asarray(oracle(params, x.astype(np.float64)), np.float64)
    outs = []
    for apply, module in ((apply_nnx, ours), (apply_linen, theirs)):
        run = jax.jit(lambda p, x: apply(module, p, x), compiler_options=QUICKLY)  # noqa: B023
        out = run(params, sharding.place(x))
        assert out.dtype == jnp.bfloat16
        outs.append(np.asarray(sharding.restore(out), np.float64))
        # Four roundings to 8 bits between x and out, of numbers about as large as the largest.
        assert np.abs(outs[-1] - truth).max() <= 4 * 2.0**-8 * np.abs(truth).max()
    np.testing.assert_array_equal(*outs)


def test_a_call_may_add_a_mask_and_its_own_positions():
    """Two packed documents whose positions start anew: as if each were alone."""
    sharding = where(layout="striped")
    ours, theirs, params = module_pair(sharding)
    x = tokens()
    ids = sharding.place(np.arange(T) // 11, axis=0, pad_value=-1)
    positions = sharding.place(np.arange(T) % 11 + 5, axis=0, pad_value=-1)
    truth = np.concatenate([oracle(params, x[:, :11]), oracle(params, x[:, 11:])], axis=1)
    for apply, module in ((apply_nnx, ours), (apply_linen, theirs)):
        run = jax.jit(
            lambda p, x, ids, at: apply(module, p, x, mask=bj.Mask.segments(ids), positions=at),  # noqa: B023
            compiler_options=QUICKLY,
        )
        out = run(params, sharding.place(x), ids, positions)
        close(sharding.restore(out), truth, 1e-10)


def test_angles_in_float32_are_right_a_million_tokens_away():
    at = np.array([[0, 1, 2047, 2048, 131_071, 1_048_575, -1]])
    cos, sin = _rotary.rotation(jnp.asarray(at, jnp.int32), 64, 1e4, jnp.float32)
    angle = at[:, :, None, None] * 1e4 ** (-np.arange(0, 64, 2) / 64)[None, None, None]
    assert cos.dtype == jnp.float32
    close((cos, sin), (np.cos(angle), np.sin(angle)), 1e-3)
    near = at[0] < 2048
    close((cos[:, near], sin[:, near]), (np.cos(angle[:, near]), np.sin(angle[:, near])), 2e-4)


def test_the_layouts_positions_are_those_of_the_sharding():
    from burst_jax import _flax

    for layout in ("contiguous", "zigzag", "striped"):
        sharding = where(layout=layout)
        at = _flax.layout_positions(sharding, sharding.padded_length)
        np.testing.assert_array_equal(at[0], sharding.positions())


def test_two_modules_alike_share_one_program():
    sharding = where()
    graphs = [nnx.split(module_pair(sharding, qk_norm=True)[0])[0] for _ in range(2)]
    assert graphs[0] == graphs[1] and hash(graphs[0]) == hash(graphs[1])


REFUSED = {
    "num_heads=4 is not a multiple of num_kv_heads=3": {"num_kv_heads": 3},
    "in_features=16 is not divided by num_heads=5": {"num_heads": 5},
    "num_kv_heads=0 must be at least 1": {"num_kv_heads": 0},
    "head_dim=5 is odd, and rotary embedding rotates pairs": {"head_dim": 5},
    "rope_theta=-1.0 must be a finite number > 0": {"rope_theta": -1.0},
}


@pytest.mark.parametrize("message", REFUSED)
def test_sizes_and_masks_that_cannot_be_are_refused(message):
    with pytest.raises(ValueError, match=message):
        module_pair(where(), **REFUSED[message])
    theirs = burst_jax.linen.BurstAttention(
        **{"num_heads": 4, "sharding": where(), **REFUSED[message]}
    )
    with pytest.raises(ValueError, match=message):
        theirs.init(jax.random.key(0), jnp.zeros((1, T, D), jnp.float32))


def test_inputs_that_cannot_be_are_refused():
    ours, _, _ = module_pair(where(layout="contiguous"))
    with pytest.raises(ValueError, match=r"\[B, T, D\] with D = in_features = 16"):
        ours(jnp.zeros((1, T, D + 1), jnp.float64))
    with pytest.raises(ValueError, match="positions has shape"):
        ours(jnp.zeros((1, T, D), jnp.float64), positions=jnp.arange(T - 1))
    with pytest.raises(ValueError, match="the mask of a module holds segment ids"):
        module_pair(where(), mask=bj.Mask.segments(jnp.zeros(T, jnp.int32)))
