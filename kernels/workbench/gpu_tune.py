"""Block sizes of the Hopper tiles by time: candidates, the best of them, and the table of winners.

`python kernels/workbench/gpu_bench.py --tune --write` times every candidate that fits on the GPU at
hand, on a causal and on a full tile, and rewrites the rows that it has measured.
"""

import dataclasses
import json
import re
import statistics
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

import jax.numpy as jnp

from burst_kernels import Problem, TileConfig
from burst_kernels.mosaic_gpu import _config

TABLE = Path(__file__).resolve().parents[1] / "burst_kernels" / "mosaic_gpu" / "_winners.py"
PASSES = {one.name: one for one in (_config.FORWARD, _config.BACKWARD)}
MASKS = ("causal", "full")


class Score(NamedTuple):
    """How a candidate does.

    Attributes:
        direction: "forward" or "backward".
        H: the head dim.
        sizes: fields of `TileConfig`.
        rates: TFLOP/s for each of `MASKS`.
    """

    direction: str
    H: int
    sizes: dict[str, int]
    rates: dict[str, float]

    @property
    def rate(self) -> float:
        """Of as much work of each mask."""
        return statistics.harmonic_mean(list(self.rates.values()))


def candidates(direction: str, H: int) -> list[dict[str, int]]:
    """Block sizes that fit with a mask, as fields of `TileConfig`; the present winner first."""
    one = PASSES[direction]
    problem = Problem(
        B=1, t=8192, s=8192, N=16, K=16, H=H, Hv=H, dtype=jnp.dtype(jnp.bfloat16), masked=True
    )
    return [
        dict(zip(one.fields, blocks, strict=True)) for blocks in dict.fromkeys(one.all(problem))
    ]


def tune(
    directions: Iterable[str],
    head_dims: Sequence[int],
    rate: Callable[[str, int, str, TileConfig], float],
    say: Callable[[str], None],
) -> list[Score]:
    """The best candidate of each pass and head dim.

    Args:
        directions, head_dims: what to tune.
        rate: (direction, head dim, mask, config) -> TFLOP/s.
        say: takes a JSON line for each candidate.
    """
    winners = []
    for direction in directions:
        for H in head_dims:
            scores = []
            for sizes in candidates(direction, H):
                line: dict = {"what": "tune", "direction": direction, "H": H} | sizes
                try:
                    config = dataclasses.replace(TileConfig(), **sizes)
                    rates = {mask: rate(direction, H, mask, config) for mask in MASKS}
                except Exception as error:  # one that does not compile must not end the others
                    say(json.dumps(line | {"failed": f"{type(error).__name__}: {error}"[:300]}))
                    continue
                scores.append(Score(direction, H, sizes, rates))
                say(json.dumps(line | {"tflop_per_s": rates, "rate": round(scores[-1].rate, 1)}))
            if scores:
                winners.append(max(scores, key=lambda score: score.rate))
    return winners


def row(winner: Score, where: str) -> str:
    """The lines of the table about a pass at a head dim; `where`: the device, and the day."""
    rates = ", ".join(f"{winner.rates[mask]:.0f} {mask}" for mask in MASKS)
    sizes = ", ".join(f"{name}={size}" for name, size in winner.sizes.items())
    key = f'("sm_90", "{winner.direction}", {winner.H})'
    return f"    # {rates}; {where}\n    {key}: dict(\n        {sizes}\n    ),\n"


def updated(text: str, winners: Sequence[Score], where: str) -> str:
    """The table with new rows in place of those about the same pass and head dim."""
    head, opening, body = text.partition("int]] = {\n")
    assert opening, f"{TABLE.name} has another form than this writes"
    found = re.findall(r"(    #.*\n    (\(.*\)): .*\n.*\n.*\n)", body)
    rows = {key: lines for lines, key in found}
    for winner in winners:
        rows[f'("sm_90", "{winner.direction}", {winner.H})'] = row(winner, where)
    in_order = sorted(rows, key=lambda key: (key.split(",")[1], int(re.findall(r"\d+", key)[-1])))
    return head + opening + "".join(rows[key] for key in in_order) + "}\n"
