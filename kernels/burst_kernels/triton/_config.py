"""Which GPUs run the Triton kernels, and how a tile is cut into blocks there."""

import dataclasses
import importlib.util
import re
from typing import NamedTuple

import jax.numpy as jnp

from burst_kernels._chips import chip_at_hand
from burst_kernels._config import TileConfig
from burst_kernels._problem import Problem
from burst_kernels.triton._sizes import power_of_two

_INSTALL = "pip install 'burst-jax[triton]'"
_ELSEWHERE = "The `xla` tile computes it: implementation='xla', or None."
_GREATEST_HEAD_DIM = 256
# The oldest GPUs that Triton multiplies matrices of 16 bit for on tensor cores.
_OLDEST = 75
# The first with asynchronous copies to shared memory, bfloat16 and TF32.
_AMPERE = 80


class Cut(NamedTuple):
    """One kernel's sizes: tokens of a block of queries and of keys, warps, stages of its loops."""

    block_q: int
    block_kv: int
    warps: int
    stages: int


class Launch(NamedTuple):
    """How a kernel is compiled; capability: 80 for sm_80."""

    capability: int
    interpret: bool
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Sizes of all kernels of a tile.

    Attributes:
        forward, backward_keys, backward_queries: of each kernel.
        precision: of a product of float32 operands, as Triton names it.
        capability: compute capability of the chip, 80 for sm_80.
        interpret: whether they run by Triton's interpreter.
    """

    forward: Cut
    backward_keys: Cut
    backward_queries: Cut
    precision: str
    capability: int
    interpret: bool

    def launch(self, cut: Cut) -> Launch:
        """How the kernel of that cut is compiled."""
        return Launch(self.capability, self.interpret, cut.warps, cut.stages)


def capability_of(chip_name: str) -> int | None:
    """80 for sm_80; None for what is no NVIDIA GPU."""
    found = re.fullmatch(r"sm_(\d+)", chip_name)
    return None if found is None else int(found.group(1))


def unavailable(chip_name: str) -> str | None:
    """Why a chip cannot run the kernels, in a sentence; None where it can."""
    capability = capability_of(chip_name)
    if capability is None:
        return f"it is for NVIDIA GPUs, and {chip_name} is none that it knows."
    if capability < _OLDEST:
        return (
            f"Triton knows the tensor cores of GPUs from sm_{_OLDEST} on, and {chip_name} is "
            f"older. {_ELSEWHERE}"
        )
    if not installed():
        return f"it needs jax_triton, which is not installed: {_INSTALL}. {_ELSEWHERE}"
    return None


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
    if dtype == jnp.bfloat16 and (capability_of(chip_name) or 0) < _AMPERE:
        return (
            f"{chip_name} has no bfloat16 arithmetic; it came with sm_{_AMPERE}. float16 runs "
            f"here. {_ELSEWHERE}"
        )
    if max(problem.H, problem.Hv) > _GREATEST_HEAD_DIM:
        return (
            f"head dims over {_GREATEST_HEAD_DIM} leave no registers for a row of the output, and "
            f"this has H={problem.H}, Hv={problem.Hv}. {_ELSEWHERE}"
        )
    return None


def configure(problem: Problem, chip_name: str, config: TileConfig) -> TileConfig:
    """`config` with its blocks filled in; warps and stages stay as given, None for each kernel's.

    Raises:
        ValueError: what is given does not fit, with sizes that would.
    """
    tiles = _tiles(problem, chip_name, config)
    return dataclasses.replace(
        config,
        block_q=tiles.forward.block_q,
        block_kv=tiles.forward.block_kv,
        block_q_backward=tiles.backward_keys.block_q,
        block_kv_backward=tiles.backward_keys.block_kv,
    )


def tiles_for(problem: Problem, config: TileConfig | None) -> Tiles:
    """Sizes for one call of a tile function.

    Raises:
        NotImplementedError: the backend refuses, with the reason.
        ValueError: sizes that do not fit.
    """
    config = config or TileConfig()
    chip = config.chip or chip_at_hand().name
    if (reason := refuses(problem, chip)) is not None:
        raise NotImplementedError(f"triton refuses: {reason}")
    return _tiles(problem, chip, config)


def _tiles(problem: Problem, chip_name: str, config: TileConfig) -> Tiles:
    capability = capability_of(chip_name)
    assert capability is not None
    float32 = jnp.dtype(problem.dtype) == jnp.float32
    c = config
    def cut(q, kv, default):
        return Cut(q or default[0], kv or default[1], c.warps or default[2], c.stages or default[3])
    d = (32, 32, 4, 2)
    return Tiles(
        forward=cut(c.block_q, c.block_kv, d),
        backward_keys=cut(c.block_q_backward or c.block_q, c.block_kv_backward or c.block_kv, d),
        backward_queries=cut(c.block_q_backward or c.block_q, c.block_kv_backward or c.block_kv, d),
        precision="tf32x3" if float32 and capability >= _AMPERE else "ieee",
        capability=capability,
        interpret=config.interpret,
    )
