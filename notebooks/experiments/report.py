# %% [markdown]
# # The claims of the paper, measured with the included models
#
# `runs.py` trains all models of this page and writes one line per run to `results.jsonl`.
# This page only draws the lines of that file. In every figure, a dot is a seed, the wide
# bar is the range of the seeds, and the short upright line is their mean. The thin line
# through a dot is the 95 % interval over the test clips. Look at both: the interval says
# how much the choice of the test clips matters, the range says how much the random seed
# matters. Below a figure, HOLDS means that the numbers agree with the claim, NOT SEEN that
# they do not show it, and AGAINST that they show the opposite. ANSWER is the answer to a
# question that the paper leaves open.
#
# All this is measured on a phrasebook that a computer speaks, with a small encoder and a
# very small LLM. It can show how a claim is tested. It cannot confirm a claim for the
# models of the paper. So below each figure there is the command for CoVoST-2 with public
# weights. Give each run its own folder, for example `--out runs/none`. Only the result of
# the complete method is known to us: BLEU 41.2 for LLaST-2B, French to English (as printed
# in the later paper PLaST). It has both LoRAs, learns to transcribe, and is trained on nine
# directions. The paper measures several of these comparisons, too, but we could not read
# its tables, so we print no number of them.
#
# A run that has a line in `results.jsonl` is skipped. To repeat it, delete its lines, then:
# `python notebooks/experiments/runs.py --only NAME`. The runs of (h) and (i) need the
# models of the run "dual", which are not in the repository, so repeat this run, too. To
# build this page again: `python notebooks/build.py --report`.

# %% tags=["setup"]
import re
import sys

import matplotlib.pyplot as plt

sys.path[:0] = [".", "..", "../.."]  # the folders of runs.py, course.py and the library
from course import BLUE, GREY, ORANGE, RED, SKY  # noqa: E402
from runs import RUNS, command_of, read_results, settings_of  # noqa: E402

lines = [line for line in read_results() if line["name"] in RUNS]
by_name = {name: [line for line in lines if line["name"] == name] for name in RUNS}
by_name = {name: runs for name, runs in by_name.items() if runs}


def mean(values):
    values = list(values)
    return sum(values) / len(values)


# %% [markdown]
# ## The runs
# The seconds are those of the whole run, with its scores. Compare them only in (e)
# and (h): the other runs had one or two threads and shared the processor. Add `--seed 1`
# and another `--out` to a command for another seed.

# %%
layout = "{:18}{:>6}{:>7}{:>11}{:>9}  {}"
print(layout.format("run", "seeds", "steps", "trained", "seconds", "device"))
for name, runs in by_name.items():
    steps, trained = runs[0].get("steps", 0), runs[0].get("trained_parameters", 0)
    seconds = f"{mean(line['seconds'] for line in runs):.0f}"
    devices = ", ".join(sorted({line["device"]["device"] for line in runs}))
    print(layout.format(name, len(runs), steps, f"{trained:,}", seconds, devices))
# Most runs had one thread, and two of them ran side by side.
threads = [int(line["device"].get("OMP_NUM_THREADS") or 2) for line in lines]
hours = sum(line["seconds"] * n for line, n in zip(lines, threads)) / 2 / 3600
print(f"\n{len(lines)} runs, {hours:.1f} hours on two cores")
for name in RUNS:
    print(f"{name:18} python {' '.join(command_of(name, 0))}")


# %%
def bleu_of(line, test="fr-en"):
    return line["test"][test]["bleu"]


def loss_of(line):
    return line["dev_loss"]


# A panel: label of its axis, value of a line, its 95 % interval or None, format of a number.
BLEU = ("test BLEU", bleu_of, lambda line: line["test"]["fr-en"]["bleu_interval"], ".1f")
LOSS = ("dev loss of an answer token (nats)", loss_of, None, ".3f")
SECONDS = ("seconds of the whole run", lambda line: line["seconds"], None, ".0f")


