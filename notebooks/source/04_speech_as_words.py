# %% [markdown]
# # 4 · Speech becomes words of the LLM
#
# **90 minutes**, of which the computer needs less than three. This notebook explains the
# prompts and labels in `data.py`, and `splice` and `forward` in `llast.py`. Do notebooks
# 2 and 3 first.
#
# After this notebook you can
# 1. build a training row: a prompt with speech inside, and the right answer;
# 2. prove that the model does not see the answer, although the answer is in its input;
# 3. find the sound behind a written word, in two ways, and translate your own voice.
#
# The notebook stops at the first exercise that is not done yet, with
# `NotImplementedError: your turn`. Write your answer in place of this line, run the cell,
# then run the check below it.

# %% tags=["setup"]
import sys
from pathlib import Path

import matplotlib.pyplot as plt
import torch
import torch.nn.functional as F

sys.path[:0] = ["..", "../.."]  # the folders of course.py and of the library
from course import CORPUS, MAGMA, load_trained_model, play, reveal, watch_attention
from data import AUDIO_ID, IGNORE, Example, answer_row, collate, prompt_for, read_corpus
from translate import SearchOptions, answer, ids_of_prompt, score, translate
from whisper_encoder import clip_to_mel, load_audio

torch.set_num_threads(1)
model = load_trained_model()
rows = read_corpus(CORPUS, "fr", "en")[0]["test"]
one_beam = SearchOptions(beams=1)

# %% [markdown]
# ## 4.1 A prompt with a hole (15 minutes)
# The prompt is text and special tokens. One of them, `<audio>`, marks the place of the
# speech. It has the id -300, which no real token has.

# %%
row = rows[7]
audio = load_audio(row.path)
print(prompt_for("st", "fr", "en"))
ids = ids_of_prompt(model, "st", "fr", "en")  # (T,)
print(ids.tolist())
speech = model.encode_speech([audio])[0]  # (S, D), from the encoder and the projector
print(f"{len(ids)} ids, {len(speech)} speech embeddings of {speech.shape[1]} numbers")
play(audio)

# %% [markdown]
# **Predict, then run.** How many positions does the LLM see before it writes its first
# word?

# %% tags=["guess"]
n_positions = len(ids) + len(speech)  # ← your guess

# %%
reveal("positions", n_positions, len(ids) + len(speech) - 1, "the mark itself is replaced")

# %% [markdown]
# **Exercise 1.** Build the input of the LLM. `model.llm.embed(ids)` gives the embeddings
# of ids `(T,)`, but it fails at the id -300.


# %% tags=["exercise"]
def splice(ids, speech):
    """ids (T,) with one AUDIO_ID, speech (S, D) -> embeddings (T - 1 + S, D)"""
    # BEGIN SOLUTION
    place = (ids == AUDIO_ID).nonzero().item()
    before, after = model.llm.embed(ids[:place]), model.llm.embed(ids[place + 1 :])
    return torch.cat([before, speech, after])
    # END SOLUTION


# %% tags=["check"]
test_ids, test_speech = torch.tensor([1, 304, AUDIO_ID, 310, 320, 330]), torch.randn(3, 256)
result, embedded = splice(test_ids, test_speech), model.llm.embed(test_ids.clamp(min=0))
assert result.shape[0] != 9, "9 positions: the mark <audio> must go when the speech comes"
assert result.shape == (8, 256), f"expected (5 + 3, 256), found {tuple(result.shape)}"
advice = "the speech must be at the place of the mark, not at the end of the prompt"
assert not torch.equal(result[-3:], test_speech), advice
assert torch.equal(result[:2], embedded[:2]), "the ids before the mark must not change"
assert torch.equal(result[2:5], test_speech), (
    "the speech must begin at the place of the mark"
)
assert torch.equal(result[5:], embedded[3:]), "after the speech: the ids after the mark"
place = ids.tolist().index(AUDIO_ID)
difference = (splice(ids, speech) - model.splice(ids, speech, place)).abs().max()
print(f"ok: largest difference from the library {difference:.1e}")


