"""The ring with the kernels of chips that are not here: interpreted on CPU, against the oracle.

Tile tests hold each kernel to the contract; here the kernel stands where users have it, in
`burst_attention`, inside a shard_map that checks which axes arrays vary over.
"""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

import burst_jax as bj
import burst_kernels
from burst_kernels import Chip, Problem, TileConfig
from burst_kernels.mosaic_tpu._winners import WINNERS

INTERPRETED = TileConfig(interpret=True, chip="v5e")


def ring_on_chip(x: oracle.Inputs, where: bj.SequenceSharding, side: str, **kwargs):
    plan = bj.Plan(forward=side, backward=side, tile=INTERPRETED)
    return oracle.sharded(x, where, plan=plan, implementation="mosaic_tpu", **kwargs)


OTHERS = [("zigzag", "q"), ("contiguous", "kv"), ("contiguous", "q")]


@pytest.mark.parametrize(
    ("layout", "side"),
    [("zigzag", "kv"), *(pytest.param(*x, marks=pytest.mark.kernel) for x in OTHERS)],
)
def test_a_ring_of_tpu_tiles_is_attention(layout, side):
    x = oracle.inputs(f"{layout} {side}", T=500, B=1, N=4, K=2, H=64, dtype=np.float32)
    where = oracle.ring(2, layout, length=500)
    got = ring_on_chip(x, where, side, mask=bj.Mask.causal())
    oracle.assert_close(got, oracle.truth(x, mask=bj.Mask.causal()), 1e-5)


def test_a_ring_of_tpu_tiles_takes_documents_sinks_a_soft_cap_and_bfloat16():
    x = oracle.inputs("all at once", T=384, B=2, N=4, K=1, H=64, Hv=128, sinks=True)
    x = oracle.in_dtype(x, jnp.bfloat16)._replace(dlse=np.zeros(x.dlse.shape, np.float32))
    where = oracle.ring(3, "striped", length=384)
    mask, placed = (
        oracle.MASKS["causal & segments"](lay, 2, 384, 384) for lay in (jnp.asarray, where.place)
    )
    options = dict(logits_soft_cap=5.0, scale=0.2)
    want = oracle.truth(x, mask=mask, **options)
    got = ring_on_chip(x, where, "kv", mask=placed, **options)
    plain = oracle.sharded(x, where, mask=placed, implementation="xla", **options)
    for name, a, b, truth in zip(oracle.Results._fields, got, plain, want, strict=True):
        ours, theirs = oracle.norm_error(a, truth), oracle.norm_error(b, truth)
        assert ours <= 2 * theirs + 1e-6, (name, ours, theirs)


# Who computes what.

PROBLEM = Problem(B=1, t=256, s=256, N=4, K=2, H=128, Hv=128, dtype=jnp.dtype(jnp.bfloat16))


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
def test_tpus_take_their_own_kernels_first(chip):
    chosen = burst_kernels.select(PROBLEM, burst_kernels.chip_named(chip))
    assert chosen.name == "mosaic_tpu"
    assert chosen.config.chip == chip
    hash(chosen)


def test_what_the_kernels_refuse_falls_to_xla_or_is_refused_with_the_reason():
    chip = burst_kernels.chip_named("v5e")
    wide = PROBLEM._replace(dtype=jnp.dtype(jnp.float64))
    assert burst_kernels.select(wide, chip).name == "xla"
    with pytest.raises(ValueError, match=r"'mosaic_tpu' cannot compute this on 'v5e'.*float64"):
        burst_kernels.select(wide, chip, "mosaic_tpu")


@pytest.mark.parametrize("chip", ["v4", "v5e", "v5p", "v6e", "tpu7x"])
@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
@pytest.mark.parametrize("heads", [(8, 64), (128, 128), (192, 256)])
@pytest.mark.parametrize("tokens", [(2**16, 2**20), (2**18, 2**18), (2**20, 2**20), (1, 7)])
def test_nobody_who_gave_no_block_sizes_is_told_that_they_do_not_fit(chip, dtype, heads, tokens):
    (t, s), (H, Hv) = tokens, heads
    problem = PROBLEM._replace(t=t, s=s, H=H, Hv=Hv, dtype=jnp.dtype(dtype))
    assert burst_kernels.select(problem, burst_kernels.chip_named(chip)).name in (
        "xla",
        "mosaic_tpu",
    )


