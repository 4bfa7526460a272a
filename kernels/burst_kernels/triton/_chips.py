"""Which GPUs run the Triton kernels, what they have, and what is refused there."""

import functools
import importlib.util
import re

import jax.numpy as jnp

from burst_kernels._assembler import assembler
from burst_kernels._chips import CHIPS
from burst_kernels._problem import Problem

_INSTALL = "pip install 'burst-jax[triton]'"
_ELSEWHERE = "The `xla` tile computes it: implementation='xla', or None."
_GREATEST_HEAD_DIM = 256
# For older GPUs Triton 3.9 makes matrix products of plain arithmetic: no mma.sync in its PTX.
_OLDEST = 80

# Shared memory of a block of threads, after NVIDIA's table of compute capabilities.
_KIB = {
    80: 163, 86: 99, 87: 163, 89: 99, 90: 227, 100: 227, 103: 227, 110: 227, 120: 99, 121: 99,
}  # fmt: skip


def capability_of(chip_name: str) -> int | None:
    """80 for sm_80; None for what is no NVIDIA GPU."""
    found = re.fullmatch(r"sm_(\d+)", chip_name)
    return None if found is None else int(found.group(1))


def shared_bytes(capability: int) -> int:
    """Shared memory of a block of threads; of a chip that is not known, the least of newer ones."""
    return 1024 * _KIB.get(capability, 99)


def unavailable(chip_name: str) -> str | None:
    """Why a chip cannot run the kernels, in a sentence; None where it can."""
    capability = capability_of(chip_name)
    if capability is None and chip_name in CHIPS:
        return f"it is for NVIDIA GPUs, and {chip_name} is none."
    if capability is None:
        return (
            f"it is for NVIDIA GPUs, and of {chip_name!r} no compute capability is known here. "
            f"{_ELSEWHERE}"
        )
    if capability < _OLDEST:
        return (
            f"Triton multiplies on tensor cores from sm_{_OLDEST} on; on {chip_name} it would "
            f"without them, and XLA's products use them. {_ELSEWHERE}"
        )
    if not installed():
        return f"it needs jax_triton, which is not installed: {_INSTALL}. {_ELSEWHERE}"
    return _assembler_too_old(capability)


def installed() -> bool:
    """Whether the extra is there; nothing is imported to find out."""
    return all(importlib.util.find_spec(name) is not None for name in ("triton", "jax_triton"))


def refuses(problem: Problem, chip_name: str) -> str | None:
    """Why such tiles cannot be done on that chip, in a sentence; None where they can."""
    if (reason := unavailable(chip_name)) is not None:
        return reason
    dtype = jnp.dtype(problem.dtype)
    if dtype not in (jnp.bfloat16, jnp.float16, jnp.float32):
        return f"it takes bfloat16, float16 and float32, and this is {dtype.name}. {_ELSEWHERE}"
    if max(problem.H, problem.Hv) > _GREATEST_HEAD_DIM:
        return (
            f"head dims over {_GREATEST_HEAD_DIM} leave no registers for a row of the output, and "
            f"this has H={problem.H}, Hv={problem.Hv}. {_ELSEWHERE}"
        )
    return None


def _assembler_too_old(capability: int) -> str | None:
    """Triton writes PTX for its own assembler; JAX's, which assembles it, must know it too."""
    has = assembler()
    if has is None:  # CUDA that is no wheel may be of any release
        return None
    needs = _tritons_assembler(capability)
    if has.release[:2] >= needs:
        return None
    release = ".".join(map(str, needs))
    # The wheels of CUDA 12 end with it.
    newer = (
        f"'jax[cuda{needs[0]}]' 'nvidia-cuda-nvcc>={release}'"
        if needs[0] > has.release[0]
        else f"'{has.wheel}>={release}'"
    )
    return (
        f"Triton writes for the assembler of CUDA {release} here, and JAX's is of "
        f"{has.release[0]}.{has.release[1]}: pip install {newer}. {_ELSEWHERE}"
    )


@functools.cache
def _tritons_assembler(capability: int) -> tuple[int, int]:
    """The release of the assembler that Triton takes for a chip, its own or the environment's."""
    from triton.backends.nvidia.compiler import (  # pyright: ignore[reportMissingImports]
        get_ptxas,
    )

    major, minor = get_ptxas(capability).version.split(".")
    return int(major), int(minor)
