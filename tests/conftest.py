"""What every test stands on: eight simulated devices, float64, and no silent promotion.

burst_jax is not imported at the top of this file: the shape checker hooks its import, and must come
first. Test modules may import it as usual.
"""

import importlib.util
import os
import zlib
from collections.abc import Callable, Iterator

import hypothesis
import jax
import jaxlib
import pytest

# Before any backend starts. Where there is an accelerator, the simulated mesh must not silently
# become one GPU: a device is used only when the caller names it (`JAX_PLATFORMS=cuda,cpu`).
jax.config.update("jax_num_cpu_devices", 8)
if not os.environ.get("JAX_PLATFORMS"):
    jax.config.update("jax_platforms", "cpu")
jax.config.update("jax_enable_x64", True)  # the oracle works in float64
# Mixing dtypes or ranks by accident is how a bfloat16 accumulator or a wrong broadcast gets in.
jax.config.update("jax_numpy_dtype_promotion", "strict")
jax.config.update("jax_numpy_rank_promotion", "raise")

# The first example of a test compiles; its time says nothing. Under CI hypothesis loads a profile
# of its own, repeatable and without deadline.
hypothesis.settings.register_profile("compiling", deadline=None)
if not os.environ.get("CI"):
    hypothesis.settings.load_profile("compiling")


def pytest_report_header() -> str:
    return f"jax: {jax.__version__}, jaxlib: {jaxlib.__version__}"


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Skips, with the place where it does run, what this machine cannot run."""
    for marker in ("gpu", "tpu"):
        if item.get_closest_marker(marker) and jax.default_backend() != marker:
            pytest.skip(f"needs a {marker.upper()}; run `pytest -m {marker}` on a machine with one")
    for name in ("mosaic_gpu", "triton"):
        if item.get_closest_marker("gpu") and name in item.path.name:
            from burst_kernels import BACKENDS, chip_at_hand

            if (reason := BACKENDS[name].unavailable(chip_at_hand())) is not None:
                pytest.skip(reason)
    if item.get_closest_marker("aot") and importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs the TPU compiler; `make test-aot` installs it and runs this")


@pytest.fixture
def getkey(request: pytest.FixtureRequest) -> Callable[[], jax.Array]:
    """Fresh random keys: each call another, each run of the same test the same ones."""
    key = jax.random.key(zlib.crc32(request.node.nodeid.encode()))

    def next_key() -> jax.Array:
        nonlocal key
        key, fresh = jax.random.split(key)
        return fresh

    return next_key


@pytest.fixture
def ordinary_promotion() -> Iterator[None]:
    """JAX's usual promotion, for a test that runs other people's code.

    optax's schedules and flax's bfloat16 norms mix dtypes; our own code must not need this.
    """
    with jax.numpy_dtype_promotion("standard"), jax.numpy_rank_promotion("allow"):
        yield