def test_a_kernel_of_another_chip_is_refused_here_with_the_reason():
    where = oracle.ring(2)
    x = jnp.zeros((1, 4, 2, 8), jnp.float32)
    with pytest.raises(ValueError, match=r"'mosaic_tpu' cannot compute this on 'cpu': it is for"):
        bj.burst_attention(x, x, x, sharding=where, implementation="mosaic_tpu")
    for tile, implementation, message in (
        (TileConfig(interpret=True), "xla", r"'xla'.*interpret=True\) means nothing"),
        (TileConfig(interpret=True), None, r"mosaic_tpu: it is for TPUs.*chip=\.\.\.\) names"),
        (TileConfig(chip="v5e"), None, r"chip='v5e'\), but the mesh is made of 'cpu'"),
    ):
        with pytest.raises(ValueError, match=message):
            plan = bj.Plan(tile=tile)
            bj.burst_attention(x, x, x, sharding=where, plan=plan, implementation=implementation)


@pytest.mark.parametrize(
    ("chip", "field", "value"),
    [("v5e", "kv_heads", 2), ("v5e", "stages_backward", 2), ("sm_90", "kv_heads", 2),
     ("sm_90", "fused_backward", True), ("cpu", "block_compute", 128)],
)  # fmt: skip
def test_a_field_that_the_chosen_tiles_do_not_know_is_refused(chip, field, value):
    config = TileConfig(**{field: value})
    with pytest.raises(ValueError, match=rf"TileConfig\.{field} means nothing to.*block_q"):
        burst_kernels.select(PROBLEM, burst_kernels.chip_named(chip), None, config)


@pytest.mark.parametrize(("chip", "kind"), WINNERS)
def test_long_shards_are_cut_into_the_blocks_that_won(chip, kind):
    problem = PROBLEM._replace(t=2**14, s=2**14)
    config = burst_kernels.select(problem, burst_kernels.chip_named(chip)).config
    won = WINNERS[chip, kind]
    assert {name: getattr(config, name) for name in won} == won


def test_a_tpu_that_is_not_known_runs_the_xla_tile():
    chip = burst_kernels.chip_of("tpu", "TPU v9")
    assert burst_kernels.select(PROBLEM, chip).name == "xla"
    with pytest.raises(ValueError, match=r"TPU v9 is another"):
        burst_kernels.select(PROBLEM, chip, "mosaic_tpu")


@pytest.mark.parametrize(
    ("device", "name"),
    [
        (("tpu", "TPU v5 lite"), "v5e"),
        (("tpu", "TPU v5"), "v5p"),
        (("tpu", "TPU7x"), "tpu7x"),
        (("gpu", "NVIDIA H100 80GB HBM3"), "sm_90"),
        (("cuda", "NVIDIA H200"), "sm_90"),
        (("gpu", "NVIDIA H20"), "sm_90"),
        (("gpu", "Tesla T4"), "sm_75"),
        (("gpu", "NVIDIA A100-SXM4-80GB"), "sm_80"),
        (("gpu", "NVIDIA L4"), "sm_89"),
        (("gpu", "NVIDIA GB200"), "sm_100"),
        (("gpu", "NVIDIA RTX 2000 Ada Generation"), "sm_89"),
        (("gpu", "NVIDIA TITAN RTX"), "sm_75"),
        (("gpu", "NVIDIA GeForce RTX 2080 Ti"), "sm_75"),
        (("gpu", "NVIDIA RTX A4000"), "sm_86"),
        (("gpu", "NVIDIA B100"), "sm_100"),
        (("gpu", "NVIDIA GB10"), "sm_121"),
        (("gpu", "NVIDIA Thor"), "sm_110"),
        (("gpu", "Orin"), "sm_87"),
        (("gpu", "whatever", "9.0"), "sm_90"),
        (("cpu", "cpu"), "cpu"),
    ],
)
def test_chips_are_known_by_what_jax_calls_them(device, name):
    assert burst_kernels.chip_of(*device).name == name


def test_a_chip_without_a_name_is_refused_by_name():
    with pytest.raises(ValueError, match=r"chip='v3' is not known; choose one of cpu, v4"):
        TileConfig(chip="v3")
    assert burst_kernels.chip_at_hand() == Chip("cpu", "cpu")
    assert jax.default_backend() == "cpu"
