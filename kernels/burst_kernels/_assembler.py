"""Which assembler JAX's CUDA brings: kernels depend on its release, and JAX does not tell it.

Only where CUDA comes from wheels can it be looked at, and nothing is imported or run to do so.
"""

import functools
import importlib.metadata
from typing import NamedTuple

# The wheels that hold it, of CUDA 13 and newer, and of CUDA 12.
_WHEELS = ("nvidia-cuda-nvcc", "nvidia-cuda-nvcc-cu12")


class Assembler(NamedTuple):
    """A release of `ptxas`.

    Attributes:
        wheel: the distribution that it comes in.
        release: (major, minor, patch) of that.
    """

    wheel: str
    release: tuple[int, int, int]


@functools.cache
def assembler() -> Assembler | None:
    """The newest that is installed; None where CUDA does not come from a wheel."""
    found = [Assembler(wheel, release) for wheel in _WHEELS if (release := _release(wheel))]
    return max(found, key=lambda a: a.release, default=None)


def _release(wheel: str) -> tuple[int, int, int] | None:
    try:
        major, minor, patch, *_ = *importlib.metadata.version(wheel).split("."), "0", "0"
    except importlib.metadata.PackageNotFoundError:
        return None
    return int(major), int(minor), int(patch)
