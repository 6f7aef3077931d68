# %% [markdown]
# # 7 · Beam search: how the model chooses a sentence
#
# **90 minutes**, of which the computer needs less than 3. This notebook explains
# `beam_search` and `extend` in `translate.py`. Do notebooks 3 (Llama and its cache) and 4
# (the prompt) first.
#
# After this notebook you can
# 1. explain why the best next word can lead to a worse sentence, and look for a clip where
#    this happens;
# 2. write beam search, and prove that it is right on a language that is so small that you
#    can list its sentences;
# 3. measure what five beams cost and what they improve, on clean and on noisy speech.
#
# The notebook stops at the first exercise that is not done yet, with `NotImplementedError:
# your turn`. Write your answer in place of this line, run the cell, then run the check
# below it.

# %% tags=["setup"]
import sys
from itertools import product
from math import exp
from time import process_time

import matplotlib.pyplot as plt
import torch

sys.path[:0] = ["..", "../.."]  # the library, for notebooks/ and for notebooks/solved/
from course import BLUE, CORPUS, ORANGE, draw_tree, load_trained_model, play, reveal
from data import AUDIO_ID, read_corpus
from translate import (
    SearchOptions,
    beam_search,
    end_ids_of,
    extend,
    ids_of_prompt,
    score,
    translate,
)
from whisper_encoder import load_audio

torch.set_num_threads(1)  # more threads are not faster for such small matrices

# %% [markdown]
# ## 7.1 A language with five tokens
# Our first model is a table. Row *a*, column *b* is the probability that token *b* follows
# token *a*. The model sees only the last token. A sentence ends with `</s>`.

# %%
TOKENS = ["</s>", "a", "the", "bus", "boat"]
END, START = 0, 5  # START is the row for the beginning of a sentence
table = torch.tensor([
    # </s>   a     the   bus   boat    the next token
    [1.00, 0.00, 0.00, 0.00, 0.00],  # after </s> nothing follows
    [0.01, 0.02, 0.02, 0.40, 0.55],  # after "a"
    [0.01, 0.01, 0.02, 0.93, 0.03],  # after "the"
    [0.92, 0.02, 0.03, 0.02, 0.01],  # after "bus"
    [0.60, 0.10, 0.10, 0.10, 0.10],  # after "boat"
    [0.01, 0.52, 0.43, 0.02, 0.02],  # at the start
]).clamp(min=1e-9)  # fmt: skip
log_table = table.log()


def words(ids):
    return " ".join(TOKENS[i] for i in ids)


# %% [markdown]
# **Predict, then run.** Greedy search always takes the most probable next token. Which
# sentence does it make? Which sentence is the most probable of all? Use the table and a
# pencil. Write your two answers into the next cell.

# %% tags=["guess"]
greedy_sentence = "a boat"  # ← your guess
best_sentence = "a bus"  # ← your guess


# %%
def sentence_log_prob(ids):
    """Sum of the log-probabilities of all tokens and of the end."""
    path = [START, *ids, END]
    return sum(log_table[a, b].item() for a, b in zip(path, path[1:]))


all_sentences = [
    ids for n in range(7) for ids in product(range(1, 5), repeat=n)
]  # 0 to 6 tokens
ranked = sorted(all_sentences, key=sentence_log_prob, reverse=True)

token, greedy = START, []
while (token := log_table[token].argmax().item()) != END:
    greedy.append(token)
reveal(
    "greedy",
    greedy_sentence,
    words(greedy),
    f"probability {exp(sentence_log_prob(greedy)):.3f}",
)
reveal(
    "best of all",
    best_sentence,
    words(ranked[0]),
    f"probability {exp(sentence_log_prob(ranked[0])):.3f}",
)

# %% [markdown]
# Why do we add log-probabilities and not multiply probabilities? A product of many small
# numbers becomes 0 in floating point. The sum of their logarithms does not, and it has the
# same order. The unit of natural logarithms is the *nat*.
#
# ## 7.2 Extend every beam by every token
# Beam search keeps W unfinished sentences, the *beams*. One step extends every beam by
# every token of the vocabulary V, and keeps the best of all W · V extensions. We keep 2W of
# them. There is one end token, so a beam has one extension that ends. At most W of the 2W
# end, and at least W can continue.
#
# Here is the slow version. It defines the right result. `beam_total[w]` is the
# log-probability of beam w so far, `log_probs[w, v]` that of token v after it. The *parent*
# of an extension is the beam that it extends.


