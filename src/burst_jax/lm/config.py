"""What a training run is: frozen dataclasses that refuse, in a sentence, what cannot be meant.

The field names are the keys of the TOML files in `configs/` and the flags of `burst-jax train`.
"""

import dataclasses
import math
import types
import typing
from typing import Any, Literal

Layout = Literal["contiguous", "zigzag", "striped"]
Remat = Literal["none", "full", "save_attention"]
Dtype = Literal["float32", "bfloat16"]


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class ModelConfig:
    """A decoder of bytes: rotary positions, RMSNorm, SwiGLU, grouped-query attention.

    Attributes:
        width: size of the residual stream.
        num_layers: number of blocks; they are scanned over, so compile time does not grow with it.
        num_heads: query heads.
        num_kv_heads: key and value heads; must divide num_heads.
        head_dim: size of a head, even because rotary positions turn pairs; None: width / num_heads.
        mlp_width: hidden size of the SwiGLU; None: 8/3 width, up to a multiple of 32.
        rope_theta: base of the rotary wavelengths; longer contexts want a larger one.
        qk_norm: whether queries and keys are RMS-normalised per head before the rotation.
        dtype: what is computed in. Parameters, softmax statistics and the loss are float32 always.
        remat: what the backward pass recomputes. none: nothing. full: each block whole, attention
            and its communication included. save_attention: each block except attention, whose
            output and lse are kept, so the forward ring never runs twice.
    """

    width: int = 256
    num_layers: int = 4
    num_heads: int = 8
    num_kv_heads: int = 2
    head_dim: int | None = None
    mlp_width: int | None = None
    rope_theta: float = 10_000.0
    qk_norm: bool = False
    dtype: Dtype = "float32"
    remat: Remat = "save_attention"

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("width", "num_layers", "num_heads", "num_kv_heads", "head_dim", "mlp_width"):
            _at_least(self, name, 1)
        _positive(self, "rope_theta")
        if self.num_heads % self.num_kv_heads:
            raise ValueError(
                f"num_heads = {self.num_heads} query heads cannot share num_kv_heads = "
                f"{self.num_kv_heads} key heads equally; num_kv_heads must divide num_heads."
            )
        if self.head_dim is None and self.width % self.num_heads:
            raise ValueError(
                f"width = {self.width} does not divide into num_heads = {self.num_heads} heads; "
                f"set head_dim, or make width a multiple of num_heads."
            )
        if self.head_size % 2:
            raise ValueError(
                f"a head has {self.head_size} dimensions, but rotary positions turn them in pairs; "
                f"set an even head_dim."
            )

    @property
    def head_size(self) -> int:
        """Dimensions of a head: head_dim, or its default."""
        return self.head_dim or self.width // self.num_heads

    @property
    def hidden_size(self) -> int:
        """Hidden dimensions of the SwiGLU: mlp_width, or its default.

        8/3 gives the three SwiGLU matrices the parameters of a classical two-matrix MLP of 4 width
        (Shazeer, arXiv 2002.05202).
        """
        return self.mlp_width or 32 * math.ceil(self.width * 8 / 3 / 32)


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class OptimizerConfig:
    """AdamW with linear warm-up, cosine decay and a limit on the gradient's norm.

    Attributes:
        learning_rate: the peak, reached after the warm-up.
        final_fraction: the last step's learning rate, as a fraction of the peak.
        warmup_steps: steps from 0 to the peak; at most the run's steps.
        weight_decay: decay of matrices; norms and embeddings have none.
        beta1: decay of the gradient's running mean.
        beta2: decay of the gradient's running square; below Adam's 0.999 because runs are short.
        clip_norm: a gradient of larger global norm is scaled down to it.
    """

    learning_rate: float = 1e-3
    final_fraction: float = 0.1
    warmup_steps: int = 20
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip_norm: float = 1.0

    def __post_init__(self) -> None:
        check_types(self)
        _positive(self, "learning_rate")
        _positive(self, "clip_norm")
        _at_least(self, "warmup_steps", 0)
        _at_least(self, "weight_decay", 0)
        for name in ("final_fraction", "beta1", "beta2"):
            _at_least(self, name, 0)
            if getattr(self, name) > 1 or (name != "final_fraction" and getattr(self, name) == 1):
                raise ValueError(f"{name} must be below 1, got {getattr(self, name)}.")