def draw(labels, panels=(BLEU, LOSS)):
    """One row per run, in each panel. labels: {name of a run: words in the figure}."""
    names = [name for name in labels if name in by_name]
    if missing := [name for name in labels if name not in by_name]:
        print("not measured yet:", ", ".join(missing))
    if not names:
        return
    size = 10, 0.9 + 0.45 * len(names)
    fig, axes = plt.subplots(1, len(panels), figsize=size, sharey=True, squeeze=False)
    numbers = {name: [] for name in names}
    for ax, (label, value, interval, form) in zip(axes[0], panels):
        for y, name in enumerate(names):
            values = [value(line) for line in by_name[name]]
            low, high = min(values), max(values)
            ax.plot([low, high], [y, y], color=SKY, alpha=0.4, lw=14, solid_capstyle="butt")
            ax.plot([mean(values)] * 2, [y - 0.3, y + 0.3], color=RED, lw=2)
            for i, line in enumerate(by_name[name]):
                height = y + 0.16 * (i - (len(values) - 1) / 2)
                if interval:
                    ax.plot(interval(line), [height, height], color=GREY, lw=1)
                ax.plot(values[i], height, "o", color=BLUE, ms=5)
            text = f"{mean(values):{form}} ({low:{form}} to {high:{form}})"
            numbers[name].append(f"{label.split(' (')[0]} {text}")
        ax.set(xlabel=label)
        if label.startswith(("seconds", "memory")):  # costs are compared with 0
            ax.set_xlim(0, 1.1 * ax.get_xlim()[1])
    axes[0][0].set_yticks(range(len(names)), [labels[name] for name in names])
    axes[0][0].set(ylim=(len(names) - 0.5, -0.5))
    plt.show()
    for name in names:
        print(f"{name}: {'; '.join(numbers[name])}")


def conclude(verdict="", sentence="", value=bleu_of):
    """Print a sentence that was written by hand. Its numbers must be means in the file.

    "dual 86.7" is a BLEU score, or what `value` gives; "dual 0.123" is a dev loss.
    """
    numbers = re.findall(r"([a-z0-9-]+) (\d+\.\d+)", sentence)
    unknown = [name for name, _ in numbers if name not in RUNS]
    assert not unknown, f"write each number as NAME 12.3, with a name of runs.py, not {unknown}"
    if not sentence or any(name not in by_name for name, _ in numbers):
        print("not measured yet" if sentence else "the conclusion is not written yet")
        return
    assert verdict in ("holds", "not seen", "against", "answer"), f"unknown verdict: {verdict}"
    assert len(numbers) == len(re.findall(r"\d+\.\d", sentence)), "a number has no name"
    for name, number in numbers:
        value_of, form = (value, ".1f") if len(number.split(".")[1]) == 1 else (loss_of, ".3f")
        measured = f"{mean(map(value_of, by_name[name])):{form}}"
        assert measured == number, f"the text says {name} {number}, the file has {measured}"
    print(f"{verdict.upper()}: {sentence}")


# %% [markdown]
# ## (a) LoRA in no model, in the LLM, in the encoder, in both
# **The paper:** one LoRA is much better than none, and LoRA in both models is better than
# in one. Rows with the same number of clips have nearly the same number of steps.

# %%
places = {"none": "no LoRA", "l-lora": "in the LLM", "s-lora": "in the encoder", "dual": "in both"}
half = {f"{name}-half": f"{words}, half of the clips" for name, words in places.items()}
draw(half | places)

# %%
conclude(
    "holds",
    "A LoRA in the encoder is much better than none (s-lora 90.9, none 64.3; with half of the "
    "clips s-lora-half 60.0, none-half 42.4).",
)
conclude(
    "not seen",
    "A LoRA in the LLM is not much better than none: a little with all clips (l-lora 68.7, none "
    "64.3), not at all with half of them (l-lora-half 42.5, none-half 42.4).",
)
conclude(
    "not seen",
    "A LoRA in both models is not better than only in the encoder (dual 88.4, s-lora 90.9; with "
    "half of the clips dual-half 55.3, s-lora-half 60.0).",
)

# %% [markdown]
# On CoVoST-2: `python train.py --preset llast-2b --lang fr --data corpus`, and the same
# with `--llm-rank 0`, `--encoder-rank 0`, or both; for half of the clips
# `--clips 103687`. Published: 41.2 for both LoRAs in the complete method.

# %% [markdown]
# ## (b) Learning to transcribe, too
# **The paper:** transcription examples (ASR) improve the translation. The first two rows
# have equally many steps: two passes with only translations, or one pass in which every
# clip is also transcribed. The other rows have two passes, so all of them have the same
# translation examples, but more transcripts also mean more steps.


# %%
def share_of_transcripts(*names):
    return {name: f"{100 * settings_of(name)['asr']:.0f} % of the clips" for name in names}


one_pass = {"asr-1": "100 % of the clips, one pass"}
draw(share_of_transcripts("asr-0") | one_pass | share_of_transcripts("asr-half", "dual"))

# %%
conclude(
    "not seen",
    "At equal steps, transcription does not help (asr-1 59.6, asr-0 65.9). With two passes over "
    "the clips, the scores are higher (asr-half 77.9, dual 88.4), but these runs have more steps.",
)

# %% [markdown]
# Is the training stable? The curves show the loss of the training batches and the norm of
# the gradient before clipping, one line per seed. A transcript has another loss than a
# translation. So compare the shape of the curves, not their height.


