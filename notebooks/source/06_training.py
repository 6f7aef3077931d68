# %% [markdown]
# # 6 · Training: from random vectors to a translator
#
# **90 minutes**, of which the computer needs less than 6. This notebook explains
# `train_epochs` and `learning_rate` in `train.py`, and `Batches` in `data.py`. It trains
# its own small models. Do notebooks 4 (the loss) and 5 (LoRA) first.
#
# After this notebook you can
# 1. write a training loop: learning rate, several batches per step, clipping;
# 2. read its curves: the loss of each task, the gradient of each part;
# 3. find the mistake in a training from its curves.
#
# The notebook stops at the first exercise that is not done yet, with `NotImplementedError:
# your turn`. Write your answer in place of this line, run the cell, then run the check
# below it.

# %% tags=["setup"]
import math
import random
import sys
from dataclasses import replace

import matplotlib.pyplot as plt
import torch

sys.path[:0] = ["..", "../.."]  # the folders of course.py and of the library
from course import BLUE, CORPUS, GREEN, GREY, ORANGE, RED, play, reveal
from data import IGNORE, read_corpus
from llast import LLaST
from train import PRESETS, learning_rate, make_batches, model_config, train_epochs
from translate import SearchOptions, translate
from whisper_encoder import load_audio

torch.set_num_threads(1)  # for such small tensors, more threads are not faster

# %% [markdown]
# ## 6.1 How fast should it learn? (10 minutes)
# The learning rate rises in a straight line from the first step to the end of the warm-up.
# There it reaches its peak. Then it falls in a straight line. It would be 0 one step
# *after* the last one: every step must change something.
#
# **Exercise 1.** Steps are numbered from 1 to `n_steps`. Return the learning rate as a
# share of its peak.


# %% tags=["exercise"]
def share_of_peak(step, n_steps, n_warmup):
    # BEGIN SOLUTION
    rising = step / n_warmup
    falling = (n_steps + 1 - step) / (n_steps - n_warmup)
    return min(rising, falling)
    # END SOLUTION


# %% tags=["check"]
shares = [share_of_peak(step, 100, 10) for step in range(1, 101)]
assert shares[0] > 0, "the first step has the learning rate 0: it changes nothing"
assert abs(shares[0] - 0.1) < 1e-6, (
    f"step 1 of 10 is one tenth of the peak, not {shares[0]:.3f}"
)
assert abs(shares[9] - 1) < 1e-6, f"step 10 of 10 is the peak, not {shares[9]:.3f} of it"
assert max(shares) <= 1, f"step {shares.index(max(shares)) + 1} is above the peak"
assert shares[-1] > 0, "the last step has the learning rate 0: it changes nothing"
assert abs(shares[-1] - 1 / 90) < 1e-6, (
    f"the last step is 1 / 90 of the peak, not {shares[-1]:.3f}"
)
assert abs(shares[54] - 46 / 90) < 1e-6, "it falls in a straight line after the warm-up"
print("ok: it rises, it falls, and no step is lost")


# %% tags=["wrong"] expects="the first step has the learning rate 0"
def share_of_peak(step, n_steps, n_warmup):
    return min((step - 1) / n_warmup, (n_steps + 1 - step) / (n_steps - n_warmup))


# %% tags=["wrong"] expects="the last step has the learning rate 0"
def share_of_peak(step, n_steps, n_warmup):
    return min(step / n_warmup, (n_steps - step) / (n_steps - n_warmup))


# %% tags=["wrong"] expects="the last step is 1 / 90"
def share_of_peak(step, n_steps, n_warmup):
    return min(1, step / n_warmup)


# %% [markdown]
# The library computes the same from the settings. The largest difference:

# %%
settings = replace(PRESETS["tiny"], warmup=0.1, lr=1e-3, schedule="linear")
library = [learning_rate(step, 100, settings) / settings.lr for step in range(1, 101)]
print(max(abs(a - b) for a, b in zip(shares, library)))

# %% [markdown]
# ## 6.2 One step from several batches (15 minutes)
# If a large batch does not fit into memory, compute the gradients of several small batches,
# add them, and do one step. The result should be the same as for one large batch: the
# gradient of the **mean over all tokens**. PyTorch adds the gradient of each `backward()`
# to `.grad`.
#
# **Exercise 2.** `losses_of(batch)` returns the losses of the tokens of a batch, (n,). Call
# `backward()` once for each batch, so that its memory is free before the next batch.
# `sizes` has the number of tokens of each batch.