# %%
def extend_slowly(beam_total, log_probs):
    W, V = log_probs.shape
    rows = [
        (beam_total[w].item() + log_probs[w, v].item(), w, v)
        for w in range(W)
        for v in range(V)
    ]
    rows.sort(reverse=True)
    totals, parents, tokens = zip(*rows[: 2 * W])
    return torch.tensor(totals), torch.tensor(parents), torch.tensor(tokens)


# %% [markdown]
# **Exercise 1 (12 minutes).** Write it without a loop. Add, flatten, call `topk`. Then
# compute the parent and the token from each flat index.


# %% tags=["exercise"]
def extend_beams(beam_total, log_probs):
    """beam_total (W,), log_probs (W, V) -> totals, parents, tokens (2W,), best first"""
    # BEGIN SOLUTION
    W, V = log_probs.shape
    totals, index = (beam_total[:, None] + log_probs).flatten().topk(2 * W)
    return totals, index // V, index % V
    # END SOLUTION


# %% tags=["check"]
for seed, (W, V) in enumerate([(1, 5), (3, 7), (4, 11), (2, 30)]):
    rng = torch.Generator().manual_seed(seed)
    beam_total = torch.randn(W, generator=rng)
    log_probs = torch.randn(W, V, generator=rng).log_softmax(-1)
    expected, result = (
        extend_slowly(beam_total, log_probs),
        extend_beams(beam_total, log_probs),
    )
    sizes = [len(part) for part in result]
    assert sizes == [2 * W] * 3, (
        f"each result must have 2W = {2 * W} values, but you return {sizes}"
    )
    sums = (beam_total[:, None] + log_probs).flatten()
    assert torch.isin(result[0], sums).all(), (
        "a total is the sum beam_total + log_probs, nothing else"
    )
    assert set(result[0].tolist()) == set(expected[0].tolist()), (
        "take the best of all beams together"
    )
    assert torch.equal(result[0], expected[0]), "sort the totals: the best one first"
    for name, right, yours in zip(("beam", "token"), expected[1:], result[1:]):
        advice = "a row of the flattened matrix has V values"
        assert torch.equal(right, yours), (
            f"wrong {name}: {yours.tolist()}, not {right.tolist()}; {advice}"
        )
print("ok: the same as the loops, for four sizes")


# %% tags=["wrong"] expects="the best of all beams together"
def extend_beams(beam_total, log_probs):
    best = (beam_total[:, None] + log_probs).topk(2, dim=1)
    order = best.values.flatten().argsort(descending=True)
    return best.values.flatten()[order], order // 2, best.indices.flatten()[order]


# %% tags=["wrong"] expects="the sum beam_total + log_probs"
def extend_beams(beam_total, log_probs):
    W, V = log_probs.shape
    totals, index = (beam_total[:, None] * log_probs).flatten().topk(2 * W)
    return totals, index // V, index % V


# %% tags=["wrong"] expects="wrong beam"
def extend_beams(beam_total, log_probs):
    W, V = log_probs.shape
    totals, index = (beam_total[:, None] + log_probs).flatten().topk(2 * W)
    return totals, index // W, index % V


# %% tags=["wrong"] expects="each result must have 2W"
def extend_beams(beam_total, log_probs):
    W, V = log_probs.shape
    totals, index = (beam_total[:, None] + log_probs).flatten().topk(W)
    return totals, index // V, index % V


# %% [markdown]
# <details><summary>Hint</summary>
#
# `flatten()` puts the rows of a (W, V) matrix one after the other. So the flat index is
# `beam * V + token`.
# </details>
#
# The library's function `extend` does the same for a batch of clips. The largest difference
# to yours:

# %%
library = extend(beam_total[None], log_probs[None], 1)
yours = extend_beams(beam_total, log_probs)
print(max((a - b[0]).abs().max().item() for a, b in zip(yours, library)))

# %% [markdown]
# ## 7.3 Which extensions end, which continue
# An extension by an end token is a finished sentence, but **only if it is one of the best
# W**. A worse one is dropped. The best W extensions without an end token become the new
# beams. These are the rules of the transformers library, and of ours.
#
# **Exercise 2 (15 minutes).** `answers[w]` is the list of the tokens of beam `w`. Do not
# change it. Return three things: the finished sentences, a list of (tokens without the end,
# total); the totals of the new beams, a tensor (W,); the new beams, W lists of tokens.
# Begin with `tolist()`: a token must be an int, because `tensor(0) in {0}` is False.


