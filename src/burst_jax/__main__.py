"""`python -m burst_jax` is `burst-jax`."""

import sys

from burst_jax.cli import main

if __name__ == "__main__":
    sys.exit(main())
