# %% [markdown]
# # 5 · LoRA: a small change to a big matrix
#
# **75 minutes**, of which the computer needs less than 3. This notebook explains `lora.py`.
# Do notebooks 2 and 3 (the two models that get a LoRA) and 4 (the loss) first.
#
# After this notebook you can
# 1. write a LoRA layer, merge it into its matrix, and take it out again;
# 2. compute how many numbers a LoRA trains, for our model and for a model of the paper;
# 3. measure what the two LoRAs of a trained model do, and how much of their rank they use.
#
# The notebook stops at the first exercise that is not done yet, with `NotImplementedError:
# your turn`. Write your answer in place of this line, run the cell, then run the check
# below it.

# %% tags=["setup"]
import sys
from contextlib import contextmanager
from dataclasses import replace

import matplotlib.pyplot as plt
import torch
from torch import nn

sys.path[:0] = ["..", "../.."]  # the folders of course.py and of the library
from course import BLUE, CORPUS, GREEN, ORANGE, RED, load_trained_model, play, reveal
from data import AUDIO, prompt_for, prompt_ids, read_corpus
from llama import Llama, Tokenizer
from llast import LLM_TARGETS
from lora import LoRALinear, add_lora, lora_layers, merge_lora
from train import PRESETS, make_batches
from translate import SearchOptions, beam_search, score, translate
from whisper_encoder import load_audio

torch.set_num_threads(1)  # for such small tensors, more threads are not faster

# %% [markdown]
# ## 5.1 A matrix that is made from two vectors
# A column of 4 numbers times a row of 3 numbers is a matrix with 12 numbers. All its rows
# are multiples of one row: its **rank** is 1. A sum of R such matrices has at most rank R.
# We write it as B A, with B (out, R) and A (R, in).

# %%
B = torch.tensor([[1.0], [2.0], [0.0], [-1.0]])  # (4, 1)
A = torch.tensor([[3.0, 1.0, 0.5]])  # (1, 3)
print(B @ A, "rank", torch.linalg.matrix_rank(B @ A).item())

# %% [markdown]
# **Predict, then run.** A layer of our encoder has 512 inputs and 2,048 outputs. How many
# numbers does it have? How many numbers do A and B of rank 16 have together?

# %% tags=["guess"]
full_numbers = 512 * 2048  # ← your guess
lora_numbers = 16 * 512 * 2048  # ← your guess

# %%
reveal("the matrix", full_numbers, 512 * 2048)
reveal("A and B", lora_numbers, 16 * 512 + 2048 * 16, "R * (in + out)")

# %% [markdown]
# ## 5.2 Write the layer (15 minutes)
# The layer computes y = W x + bias + (alpha / rank) · B A x. W and the bias come from a
# trained linear layer and do not change. Only A and B are trained. At the start, the layer
# must compute exactly the same as the old layer.
#
# **Exercise 1.** Which of A and B can start with zeros, and which cannot? Use the names
# `self.A` and `self.B`.


# %% tags=["exercise"]
class LoRA(nn.Module):
    """A frozen linear layer plus a trained change of low rank. (n, in) -> (n, out)"""

    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.merged = linear, False
        # Set self.scale, self.A (rank, in) and self.B (out, rank), and freeze `linear`.
        # BEGIN SOLUTION
        linear.requires_grad_(False)
        self.scale = alpha / rank
        self.A = nn.Parameter(
            torch.randn(rank, linear.in_features) / linear.in_features**0.5
        )
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))
        # END SOLUTION

    def change_of(self, x):
        """The part of the output that comes from A and B."""
        # BEGIN SOLUTION
        return self.scale * (x @ self.A.T) @ self.B.T
        # END SOLUTION

    def forward(self, x):
        return self.linear(x) if self.merged else self.linear(x) + self.change_of(x)


# %% tags=["check"]
torch.manual_seed(0)
layer, x = LoRA(nn.Linear(24, 36), rank=4, alpha=8), torch.randn(5, 24)
shapes = tuple(layer.A.shape), tuple(layer.B.shape)
assert shapes == ((4, 24), (36, 4)), (
    f"A is (rank, in) and B is (out, rank); yours: {shapes}"
)
assert layer.change_of(x).abs().max() == 0, (
    "a new LoRA must change nothing: start B with zeros"
)
assert layer.A.abs().sum() > 0, (
    "A and B are zero: both gradients will be zero, nothing can learn"
)
names = [name for name, p in layer.named_parameters() if p.requires_grad]
assert names == ["A", "B"], f"only A and B are trained, but here {names}: freeze `linear`"
with torch.no_grad():
    layer.B.normal_()
    change, expected = layer.change_of(x), x @ (layer.B @ layer.A).T
