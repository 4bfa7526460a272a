"""`burst-jax demo`: what the library does, shown on simulated devices."""

from collections.abc import Sequence

from rich.console import Console

from burst_jax.cli import BadRequest
from burst_jax.cli.devices import find_devices
from burst_jax.cli.options import parse
from burst_jax.demo.config import DemoConfig


def run(arguments: Sequence[str]) -> int:
    """Runs the demo; returns 0 if every claim held, 1 if not."""
    config = parse(DemoConfig, arguments, command="demo")
    devices = find_devices(config.devices)

    from burst_jax.demo.show import prepare, show  # Flax, optax and matplotlib are slow to import

    try:
        corpus = prepare(config)
    except ValueError as error:
        raise BadRequest(str(error)) from error
    return 0 if show(config, corpus, devices=devices, console=Console()) else 1
