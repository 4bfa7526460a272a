"""Block sizes that won on each TPU; `python -m workbench.tpu_sweep all --write` remakes it.

By chip and pass, fields of `TileConfig`; swept at head dim 128, bfloat16. Above each: estimated
time over that of a full matrix unit and no wasted work, VMEM; libtpu, and the day. Estimated from
the compiler's schedule, not timed on a chip: `kernels/workbench/tpu_sweep.py` says what it misses.
"""

# fmt: off
WINNERS: dict[tuple[str, str], dict[str, int]] = {
    # 0.974, 13 MiB; 0.0.42.1, 2026-11-25
    ("tpu7x", "backward"): dict(
        block_q_backward=1024, block_kv_backward=2048
    ),
    # 1.332, 9 MiB; 0.0.42.1, 2026-11-25
    ("tpu7x", "forward"): dict(
        block_q=1024, block_kv=2048
    ),
    # 1.091, 11 MiB; 0.0.42.1, 2026-11-25
    ("v4", "backward"): dict(
        block_q_backward=1024, block_kv_backward=1024
    ),
    # 1.361, 5 MiB; 0.0.42.1, 2026-11-25
    ("v4", "forward"): dict(
        block_q=1024, block_kv=1024
    ),
    # 0.940, 10 MiB; 0.0.42.1, 2026-11-25
    ("v5e", "backward"): dict(
        block_q_backward=1024, block_kv_backward=1024
    ),
    # 1.016, 5 MiB; 0.0.42.1, 2026-11-25
    ("v5e", "forward"): dict(
        block_q=1024, block_kv=1024
    ),
    # 0.954, 10 MiB; 0.0.42.1, 2026-11-25
    ("v5p", "backward"): dict(
        block_q_backward=1024, block_kv_backward=1024
    ),
    # 1.052, 5 MiB; 0.0.42.1, 2026-11-25
    ("v5p", "forward"): dict(
        block_q=1024, block_kv=1024
    ),
    # 1.003, 14 MiB; 0.0.42.1, 2026-11-25
    ("v6e", "backward"): dict(
        block_q_backward=1024, block_kv_backward=2048
    ),
    # 1.336, 8 MiB; 0.0.42.1, 2026-11-25
    ("v6e", "forward"): dict(
        block_q=1024, block_kv=1024
    ),
}