# %% tags=["exercise"]
def add_gradients(losses_of, batches, sizes):
    """Add the gradient of the mean loss of all tokens to .grad. Return this mean loss."""
    # BEGIN SOLUTION
    total = 0.0
    for batch in batches:
        loss = losses_of(batch).sum() / sum(sizes)
        loss.backward()
        total += loss.item()
    return total
    # END SOLUTION


# %% tags=["check"]
weight = torch.ones(3, requires_grad=True)
data = [torch.arange(12.0).view(4, 3), torch.full((1, 3), 5.0)]  # 4 tokens and 1 token


def toy_losses(batch):
    return (batch @ weight).square()


calls = []
loss = add_gradients(lambda batch: (calls.append(1), toy_losses(batch))[1], data, [4, 1])
result, weight.grad = weight.grad, None
toy_losses(torch.cat(data)).mean().backward()
expected, weight.grad = weight.grad, None
sum(toy_losses(batch).mean() for batch in data).div(2).backward()
mean_of_means, weight.grad = weight.grad, None
(toy_losses(data[1]).sum() / 5).backward()
last_batch, weight.grad = weight.grad, None
assert result is not None, "call backward(), so that .grad is filled"
advice = "every token counts the same: do not take the mean of the two means"
assert not torch.allclose(result, mean_of_means), advice
assert not torch.allclose(result, last_batch), (
    "only the last batch is left: do not reset .grad"
)
factor = (result / expected).mean().item()
advice = "divide by the number of tokens of all batches, 5"
assert abs(factor - 1) < 1e-4, (
    f"your gradient is {factor:.3g} times the right one: {advice}"
)
assert len(calls) == 2, f"losses_of was called {len(calls)} times, not once for each batch"
assert abs(loss - toy_losses(torch.cat(data)).mean().item()) < 1e-2, "return the mean loss"
print("ok: the gradient of one large batch")


# %% tags=["wrong"] expects="do not take the mean of the two means"
def add_gradients(losses_of, batches, sizes):
    total = 0.0
    for batch in batches:
        loss = losses_of(batch).mean() / len(batches)
        loss.backward()
        total += loss.item()
    return total


# %% tags=["wrong"] expects="do not reset .grad"
def add_gradients(losses_of, batches, sizes):
    total = 0.0
    for batch in batches:
        weight.grad = None
        loss = losses_of(batch).sum() / sum(sizes)
        loss.backward()
        total += loss.item()
    return total


# %% tags=["wrong"] expects="divide by the number of tokens of all batches"
def add_gradients(losses_of, batches, sizes):
    total = 0.0
    for batch in batches:
        loss = losses_of(batch).sum() / len(batches)
        loss.backward()
        total += loss.item()
    return total


# %% [markdown]
# ## 6.3 A model that trains in a minute
# The preset trains for some minutes. Here we want to train many times. So the encoder gets
# no LoRA. Then its states never change during training, and we compute them only once. The
# projector and the LLM's LoRA are trained.

# %% tags=["slow"]
settings = replace(PRESETS["tiny"], encoder_rank=0, lr=1e-3, asr=1.0, epochs=2)
splits = read_corpus(CORPUS, "fr", "en")[0]
rows, dev_rows = splits["train"][:300], splits["dev"]
states = {}  # waveform -> states of the encoder (S, Da)


def key_of(clip):
    return len(clip), clip.sum().item()


def new_model(seed=0, settings=settings):
    """An untrained model. It takes the states of known clips from `states`."""
    torch.manual_seed(seed)
    model = LLaST.fresh(model_config(settings))
    projector, encode = model.projector, model.encode_speech

    @torch.no_grad()
    def compute_states(clips):
        model.projector = torch.nn.Identity()  # then encode_speech returns the states
        for clip, clip_states in zip(clips, encode(clips)):
            states[key_of(clip)] = clip_states
        model.projector = projector

    def encode_speech(clips):
        new = [clip for clip in clips if key_of(clip) not in states]
        if new:
            compute_states(new)
        return [projector(states[key_of(clip)]) for clip in clips]

    model.encode_speech = encode_speech
    return model


model = new_model()
clips = sorted((load_audio(row.path) for row in rows + dev_rows), key=len)
for start in range(0, len(clips), 16):
    model.encode_speech(clips[start : start + 16])