# %% tags=["wrong"] expects="the mark <audio> must go"
def splice(ids, speech):
    place = (ids == AUDIO_ID).nonzero().item()
    words = model.llm.embed(ids.clamp(min=0))
    return torch.cat([words[: place + 1], speech, words[place + 1 :]])


# %% tags=["wrong"] expects="not at the end"
def splice(ids, speech):
    return torch.cat([model.llm.embed(ids[ids != AUDIO_ID]), speech])


# %% tags=["wrong"] expects="must begin at the place of the mark"
def splice(ids, speech):
    place = (ids == AUDIO_ID).nonzero().item()
    words = model.llm.embed(ids[ids != AUDIO_ID])
    return torch.cat([words[: place + 1], speech, words[place + 1 :]])


# %% tags=["wrong"] expects="expected (5 + 3, 256)"
def splice(ids, speech):
    place = (ids == AUDIO_ID).nonzero().item()
    words = model.llm.embed(ids.clamp(min=0)).clone()
    words[place : place + len(speech)] = speech[: len(words) - place]
    return words


# %% [markdown]
# ## 4.2 What must be predicted where? (15 minutes)
# In training the right answer follows the prompt, with an end token. Each position
# predicts the *next* token. Only tokens of the answer have a loss: the last position of
# the prompt predicts the first word, ..., the last word predicts the end token. `IGNORE`
# means no loss.
#
# **Exercise 2.** `row_ids` are the prompt (the first `n_prompt` ids, one of them the
# mark) and the answer with its end token. The mark becomes `S` positions. Which token
# must each position predict?


# %% tags=["exercise"]
def next_tokens(row_ids, n_prompt, S):
    """row_ids (T,) -> (T - 1 + S,): the token to predict at each position, or IGNORE"""
    # BEGIN SOLUTION
    answer_ids = row_ids[n_prompt:]
    n_prompt_positions = n_prompt - 1 + S
    targets = torch.full((n_prompt_positions + len(answer_ids),), IGNORE)
    targets[n_prompt_positions - 1 : -1] = answer_ids
    return targets
    # END SOLUTION


# %% tags=["check"]
test_ids = torch.tensor([1, 304, AUDIO_ID, 310, 50, 60, 2])  # 4 of the prompt; 2 is the end
result = next_tokens(test_ids, 4, 3)
advice = "one mark becomes S positions: the row has T - 1 + S"
assert len(result) == 9, f"{advice} = 9 positions, yours has {len(result)}"
assert 2 in result, "the end token must be predicted, too: otherwise the model never stops"
assert 310 not in result, "no loss on the prompt: the user writes it, the model need not"
assert result[6] != 50, (
    "not shifted: position 6 IS the token 50; it must predict the next one"
)
assert result[4] != 50, "shifted twice: position 4 comes two places before the token 50"
expected = [IGNORE] * 5 + [50, 60, 2, IGNORE]
assert result.tolist() == expected, f"expected {expected}, found {result.tolist()}"
print("ok")


# %% tags=["wrong"] expects="not shifted"
def next_tokens(row_ids, n_prompt, S):
    return torch.cat([torch.full((n_prompt - 1 + S,), IGNORE), row_ids[n_prompt:]])


# %% tags=["wrong"] expects="no loss on the prompt"
def next_tokens(row_ids, n_prompt, S):
    ids_after_speech = row_ids[3:]
    targets = torch.full((len(row_ids) - 1 + S,), IGNORE)
    targets[-len(ids_after_speech) - 1 : -1] = ids_after_speech
    return targets


# %% tags=["wrong"] expects="the end token"
def next_tokens(row_ids, n_prompt, S):
    targets = torch.full((len(row_ids) - 1 + S,), IGNORE)
    targets[n_prompt - 2 + S : -2] = row_ids[n_prompt:-1]
    return targets


