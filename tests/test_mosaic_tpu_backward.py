"""The TPU backward kernels, run by Pallas's interpreter, against gradients written out in NumPy."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.experimental.pallas import tpu as pltpu
from jax.sharding import PartitionSpec
from test_tile_contract import CASES, Case, made, start

from burst_kernels import TileConfig, mosaic_tpu, xla
from burst_kernels.mosaic_tpu import _accumulate

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
    # The last queries see no key and the last keys are seen by none: blocks without any step.
    case = Case("onto", t=300, s=301, q_positions=start(0), kv_positions=start(200), right=0, B=1)
    if 0 in some:
        case = dataclasses.replace(case, kv_positions=start(0), q_positions=start(0, -1), left=0)
        case = dataclasses.replace(case, q_positions=start(0), left=None)
    tile, args, seen = arguments(case)
    given = tuple(
        oracle.generator(n).normal(size=a.shape) for n, a in zip(NAMES, args, strict=False)
    )
    onto = tuple(a.astype(np.float32) if i in some else None for i, a in enumerate(given))
    got = backward(args, tile, config, onto)
    for i, (a, b) in enumerate(zip(got, truth(case, args, seen), strict=True)):
        assert oracle.error(a, b + given[i] if i in some else b) < 1e-5, NAMES[i]
