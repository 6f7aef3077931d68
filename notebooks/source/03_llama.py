# %% [markdown]
# # 3 · Llama: a decoder whose parts you can write yourself
#
# **105 minutes**, of which the computer needs less than one. This notebook explains
# `llama.py`. Do notebook 2 (attention) first.
#
# After this notebook you can
# 1. write RMSNorm, rotary positions and grouped heads, and run a Llama with them;
# 2. use a key/value cache, and say what it saves;
# 3. name the one mistake in converting Llama weights that gives no error.
#
# The small Llama in `tiny/llama` has Llama's architecture, but it was trained only on the
# phrasebook of this course, in French, German, Spanish and English.
#
# The notebook stops at the first exercise that is not done yet, with
# `NotImplementedError: your turn`. Write your answer in place of this line, run the cell,
# then run the check below it.

# %% tags=["setup"]
import sys
from time import perf_counter

import matplotlib.pyplot as plt
import torch

sys.path[:0] = ["..", "../.."]  # the folders of course.py and of the library
import llama
from course import BLUE, CORPUS, GREEN, ORANGE, TINY, play, reveal, watch_attention
from data import AUDIO, prompt_for, prompt_ids, read_corpus
from llama import Llama, RMSNorm, Tokenizer
from translate import score
from whisper_encoder import load_audio

torch.set_num_threads(1)
llm = Llama.from_pretrained(TINY / "llama").requires_grad_(False).eval()
tokenizer = Tokenizer(TINY / "llama")
rows = read_corpus(CORPUS, "fr", "en")[0]["test"]
print(llm.config)

# %% [markdown]
# ## 3.1 It translates what it reads
# Llama reads *tokens*: words and pieces of words. Each token has a number, its *id*, and
# each id has a vector, its *embedding*. The layers change these vectors. In a layer, an
# attention exchanges information between the positions, then an MLP (a small network)
# changes each vector by itself. At the end, each position has a *logit* for every token
# of the vocabulary. The token with the largest logit is the likeliest *next* token. A
# model that writes one token after the other in this way is called a *decoder*.
#
# The LLM cannot hear. This clip means nothing to it. But give it the sentence as text:

# %%
row = rows[7]
play(load_audio(row.path))


# %%
def prompt_of(sentence):
    """Token ids: the prompt of LLaST, with a written sentence in place of the speech."""
    pieces = prompt_for("st", "fr", "en")
    return prompt_ids(
        [sentence if piece == AUDIO else piece for piece in pieces], tokenizer
    )


def complete(ids, longest=40):
    """Append the likeliest next token, again and again, until an end token. -> new ids"""
    answer = []
    while len(answer) < longest:
        logits = llm(torch.tensor([ids + answer]))[0, -1]  # (V,)
        if (token := logits.argmax().item()) in tokenizer.eos_ids:
            break
        answer.append(token)
    return answer


prompt = prompt_of(row.sentence)
# In a token, ▁ is a space and <0x0A> is the end of a line.
print(f"{len(prompt)} tokens:", " ".join(map(tokenizer.pieces.id_to_piece, prompt)), "\n")
for some_row in rows[7:11]:
    print(some_row.sentence, "→", tokenizer.decode(complete(prompt_of(some_row.sentence))))

# %% [markdown]
# So LLaST has less to do than it seems: it must turn sound into something that this model
# can read in the place of the words.
#
# ## 3.2 RMSNorm (5 minutes)
# Before each attention and each MLP, every vector is divided by its root mean square: the
# root of the mean of its squares. Then it is multiplied by a learned weight. A small
# `eps` inside the root avoids a division by zero.
#
# **Exercise 1.** Write it.


# %% tags=["exercise"]
def rms_norm(x, weight, eps):
    """x (..., D), weight (D,) -> (..., D)"""
    # BEGIN SOLUTION
    return weight * x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()
    # END SOLUTION


