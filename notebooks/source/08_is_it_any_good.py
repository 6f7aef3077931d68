# %% [markdown]
# # 8 · Is it any good? Scores, intervals and fair comparisons
#
# **75 minutes**, of which the computer needs less than 2. This notebook explains `score` in
# `translate.py`. Do notebooks 4 (the prompt) and 7 (beam search) first.
#
# After this notebook you can
# 1. compute BLEU by hand, and say what it does not see;
# 2. give every score an interval, and compare two models on the same clips;
# 3. tell a difference between two trained models from a difference between two methods.
#
# The notebook stops at the first exercise that is not done yet, with `NotImplementedError:
# your turn`. Write your answer in place of this line, run the cell, then run the check
# below it.

# %% tags=["setup"]
import json
import sys
from collections import Counter
from pathlib import Path

import matplotlib.pyplot as plt
import sacrebleu
import torch

sys.path[:0] = ["..", "../.."]  # the folders of course.py and of the library
from course import BLUE, CORPUS, GREY, ORANGE, RED, ROOT, load_trained_model, play, reveal
from data import read_corpus
from lora import lora_layers
from translate import SearchOptions, score, translate
from whisper_encoder import load_audio

torch.set_num_threads(1)  # for such small tensors, more threads are not faster

# %% [markdown]
# ## 8.1 Read before you count
# A tourist asks for the way. The right translation is *Turn left in front of the station.*
# Here are four outputs.
#
# **Predict, then run.** Which one is the most useful for the tourist? Which one gets the
# highest BLEU? Write a letter.

# %% tags=["guess"]
most_useful = "a"  # ← your guess
highest_bleu = "a"  # ← your guess

# %%
reference = "Turn left in front of the station."
outputs = {
    "a": "In front of the station, turn left.",
    "b": "Turn right in front of the station.",
    "c": "Turn left.",
    "d": "Left, at the front of the train station.",
}
scores = {
    name: sacrebleu.sentence_bleu(text, [reference]).score for name, text in outputs.items()
}
for name, text in outputs.items():
    print(f"{name}  BLEU {scores[name]:5.1f}  {text}")
reveal("most useful", most_useful, "a", "all words are right, in another order")
reveal(
    "highest BLEU",
    highest_bleu,
    max(scores, key=scores.get),
    "and the tourist goes the wrong way",
)

# %% [markdown]
# ## 8.2 BLEU by hand (20 minutes)
# An n-gram is a sequence of n words. BLEU asks: how many n-grams of the output are also in
# the reference? It does so for n = 1, 2, 3, 4. Three rules:
#
# 1. **Clipping.** An n-gram counts at most as often as it is in the reference. Otherwise
#    *the the the* would be perfect.
# 2. The four shares are combined by their **geometric mean**, so one share of zero makes
#    BLEU zero.
# 3. **Brevity penalty.** If the outputs have h words, the references r words, and h < r,
#    multiply by exp(1 - r / h).
#
# The counts of all sentences of a test set are **added first**. Then BLEU is computed once.
#
# **Exercise 1.** Write the two steps. `words` splits a text as sacreBLEU does it for most
# languages ("13a").

# %% tags=["exercise"]
words = sacrebleu.BLEU(tokenize="13a").tokenizer


def ngrams(text, n):
    """Count the n-grams of a text."""
    parts = words(text).split()
    return Counter(zip(*(parts[i:] for i in range(n))))


def count_matches(output, reference):
    """-> (10,): matches for n = 1 to 4, n-grams of the output for n = 1 to 4, h, r"""
    matches, totals = [], []
    for n in (1, 2, 3, 4):
        ours, theirs = ngrams(output, n), ngrams(reference, n)
        # BEGIN SOLUTION
        matches.append(sum(min(count, theirs[ngram]) for ngram, count in ours.items()))
        totals.append(ours.total())
        # END SOLUTION
    return torch.tensor(
        [*matches, *totals, totals[0], ngrams(reference, 1).total()]
    ).double()


def bleu(counts):
    """Counts (..., 10), already added -> BLEU between 0 and 100, (...)"""
    matches, totals, h, r = (
        counts[..., :4],
        counts[..., 4:8],
        counts[..., 8],
        counts[..., 9],
    )
    # BEGIN SOLUTION
    mean = (matches / totals).log().mean(dim=-1).exp()
    return 100 * mean * (1 - r / h).clamp(max=0).exp()
    # END SOLUTION