# %% tags=["exercise"]
def split_extensions(totals, parents, tokens, answers, W, end_ids):
    """totals, parents, tokens (2W,), best first -> finished, new_total, new_answers"""
    # BEGIN SOLUTION
    finished, beam_total, new_answers = [], [], []
    extensions = zip(totals.tolist(), parents.tolist(), tokens.tolist())
    for rank, (total, parent, token) in enumerate(extensions):
        if token in end_ids:
            if rank < W:
                finished.append((answers[parent], total))
        elif len(beam_total) < W:
            beam_total.append(total)
            new_answers.append([*answers[parent], token])
    return finished, torch.tensor(beam_total), new_answers
    # END SOLUTION


# %% tags=["check"]
# W = 2 beams, [5] and [6]. Token 0 is the end. The four best extensions:
case = (
    torch.tensor([-1.0, -2.0, -3.0, -4.0]),
    torch.tensor([1, 0, 1, 0]),
    torch.tensor([8, 0, 0, 9]),
)
old = [[5], [6]]
finished, new_total, new = split_extensions(*case, old, 2, {0})
assert old == [[5], [6]], (
    "`answers` was changed: two new beams with the same parent would share one list"
)
assert ([6], -3.0) not in finished, "the end at rank 3 does not count, because W is 2"
assert [ids for ids, _ in finished] == [[5]], (
    f"only beam 0, [5], is finished; you return {finished}"
)
assert new_total.tolist() == [-1.0, -4.0], (
    f"beams without an end: -1 and -4, not {new_total.tolist()}"
)
assert new == [[6, 8], [5, 9]], (
    f"each beam continues its own parent: [6, 8] and [5, 9], not {new}"
)
assert all(type(ids[-1]) is int for ids in new), "a token must be an int, not a tensor"
n_beams = len(
    split_extensions(case[0], case[1], torch.tensor([8, 9, 7, 0]), old, 2, {0})[2]
)
assert n_beams == 2, f"three extensions have no end, but W is 2; {n_beams} beams continue"
print("ok: one sentence is finished, and two beams continue")


# %% tags=["wrong"] expects="does not count"
def split_extensions(totals, parents, tokens, answers, W, end_ids):
    rows = list(zip(totals.tolist(), parents.tolist(), tokens.tolist()))
    finished = [(answers[b], total) for total, b, token in rows if token in end_ids]
    new = [
        (total, [*answers[b], token]) for total, b, token in rows if token not in end_ids
    ][:W]
    return finished, torch.tensor([total for total, _ in new]), [ids for _, ids in new]


# %% tags=["wrong"] expects="3 beams continue"
def split_extensions(totals, parents, tokens, answers, W, end_ids):
    rows = list(zip(totals.tolist(), parents.tolist(), tokens.tolist()))
    finished = [(answers[b], total) for total, b, token in rows[:W] if token in end_ids]
    new = [
        (total, [*answers[b], token]) for total, b, token in rows if token not in end_ids
    ]
    return finished, torch.tensor([total for total, _ in new]), [ids for _, ids in new]


# %% tags=["wrong"] expects="a token must be an int"
def split_extensions(totals, parents, tokens, answers, W, end_ids):
    rows = list(zip(totals.tolist(), parents, tokens))
    finished = [
        (answers[b], total) for total, b, token in rows[:W] if token.item() in end_ids
    ]
    new = [(total, b, token) for total, b, token in rows if token.item() not in end_ids][:W]
    new_answers = [[*answers[b], token] for _, b, token in new]
    return finished, torch.tensor([total for total, _, _ in new]), new_answers


# %% tags=["wrong"] expects="continues its own parent"
def split_extensions(totals, parents, tokens, answers, W, end_ids):
    rows = list(zip(totals.tolist(), parents.tolist(), tokens.tolist()))
    finished = [(answers[b], total) for total, b, token in rows[:W] if token in end_ids]
    new = [(total, token) for total, _, token in rows if token not in end_ids][:W]
    new_answers = [answers[w] + [token] for w, (_, token) in enumerate(new)]
    return finished, torch.tensor([total for total, _ in new]), new_answers


# %% tags=["wrong"] expects="beams without an end"
def split_extensions(totals, parents, tokens, answers, W, end_ids):
    rows = list(zip(totals.tolist(), parents.tolist(), tokens.tolist()))
    finished = [(answers[b], total) for total, b, token in rows[:W] if token in end_ids]
    return finished, totals[:W], [answers[b] + [token] for _, b, token in rows[:W]]


