"""The device code: forward; gradients of keys and values; gradients of queries. FlashAttention-2.

One program computes one block of one side and walks the active blocks of the other (`_active`):

    forward   a block of queries of one head     for each active block of keys:
                                                   scores = q k^T, online softmax, acc += p v
                                                 out = acc / sum, lse
    backward  a block of keys of one kv head     for each active block of queries of each of its
                                                 query heads:
                                                   scores^T, p^T,               dv += p^T do
                                                   ds^T = p^T (v do^T - delta), dk += ds^T q
              a block of queries of one head     for each active block of keys:
                                                   p, ds,                       dq += ds k

No program adds to what another one writes, so that results are the same bits in every run. The two
halves of the backward are one launch, so that the last programs of one run beside the first of the
other. Triton's compiler pipelines the loops: on sm_80 and newer the next blocks come to shared
memory, by copies that run beside, while this one is computed. FULL blocks come first, in a loop of
their own without mask arithmetic.

Differs from FlashAttention-2 (arXiv 2307.08691) in that blocks come from a list, in that the
softmax starts from what the ring has found before, and in that the scale is applied after the
maximum is taken off.

`C` is `Sizes`: constants. Offsets of whole blocks are int64, those inside a block int32. A pointer
that a kernel does not need is that of q. Triton reads the sources of these functions, so nothing
may wrap them, not even what checks types in tests: hence `no_type_check`.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false
import math
from typing import no_type_check

import triton
import triton.language as tl

_LN_2 = tl.constexpr(math.log(2.0))
_LOG2_E = tl.constexpr(math.log2(math.e))
_INF = tl.constexpr(math.inf)
# Products of float32 operands: from three of TF32, on tensor cores. Each is off by 2^-21 or less.
_PRECISION = tl.constexpr("tf32x3")


@triton.jit
@no_type_check
def _load(base, left, ROWS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr, ALL):
    """Rows [ROWS, WIDE] from `base` on; zeros beyond WIDTH, and from `left` on if not ALL."""
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDE)
    at = base + rows[:, None] * WIDTH + columns[None, :]
    if ALL:
        if WIDTH == WIDE:
            x = tl.load(at)
        else:
            x = tl.load(at, mask=(columns < WIDTH)[None, :], other=0.0)
    else:
        x = tl.load(at, mask=(rows < left)[:, None] & (columns < WIDTH)[None, :], other=0.0)
    return x


@triton.jit
@no_type_check
def _store(base, value, left, ROWS: tl.constexpr, WIDTH: tl.constexpr, WIDE: tl.constexpr):
    rows = tl.arange(0, ROWS)
    columns = tl.arange(0, WIDE)
    at = base + rows[:, None] * WIDTH + columns[None, :]
    tl.store(at, value, mask=(rows < left)[:, None] & (columns < WIDTH)[None, :])


@triton.jit
@no_type_check
def _capped(scores, C: tl.constexpr):
    """Scores from q k^T, in units of 1 / factor."""
    if C.capped:
        # tanh(x) = 1 - 2 / (exp(2 x) + 1), also where the power is 0 or inf.
        power = tl.exp2(scores * (2.0 * _LOG2_E * C.scale / C.soft_cap))
        scores = C.soft_cap - (2.0 * C.soft_cap) / (power + 1.0)
    return scores


@triton.jit
@no_type_check
def _seen(q_at, kv_at, C: tl.constexpr, TURNED: tl.constexpr):
    """Which pairs count; q_at, kv_at: where the first mark of each token lies; TURNED: k first."""
    if TURNED:
        seen = tl.full((C.block_kv, C.block_q), True, tl.int1)
    else:
        seen = tl.full((C.block_q, C.block_kv), True, tl.int1)
    if C.last or C.first:
        position = tl.load(kv_at)
        if C.last:
            seen = seen & (position <= tl.load(q_at))
        if C.first:
            seen = seen & (position >= tl.load(q_at + C.last * C.q_tokens))
    KINDS: tl.constexpr = C.kinds
    for kind in tl.static_range(KINDS):
        q_id = tl.load(q_at + (C.q_rows + kind) * C.q_tokens)
        seen = seen & (q_id == tl.load(kv_at + (C.kv_rows + kind) * C.kv_tokens))
    return seen


@triton.jit
@no_type_check
def _listed(
    block, sequence, q_marks, kv_marks, active, counts, order, BLOCKS: tl.constexpr,
    OTHERS: tl.constexpr, C: tl.constexpr,
):  # fmt: skip
    """A block of BLOCKS, the heaviest first; how many of OTHERS are FULL, how many count with it.

    And where their numbers are listed, and the marks of this sequence.
    """
    full, total = OTHERS, OTHERS
    if C.listed:
        mask_row = sequence * C.per_sequence
        block = tl.load(order + mask_row * BLOCKS + block)
        listed = mask_row * BLOCKS + block
        full, total = tl.load(counts + listed * 2), tl.load(counts + listed * 2 + 1)
        active += listed.to(tl.int64) * OTHERS
        q_marks += mask_row.to(tl.int64) * ((C.q_rows + C.kinds) * C.q_tokens)
        kv_marks += mask_row.to(tl.int64) * ((C.kv_rows + C.kinds) * C.kv_tokens)
    return block, full, total, active, q_marks, kv_marks


@triton.jit
@no_type_check
def _block(active, n, C: tl.constexpr):
    """The n-th active block. Loops read it a turn ahead, so that no stage is spent on it."""
    return tl.load(active + n) if C.listed else n


@triton.jit
@no_type_check
def _attend(m, total, acc, q, k, v, j, q_marks, kv_marks, C: tl.constexpr, MASKED: tl.constexpr):
    """Online softmax, one block of keys further.

    k, v: of this head; q_marks: of these queries; kv_marks: of this sequence.
    """
    first = j * C.block_kv
    # A key beyond the last is padding, and its block not FULL.
    WHOLE: tl.constexpr = C.even_kv or not MASKED
    k_block = _load(k + first.to(tl.int64) * C.H, C.S - first, C.block_kv, C.H, C.wide, WHOLE)
    scores = _capped(tl.dot(q, tl.trans(k_block), input_precision=_PRECISION), C)
    if MASKED:
        kv_at = kv_marks + first + tl.arange(0, C.block_kv)
        scores = tl.where(_seen(q_marks[:, None], kv_at[None, :], C, False), scores, -_INF)
    greatest = tl.maximum(m, tl.max(scores, 1))
    # A row that has seen nothing has no maximum to take off.
    bound = tl.where(greatest == -_INF, 0.0, greatest) if MASKED else greatest
    p = tl.exp2((scores - bound[:, None]) * C.factor_2)
    shrink = tl.exp2((m - bound) * C.factor_2)
    total = total * shrink + tl.sum(p, 1)
    v_block = _load(v + first.to(tl.int64) * C.Hv, C.S - first, C.block_kv, C.Hv, C.wide_v, WHOLE)
    acc = acc * shrink[:, None]
    acc = tl.dot(p.to(v_block.dtype), v_block, acc, input_precision=_PRECISION)
    return greatest, total, acc


@triton.jit
@no_type_check
def forward_kernel(
    q, k, v, q_marks, kv_marks, active, counts, order, before_out, before_lse, out, lse,
    C: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: out and lse."""
    # Blocks are the fastest: programs that run together read the same keys.
    row, block = tl.program_id(0) // C.num_q, tl.program_id(0) % C.num_q
    sequence, head = row // C.N, row % C.N
    block, full, total_blocks, active, q_marks, kv_marks = _listed(
        block, sequence, q_marks, kv_marks, active, counts, order, C.num_q, C.num_kv, C
    )
    first = block * C.block_q
    left = C.T - first
    rows = tl.arange(0, C.block_q)
    q_marks = q_marks + first + rows
    kv_row = (sequence * C.K + head // C.group).to(tl.int64)
    k += kv_row * (C.S * C.H)
    v += C.v_at + kv_row * (C.S * C.Hv)
    at = row.to(tl.int64) * C.T + first
    q_block = _load(q + at * C.H, left, C.block_q, C.H, C.wide, C.even_q)
    LOOPS: tl.constexpr = C.loops
    if C.onto[0]:
        m = tl.load(before_lse + at + rows, mask=rows < left, other=-_INF) * (1.0 / C.factor)
        total = tl.where(m == -_INF, 0.0, 1.0)
        acc = _load(before_out + at * C.Hv, left, C.block_q, C.Hv, C.wide_v, C.even_q)
    else:
        m = tl.full((C.block_q,), -_INF, tl.float32)
        total = tl.full((C.block_q,), 0.0, tl.float32)
        acc = tl.full((C.block_q, C.wide_v), 0.0, tl.float32)
    last = total_blocks - 1
    j = _block(active, 0, C)
    for MASKED in tl.static_range(LOOPS):
        for n in tl.range(full * MASKED, total_blocks if MASKED else full):
            ahead = _block(active, tl.minimum(n + 1, last), C)
            m, total, acc = _attend(m, total, acc, q_block, k, v, j, q_marks, kv_marks, C, MASKED)
            j = ahead
    saw = total != 0.0  # NaN is seen, and stays
    total = tl.where(saw, total, 1.0)
    found = tl.where(saw, m * C.factor + tl.log2(total) * _LN_2, -_INF)
    tl.store(lse + at + rows, found, mask=rows < left)
    _store(out + at * C.Hv, acc / total[:, None], left, C.block_q, C.Hv, C.wide_v)


@triton.jit
@no_type_check
def _rows_of(lse, delta, at, left, C: tl.constexpr):
    """lse (in units of 1 / factor) and delta of a block of queries.

    Queries that see nothing, and those beyond the last, get lse = inf: they count nowhere.
    """
    rows = tl.arange(0, C.block_q)
    if C.even_q:
        bound, delta = tl.load(lse + at + rows), tl.load(delta + at + rows)
    else:
        bound = tl.load(lse + at + rows, mask=rows < left, other=-_INF)
        delta = tl.load(delta + at + rows, mask=rows < left, other=0.0)
    blind = bound == -_INF
    return tl.where(blind, _INF, bound * (1.0 / C.factor)), tl.where(blind, 0.0, delta)


@triton.jit
@no_type_check
def _probability(scores, bound, C: tl.constexpr):
    """exp(factor (scores - bound)); at most 1, whatever the rounding of an lse."""
    below = tl.minimum(scores - bound, 0.0, propagate_nan=tl.PropagateNan.ALL)
    return tl.exp2(below * C.factor_2)


@triton.jit
@no_type_check
def _powers(powers, C: tl.constexpr):
    """The power of two that score gradients are multiplied by, and its inverse."""
    power, inverse = 1.0, 1.0
    if C.powers:
        power, inverse = tl.load(powers), tl.load(powers + 1)
    return power, inverse


@triton.jit
@no_type_check
def _score_gradient(p, dp, delta, scores, power, C: tl.constexpr):
    """ds times a power of two, from capped scores."""
    ds = p * (dp * power - delta * power)
    if C.capped:
        ratio = scores * (1.0 / C.soft_cap)
        ds = ds * (1.0 - ratio * ratio)
    return ds


@triton.jit
@no_type_check
def _keys_step(
    dk, dv, k_block, v_block, q, do, lse, delta, power, row, i, q_marks, kv_marks,
    C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dk / scale and dv, one block of queries of one head further. kv_marks: of these keys."""
    first = i * C.block_q
    left = C.T - first
    at = row * C.T + first
    q_block = _load(q + at * C.H, left, C.block_q, C.H, C.wide, C.even_q)
    bound, delta_block = _rows_of(lse, delta, at, left, C)
    scores = _capped(tl.dot(k_block, tl.trans(q_block), input_precision=_PRECISION), C)
    p = _probability(scores, bound[None, :], C)
    if MASKED:
        q_at = q_marks + first + tl.arange(0, C.block_q)
        p = tl.where(_seen(q_at[None, :], kv_marks[:, None], C, True), p, 0.0)
    do_block = _load(do + at * C.Hv, left, C.block_q, C.Hv, C.wide_v, C.even_q)
    dv = tl.dot(p.to(do_block.dtype), do_block, dv, input_precision=_PRECISION)
    dp = tl.dot(v_block, tl.trans(do_block), input_precision=_PRECISION)
    ds = _score_gradient(p, dp, delta_block[None, :], scores, power, C)
    dk = tl.dot(ds.to(q_block.dtype), q_block, dk, input_precision=_PRECISION)
    return dk, dv


@triton.jit
@no_type_check
def _keys_program(
    program, q, k, v, do, lse, delta, powers, q_marks, kv_marks, active, counts, order, before_dk,
    before_dv, dk, dv, C: tl.constexpr,
):  # fmt: skip
    """A block of keys of one kv head: dk and dv."""
    row, block = program // C.num_kv, program % C.num_kv
    sequence = row // C.K
    block, full, total_blocks, active, q_marks, kv_marks = _listed(
        block, sequence, q_marks, kv_marks, active, counts, order, C.num_kv, C.num_q, C
    )
    first = block * C.block_kv
    left = C.S - first
    kv_marks = kv_marks + first + tl.arange(0, C.block_kv)
    at = row.to(tl.int64) * C.S + first
    k_block = _load(k + at * C.H, left, C.block_kv, C.H, C.wide, C.even_kv)
    v_block = _load(v + C.v_at + at * C.Hv, left, C.block_kv, C.Hv, C.wide_v, C.even_kv)
    power, inverse = _powers(powers, C)
    # Query heads of this kv head follow one another: sequence N + (row - sequence K) G = row G.
    q_row = row.to(tl.int64) * C.group
    LOOPS: tl.constexpr = C.loops
    dk_block = tl.full((C.block_kv, C.wide), 0.0, tl.float32)
    dv_block = tl.full((C.block_kv, C.wide_v), 0.0, tl.float32)
    for MASKED in tl.static_range(LOOPS):
        count = total_blocks - full if MASKED else full
        active += tl.minimum(full, C.num_q - 1) * MASKED  # inside the list, also if none is left
        # One loop over heads and blocks, so that the pipeline is filled once.
        here, n, i = q_row, 0, _block(active, 0, C)
        for _ in tl.range(0, C.group * count):
            wraps = n + 1 == count
            n = tl.where(wraps, 0, n + 1)
            ahead = _block(active, n, C)
            dk_block, dv_block = _keys_step(
                dk_block, dv_block, k_block, v_block, q, do, lse, delta, power, here, i, q_marks,
                kv_marks, C, MASKED,
            )  # fmt: skip
            here, i = here + wraps, ahead
    dk_block = dk_block * (C.scale * inverse)
    if C.onto[1]:
        dk_block += _load(before_dk + at * C.H, left, C.block_kv, C.H, C.wide, C.even_kv)
    if C.onto[2]:
        dv_block += _load(before_dv + at * C.Hv, left, C.block_kv, C.Hv, C.wide_v, C.even_kv)
    _store(dk + at * C.H, dk_block, left, C.block_kv, C.H, C.wide)
    _store(dv + at * C.Hv, dv_block, left, C.block_kv, C.Hv, C.wide_v)


@triton.jit
@no_type_check
def _queries_step(
    dq, q_block, do_block, bound, delta_block, power, k, v, j, q_marks, kv_marks,
    C: tl.constexpr, MASKED: tl.constexpr,
):  # fmt: skip
    """dq / scale, one block of keys further. The rest as in `_attend`."""
    first = j * C.block_kv
    WHOLE: tl.constexpr = C.even_kv or not MASKED
    k_block = _load(k + first.to(tl.int64) * C.H, C.S - first, C.block_kv, C.H, C.wide, WHOLE)
    scores = _capped(tl.dot(q_block, tl.trans(k_block), input_precision=_PRECISION), C)
    p = _probability(scores, bound[:, None], C)
    if MASKED:
        kv_at = kv_marks + first + tl.arange(0, C.block_kv)
        p = tl.where(_seen(q_marks[:, None], kv_at[None, :], C, False), p, 0.0)
    v_block = _load(v + first.to(tl.int64) * C.Hv, C.S - first, C.block_kv, C.Hv, C.wide_v, WHOLE)
    dp = tl.dot(do_block, tl.trans(v_block), input_precision=_PRECISION)
    ds = _score_gradient(p, dp, delta_block[:, None], scores, power, C)
    return tl.dot(ds.to(k_block.dtype), k_block, dq, input_precision=_PRECISION)


@triton.jit
@no_type_check
def _queries_program(
    program, q, k, v, do, lse, delta, powers, q_marks, kv_marks, active, counts, order, before_dq,
    dq, C: tl.constexpr,
):  # fmt: skip
    """A block of queries of one head: dq."""
    row, block = program // C.num_q, program % C.num_q
    sequence, head = row // C.N, row % C.N
    block, full, total_blocks, active, q_marks, kv_marks = _listed(
        block, sequence, q_marks, kv_marks, active, counts, order, C.num_q, C.num_kv, C
    )
    first = block * C.block_q
    left = C.T - first
    q_marks = q_marks + first + tl.arange(0, C.block_q)
    kv_row = (sequence * C.K + head // C.group).to(tl.int64)
    k += kv_row * (C.S * C.H)
    v += C.v_at + kv_row * (C.S * C.Hv)
    at = row.to(tl.int64) * C.T + first
    q_block = _load(q + at * C.H, left, C.block_q, C.H, C.wide, C.even_q)
    do_block = _load(do + at * C.Hv, left, C.block_q, C.Hv, C.wide_v, C.even_q)
    bound, delta_block = _rows_of(lse, delta, at, left, C)
    power, inverse = _powers(powers, C)
    LOOPS: tl.constexpr = C.loops
    dq_block = tl.full((C.block_q, C.wide), 0.0, tl.float32)
    last = total_blocks - 1
    j = _block(active, 0, C)
    for MASKED in tl.static_range(LOOPS):
        for n in tl.range(full * MASKED, total_blocks if MASKED else full):
            ahead = _block(active, tl.minimum(n + 1, last), C)
            dq_block = _queries_step(
                dq_block, q_block, do_block, bound, delta_block, power, k, v, j, q_marks, kv_marks,
                C, MASKED,
            )  # fmt: skip
            j = ahead
    dq_block = dq_block * (C.scale * inverse)
    if C.onto[0]:
        dq_block += _load(before_dq + at * C.H, left, C.block_q, C.H, C.wide, C.even_q)
    _store(dq + at * C.H, dq_block, left, C.block_q, C.H, C.wide)


@triton.jit
@no_type_check
def backward_kernel(
    q, k, v, do, lse, delta, powers, q_marks, kv_marks, k_active, k_counts, k_order, q_active,
    q_counts, q_order, before_dq, before_dk, before_dv, dq, dk, dv, C: tl.constexpr,
):  # fmt: skip
    """A block of keys, with its blocks of queries `k_active`; or of queries: `q_active`."""
    program = tl.program_id(0)
    if program < C.key_programs:
        _keys_program(
            program, q, k, v, do, lse, delta, powers, q_marks, kv_marks, k_active, k_counts,
            k_order, before_dk, before_dv, dk, dv, C,
        )  # fmt: skip
    else:
        _queries_program(
            program - C.key_programs, q, k, v, do, lse, delta, powers, q_marks, kv_marks, q_active,
            q_counts, q_order, before_dq, dq, C,
        )  # fmt: skip