factor = (change / expected).mean().item()
assert torch.allclose(change / factor, expected, atol=1e-4), (
    "the change is a multiple of B A x"
)
assert abs(factor - 2) < 1e-4, (
    f"the factor is alpha / rank = 8 / 4 = 2; yours is {factor:.3g}"
)
print("ok: it starts as the old layer, and only A and B are trained")


# %% tags=["wrong"] expects="the factor is alpha / rank"
class LoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.merged, self.scale = linear.requires_grad_(False), False, alpha
        self.A = nn.Parameter(torch.randn(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def change_of(self, x):
        return self.scale * (x @ self.A.T) @ self.B.T


# %% tags=["wrong"] expects="nothing can learn"
class LoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.merged, self.scale = (
            linear.requires_grad_(False),
            False,
            alpha / rank,
        )
        self.A = nn.Parameter(torch.zeros(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def change_of(self, x):
        return self.scale * (x @ self.A.T) @ self.B.T


# %% tags=["wrong"] expects="freeze `linear`"
class LoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.merged, self.scale = linear, False, alpha / rank
        self.A = nn.Parameter(torch.randn(rank, linear.in_features))
        self.B = nn.Parameter(torch.zeros(linear.out_features, rank))

    def change_of(self, x):
        return self.scale * (x @ self.A.T) @ self.B.T


# %% tags=["wrong"] expects="must change nothing"
class LoRA(nn.Module):
    def __init__(self, linear, rank, alpha):
        super().__init__()
        self.linear, self.merged, self.scale = (
            linear.requires_grad_(False),
            False,
            alpha / rank,
        )
        self.A = nn.Parameter(torch.randn(rank, linear.in_features))
        self.B = nn.Parameter(torch.randn(linear.out_features, rank))

    def change_of(self, x):
        return self.scale * (x @ self.A.T) @ self.B.T


# %% [markdown]
# **Predict, then run.** In a new layer B is zero. Which of the two has a gradient that is
# not zero in the very first step: A, B, or both? (The gradient of A is a product with B,
# and the gradient of B is a product with A.)

# %% tags=["guess"]
with_gradient = "A and B"  # ← your guess

# %%
new = LoRA(nn.Linear(24, 36), rank=4, alpha=8)
new(x).square().mean().backward()
nonzero = [name for name in "AB" if getattr(new, name).grad.abs().max() > 0]
reveal(
    "gradient that is not zero",
    with_gradient,
    " and ".join(nonzero),
    "after one step B is not zero",
)

# %% [markdown]
# The library's layer with your A and B gives the same output. The largest difference:

# %%
library = LoRALinear(layer.linear, rank=4, alpha=8, dropout=0.0)
library.load_state_dict({"lora_A": layer.A, "lora_B": layer.B}, strict=False)
print((library(x) - layer(x)).abs().max().item())

# %% [markdown]
# ## 5.3 Merge: no cost after training (10 minutes)
# After training we can add the change to W. Then the layer is as fast as before.
#
# **Exercise 2.** Change `layer.linear.weight` in place. A second call must do nothing:
# `layer.merged` says whether the change is already in the weight.


# %% tags=["exercise"]
@torch.no_grad()
def merge(layer):
    """Add the change to the weight, once."""
    # BEGIN SOLUTION
    if not layer.merged:
        layer.linear.weight += layer.scale * layer.B @ layer.A
    layer.merged = True
    # END SOLUTION


@torch.no_grad()
def unmerge(layer):
    """Subtract the change from the weight, if it is merged."""
    # BEGIN SOLUTION
    if layer.merged:
        layer.linear.weight -= layer.scale * layer.B @ layer.A
    layer.merged = False
    # END SOLUTION


# %% tags=["check"]
layer = LoRA(nn.Linear(24, 36), rank=4, alpha=8)
nn.init.normal_(layer.B)
original, before = layer.linear.weight.clone(), layer(x)
merge(layer)
assert layer.merged, "set layer.merged to True"
assert torch.allclose(layer(x), before, atol=1e-4), "the output changed: add scale * B A"
merge(layer)
assert torch.allclose(layer(x), before, atol=1e-4), (
    "the second merge added the change again"
)
with torch.no_grad():
    layer.linear.weight += 1.0  # another program changes the merged weight
unmerge(layer)
advice = "subtract the change; a saved copy of the old weight forgets what happened later"
assert torch.allclose(layer.linear.weight, original + 1.0, atol=1e-4), advice
assert not layer.merged, "set layer.merged to False"
print("ok: the same output with one matrix")


# %% tags=["wrong"] expects="add scale * B A"
@torch.no_grad()
def merge(layer):
    if not layer.merged:
        layer.linear.weight += layer.B @ layer.A
    layer.merged = True


# %% tags=["wrong"] expects="added the change again"
@torch.no_grad()
def merge(layer):
    layer.linear.weight += layer.scale * layer.B @ layer.A
    layer.merged = True


# %% tags=["wrong"] expects="a saved copy of the old weight"
@torch.no_grad()
def merge(layer):
    if not layer.merged:
        layer.saved = layer.linear.weight.clone()
        layer.linear.weight += layer.scale * layer.B @ layer.A
    layer.merged = True


@torch.no_grad()
def unmerge(layer):
    layer.linear.weight.copy_(layer.saved)
    layer.merged = False


# %% [markdown]
# ## 5.4 How many numbers does LLaST-2B train?
# **Predict, then run.** The encoder, whisper-large-v2, has 32 layers. Four matrices of a
# layer are 1280 x 1280, one is 5120 x 1280 and one is 1280 x 5120. The paper's rank in the
# encoder is 128. How many million numbers do its LoRAs have?

# %% tags=["guess"]
encoder_millions = 30  # ← your guess


# %%
def lora_size(shapes, rank, n_layers):
    return n_layers * sum(rank * (n_in + n_out) for n_out, n_in in shapes)


encoder_shapes = [(1280, 1280)] * 4 + [(5120, 1280), (1280, 5120)]
# TinyLlama: q and o, then k and v (fewer heads), then the three matrices of the MLP
llm_shapes = [(2048, 2048)] * 2 + [(256, 2048)] * 2 + [(5632, 2048)] * 2 + [(2048, 5632)]
parts = {
    "encoder LoRA": lora_size(encoder_shapes, 128, 32),
    "LLM LoRA": lora_size(llm_shapes, 512, 22),
    "projector": (1280 * 2048 + 2048) + 2 * (2048 * 2048 + 2048),
}
reveal("encoder LoRA (millions)", encoder_millions, round(parts["encoder LoRA"] / 1e6))
for part, size in parts.items():
    print(f"{part:14}{size:14,}")

# %% [markdown]
# The LLM itself has 1.1 billion numbers. With rank 512, its LoRA is more than a third of
# that. "Low rank" is relative.
#
# ## 5.5 What do the two LoRAs of a trained model do?
# Our trained model has a LoRA in the encoder and one in the LLM. We switch each of them off
# by setting its factor `scale` to 0, and do not train again. First listen to a clip and
# read.

# %% tags=["slow"]
model = load_trained_model()
rows = read_corpus(CORPUS, "fr", "en")[0]["test"][:64]
encoder_layers, llm_layers = lora_layers(model.speech_encoder), lora_layers(model.llm)
switched = {
    "both LoRAs": [],
    "without the encoder's": encoder_layers,
    "without the LLM's": llm_layers,
    "no LoRA": encoder_layers + llm_layers,
}


@contextmanager
def switched_off(layers):
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales):
            layer.scale = scale


print("reference".ljust(24), rows[6].translation)
for name, layers in switched.items():
    with switched_off(layers):
        [result] = translate(model, [rows[6].path])
    print(name.ljust(24), result.text)
play(load_audio(rows[6].path))

# %% [markdown]
# **Predict, then run.** Which LoRA does this model need more? Guess the BLEU on 64 clips
# without each of them.

# %% tags=["guess"]
without_encoder_lora = 75  # ← your guess
without_llm_lora = 50  # ← your guess

# %% tags=["slow"]
settings = replace(PRESETS["tiny"], asr=0.0)  # only translation
batches = make_batches(model, rows, settings)
loaded = [batches.load(group) for group in batches.groups(0)]


@torch.inference_mode()
def answer_loss():
    return torch.cat([model(batch) for batch in loaded]).mean().item()


references, bleu = [row.translation for row in rows], {}
for name, layers in switched.items():
    with switched_off(layers):
        results = translate(model, [row.path for row in rows], search=SearchOptions(1))
        bleu[name] = score([r.text for r in results], references)["bleu"]
        print(f"{name:24} BLEU {bleu[name]:5.1f}   loss of a token {answer_loss():.3f}")
reveal("without the encoder's", without_encoder_lora, bleu["without the encoder's"])
reveal("without the LLM's", without_llm_lora, bleu["without the LLM's"])

# %% [markdown]
# Be careful: this does not say how good a model is that was *trained* without one LoRA.
# Such a model would use its projector and its other LoRA in another way. The experiments
# (`experiments/`) train these models.
#
# ## 5.6 How much of the rank is used? (15 minutes)
# The singular value decomposition writes a matrix as U S V. Its largest R singular values
# give the best matrix of rank R: no other matrix of rank R is closer.
#
# **Exercise 3.** Return new A (rank, in) and B (out, rank), so that B A is the best matrix
# of this rank for the old B A.


# %% tags=["exercise"]
def cut(A, B, rank):
    # BEGIN SOLUTION
    U, S, V = torch.linalg.svd(B @ A, full_matrices=False)
    return V[:rank].clone(), U[:, :rank] * S[:rank]
    # END SOLUTION


# %% tags=["check"]
rng = torch.Generator().manual_seed(0)
A, B = torch.randn(6, 24, generator=rng), torch.randn(36, 6, generator=rng)
values = torch.linalg.svdvals(B @ A)
for rank in (6, 3, 1):
    new_A, new_B = cut(A, B, rank)
    shapes = tuple(new_A.shape), tuple(new_B.shape)
    assert shapes == ((rank, 24), (36, rank)), (
        f"A ({rank}, 24) and B (36, {rank}), not {shapes}"
    )
    distance, best = (new_B @ new_A - B @ A).norm(), values[rank:].norm()
    if rank == 6:  # the full rank of this example
        assert distance < 1e-2, (
            "the full rank changes B A: use each singular value only once"
        )
    advice = "keep the largest singular values"
    assert distance < best + 1e-2, (
        f"distance {distance:.1f}, possible is {best:.1f}: {advice}"
    )
print("ok: the closest matrix of rank 6, 3 and 1")


# %% tags=["wrong"] expects="keep the largest singular values"
def cut(A, B, rank):
    U, S, V = torch.linalg.svd(B @ A, full_matrices=False)
    U, S, V = U[:, :6], S[:6], V[:6]
    return V[-rank:].clone(), U[:, -rank:] * S[-rank:]


# %% tags=["wrong"] expects="use each singular value only once"
def cut(A, B, rank):
    U, S, V = torch.linalg.svd(B @ A, full_matrices=False)
    return V[:rank] * S[:rank, None], U[:, :rank] * S[:rank]


# %% tags=["wrong"] expects="keep the largest singular values"
def cut(A, B, rank):
    return A[:rank].clone(), B[:, :rank].clone()


# %% [markdown]
# First the singular values themselves, for four kinds of layers. Each line is a mean over
# the layers of one kind, and the first value of each layer is set to 1.

# %% tags=["slow"]
kinds = {
    "encoder, attention": [x for x in encoder_layers if x.in_features == x.out_features],
    "encoder, MLP": [x for x in encoder_layers if x.in_features != x.out_features],
    "LLM, attention": [
        x for block in model.llm.model.layers for x in lora_layers(block.self_attn)
    ],
    "LLM, MLP": [x for block in model.llm.model.layers for x in lora_layers(block.mlp)],
}
full = {x: (x.lora_A.data, x.lora_B.data) for x in encoder_layers + llm_layers}
sorted_parts = {
    x: cut(A, B, len(A)) for x, (A, B) in full.items()
}  # the largest part first
fig, ax = plt.subplots(figsize=(7, 3))
for (kind, layers), colour, marker in zip(
    kinds.items(), (BLUE, GREEN, ORANGE, RED), "osD^"
):
    values = torch.stack([sorted_parts[x][1].norm(dim=0) for x in layers])  # (layers, R)
    values = (values / values[:, :1]).mean(dim=0)
    ax.plot(range(1, len(values) + 1), values, marker + "-", color=colour, label=kind, ms=4)
    share = [x.scale * (x.lora_B @ x.lora_A).norm() / x.weight.norm() for x in layers]
    share = torch.stack(share).mean()
    print(f"{kind:20} the norm of the change is {share:.1%} of that of the weight")
ax.set(
    xlabel="number of the singular value",
    ylabel="singular value / the first",
    ylim=(0, None),
)
ax.set_title("singular values of B A after training")
ax.legend()
plt.show()

# %% [markdown]
# Now cut the LoRAs of one model to a lower rank, and leave those of the other model as they
# are. Nothing is trained. Rank 0 is "switched off".


# %% tags=["slow"]
def loss_with_rank(layers, rank):
    with switched_off(layers if rank == 0 else []):
        for layer in layers:
            A, B = sorted_parts[layer]
            layer.lora_A.data, layer.lora_B.data = A[:rank].clone(), B[:, :rank].clone()
        loss = answer_loss()
    for layer in layers:
        layer.lora_A.data, layer.lora_B.data = full[layer]
    return loss


ranks = (0, 1, 2, 4, 8, 16)
fig, ax = plt.subplots(figsize=(7, 3))
for name, layers, colour, marker in (
    ("LoRA of the encoder cut", encoder_layers, BLUE, "o"),
    ("LoRA of the LLM cut", llm_layers, ORANGE, "s"),
):
    losses = [loss_with_rank(layers, rank) for rank in ranks]
    ax.plot(range(len(ranks)), losses, marker=marker, color=colour, label=name)
    print(name, [round(loss, 3) for loss in losses])
ax.set(xlabel="rank that is kept", ylabel="loss of an answer token (nats)", ylim=(0, None))
ax.set_xticks(range(len(ranks)), ranks)
ax.set_title("how much of the rank does the trained model use?")
ax.legend()
plt.show()

# %% [markdown]
# ## 5.7 Break it: a LoRA that does not start at zero
# Without any LoRA, the small LLM translates *written* French. A new LoRA must not change
# that. Here B starts with noise of three sizes. Then both A and B start with zeros: look at
# the gradients.

# %%
folder, sentence = PRESETS["tiny"].llm, "Où est la gare, s'il vous plaît ?"
tokenizer = Tokenizer(folder)
pieces = prompt_for("st", "fr", "en", PRESETS["tiny"].template)
pieces[pieces.index(AUDIO)] = sentence  # written words in the place of the speech
text_ids = torch.tensor(prompt_ids(pieces, tokenizer))


def llm_with_lora(noise):
    torch.manual_seed(0)
    llm = Llama.from_pretrained(folder)
    add_lora(llm, LLM_TARGETS, rank=16, alpha=16, dropout=0.0)
    for layer in lora_layers(llm):
        nn.init.normal_(layer.lora_B, std=noise)
    return llm


print(f"{'written':14}{sentence}")
for noise in (0.0, 0.2, 0.4, 1.0):
    llm = llm_with_lora(noise)
    [answers] = beam_search(
        llm, [llm.embed(text_ids)], tokenizer.eos_ids, SearchOptions(1, 1.0, 24)
    )
    print(f"{f'noise {noise}':14}{tokenizer.decode(answers[0].ids)}")

dead = LoRA(nn.Linear(24, 36), rank=4, alpha=8)
nn.init.zeros_(dead.A)
nn.init.zeros_(dead.B)
dead(x).square().mean().backward()
print(
    "A and B zero: largest gradient",
    max(dead.A.grad.abs().max(), dead.B.grad.abs().max()).item(),
)

# %% [markdown]
# Last, merge the whole model with the library's function. How much does the loss change?

# %% tags=["slow"]
before = answer_loss()
merge_lora(model)
print(f"loss before {before:.6f}, merged {answer_loss():.6f}")

# %% [markdown]
# ## Recap
# * LoRA adds (alpha / R) · B A to a frozen matrix. It trains R · (in + out) numbers.
# * B starts with zeros, A does not. So the model starts unchanged, and B has a gradient in
#   the first step.
# * Merged, it costs nothing. Unmerged, the same base model can have many LoRAs.
# * Switching a LoRA off shows what *this* model needs. It does not show what training
#   without it would give.
#
# **Read next:** `LoRALinear.forward` in `lora.py`. Why does it use `addmm_`?
#
# **Open question:** cut both LoRAs to rank 2 and compute BLEU. Would a model trained with
# rank 2 be as good?