# %% tags=["wrong"] expects="`answers` was changed"
def split_extensions(totals, parents, tokens, answers, W, end_ids):
    finished, beam_total, new_answers = [], [], []
    for rank, (total, b, token) in enumerate(
        zip(totals.tolist(), parents.tolist(), tokens.tolist())
    ):
        if token in end_ids and rank < W:
            finished.append((list(answers[b]), total))
        elif token not in end_ids and len(beam_total) < W:
            answers[b].append(token)
            beam_total.append(total)
            new_answers.append(answers[b])
    return finished, torch.tensor(beam_total), new_answers


# %% [markdown]
# ## 7.4 The whole search, and a proof
# `next_log_probs` is all that the search needs from a model. It takes W beginnings and
# returns log-probabilities (W, V). The *score* of a finished sentence is its
# log-probability, divided by its number of tokens (the end is one of them). With
# `length_penalty=0.0` it is the log-probability itself. Read `search` and find your two
# functions in it.


# %%
def search(next_log_probs, W, end_ids, length_penalty=1.0, longest=64):
    # At first all beams are the same, so only the first one may be extended.
    beam_total, answers = torch.tensor([0.0] + [-torch.inf] * (W - 1)), [[]] * W
    finished, steps = [], []
    for length in range(1, longest + 1):
        extensions = extend_beams(beam_total, next_log_probs(answers))
        steps.append(describe_step(*extensions, W, end_ids))
        ended, beam_total, answers = split_extensions(*extensions, answers, W, end_ids)
        finished += [(ids, total / length**length_penalty) for ids, total in ended]
        finished = sorted(finished, key=lambda sentence: -sentence[1])[:W]
        # Stop if the best beam, ended now, would not be one of the W best sentences.
        if len(finished) == W and beam_total[0] / length**length_penalty <= finished[-1][1]:
            return finished, steps
    finished += [
        (ids, total / longest**length_penalty)
        for ids, total in zip(answers, beam_total.tolist())
    ]
    return sorted(finished, key=lambda sentence: -sentence[1])[:W], steps


def describe_step(totals, parents, tokens, W, end_ids):
    """For the figure: (parent, token, total, state) of each extension."""
    rows, n_beams = [], 0
    columns = [column.tolist() for column in (totals, parents, tokens)]
    for rank, (total, parent, token) in enumerate(zip(*columns)):
        if token in end_ids:
            state = "ended" if rank < W else "dropped"
        else:
            state = "continues" if n_beams < W else "dropped"
            n_beams += state == "continues"
        if total > -torch.inf:
            rows.append((parent, token, total, state))
    return rows


def toy_model(answers):
    return log_table[[ids[-1] if ids else START for ids in answers]]


# %% [markdown]
# Three facts must be true. One beam is greedy search. Two beams find the best sentence of
# this language. With 100 beams the search is so wide that it ranks the best sentences
# exactly as the list of all sentences does.

# %% tags=["check"]
results = {W: search(toy_model, W, {END}, length_penalty=0.0)[0] for W in (1, 2, 100)}
assert results[1][0][0] == greedy, "one beam must give the sentence of greedy search"
assert results[2][0][0] == list(ranked[0]), "two beams must find the best sentence"
for (ids, total), expected in zip(results[100], ranked[:30]):
    difference = abs(total - sentence_log_prob(expected))
    assert difference < 1e-4, f"{words(ids)!r} is at the rank of {words(expected)!r}"
print(
    f"ok: 100 beams agree with the list of all {len(ranked):,} sentences of up to 6 tokens"
)

# %%
for W in (1, 2):
    steps = search(toy_model, W, {END}, 0.0)[1]
    draw_tree(
        steps, TOKENS.__getitem__, f"{W} beam{'s' if W > 1 else ''} in the toy language"
    )

# %% [markdown]
# Each column is one step, and the best extension is at the top. The number is the total
# log-probability. Greedy search drops "the" in the first step. With two beams "the"
# continues, and the second step shows that this was good.
#
# ## 7.5 The real model
# `search` does not change. We only have to write the real model as a function from
# beginnings to log-probabilities.

