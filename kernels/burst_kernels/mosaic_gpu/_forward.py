"""Forward tile on Hopper: FlashAttention-3 (arXiv 2407.08608, Alg. 2) in Pallas Mosaic GPU.

One CTA computes `block_q` queries of one head with three warpgroups that share two rings of
`stages` buffers, one for k and one for v:

    load   (1 warpgroup, few registers)      attend   (2 warpgroups, block_q / 2 rows each)
    for each active block n of keys:         for each active block n of keys:
      wait   k_free[n]                         wait    k_ready[n], the own turn
      TMA    k -> ring, signals k_ready[n]     start   scores = q k[n]^T        (wgmma)
      wait   v_free[n]                         start   out += p v[n - 1]        (wgmma)
      TMA    v -> ring, signals v_ready[n]     signal  the other's turn
                                               wait    scores; signal k_free[n]
                                               softmax of the scores: new p, and what shrinks out
                                               wait    v_ready[n]
                                               wait    out; signal v_free[n - 1]
                                             out, lse: registers -> global memory

So the softmax of a block overlaps with the values of the one before it, and, since the attending
warpgroups take turns at starting products, with both products of the other warpgroup. The first
block has no values to multiply, the last block's are multiplied after the loop. A ring's n is taken
modulo `stages`, at least 2: v[n] is waited for while v[n - 1] is in use. That wait stands where it
does, a product early, because compilers move no exponentials past it: without it they made them
after the values' product, not under it (`workbench.gpu_report` counts them).

We differ in that the blocks come from a list (`_active`), first those without a mask, so that no
mask known only as data costs what its EMPTY blocks would; and in that the softmax starts from what
the ring has found before.
"""

import functools
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float

from burst_kernels._active import block_mask, whole
from burst_kernels._chips import chip_at_hand
from burst_kernels._config import TileConfig
from burst_kernels._tile import Tile
from burst_kernels.mosaic_gpu._attend import Forward, Refs, attend
from burst_kernels.mosaic_gpu._config import ATTENDING, blocks_of, configure, problem_of, refuses
from burst_kernels.mosaic_gpu._memory import apart, scalar, together, varying_as
from burst_kernels.mosaic_gpu._scores import Scores

# Registers of a thread, of 65536 / 384 = 168 each as launched: what FlashAttention-3 gives them.
_REGISTERS_ATTEND, _REGISTERS_LOAD = 240, 24

# Rows that TMA takes together, see `_scratch`; an array's tokens must be a multiple of them.
_TILE = 8


def tile_forward(
    q: Float[Array, "B N t H"],
    k: Float[Array, "B K s H"] | Float[Array, "2 B K s H"],
    v: Float[Array, "B K s Hv"] | None,
    tile: Tile,
    config: TileConfig | None = None,
    onto: tuple[Float[Array, "B N t Hv"], Float[Array, "B N t"]] | None = None,
) -> tuple[Float[Array, "B N t Hv"], Float[Array, "B N t"]]:
    """Attention of t queries to s keys. See the tile contract in `burst_kernels._tile`."""
    config = config or TileConfig()
    both = together(k, _TILE, 64) if v is None else None
    k, v = apart(k, v)
    problem, chip = problem_of(q, k, v, tile), config.chip or chip_at_hand().name
    if (reason := refuses(problem, chip)) is not None:
        raise NotImplementedError(f"mosaic_gpu refuses: {reason}")
    blocks = blocks_of(configure(problem, chip, config))
    (batch, heads, t, _), (_, kv_heads, s, value_dim) = q.shape, v.shape
    q, k, v = (whole(whole(x, 2, _TILE), 3, 64) for x in (q, k, v))
    mask = block_mask(tile, t, s, blocks.block_q, blocks.block_kv, like=q)
    f = Forward(
        batch=batch,
        heads=heads,
        kv_heads=kv_heads,
        t=t,
        s=s,
        head_dim=q.shape[-1],
        value_dim=v.shape[-1],
        v_at=0 if both is None else batch,
        dtype=q.dtype,
        blocks=blocks,
        scores=Scores.of(tile),
        marks=None if mask is None else mask.marks,
        mask_per_sequence=mask is not None and mask.q.shape[0] > 1,
        continued=onto is not None,
    )
    refs = {"q": q, "k": k, "v": v} if both is None else {"q": q, "k": both, "v": both}
    if mask is not None:
        active = mask.keys_of_queries()
        refs |= {"q_marks": mask.q, "kv_marks": mask.kv}
        refs |= {"active": active.blocks, "counts": active.counts}
        refs |= {"order": active.heaviest_first()}
    if onto is not None:
        out, lse = onto
        refs |= {"before_out": whole(whole(out, 2, blocks.block_q), 3, 64)}
        refs |= {"before_lse": whole(lse, 2, blocks.block_q)}
    out, lse = _call(f, refs)
    return out[:, :, :t, :value_dim], lse[:, :, :t]


