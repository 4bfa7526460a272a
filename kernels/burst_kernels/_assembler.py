"""Which assembler JAX's CUDA brings: kernels depend on its release, and JAX does not tell it.

Only where CUDA comes from wheels can it be looked at, and nothing is imported or run to do so.
"""

import functools
import importlib.metadata
import re
from typing import NamedTuple

# Plugins of JAX, and the wheel that each has its assembler from.
_WHEELS = {
    "jax-cuda13-plugin": "nvidia-cuda-nvcc",
    "jax-cuda12-plugin": "nvidia-cuda-nvcc-cu12",
}


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
    """That of the plugin which is installed; None where CUDA does not come from a wheel."""
    plugins = [plugin for plugin in _WHEELS if _release(plugin)]
    found = [
        Assembler(wheel, release)
        for wheel in (_WHEELS[plugin] for plugin in plugins or _WHEELS)
        if (release := _release(wheel))
    ]
    return max(found, key=lambda a: a.release, default=None)


def _release(distribution: str) -> tuple[int, int, int] | None:
    try:
        numbers = re.findall(r"\d+", importlib.metadata.version(distribution))
    except importlib.metadata.PackageNotFoundError:
        return None
    major, minor, patch, *_ = *map(int, numbers), 0, 0, 0
    return major, minor, patch