# %% tags=["slow"]
model, rows = load_trained_model(), read_corpus(CORPUS, "fr", "en")[0]["test"][:96]
end_ids = end_ids_of(model)
prompt_ids = ids_of_prompt(model, "st", "fr", "en")
audio_index = prompt_ids.tolist().index(AUDIO_ID)


@torch.inference_mode()
def prompt_of(clip):
    """The embeddings of the prompt with the speech inside it, (P, D)."""
    return model.splice(prompt_ids, model.encode_speech([clip])[0], audio_index)


def reader(prompt):
    # There is no cache: the model reads the whole prompt again for every token.
    @torch.inference_mode()
    def next_log_probs(answers):
        tokens = torch.tensor(answers, dtype=torch.long).view(len(answers), -1)
        beginnings = prompt.expand(len(answers), -1, -1)  # (W, P, D)
        x = torch.cat([beginnings, model.llm.embed(tokens)], dim=1)
        states, _ = model.llm.hidden(x)
        return model.llm.logits(states[:, -1]).log_softmax(-1)

    return next_log_probs


# %% [markdown]
# On which clips do greedy search and five beams give different sentences? Listen to one of
# them.

# %% tags=["slow"]
one, five = (
    translate(model, [row.path for row in rows], search=SearchOptions(W)) for W in (1, 5)
)
different = [i for i, (a, b) in enumerate(zip(one, five)) if a.text != b.text]
print(f"different sentences: {len(different)} of {len(rows)} clips")
for i in different[:4]:
    print(f"\nreference  {rows[i].translation}")
    print(f"1 beam     {one[i].text}\n5 beams    {five[i].text}")
improved = [i for i in different if five[i].text == rows[i].translation]
clip = load_audio(rows[[*improved, *different, 0][0]].path)
play(clip)

# %% [markdown]
# Your search and the library's must give the same five sentences. Which one is faster, and
# why? (`process_time` counts only the seconds in which the processor works for this
# notebook.)

# %% tags=["check", "slow"]
prompt = prompt_of(clip)
start = process_time()
yours, steps = search(reader(prompt), 5, end_ids)
middle = process_time()
[library] = beam_search(model.llm, [prompt], end_ids, SearchOptions(5))
stop = process_time()
assert [ids for ids, _ in yours] == [h.ids for h in library], (
    "not the five sentences of the library"
)
difference = max(abs(total - h.score) for (_, total), h in zip(yours, library))
print("largest difference of a score:", difference)
print(f"yours, without a cache: {middle - start:.2f} s")
print(f"the library, with a cache: {stop - middle:.2f} s")


# %% tags=["slow"]
def piece(token):
    return model.tokenizer.decode([token]) or "</s>"


(greedy_path, greedy_score), (beam_path, beam_score) = (
    search(reader(prompt), W, end_ids)[0][0] for W in (1, 5)
)
print(f"1 beam:  score {greedy_score:.3f}  {model.tokenizer.decode(greedy_path)}")
print(f"5 beams: score {beam_score:.3f}  {model.tokenizer.decode(beam_path)}")
n_equal = next((i for i, (a, b) in enumerate(zip(greedy_path, beam_path)) if a != b), 0)
beginning = model.tokenizer.decode(greedy_path[:n_equal])
draw_tree(
    steps, piece, f"five beams, after {beginning!r}", first=n_equal + 1, last=n_equal + 5
)

# %% [markdown]
# The figure begins where the sentence of greedy search and that of five beams become
# different (at the first step, if they are equal). Follow both sentences from step to step.
# When do five beams drop that of greedy search? Or does it lose only at the end, by its
# score?
#
# ## 7.6 What do beams cost, and what do they improve?
# **Predict, then run.** We translate the same 96 clips again, clean and with white noise.
# The noise is 5 dB weaker than the speech. How many sentences change with five beams
# instead of one? By which factor does the time grow?

# %% tags=["guess"]
changed_clean = 5  # ← your guess
changed_noisy = 30  # ← your guess
time_factor = 5  # ← your guess


# %% tags=["slow"]
def add_noise(clip, decibels, seed):
    noise = torch.randn(len(clip), generator=torch.Generator().manual_seed(seed))
    return clip + noise * (clip.norm() / noise.norm()) * 10 ** (-decibels / 20)


def in_batches(items):
    return [items[i : i + 16] for i in range(0, len(items), 16)]


clean = [load_audio(row.path) for row in rows]
noisy = [add_noise(audio, 5, seed) for seed, audio in enumerate(clean)]
play(noisy[0])

