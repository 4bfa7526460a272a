"""burst_attention against the float64 oracle: outputs, lse, all gradients, over all settings.

The settings are too many for their product, so the fast cases are a covering array: every pair of
values of any two settings occurs in some case. Marked slow: every triple.
"""

import dataclasses
import itertools
from typing import Any

import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from jax.sharding import AxisType

import burst_jax as bj

FACTORS: dict[str, tuple] = {
    "R": (1, 2, 3, 4, 8),
    "layout": ("contiguous", "zigzag", "striped"),
    "mask": tuple(oracle.MASKS),
    "heads": ((2, 2), (4, 2), (3, 1)),
    "forward": ("kv", "q"),
    "backward": ("kv", "q"),
    "length": ("whole", "padded", "cross"),
    "head_dims": ((8, 8), (4, 6)),
    "extras": ("", "sinks", "soft cap", "sinks, soft cap"),
    "positions": ("of the layout", "[T]", "[B, T]", "a pair"),
    "dtype": ("float64", "float32"),
    "one_message": (False, True),
    "axis": ("Explicit", "Auto"),
}
TOLERANCE = {"float64": 1e-10, "float32": 1e-5}


@dataclasses.dataclass(frozen=True)
class Case:
    """One combination of settings."""

    R: int
    layout: str
    mask: str
    heads: tuple[int, int]
    forward: str
    backward: str
    length: str
    head_dims: tuple[int, int]
    extras: str
    positions: str
    dtype: str
    one_message: bool
    axis: str

    def __str__(self) -> str:
        return "-".join(
            str(x).replace(" ", "") for x in dataclasses.astuple(self) if x not in ("", False)
        )

    @property
    def tokens(self) -> tuple[int, int]:
        """T and S."""
        multiple = self.R * (2 if self.layout == "zigzag" else 1)
        T = -(-32 // multiple) * multiple
        return {"whole": (T, T), "padded": (T - 3, T - 3), "cross": (T - 1, T + 4)}[self.length]


def cases(strength: int) -> list[Case]:
    return [Case(**row) for row in oracle.covering(FACTORS, strength)]


FAST = cases(strength=2)


def positions(kind: str, lay: oracle.Lay, B: int, T: int, S: int) -> Any:
    """Explicit positions, in an order that no layout has."""

    def row(n: int, times: int = 1) -> np.ndarray:
        return lay((oracle.permutation(n) * times)[None])[0]

    match kind:
        case "of the layout":
            return None
        case "a pair":
            aligned_at_the_end = lay(np.arange(T, dtype=np.int32)[None] + max(S - T, 0))[0]
            return aligned_at_the_end, lay(np.arange(S, dtype=np.int32)[None])[0]
        case "[T]":
            return row(T) if T == S else (row(T), row(S))
        case "[B, T]":

            def rows(n: int) -> np.ndarray:
                return lay(np.stack([oracle.permutation(n) * (b + 1) for b in range(B)]))

            return rows(T) if T == S else (rows(T), rows(S))
    raise AssertionError(kind)


def check(case: Case) -> None:
    B, (T, S), (N, K), (H, Hv) = 2, case.tokens, case.heads, case.head_dims
    x = oracle.inputs(
        str(case), B=B, T=T, S=S, N=N, K=K, H=H, Hv=Hv, sinks="sinks" in case.extras,
        dtype=getattr(jnp, case.dtype),
    )  # fmt: skip
    where = oracle.ring(
        case.R,
        case.layout,
        getattr(AxisType, case.axis),
        length=T,
        key_length=S if S != T else None,
    )
    cap = 1.5 if "soft cap" in case.extras else None
    plan = bj.Plan(forward=case.forward, backward=case.backward, one_message=case.one_message)

    def arguments(lay: oracle.Lay) -> dict[str, Any]:
        return {
            "mask": oracle.MASKS[case.mask](lay, B, T, S),
            "positions": positions(case.positions, lay, B, T, S),
            "logits_soft_cap": cap,
        }

    got = oracle.sharded(x, where, plan=plan, **arguments(where.place))
    want = oracle.truth(x, **arguments(jnp.asarray))
    oracle.assert_close(got, want, TOLERANCE[case.dtype])


@pytest.mark.parametrize("case", FAST, ids=str)
def test_outputs_and_gradients_match_the_oracle(case):
    check(case)


@pytest.mark.slow
@pytest.mark.parametrize("case", cases(strength=3), ids=str)
def test_outputs_and_gradients_match_the_oracle_for_every_triple_of_settings(case):
    check(case)


def test_every_pair_of_settings_is_among_the_cases():
    rows = [dataclasses.asdict(case) for case in FAST]
    for a, b in itertools.combinations(FACTORS, 2):
        found = {(row[a], row[b]) for row in rows}
        assert found == set(itertools.product(FACTORS[a], FACTORS[b])), (a, b)