# %% tags=["check"]
matches = count_matches("the the the cat", "the cat sat").tolist()
assert matches[4:8] == [4, 3, 2, 1], f"4, 3, 2, 1 n-grams in 4 words, not {matches[4:8]}"
assert matches[0] != 4, "clip: 'the' is in the reference once, so it counts once"
assert matches[:4] == [2, 1, 0, 0], f"2, 1, 0, 0 matches, not {matches[:4]}"
shares = torch.tensor([9.0, 6, 4, 2, 10, 8, 8, 8])
long, short = (
    torch.cat([shares, torch.tensor(sizes)]) for sizes in ([12.0, 10.0], [10.0, 12.0])
)
factor = (bleu(short) / bleu(long)).item()
assert factor < 1, (
    f"short outputs get {factor:.3g} times the score of long ones: brevity penalty"
)
assert abs(factor - 0.8187) < 1e-3, (
    f"the penalty is exp(1 - r / h) = 0.819; yours: {factor:.3f}"
)
assert abs(bleu(long) - 60) > 0.1, "the arithmetic mean hides a small share: geometric mean"
assert abs(bleu(long) - 53.90) < 0.05, f"expected 53.90, your BLEU is {bleu(long):.2f}"
print("ok: clipped matches, geometric mean, brevity penalty")


# %% tags=["wrong"] expects="clip: 'the'"
def count_matches(output, reference):
    matches, totals = [], []
    for n in (1, 2, 3, 4):
        ours, theirs = ngrams(output, n), ngrams(reference, n)
        matches.append(sum(count for ngram, count in ours.items() if ngram in theirs))
        totals.append(ours.total())
    return torch.tensor(
        [*matches, *totals, totals[0], ngrams(reference, 1).total()]
    ).double()


# %% tags=["wrong"] expects="brevity penalty"
def bleu(counts):
    matches, totals, h, r = (
        counts[..., :4],
        counts[..., 4:8],
        counts[..., 8],
        counts[..., 9],
    )
    mean = (matches / totals).log().mean(dim=-1).exp()
    return 100 * mean * (1 - h / r).clamp(max=0).exp()


# %% tags=["wrong"] expects="geometric mean"
def bleu(counts):
    matches, totals, h, r = (
        counts[..., :4],
        counts[..., 4:8],
        counts[..., 8],
        counts[..., 9],
    )
    return 100 * (matches / totals).mean(dim=-1) * (1 - r / h).clamp(max=0).exp()


# %% tags=["wrong"] expects="exp(1 - r / h)"
def bleu(counts):
    matches, totals, h, r = (
        counts[..., :4],
        counts[..., 4:8],
        counts[..., 8],
        counts[..., 9],
    )
    mean = (matches / totals).log().mean(dim=-1).exp()
    return 100 * mean * (h / r).clamp(max=1)


# %% [markdown]
# ## 8.3 Translate the test clips
# We translate 96 test clips with one beam, once with the whole model and once with the
# LLM's LoRA switched off (notebook 5). Listen to one clip.

# %% tags=["slow"]
model = load_trained_model()
rows = read_corpus(CORPUS, "fr", "en")[0]["test"][:96]
clips = [load_audio(row.path) for row in rows]
references = [row.translation for row in rows]


def texts_of(task):
    return [r.text for r in translate(model, clips, task, search=SearchOptions(1))]


systems = {"whole model": texts_of("st")}
scales = [layer.scale for layer in lora_layers(model.llm)]
for layer in lora_layers(model.llm):
    layer.scale = 0.0
systems["no LoRA in the LLM"] = texts_of("st")
for layer, scale in zip(lora_layers(model.llm), scales):
    layer.scale = scale
print("reference  ", references[1])
for name, texts in systems.items():
    print(name.ljust(20), texts[1])
play(clips[1])

# %% [markdown]
# Your BLEU and the library's, which calls sacreBLEU. sacreBLEU rounds to two digits here.
# The third number is a frequent mistake: the mean of the BLEU of single sentences.


# %% tags=["slow"]
def count_all(texts):
    pairs = zip(texts, references)
    return torch.stack([count_matches(text, reference) for text, reference in pairs])


counts = {name: count_all(texts) for name, texts in systems.items()}  # (sentences, 10)
for name, texts in systems.items():
    library = score(texts, references)["bleu"]
    pairs = zip(texts, references)
    single = [sacrebleu.sentence_bleu(text, [reference]).score for text, reference in pairs]
    yours = bleu(counts[name].sum(dim=0)).item()
    print(f"{name:20} yours {yours:.2f}, library {library:.2f}, ", end="")
    print(f"mean of sentences {sum(single) / len(single):.2f}")

