"""Whole multi-chip programs, compiled by the real TPU compiler: what its schedule hides."""

import re

import jax
import jax.numpy as jnp
import pytest

import burst_jax as bj
from burst_jax import aot


def compiled(target: str, T: int, backward: str, kv_heads: int = 8) -> jax.stages.Compiled:
    """Forward and backward at 8 query heads of 128, bfloat16, zigzag causal."""
    mesh = aot.mesh_for(target)
    where = bj.SequenceSharding(mesh, layout="zigzag", length=T)
    spec = jax.NamedSharding(mesh, where.spec(4))
    q, k = (
        jax.ShapeDtypeStruct((1, T, heads, 128), jnp.bfloat16, sharding=spec)
        for heads in (8, kv_heads)
    )
    plan = bj.Plan(backward=backward)

    def gradients(q, k, v, do):
        def attention(q, k, v):
            return bj.burst_attention(q, k, v, sharding=where, mask=bj.Mask.causal(), plan=plan)

        return jax.vjp(attention, q, k, v)[1](do)

    return aot.compile_for(target, gradients, q, k, k, q)


@pytest.mark.aot
@pytest.mark.parametrize("backward", ["kv", "q"])
def test_on_eight_tpus_every_transfer_hides_behind_a_tile(backward):
    program = compiled("v5e:2x4", 128 * 1024, backward)
    assert "burst_backward" in program.as_text(), "the chip's own kernels"
    found = bj.inspect.overlap(program)
    assert found.exposed == 0, found.exposed_names
    assert found.hidden >= 10  # k, v forward; messages and gradients backward; loops count once
    if backward == "q":  # what is chosen at these heads
        assert bj.inspect.temporary_bytes(program) <= 640 * 2**20


@pytest.mark.aot
@pytest.mark.parametrize("target", ["v4:2x2x2", "v5p:2x2x2", "v6e:2x4", "tpu7x:2x2x1"])
def test_every_generation_compiles_the_ring_and_hides_its_transfers(target):
    program = compiled(target, 64 * 1024, "q")
    assert "burst_backward" in program.as_text()
    assert bj.inspect.overlap(program).exposed == 0


@pytest.mark.aot
@pytest.mark.parametrize(("few", "many"), [("v5p:2x2x2", "v5p:4x4x4"), ("v6e:2x4", "v6e:8x8")])
def test_code_and_memory_do_not_grow_from_eight_to_sixty_four_chips(few, many):
    """16K tokens a device: 128K on 8, 1M on 64."""
    programs = [compiled(few, 2**17, "q"), compiled(many, 2**20, "q")]
    sizes = [p.memory_analysis().generated_code_size_in_bytes for p in programs]
    assert sizes[1] <= 1.3 * sizes[0]
    held = [bj.inspect.temporary_bytes(p) for p in programs]
    assert held[1] <= 1.1 * held[0]
    if many.startswith("v5p"):  # libtpu makes the permutes of 8x8 chips synchronous
        assert bj.inspect.overlap(programs[1]).exposed == 0


@pytest.mark.aot
@pytest.mark.parametrize(("kv_heads", "side"), [(8, "q"), (2, "kv")])
def test_on_eight_h100_every_transfer_hides_behind_a_tile(kv_heads, side):
    program = compiled("h100:8", 128 * 1024, side, kv_heads)
    assert "mosaic_gpu" in program.as_text(), "the chip's own kernels"
    found = bj.inspect.overlap(program)
    assert found.exposed == 0, found.exposed_names
    assert found.hidden >= 6
    # The ring's message is read where it lies: what the kernels take is no copy of a part of it.
    assert not re.search(r"= bf16\[[\d,]*16384,128\]\S* slice\(", program.as_text())


@pytest.mark.aot
def test_on_four_nodes_of_eight_h100_too():
    program = compiled("h100:32", 256 * 1024, "q")
    assert "mosaic_gpu" in program.as_text()
    assert bj.inspect.overlap(program).exposed == 0


@pytest.mark.aot
def test_a_transfer_with_nothing_to_hide_behind_is_reported_as_exposed():
    mesh = aot.mesh_for("v5e:2x4")
    spec = jax.P("sp")
    x = jax.ShapeDtypeStruct((8 * 4096, 4096), jnp.bfloat16, sharding=jax.NamedSharding(mesh, spec))
    turn = [(i, (i + 1) % 8) for i in range(8)]
    bare = jax.shard_map(
        lambda x: jax.lax.ppermute(x, "sp", turn), mesh=mesh, in_specs=spec, out_specs=spec
    )
    found = bj.inspect.overlap(aot.compile_for("v5e:2x4", bare, x))
    assert (found.hidden, found.exposed) == (0, 1)


@pytest.mark.parametrize("target", ["v5e", "h100", "b17:8", "v5e:2*4", ""])
def test_a_target_that_does_not_exist_is_refused_with_examples(target):
    with pytest.raises(ValueError, match=r"v5e:2x4.*h100:8"):
        aot.parse_target(target)
