# %% [markdown]
# # Ring attention and BurstAttention, by hand
#
# A sequence of T tokens is spread over R devices, T/R tokens on each. Attention wants every query
# to meet every key, but no device has room for all keys, and no device should ever hold a T x T
# matrix. This notebook builds the way out from its parts:
#
# 1. results for two sets of keys can be **merged** exactly;
# 2. so keys can travel round a **ring** of devices and be forgotten after each visit;
# 3. the **order** in which tokens lie on devices decides whether a causal mask wastes half of them;
# 4. in the **backward** pass it can be cheaper to let the queries travel: BurstAttention.
#
# You need JAX, but no accelerator. Every number below is printed by a cell.

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
jax.config.update("jax_enable_x64", True)

accelerators = [device for device in jax.devices() if device.platform != "cpu"]
if accelerators:
    print(f"JAX {jax.__version__} found {len(accelerators)} x {accelerators[0].device_kind}.")
else:
    print(f"JAX {jax.__version__} found no accelerator.")

# Exactness is shown here, not speed: float64, on simulated devices, whatever else there is.
devices = jax.devices("cpu")[:8]
jax.config.update("jax_default_device", devices[0])
print(f"This notebook computes in float64 on {len(devices)} simulated CPU devices.")

# %%
import itertools

import jax.numpy as jnp
import matplotlib.pyplot as plt
import numpy as np
from jax import P

import burst_jax as bj
import burst_kernels

plt.rcParams.update({"figure.dpi": 72, "font.size": 9, "figure.constrained_layout.use": True})
rng = np.random.default_rng(0)

# %% [markdown]
# ## 1. Merging: attention to some keys, then to others
#
# For one query, attention is a weighted mean of the values, with weights `exp(score)` divided by
# their sum. Keep the mean together with the logarithm of that sum, `lse`. Then the results for two
# disjoint sets of keys hold all that is needed to get the result for their union:
#
# - the sums add up: `lse = log(exp(lse_a) + exp(lse_b))`;
# - the mean over both is the mean of the two means, each weighted by its share of the sum.


# %%
def attend(q, k, v):
    """Attention of the queries to these keys alone, and the logarithm of the softmax's sum."""
    scores = q @ k.T / np.sqrt(q.shape[-1])
    lse = np.log(np.exp(scores).sum(-1))
    return np.exp(scores - lse[:, None]) @ v, lse


