"""The devices a command runs on: those there are, or simulated ones on the CPU."""

from collections.abc import Sequence

import jax

from burst_jax.cli import BadRequest

# jax exports the class as a variable, which no annotation may hold.
Devices = Sequence[jax.Device]  # pyright: ignore[reportInvalidTypeForm]

# The largest ring that the tests simulate. More would only make two cores switch between threads.
MAX_SIMULATED = 64


def find_devices(count: int | None) -> Devices:
    """`count` devices of JAX's default platform; None: all there are.

    Without an accelerator they are simulated on the CPU, which must be arranged before JAX starts
    a backend: call this first.

    Raises:
        BadRequest: there are fewer.
    """
    if count is None:
        return list(jax.devices())
    if count < 1:
        raise BadRequest(f"--devices must be at least 1, got {count}.")
    _simulate(min(count, MAX_SIMULATED))
    try:
        devices = jax.devices()
    except RuntimeError as error:
        raise BadRequest(f"JAX finds no device to run on: {error}") from error
    if len(devices) >= count:
        return list(devices[:count])
    kind = devices[0].platform
    there = f"there {'is' if len(devices) == 1 else 'are'} ({len(devices)}, {kind})"
    if kind != "cpu":
        remedy = f"ask for at most {len(devices)}, or simulate with JAX_PLATFORMS=cpu"
    elif count > MAX_SIMULATED:
        remedy = f"on a CPU at most {MAX_SIMULATED} are simulated"
    else:
        remedy = (
            f"ask for at most {len(devices)} (JAX had been started, or told by "
            f"--xla_force_host_platform_device_count or JAX_NUM_CPU_DEVICES to simulate that many)"
        )
    raise BadRequest(f"--devices {count} is more than {there}; {remedy}.")


def _simulate(count: int) -> None:
    """Lets the CPU have `count` devices, if that can still be said; other platforms ignore it."""
    if jax.config.values["jax_num_cpu_devices"] >= count:
        return
    try:
        jax.config.update("jax_num_cpu_devices", count)
    except RuntimeError:  # a backend has started: its devices are all there will be
        return
