"""Blocks of the forward on each TPU generation: what fits, what is chosen, what cannot be done."""

import dataclasses
import itertools
from collections.abc import Iterator
from typing import NamedTuple

import jax.numpy as jnp

from burst_kernels._chips import chip_at_hand
from burst_kernels._config import TileConfig
from burst_kernels._problem import Problem
from burst_kernels.mosaic_tpu._winners import WINNERS

LANES = 128
MIB = 2**20
# Steps of a grid that are listed in scalar memory, of 1 MiB: half of it is left to other things.
MAX_STEPS = 2**17
# Beyond it nobody has compiled the kernels.
MAX_HEAD_DIM = 512


class Pieces(NamedTuple):
    """What of a pair of blocks is computed at once.

    Attributes:
        q, kv: tokens.
        ahead: whether the scores of a piece are computed before the softmax of the one before it.
    """

    q: int
    kv: int
    ahead: bool


class Generation(NamedTuple):
    """What kernels must know of a TPU generation.

    Attributes:
        vmem_bytes: vector memory that a kernel may use.
        pieces: those whose schedule was the shortest.
    """

    vmem_bytes: int
    pieces: Pieces


# Vector memory after `pltpu.get_tpu_info_for_chip`, less an eighth for the compiler's own use.
# Pieces: the fewest bundles for a 1024 x 1024 pair, H = 128, bfloat16, no mask, as the compiler
# schedules it (libtpu 0.0.42); nobody has timed them on a chip. v5e and v5p have four matrix units
# of 128 x 128, which short rows of pieces feed evenly; v6e and tpu7x have two of 256 x 256, and
# there the softmax of a piece is long enough to hide the next one's scores behind it.
#
# Bundles on v5e and v6e: 3789 and 2249 as below; splash attention 4706 and 2740. What lost:
#   pieces of 1024 x 512, one after the other        4002, 2550
#   sums reduced across lanes in every piece         4328, 2485  (*)
#   scores transposed: a row lies along lanes        4608, 2692  (*) p goes in as the weights
#   rescaling only where a maximum grew              5135, 3394  a branch cuts the schedule in two
#   exponentials in bfloat16                            -, 2757  and twice the error of out
#   row sums by the matrix unit, 128 ones beside v   5899, 2162  (*) and lse as exact as bfloat16
# (*) in a prototype that left out the scale, one multiplication a score.
GENERATIONS = {
    "v4": Generation(14 * MIB, Pieces(1024, 256, ahead=False)),
    "v5e": Generation(112 * MIB, Pieces(256, 1024, ahead=False)),
    "v5p": Generation(56 * MIB, Pieces(256, 1024, ahead=False)),
    "v6e": Generation(112 * MIB, Pieces(512, 1024, ahead=True)),
    "tpu7x": Generation(56 * MIB, Pieces(512, 1024, ahead=True)),
}


