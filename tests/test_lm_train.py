"""The decoder and its training: the same whatever the devices, and sound by itself."""

import json
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from rich.console import Console

from burst_jax.inspect import collective_counts, equations
from burst_jax.lm.config import ModelConfig, OptimizerConfig, TrainConfig
from burst_jax.lm.data import Corpus, open_corpus
from burst_jax.lm.loss import mean_loss
from burst_jax.lm.metrics import MetricsFile
from burst_jax.lm.run import run
from burst_jax.lm.train import Trainer

pytestmark = pytest.mark.usefixtures("ordinary_promotion")  # optax mixes dtypes

TEXT = b"the quick brown fox jumps over the lazy dog\n"


@pytest.fixture
def corpus(tmp_path) -> Corpus:
    (tmp_path / "text").write_bytes(TEXT * 10)
    return open_corpus([tmp_path / "text"])


def tiny(*, layout="zigzag", steps=4, seq_len=30, learning_rate=1e-2, **model) -> TrainConfig:
    sizes = {"width": 16, "num_layers": 2, "num_heads": 4, "num_kv_heads": 2} | model
    return TrainConfig(
        layout=layout,
        seq_len=seq_len,
        steps=steps,
        batch_size=2,
        model=ModelConfig(**sizes),
        optimizer=OptimizerConfig(learning_rate=learning_rate, warmup_steps=1),
    )


def trainer(config: TrainConfig, corpus: Corpus, devices: int) -> Trainer:
    return Trainer(config, corpus, devices=jax.devices()[:devices])


def first_batch(made: Trainer):
    return made.place(made.windows.batch(0, batch_size=2, seed=0))


def test_the_mean_loss_counts_each_real_token_once(getkey):
    logits = jax.random.normal(getkey(), (2, 6, 5))
    labels = jax.random.randint(getkey(), (2, 6), 0, 5, jnp.int32)
    weights = jnp.array([[1, 1, 1, 1, 1, 0], [1, 0, 0, 0, 0, 0]], jnp.float32)
    with jax.numpy_dtype_promotion("strict"):
        got = mean_loss(logits.astype(jnp.float32), labels, weights)
    x = np.asarray(logits, np.float64)
    nll = (
        np.log(np.exp(x).sum(-1)) - np.take_along_axis(x, np.asarray(labels)[..., None], 2)[..., 0]
    )
    assert math.isclose(got, (nll * np.asarray(weights)).sum() / 6, rel_tol=1e-6)
    # Padding takes no part, whatever the model says there; nothing but padding gives 0.
    spoilt = jnp.where(weights[..., None] > 0, logits, 1e4).astype(jnp.float32)
    assert math.isclose(mean_loss(spoilt, labels, weights), got, rel_tol=1e-6)
    assert mean_loss(spoilt, labels, 0 * weights) == 0


def test_losses_do_not_depend_on_devices_nor_layout(corpus):
    # 30 tokens on 4 devices: the last shard of the zigzag holds padding too.
    runs = [
        [record.loss for record in trainer(tiny(layout=layout), corpus, devices).steps()]
        for layout, devices in (("contiguous", 1), ("zigzag", 4), ("striped", 3))
    ]
    np.testing.assert_allclose(runs[1], runs[0], rtol=0, atol=1e-5)
    np.testing.assert_allclose(runs[2], runs[0], rtol=0, atol=1e-5)
    assert runs[0][-1] < runs[0][0]  # and the steps did something


@pytest.mark.slow
def test_what_is_recomputed_changes_no_gradient(corpus):
    gradients = []
    for remat in ("none", "full", "save_attention"):
        made = trainer(tiny(remat=remat), corpus, 1)
        gradients.append(jax.jit(jax.grad(made.loss))(made.state.params, first_batch(made)))
        assert max(float(abs(g).max()) for g in jax.tree.leaves(gradients[-1])) > 0
    for other in gradients[1:]:
        jax.tree.map(
            lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-6), gradients[0], other
        )


def test_keeping_attention_never_runs_the_forward_ring_twice(corpus):
    sent = {}
    for remat in ("none", "full", "save_attention"):
        made = trainer(tiny(remat=remat), corpus, 4)
        sent[remat] = collective_counts(jax.grad(made.loss), made.state.params, first_batch(made))
    assert sent["save_attention"] == sent["none"]
    assert sent["full"]["ppermute"] > sent["none"]["ppermute"]