# %% [markdown]
# **The tokenizer is part of the score.** Chinese has no spaces. With the tokenizer "13a" a
# whole sentence is one word. Two scores with different tokenizers cannot be compared. That
# is why the library prints sacreBLEU's *signature*.

# %%
chinese, correct = ["我想要两杯咖啡。"], ["我想要三杯咖啡。"]  # two coffees, three coffees
for tokenizer in ("13a", "zh"):
    metric = sacrebleu.BLEU(tokenize=tokenizer)
    value = metric.corpus_score(chinese, [correct]).score
    print(f"{tokenizer:4} BLEU {value:5.1f}  {metric.get_signature()}")

# %% [markdown]
# ## 8.4 An interval for every score (15 minutes)
# Other test clips would give another BLEU. How different could it be? The **bootstrap**
# answers this without new clips. It draws as many sentences as the test set has, *with
# replacement*, so some sentences come twice and others not at all. Then it computes BLEU.
# The middle 95 % of many such numbers is the interval.
#
# **Exercise 2.** `torch.randint(n, (n,), generator=rng)` draws n sentences.


# %% tags=["exercise"]
def bootstrap(counts, n_draws, rng):
    """counts (n, 10) -> BLEU of each draw, (n_draws,)"""
    # BEGIN SOLUTION
    n = len(counts)
    draws = [
        counts[torch.randint(n, (n,), generator=rng)].sum(dim=0) for _ in range(n_draws)
    ]
    return bleu(torch.stack(draws))
    # END SOLUTION


# %% tags=["check"]
rng = torch.Generator().manual_seed(0)
totals = torch.randint(5, 20, (100, 1), generator=rng).double() - torch.arange(4)
quality = torch.rand(100, 1, generator=rng) * 0.6 + 0.4
lengths = torch.cat([totals[:, :1], totals[:, :1]], dim=1)
example = torch.cat([(totals * quality).round().clamp(min=1), totals, lengths], dim=1)
result, whole = bootstrap(example, 400, rng), bleu(example.sum(dim=0)).item()
assert result.shape == (400,), f"one BLEU for each draw: (400,), not {tuple(result.shape)}"
assert result.std() > 0.1, (
    "all draws are the same: draw with replacement, again for each draw"
)
advice = "add the counts of the drawn sentences, then compute BLEU once"
centre = result.mean().item()
assert abs(centre - whole) < 0.7, (
    f"the mean is {centre:.1f}, but BLEU is {whole:.1f}: {advice}"
)
spread = result.std().item()
assert 1.3 < spread < 2.1, (
    f"the spread is {spread:.2f}: a draw has as many sentences as the set"
)
print("ok: draws with replacement, counts added")


# %% tags=["wrong"] expects="draw with replacement"
def bootstrap(counts, n_draws, rng):
    n = len(counts)
    draws = [counts[torch.randperm(n, generator=rng)].sum(dim=0) for _ in range(n_draws)]
    return bleu(torch.stack(draws))


# %% tags=["wrong"] expects="then compute BLEU once"
def bootstrap(counts, n_draws, rng):
    n = len(counts)
    index = torch.randint(n, (n_draws, n), generator=rng)
    return bleu(counts[index]).mean(dim=1)