def merge(a, b):
    """Attention to the union of two disjoint sets of keys."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = np.logaddexp(lse_a, lse_b)
    share_a, share_b = np.exp(lse_a - lse)[:, None], np.exp(lse_b - lse)[:, None]
    return share_a * out_a + share_b * out_b, lse


q, k, v = rng.standard_normal((3, 16, 8))  # 16 tokens, head dim 8
whole = attend(q, k, v)
parts = [attend(q, k[keys], v[keys]) for keys in np.split(np.arange(16), 4)]

merged = merge(merge(merge(*parts[:2]), parts[2]), parts[3])
print(f"four parts merged, against softmax over all keys: {abs(merged[0] - whole[0]).max():.1e}")
naive = np.mean([out for out, _ in parts], axis=0)
print(f"four parts merely averaged:                       {abs(naive - whole[0]).max():.1e}")

# %% [markdown]
# Order and grouping do not matter: a merged result is the same kind of thing as its parts. So keys
# may come by in whatever order the ring brings them.

# %%
results = []
for a, b, c, d in itertools.permutations(parts):
    results += [merge(merge(merge(a, b), c), d)[0], merge(merge(a, b), merge(c, d))[0]]
print(
    f"{len(results)} orders and groupings, largest difference: {np.ptp(results, axis=0).max():.1e}"
)

# %% [markdown]
# Having seen nothing yet is `out = 0, lse = -inf`, and merging it changes nothing. Where *both* are
# empty, the formula above would compute `(-inf) - (-inf)`; `burst_jax.merge` guards against that,
# and a query that may see no key at all comes out as zero, not as NaN.

# %%
nothing = bj.Partial(jnp.zeros((1, 1, 1, 8)), jnp.full((1, 1, 1), -jnp.inf))
print("nothing merged with nothing: out =", *bj.merge(nothing, nothing).out.ravel())
print("                             lse =", *bj.merge(nothing, nothing).lse.ravel())

# %% [markdown]
# ## 2. The ring, in about 40 lines of JAX
#
# Each device keeps its queries. It computes one *tile*, its queries against its own keys; hands its
# keys and values to the next device and gets those of the previous one; computes the next tile,
# merges; and so on. After R - 1 hops all queries have met all keys. `jax.lax.ppermute` is one such
# hop, and `jax.shard_map` runs the function on every device with that device's shards.
#
# Which pairs count is decided by *positions*, which here travel with the keys. Nothing assumes that
# a device holds neighbouring tokens; section 3 makes use of that.


# %%
def tile(q, k, v, q_at, k_at):
    """Causal attention of some queries to some keys, whose positions are q_at and k_at."""
    scores = jnp.einsum("btnh,bsnh->btns", q, k) * q.shape[-1] ** -0.5
    seen = q_at[:, None] >= k_at[None, :]
    # Finite, so that autodiff meets no infinity: every query sees itself at home, and next to that
    # exp(-1e30) is zero.
    scores = jnp.where(seen[None, :, None, :], scores, -1e30)
    lse = jax.nn.logsumexp(scores, axis=-1)
    return jnp.einsum("btns,bsnh->btnh", jnp.exp(scores - lse[..., None]), v), lse


def merge_tiles(a, b):
    """`merge` of section 1, for JAX."""
    (out_a, lse_a), (out_b, lse_b) = a, b
    lse = jnp.logaddexp(lse_a, lse_b)
    share_a, share_b = jnp.exp(lse_a - lse)[..., None], jnp.exp(lse_b - lse)[..., None]
    return share_a * out_a + share_b * out_b, lse


def to_next_device(x):
    """One hop: everything moves from device r to device r + 1."""
    R = jax.lax.axis_size("sp")
    return jax.lax.ppermute(x, "sp", [(r, (r + 1) % R) for r in range(R)])


def ring(q, k, v, at):
    """Causal attention on one device of the ring, given its shards and its tokens' positions."""
    seen = tile(q, k, v, at, at)
    visitor = (k, v, at)
    for _ in range(jax.lax.axis_size("sp") - 1):
        visitor = to_next_device(visitor)  # does not wait for a tile, so it can overlap with one
        seen = merge_tiles(seen, tile(q, *visitor[:2], at, visitor[2]))
    return seen[0]


mesh = jax.make_mesh((8,), ("sp",), devices=devices)
shards = P(None, "sp")
ring_by_hand = jax.shard_map(
    ring, mesh=mesh, in_specs=(shards, shards, shards, P("sp")), out_specs=shards
)

# %% [markdown]
# ### It is exact, and so are its gradients
#
# The library's function is `burst_attention`; `SequenceSharding` says how the tokens lie on the
# mesh. `place` permutes and shards an array once, `restore` undoes it. We compare three results
# with each other: plain attention on one device in float64 (the oracle), the ring by hand, which
# JAX differentiates on its own, and `burst_attention`, which has a backward ring of its own.

# %%
T, R, N, H = 256, 8, 4, 16
natural = rng.standard_normal((4, 1, T, N, H))  # q, k, v and a cotangent, in natural order


def with_gradients(attention):
    """Output, dq, dk and dv of `attention(q, k, v, ...)` for a given cotangent."""

    def run(q, k, v, do, *further):
        out, vjp = jax.vjp(lambda q, k, v: attention(q, k, v, *further), q, k, v)
        return out, *vjp(do)

    return jax.jit(run)