# %%
def draw_curves(labels):
    """Loss and norm of the gradient of runs. labels: {name: words in the legend}."""
    if missing := [name for name in labels if name not in by_name]:
        print("not measured yet:", ", ".join(missing))
        return
    fig, axes = plt.subplots(1, 2, figsize=(10, 3))
    for (name, label), colour in zip(labels.items(), (ORANGE, GREY, BLUE)):
        for i, line in enumerate(by_name[name]):
            for ax, key in zip(axes, ("losses", "grad_norms")):
                share = [100 * (k + 0.5) / len(line[key]) for k in range(len(line[key]))]
                ax.plot(share, line[key], color=colour, lw=1, label=None if i else label)
    for ax, label in zip(axes, ("loss of an answer token (nats)", "norm of the gradient")):
        ax.set(xlabel="share of the training (%)", ylabel=label, yscale="log")
    axes[0].legend(title="transcripts of")
    plt.show()


draw_curves(share_of_transcripts("asr-0", "asr-half", "dual"))

# %% [markdown]
# No curve jumps: these trainings are stable, with transcripts and without.
#
# On CoVoST-2: `python train.py --preset llast-2b --lang fr --data corpus`, and the same
# with `--asr 0 --epochs 2` for as many steps, or with `--asr 0` and `--asr 0.5`.
# Published: 41.2 with a transcript of every clip, in the complete method.

# %% [markdown]
# ## (c) One language or three
# **The paper:** it trains one model on several languages to improve the translation. The
# last row sees the same French clips as the row before, and also the German and Spanish
# ones, so it takes longer. The first row sees half of the French clips, but twice.

# %%
draw({
    "dual-half": "half of the French clips, two passes",
    "asr-1": "French, one pass",
    "three-languages": "French, German, Spanish, one pass",
})  # fmt: skip

# %%
conclude(
    "not seen",
    "With German and Spanish clips in the training, French is not better "
    "(three-languages 59.7, asr-1 59.6). Half of the French clips, twice, gave dual-half 55.3.",
)

# %% [markdown]
# On CoVoST-2: `python train.py --preset llast-2b --lang fr --data corpus`, and the same
# with `--lang paper`. Published: 41.2 with the nine directions of `--lang paper`.

# %% [markdown]
# ## (d) The rank of the LoRAs
# **The paper** uses rank 128 in the encoder and 512 in the LLM. We do not know whether it
# compares ranks. Here both LoRAs have the same rank. The learning rate and alpha / rank
# are those of the preset in all rows. This does not make the ranks fully comparable: in a
# step, AdamW changes each number of A and B by about the learning rate, and a higher rank
# has more numbers, so its LoRA also changes the layer faster.

# %%
ranks = ("rank-1", "rank-4", "dual", "rank-64")
draw({name: f"rank {settings_of(name)['llm_rank']}" for name in ranks})

# %%
conclude(
    "answer",
    "From rank 1 to 16, the rank matters little: rank-1 87.4, rank-4 90.2, dual 88.4 (its rank is "
    "16). At this learning rate the highest one learns worse: rank-64 80.3.",
)

# %% [markdown]
# On CoVoST-2: `python train.py --preset llast-2b --lang fr --data corpus`, and the same
# with `--encoder-rank 16 --llm-rank 16`. Published: 41.2 with ranks 128 and 512.

# %% [markdown]
# ## (e) A window of 30 s, or the length of the clip
# **The original code** pads every clip to 30 s, as in Whisper's training. The preset does
# not pad. One pass over 400 clips, one seed.

# %%
draw({"window-clip": "length of the clip", "window-30s": "30 s"}, (BLEU, LOSS, SECONDS))

# %%
conclude(
    "answer",
    "After this short training both scores are low and near each other (window-clip 23.6, "
    "window-30s 20.8; with one seed, this can be chance). With 30 s, the run takes more than ten "
    "times as long.",
)

# %% [markdown]
# On CoVoST-2: `python train.py --preset llast-2b --lang fr --data corpus`, and the same
# with `--window clip`. Published: 41.2 with 30 s.

# %% [markdown]
# ## (f) The amount of training data
# Two passes over all clips, half of them, or a quarter. Fewer clips also mean fewer steps.

# %%
draw({"dual-quarter": "340 clips", "dual-half": "680 clips", "dual": "1,360 clips"})

# %%
conclude(
    "answer",
    "With more clips, and so more steps, the scores are much higher: dual-quarter 36.0, dual-half "
    "55.3, dual 88.4. Most of this comes from the steps: with as many steps as dual-half 55.3, one "
    "pass over all clips gives asr-1 59.6.",
)

# %% [markdown]
# On CoVoST-2: `python train.py --preset llast-2b --lang fr --data corpus`, and the same
# with `--clips 103687` and `--clips 51843`. Published: 41.2 with all clips.

