# %% [markdown]
# # 2 · The Whisper encoder: from 100 frames to 50 states
#
# **75 minutes**, of which the computer needs less than one. This notebook explains
# `whisper_encoder.py` from `SelfAttention` to `WhisperEncoder`. Do notebook 1 first.
#
# After this notebook you can
# 1. follow the shapes from mel frames to states;
# 2. write attention, and run a published Whisper encoder with it;
# 3. say what silence at the end of a clip costs, and why a batch needs a mask.
#
# The encoder in `tiny/whisper` is that of OpenAI's whisper-base, which was trained on
# 680,000 hours of real speech. Nobody changed it for this course.
#
# The notebook stops at the first exercise that is not done yet, with
# `NotImplementedError: your turn`. Write your answer in place of this line, run the cell,
# then run the check below it.

# %% tags=["setup"]
import math
import sys
from time import perf_counter

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F
from torch.nn.utils.rnn import pad_sequence

sys.path[:0] = ["..", "../.."]  # the folders of course.py and of the library
from course import BLUE, CORPUS, MAGMA, ORANGE, TINY, play, reveal, watch_attention
from data import read_corpus
from tools.cost import encoder_flops
from whisper_encoder import WhisperEncoder, clip_to_mel, load_audio, n_states

torch.set_num_threads(1)
encoder = WhisperEncoder.from_pretrained(TINY / "whisper").requires_grad_(False).eval()
print(encoder.config)

# %% [markdown]
# ## 2.1 Two convolutions (8 minutes)
# A convolution with kernel size 3 looks at three neighbouring frames. With padding 1 it
# also has a value for the first and the last frame, where one neighbour is a zero. With
# stride 2 it is computed only at every second frame.

# %%
row = read_corpus(CORPUS, "fr", "en")[0]["test"][7]
audio = load_audio(row.path)  # (N,)
mel = clip_to_mel(audio, 80, "clip")[None]  # (1, M, 2S): a batch of one clip
print(row.sentence, tuple(mel.shape))
play(audio)

# %% [markdown]
# **Predict, then run.** The shape after the first convolution (stride 1) and after the
# second (stride 2)? `encoder.config` above has the numbers.

# %% tags=["guess"]
after_first, after_second = (1, 80, 148), (1, 80, 74)  # ← your guess

# %%
first = encoder.conv1(mel)
second = encoder.conv2(F.gelu(first))
reveal("after conv1", after_first, tuple(first.shape), "80 mel bins became 512 channels")
reveal("after conv2", after_second, tuple(second.shape), "half as many places")

# %% [markdown]
# **Exercise 1.** How many states do `n` frames give? `n` can be odd here.


# %% tags=["exercise"]
def count_states(n_frames):
    """Length after conv1 and conv2, for n_frames mel frames."""
    # BEGIN SOLUTION
    return (n_frames + 1) // 2
    # END SOLUTION


# %% tags=["check"]
for n in [*range(4, 60, 2), *range(3, 60, 2)]:  # first the even lengths
    expected = encoder.conv2(encoder.conv1(torch.zeros(1, 80, n))).shape[2]
    result = count_states(n)
    assert result != n, "conv2 has stride 2: it is computed at every second frame only"
    advice = f"padding 1 adds a frame at both ends: {n} frames give {expected} states"
    assert n % 2 or result == expected, f"{advice}, not {result}"
    assert result == expected, (
        f"odd lengths: {n} frames give {expected} states, not {result}"
    )
print("ok: 3 to 59 frames")


# %% tags=["wrong"] expects="odd lengths"
def count_states(n_frames):
    return n_frames // 2


# %% tags=["wrong"] expects="stride 2"
def count_states(n_frames):
    return n_frames


# %% tags=["wrong"] expects="padding 1"
def count_states(n_frames):
    return (n_frames - 3) // 2


# %% [markdown]
# ## 2.2 Where am I? (8 minutes)
# The layers after the convolutions compare states with each other. They would not notice
# if somebody shuffled the states. So each state gets a vector of its position added.
# These are fixed waves, slow and fast ones, stored in the checkpoint.
#
# **Predict, then run.** The dot product of two position vectors is a measure of how
# similar they are. Position 100 with 90, and 100 with 110: which product is larger?

# %% tags=["guess"]
larger = "100 with 110"  # ← your guess

# %%
table = encoder.embed_positions.weight  # (1500, Da)
products = table @ table.T
reveal("100 with 90", larger, f"{products[100, 90]:.2f}")
reveal("100 with 110", larger, f"{products[100, 110]:.2f}", "only the distance counts")

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8), width_ratios=[1.2, 1])
shown = left.imshow(table[:100].T, aspect="auto", origin="lower", cmap="RdBu")
fig.colorbar(shown, ax=left, label="value", pad=0.01)
left.set(xlabel="position (20 ms each)", ylabel="dimension", title="position vectors")
for position, colour in ((50, BLUE), (200, ORANGE)):
    distance = torch.arange(-50, 51)
    right.plot(
        distance,
        products[position, position + distance],
        color=colour,
        ls="-" if colour == BLUE else "--",
        label=f"from {position}",
    )