def causal_burst(where):
    """`burst_attention` with a causal mask, for tokens that lie as `where` says."""
    return lambda q, k, v: bj.burst_attention(q, k, v, sharding=where, mask=bj.Mask.causal())


oracle = with_gradients(lambda q, k, v: bj.reference.attention(q, k, v, mask=bj.Mask.causal()))
truth = oracle(*natural)
by_hand = with_gradients(ring_by_hand)

print("largest difference from the oracle:    out       dq       dk       dv")
for layout in ("contiguous", "zigzag", "striped"):
    where = bj.SequenceSharding(mesh, axis_name="sp", layout=layout, length=T)
    placed = [where.place(x) for x in natural]
    for name, results in {
        "ring by hand": by_hand(*placed, where.positions()),
        "burst_attention": with_gradients(causal_burst(where))(*placed),
    }.items():
        errors = [abs(where.restore(a) - b).max() for a, b in zip(results, truth, strict=True)]
        print(f"{layout:11s} {name:16s}    ", *(f"{x:8.0e}" for x in errors))

# %% [markdown]
# ## 3. Who holds what, and who has to work
#
# First, who is where. We do not draw this from a formula: every device puts its own number on the
# wire and writes down what arrives.


# %%
def visitors(me):
    """The shard that visits this device, hop after hop."""
    seen = [me]
    for _ in range(jax.lax.axis_size("sp") - 1):
        seen.append(to_next_device(seen[-1]))
    return jnp.stack(seen, axis=1)


numbers = bj.SequenceSharding(mesh).place(np.arange(R), axis=0)
visits = np.asarray(
    jax.shard_map(visitors, mesh=mesh, in_specs=P("sp"), out_specs=P("sp"))(numbers)
)

figure, axes = plt.subplots(figsize=(5, 3.6))
axes.imshow(visits, cmap="tab10", vmin=0, vmax=9, alpha=0.75)
for device, hop in np.ndindex(visits.shape):
    axes.text(hop, device, f"k{visits[device, hop]}", ha="center", va="center")
axes.set(title="whose keys visit a device", xlabel="hop (0: at home)", ylabel="device")
axes.set(xticks=range(R), yticks=range(R))
plt.show()

# %% [markdown]
# With a causal mask, a query sees only the keys up to its own position. If device 0 holds the first
# eighth of the text and device 7 the last (*contiguous*), device 0 has little to do and device 7
# much; and since keys are handed on hop by hop, everybody waits for the busiest device. Two other
# orders share the work:
#
# - *zigzag*: cut the text into 2R chunks and give device r chunks r and 2R - 1 - r, an early one
#   and a late one;
# - *striped*: give device r the tokens r, r + R, r + 2R, ...

