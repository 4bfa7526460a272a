# %% [markdown]
# # Put it into your Flax model
#
# You have a Flax model whose attention no longer fits on one device. This notebook spreads its
# *sequence* over eight devices, in two ways, and trains it on real text:
#
# 1. keep `nnx.MultiHeadAttention` and hand it another `attention_fn`: one argument changes;
# 2. use `burst_jax.nnx.BurstAttention`, with grouped kv heads and rotary embedding.
#
# Each time the losses are those of one device. At the end: what to change on TPUs and GPUs.

# %%
# On Colab, or wherever burst_jax is missing, install it; inside the repository, from the checkout.
import importlib.util
import pathlib
import subprocess
import sys

if not (importlib.util.find_spec("burst_jax") and importlib.util.find_spec("matplotlib")):
    checkout = pathlib.Path.cwd().parent
    inside = (checkout / "src" / "burst_jax").is_dir()
    package = f"{checkout}[plots]" if inside else "burst-jax[plots]"
    subprocess.run([sys.executable, "-m", "pip", "install", "--quiet", package], check=True)

import jax

if jax.config.jax_num_cpu_devices < 8:  # before JAX starts: afterwards it cannot be changed
    jax.config.update("jax_num_cpu_devices", 8)

accelerators = [device for device in jax.devices() if device.platform != "cpu"]
if accelerators:
    print(f"JAX {jax.__version__} found {len(accelerators)} x {accelerators[0].device_kind}.")
else:
    print(f"JAX {jax.__version__} found no accelerator.")

if len(accelerators) > 1:
    devices = accelerators
    print(f"The sequence is spread over these {len(devices)} devices.")
else:
    devices = jax.devices("cpu")[:8]
    jax.config.update("jax_default_device", devices[0])
    print(f"A ring takes several devices, so {len(devices)} are simulated on the CPU.")

# %%
import sysconfig
from typing import NamedTuple

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
import optax
from flax import nnx
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import burst_jax as bj
import burst_jax.nnx

plt.rcParams.update({"figure.dpi": 80, "font.size": 9, "figure.constrained_layout.use": True})

# %% [markdown]
# ## The text
#
# Sources of Python's standard library, as bytes. The labels are the text moved on by one byte. This
# shift is done *before* the tokens are spread over devices: afterwards, the successor of a token
# may lie on another device.

# %%
B, T = 2, 512  # texts in a batch, tokens of context
folder = pathlib.Path(sysconfig.get_path("stdlib"))
names = ("argparse.py", "ast.py", "dataclasses.py", "functools.py", "inspect.py", "typing.py")
text = np.frombuffer(b"".join((folder / name).read_bytes() for name in names), np.uint8)
print(f"{len(text)} bytes of {', '.join(names)}")


class Batch(NamedTuple):
    """Bytes, the bytes that follow, and which of them count."""

    tokens: np.ndarray
    labels: np.ndarray
    weights: np.ndarray


def batch(step):
    """B windows of the text; the same ones whenever the step is the same."""
    starts = np.random.default_rng(step).integers(0, len(text) - T, B)
    window = np.stack([text[start : start + T + 1] for start in starts]).astype(np.int32)
    return Batch(window[:, :-1], window[:, 1:], np.ones((B, T), np.float32))


print(bytes(batch(0).tokens[0, :300].astype(np.uint8)).decode(errors="replace"))

# %% [markdown]
# ## 1. `nnx.MultiHeadAttention`, with another `attention_fn`
#
# An ordinary small decoder. All that will change is `attention_fn`. Learned position embeddings
# need to know where in the text each token stands, so the model is told `positions`.


# %%
class Block(nnx.Module):
    """Attention and an MLP, each on the normalised residual stream."""

    def __init__(self, attention, width, *, rngs):
        self.attention_norm = nnx.RMSNorm(width, rngs=rngs)
        self.attention = attention
        self.mlp_norm = nnx.RMSNorm(width, rngs=rngs)
        self.up = nnx.Linear(width, 4 * width, use_bias=False, rngs=rngs)
        self.down = nnx.Linear(4 * width, width, use_bias=False, rngs=rngs)

    def __call__(self, x, **how):
        x = x + self.attention(self.attention_norm(x), **how)
        return x + self.down(nnx.gelu(self.up(self.mlp_norm(x))))