# %% tags=["wrong"] expects="one mark becomes S positions"
def next_tokens(row_ids, n_prompt, S):
    targets = torch.full((len(row_ids),), IGNORE)
    targets[n_prompt - 1 : -1] = row_ids[n_prompt:]
    return targets


# %% tags=["wrong"] expects="shifted twice"
def next_tokens(row_ids, n_prompt, S):
    targets = torch.full((len(row_ids) - 1 + S,), IGNORE)
    targets[n_prompt - 3 + S : -2] = row_ids[n_prompt:]
    return targets


# %% [markdown]
# Both functions together give the loss. The library's loss of the same row:


# %%
def losses_of(row_ids, n_prompt):
    """The loss of each answer token: -log of the probability that the model gave it."""
    x = splice(row_ids, speech)[None]  # (1, P, D)
    targets = next_tokens(row_ids, n_prompt, len(speech))  # (P,)
    logits = model.llm.logits(model.llm.hidden(x)[0])[0]  # (P, V)
    return F.cross_entropy(logits, targets, ignore_index=IGNORE, reduction="none")[
        targets >= 0
    ]


example = Example(row, "st")  # st: speech translation
row_ids = torch.tensor(answer_row(example, model.tokenizer, model.config.template)[0])
mine = losses_of(row_ids, len(ids))
theirs = model(collate([example], model.tokenizer, model.config.template))
pieces = [model.tokenizer.pieces.id_to_piece(i) for i in row_ids[len(ids) :].tolist()]
print(" ".join(f"{piece} {loss:.3f}" for piece, loss in zip(pieces, mine)))
print(f"largest difference from the library {(mine - theirs).abs().max():.1e}")

# %%
S, P = len(speech), len(row_ids) - 1 + len(speech)
kinds = torch.zeros(2, P)  # 0 text of the prompt, 1 speech, 2 answer, 3 no loss, 4 a loss
kinds[0, place : place + S], kinds[0, len(ids) - 1 + S :] = 1, 2
kinds[1] = torch.where(next_tokens(row_ids, len(ids), S) >= 0, 4, 3)
colours = plt.matplotlib.colors.ListedColormap(
    ["#BBBBBB", "#56B4E9", "#E69F00", "white", "#D55E00"]
)
fig, ax = plt.subplots(figsize=(9, 1.9))
ax.imshow(kinds, aspect="auto", cmap=colours, vmin=0, vmax=4)
ax.set_yticks([0, 1], ["input", "loss"])
ax.set(xlabel="position", title=f"{P} positions; red: the next token has a loss")
borders = 0, place, place + S, len(ids) - 1 + S, P
for i, text in enumerate(("text", "speech", "instruction", "answer")):
    middle = (borders[i] + borders[i + 1] - 1) / 2
    ax.text(middle, 0, text, ha="center", va="center", fontsize=7)
plt.show()

# %% [markdown]
# ## 4.3 Is that cheating?
# The answer is part of the input. A model that only copied it would have a loss of 0 and
# would know nothing.
#
# **Predict, then run.** We replace the fourth word of the answer by another one (in the
# input *and* as the expected token). Which losses change: those before it, its own, those
# after it?

# %% tags=["guess"]
changed = "all of them"  # ← your guess

# %%
other_ids = row_ids.clone()
other_ids[len(ids) + 3] = model.tokenizer.encode("today")[0]
others = losses_of(other_ids, len(ids))
for i, (before, after) in enumerate(zip(mine.tolist(), others.tolist())):
    print(f"{pieces[i]:12} {before:8.4f} {after:8.4f}{'   replaced' if i == 3 else ''}")
first = (mine - others).abs().gt(1e-4).nonzero()[0].item()
reveal("changed", changed, f"{pieces[first]} and later", "no position sees a later one")

# %% [markdown]
# Nothing changes before the replaced token. Its own loss changes, because another word is
# now the right one. The probabilities at this position do not: the model cannot see which
# word we wrote there. The word is an input only for the words after it.
#
# ## 4.4 Speech embeddings and word embeddings
# The projector may put speech anywhere in the space of the LLM. Where does it put it? For
# each speech embedding we search the most similar word embedding (cosine). Nobody asked
# for similarity in training: only the loss of the answers was used.