# %% [markdown]
# ## (g) Languages without writing
# **Open in the paper:** a language without writing has translations, but no transcripts.
# How much is lost without them, and how much do a few of them help? All rows have two
# passes, so more transcripts also mean more steps.

# %%
draw(share_of_transcripts("asr-0", "asr-tenth", "asr-half", "dual"))

# %%
conclude(
    "answer",
    "A language can be translated without any transcript, but the score is lower (asr-0 65.9). "
    "With transcripts of a tenth of the clips it is hardly higher (asr-tenth 68.4), with half "
    "much higher (asr-half 77.9), with all highest (dual 88.4). But more transcripts also "
    "mean more steps. At equal steps, (b) shows no gain.",
)

# %% [markdown]
# On CoVoST-2: `python train.py --preset llast-2b --lang fr --data corpus`, and the same
# with `--asr 0`, `--asr 0.1` and `--asr 0.5`. Published: 41.2 with all transcripts.

# %% [markdown]
# ## (h) One step or two
# **Open in the paper:** what does a system cost? The models of the run "dual" translate
# the test clips in one step (end to end), or first transcribe them and then translate the
# transcripts (cascade). The memory is the highest use of the process, with the models.


# %%
def cost_of(key):
    return lambda line: line["cost"][key]


draw(
    {"cascade": "transcribe, then translate", "end-to-end": "translate"},
    (
        BLEU,
        ("seconds for 200 clips", cost_of("seconds"), None, ".1f"),
        ("memory (GB)", cost_of("peak_gb"), None, ".2f"),
    ),
)

# %%
conclude(
    "answer",
    "One step is a little better than two with every seed (end-to-end 88.4, cascade 86.6). It "
    "takes about three quarters of the time, and as much memory.",
)

# %% [markdown]
# On CoVoST-2: `python tools/evaluate.py --model runs/fr --test fr --stats`, and the same
# with `--task cascade`. Published: 41.2 in one step.

# %% [markdown]
# ## (i) New noise: which part adapts?
# The models of the run "dual" have never heard loud noise. Here the training goes on for
# one pass over the French clips with white noise of the same power as the speech, but
# only one part is trained: the LoRA of the encoder, the LoRA of the LLM, or the projector.
# The learning rate rises and falls again, as in a new training. Which part helps
# most with noise, and do the scores of clips without noise fall?

# %%
parts = {
    "noise-before": "before",
    "noise-llm": "LoRA of the LLM",
    "noise-projector": "projector",
    "noise-encoder": "LoRA of the encoder",
    "noise-all": "all three",
}
NOISY = "fr-en with noise"
noise_panel = (
    "test BLEU with noise",
    lambda line: bleu_of(line, NOISY),
    lambda line: line["test"][NOISY]["bleu_interval"],
    ".1f",
)
noise_loss = ("dev loss with noise (nats)", lambda line: line["dev_loss with noise"], None, ".3f")
draw(parts, (noise_panel, noise_loss))
draw(parts, (("test BLEU without noise", *BLEU[1:]), ("dev loss without noise (nats)", *LOSS[1:])))

# %%
conclude(
    "answer",
    "On noisy clips, training the LoRA of the encoder helps most (noise-before 41.5, noise-llm "
    "52.4, noise-projector 62.1, noise-encoder 74.4). But this LoRA also has about three times as "
    "many trained numbers as each of the other two parts. Training all three gives little more "
    "(noise-all 76.4).",
    value=lambda line: bleu_of(line, NOISY),
)
conclude(
    "answer",
    "On clips without noise, the scores fall only a little: noise-before 88.4, noise-encoder 87.0, "
    "noise-llm 85.8, noise-projector 85.7, noise-all 84.6. The seeds overlap, so this does not "
    "show which part forgets least.",
)

# %% [markdown]
# On CoVoST-2, with a trained model in `runs/fr`: `python notebooks/experiments/after.py
# noise-encoder runs/fr --preset llast-2b --lang fr --data corpus --asr 0 --out runs/noise`.
# We know no published number.

# %% [markdown]
# ## (j) A smaller encoder
# **Open in the paper:** what is the best balance of encoder and LLM? Here the encoder has
# only its first layers. The layers that are left expect more layers after them, so their
# LoRA must also make up for the missing ones.

# %%
draw({"layers-2": "2 layers", "layers-4": "4 layers", "dual": "6 layers"})

# %%
conclude(
    "answer",
    "A smaller encoder is much worse: layers-2 40.9, layers-4 74.0, all six layers dual 88.4. The "
    "LoRA did not make up for the missing layers in two passes.",
)

# %% [markdown]
# On CoVoST-2: `python train.py --preset llast-2b --lang fr --data corpus`, and the same
# with other encoders, such as `--encoder weights/whisper-small`. Published: 41.2 with
# whisper-large-v2.