# %% tags=["check"]
norm = RMSNorm(6, 1e-5)
chance = torch.Generator().manual_seed(0)
norm.weight.data = 1 + torch.rand(6, generator=chance)
x = 3 + torch.randn(2, 4, 6, generator=chance)
result, expected = rms_norm(x, norm.weight, 1e-5), norm(x).detach()
assert result.shape == x.shape, (
    f"the shape must stay {tuple(x.shape)}, not {tuple(result.shape)}"
)
centred = (
    norm.weight * (x - x.mean(-1, keepdim=True)) / x.std(-1, keepdim=True, correction=0)
)
assert not torch.allclose(result, centred, atol=1e-3), (
    "do not subtract the mean: that is LayerNorm"
)
advice = "the mean is over the last dimension of each vector, not over the whole tensor"
whole = norm.weight * x / (x.pow(2).mean() + 1e-5).sqrt()
assert not torch.allclose(result, whole, atol=1e-3), advice
assert not torch.allclose(result * norm.weight, expected), "multiply by the weight"
squared = norm.weight * x / (x.pow(2).mean(-1, keepdim=True) + 1e-5)
assert not torch.allclose(result, squared), "divide by the root of the mean square"
factor = (result / expected).mean()
assert torch.allclose(result, expected, atol=1e-5), (
    f"divide by the root of the mean of the squares; yours is {factor:.2f} times as large"
)
small = x / 1000  # so small that eps matters
assert torch.allclose(rms_norm(small, norm.weight, 1e-5), norm(small), atol=1e-5), (
    "add eps inside the root, to the mean of the squares"
)
print(f"ok: largest difference from the library {(result - expected).abs().max():.1e}")


# %% tags=["wrong"] expects="that is LayerNorm"
def rms_norm(x, weight, eps):
    x = x - x.mean(dim=-1, keepdim=True)
    return weight * x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()


# %% tags=["wrong"] expects="not over the whole tensor"
def rms_norm(x, weight, eps):
    return weight * x / (x.pow(2).mean() + eps).sqrt()


# %% tags=["wrong"] expects="divide by the root of the mean square"
def rms_norm(x, weight, eps):
    return weight * x / (x.pow(2).mean(dim=-1, keepdim=True) + eps)


# %% tags=["wrong"] expects="yours is 0.41 times as large"
def rms_norm(x, weight, eps):
    return weight * x / (x.pow(2).sum(dim=-1, keepdim=True) + eps).sqrt()


# %% tags=["wrong"] expects="eps inside the root"
def rms_norm(x, weight, eps):
    return weight * x / (x.pow(2).mean(dim=-1, keepdim=True).sqrt() + eps)


# %% tags=["wrong"] expects="multiply by the weight"
def rms_norm(x, weight, eps):
    return x / (x.pow(2).mean(dim=-1, keepdim=True) + eps).sqrt()


# %% [markdown]
# ## 3.3 Rotary positions (20 minutes)
# Whisper adds a vector to each state to say where it is. Llama instead *rotates* queries
# and keys. A vector of `Dh` numbers is seen as `Dh/2` pairs `(a, b)`: number `i` with
# number `i + Dh/2`. Pair `i` of the token at position `p` is rotated by the angle
#
#     angle = p * theta ** (-2 i / Dh)
#     (a, b)  →  (a cos - b sin,  b cos + a sin)
#
# **Exercise 2.** Write it without a loop over positions.


# %% tags=["exercise"]
def rotate(x, positions, theta=10_000.0):
    """Rotate each pair of dimensions. x (T, Dh), positions (T,) -> (T, Dh)"""
    # BEGIN SOLUTION
    half = x.shape[1] // 2
    angle = positions[:, None] * theta ** (
        -2 * torch.arange(half) / x.shape[1]
    )  # (T, Dh/2)
    a, b = x[:, :half], x[:, half:]
    cos, sin = angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=1)
    # END SOLUTION


# %% tags=["check"]
calls = []  # inputs and results of the library's rotate, for the real queries and keys
library_rotate = llama.rotate


