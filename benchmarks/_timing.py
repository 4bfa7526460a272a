"""Timing of several systems in one run: interleaved, warmed up, median and spread."""

import json
import platform
import statistics
import time
from collections.abc import Callable
from typing import NamedTuple

import jax
import jaxlib
import numpy as np


class Timing(NamedTuple):
    """Seconds of one call: the median, and the quarters around it."""

    median_s: float
    low_s: float
    high_s: float

    def __str__(self) -> str:
        return f"{self.median_s:.3f} s ({self.low_s:.3f} to {self.high_s:.3f})"


def interleaved(calls: dict[str, Callable[[], object]], rounds: int) -> dict[str, Timing]:
    """Times each call once a round, so that a slow minute of the machine hits all of them alike.

    Each is run once untimed before, or it would pay for what its neighbour left in the caches.
    """
    samples: dict[str, list[float]] = {name: [] for name in calls}
    for call in calls.values():
        jax.block_until_ready(call())  # compiles
    for _ in range(rounds):
        for name, call in calls.items():
            jax.block_until_ready(call())
            start = time.perf_counter()
            jax.block_until_ready(call())
            samples[name].append(time.perf_counter() - start)
    return {name: summary(times) for name, times in samples.items()}


def summary(times: list[float]) -> Timing:
    """Median and quartiles."""
    low, middle, high = statistics.quantiles(times, n=4, method="inclusive")
    return Timing(middle, low, high)


def matrix_product(size: int = 2048) -> tuple[Callable[[], object], float]:
    """A float32 matrix product, and its FLOP: the rate that this machine can reach."""
    a = jax.numpy.asarray(np.random.default_rng(0).standard_normal((size, size), np.float32))
    product = jax.jit(lambda a: a @ a)
    return lambda: product(a), 2.0 * size**3


def machine() -> dict[str, object]:
    """What a reader must know to compare."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "device": jax.devices()[0].device_kind,
        "devices": jax.device_count(),
        "machine": platform.machine(),
        "python": platform.python_version(),
        "jax": jax.__version__,
        "jaxlib": jaxlib.__version__,
    }


def print_json(row: dict[str, object]) -> None:
    """One line a run, for collecting."""
    print(json.dumps(row))