# %%
table = model.llm.model.embed_tokens.weight  # (V, D)
similarity = F.normalize(speech, dim=1) @ F.normalize(table, dim=1).T  # (S, V)
best, nearest = similarity.max(dim=1)
print(f"length of a speech embedding {speech.norm(dim=1).median():.1f} (median)")
print(f"length of a word embedding {table.norm(dim=1).median():.1f}")
chance = torch.randn(speech.shape, generator=torch.Generator().manual_seed(0))
best_by_chance = (F.normalize(chance, dim=1) @ F.normalize(table, dim=1).T).amax(dim=1)
print(f"cosine with the nearest word {best.median():.2f}", end="")
print(f" (of a random vector {best_by_chance.median():.2f})")
words = [model.tokenizer.pieces.id_to_piece(i) for i in nearest.tolist()]
for start in range(0, S, 15):
    print(f"{start / 50:4.1f} s  {' '.join(words[start : start + 15])}")

print(f"\n{row.sentence} Its words in French, English, German and Spanish:")
for same in (
    "banque bank Bank banco",
    "ferme closes schließt cierra",
    "demain tomorrow morgen mañana",
    "dix ten zehn diez",
    "quart quarter Viertel cuarto",
):
    pieces_of_it = ["▁" + word for word in same.split()]
    times = [f"{w} {i / 50:.2f}" for i, w in enumerate(words) if w in pieces_of_it]
    print(f"{same}: {', '.join(times) or 'not there'}")

# %% [markdown]
# The last lines say which words of the sentence are there, and at which time (in
# seconds). The LLM reads four languages, so a translation of the word counts, too. Which
# words are at about the right time? Which are missing? A cosine of 1 means the same
# direction. Are speech embeddings words, or do they only lie nearer to words than random
# vectors do?
#
# ## 4.5 Which sound is behind a word? (20 minutes)
# Which speech positions does the LLM look at when it writes a word? `maps` has the
# weights of all layers: one row per query position, one column per key position.
#
# **Exercise 3.** Take the rows that *predict* the answer tokens, and the columns of the
# speech. Divide each row by its sum, so that every word has the same total.


# %% tags=["exercise"]
def weights_on_speech(weights, n_answer, place, S):
    """weights (P, P) of a row that ends with n_answer answer tokens; its speech begins at
    position `place` -> (n_answer, S), each row with sum 1"""
    # BEGIN SOLUTION
    first = len(weights) - n_answer - 1  # the last position of the prompt
    part = weights[first : first + n_answer, place : place + S]
    return part / part.sum(dim=1, keepdim=True)
    # END SOLUTION


# %% tags=["check"]
fake = torch.arange(64.0).view(8, 8).tril() + 1  # 8 positions, of which 3 are the answer
result = weights_on_speech(fake, 3, 1, 4)
assert result.shape == (3, 4), (
    f"expected (n_answer, S) = (3, 4), found {tuple(result.shape)}"
)
assert torch.allclose(result.sum(dim=1), torch.ones(3)), "divide each row by its sum"
own = fake[5:8, 1:5] / fake[5:8, 1:5].sum(dim=1, keepdim=True)
advice = "these are the rows of the answer tokens; the position before predicts a token"
assert not torch.allclose(result, own), advice
first_columns = fake[4:7, :4] / fake[4:7, :4].sum(dim=1, keepdim=True)
assert not torch.allclose(result, first_columns), (
    "the speech begins at column `place`, not 0"
)
right = fake[4:7, 1:5] / fake[4:7, 1:5].sum(dim=1, keepdim=True)
assert torch.allclose(result, right), "not these rows and columns"
print("ok")


# %% tags=["wrong"] expects="the position before predicts a token"
def weights_on_speech(weights, n_answer, place, S):
    part = weights[-n_answer:, place : place + S]
    return part / part.sum(dim=1, keepdim=True)