class Decoder(nnx.Module):
    """Bytes in, logits of the next byte out."""

    def __init__(self, attention_fn=nnx.dot_product_attention, *, width=128, num_heads=8, rngs):
        self.embedding = nnx.Embed(256, width, rngs=rngs)
        self.position_embedding = nnx.Embed(T, width, rngs=rngs)

        def attention():
            return nnx.MultiHeadAttention(
                num_heads, width, decode=False, attention_fn=attention_fn, rngs=rngs
            )

        self.blocks = nnx.List(Block(attention(), width, rngs=rngs) for _ in range(2))
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 256, use_bias=False, rngs=rngs)

    def __call__(self, tokens, positions):
        x = self.embedding(tokens) + self.position_embedding(positions)[None]
        for block in self.blocks:
            x = block(x, is_causal=True)
        return self.head(self.norm(x))


# %% [markdown]
# The training loop is Flax's and Optax's own. The loss is one weighted mean over all tokens of all
# devices; padding has weight 0.


# %%
def mean_loss(model, batch, *inputs):
    """Nats per byte, over the bytes that count."""
    logits = model(batch.tokens, *inputs)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels)
    return (losses * batch.weights).sum() / batch.weights.sum()


@nnx.jit
def train_step(model, optimizer, batch, *inputs):
    loss, gradients = nnx.value_and_grad(mean_loss)(model, batch, *inputs)
    optimizer.update(model, gradients)
    return loss


def train(model, mesh, place, *inputs, steps=16):
    """Trains, and returns the loss of each step. `place` puts an array onto the devices."""
    optimizer = nnx.Optimizer(model, optax.adam(3e-3), wrt=nnx.Param)
    everywhere = NamedSharding(mesh, PartitionSpec())
    state = nnx.state((model, optimizer))
    nnx.update((model, optimizer), jax.device_put(state, everywhere))  # a copy on each device
    losses = []
    for step in range(steps):
        placed = Batch(*(place(x) for x in batch(step)))
        losses.append(train_step(model, optimizer, placed, *inputs))
    return np.array(losses)


# %% [markdown]
# First on one device, with Flax's own attention, which makes a T x T matrix for every head.

# %%
one = jax.make_mesh((1,), ("sp",), devices=devices[:1], axis_types=(AxisType.Auto,))
where_one = bj.SequenceSharding(one, length=T)
flax_losses = train(Decoder(rngs=nnx.Rngs(0)), one, where_one.place, where_one.positions())
print("one device, Flax's attention:", *(f"{x:.2f}" for x in flax_losses[::3]), "nats per byte")

# %% [markdown]
# Now over all devices. `SequenceSharding` is the one object that says how the sequence lies on the
# mesh. It is used three times: for the data (`place`), for the positions, and for the attention.
#
# - `layout="zigzag"` shares causal work equally (see the first notebook).
# - `length=T` is the true number of tokens: where T does not suit the devices, `place` pads, and
#   the padding is never attended to.
# - Embeddings, MLPs and norms work token by token. On a mesh with `Auto` axes the compiler leaves
#   their tokens where they are, and nothing in the model has to mention devices.

# %%
mesh = jax.make_mesh((len(devices),), ("sp",), devices=devices, axis_types=(AxisType.Auto,))
where = bj.SequenceSharding(mesh, axis_name="sp", layout="zigzag", length=T)

model = Decoder(attention_fn=burst_jax.nnx.attention_fn(where), rngs=nnx.Rngs(0))
ring_losses = train(model, mesh, where.place, where.positions())

print(f"{len(devices)} devices, burst_jax:      ", *(f"{x:.2f}" for x in ring_losses[::3]))
print(f"largest difference of any loss: {abs(ring_losses - flax_losses).max():.1e}")

# %% [markdown]
# What does a device hold of the text? `place` has permuted it once; nothing is permuted later.

# %%
tokens = where.place(batch(0).tokens)
at = where.place(np.arange(T, dtype=np.int32)[None], pad_value=-1)
for shard, positions in list(zip(tokens.addressable_shards, at.addressable_shards, strict=True))[
    :3
]:
    held = np.asarray(positions.data)[0]
    spans = np.split(held, np.flatnonzero(np.diff(held) != 1) + 1)
    ends = " and ".join(f"{span[0]} to {span[-1]}" for span in spans)
    print(f"{shard.data.shape[1]} of {tokens.shape[1]} tokens on a device: positions {ends}")

# %% [markdown]
# What Flax's module can ask for and a ring cannot give is refused in a sentence, never ignored: a
# dense mask, dropout on attention weights, weights to be sown. Say what a mask means instead:
# `attention_fn(where, mask=bj.Mask.sliding_window(512))`.

