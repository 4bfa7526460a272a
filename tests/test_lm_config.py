"""What a run may be, and what is said of one that cannot."""

import dataclasses
import pathlib

import pytest

from burst_jax.lm.config import ModelConfig, OptimizerConfig, TrainConfig
from burst_jax.lm.config_file import load_config

CONFIGS = sorted((pathlib.Path(__file__).parent.parent / "configs").glob("*.toml"))


@pytest.fixture
def written(tmp_path):
    """Writes a config file and returns its path."""

    def write(text: str) -> pathlib.Path:
        path = tmp_path / "run.toml"
        path.write_text(text)
        return path

    return write


def test_there_are_configs_to_look_at():
    assert CONFIGS


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.name)
def test_every_config_of_the_repository_is_valid(path):
    assert load_config(path) != TrainConfig()


def test_a_file_changes_what_it_names_and_nothing_else(written):
    path = written('data = ["a", "b"]\nseq_len = 64\n[optimizer]\nlearning_rate = 1\n')
    expected = TrainConfig(
        data=("a", "b"), seq_len=64, optimizer=OptimizerConfig(learning_rate=1.0)
    )
    assert load_config(path) == expected


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("seq_length = 64", ["unknown key 'seq_length'", "did you mean 'seq_len'?"]),
        ("zzz = 1", ["unknown key 'zzz'", "the keys are data, include"]),
        ("[model]\nwidht = 64", ["table [model]", "unknown key 'widht'", "'width'"]),
        ("[modle]\nwidth = 64", ["unknown key 'modle'", "'model'"]),
        ('steps = "ten"', ["steps must be an integer", "'ten'"]),
        ("steps = 1.5", ["steps must be an integer", "1.5"]),
        ("steps = true", ["steps must be an integer", "True"]),
        ("[optimizer]\nlearning_rate = nan", ["table [optimizer]", "must be a finite number"]),
        ('data = "x"', ["data must be a list of strings", "'x'"]),
        ("data = [1]", ["data must be a list of strings"]),
        ("model = 3", ["model must be a table", "3"]),
        ('layout = "spiral"', ["layout must be one of 'contiguous', 'zigzag', 'striped'"]),
        ("[model]\nqk_norm = 1", ["table [model]", "qk_norm must be true or false"]),
        ("seq_len = 0", ["seq_len must be at least 1, got 0"]),
        ("[model]\nnum_kv_heads = 3", ["num_kv_heads = 3", "must divide"]),
        ("[optimizer]\nclip_norm = 1e999", ["table [optimizer]", "must be a finite number"]),
        ("steps = = 3", ["is not valid TOML", "line 1"]),
    ],
)
def test_a_wrong_file_is_refused_with_its_name_and_the_key(written, text, words):
    path = written(text)
    with pytest.raises(ValueError) as caught:
        load_config(path)
    for word in (str(path), *words):
        assert word in str(caught.value)


def test_a_missing_file_and_one_that_is_no_text_are_refused(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        load_config(tmp_path / "absent.toml")
    with pytest.raises(ValueError, match="cannot be read"):
        load_config(tmp_path)
    (tmp_path / "latin.toml").write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="cannot be read"):
        load_config(tmp_path / "latin.toml")


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: ModelConfig(num_heads=8, num_kv_heads=3), "must divide"),
        (lambda: ModelConfig(width=100, num_heads=8), "set head_dim"),
        (lambda: ModelConfig(head_dim=3), "even head_dim"),
        (lambda: ModelConfig(rope_theta=0.0), "rope_theta must be positive"),
        (lambda: OptimizerConfig(beta2=1.0), "beta2 must be below 1"),
        (lambda: OptimizerConfig(final_fraction=2.0), "final_fraction must be"),
        (lambda: OptimizerConfig(clip_norm=0.0), "clip_norm must be positive"),
        (lambda: TrainConfig(holdout=1.0), "fraction below 1"),
        (lambda: TrainConfig(eval_every=5), "set holdout"),
        (lambda: TrainConfig(steps=5), "warmup_steps = 20 is longer"),
        (lambda: TrainConfig(devices=0), "devices must be at least 1"),
    ],
)
def test_a_run_that_cannot_be_is_refused_where_it_is_described(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_a_config_cannot_be_changed_after_it_was_checked():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TrainConfig().steps = 0


def test_sizes_left_open_follow_from_the_width():
    config = ModelConfig(width=96, num_heads=4, num_kv_heads=2)
    assert (config.head_size, config.hidden_size) == (24, 256)
    assert ModelConfig(head_dim=2, mlp_width=5).hidden_size == 5