print(f"{len(rows)} training clips, {len(dev_rows)} dev clips, {len(states)} clips encoded")
print(rows[0].sentence, "->", rows[0].translation)
play(load_audio(rows[0].path))

# %% [markdown]
# Each clip is used twice: to translate it (`st`) and to transcribe it (`asr`). The losses
# of a batch come as one long tensor: all answer tokens of row 0, then those of row 1, and
# so on. The end token has a loss, too. A label that is not `IGNORE` belongs to an answer
# token.
#
# **Exercise 3 (10 minutes).** Split the losses by task. `labels` is (B, T), `tasks` has the
# task of each row.


# %% tags=["exercise"]
def losses_by_task(losses, labels, tasks):
    """Return {"st": tensor of losses, "asr": tensor of losses}."""
    # BEGIN SOLUTION
    sizes = (labels != IGNORE).sum(dim=1).tolist()
    parts = {"st": [], "asr": []}
    for row_losses, task in zip(losses.split(sizes), tasks):
        parts[task].append(row_losses)
    return {
        task: torch.cat(rows) if rows else torch.empty(0) for task, rows in parts.items()
    }
    # END SOLUTION


# %% tags=["check"]
end = 2  # id of the end token
labels = torch.full((3, 6), IGNORE)
labels[0, 2:6] = torch.tensor([11, 12, 13, end])
labels[1, 3:5] = torch.tensor([21, end])
labels[2, 1:5] = torch.tensor([31, 32, 33, end])
losses = torch.arange(10.0)  # 4 + 2 + 4 answer tokens
parts = losses_by_task(losses, labels, ["st", "asr", "st"])
total = sum(len(part) for part in parts.values())
assert total == 10, (
    f"there are 10 losses, you return {total}: the end token has a loss, too"
)
sizes = len(parts["st"]), len(parts["asr"])
assert sizes == (8, 2), (
    f"st has 8 and asr has 2 losses, not {sizes}: count the labels of each row"
)
assert parts["asr"].tolist() == [4.0, 5.0], (
    f"asr has losses 4 and 5, not {parts['asr'].tolist()}"
)
print("ok: each loss belongs to its row")


# %% tags=["wrong"] expects="the end token has a loss, too"
def losses_by_task(losses, labels, tasks):
    sizes = ((labels != IGNORE) & (labels != end)).sum(dim=1).tolist()
    parts, start = {"st": [], "asr": []}, 0
    for size, task in zip(sizes, tasks):
        parts[task].append(losses[start : start + size])
        start += size
    return {task: torch.cat(rows) for task, rows in parts.items()}


# %% tags=["wrong"] expects="count the labels of each row"
def losses_by_task(losses, labels, tasks):
    parts = {"st": [], "asr": []}
    for row_losses, task in zip(losses.tensor_split(len(tasks)), tasks):
        parts[task].append(row_losses)
    return {task: torch.cat(rows) for task, rows in parts.items()}


# %% tags=["wrong"] expects="asr has losses 4 and 5"
def losses_by_task(losses, labels, tasks):
    sizes = (labels != IGNORE).sum(dim=1)
    n = {
        task: sum(s for s, t in zip(sizes.tolist(), tasks) if t == task)
        for task in ("st", "asr")
    }
    return {"asr": losses[: n["asr"]], "st": losses[n["asr"] :]}


# %% [markdown]
# ## 6.4 Your training loop
# The loop uses your three functions. AdamW turns gradients into changes of the weights.
# Clipping scales a gradient down if its norm is more than 1, so one strange batch cannot do
# much damage.
#
# **Predict, then run.** The vocabulary has 1,300 tokens. A model that knows nothing has the
# loss log(1300) = 7.2. What is the loss of our first batch, before any training?

# %% tags=["guess"]
first_loss = 7.2  # ← your guess

# %% tags=["slow"]
GROUPS = {"projector": "projector", "LoRA of the LLM": "lora"}


def norms_of(model):
    """The norm of the gradient of each trained part."""
    norms = {}
    for group, mark in GROUPS.items():
        grads = [
            p.grad
            for name, p in model.named_parameters()
            if mark in name and p.grad is not None
        ]
        norms[group] = math.sqrt(sum(grad.square().sum().item() for grad in grads))
    return norms


