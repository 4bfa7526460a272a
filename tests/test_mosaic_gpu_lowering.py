"""The Hopper tiles are lowered for a GPU by every release of jax that we support; none is needed.

Releases differ in what a kernel's trace holds, and in what their lowering takes of it: which is why
this runs in the plain suite of each of them, in and out of `shard_map`, with and without x64.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from gpu_cases import Case, made, of_each_row, start
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from burst_kernels import mosaic_gpu

CASES = (
    Case("no mask", t=200, s=200),
    Case("causal, grouped heads", t=256, s=256, N=4, K=2, H=128, Hv=128, right=0,
         q_positions=start(0), kv_positions=start(0)),
    Case("window, soft cap, float16, padded", t=130, s=75, H=40, Hv=80, left=60, right=4, cap=2.0,
         q_positions=start(64), kv_positions=start(0), dtype=jnp.float16),
    Case("documents of each row, wide heads", B=2, t=140, H=200, Hv=256, kinds=2,
         q_positions=of_each_row, kv_positions=of_each_row, left=90),
)  # fmt: skip


def both_passes(case: Case, onto: bool) -> tuple[Any, list[jax.ShapeDtypeStruct]]:
    """A function of all arrays that runs both tiles, and their shapes."""
    shaped = jax.ShapeDtypeStruct
    q, do = (shaped((case.B, case.N, case.t, h), case.dtype) for h in (case.H, case.Hv))
    k, v = (shaped((case.B, case.K, case.s, h), case.dtype) for h in (case.H, case.Hv))
    row = shaped((case.B, case.N, case.t), jnp.float32)
    tile, _ = made(case)
    marks = [
        field.name
        for field in dataclasses.fields(tile)
        if isinstance(getattr(tile, field.name), jax.Array)
    ]
    shapes = [shaped(getattr(tile, name).shape, jnp.int32) for name in marks]

    def run(q: Any, k: Any, v: Any, do: Any, row: Any, *given: Any) -> Any:
        own = dataclasses.replace(tile, **dict(zip(marks, given, strict=True)))
        wide = [x.astype(jnp.float32) for x in (do, q, k, v)]
        forward = mosaic_gpu.tile_forward(
            q, k, v, own, case.config, (wide[0], row) if onto else None
        )
        backward = mosaic_gpu.tile_backward(
            q, k, v, do, row, row, own, case.config, tuple(wide[1:]) if onto else None
        )
        return forward, backward

    return run, [q, k, v, do, row, *shapes]


@pytest.mark.parametrize(
    ("where", "x64"),
    [("on a device", False), ("on a mesh", False), ("in shard_map", False), ("in shard_map", True)],
)
@pytest.mark.parametrize("case", CASES, ids=str)
def test_both_tiles_are_lowered_for_a_gpu(case, where, x64):
    devices = 2 if where == "in shard_map" else 1
    mesh = jax.make_mesh(
        (devices,), ("sp",), devices=jax.devices("cpu")[:devices], axis_types=(AxisType.Auto,)
    )
    with jax.enable_x64(x64):
        run, shapes = both_passes(case, onto=case.cap is None)
        if where == "in shard_map":
            spec = PartitionSpec("sp")
            run = jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=True)
            shapes = [x.update(shape=(2 * x.shape[0], *x.shape[1:])) for x in shapes]
        if where == "on a mesh":
            shapes = [x.update(sharding=NamedSharding(mesh, PartitionSpec())) for x in shapes]
        lowered = jax.jit(run).trace(*shapes).lower(lowering_platforms=("cuda",))
    assert lowered.as_text().count("mosaic_gpu") >= 2
