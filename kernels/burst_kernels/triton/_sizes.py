"""`Sizes`: all that is static about one kernel. Triton compiles a kernel for each."""

import dataclasses
import math


@dataclasses.dataclass(frozen=True, kw_only=True)
class Sizes:
    """What the kernels of `_kernels` read as constants.

    Attributes:
        B, N, K, T, S, H, Hv: sequences, query and kv heads, query and key tokens, head dims.
        v_at: elements before the first of v: those of k where both lie in one array, else 0.
        block_q, block_kv: tokens of a block.
        scale: factor on q k^T, > 0.
        soft_cap: scores become `cap * tanh(scores / cap)`; 0: no cap.
        listed: whether there are lists of active blocks and marks of tokens; else every pair
            counts.
        per_sequence: whether each sequence has its own mask.
        last, first, kinds: `burst_kernels._active.Marks`.
        powers: whether score gradients are scaled by a power of two.
        onto: for each result whether there is something to merge with, or to add to.
    """

    B: int
    N: int
    K: int
    T: int
    S: int
    H: int
    Hv: int
    v_at: int
    block_q: int
    block_kv: int
    scale: float
    soft_cap: float
    listed: bool
    per_sequence: bool
    last: bool
    first: bool
    kinds: int
    powers: bool
    onto: tuple[bool, ...]

    @property
    def group(self) -> int:
        """Query heads of a kv head."""
        return self.N // self.K

    @property
    def wide(self) -> int:
        """H as a block holds it: Triton's blocks are powers of two."""
        return power_of_two(self.H)

    @property
    def wide_v(self) -> int:
        """Hv as a block holds it."""
        return power_of_two(self.Hv)

    @property
    def num_q(self) -> int:
        """Blocks of queries."""
        return -(-self.T // self.block_q)

    @property
    def num_kv(self) -> int:
        """Blocks of keys."""
        return -(-self.S // self.block_kv)

    @property
    def query_programs(self) -> int:
        """Programs of a kernel that computes blocks of queries."""
        return self.B * self.N * self.num_q

    @property
    def key_programs(self) -> int:
        """Programs of a kernel that computes blocks of keys."""
        return self.B * self.K * self.num_kv

    @property
    def loops(self) -> int:
        """Loops over the other side: one for FULL blocks, one for PARTIAL ones if there are any."""
        return 1 + self.listed

    @property
    def even_q(self) -> bool:
        """Whether blocks divide the queries."""
        return self.T % self.block_q == 0

    @property
    def even_kv(self) -> bool:
        """Whether blocks divide the keys."""
        return self.S % self.block_kv == 0

    @property
    def q_tokens(self) -> int:
        """Tokens of a row of the queries' marks."""
        return self.num_q * self.block_q

    @property
    def kv_tokens(self) -> int:
        """Tokens of a row of the keys' marks."""
        return self.num_kv * self.block_kv

    @property
    def q_rows(self) -> int:
        """Marks before the queries' segment ids."""
        return self.last + self.first

    @property
    def kv_rows(self) -> int:
        """Marks before the keys' segment ids."""
        return int(self.last or self.first)

    @property
    def capped(self) -> bool:
        """Whether there is a soft cap."""
        return self.soft_cap != 0.0

    @property
    def factor(self) -> float:
        """What (capped) scores are still to be multiplied by."""
        return 1.0 if self.capped else self.scale

    @property
    def factor_2(self) -> float:
        """`factor` for exponentials in base 2."""
        return self.factor * math.log2(math.e)

    def mangle(self) -> str:
        """A name that is a good identifier, for Triton to name compiled functions by."""
        return f"sizes{hash(self) % 2**64:x}"


def power_of_two(n: int) -> int:
    """The least power of two from n on, and at least 16: the least that a product takes."""
    return max(16, 1 << (n - 1).bit_length())