# %%
layouts = ("contiguous", "zigzag", "striped")
figure, axes = plt.subplots(3, 1, figsize=(7, 2.4), sharex=True)
for row, layout in zip(axes, layouts, strict=True):
    at = bj.SequenceSharding(mesh, layout=layout, length=64).positions()
    owner = np.empty(64, int)
    owner[at] = np.repeat(np.arange(R), 64 // R)
    row.imshow(owner[None], cmap="tab10", vmin=0, vmax=9, alpha=0.75, aspect="auto")
    row.set(yticks=[], ylabel=layout)
    row.yaxis.label.set(rotation=0, ha="right", va="center")
axes[-1].set_xlabel("position in the text (64 tokens); colour: the device that holds the token")
plt.show()

# %% [markdown]
# Now count, for every device and hop, the pairs (query, key) that the mask lets through, from the
# positions that the layouts really assign. A hop lasts as long as its busiest device.

# %%
T = 4096
tokens = T // R
pairs = {}
for layout in layouts:
    at = np.asarray(bj.SequenceSharding(mesh, layout=layout, length=T).positions()).reshape(R, -1)
    pairs[layout] = np.array(
        [
            [(at[device][:, None] >= at[visits[device, hop]][None, :]).sum() for hop in range(R)]
            for device in range(R)
        ]
    )

figure, axes = plt.subplots(1, 3, figsize=(9, 3.3), sharey=True)
for panel, (layout, count) in zip(axes, pairs.items(), strict=True):
    share = count / tokens**2
    panel.imshow(share, cmap="Blues", vmin=0, vmax=1.3)
    for device, hop in np.ndindex(share.shape):
        panel.text(hop, device, f"{share[device, hop]:.1f}", ha="center", va="center", fontsize=7)
    used = count.sum() / (R * count.max(axis=0).sum())
    panel.set(title=f"{layout}: devices busy {used:.0%}", xlabel="hop", xticks=range(R))
axes[0].set(ylabel="device", yticks=range(R))
figure.suptitle("visible pairs of a tile, as a share of all its pairs")
plt.show()

for layout, count in pairs.items():
    busiest, mean = count.sum(axis=1).max(), count.sum(axis=1).mean()
    ring_time = count.max(axis=0).sum() / (count.sum() / R)
    print(
        f"{layout:11s} busiest device / mean device: {busiest / mean:.2f}   "
        f"time of the ring / time if shared equally: {ring_time:.2f}"
    )

# %% [markdown]
# A kernel works in blocks. It knows the least and the greatest position in each block, and that is
# enough to call a pair of blocks EMPTY (not computed), FULL (computed without any mask arithmetic)
# or PARTIAL (computed and masked). These are the kernels' own counts, for blocks of 64 tokens:

# %%
BLOCK = 64
blocks = {}  # layout -> [device, hop] counts of FULL and of PARTIAL pairs of blocks
for layout in layouts:
    at = bj.SequenceSharding(mesh, layout=layout, length=T).positions()
    at = jnp.asarray(np.asarray(at).reshape(R, 1, tokens))
    full, partial = blocks[layout] = np.zeros((2, R, R), int)
    for device, hop in np.ndindex(R, R):
        here = burst_kernels.Tile(
            scale=1.0, right=0, q_positions=at[device], kv_positions=at[visits[device, hop]]
        )  # right=0: no key more than 0 positions after the query
        q_blocks = burst_kernels.summarize(here.queries(tokens), BLOCK)
        kv_blocks = burst_kernels.summarize(here.keys(tokens), BLOCK)
        classes = burst_kernels.classify(
            jax.tree.map(lambda x: x[..., :, None], q_blocks),
            jax.tree.map(lambda x: x[..., None, :], kv_blocks),
            here,
        )
        full[device, hop] = (classes == burst_kernels.FULL).sum()
        partial[device, hop] = (classes == burst_kernels.PARTIAL).sum()

figure, axes = plt.subplots(1, 3, figsize=(9, 2.6), sharey=True)
for panel, (layout, (full, partial)) in zip(axes, blocks.items(), strict=True):
    busiest = (full + partial).argmax(axis=0), np.arange(R)
    panel.bar(range(R), full[busiest], label="FULL")
    panel.bar(range(R), partial[busiest], bottom=full[busiest], label="PARTIAL")
    panel.set(title=layout, xlabel="hop", xticks=range(R))
axes[0].set_ylabel(f"of {(tokens // BLOCK) ** 2} pairs of blocks")
axes[1].legend()
figure.suptitle("what the busiest device computes at each hop")
plt.show()

for layout, (full, partial) in blocks.items():
    computed = full + partial
    print(
        f"{layout:11s} {computed.sum():5d} of {computed.size * (tokens // BLOCK) ** 2} pairs of "
        f"blocks computed, {partial.sum():4d} of them masked; one after another "
        f"{computed.max(axis=0).sum():4d}"
    )

# %% [markdown]
# Zigzag is the one to choose for causal masks: all devices have exactly the same to do at every
# hop, and after the tile at home nothing is masked (blocks that divide a chunk lie wholly before or
# wholly after the mask's edge).
#
# Where a mask leaves a whole hop empty on every device, the hop is not made: its keys are not even
# sent. With a sliding window, that is nearly all of them.

# %%
where = bj.SequenceSharding(mesh, layout="contiguous", length=T)
q, k, v = (where.place(x.astype(np.float32)) for x in rng.standard_normal((3, 1, T, 1, 8)))
for window in (None, 2048, 1024, 512, 64):
    mask = bj.Mask.causal() if window is None else bj.Mask.sliding_window(window)

    def windowed(q, k, v, mask=mask):
        return bj.burst_attention(q, k, v, sharding=where, mask=mask)

    hops = bj.inspect.collective_counts(windowed, q, k, v)["ppermute"] // 2  # k and v
    sent = bj.inspect.collective_bytes(windowed, q, k, v)["total"]
    what = "causal" if window is None else f"window of {window}"
    print(
        f"{what:15s} {tokens} tokens a device: hops: {hops}, sent by each: {sent / 1024:4.0f} KiB"
    )

# %% [markdown]
# ## 4. The backward pass: who should travel?
#
# Every tile contributes to the gradients of its queries and of its keys. Given the *whole row's*
# `lse`, which the forward pass has found, and `delta`, the row sums of `do * out`, contributions of
# disjoint tiles simply add up. Here they are in NumPy, summed over 4 x 4 tiles:


# %%
def tile_gradients(q, do, lse, delta, k, v):
    """What one tile adds to dq, dk and dv."""
    scale = q.shape[-1] ** -0.5
    p = np.exp(scale * q @ k.T - lse[:, None])
    ds = p * (do @ v.T - delta[:, None])
    return scale * ds @ k, scale * ds.T @ q, p.T @ do


q, k, v, do = rng.standard_normal((4, 16, 8))
out, lse = attend(q, k, v)
delta = (do * out).sum(-1)
dq, dk, dv = np.zeros((3, 16, 8))
for rows, keys in itertools.product(np.split(np.arange(16), 4), repeat=2):
    added = tile_gradients(q[rows], do[rows], lse[rows], delta[rows], k[keys], v[keys])
    dq[rows] += added[0]
    dk[keys] += added[1]
    dv[keys] += added[2]

_, vjp = jax.vjp(lambda q, k, v: jax.nn.softmax(q @ k.T * 8**-0.5) @ v, q, k, v)
for name, ours, truth in zip(("dq", "dk", "dv"), (dq, dk, dv), vjp(jnp.asarray(do)), strict=True):
    print(f"{name} summed over tiles, against JAX's gradient: {abs(ours - truth).max():.1e}")

# %% [markdown]
# So again one side stays and the other travels, and the traveller's gradient travels with it:
#
# | travels | needs for the tile | collects | stays at home |
# |---|---|---|---|
# | keys (the classic ring) | k, v | dk, dv | q, do, lse, delta, dq |
# | queries (BurstAttention) | q, do, and the thin lse, delta | dq | k, v, dk, dv |
#
# As many query heads as kv heads (MHA): three large arrays instead of four, and only one of them a
# gradient, which travels in float32. But with grouped queries (GQA), keys are so few that they
# should travel. We count the bytes that one device sends, in the program that JAX would run: 128K
# tokens, 8 devices, 32 query heads of 128, bfloat16. Nothing is executed.

# %%
T, N, H = 2**17, 32, 128
where = bj.SequenceSharding(mesh, layout="zigzag", length=T)


def shape(heads):
    return jax.ShapeDtypeStruct(
        (1, T, heads, H), jnp.bfloat16, sharding=jax.NamedSharding(mesh, where.spec(4))
    )


def gib_sent(K, plan):
    """GiB that one device sends in the forward and in the backward pass."""

    def forward(q, k, v):
        return bj.burst_attention(q, k, v, sharding=where, mask=bj.Mask.causal(), plan=plan)

    def both(q, k, v, do):
        return jax.vjp(forward, q, k, v)[1](do)

    q, k, v = shape(N), shape(K), shape(K)
    there = bj.inspect.collective_bytes(forward, q, k, v)["total"]
    return there / 2**30, (bj.inspect.collective_bytes(both, q, k, v, q)["total"] - there) / 2**30


SIDES = {"kv": "keys", "q": "queries"}
sent = {(K, side): gib_sent(K, bj.Plan(backward=side)) for K in (32, 8) for side in SIDES}
for (K, side), (forward, backward) in sent.items():
    choice = bj.make_plan((1, T, N, H), (1, T, K, H), sharding=where, dtype=jnp.bfloat16).backward
    print(
        f"{N} query heads, {K:2d} kv heads, backward with {SIDES[side]:7s} travelling: "
        f"{forward:.2f} + {backward:.2f} = {forward + backward:.2f} GiB"
        f"{' (chosen)' if choice == side else ''}"
    )

# %%
figure, axes = plt.subplots(figsize=(6, 2.4))
names = [f"{'MHA' if K == N else 'GQA'} {N}:{K}, {SIDES[side]} travel" for K, side in sent]
forward, backward = np.array(list(sent.values())).T
axes.barh(names, forward, color="tab:gray", label="forward")
bars = axes.barh(names, backward, left=forward, color="tab:blue", label="backward, as named")
axes.bar_label(bars, [f"{x:.2f}" for x in forward + backward], padding=3)
axes.set(xlabel="GiB that one device sends", xlim=(0, 8))
axes.invert_yaxis()
axes.legend(loc="lower right")
plt.show()

# %% [markdown]
# `burst_attention` makes that choice from the shapes, call by call. `make_plan` makes the same
# choice and gives its reasons; with `hardware` it adds the least time that the rates of the chip
# allow. `Plan(backward="q")`, given to `burst_attention`, has it your way.

# %%
for K in (32, 8):
    plan = bj.make_plan(
        (1, T, N, H), (1, T, K, H), sharding=where, mask=bj.Mask.causal(), dtype=jnp.bfloat16,
        hardware="v5p",
    )  # fmt: skip
    print(f"-- {N} query heads, {K} kv heads\n{plan.explain()}\n")

# %% [markdown]
# ### Why not let JAX differentiate the ring?
#
# It can: section 2 did so, and got the right gradients. But it must keep every visitor and every
# tile's probabilities from the forward pass until the backward pass: memory grows with T x T again.
# We compile both for growing T and read off what one device needs besides inputs and results.

# %%
for T in (2048, 8192):
    where = bj.SequenceSharding(mesh, layout="zigzag", length=T)
    spec = jax.NamedSharding(mesh, where.spec(4))
    x = jax.ShapeDtypeStruct((1, T, 4, 64), jnp.float32, sharding=spec)
    programs = {
        "by hand": by_hand.lower(x, x, x, x, where.positions()),
        "burst_attention": with_gradients(causal_burst(where)).lower(x, x, x, x),
    }
    held = {
        name: bj.inspect.temporary_bytes(program.compile()) / 2**20
        for name, program in programs.items()
    }
    print(f"T = {T}:", ", ".join(f"{name} {mib:6.1f} MiB" for name, mib in held.items()))

# %% [markdown]
# ## What the library adds to the 40 lines
#
# - a backward ring of its own, which recomputes tiles and keeps `out` and `lse` only;
# - messages that leave before the tile is computed, gradients that travel one hop behind: no
#   transfer waits for the tile of its own hop;
# - one rolled loop, so that the program does not grow with R;
# - tiles in blocks, with nothing quadratic in memory; EMPTY blocks are skipped;
# - windows, packed documents, GQA, sinks, soft cap, any length, odd R, further mesh axes.
#
# `docs/algorithm.md` has the mathematics. The next notebook puts all this into a Flax model.