# %% tags=["wrong"] expects="divide each row by its sum"
def weights_on_speech(weights, n_answer, place, S):
    return weights[-n_answer - 1 : -1, place : place + S]


# %% tags=["wrong"] expects="begins at column `place`"
def weights_on_speech(weights, n_answer, place, S):
    part = weights[-n_answer - 1 : -1, :S]
    return part / part.sum(dim=1, keepdim=True)


# %% [markdown]
# Attention says where the model looks. It does not say whether it uses what it sees. So
# here is a second way: silence a tenth of a second of the clip, and measure how much less
# likely each word of the answer becomes. Move the silence through the clip.


# %%
def look(audio):
    """-> answer ids (A,), attention on the speech (A, S), mean over the first two layers"""
    speech = model.encode_speech([audio])[0]
    best = answer(model, ids, [audio], model.encode_speech, SearchOptions())[0][0]
    answer_ids = torch.tensor(best.ids)
    x = torch.cat([splice(ids, speech), model.llm.embed(answer_ids)])[None]
    with watch_attention() as maps:
        model.llm.hidden(x)
    mean = torch.stack(maps[:2])[:, 0].mean(dim=(0, 1))  # (P, P)
    return answer_ids, weights_on_speech(mean, len(answer_ids), place, len(speech))


def log_probs(audio, answer_ids):
    """The log-probability of each answer token, if this clip is the input. -> (A,)"""
    prompt = splice(ids, model.encode_speech([audio])[0])
    x = torch.cat([prompt, model.llm.embed(answer_ids)])[None]
    states = model.llm.hidden(x)[0][0, len(prompt) - 1 : -1]
    return model.llm.logits(states).log_softmax(dim=1).gather(1, answer_ids[:, None])[:, 0]