right.set(
    xlabel="distance (positions)", ylabel="dot product", title="similarity of two positions"
)
right.legend(loc="upper right")
plt.show()

# %% [markdown]
# ## 2.3 Attention (20 minutes)
# Each state asks a question (its *query*), offers a title (its *key*) and a content (its
# *value*). The score of query `i` and key `j` is their dot product, divided by the square
# root of `Dh`. Softmax makes weights of the scores of one query: positive, with sum 1.
# The result is the weighted sum of the values.
#
# `attn_mask` is None or says with True which keys may be used. Other keys get the weight
# 0.
#
# All this is done by 8 *heads* side by side, each with its own 64 of the 512 numbers of
# every query, key and value. So `Dh` is 64, and a state can look at several places for
# different reasons. The slow way, for one head:


# %%
def slow_attention(q, k, v, mask):
    """q (n, Dh), k and v (S, Dh), mask (S,) -> results (n, Dh), weights (n, S)"""
    results, weights = [], []
    for query in q:
        scores = [
            sum(a * b for a, b in zip(query, key)) / math.sqrt(len(query)) for key in k
        ]
        strengths = [torch.exp(s) if allowed else 0.0 for s, allowed in zip(scores, mask)]
        row = torch.tensor([strength / sum(strengths) for strength in strengths])
        weights.append(row)
        results.append(sum(weight * value for weight, value in zip(row, v)))
    return torch.stack(results), torch.stack(weights)


# %% [markdown]
# **Exercise 2.** The same for all clips and heads at once, with `@`, `masked_fill` and
# `softmax`. Return the result and the weights.


# %% tags=["exercise"]
def attention(q, k, v, attn_mask=None):
    """q (B, H, n, Dh), k and v (B, H, S, Dh), attn_mask (B, 1, 1, S) or None
    -> result (B, H, n, Dh), weights (B, H, n, S)"""
    # BEGIN SOLUTION
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    weights = scores.softmax(dim=-1)
    return weights @ v, weights
    # END SOLUTION


# %% tags=["check"]
chance = torch.Generator().manual_seed(0)
q, k, v = (torch.randn(2, 3, n, 4, generator=chance) for n in (5, 6, 6))
mask = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])[:, None, None]  # (B, 1, 1, S)
result, weights = attention(q, k, v, mask)
assert weights.shape == (2, 3, 5, 6), (
    f"one weight for each query and key, not {weights.shape}"
)
free = attention(q, k, v)[1]
advice = "softmax over the keys (the last dimension): the weights of a query have sum 1"
assert torch.allclose(free.sum(dim=-1), torch.ones(2, 3, 5)), advice
assert weights[1, :, :, :4].min() > 0, (
    "the mask is inverted: True means that a key may be used"
)
assert weights[1, :, :, 4:].max() == 0, "keys with False in the mask must get the weight 0"
advice = "use the mask before softmax: after it, the weights no longer have sum 1"
assert torch.allclose(weights.sum(dim=-1), torch.ones(2, 3, 5)), advice
for b, h in ((0, 0), (0, 2), (1, 1)):
    expected, expected_weights = slow_attention(q[b, h], k[b, h], v[b, h], mask[b, 0, 0])
    advice = "the weights are wrong: did you divide the scores by the root of Dh?"
    assert torch.allclose(weights[b, h], expected_weights, atol=1e-5), advice
    advice = "the weights are right, but the result is not the weighted sum of v"
    assert torch.allclose(result[b, h], expected, atol=1e-5), advice
print("ok: as with loops, with and without a mask")


# %% tags=["wrong"] expects="softmax over the keys"
def attention(q, k, v, attn_mask=None):
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    weights = scores.softmax(dim=-2)
    return weights @ v, weights


# %% tags=["wrong"] expects="divide the scores by the root of Dh"
def attention(q, k, v, attn_mask=None):
    scores = q @ k.transpose(2, 3)
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    weights = scores.softmax(dim=-1)
    return weights @ v, weights


# %% tags=["wrong"] expects="use the mask before softmax"
def attention(q, k, v, attn_mask=None):
    weights = (q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])).softmax(dim=-1)
    if attn_mask is not None:
        weights = weights * attn_mask
    return weights @ v, weights


# %% tags=["wrong"] expects="the mask is inverted"
def attention(q, k, v, attn_mask=None):
    scores = q @ k.transpose(2, 3) / math.sqrt(q.shape[-1])
    if attn_mask is not None:
        scores = scores.masked_fill(attn_mask, -torch.inf)
    weights = scores.softmax(dim=-1)
    return weights @ v, weights