def record(x, *angles):
    calls.append((x, library_rotate(x, *angles)))
    return calls[-1][1]


llama.rotate = record
llm(torch.tensor([prompt]))
llama.rotate = library_rotate

x, expected = calls[0][0][0, 1], calls[0][1][0, 1]  # queries of layer 0, head 1: (T, Dh)
places = torch.arange(float(len(x)))
result = rotate(x.clone(), places)
assert result.shape == x.shape, f"the shape must stay {tuple(x.shape)}"
advice = "the length of a pair must not change: use cosine and sine of the same angle"
assert torch.allclose(result.norm(dim=1), x.norm(dim=1), atol=1e-3), advice
same_numbers = torch.equal(result[0].sort().values, x[0].sort().values)
advice = "the numbers are in other places: first all a of the pairs, then all b"
assert torch.equal(result[0], x[0]) or not same_numbers, advice
advice = "position 0 is not rotated: positions begin with 0, not 1"
assert torch.allclose(result[0], x[0]), advice
advice = "the sign of the sine: this rotates backwards"
assert not torch.allclose(rotate(x, -places), expected, atol=1e-3), advice
a_and_b = result[:, [0, 32]].norm(dim=1)
advice = "the pairs are i and i + Dh/2, not two neighbours"
assert torch.allclose(a_and_b, x[:, [0, 32]].norm(dim=1), atol=1e-3), advice
advice = "pair i turns with theta ** (-2 i / Dh), for i from 0 to Dh/2 - 1"
assert torch.allclose(result, expected, atol=1e-3), advice
print(f"ok: largest difference from the library {(result - expected).abs().max():.1e}")


# %% tags=["wrong"] expects="not two neighbours"
def rotate(x, positions, theta=10_000.0):
    angle = positions[:, None] * theta ** (-torch.arange(0, x.shape[1], 2) / x.shape[1])
    a, b, cos, sin = x[:, 0::2], x[:, 1::2], angle.cos(), angle.sin()
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=2).flatten(1)


# %% tags=["wrong"] expects="this rotates backwards"
def rotate(x, positions, theta=10_000.0):
    half = x.shape[1] // 2
    angle = positions[:, None] * theta ** (-2 * torch.arange(half) / x.shape[1])
    a, b, cos, sin = x[:, :half], x[:, half:], angle.cos(), angle.sin()
    return torch.cat([a * cos + b * sin, b * cos - a * sin], dim=1)


# %% tags=["wrong"] expects="for i from 0 to Dh/2 - 1"
def rotate(x, positions, theta=10_000.0):
    half = x.shape[1] // 2
    angle = positions[:, None] * theta ** (-torch.arange(half) / x.shape[1])
    a, b, cos, sin = x[:, :half], x[:, half:], angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=1)


# %% tags=["wrong"] expects="first all a of the pairs, then all b"
def rotate(x, positions, theta=10_000.0):
    half = x.shape[1] // 2
    angle = positions[:, None] * theta ** (-2 * torch.arange(half) / x.shape[1])
    a, b, cos, sin = x[:, :half], x[:, half:], angle.cos(), angle.sin()
    return torch.stack([a * cos - b * sin, b * cos + a * sin], dim=2).flatten(1)


# %% tags=["wrong"] expects="positions begin with 0"
def rotate(x, positions, theta=10_000.0):
    half = x.shape[1] // 2
    angle = (positions[:, None] + 1) * theta ** (-2 * torch.arange(half) / x.shape[1])
    a, b, cos, sin = x[:, :half], x[:, half:], angle.cos(), angle.sin()
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=1)


# %% [markdown]
# **Predict, then run.** One query and one key. The score is their dot product after the
# rotation. Which of these have the same score: query at 10 and key at 7, query at 30 and
# key at 27, query at 7 and key at 10?

# %% tags=["guess"]
equal = "all three"  # ← your guess

