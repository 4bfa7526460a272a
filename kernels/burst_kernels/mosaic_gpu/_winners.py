"""Block sizes for Hopper; `python kernels/workbench/gpu_bench.py --tune --write` remakes it there.

By chip, pass and head dim, fields of `TileConfig`; tuned at that head dim, bfloat16. Above each:
TFLOP/s of a causal and of a full tile, the device, and the day; or that nobody has timed it, and
then it is what FlashAttention-3 takes (arXiv 2407.08608), in multiples of 64 rows; stages are as
many as fit of 2 and 4, since a power of two makes a slot's number cheap.
"""

# fmt: off
WINNERS: dict[tuple[str, str, int], dict[str, int]] = {
    # not measured
    ("sm_90", "backward", 64): dict(
        block_q_backward=128, block_kv_backward=128, stages_backward=2
    ),
    # not measured
    ("sm_90", "backward", 128): dict(
        block_q_backward=64, block_kv_backward=128, stages_backward=2
    ),
    # not measured
    ("sm_90", "backward", 192): dict(
        block_q_backward=64, block_kv_backward=64, stages_backward=2
    ),
    # not measured
    ("sm_90", "backward", 256): dict(
        block_q_backward=64, block_kv_backward=64, stages_backward=2
    ),
    # not measured
    ("sm_90", "forward", 64): dict(
        block_q=128, block_kv=128, stages=4
    ),
    # not measured
    ("sm_90", "forward", 128): dict(
        block_q=128, block_kv=128, stages=2
    ),
    # not measured
    ("sm_90", "forward", 192): dict(
        block_q=128, block_kv=128, stages=2
    ),
    # not measured
    ("sm_90", "forward", 256): dict(
        block_q=128, block_kv=64, stages=2
    ),
}