class Piece(NamedTuple):
    """Start and number of the queries and of the keys of a piece of a pair of blocks."""

    q: tuple[int, int]
    kv: tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Sizes:
    """The static sizes of one call.

    Attributes:
        B, t, s, N, K, H, Hv: see the tile contract.
        block_q, block_kv: tokens in a block; the last block of an array may be shorter.
        compute_q, compute_kv: tokens in a piece, at most; multiples of 128.
        ahead: whether the scores of a piece are computed before the softmax of the one before it.
    """

    B: int
    t: int
    s: int
    N: int
    K: int
    H: int
    Hv: int
    block_q: int
    block_kv: int
    compute_q: int
    compute_kv: int
    ahead: bool

    @property
    def num_q(self) -> int:
        return -(-self.t // self.block_q)

    @property
    def num_kv(self) -> int:
        return -(-self.s // self.block_kv)

    @property
    def pieces(self) -> list[Piece]:
        """The pieces of a pair of blocks: all keys of some queries, then the next queries."""

        def cut(block: int, piece: int) -> list[tuple[int, int]]:
            return [(at, min(piece, block - at)) for at in range(0, block, piece)]

        both = itertools.product(
            cut(self.block_q, self.compute_q), cut(self.block_kv, self.compute_kv)
        )
        return [Piece(*piece) for piece in both]


def chip_name(config: TileConfig) -> str:
    """The generation to compile for; where it is none (interpreted on a CPU), the oldest."""
    name = config.chip or chip_at_hand().name
    return name if name in GENERATIONS else "v4"


def vmem_limit(chip: str) -> int:
    """Bytes of vector memory that a kernel may use."""
    return GENERATIONS[chip].vmem_bytes


def refuses(problem: Problem, chip: str) -> str | None:
    """Why these kernels cannot compute such tiles on that chip, in a sentence; None: they can."""
    dtype = jnp.dtype(problem.dtype)
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"TPU kernels take bfloat16 and float32; the compiler has no {dtype.name} vectors."
    if max(problem.H, problem.Hv) > MAX_HEAD_DIM:
        return (
            f"TPU kernels take head dims up to {MAX_HEAD_DIM}, which is what was compiled, and got "
            f"{problem.H} and {problem.Hv}."
        )
    pairs = _pairs(problem, *_blocks(problem, chip, TileConfig()))
    if pairs > MAX_STEPS:
        return (
            f"{problem.t} queries and {problem.s} keys on one device are {pairs} pairs of blocks, "
            f"and scalar memory lists {MAX_STEPS}; more devices make shorter shards."
        )
    return None


def configure_forward(problem: Problem, chip: str, config: TileConfig) -> TileConfig:
    """The config with the fields of the forward filled in.

    Raises:
        ValueError: sizes that are given do not fit, with some that would.
    """
    for name in ("block_q", "block_kv", "block_compute", "block_compute_q"):
        size = getattr(config, name)
        if size is not None and size % LANES:
            raise ValueError(
                f"TileConfig.{name}={size} is no multiple of {LANES}, a TPU vector's lanes: "
                f"{-(-size // LANES) * LANES} would do, or None to let the backend choose."
            )
    block_q, block_kv = _blocks(problem, chip, config)
    filled = _filled(config, chip, block_q, block_kv)
    _check_vmem(problem, chip, filled)
    if (pairs := _pairs(problem, block_q, block_kv)) > MAX_STEPS:
        raise ValueError(
            f"blocks of {block_q} queries and {block_kv} keys are {pairs} pairs, and scalar memory "
            f"lists {MAX_STEPS}: larger blocks would do."
        )
    return filled


def _pairs(problem: Problem, block_q: int, block_kv: int) -> int:
    return -(-problem.t // block_q) * -(-problem.s // block_kv)


def vmem_bytes(problem: Problem, chip: str, config: TileConfig) -> int:
    """Vector memory that the forward takes, as an upper estimate. All sizes of the config are set.

    Blocks of operands and results stand twice, one computed on and one on its way; rows of 128
    lanes; `onto` is counted. Pieces: scores in float32, and probabilities as operands; operands of
    products of float32 once more as three of bfloat16, counted as two of float32.
    """
    assert config.block_q and config.block_kv and config.block_compute and config.block_compute_q
    H, Hv = (-(-dim // LANES) * LANES for dim in (problem.H, problem.Hv))
    item = jnp.dtype(problem.dtype).itemsize
    ahead = GENERATIONS[chip].pieces.ahead
    mask_rows = -(-(2 + problem.kinds) // 8) * 8
    queries = H * item + 4 * (2 * Hv + 16 + mask_rows)
    keys = (H + Hv) * item + 4 * mask_rows
    scratch = 4 * (2 * LANES + Hv)
    rows, width = config.block_compute_q, config.block_compute
    piece = rows * width * (4 + item) * (1 + ahead)
    if item == 4:
        piece += 8 * (rows * H + width * (H + Hv) + rows * width)
    return config.block_q * (2 * queries + scratch) + config.block_kv * 2 * keys + piece


def _check_vmem(problem: Problem, chip: str, config: TileConfig) -> None:
    needed, limit = vmem_bytes(problem, chip, config), vmem_limit(chip)
    if needed <= limit:
        return
    open_again = dict(block_q=None, block_kv=None, block_compute=None, block_compute_q=None)
    block_q, block_kv = _blocks(problem, chip, dataclasses.replace(config, **open_again))
    raise ValueError(
        f"TileConfig(block_q={config.block_q}, block_kv={config.block_kv}, "
        f"block_compute={config.block_compute}, block_compute_q={config.block_compute_q}) takes "
        f"about {needed / MIB:.0f} MiB of vector memory at head dim {problem.H}, and a kernel has "
        f"{limit / MIB:.0f} MiB on {chip}: TileConfig(block_q={block_q}, block_kv={block_kv}) fits."
    )


def _blocks(problem: Problem, chip: str, config: TileConfig) -> tuple[int, int]:
    """block_q and block_kv: as given, else the largest that fit; the smallest if none do."""
    block_q = block_kv = LANES
    for most_q, most_kv in _candidates(chip):
        block_q = config.block_q or _block(problem.t, most_q)
        block_kv = config.block_kv or _block(problem.s, most_kv)
        filled = _filled(config, chip, block_q, block_kv)
        if vmem_bytes(problem, chip, filled) <= vmem_limit(chip):
            break
    return block_q, block_kv


def _candidates(chip: str) -> Iterator[tuple[int, int]]:
    """Greatest blocks to try, from the chip's winners on.

    Halved in turns, keys first, since queries stay while keys go by.
    """
    won = WINNERS[chip, "forward"]
    most_q, most_kv = won["block_q"], won["block_kv"]
    while True:
        yield most_q, most_kv
        if most_kv > most_q // 2 and most_kv > LANES:
            most_kv //= 2
        elif most_q > LANES:
            most_q //= 2
        else:
            return


def _filled(config: TileConfig, chip: str, block_q: int, block_kv: int) -> TileConfig:
    pieces = GENERATIONS[chip].pieces
    return dataclasses.replace(
        config,
        block_q=block_q,
        block_kv=block_kv,
        block_compute=min(config.block_compute or pieces.kv, block_kv),
        block_compute_q=min(config.block_compute_q or pieces.q, block_q),
    )


def _block(n: int, most: int) -> int:
    """A block of at most `most` tokens: little padding, few blocks, one cut in the middle.

    A zigzag shard is two chunks that lie far apart: a block across their boundary would be PARTIAL
    where its halves are EMPTY and FULL.
    """

    def cost(block: int) -> tuple[int, int]:
        blocks = -(-n // block)
        straddles = blocks > 1 and n % 2 == 0 and (n // 2) % block
        # What a step costs besides its tokens is set to that of half a vector of lanes of them.
        return blocks * (block + LANES // 2) + (block if straddles else 0), -block

    return min(range(LANES, most + 1, LANES), key=cost)