# %%
query, key = torch.randn(2, 64, generator=torch.Generator().manual_seed(2))


def score_of(query_position, key_position):
    places = torch.tensor([query_position, key_position]).float()
    rotated = rotate(torch.stack([query, key]), places)
    return (rotated[0] @ rotated[1]).item()


pairs = ((10, 7), (30, 27), (7, 10))
values = ", ".join(f"{p}: {score_of(*p):.3f}" for p in pairs)
reveal("scores", equal, values, "the distance counts, with its sign")

fig, (left, right) = plt.subplots(1, 2, figsize=(9, 2.8))
for i, colour in ((0, BLUE), (8, ORANGE), (16, GREEN)):
    ones = torch.zeros(40, 64)
    ones[:, i] = 1
    left.plot(rotate(ones, torch.arange(40.0))[:, i], color=colour, label=f"pair {i}")
left.set(
    xlabel="position (tokens)",
    ylabel="first number",
    ylim=(-1.1, 1.6),
    title="the pair (1, 0) after its rotation",
)
left.legend(loc="upper center", ncols=3)
for start, style in ((50, "-"), (300, "--")):
    distances = range(-40, 41)
    right.plot(
        distances,
        [score_of(start, start - d) for d in distances],
        ls=style,
        label=f"query at {start}",
    )
right.set(xlabel="distance to the key (tokens)", ylabel="score", title="query · key")
right.legend()
plt.show()

# %% [markdown]
# ## 3.4 Grouped heads (10 minutes)
# Attention runs several times in a layer, each time with other queries, keys and values:
# these are its *heads*. This Llama has 4 query heads, but only 2 key/value heads: query
# heads 0 and 1 share the first, 2 and 3 the second. So there are half as many keys and
# values to store (3.5).
#
# **Exercise 3.** Repeat the `Hk` key heads, so that each of the `H` query heads has its
# own. The copies of one head are neighbours.