# %% [markdown]
# ## 2.4 Your attention in the published encoder
# `watch_attention(attention)` lets the encoder call your function in all six layers, and
# keeps the weights. Are the states those of PyTorch's own attention?

# %%
states = encoder(mel)
with watch_attention(attention) as maps:
    mine = encoder(mel)
print(f"{len(maps)} layers, weights {tuple(maps[0].shape)}")
print(f"largest difference {(mine - states).abs().max():.1e}")
print(f"largest value {states.abs().max():.1f}")

# %%
heads = ((0, 1), (2, 1), (5, 0))  # layer and head
titles = ("a little later", "the same few for all queries", "about the same time, in steps")
S = n_states(len(audio))
fig, axes = plt.subplots(1, 3, figsize=(9, 3.2))
for ax, (layer, head), title in zip(axes, heads, titles):
    ax.imshow(maps[layer][0, head], extent=(0, S / 50, S / 50, 0), cmap=MAGMA)
    ax.set(xlabel="key, time (s)", title=f"layer {layer}, head {head}:\n{title}")
axes[0].set(ylabel="query, time (s)")
plt.show()

# %% [markdown]
# ## 2.5 Do states keep their time?
# After six layers each state could know everything about the clip. Is state 35 still
# mainly about the sound at 0.7 s? We silence the clip from 0.6 to 0.8 s (states 30 to 39)
# and look at how much each state changes.
#
# **Predict, then run.** Which share of the change (of the sum over all states) is between
# 0.55 and 0.95 s?

# %% tags=["guess"]
percent_near = 90  # ← your guess

# %%
silenced = audio.clone()
silenced[int(0.6 * 16_000) : int(0.8 * 16_000)] = 0
other = encoder(clip_to_mel(silenced, 80, "clip")[None])
change = (other - states)[0].norm(dim=1) / states[0].norm(dim=1)  # (S,)
near = change[27:48].sum() / change.sum()
reveal(
    "percent of the change",
    percent_near,
    f"{100 * near:.0f}",
    f"of {21 / S:.0%} of the states",
)

fig, ax = plt.subplots(figsize=(9, 2.4))
ax.axvspan(0.6, 0.8, color="0.85", label="silenced")
ax.step(torch.arange(S) / 50, change, where="post", color=BLUE, label="change of the state")
ax.set(
    xlabel="time of the state (s)",
    ylabel="change / length",
    ylim=(0, None),
    xlim=(0, S / 50),
)
ax.legend()
plt.show()

# %% [markdown]
# Near the silenced place, a state changes more than elsewhere on average. But every state
# changes: each also knows something about the whole clip. And one state far away changes
# more than any other. Which head looks at it most?

# %%
special = change.argmax().item()
received = maps[-1][0].mean(dim=1)[:, special]  # last layer, mean over the queries -> (H,)
print(f"state {special}, at {special / 50:.2f} s: length {states[0, special].norm():.0f}")
print(f"median length of a state: {states[0].norm(dim=1).median():.0f}")
print(
    f"head {received.argmax()} of the last layer gives it {received.max():.0%} in the mean"
)
print(f"an equal share would be {1 / S:.1%}")

# %% [markdown]
# Such states are called *attention sinks*. A head that finds nothing to do for a query
# can put its weight there. So the vector of this state does not describe its own 20 ms.

# %%
play(silenced)

# %% [markdown]
# ## 2.6 What does silence cost? (5 minutes)
# Whisper was trained on windows of 30 s: shorter clips are padded with silence. Our
# preset `tiny` does not pad them.
#
# **Predict, then run.** How many times more time does the encoder need for the window of
# 30 s than for this clip?

# %% tags=["guess"]
times_as_long = 20  # ← your guess

# %%
windows, seconds, work = ("clip", "30s"), [], []
for window in windows:
    window_mel = clip_to_mel(audio, 80, window)[None]
    start = perf_counter()
    encoder(window_mel)
    seconds.append(perf_counter() - start)
    n = window_mel.shape[2] // 2
    work.append(
        encoder_flops(encoder.config, n, n)
    )  # convolutions, linear layers, attention
print(f"{seconds[0]:.2f} s for the clip, {seconds[1]:.2f} s for the window of 30 s")
reveal("times as long", times_as_long, f"{seconds[1] / seconds[0]:.0f}")

fig, ax = plt.subplots(figsize=(9, 1.8))
start = torch.zeros(2)
for part, values in zip(("convolutions", "linear layers", "attention"), zip(*work)):
    values = torch.tensor(values) / 1e9
    ax.barh(windows, values, left=start, label=part)
    start += values