def silence_each_tenth(audio, answer_ids, step=800, width=1600):
    """Log-probability that silence takes from each word. -> (A, places), one per 50 ms"""
    losses, usual = [], log_probs(audio, answer_ids)
    for start in range(0, len(audio), step):
        silenced = audio.clone()
        middle = start + step // 2
        silenced[max(0, middle - width // 2) : middle + width // 2] = 0
        losses.append(usual - log_probs(silenced, answer_ids))
    return torch.stack(losses, dim=1)


def draw_words_and_time(audio, title):
    answer_ids, attention = look(audio)
    loss = silence_each_tenth(audio, answer_ids).clamp(min=0)
    seconds = attention.shape[1] / 50
    names = [model.tokenizer.pieces.id_to_piece(i) for i in answer_ids.tolist()]
    fig, axes = plt.subplots(3, 1, figsize=(9, 6.4), sharex=True)
    style = {"aspect": "auto", "cmap": MAGMA}
    mel = clip_to_mel(audio, 80, "clip")
    axes[0].imshow(mel, origin="lower", extent=(0, seconds, 0, 80), **style)
    axes[0].set(ylabel="mel bin", title=title)
    for ax, values, label in zip(
        axes[1:], (attention, loss), ("weight", "log-probability lost")
    ):
        extent = (0, seconds, len(names), 0)
        shown = ax.imshow(values, extent=extent, **style)
        ax.set_yticks([i + 0.5 for i in range(len(names))], names)
        fig.colorbar(shown, ax=ax, label=label, pad=0.01)
    axes[1].set(title="attention of layers 0 and 1 (mean of the heads)")
    axes[2].set(
        title="0.1 s of silence there: how much less likely is the word?", xlabel="time (s)"
    )
    plt.show()
    easy = [name for name, worst in zip(names, loss.amax(dim=1)) if worst < 0.7]
    print("words that never lose half of their probability:", *easy)


draw_words_and_time(audio, row.sentence)

# %% [markdown]
# The middle picture shows the first two layers. Look at others, too: change `maps[:2]`.
# (The rest of the attention is on the prompt and on the English words before.) Has a
# word a bright place at the time when it is spoken, in both pictures? The words that are
# printed below the pictures follow from other words, or from sounds at several places:
# no single silence takes them away.
#
# **Predict, then run.** The LLM gets only the first 0.4 s of the speech embeddings. Does
# it stop in the middle of the sentence?

# %% tags=["guess"]
first_half = "it writes: The bank"  # ← your guess


# %%
def translate_part(speech):
    """Translate speech embeddings (S, D) with one beam."""
    [[best]] = answer(model, ids, [speech], lambda inputs: inputs, one_beam)
    return best.text


for n in (10, 20, 30, 45, 60, S):
    print(f"first {n / 50:.1f} s: {translate_part(speech[:n])}")
reveal("0.4 s", first_half, translate_part(speech[:20]), "was all of this said in 0.4 s?")

# %% [markdown]
# ## 4.6 Break it: other places, other instructions
# Which of these make BLEU much worse on 32 clips, and which do not matter? a) the speech
# behind the instruction; b) an instruction that says *German* instead of *French*; c) the
# instruction to transcribe.

# %% tags=["slow"]
some = rows[:32]
all_speech = [
    s
    for i in range(0, 32, 8)
    for s in model.encode_speech([load_audio(r.path) for r in some[i : i + 8]])
]
references = [r.translation for r in some]
behind = torch.cat([ids[:place], ids[place + 1 :], ids[place : place + 1]])
variants = {
    "as in training": ids,
    "speech behind the instruction": behind,
    "German in the instruction": ids_of_prompt(model, "st", "de", "en"),
    "transcribe": ids_of_prompt(model, "asr", "fr", "en"),
}
print("trained for", ", ".join(model.config.directions))
for name, variant in variants.items():
    texts = [
        best[0].text
        for best in answer(model, variant, all_speech, lambda inputs: inputs, one_beam)
    ]
    print(f"{score(texts, references)['bleu']:5.1f}  {name}: {texts[0]}")

# %% [markdown]
# In training, the speech was always in the same place. A model that was trained for one
# language never had to read the name of the language. With the instruction to
# transcribe, the right output is French. So BLEU against the English references must be
# low.
#
# ## 4.7 Your own voice
# This model knows only the sentences of a phrasebook. `python tiny/phrasebook.py` prints
# ten of them. Say one in French, record it with a phone or a computer, and put the file
# next to this notebook (in JupyterLab: drag it into the list of files on the left). Then
# change `MY_CLIP`. First convert a phone's m4a or webm file, in a terminal: `ffmpeg -i
# my_voice.m4a my_voice.flac`
#
# The projector and both LoRAs were trained on computer voices only. Do not expect that
# the model understands you as well. The score is the mean log-probability of a token: 0
# is the best. The program marks an answer as unlikely if its score is lower than nearly
# all scores of known sentences.

# %%
MY_CLIP = Path("my_voice.wav")
clip = MY_CLIP if MY_CLIP.exists() else rows[12].path
if clip != MY_CLIP:
    print(f"{MY_CLIP} does not exist. A clip of the corpus instead: {rows[12].sentence}")
my_audio = load_audio(clip)  # 16 kHz, one channel
[result] = translate(model, [my_audio])
print(f"{result.text}   score {result.score:.2f}{', unlikely' * result.unlikely}")
draw_words_and_time(my_audio, f"{clip.name}: {result.text}")

# %%
play(my_audio)

# %% [markdown]
# ## Recap
# * The speech takes the place of one mark in the prompt: P = S + T - 1 positions.
# * Every position predicts the next token; only answer tokens have a loss. The answer in
#   the input is not cheating, because no position sees a later one.
# * Speech embeddings keep their time. Attention and silence are two ways to search the
#   sound of a word.
#
# **Read next:** `LLaST.splice` and `LLaST.forward` in `llast.py`, `answer_row` in
# `data.py`.
#
# **Open question:** compare the two lengths that 4.4 prints. Give the speech embeddings
# the length of word embeddings and translate again. Why does it matter so little, or so
# much? (Think of RMSNorm.)
