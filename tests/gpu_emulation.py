"""Hopper kernels run on CPU: JAX's GPU interpreter, with what it lacks put in its place.

The interpreter executes TMA copies, barriers and warpgroups, and finds races between them. It takes
no `wgmma` with an operand in registers, does not see that a `wgmma` reads, and knows no TMA
reduction. So here a `wgmma` first reads its operands into a scratch of its own warpgroup, and a
reduction a read and a write. A kernel's whole logic runs, and its numbers can be compared. What
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


def _is_accumulator(x: Any) -> bool:
    return isinstance(x, plgpu.ACC)


class _Cell:
    """An array that is written to as a whole, in place of a reference."""

    def __init__(self, value: jax.Array) -> None:
        self.value = value

    def __getitem__(self, index: Any) -> jax.Array:
        assert index is Ellipsis
        return self.value

    def __setitem__(self, index: Any, value: jax.Array) -> None:
        assert index is Ellipsis and value.shape == self.value.shape
        assert value.dtype == self.value.dtype
        self.value = value


class _Emulation:
    """Stand-ins for functions of `plgpu` while one kernel is traced."""

    def __init__(self, detect_races: bool) -> None:
        self.detect_races = detect_races

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

    def run_state(self, body: Callable[[Any], None]) -> Callable[[Any], Any]:
        """Of accumulators and arrays: to the interpreter, a start is added to what is accumulated.

        What `body` writes to arrays it must write outside of scopes within it.
        """

        def run(start: Any) -> Any:
            starts, structure = jax.tree.flatten(start, is_leaf=_is_accumulator)
            accumulators = [plgpu.ACC(x.shape, x.dtype) for x in starts if _is_accumulator(x)]

            def inside(*accumulators: Any) -> list[jax.Array]:
                free = iter(accumulators)
                refs = [next(free) if _is_accumulator(x) else _Cell(x) for x in starts]
                body(jax.tree.unflatten(structure, refs))
                return [ref[...] for ref in refs]

            found = pl.run_scoped(inside, *accumulators)
            pairs = zip(starts, found, strict=True)
            found = [x._init + y if _is_accumulator(x) else y for x, y in pairs]
            return jax.tree.unflatten(structure, found)

        return run

    def copy_smem_to_gmem(self, src: Any, dst: Any, *args: Any, reduction_op=None, **kwargs: Any):
        assert reduction_op in (None, "add")
        if reduction_op is None or self.detect_races:
            return _COPY(src, dst, *args, **kwargs)
        dst[...] = dst[...] + src[...]

    def barrier_arrive(self, barrier: Any) -> None:
        # To the interpreter a read here is an ordinary one, which no TMA copy into the same place
        # may follow without a fence. Tensor cores read in one order with such copies; say so.
        plgpu.commit_smem()
        _ARRIVE(barrier)


@contextlib.contextmanager
def emulated(detect_races: bool = True, **params: Any) -> Iterator[None]:
    """Kernels traced inside are interpreted.

    Args:
        detect_races: raise where warpgroups race. Then a reduction is a plain copy, since the
            interpreter knows no atomic sum: for kernels that add to each place but once.
        **params: of `InterpretGPUParams`.
    """
    stand_in = _Emulation(detect_races)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("kernel", "wgmma", "copy_smem_to_gmem", "barrier_arrive"):
            patch.setattr(plgpu, name, getattr(stand_in, name))
        patch.setattr(pl, "run_state", stand_in.run_state)
        with plgpu.force_gpu_interpret_mode(
            plgpu.InterpretGPUParams(detect_races=detect_races, **params)
        ):
            yield
