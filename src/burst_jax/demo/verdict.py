"""What the demo claims, and whether it holds."""

from typing import NamedTuple

from burst_jax.demo.comparison import KEYS, QUERIES, Table
from burst_jax.demo.training import Losses
from burst_jax.lm.console import for_people

# Nats per byte. Python sources cost 3.1 by byte frequencies alone; below 2.6 context is used.
LOSS_TARGET = 2.6
# Largest difference of any step's loss between many devices and one, nats per byte, in float32.
LOSS_TOLERANCE = 1e-4
# Of a float32 layer from the same in float64, relative to the largest value.
ERROR_TOLERANCE = 1e-5


class Claim(NamedTuple):
    """A sentence with its numbers, and whether they bear it out."""

    text: str
    holds: bool


def claims_about_training(losses: Losses, *, num_devices: int) -> list[Claim]:
    """The loss fell, and does not depend on the number of devices."""
    difference = losses.largest_difference
    return [
        Claim(
            f"The loss fell from {losses.spread[0]:.2f} to {losses.final:.2f} nats/byte "
            f"(below {LOSS_TARGET}).",
            losses.final < LOSS_TARGET,
        ),
        Claim(
            f"{num_devices} devices and 1 device have the same loss at each of "
            f"{len(losses.spread)} steps: they differ by {difference:.1e} at most "
            f"(allowed {LOSS_TOLERANCE:.0e}).",
            difference <= LOSS_TOLERANCE,
        ),
    ]


def claims_about_attention(tables: list[Table]) -> list[Claim]:
    """Every strategy is exact, and of the two rings the one that sends less is chosen."""
    error = max(row.error for table in tables for row in table.rows)
    claims = [
        Claim(
            f"Outputs and gradients agree with float64: relative error {error:.1e} at most "
            f"(allowed {ERROR_TOLERANCE:.0e}).",
            error <= ERROR_TOLERANCE,
        )
    ]
    for table in tables:
        other = table.row(KEYS if table.chosen.name == QUERIES else QUERIES)
        less = 1 - table.chosen.sent_bytes / max(1, other.sent_bytes)
        claims.append(
            Claim(
                f"{table.shape.name}: {'the queries' if other.name == KEYS else 'the keys'} are "
                f"sent round, {for_people(table.chosen.sent_bytes)} instead of "
                f"{for_people(other.sent_bytes)} a device ({less:.0%} less).",
                table.chosen.sent_bytes <= other.sent_bytes,
            )
        )
    return claims