ax.set(xlabel="multiplications and additions (billions)", ylabel="window")
ax.legend(loc="lower right", ncols=3)
plt.show()

# %% [markdown]
# Twice as many states cost twice as many linear layers, but four times as much attention:
# every state looks at every state.
#
# ## 2.7 Two clips in one batch (15 minutes)
# A batch is one tensor, so the shorter clip is padded at its end. No state may look at
# the padding: it is not part of the clip.
#
# **Exercise 3.** The mask: True where a key is a real state of its clip.


# %% tags=["exercise"]
def mask_of(lengths, S):
    """lengths (B,): number of real states of each clip -> (B, 1, 1, S)"""
    # BEGIN SOLUTION
    return (torch.arange(S) < lengths[:, None])[:, None, None]
    # END SOLUTION


# %% tags=["check"]
test_mask = mask_of(torch.tensor([2, 5]), 5)
assert test_mask.dtype == torch.bool, (
    f"the mask must have the type bool, not {test_mask.dtype}"
)
advice = "wrong shape: the keys are the last dimension, (B, 1, 1, S)"
assert test_mask.shape == (2, 1, 1, 5), f"{advice}, found {tuple(test_mask.shape)}"
assert test_mask[0, 0, 0, 0], "the mask is inverted: True at the real states"
assert test_mask[0, 0, 0].sum() != 3, "one state too many: 2 states are the states 0 and 1"
assert test_mask[0, 0, 0].tolist() == [True] * 2 + [False] * 3, "clip 0: 2 real states"
assert test_mask[1].all(), "clip 1 has no padding"
print("ok")


# %% tags=["wrong"] expects="one state too many"
def mask_of(lengths, S):
    return (torch.arange(S) <= lengths[:, None])[:, None, None]


# %% tags=["wrong"] expects="the keys are the last dimension"
def mask_of(lengths, S):
    return (torch.arange(S) < lengths[:, None])[:, None, :, None]


# %% tags=["wrong"] expects="the mask is inverted"
def mask_of(lengths, S):
    return (torch.arange(S) >= lengths[:, None])[:, None, None]


# %% [markdown]
# The encoder again, in six lines, with your mask. One thing is not in the mask: the first
# convolution reads one frame after the end of the clip. So the padding must be zeros.


# %%
def encode(mels, mask):
    """mels (B, M, 2S) -> states (B, S, Da)"""
    x = F.gelu(encoder.conv2(F.gelu(encoder.conv1(mels)))).transpose(1, 2)
    x = x + encoder.embed_positions.weight[: x.shape[1]]
    for layer in encoder.layers:
        x = layer(x, mask)
    return encoder.layer_norm(x)


short_mel, long_mel = mel[0], clip_to_mel(torch.cat([audio, audio]), 80, "clip")
both = pad_sequence([short_mel.T, long_mel.T], batch_first=True).transpose(
    1, 2
)  # (2, M, 2S)
lengths = torch.tensor([m.shape[1] // 2 for m in (short_mel, long_mel)])
single = encoder(short_mel[None])[0]
with_mask = encode(both, mask_of(lengths, both.shape[2] // 2))[0, : len(single)]
library = encoder(both, lengths)[0, : len(single)]
print(f"single clip and batch: largest difference {(with_mask - single).abs().max():.1e}")
print(f"the library's own batch: largest difference {(library - single).abs().max():.1e}")

# %% [markdown]
# ## 2.8 Break it: forget the mask
# The program runs, and no number is NaN. How wrong are the states?

# %%
without_mask = encode(both, None)[0, : len(single)]
noisy = both.clone()
noisy[0, :, short_mel.shape[1] :] = -1  # what a quiet place looks like in log-mel, not zero
with_wrong_padding = encode(noisy, mask_of(lengths, both.shape[2] // 2))[0, : len(single)]
for name, wrong in (("no mask", without_mask), ("padding not zero", with_wrong_padding)):
    difference = (wrong - single).norm(dim=1) / single.norm(dim=1)
    print(f"{name}: mean change {difference.mean():.0%}, last state {difference[-1]:.0%}")

# %% [markdown]
# The states of a clip would depend on the other clips of its batch: the same file,
# another translation. Nobody would see it in the loss.
#
# ## Recap
# * Two convolutions make 50 states per second of 100 mel frames per second.
# * Attention is a weighted sum of values. The weights are the softmax over the keys of
#   scaled dot products. Masked keys get the weight 0 *before* the weights are scaled to
#   sum 1.
# * States keep their time, more or less. A window of 30 s costs more than six
#   clips of 5 s, because attention grows with the square of the length.
#
# **Read next:** `SelfAttention` and `WhisperEncoder.forward` in `whisper_encoder.py`.
# Where are your two functions?
#
# **Open question:** many heads look at the same few states, whatever the query is.
# Silence the sound at these states. Do the heads choose others?
