"""The command line: what is asked for is done, and what cannot be is refused in a sentence."""

import json
import os
import re
import subprocess
import sys

import pytest

from burst_jax.cli import BadRequest, main
from burst_jax.cli.devices import MAX_SIMULATED, find_devices
from burst_jax.cli.doctor import suggest_mesh
from burst_jax.cli.options import parse_train
from burst_jax.lm.config import ModelConfig, OptimizerConfig, TrainConfig

TINY = (
    "--seq-len 32 --steps 2 --model.width 16 --model.num-layers 1 --model.num-heads 2 "
    "--model.num-kv-heads 1 --optimizer.warmup-steps 1"
).split()


@pytest.fixture
def text(tmp_path):
    path = tmp_path / "text.log"
    path.write_bytes(b"0123456789abcdef\n" * 20)
    return path


@pytest.fixture
def config_file(tmp_path):
    path = tmp_path / "run.toml"
    path.write_text('data = ["here"]\nsteps = 40\n[model]\nwidth = 64\nqk_norm = true\n')
    return path


def test_flags_override_the_file_and_the_file_the_defaults(config_file):
    arguments = ["--config", str(config_file), "--model.width", "128", "--devices", "4"]
    expected = TrainConfig(
        data=("here",), steps=40, devices=4, model=ModelConfig(width=128, qk_norm=True)
    )
    assert parse_train(arguments) == expected
    assert parse_train([f"--config={config_file}", *arguments[2:]]) == expected


def test_flags_have_the_types_of_the_schema():
    got = parse_train("--data a b --model.qk-norm True --optimizer.learning-rate 0.5".split())
    assert got == TrainConfig(
        data=("a", "b"),
        model=ModelConfig(qk_norm=True),
        optimizer=OptimizerConfig(learning_rate=0.5),
    )


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "usage: burst-jax COMMAND"),
        (["fly"], "there is no command 'fly'"),
        (["train"], "no data: give at least one file or folder"),
        (["train", "--data", "absent"], "absent does not exist"),
        (["train", "--data", "void"], "void is empty"),
        (["train", "--data", "text.log", "--devices", "100000"], "100000 is more than there are"),
        (["train", "--config", "absent.toml"], "absent.toml does not exist"),
        (["train", "--config", "broken.toml"], "broken.toml is not valid TOML"),
        (["train", "--config", "typo.toml"], "typo.toml: unknown key 'sed'"),
        (["train", "--config"], "--config needs the path"),
        (["train", "--stepz", "3"], "--stepz"),
        (["train", "--steps", "many"], "--steps"),
        (["train", "--seq-len", "0"], "seq_len must be at least 1"),
        (["train", "--data", "text.log", "--output", "text.log"], "cannot be written to"),
        (["train", "--data", "text.log", "--holdout", "0.99"], "none to learn from"),
        (["demo", "--data", "absent"], "absent does not exist"),
        (["demo", "--devices", "3"], "devices must be 1, 2, 4 or 8"),
    ],
    ids=" ".join,
)
def test_a_bad_request_ends_with_2_and_a_sentence(
    arguments, message, text, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "void").write_bytes(b"")
    (tmp_path / "broken.toml").write_text("steps = = 3")
    (tmp_path / "typo.toml").write_text("sed = 3")
    assert main(arguments) == 2
    captured = capsys.readouterr()
    said = captured.out + captured.err
    assert message in re.sub(r"[\s│]+", " ", said)
    assert "Traceback" not in said


def test_help_and_version_end_well(capsys):
    for arguments in (["--help"], ["--version"], ["train", "--help"], ["doctor", "--help"]):
        assert main(arguments) == 0
    said = capsys.readouterr().out
    assert "burst-jax COMMAND --help" in said
    assert "--optimizer.learning-rate" in said


@pytest.mark.usefixtures("ordinary_promotion")
def test_train_learns_from_files_and_writes_what_it_did(text, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--data", str(text), "--devices", "2", *TINY]) == 0
    said = capsys.readouterr().out
    for word in ("data: 1 file, 340 B", "2 cpu devices", "2/2", "nats/byte", "burst-run"):
        assert word in said
    lines = (tmp_path / "burst-run" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["event"] for line in lines] == ["start", "step", "step", "end"]


@pytest.mark.slow
def test_train_simulates_the_devices_that_it_is_asked_for(text, tmp_path):
    # In a process of its own: in this one JAX has started already, with eight.
    path = os.pathsep.join(sys.path)
    done = subprocess.run(
        [sys.executable, "-m", "burst_jax", "train", "--data", text, "--devices", "3", *TINY],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        env={**os.environ, "JAX_PLATFORMS": "cpu", "PYTHONPATH": path},
    )
    assert done.returncode == 0, done.stderr
    assert "3 cpu devices" in done.stdout
    assert "Traceback" not in done.stderr


def test_devices_are_as_many_as_asked_for_or_refused():
    assert len(find_devices(3)) == 3
    assert len(find_devices(None)) == 8
    with pytest.raises(BadRequest, match=r"--devices 9 is more than there are \(8, cpu\)"):
        find_devices(9)
    with pytest.raises(BadRequest, match=f"at most {MAX_SIMULATED} are simulated"):
        find_devices(MAX_SIMULATED + 1)


def test_doctor_names_versions_devices_backends_and_a_mesh(capsys):
    assert main(["doctor"]) == 0
    said = capsys.readouterr().out
    for word in ("jaxlib", "flax", "Devices", "cpu", "8", "Tile backends", "xla", "make_mesh((8,)"):
        assert word in said


@pytest.mark.parametrize(
    ("devices", "processes", "words"),
    [
        (1, 1, ["One device", "--devices 8", "jax_num_cpu_devices"]),
        (8, 1, ['make_mesh((8,), ("sp",))']),
        (16, 16, ['make_mesh((16,), ("sp",))']),
        (32, 4, ['make_mesh((4, 8), ("data", "sp"))', 'batch_axis="data"', '("data", "sp")']),
    ],
)
def test_the_mesh_that_is_suggested_suits_the_devices(devices, processes, words):
    lines = "\n".join(suggest_mesh(devices, processes, "gpu"))
    for word in words:
        assert word in lines


def test_a_missing_extra_is_named_with_the_way_to_get_it(monkeypatch, capsys):
    def fail(name):
        raise ModuleNotFoundError("No module named 'tyro'", name="tyro")

    monkeypatch.setattr("importlib.import_module", fail)
    assert main(["doctor"]) == 2
    assert 'pip install "burst-jax[train,plots]"' in capsys.readouterr().err
