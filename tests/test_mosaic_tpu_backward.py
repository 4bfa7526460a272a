"""The TPU backward kernels, run by Pallas's interpreter, against gradients written out in NumPy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import AxisType, PartitionSpec
from test_tile_contract import CASES, Case, made, start

from burst_kernels import Problem, Tile, TileConfig, mosaic_tpu, xla
from burst_kernels.mosaic_tpu import _accumulate, _backward
from burst_kernels.mosaic_tpu._config import vmem_limit
from burst_kernels.mosaic_tpu._config_backward import configure_backward, vmem_bytes_backward
from workbench import tpu_programs

pytestmark = pytest.mark.kernel

CHIP = TileConfig(chip="v5e", interpret=True)
FUSED = dataclasses.replace(CHIP, block_q=128, block_kv=128, fused_backward=True)
SPLIT = dataclasses.replace(FUSED, fused_backward=False)
NAMES = ("dq", "dk", "dv")


def arguments(case: Case, dtype: Any = np.float32) -> tuple[Any, tuple, np.ndarray]:
    """The tile; q, k, v, do, and lse and delta of rows that see more keys; which pairs count."""
    tile, seen = made(case)
    x = oracle.inputs(
        case.name, T=case.t, S=case.s, B=case.B, N=case.N, K=case.K, H=case.H, Hv=case.Hv,
        dtype=dtype,
    )  # fmt: skip
    rng = oracle.generator(case.name + " elsewhere")
    lse = oracle.dense(x, seen, scale=case.scale, logits_soft_cap=case.cap).lse
    lse = np.logaddexp(lse, rng.normal(size=lse.shape)).astype(np.float32)
    lse[:, 0] = -np.inf
    delta = rng.normal(size=lse.shape).astype(np.float32)
    return tile, (x.q, x.k, x.v, x.do, lse, delta), seen


def truth(case: Case, args: tuple, seen: np.ndarray) -> tuple:
    wide = (np.asarray(a, np.float64) for a in args)
    return oracle.dense_tile_gradients(*wide, seen, scale=case.scale, logits_soft_cap=case.cap)


def turned(x: Any) -> Any:
    return jax.tree.map(lambda a: jnp.asarray(a).swapaxes(1, 2), x)


def backward(args: tuple, tile: Any, config: TileConfig, onto: tuple | None = None) -> tuple:
    run = jax.jit(mosaic_tpu.tile_backward, static_argnames="config")
    return tuple(
        np.asarray(a.swapaxes(1, 2)) for a in run(*turned(args), tile, config, turned(onto))
    )


def long(case: Case) -> Case:
    """The same case over several blocks of 128, none of which is whole."""
    return dataclasses.replace(case, t=case.t * 25, s=case.s * 25, config=None)


def case_of(name: str) -> Case:
    return next(case for case in CASES if case.name == name)


SHORT = [case for case in CASES if case.t < 1000]
OFTEN = (
    "blocks do not divide, nothing is masked",
    "window to both sides",
    "segments of each row, two kinds",
    "eight query heads to a kv head",
    "wider values",
    "soft cap",
    "keys are all padding",
)


@pytest.mark.parametrize("case", [long(case) for case in SHORT], ids=str)
def test_the_fused_kernel_gives_a_tiles_share_of_the_gradients(case):
    check(case, FUSED)


@pytest.mark.parametrize("case", [long(case_of(name)) for name in OFTEN], ids=str)
def test_the_two_kernels_give_the_same(case):
    check(case, SPLIT)


@pytest.mark.parametrize("name", ["one query, many keys", "causal, blocks do not divide"])
def test_blocks_are_chosen_where_none_are_given(name):
    check(dataclasses.replace(case_of(name), config=None), CHIP)


def check(case: Case, config: TileConfig) -> None:
    tile, args, seen = arguments(case)
    got = backward(args, tile, config)
    for name, a, b in zip(NAMES, got, truth(case, args, seen), strict=True):
        assert a.dtype == np.float32
        assert oracle.error(a, b) < 1e-5, name
    assert not got[0][:, 0].any()


@pytest.mark.parametrize("config", [FUSED, SPLIT], ids=["fused", "split"])
@pytest.mark.parametrize("some", [(0, 1, 2), (0,), (1, 2), (2,)], ids=str)
def test_gradients_are_added_to_those_that_are_given_also_where_no_pair_counts(some, config):
    # The first 200 queries see no key, and so does a whole block; the last keys are seen by none.
    case = Case("onto", t=300, s=301, q_positions=start(0), kv_positions=start(200), right=0, B=1)
    tile, args, seen = arguments(case)
    given = tuple(
        oracle.generator(n).normal(size=a.shape) for n, a in zip(NAMES, args, strict=False)
    )
    onto = tuple(a.astype(np.float32) if i in some else None for i, a in enumerate(given))
    got = backward(args, tile, config, onto)
    for i, (a, b) in enumerate(zip(got, truth(case, args, seen), strict=True)):
        assert oracle.error(a, b + given[i] if i in some else b) < 1e-5, NAMES[i]


@pytest.mark.parametrize("t, N, K", [(256, 2, 2), (100, 2, 2), (128, 2, 1), (200, 3, 1)], ids=str)
@pytest.mark.parametrize("mode", ["on_wait", "eager"])
def test_no_block_of_dq_is_read_while_it_is_written(t, N, K, mode, capfd):
    # Few blocks of queries, so that a block comes back in the next step, or in the one after it.
    case = Case("races", t=t, s=384, B=1, N=N, K=K)
    tile, args, seen = arguments(case)
    two_cores = pltpu.InterpretParams(
        detect_races=True, num_cores_or_threads=2, dma_execution_mode=mode
    )
    with pltpu.force_tpu_interpret_mode(two_cores):
        got = backward(args, tile, FUSED)
    assert "RACE DETECTED" not in capfd.readouterr().out
    for name, a, b in zip(NAMES, got, truth(case, args, seen), strict=True):
        assert oracle.error(a, b) < 1e-5, name


def test_a_race_would_be_seen(monkeypatch, capfd):
    def nothing(self, buffer, visit):
        return jnp.bool_(False)

    monkeypatch.setattr(_accumulate.Accumulator, "_writes", nothing)
    tile, args, _ = arguments(Case("races", t=256, s=384, B=1))
    with pltpu.force_tpu_interpret_mode(pltpu.InterpretParams(detect_races=True)):
        backward(args, tile, FUSED)
    assert "RACE DETECTED" in capfd.readouterr().out


@pytest.mark.parametrize("config", [FUSED, SPLIT], ids=["fused", "split"])
def test_it_stands_inside_a_mesh_that_checks_what_varies(config):
    case = dataclasses.replace(long(case_of("causal, blocks do not divide")), B=2)
    tile, args, seen = arguments(case)
    kinds = (AxisType.Auto,)
    mesh = jax.make_mesh((2,), ("b",), axis_types=kinds, devices=jax.devices()[:2])
    rows = PartitionSpec("b")

    def run(*arrays):
        here = jax.tree.map(lambda x: jax.lax.pcast(x, ("b",), to="varying"), tile)
        return mosaic_tpu.tile_backward(*arrays, here, config)

    mapped = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=(rows,) * 6, out_specs=(rows,) * 3))
    for name, a, b in zip(
        NAMES, turned(mapped(*turned(args))), truth(case, args, seen), strict=True
    ):
        assert oracle.error(a, b) < 1e-5, name


@pytest.mark.parametrize("config", [FUSED, SPLIT], ids=["fused", "split"])
def test_bfloat16_errs_no_more_than_twice_what_the_tile_in_plain_jax_does(config):
    case = Case("narrow", t=256, s=384, N=4, K=1, H=64, Hv=32, scale=0.125, q_positions=start(128),
                kv_positions=start(0), right=0)  # fmt: skip
    tile, args, seen = arguments(case, jnp.bfloat16)
    plain = turned(jax.jit(xla.tile_backward)(*turned(args), tile))
    want = truth(case, args, seen)
    for name, a, b, true in zip(NAMES, backward(args, tile, config), plain, want, strict=True):
        assert oracle.norm_error(a, true) < 2 * oracle.norm_error(b, true), name


def test_lists_that_overflow_scalar_memory_are_walked_by_sequence(monkeypatch):
    monkeypatch.setattr(_backward, "MAX_STEPS", 5)
    case = long(case_of("positions of each row"))
    tile, args, seen = arguments(case)
    given = tuple(np.ones_like(a, np.float32) for a in args[:3])
    got = backward(args, tile, FUSED, given)
    for name, a, b in zip(NAMES, got, truth(case, args, seen), strict=True):
        assert oracle.error(a, b + 1) < 1e-5, name


@pytest.mark.aot
def test_last_blocks_of_any_length_and_width_compile():
    config = TileConfig(chip="v5e", fused_backward=True)
    for t, H in ((999, 192), (13, 80), (1030, 256)):
        q, k, row = (jax.ShapeDtypeStruct((1, 2, *n), jnp.float32) for n in ((t, H), (70, H), (t,)))
        args = tpu_programs.on_one("v5e", q, k, k, q, row, row)

        def run(*arrays):
            return mosaic_tpu.tile_backward(*arrays, Tile(scale=0.1), config, arrays[:3])

        assert "tpu_custom_call" in jax.jit(run).lower(*args).compile().as_text()


# What is chosen, and what does not fit.

PROBLEM = Problem(B=1, t=16384, s=16384, N=8, K=8, H=128, Hv=128, dtype=jnp.bfloat16, masked=True)


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_head_dims_that_are_common_get_the_fused_kernel_and_long_blocks(chip):
    for H in (64, 80, 96, 128, 192, 256):
        for dtype in (jnp.bfloat16, jnp.float32):
            problem = PROBLEM._replace(H=H, Hv=H, dtype=dtype)
            config = configure_backward(problem, chip, TileConfig())
            assert config.fused_backward and config.block_kv_backward >= 512
            assert vmem_bytes_backward(problem, config) <= vmem_limit(chip)
    assert configure_backward(PROBLEM, chip, TileConfig()).block_q_backward == 1024


def test_what_no_fused_kernel_fits_gets_two():
    problem = PROBLEM._replace(H=512, Hv=512, dtype=jnp.float32)
    assert configure_backward(problem, "v4", TileConfig()).fused_backward is False


def test_few_keys_in_a_block_get_two_kernels_unless_they_are_all():
    few = TileConfig(block_kv_backward=128)
    assert configure_backward(PROBLEM, "v5e", few).fused_backward is False
    assert configure_backward(PROBLEM._replace(s=100), "v5e", few).fused_backward is True
    asked = dataclasses.replace(few, fused_backward=True)
    assert configure_backward(PROBLEM, "v5e", asked).fused_backward is True


def test_the_backward_follows_the_blocks_of_the_forward_where_they_are_given():
    config = configure_backward(PROBLEM, "v5e", TileConfig(block_q=256, block_kv=512))
    assert (config.block_q_backward, config.block_kv_backward) == (256, 512)
    config = configure_backward(PROBLEM, "v5e", TileConfig(block_q=256, block_q_backward=384))
    assert config.block_q_backward == 384
    assert configure_backward(PROBLEM, "v5e", config) == config


def test_blocks_that_do_not_fit_are_refused_with_some_that_do():
    large = TileConfig(block_q_backward=4096, block_kv_backward=4096)
    with pytest.raises(ValueError, match=r"MiB on v4: TileConfig\(block_q_backward=1024") as error:
        configure_backward(PROBLEM, "v4", large)
    assert "block_q=4096, block_kv=4096" in str(error.value)


@pytest.mark.parametrize("field", ["block_q_backward", "block_kv_backward"])
def test_blocks_are_multiples_of_the_lanes(field):
    with pytest.raises(ValueError, match=rf"{field}=100 is no multiple of 128.*128 would do"):
        configure_backward(PROBLEM, "v5e", TileConfig(**{field: 100}))


def test_more_pairs_than_scalar_memory_lists_are_refused():
    small = TileConfig(block_q_backward=128, block_kv_backward=128)
    with pytest.raises(ValueError, match=r"1048576 pairs.*larger blocks would do"):
        configure_backward(PROBLEM._replace(t=2**17, s=2**17), "v5e", small)
