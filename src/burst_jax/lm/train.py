"""The training loop: one compiled step, fed with windows of the corpus, reporting as it goes.

`Trainer.steps()` is a generator of `StepRecord`s. Whoever reads it decides what to show or write;
the trainer prints nothing.

The mesh has Explicit axes. There the type of every array says how it lies on the devices, and an
operation that would need a hidden all-gather of the sequence is an error while tracing, where on
Auto axes it would be a slow and memory-hungry success.
"""

import math
import time
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import jax
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec
from jaxtyping import Array, Float32, Int32

import burst_jax as bj
from burst_jax.lm.config import OptimizerConfig, TrainConfig
from burst_jax.lm.data import Batch, Corpus, split
from burst_jax.lm.loss import mean_loss
from burst_jax.lm.model import Decoder

# jax exports the class as a variable, which no annotation may hold.
Devices = Sequence[jax.Device]  # pyright: ignore[reportInvalidTypeForm]


class PlacedBatch(NamedTuple):
    """A batch in layout order, sharded over the mesh. Padding has weight 0."""

    tokens: Int32[Array, "B T"]
    labels: Int32[Array, "B T"]
    weights: Float32[Array, "B T"]


class TrainState(NamedTuple):
    """What a step changes. The same on every device."""

    params: optax.Params
    optimizer: optax.OptState


class StepRecord(NamedTuple):
    """What one optimizer step did.

    Attributes:
        step: counted from 1.
        loss: of the step's batch before the update, nats per byte (a separator counts as a byte).
        gradient_norm: global, before clipping.
        learning_rate: of the update.
        time_s: of the step, the reading of the next batch included.
        tokens_per_s: tokens that count in the batch, padding not among them, over time_s.
        held_out_loss: after the update, on the held-out windows, where the step evaluated.
    """

    step: int
    loss: float
    gradient_norm: float
    learning_rate: float
    time_s: float
    tokens_per_s: float
    held_out_loss: float | None = None


class SentBytes(NamedTuple):
    """Bytes one device sends in a step.

    Attributes:
        attention: counted from the step's program.
        gradients: of the all-reduce that XLA adds for the parameters' gradients and the program
            does not show: 2 (R - 1) / R of their size, as a ring does it.
    """

    attention: int
    gradients: int


class Compiled(NamedTuple):
    """What compiling the step showed.

    Attributes:
        time_s: to trace and compile.
        temporary_bytes: that the step needs on a device besides its arguments and results; None
            where the compiler does not say.
        sent: what a device sends in a step.
    """

    time_s: float
    temporary_bytes: int | None
    sent: SentBytes


def make_sharding(config: TrainConfig, devices: Devices) -> bj.SequenceSharding:
    """The sequence over all `devices`, laid out as the config says."""
    mesh = jax.make_mesh((len(devices),), ("sp",), axis_types=(AxisType.Explicit,), devices=devices)
    return bj.SequenceSharding(mesh, "sp", layout=config.layout, length=config.seq_len)


def make_optimizer(config: OptimizerConfig, steps: int) -> optax.GradientTransformation:
    """AdamW with clipping and `learning_rate_schedule`; matrices alone decay."""

    def is_matrix(params: optax.Params) -> optax.Params:
        return jax.tree.map_with_path(
            lambda path, _: "kernel" in jax.tree_util.keystr(path), params
        )

    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.adamw(
            learning_rate_schedule(config, steps),
            b1=config.beta1,
            b2=config.beta2,
            weight_decay=config.weight_decay,
            mask=is_matrix,
        ),
    )


def learning_rate_schedule(config: OptimizerConfig, steps: int) -> optax.Schedule:
    """Linear from 0 over the warm-up, then a cosine down to `final_fraction` of the peak."""
    return optax.warmup_cosine_decay_schedule(
        init_value=0.0 if config.warmup_steps else config.learning_rate,
        peak_value=config.learning_rate,
        warmup_steps=config.warmup_steps,
        decay_steps=max(steps, config.warmup_steps + 1),
        end_value=config.learning_rate * config.final_fraction,
    )


