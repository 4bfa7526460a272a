"""Block sizes of the Triton kernels: what fits a chip's shared memory, what is taken."""

import dataclasses
from typing import NamedTuple

import jax.numpy as jnp

from burst_kernels._chips import chip_at_hand
from burst_kernels._config import TileConfig
from burst_kernels._problem import Problem
from burst_kernels.triton._chips import capability_of, refuses, shared_bytes
from burst_kernels.triton._sizes import power_of_two


class Cut(NamedTuple):
    """One kernel's sizes: tokens of a block of queries and of keys, warps, stages of its loops."""

    block_q: int
    block_kv: int
    warps: int
    stages: int


# What is tried, the first that fits is taken. Blocks and warps are near those of FlashAttention-2
# and of Triton's tutorial, less what ptxas spills registers for (bfloat16, sm_80, causal; bytes):
#   forward   H 128: 128 x 64 on 4 warps 156, 128 x 128 on 8 warps 8;  H 256: 128 x 64 on 8 156
#   backward  H 64: 64 x 128 on 8 warps 132;  H 128: 64 x 64 on 4 48, 64 x 128 on 8 40
# Nobody has timed them: there was no GPU at hand. By head dim up to which, and bytes of an element.
_FORWARD = {
    (64, 2): (Cut(128, 64, 4, 3), Cut(64, 64, 4, 2), Cut(64, 64, 4, 1)),
    (128, 2): (Cut(128, 64, 8, 3), Cut(128, 64, 8, 2), Cut(64, 32, 4, 2), Cut(64, 32, 4, 1)),
    (256, 2): (Cut(64, 64, 8, 2), Cut(64, 32, 8, 2), Cut(32, 32, 4, 1)),
    (64, 4): (Cut(64, 32, 4, 2), Cut(32, 32, 4, 1)),
    (128, 4): (Cut(32, 32, 4, 2), Cut(16, 16, 4, 1)),
    (256, 4): (Cut(16, 16, 4, 1),),
}
_BACKWARD = {
    (64, 2): (Cut(64, 64, 4, 3), Cut(64, 64, 4, 2), Cut(64, 64, 4, 1)),
    (128, 2): (Cut(64, 64, 8, 3), Cut(64, 64, 8, 2), Cut(32, 64, 4, 2), Cut(32, 32, 4, 1)),
    (256, 2): (Cut(32, 32, 4, 2), Cut(16, 32, 4, 1)),
    (64, 4): (Cut(32, 32, 4, 2), Cut(32, 32, 4, 1)),
    (128, 4): (Cut(32, 32, 8, 2), Cut(16, 16, 4, 1)),
    (256, 4): (Cut(16, 16, 4, 1),),
}


class Launch(NamedTuple):
    """How a kernel is compiled; capability: 80 for sm_80."""

    capability: int
    interpret: bool
    warps: int
    stages: int


class Tiles(NamedTuple):
    """Sizes of both kernels.

    Attributes:
        forward, backward: of each.
        capability: compute capability of the chip, 80 for sm_80.
        interpret: whether they run by Triton's interpreter.
    """

    forward: Cut
    backward: Cut
    capability: int
    interpret: bool

    def launch(self, cut: Cut) -> Launch:
        """How the kernel of that cut is compiled."""
        return Launch(self.capability, self.interpret, cut.warps, cut.stages)


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
        block_q_backward=tiles.backward.block_q,
        block_kv_backward=tiles.backward.block_kv,
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
    c = config
    capability = capability_of(chip_name)
    assert capability is not None
    # Blocks that were given for the forward alone are no wish for the backward.
    forward = _chosen(problem, capability, (c.block_q, c.block_kv), c, backward=False)
    given = (c.block_q_backward, c.block_kv_backward)
    return Tiles(
        forward=forward,
        backward=_chosen(problem, capability, given, c, backward=True),
        capability=capability,
        interpret=config.interpret,
    )


def _chosen(
    problem: Problem,
    capability: int,
    blocks: tuple[int | None, int | None],
    config: TileConfig,
    backward: bool,
) -> Cut:
    """The first of the table that fits, with what is given in its place."""
    given = (*blocks, config.warps, config.stages)
    names = ("block_q_backward", "block_kv_backward") if backward else ("block_q", "block_kv")
    _check(dict(zip((*names, "warps", "stages"), given, strict=True)))
    head_dim, item = max(problem.H, problem.Hv), jnp.dtype(problem.dtype).itemsize
    table = _BACKWARD if backward else _FORWARD
    rows = next(rows for (most, size), rows in table.items() if head_dim <= most and size == item)
    tried = [Cut(*(a or b for a, b in zip(given, row, strict=True))) for row in rows]
    limit = shared_bytes(capability)
    fits = [cut for cut in tried if smem_bytes(problem, capability, cut, backward) <= limit]
    if fits:
        return fits[0]
    wanted = tried[0]
    room = [row for row in rows if smem_bytes(problem, capability, row, backward) <= limit]
    raise ValueError(
        f"TileConfig({names[0]}={wanted.block_q}, {names[1]}={wanted.block_kv}, "
        f"stages={wanted.stages}) needs {smem_bytes(problem, capability, wanted, backward)} bytes "
        f"of shared memory at H={problem.H}, Hv={problem.Hv}; sm_{capability} has {limit}. These "
        "fit: " + ", ".join(f"({r.block_q}, {r.block_kv}, {r.stages})" for r in room) + "."
    )


def _check(given: dict[str, int | None]) -> None:
    for name, value in given.items():
        least, most = {"warps": (1, 16), "stages": (1, 8)}.get(name, (16, 256))
        if value is None:
            continue
        if not least <= value <= most or (name != "stages" and value & (value - 1)):
            what = "from" if name == "stages" else "a power of two from"
            raise ValueError(
                f"TileConfig.{name}={value}: the triton tiles take {what} {least} to {most}."
            )


def smem_bytes(problem: Problem, capability: int, cut: Cut, backward: bool) -> int:
    """Shared memory that Triton takes for a kernel, at most.

    What stays (queries; or keys of the backward) and what passes by in the buffers of the stages;
    probabilities and score gradients on their way from one product to the next; lse, delta and
    marks of what passes by. Found by compiling, and held to it by tests marked `aot`.
    """
    item = jnp.dtype(problem.dtype).itemsize
    wide, wide_v = power_of_two(problem.H), power_of_two(problem.Hv)
    # On Hopper and Blackwell tensor cores read a block from memory while the next one arrives.
    buffers = cut.stages if 90 <= capability < 120 else max(1, cut.stages - 1)
    buffers += backward and 100 <= capability < 120

    def half(stays: int, width: int, passes: int) -> int:
        return stays * width + buffers * passes * (wide + wide_v)

    elements = half(cut.block_q, wide + wide_v if backward else wide, cut.block_kv)
    tokens, marks = cut.block_kv, 3 + problem.kinds
    if backward:  # the half that walks over queries, and that which walks over keys
        elements = max(elements, half(cut.block_kv, wide + wide_v, cut.block_q))
        tokens, marks = max(cut.block_q, cut.block_kv), marks + 2
    if item == 4:  # operands go through memory to lie as tensor cores want them
        elements += 2 * max(cut.block_q, cut.block_kv) * max(wide, wide_v)
    else:
        # Probabilities of 128 rows and more lie as the product with so narrow values wants them.
        lies = not backward and cut.block_q >= 128 and wide_v <= 128 and capability < 90
        elements += 0 if lies else cut.block_q * cut.block_kv
        elements += cut.block_q * wide if cut.stages == 1 else 0
    return elements * item + 4 * marks * (buffers * tokens + cut.block_q)