# %% tags=["slow"]
widths, measured = (1, 2, 3, 5, 8), {}
for name, clips in (("clean", clean), ("noise", noisy)):
    with torch.inference_mode():
        speech = [
            one_clip
            for batch in in_batches(clips)
            for one_clip in model.encode_speech(batch)
        ]
        prompts = in_batches(
            [model.splice(prompt_ids, one_clip, audio_index) for one_clip in speech]
        )
    for W in widths:
        start = process_time()
        best = [
            h[0]
            for batch in prompts
            for h in beam_search(model.llm, batch, end_ids, SearchOptions(W))
        ]
        seconds = process_time() - start
        texts = [model.tokenizer.decode(h.ids) for h in best]
        bleu = score(texts, [row.translation for row in rows])["bleu"]
        mean_score = sum(h.score for h in best) / len(best)
        measured[name, W] = texts, mean_score, bleu, seconds

# %% tags=["slow"]
fig, axes = plt.subplots(1, 3, figsize=(9.5, 3), layout="constrained")
labels = ("score gained (nats per token)", "BLEU gained", "time, as a multiple of 1 beam")
titles = ("what the search looks for", "what we want", "what it costs")
for name, colour, marker in (("clean", BLUE, "o"), ("noise", ORANGE, "s")):
    for k, ax in enumerate(axes, start=1):
        first = measured[name, 1][k]
        values = [
            measured[name, W][k] / first if k == 3 else measured[name, W][k] - first
            for W in widths
        ]
        ax.plot(widths, values, marker=marker, color=colour, label=name)
for ax, label, title in zip(axes, labels, titles):
    ax.set(xlabel="beams W", ylabel=label, title=title, xticks=widths)
axes[0].legend(frameon=False)
axes[2].set_ylim(0, None)
plt.show()


def count_changes(name):
    return sum(a != b for a, b in zip(measured[name, 1][0], measured[name, 5][0]))


ratio = measured["clean", 5][3] / measured["clean", 1][3]
reveal("changed, clean", changed_clean, count_changes("clean"))
reveal(
    "changed, noise",
    changed_noisy,
    count_changes("noise"),
    "an unsure model has close alternatives",
)
reveal(
    "time factor",
    time_factor,
    f"{ratio:.1f}",
    "one call reads the weights once for all beams",
)

# %% [markdown]
# Look at the left and the middle panel together. The score is the log-probability divided
# by the number of tokens: this is what the search makes large. BLEU is another question,
# and 96 clips are few: a difference of a point or two can be chance (notebook 8 computes
# the interval).
#
# ## 7.7 Break it: the most probable sentence is empty
# In this table, people often say nothing: at the start, `</s>` has the probability 0.40.
# What is the best sentence now? Which setting of `search` repairs it?
#
# Then make a mistake that the transformers library once had (huggingface/transformers,
# issue 26624): count the tokens of the prompt in the length. Here the prompt has 100
# tokens.

# %%
shy_table = log_table.clone()
shy_table[START] = torch.tensor([0.40, 0.31, 0.25, 0.02, 0.02]).log()


def shy_model(answers):
    return shy_table[[ids[-1] if ids else START for ids in answers]]


def shown(ids):
    return words(ids) or "(an empty sentence)"


for penalty in (0.0, 1.0):
    best = search(shy_model, 5, {END}, penalty)[0]
    print(f"length penalty {penalty}: {shown(best[0][0])}")
totals = [(ids, score_ * (len(ids) + 1)) for ids, score_ in best]
wrong = max(totals, key=lambda sentence: sentence[1] / (100 + len(sentence[0]) + 1))
print(f"length penalty 1.0, prompt counted: {shown(wrong[0])}")

# %% [markdown]
# Each token makes the log-probability smaller, so without the division short sentences win.
# With 100 extra tokens in every length, the division is nearly the same for all sentences,
# and the repair is lost.
#
# ## Recap
# * Greedy search keeps one beginning, beam search keeps W. One beam is greedy search. A
#   beam as wide as the language is an exhaustive search.
# * The search needs only the log-probabilities of the next token. It does not matter what
#   the model is.
# * More beams usually find sentences with a higher score. Whether these are better
#   sentences must be measured.
#
# **Read next:** `beam_search` in `translate.py`. Where is `split_extensions` in it? Why
# does it never reorder the cache?
#
# **Open question:** translate with `SearchOptions(beams=50)`. Are the more probable
# sentences better ones? Read them.