def test_the_program_does_not_grow_with_the_layers(corpus):
    def size(num_layers: int) -> int:
        made = trainer(tiny(num_layers=num_layers), corpus, 2)
        jaxpr = jax.make_jaxpr(made.step)(made.state, first_batch(made)).jaxpr
        return sum(1 for _ in equations(jaxpr))

    assert size(2) == size(5)


def test_a_byte_is_predicted_from_those_before_it_alone(corpus):
    made = trainer(tiny(seq_len=32), corpus, 4)
    where = made.sharding
    logits = jax.jit(lambda params, tokens: made.merged(params)(tokens))
    tokens = np.array(made.windows.window(0).tokens)
    changed = tokens.copy()
    changed[0, 20] = 7
    a, b = (
        np.asarray(where.restore(logits(made.state.params, where.place(x))))
        for x in (tokens, changed)
    )
    np.testing.assert_array_equal(a[:, :20], b[:, :20])
    assert (a[:, 20:] != b[:, 20:]).any(-1).all()  # and all after it see it


def test_bytes_sent_are_those_of_attention_and_of_the_gradients(corpus):
    made = trainer(tiny(), corpus, 4)
    sent = made.sent_bytes()
    assert sent.gradients == 2 * 3 * 4 * made.num_params // 4
    # 2 layers, 3 hops, 2 sequences of 32 padded tokens: k and v forward; k, v, dk and dv backward,
    # of 2 heads and 4 dimensions in float32.
    assert sent.attention == 2 * 3 * (2 * 8 * 2 * 4 * 4) * (2 + 4)
    assert trainer(tiny(), corpus, 1).sent_bytes() == (0, 0)


@pytest.mark.slow
def test_bfloat16_trains_float32_parameters(corpus):
    made = trainer(tiny(dtype="bfloat16"), corpus, 2)
    losses = [record.loss for record in made.steps()]
    assert losses[-1] < losses[0]
    assert {x.dtype for x in jax.tree.leaves(made.state.params)} == {jnp.dtype("float32")}


def test_a_loss_that_is_not_finite_ends_the_run_with_a_remedy(corpus):
    with pytest.raises(FloatingPointError, match="lower optimizer.learning_rate"):
        list(trainer(tiny(learning_rate=1e38), corpus, 1).steps())


def test_a_run_is_shown_and_written_line_by_line(corpus, tmp_path):
    config = TrainConfig(
        seq_len=30,
        steps=3,
        batch_size=4,
        holdout=0.2,
        eval_every=2,
        model=tiny().model,
        optimizer=OptimizerConfig(warmup_steps=1),
    )
    made = trainer(config, corpus, 2)
    shown = Console(record=True, width=200)
    with MetricsFile(tmp_path) as metrics:
        records = run(made, console=shown, title="test", metrics=metrics)
    events = [json.loads(line) for line in metrics.path.read_text().splitlines()]
    assert [event["event"] for event in events] == ["start", "step", "step", "step", "end"]
    assert events[0]["config"]["seq_len"] == 30
    assert events[0]["sent_bytes_attention"] > 0
    assert [event["loss"] for event in events[1:4]] == [record.loss for record in records]
    # 441 tokens are 15 windows, 3 of them held out; 3 do not fill a batch of 4.
    assert (events[0]["windows"], events[0]["windows_held_out"]) == (12, 3)
    assert [record.held_out_loss is not None for record in records] == [False, True, True]
    assert "held_out_loss" not in events[1]
    text = shown.export_text()
    for word in ("nats/byte", "tokens/s", "30 context", "sent/step", "held-out loss"):
        assert word in text


def test_the_held_out_loss_is_the_mean_over_all_its_tokens(corpus):
    made = trainer(tiny(seq_len=40), corpus, 1)
    windows = made.windows
    made.held_out = windows
    losses, counts = [], []
    loss = jax.jit(made.loss)
    for index in range(len(windows)):
        window = windows.window(index)
        losses.append(float(loss(made.state.params, made.place(window))))
        counts.append(window.weights.sum())
    assert math.isclose(made.evaluate(), np.average(losses, weights=counts), rel_tol=1e-5)