def _call(f: Forward, refs: dict[str, Array]) -> tuple[Array, Array]:
    """Runs the kernel; out and lse have rows for whole blocks of queries."""
    names = (*refs, "out", "lse")

    def forward_kernel(*args: Any, **scratch: Any) -> None:
        _kernel(f, Refs(**dict(zip(names, args, strict=True))), **scratch)

    rows = (f.batch, f.heads, f.num_q * f.blocks.block_q)
    varying = jax.typeof(refs["q"]).manual_axis_type
    out_type = [
        jax.ShapeDtypeStruct(shape, jnp.float32, manual_axis_type=varying)
        for shape in ((*rows, f.value_dim), rows)
    ]
    out, lse = plgpu.kernel(
        forward_kernel,
        out_type=out_type,
        scratch_types=_scratch(f),
        # The last is the fastest: CTAs that run together read the same keys.
        grid=(f.batch, f.heads, f.num_q),
        grid_names=("sequence", "head", "q_block"),
        num_threads=ATTENDING + 1,
        thread_name="warpgroup",
        # Shared memory is written by TMA alone, and no memory is both read and written.
        compiler_params=plgpu.CompilerParams(approx_math=True, unsafe_no_auto_barriers=True),
    )(*refs.values())
    return varying_as(out, refs["q"]), varying_as(lse, refs["q"])


def _scratch(f: Forward) -> dict[str, Any]:
    """Shared memory and barriers."""
    # 8 rows of 128 bytes: what wgmma reads and TMA writes without bank conflicts.
    tiling = plgpu.TilingTransform((_TILE, 64))  # pyright: ignore[reportAbstractUsage]
    layout = (tiling, plgpu.SwizzleTransform(128))  # pyright: ignore[reportAbstractUsage]
    stages, block_kv = f.blocks.stages, f.blocks.block_kv

    def buffer(*shape: int) -> Any:
        return plgpu.SMEM(shape, f.dtype, transforms=layout)

    return dict(
        q_smem=buffer(ATTENDING, f.rows, f.head_dim),
        k_smem=buffer(stages, block_kv, f.head_dim),
        v_smem=buffer(stages, block_kv, f.value_dim),
        q_ready=plgpu.Barrier(num_barriers=ATTENDING),
        k_ready=plgpu.Barrier(num_barriers=stages),
        v_ready=plgpu.Barrier(num_barriers=stages),
        k_free=plgpu.Barrier(num_arrivals=ATTENDING, num_barriers=stages),
        v_free=plgpu.Barrier(num_arrivals=ATTENDING, num_barriers=stages),
        turn=plgpu.Barrier(num_barriers=ATTENDING),
    )


def _kernel(f: Forward, g: Refs, **scratch: Any) -> None:
    """One CTA: a block of queries of one head."""
    warpgroup = lax.axis_index("warpgroup")
    block, head, sequence = (lax.axis_index(x) for x in ("q_block", "head", "sequence"))
    row = sequence if f.mask_per_sequence else jnp.int32(0)
    if f.marks is None:
        full = total = jnp.int32(f.num_kv)
    else:
        block = scalar(g.order, row, block)
        full, total = (scalar(g.counts, row, block, i) for i in (0, 1))

    @pl.when(warpgroup == ATTENDING)
    def loading() -> None:
        plgpu.set_max_registers(_REGISTERS_LOAD, action="decrease")
        kv_head = lax.div(head, jnp.int32(f.heads // f.kv_heads))
        _load(f, g, (sequence, kv_head), (row, block), total, **_only(scratch, "k", "v"))

    @pl.when(warpgroup < ATTENDING)
    def attending() -> None:
        plgpu.set_max_registers(_REGISTERS_ATTEND, action="increase")
        attend(f, g, warpgroup, (sequence, head, block), row, full, total, **scratch)


def _only(scratch: dict[str, Any], *first: str) -> dict[str, Any]:
    return {name: ref for name, ref in scratch.items() if name.startswith(first)}


def _load(
    f: Forward,
    g: Refs,
    keys: tuple[Array, Array],
    queries: tuple[Array, Array],
    total: Array,
    *,
    k_smem: Any,
    v_smem: Any,
    k_ready: Any,
    v_ready: Any,
    k_free: Any,
    v_free: Any,
) -> None:
    """The loading warpgroup: each active block of keys, as soon as a slot is free."""
    stages, block_kv = f.blocks.stages, f.blocks.block_kv

    def step(n: Array, _: None) -> None:
        j = n if f.marks is None else scalar(g.active, *queries, n)
        slot = lax.rem(n, jnp.int32(stages))
        sequence, kv_head = keys
        tokens = pl.ds(j * block_kv, block_kv)
        for source, row, smem, ready, free in (
            (g.k, sequence, k_smem, k_ready, k_free),
            (g.v, sequence + f.v_at, v_smem, v_ready, v_free),
        ):
            pl.when(n >= stages)(functools.partial(plgpu.barrier_wait, free.at[slot]))
            here = source.at[row, kv_head, tokens]
            plgpu.copy_gmem_to_smem(here, smem.at[slot], ready.at[slot])

    lax.fori_loop(jnp.int32(0), total, step, None)
