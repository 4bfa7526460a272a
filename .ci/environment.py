"""Makes a virtual environment with this project in it, and does nothing when it is there already.

Called by the Makefile, with the standard library only, so that a fresh clone needs Python and make
and nothing else:

    python3 .ci/environment.py --venv .venv --extras test lint [--jax 0.12]

What is in the environment is written to `<venv>/burst-installed.json`. It is made anew when the
interpreter changed, and brought up to date when pyproject.toml changed or an extra is missing.
"""

import argparse
import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
HEARTBEAT_S = 5.0  # a dot every so often while a step runs


def run_step(sentence: str, command: list[str], log: Path) -> None:
    """Runs one command behind one sentence; its own output is shown only if it fails."""
    print(sentence, end=" ", flush=True)
    begin = time.monotonic()
    with log.open("a") as out:
        process = subprocess.Popen(
            command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=out, stderr=subprocess.STDOUT
        )
        try:
            while process.poll() is None:
                try:
                    process.wait(HEARTBEAT_S)
                except subprocess.TimeoutExpired:
                    print(".", end="", flush=True)
        except BaseException:
            process.terminate()
            process.wait()
            raise
    print(f" {time.monotonic() - begin:.0f} s", flush=True)
    if process.returncode:
        tail = log.read_text(errors="replace").splitlines()[-25:]
        sys.exit(
            "\n".join(tail) + f"\n\nThis step failed: {' '.join(command)}\nIts whole output: {log}"
        )


def interpreter_key() -> str:
    """The interpreter that the environment stands on; the same inside and outside of a venv."""
    return f"{sys.version} at {os.path.realpath(sys.base_prefix)}"


def read_state(path: Path) -> dict:
    """What an earlier run installed; empty when there was none, or when it did not finish."""
    try:
        return json.loads(path.read_text())
    except (OSError, ValueError):
        return {}


def check_jax(jax: str) -> None:
    """Refuses a value of JAX= that pip would answer with a page of text."""
    if not re.fullmatch(r"\d+\.\d+(\.\d+)*", jax):
        sys.exit(f"JAX={jax} is no release. Give its first numbers: JAX=0.11 or JAX=0.10.2.")
    major, minor = (int(part) for part in jax.split(".")[:2])
    if (major, minor) >= (0, 11) and sys.version_info < (3, 12):
        sys.exit(
            f"jax {jax} needs Python 3.12 or newer; this is {sys.version.split()[0]}. "
            f"Name one: make JAX={jax} PYTHON=python3.12 ..."
        )


def create(venv: Path) -> None:
    """Makes an empty environment, over whatever unfinished one lies there."""
    if venv.exists():
        # An interrupted run of this script may have left no more than its log.
        contents = {path.name for path in venv.iterdir()} - {"setup.log"}
        if contents and "pyvenv.cfg" not in contents:
            sys.exit(f"{venv} is there but is no virtual environment; move it out of the way.")
        shutil.rmtree(venv)
    if subprocess.run(
        [sys.executable, "-c", "import ensurepip, venv"], capture_output=True
    ).returncode:
        sys.exit(
            f"{sys.executable} cannot make virtual environments: its venv or ensurepip is missing. "
            "On Debian and Ubuntu install python3-venv, or name another one: make PYTHON=..."
        )
    venv.mkdir(parents=True)
    run_step(
        f"Making {venv.name} with Python {sys.version.split()[0]}",
        [sys.executable, "-m", "venv", str(venv)],
        venv / "setup.log",
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--venv", required=True, type=Path)
    parser.add_argument("--extras", nargs="+", required=True, help="of pyproject.toml")
    parser.add_argument("--jax", default="", help="keep to this release of jax, such as 0.11")
    args = parser.parse_args()
    if args.jax:
        check_jax(args.jax)

    venv = ROOT / args.venv
    state_file = venv / "burst-installed.json"
    state = read_state(state_file)
    wanted = set(args.extras)
    key = hashlib.sha256((ROOT / "pyproject.toml").read_bytes() + args.jax.encode()).hexdigest()
    if state.get("interpreter") != interpreter_key():
        create(venv)
        state = {}
    if state.get("pyproject") == key:
        if wanted <= set(state["extras"]):
            return
        wanted |= set(state["extras"])

    extras = ",".join(sorted(wanted))
    requirements = ["--editable", f".[{extras}]"]
    if args.jax:
        requirements.append(f"jax=={args.jax}.*")
        if "aot-gpu" in wanted:  # jax does not ask for the plugin of its own version by itself
            requirements.append(f"jax-cuda13-plugin=={args.jax}.*")
    # Until the step below has finished, nothing is recorded: an interrupted one is done again.
    state_file.unlink(missing_ok=True)
    run_step(
        f"Installing burst_jax[{extras}] into {venv.name} (minutes and 1 GB the first time)",
        [str(venv / "bin" / "python"), "-m", "pip", "install", "--disable-pip-version-check"]
        + ["--no-input", *requirements],
        venv / "setup.log",
    )
    state = {"interpreter": interpreter_key(), "pyproject": key, "extras": sorted(wanted)}
    state_file.write_text(json.dumps(state, indent=2) + "\n")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; the next call takes it up again.")
