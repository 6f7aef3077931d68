# %% [markdown]
# # The claims of the paper, measured with the included models
#
# `runs.py` trains all models of this page and writes one line per run to `results.jsonl`.
# This page only draws the lines of that file. Every figure has a dot for each seed, a thin
# line for its 95 % interval over the test clips, and a short bar for the mean of the seeds.
# Look at both: the interval says how much the choice of the test clips matters, the
# distance between the dots says how much the random seed matters.
#
# All this is measured on a phrasebook that a computer speaks, with a small encoder and a
# very small LLM. It can show how a claim is tested. It cannot confirm a claim for the
# models of the paper. So below each figure there is the command for CoVoST-2 with public
# weights. The paper measures these comparisons, too, but we could not read its tables, so
# we print no number of them. Known is the result of the complete method: BLEU 41.2 for
# LLaST-2B, French to English (as printed in the later paper PLaST).
#
# To repeat the runs: `python notebooks/experiments/runs.py`. To build this page again:
# `python notebooks/build.py --report`.

# %% tags=["setup"]
import re
import sys

import matplotlib.pyplot as plt

sys.path[:0] = [".", "..", "../.."]  # the folders of runs.py, course.py and the library
from course import BLUE, GREY, ORANGE, RED  # noqa: E402
from runs import RUNS, read_results  # noqa: E402

lines = [line for line in read_results() if line["name"] in RUNS]
by_name = {name: [line for line in lines if line["name"] == name] for name in RUNS}
by_name = {name: runs for name, runs in by_name.items() if runs}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


def bleu_of(line):
    return line["test"]["fr-en"]["bleu"]


# %% [markdown]
# ## The runs
# BLEU and its range are those of the 200 French test clips. The loss is that of an answer
# token of the dev clips.

# %%
layout = "{:18}{:>6}{:>7}{:>11}{:>9}{:>8}{:>14}{:>8}  {}"
print(
    layout.format(
        "run", "seeds", "steps", "trained", "seconds", "BLEU", "lowest-highest", "loss", "device"
    )
)
for name, runs in by_name.items():
    scores = [bleu_of(line) for line in runs]
    seconds = f"{mean(line['seconds'] for line in runs):.0f}"
    loss = f"{mean(line['dev_loss'] for line in runs):.3f}"
    numbers = len(runs), runs[0]["steps"], f"{runs[0]['trained_parameters']:,}", seconds
    span = f"{min(scores):.1f}-{max(scores):.1f}"
    devices = ", ".join(sorted({line["device"]["device"] for line in runs}))
    print(layout.format(name, *numbers, f"{mean(scores):.1f}", span, loss, devices))
hours = sum(line["seconds"] for line in lines) / 3600
print(f"\n{len(lines)} runs, {hours:.1f} hours in all if they run one after the other")
for name in by_name:
    print(f"{name:18} python train.py {RUNS[name]}")


# %%
def draw(names, labels=None):
    """One row per run: BLEU on the left, loss on the right, a dot for each seed."""
    names = [name for name in names if name in by_name]
    if not names:
        print("not measured yet")
        return
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 0.9 + 0.45 * len(names)), sharey=True)
    for y, name in enumerate(names):
        for i, line in enumerate(by_name[name]):
            height = y + 0.16 * (i - (len(by_name[name]) - 1) / 2)
            interval = line["test"]["fr-en"]["bleu_interval"]
            axes[0].plot(interval, [height, height], color=GREY, lw=1)
            axes[0].plot(bleu_of(line), height, "o", color=BLUE, ms=5)
            axes[1].plot(line["dev_loss"], height, "o", color=BLUE, ms=5)
        for ax, values in (
            (axes[0], map(bleu_of, by_name[name])),
            (axes[1], (x["dev_loss"] for x in by_name[name])),
        ):
            ax.plot([mean(values)] * 2, [y - 0.3, y + 0.3], color=RED, lw=2)
    axes[0].set_yticks(range(len(names)), [(labels or {}).get(name, name) for name in names])
    axes[0].set(xlabel="test BLEU, French to English", ylim=(len(names) - 0.5, -0.5))
    axes[1].set(xlabel="dev loss of an answer token (nats)")
    plt.show()


def conclude(verdict, sentence):
    """Print a sentence that was written by hand. Its numbers "NAME 12.3" must be in the file."""
    for name, number in re.findall(r"([a-z0-9-]+) (\d+\.\d)\b", sentence):
        measured = f"{mean(map(bleu_of, by_name[name])):.1f}"
        assert measured == number, f"the text says {name} {number}, the file has {measured}"
    print(f"{verdict.upper()}: {sentence}")


# %% [markdown]
# ## (a) LoRA in no model, in the LLM, in the encoder, in both
# **The paper:** one LoRA is much better than none, and LoRA in both models is better than
# in one.
#
# On CoVoST-2: `python train.py --preset llast-2b --lang fr --data corpus`, and the same
# with `--llm-rank 0`, `--encoder-rank 0`, or both.

# %%
draw(
    ("none", "l-lora", "s-lora", "dual"),
    {"none": "none", "l-lora": "LLM", "s-lora": "encoder", "dual": "both"},
)

# %% [markdown]
# ## (b) Learning to transcribe, too
# **The paper:** transcription examples (ASR) improve the translation. Both runs have
# equally many steps: without transcription, the clips are translated in two passes,
# with transcription there is one pass.
#
# On CoVoST-2: `python train.py --preset llast-2b --lang fr --data corpus`, and the same
# with `--asr 0 --epochs 2`.

# %%
draw(("asr-0", "asr-1"), {"asr-0": "only translation", "asr-1": "and transcription"})

# %% [markdown]
# Is the training stable? The curves show the loss of the training batches and the norm of
# the gradient before clipping, one line per seed.


# %%
def draw_curves(styles):
    """Loss and norm of the gradient; styles: {name: (label, colour)}."""
    fig, axes = plt.subplots(1, 2, figsize=(9.5, 2.8))
    for name, (label, colour) in styles.items():
        for i, line in enumerate(by_name[name]):
            for ax, key in zip(axes, ("losses", "grad_norms")):
                share = [100 * (k + 0.5) / len(line[key]) for k in range(len(line[key]))]
                ax.plot(share, line[key], color=colour, lw=1, label=None if i else label)
    for ax, label in zip(axes, ("loss of an answer token (nats)", "norm of the gradient")):
        ax.set(xlabel="share of the training (%)", ylabel=label, yscale="log")
    axes[0].legend()
    plt.show()


if {"asr-0", "asr-1"} <= set(by_name):
    draw_curves({"asr-0": ("only translation", ORANGE), "asr-1": ("and transcription", BLUE)})
else:
    print("not measured yet")

# %% [markdown]
# ## (c) One language or three
# **The paper:** training on several languages improves each of them. The run with three
# languages sees the same French clips, and also the German and the Spanish ones, so it
# takes longer.
#
# On CoVoST-2: `python train.py --preset llast-2b --lang fr --data corpus`, and the same
# with `--lang paper`.

# %%
draw(
    ("asr-1", "three-languages"), {"asr-1": "French", "three-languages": "French, German, Spanish"}
)