def train(model, settings, n_steps=None, change=lambda batch: batch, sample_every=None):
    """Train with your functions. Return one dictionary per step."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, betas=settings.betas, weight_decay=0.0)
    batches, log = make_batches(model, rows, settings), []
    groups = [group for epoch in range(settings.epochs) for group in batches.groups(epoch)]
    groups = groups[:n_steps]
    n_warmup = max(1, round(settings.warmup * len(groups)))
    step_losses = []

    def losses_of(batch):
        step_losses.append(model(batch))
        return step_losses[-1]

    model.train()
    for step, group in enumerate(groups, start=1):
        batch = change(batches.load(group))
        add_gradients(losses_of, [batch], [(batch.labels != IGNORE).sum().item()])
        line = norms_of(model)
        torch.nn.utils.clip_grad_norm_(trained, settings.clip_norm)
        optimizer.param_groups[0]["lr"] = settings.lr * share_of_peak(
            step, len(groups), n_warmup
        )
        optimizer.step()
        optimizer.zero_grad()
        tasks = [example.task for example in batch.examples]
        losses = step_losses.pop().detach()
        parts = losses_by_task(losses, batch.labels, tasks)
        line |= {task: part.mean().item() for task, part in parts.items() if len(part)}
        log.append(line | {"loss": losses.mean().item()})
        if sample_every and step % sample_every == 1:
            [result] = translate(model, [dev_rows[0].path], search=SearchOptions(1))
            model.train()
            print(f"step {step:3}  {result.text}")
    return log


print(f"reference {dev_rows[0].translation}")
model = new_model()
log = train(model, settings, sample_every=40)
reveal(
    "first loss",
    first_loss,
    f"{log[0]['loss']:.2f}",
    "the LLM knows the phrases, not the speech",
)


# %% tags=["slow"]
def smooth(values, width=8):
    """The mean of the last `width` values."""
    return [
        sum(values[max(0, i - width) : i]) / min(i, width)
        for i in range(1, len(values) + 1)
    ]


fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 3))
for task, label, colour in (("st", "translate", BLUE), ("asr", "transcribe", ORANGE)):
    values = [line[task] for line in log if task in line]
    left.plot(smooth(values), color=colour, label=label)
left.set(xlabel="step", ylabel="loss of an answer token (nats)", ylim=(0, None))
left.legend()
for group, colour in zip(GROUPS, (GREEN, RED)):
    right.plot(smooth([line[group] for line in log]), color=colour, label=group)
right.axhline(1, color=GREY, lw=1, ls="--", label="clipped above this norm")
right.set(xlabel="step", ylabel="norm of the gradient", yscale="log")
right.legend()
plt.show()

# %% [markdown]
# The loss falls fast at first: the model learns how the answers look. Read the samples of
# these steps. They are good English, but they are about something else. Then the loss falls
# slowly: the projector finds out what the states mean.
#
# Does the library's loop do the same? It gets the same batches and the same seed. The
# largest difference of the losses of the first steps:

# %% tags=["slow"]
few_rows = replace(settings, epochs=1)
model, library = new_model(), []
batches = make_batches(model, rows[:80], few_rows)
train_epochs(
    model, batches, few_rows, lambda step: library.append(step.losses.mean().item())
)
all_rows, rows = rows, rows[:80]
yours = [line["loss"] for line in train(new_model(), few_rows)]
rows = all_rows
print(f"{len(yours)} steps:", max(abs(a - b) for a, b in zip(yours, library)))

# %% [markdown]
# ## 6.5 Does transcription help?
# The paper says: learning to transcribe, too, makes the translation better. Compare at
# *equal steps*: once each clip is translated and transcribed, once each clip is translated
# twice as often.
#
# **Predict, then run.** Which one has the lower loss on the translations of the dev clips:
# "both" or "translation"?

# %% tags=["guess"]
better = "both"  # ← your guess


# %% tags=["slow"]
@torch.inference_mode()
def dev_loss(model):
    batches = make_batches(model.eval(), dev_rows, replace(settings, asr=0.0))
    return (
        torch.cat([model(batches.load(group)) for group in batches.groups(0)]).mean().item()
    )


results, n_steps = {"both": [], "translation": []}, 60
for seed in (0, 1):
    for name, change in (("both", {}), ("translation", {"asr": 0.0, "epochs": 4})):
        model = new_model(seed)
        train(model, replace(settings, **change), n_steps)
        results[name].append(dev_loss(model))
        print(f"{name:12} seed {seed}: dev loss {results[name][-1]:.3f}")
best = min(results, key=lambda name: sum(results[name]))
reveal("lower mean loss", better, best, "two seeds and one short training: not a proof")

# %% [markdown]
# ## 6.6 Break it: which mistake is it?
# Four trainings with one mistake each, in random order:
#
# * **rate**: the learning rate is 100 times too high;
# * **projector**: the projector is not trained;
# * **shift**: the labels are not shifted, so each position must predict its own token;
# * **speech**: each text gets the speech of another clip.
#
# First run the next cell and look at the figure. The grey line is the training without a
# mistake. Above the figure you read the translation of a dev clip after each training. Then
# write down which panel shows which mistake, and run the last cell. One of them is hard to
# see.


# %% tags=["slow"]
def without_shift(batch):
    """LLaST.forward moves the labels to the left, so first move them to the right."""
    labels = batch.labels.roll(1, dims=1)
    is_inside = torch.arange(labels.shape[1]) < batch.lengths[:, None]
    is_inside[:, 0] = False
    batch.labels = labels.where(is_inside, IGNORE)
    return batch


def other_speech(batch):
    half = len(batch.audio) // 2  # neighbours can be two examples of one clip
    batch.audio = batch.audio[half:] + batch.audio[:half]
    return batch


def broken(mistake, n_steps=40):
    model, changed = new_model(), settings
    if mistake == "rate":
        changed = replace(settings, lr=100 * settings.lr)
    if mistake == "projector":
        model.projector.requires_grad_(False)
    change = {"shift": without_shift, "speech": other_speech}.get(
        mistake, lambda batch: batch
    )
    mistake_log = train(model, changed, n_steps, change)
    [result] = translate(model, [dev_rows[1].path], search=SearchOptions(1, 1.0, 24))
    return mistake_log, result.text


mistakes = ["rate", "projector", "shift", "speech"]
random.Random(3).shuffle(mistakes)
runs = [broken(mistake) for mistake in mistakes]
fig, axes = plt.subplots(2, 4, figsize=(9.5, 4.6), sharex=True, sharey="row")
print("reference:", dev_rows[1].translation)
for number, (top, bottom, (mistake_log, text)) in enumerate(zip(*axes, runs), start=1):
    print(f"panel {number}:  ", text)
    top.plot(smooth([line["loss"] for line in log[:40]]), color=GREY)
    top.plot(smooth([line["loss"] for line in mistake_log]), color=BLUE)
    top.set_title(f"panel {number}")
    for group, colour in zip(GROUPS, (GREEN, RED)):
        norms = [line[group] or math.nan for line in mistake_log]
        bottom.plot(smooth(norms), color=colour, label=group)
    bottom.set(xlabel="step", yscale="log")
axes[0, 0].set(ylabel="loss (nats)", yscale="log")
axes[1, 0].set_ylabel("norm of the gradient")
axes[1, 0].legend(fontsize=8)
plt.show()

# %% tags=["guess"]
panel_1 = "rate"  # ← your guess
panel_2 = "projector"  # ← your guess
panel_3 = "shift"  # ← your guess
panel_4 = "speech"  # ← your guess

# %% tags=["slow"]
reasons = {
    "rate": "the loss jumps up in the first steps",
    "projector": "its gradient is missing",
    "shift": "the loss stays high: the LLM can predict the next token, not its own",
    "speech": "it looks healthy: so early, a good model does not use the speech, either",
}
for number, (guess, mistake) in enumerate(
    zip((panel_1, panel_2, panel_3, panel_4), mistakes), start=1
):
    reveal(f"panel {number}", guess, mistake, reasons[mistake])

# %% [markdown]
# ## Recap
# * The learning rate rises and falls. No step has the learning rate 0.
# * Several batches in one step: every token counts the same, however the batches are cut.
# * A curve says little without translations to read. In the first steps the loss falls
#   because the LLM learns the form of the answers. So a model with the wrong speech has the
#   same curve.
# * The gradient norm of each part shows what is trained.
#
# **Read next:** `train_epochs` in `train.py`, and `group` in `data.py`.
#
# **Open question:** the norm of the projector's gradient is larger than that of the LoRA.
# Does this show that the projector learns more? AdamW divides each gradient by its usual
# size. Which experiment would answer the question?