# %%
try:
    model.blocks[0].attention(jnp.ones((B, T, 128)), mask=jnp.ones((B, 8, T, T), bool))
except ValueError as refusal:
    print(refusal)

# %% [markdown]
# ## 2. `BurstAttention`: grouped kv heads and rotary embedding
#
# If you write a model anew, take the module. It projects, rotates queries and keys by their true
# positions (which it has from the sharding, so the model need not be told), and attends. Two kv
# heads serve eight query heads, so the keys that travel are a quarter of what they were. The
# parameters do not depend on the sharding: train on eight devices, evaluate on one.
#
# A mesh may have further axes. The third run puts the batch onto one axis and the sequence onto the
# other: two texts, each over half of the devices. Only the sharding changes, not the model.


# %%
class RotaryDecoder(nnx.Module):
    """As above, with `BurstAttention` and no position embedding."""

    def __init__(self, where, *, width=128, num_heads=8, num_kv_heads=2, rngs):
        self.embedding = nnx.Embed(256, width, rngs=rngs)

        def attention():
            return burst_jax.nnx.BurstAttention(
                width, num_heads=num_heads, num_kv_heads=num_kv_heads, sharding=where, rngs=rngs
            )  # causal unless told otherwise

        self.blocks = nnx.List(Block(attention(), width, rngs=rngs) for _ in range(2))
        self.norm = nnx.RMSNorm(width, rngs=rngs)
        self.head = nnx.Linear(width, 256, use_bias=False, rngs=rngs)

    def __call__(self, tokens):
        x = self.embedding(tokens)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


shardings = {"1 device": where_one, f"{len(devices)} devices": where}
if len(devices) % 2 == 0:
    sizes = (2, len(devices) // 2)
    both = jax.make_mesh(
        sizes, ("dp", "sp"), devices=devices, axis_types=(AxisType.Auto, AxisType.Auto)
    )
    shardings["{} x {} devices".format(*sizes)] = bj.SequenceSharding(
        both, axis_name="sp", layout="zigzag", batch_axis="dp", length=T
    )

runs = {}
for name, sharding in shardings.items():
    model = RotaryDecoder(sharding, rngs=nnx.Rngs(0))
    runs[name] = train(model, sharding.mesh, sharding.place, steps=40)
    print(f"{name:13s}", *(f"{x:.2f}" for x in runs[name][::6]), f"... {runs[name][-1]:.2f}")
print(f"largest difference of any loss: {np.ptp(list(runs.values()), axis=0).max():.1e}")

# %%
figure, axes = plt.subplots(figsize=(5, 2.6))
for (name, losses), width in zip(runs.items(), (7, 4, 1), strict=False):
    axes.plot(losses, lw=width, alpha=0.6, label=name)
axes.set(xlabel="step", ylabel="nats per byte")
axes.legend()
plt.show()

# %% [markdown]
# How much is sent? `burst_jax.inspect` reads it off the program: here the two attention layers of
# one training step, forward and backward. (The sum of the parameters' gradients over the devices
# comes on top: the compiler adds it, as in data parallelism.)

# %%
graph, parameters = nnx.split(RotaryDecoder(where, rngs=nnx.Rngs(0)))
placed = Batch(*(where.place(x) for x in batch(0)))


def gradients(parameters):
    return jax.grad(lambda p: mean_loss(nnx.merge(graph, p), placed))(parameters)


sent = bj.inspect.collective_bytes(gradients, parameters)["total"]
messages = bj.inspect.collective_counts(gradients, parameters)["ppermute"]
print(f"{len(devices)} devices: each sends {sent / 2**20:.2f} MiB in {messages} messages")

# %% [markdown]
# ## On TPUs and GPUs
#
# | | here | there |
# |---|---|---|
# | install | `pip install burst-jax` | also `pip install -U "jax[tpu]"` or `"jax[cuda13]"` |
# | devices | 8 simulated: `jax_num_cpu_devices` | leave that line out |
# | mesh | `jax.make_mesh((8,), ("sp",))` | `jax.make_mesh((jax.device_count(),), ("sp",))` |
# | dtype | float32 | `BurstAttention(..., dtype=jnp.bfloat16)`, and so for the other layers |
# | context | `T = 512` | what memory allows: it grows with T / devices |
# | model, loss, training step | | unchanged |
#
# `burst-jax doctor` says which devices and which tile kernels a machine has. With several blocks,
# `jax.checkpoint` with the policy `save_only_these_names("burst_out", "burst_lse")` recomputes
# everything but attention, so that the ring does not run twice.
