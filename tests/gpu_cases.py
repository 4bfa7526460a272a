"""What the tests of both Hopper tiles share: where they run, cases, and what of a case counts."""

import dataclasses
import importlib.util
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import gpu_emulation
import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest

from burst_kernels import Tile, TileConfig

# Every case runs emulated; on a machine with a Hopper GPU also for real.
WHERE = [
    pytest.param(
        "emulated",
        marks=[
            pytest.mark.kernel,
            pytest.mark.skipif(
                gpu_emulation.UNAVAILABLE is not None, reason=str(gpu_emulation.UNAVAILABLE)
            ),
        ],
    ),
    pytest.param("gpu", marks=pytest.mark.gpu),
]
COMPILER = pytest.mark.skipif(
    not (importlib.util.find_spec("jax_cuda13_plugin") and shutil.which("ptxas")),
    reason="needs jax-cuda13-plugin and jax-cuda13-pjrt of jax's version, and ptxas on the PATH",
)


# What is compiled for Hopper: every head dim in each dtype, and the values' beside another one.
SIZES = [
    (H, H, dtype) for H in (64, 128, 256) for dtype in (jnp.bfloat16, jnp.float16)
] + [(64, 128, jnp.bfloat16), (192, 128, jnp.bfloat16)]  # fmt: skip


def ptxas_report(folder: Path) -> tuple[str, int]:
    """What ptxas says of kernels that `MOSAIC_GPU_DUMP_TO` recorded, and the bytes they spill."""
    report = "".join(p.read_text() for p in folder.glob("*.ptxas"))
    assert "sm_90a" in report
    assert "Potential Performance Loss" not in report, "wgmma is serialized"
    spilled = [
        int(n)
        for n in re.findall(r"(\d+) bytes spill stores, \d+ bytes spill loads$", report, re.M)
    ]
    assert spilled
    return report, max(spilled)


@dataclasses.dataclass(frozen=True)
class Case:
    """One tile; positions by functions of the number of tokens, rows first."""

    name: str
    t: int = 128
    s: int = 128
    B: int = 1
    N: int = 1
    K: int = 1
    H: int = 64
    Hv: int = 64
    q_positions: Callable[[int], np.ndarray] | None = None
    kv_positions: Callable[[int], np.ndarray] | None = None
    left: int | None = None
    right: int | None = None
    kinds: int = 0
    cap: float | None = None
    scale: float = 0.1
    dtype: Any = jnp.bfloat16
    config: TileConfig = TileConfig(chip="sm_90")

    def __str__(self) -> str:
        return self.name


def start(first: int) -> Callable[[int], np.ndarray]:
    return lambda n: (first + np.arange(n))[None]


def zigzag(n: int) -> np.ndarray:
    return np.concatenate((np.arange(n // 2), 3 * n // 2 + np.arange(n // 2)))[None]


def of_each_row(n: int) -> np.ndarray:
    return np.stack([np.arange(n) * 2, oracle.permutation(n) - n // 4])


def made(case: Case) -> tuple[Tile, np.ndarray]:
    """The tile, and which of its pairs count, [b, t, s]."""
    seen = np.ones((1, case.t, case.s), bool)
    fields: dict[str, Any] = {}
    if case.q_positions is not None:
        q, kv = case.q_positions(case.t), case.kv_positions(case.s)
        fields |= dict(
            q_positions=jnp.asarray(q, jnp.int32), kv_positions=jnp.asarray(kv, jnp.int32)
        )
        q, kv = q[:, :, None], kv[:, None, :]
        seen = seen & (q >= 0) & (kv >= 0)
        seen = seen & ((case.right is None) | (kv - q <= (case.right or 0)))
        seen = seen & ((case.left is None) | (q - kv <= (case.left or 0)))
    if case.kinds:
        rng = oracle.generator(case.name)
        q, kv = (
            np.sort(rng.integers(0, 3, (case.kinds, 2, n)), -1).astype(np.int32)
            for n in (case.t, case.s)
        )
        fields |= dict(q_segments=jnp.asarray(q), kv_segments=jnp.asarray(kv))
        seen = seen & (q[:, :, :, None] == kv[:, :, None, :]).all(0)
    tile = Tile(
        scale=case.scale, logits_soft_cap=case.cap, left=case.left, right=case.right, **fields
    )
    return tile, seen


def turned(x: Any) -> Any:
    """Tokens before heads, or heads before tokens."""
    return jax.tree.map(lambda a: jnp.swapaxes(jnp.asarray(a), 1, 2), x)
