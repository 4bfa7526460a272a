"""Plants nine bugs, one at a time, in a copy of the sources, and demands that the suite turns red.

    python tests/planted_bugs.py

A test that cannot fail is a defect: these are the mistakes that ring attention libraries have
shipped. Each is one textual replacement that must match exactly once, so that this file fails
loudly when the code has moved on.
"""

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
# Zigzag has every layout's trouble; both travelling sides and precisions are among the cases.
SELECTION = ["tests/test_attention_matrix.py", "-m", "not slow", "-k", "zigzag", "-x", "-q"]


class Bug(NamedTuple):
    """One replacement in one file."""

    file: str
    right: str
    wrong: str


BUGS = {
    "permutes the wrong way": Bug(
        "src/burst_jax/_schedule.py",
        "(r, (r + shift) % self.num_shards)",
        "(r, (r - shift) % self.num_shards)",
    ),
    "drops the last hop": Bug(
        "src/burst_jax/_schedule.py",
        "Schedule(R, tuple(sorted(needed)))",
        "Schedule(R, tuple(sorted(needed))[:-1])",
    ),
    "reuses what was here at hop 0 in the backward": Bug(
        "src/burst_jax/_ring.py",
        "arrived(message, travels, ring)",
        "arrived(message if queries.do is None else own, travels, ring)",
    ),
    "takes the local lse for the global one": Bug(
        "src/burst_jax/_ring.py",
        "do, lse, delta, mask, config",
        "do, burst_kernels.BACKENDS[ring.tiles.name].forward(q, keys.k, keys.v, mask)[1], "
        "delta, mask, config",
    ),
    "keeps lse in base 2": Bug(
        "kernels/burst_kernels/xla/_forward.py",
        "factor(tile) + jnp.log(total)",
        "factor(tile) + jnp.log2(total)",
    ),
    "forgets the scale in dk": Bug(
        "kernels/burst_kernels/xla/_backward.py", "dk_block * tile.scale", "dk_block"
    ),
    "masks as if it held the next shard": Bug(
        "src/burst_jax/_ring.py",
        "(me - offset) % schedule.num_shards",
        "(me - offset + 1) % schedule.num_shards",
    ),
    "accumulates in bfloat16": Bug(
        "kernels/burst_kernels/_tile.py",
        "jnp.float64 if dtype == jnp.float64 else jnp.float32",
        "jnp.float64 if dtype == jnp.float64 else jnp.bfloat16",
    ),
    "swaps the halves of a zigzag shard": Bug(
        "src/burst_jax/_sharding.py",
        "jnp.where(here < chunk, shard * chunk + here, late)",
        "jnp.where(here >= chunk, shard * chunk + here, late)",
    ),
}


def plant(bug: Bug, tree: Path) -> None:
    """Applies a bug to a copy.

    Raises:
        ValueError: the right text does not stand there exactly once.
    """
    path = tree / bug.file
    text = path.read_text()
    if text.count(bug.right) != 1:
        raise ValueError(
            f"{bug.file} has {text.count(bug.right)} times {bug.right!r}, not once: the code has "
            "moved, plant this bug anew."
        )
    path.write_text(text.replace(bug.right, bug.wrong))


def is_red(bug: Bug | None) -> bool:
    """Whether the selection fails on a copy of the sources with the bug in it."""
    with tempfile.TemporaryDirectory() as name:
        tree = Path(name)
        for part in ("src", "kernels", "tests"):
            shutil.copytree(ROOT / part, tree / part, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "pyproject.toml", tree)
        if bug is not None:
            plant(bug, tree)
        # Before the installed package, which is the sources without the bug.
        path = os.pathsep.join([str(tree / "src"), str(tree / "kernels")])
        done = subprocess.run(
            [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *SELECTION],
            cwd=tree,
            env={**os.environ, "PYTHONPATH": path},
            capture_output=True,
            text=True,
        )
        if done.returncode not in (0, 1):  # neither green nor red: it did not run
            raise RuntimeError(done.stdout[-2000:] + done.stderr[-2000:])
        return done.returncode == 1


def main() -> int:
    """Prints the table; the exit status counts the bugs that survived."""
    if is_red(None):
        print("the suite is red without any bug; nothing can be said")
        return 1
    survivors = 0
    for name, bug in BUGS.items():
        red = is_red(bug)
        survivors += not red
        print(f"{'red' if red else 'GREEN: SURVIVED':16s} {name}", flush=True)
    print(f"{len(BUGS) - survivors} of {len(BUGS)} planted bugs turn the suite red")
    return survivors


if __name__ == "__main__":
    sys.exit(main())