# %% tags=["wrong"] expects="as many sentences as the set"
def bootstrap(counts, n_draws, rng):
    n = len(counts)
    draws = [
        counts[torch.randint(n, (n // 4,), generator=rng)].sum(dim=0)
        for _ in range(n_draws)
    ]
    return bleu(torch.stack(draws))


# %% [markdown]
# Your interval, and that of the library. Both are random, and sacreBLEU assumes a symmetric
# interval.


# %% tags=["slow"]
def interval(values):
    return values.quantile(torch.tensor([0.025, 0.975], dtype=values.dtype)).tolist()


rng = torch.Generator().manual_seed(1)
intervals = {name: interval(bootstrap(counts[name], 1000, rng)) for name in systems}
for name, texts in systems.items():
    low, high = intervals[name]
    theirs = score(texts, references, n_bootstrap=1000)["bleu_interval"]
    print(f"{name:20} {low:.1f} to {high:.1f}, library {theirs[0]:.1f} to {theirs[1]:.1f}")

# %% [markdown]
# ## 8.5 Compare two models on the same clips (10 minutes)
# Often two intervals overlap. Does this mean that we cannot say which model is better? No.
# Both models translated the same clips, and a difficult clip is difficult for both. So we
# draw sentences once, and compute both BLEU scores on the *same* draw. This is the
# **paired** bootstrap.
#
# **Exercise 3.** Return BLEU of b minus BLEU of a, for each draw.


# %% tags=["exercise"]
def paired(counts_a, counts_b, n_draws, rng):
    """Two (n, 10) -> differences (n_draws,)"""
    # BEGIN SOLUTION
    n, differences = len(counts_a), []
    for _ in range(n_draws):
        index = torch.randint(n, (n,), generator=rng)
        sums = torch.stack([counts_b[index].sum(dim=0), counts_a[index].sum(dim=0)])
        differences.append(bleu(sums)[0] - bleu(sums)[1])
    return torch.stack(differences)
    # END SOLUTION


# %% tags=["check"]
worse = example.clone()
worse[:30, :4] = (worse[:30, :4] * 0.8).clamp(min=1)
rng = torch.Generator().manual_seed(2)
result = paired(example, worse, 300, rng)
truth = (bleu(worse.sum(dim=0)) - bleu(example.sum(dim=0))).item()
assert result.shape == (300,), (
    f"one difference for each draw: (300,), not {tuple(result.shape)}"
)
assert result.mean() < 0, "b is worse here, so b minus a must be negative"
assert result.std() < 1.5, (
    f"the spread is {result.std():.1f}: use the same draw for both models"
)
centre = result.mean().item()
assert abs(centre - truth) < 0.3, (
    f"the mean is {centre:.2f}, not {truth:.2f}: BLEU b - BLEU a"
)
print("ok: the same sentences for both models")


# %% tags=["wrong"] expects="use the same draw"
def paired(counts_a, counts_b, n_draws, rng):
    return bootstrap(counts_b, n_draws, rng) - bootstrap(counts_a, n_draws, rng)


# %% tags=["wrong"] expects="must be negative"
def paired(counts_a, counts_b, n_draws, rng):
    n, differences = len(counts_a), []
    for _ in range(n_draws):
        index = torch.randint(n, (n,), generator=rng)
        a, b = counts_a[index].sum(dim=0), counts_b[index].sum(dim=0)
        differences.append(bleu(a) - bleu(b))
    return torch.stack(differences)


# %% tags=["wrong"] expects="BLEU b - BLEU a"
def paired(counts_a, counts_b, n_draws, rng):
    n, differences = len(counts_a), []
    for _ in range(n_draws):
        index = torch.randint(n, (n,), generator=rng)
        differences.append((bleu(counts_b[index]) - bleu(counts_a[index])).mean())
    return torch.stack(differences)


# %% [markdown]
# **Predict, then run.** In how many percent of the draws is the model without the LLM's
# LoRA at least as good as the whole model?

# %% tags=["guess"]
percent_not_worse = 30  # ← your guess

# %% tags=["slow"]
whole, without = systems
differences = paired(counts[whole], counts[without], 1000, torch.Generator().manual_seed(3))
reveal("percent", percent_not_worse, f"{100 * (differences >= 0).double().mean():.1f}")

fig, (left, right) = plt.subplots(1, 2, figsize=(9.5, 2.8), width_ratios=(1, 1.2))
for y, (name, colour) in enumerate(zip(systems, (BLUE, ORANGE))):
    left.plot(intervals[name], [y, y], color=colour, lw=3)
    left.plot(bleu(counts[name].sum(dim=0)), y, "o", color=colour, ms=8)
left.set(
    xlabel="BLEU and its 95 % interval", ylim=(-0.5, 1.5), title="each model by itself"
)
left.set_yticks(range(len(systems)), list(systems))
right.hist(differences, bins=30, color=GREY)
right.axvline(0, color=RED, lw=2)
right.set(xlabel="BLEU without - BLEU whole", ylabel="draws", title="on the same clips")
plt.show()

# %% [markdown]
# ## 8.6 What such a test cannot say
# It compares two *trained models*. It says nothing about two *methods*: if you train again
# with another random seed, each method gives another model. The experiments of this course
# train each method with three seeds. The next cell shows their test BLEU (more in
# `experiments/report.ipynb`).

# %%
file = Path(ROOT, "notebooks/experiments/results.jsonl")
lines = (
    [json.loads(line) for line in file.read_text().splitlines()] if file.is_file() else []
)
names = [
    n for n in ("none", "l-lora", "s-lora", "dual") if any(x["name"] == n for x in lines)
]


def draw_seeds(names):
    fig, ax = plt.subplots(figsize=(7, 2.6))
    for y, name in enumerate(names):
        for line in (line for line in lines if line["name"] == name):
            test, height = line["test"]["fr-en"], y + 0.15 * (line["seed"] - 1)
            ax.plot(test["bleu_interval"], [height] * 2, color=GREY, lw=1)
            ax.plot(test["bleu"], height, "o", color=BLUE)
    ax.set_yticks(range(len(names)), names)
    ax.set(xlabel="test BLEU: a dot for each seed, its 95 % interval over the clips")
    ax.set_title("no LoRA, LoRA in the LLM, in the encoder, in both")
    plt.show()


if names:
    draw_seeds(names)
else:
    print("no results yet: run python notebooks/experiments/runs.py")

# %% [markdown]
# ## 8.7 Misheard or mistranslated?
# The model can also write down the French words (task `asr`). So we can ask for each clip:
# are the words right? Is the translation right?
#
# **Predict, then run.** What is more frequent: a wrong translation of correctly transcribed
# words (write "translation"), or wrong words and a wrong translation (write "words")?

# %% tags=["guess"]
frequent = "translation"  # ← your guess

# %% tags=["slow"]
transcripts = texts_of("asr")
words_right = [text == row.sentence for text, row in zip(transcripts, rows)]
all_right = [text == reference for text, reference in zip(systems[whole], references)]
table = Counter(zip(words_right, all_right))
print(f"{'':22}{'translation right':>20}{'translation wrong':>20}")
for is_right, label in ((True, "words right"), (False, "words wrong")):
    print(f"{label:22}{table[is_right, True]:20}{table[is_right, False]:20}")
more_words = table[False, False] > table[True, False]
reveal("more frequent", frequent, "words" if more_words else "translation")
for i in [i for i in range(len(rows)) if not all_right[i]][:3]:
    print(f"\nsaid         {rows[i].sentence}\ntranscribed  {transcripts[i]}")
    print(f"reference    {references[i]}\ntranslated   {systems[whole][i]}")

# %% [markdown]
# Which words are lost? The bars show the ten words that are most often in the reference but
# not in the translation.

# %% tags=["slow"]
lost, all_words = Counter(), Counter()
for text, reference in zip(systems[whole], references):
    lost += ngrams(reference.lower(), 1) - ngrams(text.lower(), 1)
    all_words += ngrams(reference.lower(), 1)
top = [word for word, _ in lost.most_common(10)]
fig, ax = plt.subplots(figsize=(7, 2.6))
bars = ax.bar(range(len(top)), [lost[word] for word in top], color=BLUE)
ax.bar_label(bars, [f"of {all_words[word]}" for word in top], fontsize=8)
ax.set_xticks(range(len(top)), [word[0] for word in top], rotation=20)
ax.set(ylabel="times lost", title="words of the reference that the translations lost")
plt.show()

# %% [markdown]
# Is a word lost every time? That is not chance. How often is it in the training table
# (`CORPUS / "fr" / "fr-en.tsv"`)? What does the model write instead?
#
# ## 8.8 Break it
# Three mistakes of evaluation. Each one runs without an error. (a) One side is in lower
# case. (b) The references are in another order than the outputs. (c) Ten clips that failed
# are left out instead of counted as empty.

# %% tags=["slow"]
texts = systems[whole]
shifted = references[1:] + references[:1]
worst = sorted(range(len(rows)), key=lambda i: bleu(counts[whole][i] + 1e-9))[:10]
kept = [i for i in range(len(rows)) if i not in worst]
print("as it should be      ", score(texts, references)["bleu"])
print("(a) lower case       ", score([text.lower() for text in texts], references)["bleu"])
print("(b) other references ", score(texts, shifted)["bleu"])
print(
    "(c) ten clips missing",
    score([texts[i] for i in kept], [references[i] for i in kept])["bleu"],
)

# %% [markdown]
# Why is (b) not zero? Sentences of a phrasebook share many words: "I would like", "the
# station".
#
# ## 8.9 Compare with a paper
# Before you compare two BLEU scores from two papers, check: the same test clips (also those
# that failed)? The same tokenizer and the same case (the signature)? The same number of
# beams? One seed or several? Which training data?
#
# ## Recap
# * BLEU counts clipped n-grams of the whole test set. It does not know which words matter.
# * The interval over clips says how much the choice of the test clips matters. The paired
#   bootstrap compares two models.
# * Only several seeds can compare two methods.
#
# **Read next:** `score` in `translate.py` and the signature that it returns.
#
# **Closing task (no check).** Change one thing: the noise, the number of beams, the length
# of the training. Before you measure, write down what you expect and why. Measure with an
# interval. Then write five lines: question, method, numbers, answer, and what your numbers
# cannot say.