@dataclasses.dataclass(frozen=True, kw_only=True, slots=True)
class TrainConfig:
    """One training run of a byte-level decoder on your own files.

    Attributes:
        data: files and folders whose bytes are learnt; a folder counts with all below it.
        include: of the files found in folders, those whose name matches one of these patterns.
        holdout: fraction of the windows, at the end of the text, that is kept for evaluation.
        eval_every: steps between evaluations on the held-out windows; 0: only after the last step.
        devices: devices the sequence is spread over; None: all there are. Without an accelerator
            that many are simulated on the CPU.
        layout: how tokens lie on the devices; zigzag gives each the same causal work.
        seq_len: context length in bytes.
        batch_size: sequences in a step.
        steps: number of optimizer steps.
        seed: of the parameters and of the order of the windows.
        output: folder for metrics.jsonl, to which a run appends.
        model: the decoder.
        optimizer: how it learns.
    """

    data: tuple[str, ...] = ()
    include: tuple[str, ...] = ("*",)
    holdout: float = 0.0
    eval_every: int = 0
    devices: int | None = None
    layout: Layout = "zigzag"
    seq_len: int = 8192
    batch_size: int = 1
    steps: int = 200
    seed: int = 0
    output: str = "burst-run"
    model: ModelConfig = dataclasses.field(default_factory=ModelConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        check_types(self)
        for name in ("devices", "seq_len", "batch_size", "steps"):
            _at_least(self, name, 1)
        for name in ("eval_every", "seed", "holdout"):
            _at_least(self, name, 0)
        if self.holdout >= 1:
            raise ValueError(f"holdout is a fraction below 1, got {self.holdout}.")
        if self.eval_every and not self.holdout:
            raise ValueError(
                f"eval_every = {self.eval_every} needs windows to evaluate on; set holdout, "
                f"for example to 0.05."
            )
        if self.optimizer.warmup_steps > self.steps:
            raise ValueError(
                f"optimizer.warmup_steps = {self.optimizer.warmup_steps} is longer than the run of "
                f"steps = {self.steps}; lower the one or raise the other."
            )


def check_types(config: object) -> None:
    """Raises ValueError if a field of this dataclass holds a value of another type than it says."""
    for name, field in fields_of(config).items():
        check_type(name, getattr(config, name), field.type)


def check_type(name: str, value: object, kind: object) -> None:
    """Raises ValueError if the value is not of the annotated kind; an int counts as a float."""
    if not _fits(value, kind):
        raise ValueError(f"{name} must be {_describe(kind)}, got {value!r}.")


def fields_of(schema: object) -> dict[str, dataclasses.Field[Any]]:
    """Fields of a dataclass or of its instance, by name."""
    assert dataclasses.is_dataclass(schema)
    return {field.name: field for field in dataclasses.fields(schema)}


def _fits(value: object, kind: object) -> bool:
    if isinstance(kind, types.UnionType):
        return any(_fits(value, option) for option in typing.get_args(kind))
    if typing.get_origin(kind) is Literal:
        return value in typing.get_args(kind)
    if typing.get_origin(kind) is tuple:
        item = typing.get_args(kind)[0]
        return isinstance(value, tuple) and all(_fits(x, item) for x in value)
    if isinstance(value, bool):  # a bool is an int to Python, but nobody means it
        return kind is bool
    if kind is float:  # nan and inf are numbers to Python and TOML, and never meant here
        return isinstance(value, int | float) and math.isfinite(value)
    return isinstance(kind, type) and isinstance(value, kind)


def _describe(kind: object) -> str:
    """What a value of this annotation is called in an error message."""
    if isinstance(kind, types.UnionType):
        return " or ".join(_describe(k) for k in typing.get_args(kind) if k is not types.NoneType)
    if typing.get_origin(kind) is Literal:
        return "one of " + ", ".join(map(repr, typing.get_args(kind)))
    if typing.get_origin(kind) is tuple:
        return "a list of strings"
    if dataclasses.is_dataclass(kind):
        return "a table"
    names: dict[object, str] = {
        int: "an integer",
        float: "a finite number",
        str: "a string",
        bool: "true or false",
    }
    return names[kind]


def _at_least(config: object, name: str, least: int) -> None:
    value = getattr(config, name)
    if value is not None and value < least:
        raise ValueError(f"{name} must be at least {least}, got {value}.")


def _positive(config: object, name: str) -> None:
    if getattr(config, name) <= 0:
        raise ValueError(f"{name} must be positive, got {getattr(config, name)}.")
