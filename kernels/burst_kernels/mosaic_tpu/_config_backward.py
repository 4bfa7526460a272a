"""Blocks of the backward, and whether one fused kernel makes dq, dk and dv or two kernels do."""

import dataclasses
from collections.abc import Iterator

import jax.numpy as jnp

from burst_kernels._config import TileConfig
from burst_kernels._problem import Problem
from burst_kernels.mosaic_tpu._accumulate import BUFFERS
from burst_kernels.mosaic_tpu._config import LANES, MAX_STEPS, MIB, _block, vmem_limit
from burst_kernels.mosaic_tpu._winners import WINNERS

# Keys whose scores are held at once. Empirical: of 256, 512 and 1024 within 0.6 % of the fewest
# bundles on each chip (1024 x 1024 pairs, H = 128, bfloat16, no mask, libtpu 0.0.42).
_COMPUTE = 512
# The greatest blocks to try, fused, by bytes of an element: keys stay long, since each step also
# moves a float32 block of dq both ways. A product of float32 is six passes, and long code.
# In 16 bit a chip's winner comes before them.
_FUSED = {2: ((1024, 1024), (512, 1024), (512, 512), (256, 512), (128, 512)),
          4: ((512, 512), (256, 512), (128, 512))}  # fmt: skip
_SPLIT = ((512, 512), (256, 512), (256, 256), (128, 256), (128, 128))
# Fewer keys in a block than this, and fetching and writing dq takes longer than making the scores
# once more: 1.4 of the arithmetic of five products against 12 bytes for each element of dq and
# q, at each chip's published FLOP/s and bytes/s (v6e 560 FLOP/byte, the others at most 312).
_LEAST_KEYS = {"v6e": 512}
_LEAST_KEYS_ELSEWHERE = 256


def configure_backward(problem: Problem, chip: str, config: TileConfig) -> TileConfig:
    """The config with the fields of the backward filled in.

    Raises:
        ValueError: sizes that are given do not fit, with some that would.
    """
    given = dataclasses.replace(
        config,
        block_q_backward=config.block_q_backward or config.block_q,
        block_kv_backward=config.block_kv_backward or config.block_kv,
    )
    for name in ("block_q_backward", "block_kv_backward", "block_compute_backward"):
        size = getattr(given, name)
        if size is not None and size % LANES:
            raise ValueError(
                f"TileConfig.{name}={size} is no multiple of {LANES}, a TPU vector's lanes: "
                f"{-(-size // LANES) * LANES} would do, or None to let the backend choose."
            )
    tried = list(_candidates(problem, chip, given))
    fitting = [c for c in tried if vmem_bytes_backward(problem, c) <= vmem_limit(chip)]
    if not fitting:
        raise ValueError(_too_large(problem, chip, tried[-1], given))
    found = fitting[0]
    assert found.block_q_backward and found.block_kv_backward
    pairs = -(-problem.t // found.block_q_backward) * -(-problem.s // found.block_kv_backward)
    if pairs > MAX_STEPS:
        raise ValueError(
            f"blocks of {found.block_q_backward} queries and {found.block_kv_backward} keys are "
            f"{pairs} pairs, and scalar memory lists {MAX_STEPS}: larger blocks would do."
        )
    return found


def vmem_bytes_backward(problem: Problem, config: TileConfig) -> int:
    """Vector memory that the backward takes, as an upper estimate. All sizes of the config are set.

    Blocks of operands and results stand twice, one computed on and one on its way; `onto` is
    counted. Scores and what is made of them: as measured on the compiler's own account.
    """
    block_q, block_kv = config.block_q_backward, config.block_kv_backward
    assert block_q and block_kv and config.block_compute_backward
    H, Hv = (-(-dim // LANES) * LANES for dim in (problem.H, problem.Hv))
    item = jnp.dtype(problem.dtype).itemsize
    mask_rows = -(-(2 + problem.kinds) // 8) * 8
    queries = 2 * ((H + Hv) * item + 4 * (16 + mask_rows))
    keys = 2 * ((H + Hv) * item + 4 * mask_rows)
    results = 2 * 2 * 4 * (H + Hv)  # dk and dv, and what they are added to
    of_dq = 2 * 2 * 4 * H
    scores = block_q * (
        4 * H + max(config.block_compute_backward, _COMPUTE) * (11 if item == 2 else 30)
    )
    if config.fused_backward:
        return block_q * (queries + BUFFERS * 4 * H) + block_kv * (keys + results) + scores
    return block_q * queries + block_kv * keys + max(block_q * of_dq, block_kv * results) + scores


def _candidates(problem: Problem, chip: str, given: TileConfig) -> Iterator[TileConfig]:
    """What is given, filled up in every way, the best first."""
    least = min(_LEAST_KEYS.get(chip, _LEAST_KEYS_ELSEWHERE), problem.s)
    itemsize = jnp.dtype(problem.dtype).itemsize
    kinds = [(True, size) for size in _FUSED[itemsize]]
    if itemsize == 2:
        won = WINNERS[chip, "backward"]
        kinds.insert(0, (True, (won["block_q_backward"], won["block_kv_backward"])))
    kinds += [(False, size) for size in _SPLIT]
    for fused, (most_q, most_kv) in kinds:
        block_kv = given.block_kv_backward or _block(problem.s, most_kv)
        pays = block_kv >= least if given.fused_backward is None else given.fused_backward
        if fused == pays or (not fused and given.fused_backward is None):
            yield dataclasses.replace(
                given,
                block_q_backward=given.block_q_backward or _block(problem.t, most_q),
                block_kv_backward=block_kv,
                block_compute_backward=given.block_compute_backward or min(_COMPUTE, block_kv),
                fused_backward=fused,
            )


def _too_large(problem: Problem, chip: str, last: TileConfig, given: TileConfig) -> str:
    needed, limit = vmem_bytes_backward(problem, last), vmem_limit(chip)
    sizes = f"block_q={last.block_q_backward}, block_kv={last.block_kv_backward}"
    text = (
        f"a backward with {sizes} takes about {needed / MIB:.0f} MiB of vector memory at head dim "
        f"{problem.H}, and a kernel has {limit / MIB:.0f} MiB on {chip}"
    )
    if given.block_q_backward is None and given.block_kv_backward is None:
        return text + "."
    open_again = dict(block_q=None, block_kv=None, block_q_backward=None, block_kv_backward=None)
    fits = configure_backward(problem, chip, dataclasses.replace(given, **open_again))
    return text + (
        f": TileConfig(block_q_backward={fits.block_q_backward}, "
        f"block_kv_backward={fits.block_kv_backward}) fits."
    )
