"""Hopper kernels run on CPU: JAX's GPU interpreter, with what it lacks put in its place.

The interpreter executes TMA copies, barriers and warpgroups, and finds races between them. It takes
no `wgmma` with an operand in registers, does not see that a `wgmma` reads, and knows no TMA
reduction. So here a `wgmma` first reads its operands into a scratch of its own warpgroup, and a
reduction is a read and a write. A kernel's whole logic runs, and its numbers can be compared. What
is not shown: that what is asynchronous on the chip is waited for (`wgmma_wait`), and its layouts.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.experimental.pallas as pl
import jax.experimental.pallas.mosaic_gpu as plgpu
import jax.numpy as jnp
import pytest

# Why kernels cannot be run here, or None.
UNAVAILABLE = (
    None
    if hasattr(plgpu, "InterpretGPUParams")
    else f"the GPU interpreter is public from jax 0.12 on, this is {jax.__version__}"
)

_KERNEL, _WGMMA = plgpu.kernel, plgpu.wgmma
_COPY, _ARRIVE = plgpu.copy_smem_to_gmem, plgpu.barrier_arrive
# Rows and columns of the largest operand of a `wgmma`.
_LARGEST = 256


class _Emulation:
    """Stand-ins for functions of `plgpu` while one kernel is traced."""

    operands: Any = None
    thread_name: str | None = None

    def kernel(self, body: Callable[..., None], *, thread_name: str, **kwargs: Any) -> Any:
        def with_operands(*refs: Any, **scratch: Any) -> None:
            def run(operands: Any) -> None:
                self.operands, self.thread_name = operands, thread_name
                body(*refs, **scratch)

            shape = (kwargs["num_threads"], 2, _LARGEST, _LARGEST)
            pl.run_scoped(run, plgpu.SMEM(shape, jnp.float32), collective_axes=thread_name)

        return _KERNEL(with_operands, thread_name=thread_name, **kwargs)

    def wgmma(self, acc: Any, a: Any, b: Any) -> None:
        mine = self.operands.at[jax.lax.axis_index(self.thread_name)]
        copies = []
        for i, x in enumerate((a, b)):
            value = x if isinstance(x, jax.Array) else x[...]
            copy = mine.at[i, : x.shape[0], : x.shape[1]]
            copy[...] = value.astype(jnp.float32)
            copies.append(copy)
        _WGMMA(acc, *copies)

    def copy_smem_to_gmem(self, src: Any, dst: Any, *args: Any, reduction_op=None, **kwargs: Any):
        if reduction_op is None:
            return _COPY(src, dst, *args, **kwargs)
        assert reduction_op == "add"
        dst[...] = dst[...] + src[...]

    def barrier_arrive(self, barrier: Any) -> None:
        # To the interpreter a read here is an ordinary one, which no TMA copy into the same place
        # may follow without a fence. Tensor cores read in one order with such copies; say so.
        plgpu.commit_smem()
        _ARRIVE(barrier)


@contextlib.contextmanager
def emulated(**params: Any) -> Iterator[None]:
    """Kernels traced inside are interpreted, and races are found."""
    stand_in = _Emulation()
    params = {"detect_races": True} | params
    with pytest.MonkeyPatch.context() as patch:
        for name in ("kernel", "wgmma", "copy_smem_to_gmem", "barrier_arrive"):
            patch.setattr(plgpu, name, getattr(stand_in, name))
        with plgpu.force_gpu_interpret_mode(plgpu.InterpretGPUParams(**params)):
            yield