# %% tags=["exercise"]
def share(k, H):
    """(B, Hk, T, Dh) -> (B, H, T, Dh)"""
    # BEGIN SOLUTION
    return k.repeat_interleave(H // k.shape[1], dim=1)
    # END SOLUTION


# %% tags=["check"]
small = (
    torch.arange(3.0).view(1, 3, 1, 1).expand(1, 3, 2, 4)
)  # head h contains the number h
result = share(small, 6)
assert result.dim() == 4, f"expected 4 dimensions, found {tuple(result.shape)}"
assert result.shape[2] == 2, (
    f"dimension 2 counts tokens; heads are dimension 1: {result.shape}"
)
assert result.shape == (1, 6, 2, 4), f"expected 6 heads, found {tuple(result.shape)}"
order = result[0, :, 0, 0].int().tolist()
assert order != [0, 1, 2, 0, 1, 2], "neighbouring heads share: 0 0 1 1 2 2, not 0 1 2 0 1 2"
assert order == [0, 0, 1, 1, 2, 2], f"expected the heads 0 0 1 1 2 2, found {order}"
print("ok")


# %% tags=["wrong"] expects="neighbouring heads share"
def share(k, H):
    return k.repeat(1, H // k.shape[1], 1, 1)


# %% tags=["wrong"] expects="heads are dimension 1"
def share(k, H):
    return k.repeat_interleave(H // k.shape[1], dim=2)


# %% tags=["wrong"] expects="expected 6 heads"
def share(k, H):
    return k.repeat_interleave(k.shape[1], dim=1)


# %% [markdown]
# The attention of notebook 2, now with your `share` and a causal mask: a token sees
# itself and the tokens before it. Does the whole Llama run with it?


# %%
def attention(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
    # llama.py sets enable_gqa: PyTorch then shares the heads. Here `share` does it.
    k, v = share(k, q.shape[1]), share(v, q.shape[1])
    scores = q @ k.transpose(2, 3) / q.shape[-1] ** 0.5
    if is_causal:
        attn_mask = torch.ones(scores.shape[2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = scores.masked_fill(~attn_mask, -torch.inf)
    weights = scores.softmax(dim=-1)
    return weights @ v, weights


answer = complete(prompt)
ids = torch.tensor([prompt + answer])
with watch_attention(attention) as maps:
    mine = llm(ids)
print(f"largest difference of the logits {(mine - llm(ids)).abs().max():.1e}")

# %% [markdown]
# Where does the model look when it writes a word? A row below is the position *before*
# the word, because this position predicts it. The columns are the French words.

# %%
sentence = tokenizer.encode(row.sentence)
first = 1 + len(tokenizer.encode("[INST] "))  # after <s>
columns = slice(first, first + len(sentence))
lines = slice(len(prompt) - 1, len(prompt) - 1 + len(answer))
views = {
    "layer 0, head 1": maps[0][0, 1, lines, columns],
    "layer 1, mean of the heads": maps[1][0, :, lines, columns].mean(dim=0),
}
fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), sharey=True)
for ax, (title, weights) in zip(axes, views.items()):
    shown = ax.imshow(weights, cmap="viridis", vmin=0, vmax=0.6)
    ax.set(title=title, xlabel="French token")
    ax.set_xticks(
        range(len(sentence)), map(tokenizer.pieces.id_to_piece, sentence), rotation=90
    )
axes[0].set_yticks(range(len(answer)), map(tokenizer.pieces.id_to_piece, answer))
axes[0].set(ylabel="next English token")
fig.colorbar(shown, ax=axes, label="weight")
plt.show()

# %% [markdown]
# Some words look at their translation: `closes` at `ferme`, `tomorrow` at `demain`,
# `quarter` at `quart`. Other rows have no such simple reading. The rest of the weight is
# on the prompt and on the English words before.
#
# ## 3.5 The cache (15 minutes)
# `complete` reads the whole prompt again for every new token. But keys and values of old
# tokens do not change: no token sees a later one. So they are kept, in a `Cache`.
#
# The three parts of `llm(ids)`, for B texts and T *new* tokens of each:
# * `llm.embed(ids)` makes embeddings `(B, T, D)` of ids `(B, T)`.
# * `llm.hidden(embeddings, cache, positions)` returns two things: the states `(B, T, D)`
#   of the new tokens, and the cache. It adds the new tokens to this cache. `positions (B,
#   T)` says where they are, for the rotation.
# * `llm.logits(states)` makes logits `(B, T, V)` of states.
#
# `cache.length` is the number of tokens in the cache.
#
# **Exercise 4.** One step for one new token. Here B and T are 1.


# %% tags=["exercise"]
def next_logits(token, cache):
    """Add one token (an int) to the cache. -> logits of the token after it (V,)"""
    # BEGIN SOLUTION
    position = torch.tensor([[cache.length]])
    state, _ = llm.hidden(llm.embed(torch.tensor([[token]])), cache, position)
    return llm.logits(state)[0, -1]
    # END SOLUTION


# %% tags=["check"]
_, cache = llm.hidden(llm.embed(torch.tensor([prompt])))
read = list(prompt)
for token in answer[:3]:
    logits, read = next_logits(token, cache), [*read, token]
    assert logits.shape == (llm.config.vocab_size,), (
        f"expected logits (V,), found {logits.shape}"
    )
    assert cache.length == len(read), "the cache has not grown: give it to llm.hidden"
    expected = llm(torch.tensor([read]))[0, -1]
    advice = (
        "other logits than without a cache: is the position the number of tokens before it?"
    )
    assert torch.allclose(logits, expected, atol=1e-3), advice
print(f"ok: largest difference {(logits - expected).abs().max():.1e}")


# %% tags=["wrong"] expects="the number of tokens before it"
def next_logits(token, cache):
    state, _ = llm.hidden(llm.embed(torch.tensor([[token]])), cache, torch.tensor([[0]]))
    return llm.logits(state)[0, -1]


# %% tags=["wrong"] expects="the number of tokens before it"
def next_logits(token, cache):
    position = torch.tensor([[cache.length + 1]])
    state, _ = llm.hidden(llm.embed(torch.tensor([[token]])), cache, position)
    return llm.logits(state)[0, -1]


# %% tags=["wrong"] expects="the cache has not grown"
def next_logits(token, cache):
    state, _ = llm.hidden(llm.embed(torch.tensor([[token]])))
    return llm.logits(state)[0, -1]


# %% [markdown]
# **Predict, then run.** A text of 300 tokens. How many times faster is the last token
# with the cache?

# %% tags=["guess"]
times_faster = 300  # ← your guess

# %%
text = (prompt * 12)[:301]
lengths, without, with_cache = list(range(20, 301, 40)), [], []


def milliseconds(function, repeat=5):
    """The shortest of several times, because other programs can only make it longer."""
    times = []
    for _ in range(repeat):
        start = perf_counter()
        function()
        times.append(1000 * (perf_counter() - start))
    return min(times)


for n in lengths:
    x = llm.embed(torch.tensor([text[:n]]))
    without.append(milliseconds(lambda: llm.hidden(x)))  # noqa: B023
    _, cache = llm.hidden(x)
    with_cache.append(milliseconds(lambda: next_logits(text[n], cache)))  # noqa: B023
reveal(
    "times faster",
    times_faster,
    f"{without[-1] / with_cache[-1]:.0f}",
    "not 300: every call also has costs that do not depend on the number of tokens",
)

fig, ax = plt.subplots(figsize=(9, 2.4))
ax.plot(lengths, without, "o-", label="without a cache")
ax.plot(lengths, with_cache, "s-", label="with a cache")
ax.set(xlabel="tokens before", ylabel="time of one token (ms)", ylim=(0, None))
ax.legend()
plt.show()

# %% [markdown]
# ## 3.6 Break it: the mistake without an error
# Meta's own Llama pairs the neighbours `2i` and `2i + 1`. Hugging Face's files have the
# rows of the query and key matrices in another order, so that pairs are `i` and `i +
# Dh/2`. Use the wrong pairs with these weights: all names and shapes fit. What happens?
# (BLEU compares translations with references, and 100 means equal: see notebook 8.)


# %%
def translate_all(sentences):
    return [tokenizer.decode(complete(prompt_of(sentence))) for sentence in sentences]


def rotate_neighbours(x, cos, sin):
    """The library's rotate, but for the pairs 2i and 2i + 1."""
    Dh = x.shape[-1]
    order = torch.cat([torch.arange(0, Dh, 2), torch.arange(1, Dh, 2)])
    y = torch.empty_like(x)
    y[..., order] = library_rotate(x[..., order], cos, sin)
    return y


some = rows[:24]
right_texts = translate_all([r.sentence for r in some])
llama.rotate = rotate_neighbours
try:
    wrong_texts = translate_all([r.sentence for r in some])
finally:
    llama.rotate = library_rotate  # repair it, whatever happened
references = [r.translation for r in some]
print(
    "BLEU",
    score(right_texts, references)["bleu"],
    "→",
    score(wrong_texts, references)["bleu"],
)
for r, text in list(zip(some, wrong_texts))[:5]:
    print(f"{r.sentence} → {text}")

# %% [markdown]
# It looks like a badly trained model, so you would search for the mistake in the training.
# A comparison with the original program finds it.
#
# ## Recap
# * RMSNorm divides by the length (up to a constant). Rotary positions turn pairs of
#   numbers, so that scores depend on distances. Grouped heads share keys and values.
# * The cache keeps keys and values. A new token needs its right position.
# * Weights that load without an error can still be wrong.
#
# **Read next:** `llama.py` from `RMSNorm` to `Llama.hidden`. Where is `share`?
#
# **Open question:** nothing in 3.3 forbids positions such as 10.5. What could one use
# them for?
