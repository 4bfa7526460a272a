"""A kernel of `_kernels` called from JAX: compiled by jax_triton, or interpreted on a CPU."""

import functools
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Shaped

from burst_kernels._operands import varying_as
from burst_kernels.triton._config import Launch
from burst_kernels.triton._sizes import Sizes


class Call(NamedTuple):
    """One launch.

    Attributes:
        kernel: its name in `_kernels`.
        sizes: its constants.
        programs: how many there are.
        launch: the chip, warps and stages.
        aliases: number of an operand -> number of the result that takes its memory.
    """

    kernel: str
    sizes: Sizes
    programs: int
    launch: Launch
    aliases: Mapping[int, int]


def run(
    call: Call, operands: Sequence[Shaped[Array, "..."]], results: Sequence[tuple[int, ...]]
) -> tuple[Array, ...]:
    """Results of one launch, in float32.

    Args:
        call: what to run.
        operands: in the order of the kernel's parameters.
        results: shapes.
    """
    like = operands[0]
    types = tuple(
        jax.ShapeDtypeStruct(x, jnp.float32, manual_axis_type=jax.typeof(like).manual_axis_type)
        for x in results
    )
    found = (_interpreted if call.launch.interpret else _compiled)(call, operands, types)
    return tuple(varying_as(x, like) for x in found)


def _compiled(
    call: Call, operands: Sequence[Array], types: tuple[jax.ShapeDtypeStruct, ...]
) -> Sequence[Array]:
    import jax_triton  # pyright: ignore[reportMissingImports]

    from burst_kernels.triton import _kernels

    return jax_triton.triton_call(
        *operands,
        kernel=getattr(_kernels, call.kernel),
        out_shape=types,
        grid=(call.programs,),
        name=f"burst_{call.kernel}",
        num_warps=call.launch.warps,
        num_stages=call.launch.stages,
        compute_capability=call.launch.capability,
        input_output_aliases=dict(call.aliases),
        C=call.sizes,
    )


def _interpreted(
    call: Call, operands: Sequence[Array], types: tuple[jax.ShapeDtypeStruct, ...]
) -> Sequence[Array]:
    from burst_kernels.triton import _interpret

    function = functools.partial(
        _interpret.interpret, call.kernel, call.sizes, call.programs, results=types,
        aliases=call.aliases,
    )  # fmt: skip
    return jax.pure_callback(lambda *x: function(operands=x), types, *operands)