class Trainer:
    """A run: model, optimizer, data and mesh, compiled on the first `compile()`.

    Args:
        config: the run.
        corpus: the text.
        devices: what the sequence is spread over. The parameters and the losses of a run do not
            depend on their number, beyond rounding.

    Raises:
        ValueError: the corpus is too small for the held-out windows.
    """

    def __init__(self, config: TrainConfig, corpus: Corpus, *, devices: Devices) -> None:
        self.config = config
        self.devices = devices
        self.sharding = make_sharding(config, devices)
        self.windows, self.held_out = split(corpus, seq_len=config.seq_len, holdout=config.holdout)
        self._optimizer = make_optimizer(config.optimizer, config.steps)
        self._schedule = learning_rate_schedule(config.optimizer, config.steps)
        abstract = nnx.eval_shape(self._make_model)
        self._structure = nnx.graphdef(abstract)
        self.num_params = sum(math.prod(x.shape) for x in jax.tree.leaves(nnx.state(abstract)))
        self.state = self._initial_state()
        self._step: jax.stages.Compiled | None = None
        self._evaluate = jax.jit(self.loss)

    def _make_model(self) -> Decoder:
        rngs = nnx.Rngs(self.config.seed)
        return Decoder(self.config.model, sharding=self.sharding, rngs=rngs)

    def _initial_state(self) -> TrainState:
        everywhere = NamedSharding(self.sharding.mesh, PartitionSpec())

        def make() -> TrainState:
            params = nnx.state(self._make_model(), nnx.Param)
            return TrainState(params, self._optimizer.init(params))

        return jax.jit(make, out_shardings=everywhere)()

    def place(self, batch: Batch) -> PlacedBatch:
        """Puts a batch on the mesh. Labels are already shifted, so no token loses its successor."""
        return PlacedBatch(*map(self.sharding.place, batch))

    def merged(self, params: optax.Params) -> Decoder:
        """The decoder with these parameters."""
        return nnx.merge(self._structure, params)

    def loss(self, params: optax.Params, batch: PlacedBatch) -> Float32[Array, ""]:
        """Mean loss of a batch, nats per token."""
        logits = self.merged(params)(batch.tokens)
        return mean_loss(logits, batch.labels, batch.weights)

    def step(
        self, state: TrainState, batch: PlacedBatch
    ) -> tuple[TrainState, tuple[Float32[Array, ""], Float32[Array, ""]]]:
        """One update, not compiled. Returns the new state, and loss and gradient norm."""
        loss, gradients = jax.value_and_grad(self.loss)(state.params, batch)
        updates, optimizer = self._optimizer.update(gradients, state.optimizer, state.params)
        params = optax.apply_updates(state.params, updates)
        return TrainState(params, optimizer), (loss, optax.tree.norm(gradients))

    def compile(self) -> Compiled:
        """Compiles the step, and says what it needs."""
        start = time.perf_counter()
        batch = self.place(self._batch(0))
        self._step = jax.jit(self.step, donate_argnums=0).lower(self.state, batch).compile()
        time_s = time.perf_counter() - start
        memory = self._step.memory_analysis()
        return Compiled(
            time_s=time_s,
            temporary_bytes=None if memory is None else memory.temp_size_in_bytes,
            sent=self.sent_bytes(),
        )

    def sent_bytes(self) -> SentBytes:
        """What one device sends in a step; traces the step, but compiles nothing."""
        batch = self.place(self._batch(0))
        attention = bj.inspect.collective_bytes(self.step, self.state, batch)["total"]
        R = self.sharding.num_shards
        gradients = sum(x.nbytes for x in jax.tree.leaves(self.state.params))
        return SentBytes(attention, 2 * (R - 1) * gradients // R)

    def steps(self) -> Iterator[StepRecord]:
        """Runs all steps.

        Raises:
            FloatingPointError: the loss is no longer finite.
            ValueError: a file of the corpus changed.
        """
        if self._step is None:
            self.compile()
        assert self._step is not None, "compile() sets it"
        batch = self._batch(0)
        for step in range(self.config.steps):
            start = time.perf_counter()
            self.state, report = self._step(self.state, self.place(batch))
            count = batch.weights.sum()
            if step + 1 < self.config.steps:
                batch = self._batch(step + 1)  # read while the devices compute
            loss, gradient_norm = self._finite(step, report)
            time_s = time.perf_counter() - start
            yield StepRecord(
                step=step + 1,
                loss=loss,
                gradient_norm=gradient_norm,
                learning_rate=np.asarray(self._schedule(step)).item(),
                time_s=time_s,
                tokens_per_s=float(count) / time_s,
                held_out_loss=self.evaluate() if self._evaluates_at(step) else None,
            )

    def evaluate(self) -> float:
        """Mean loss over all held-out windows, nats per token."""
        total, count = 0.0, 0.0
        for start in range(0, len(self.held_out), self.config.batch_size):
            batch = self._held_out_batch(start)
            weight = float(batch.weights.sum())
            total += float(self._evaluate(self.state.params, self.place(batch))) * weight
            count += weight
        return total / count

    def _evaluates_at(self, step: int) -> bool:
        if not len(self.held_out):
            return False
        every = self.config.eval_every
        return step + 1 == self.config.steps or (every > 0 and (step + 1) % every == 0)

    def _batch(self, step: int) -> Batch:
        config = self.config
        return self.windows.batch(step, batch_size=config.batch_size, seed=config.seed)

    def _held_out_batch(self, start: int) -> Batch:
        """Windows from `start` on; past the last one, windows of weight 0 keep the shape."""
        rows = []
        for index in range(start, start + self.config.batch_size):
            window = self.held_out.window(min(index, len(self.held_out) - 1))
            if index >= len(self.held_out):
                window = window._replace(weights=np.zeros_like(window.weights))
            rows.append(window)
        return Batch(*(np.concatenate(parts) for parts in zip(*rows, strict=True)))

    def _finite(self, step: int, report: tuple[Array, Array]) -> tuple[float, float]:
        """Loss and gradient norm; waits until the devices have them."""
        loss, gradient_norm = map(float, report)
        if not (math.isfinite(loss) and math.isfinite(gradient_norm)):
            raise FloatingPointError(
                f"step {step + 1} has loss {loss} and gradient norm {gradient_norm}; lower "
                f"optimizer.learning_rate (now {self.config.optimizer.learning_rate}) or lengthen "
                f"its warm-up."
            )
        return loss, gradient_norm
