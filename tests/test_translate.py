"""translate.py: beam search, from clips to sentences, BLEU, the command line."""

import csv
import importlib
import io
import itertools
import json
import os
import re
import shutil
import sys
from dataclasses import replace
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import sacrebleu
import soundfile
import torch
from torch import Tensor

import toys
import translate
from data import Row
from llama import Llama
from llast import LLaST
from translate import (
    Clip,
    Hypothesis,
    Piece,
    SearchOptions,
    beam_search,
    score,
    score_rows,
    split_at_quiet,
)
from whisper_encoder import load_audio

# -------------------------------------------------------------------------------------- beam search


def toy_language(words: int) -> Llama:
    """A Llama with few words and clear preferences."""
    llm = Llama(toys.llama_config(vocab_size=words))
    chance = torch.Generator().manual_seed(words)
    for name, tensor in llm.state_dict().items():
        if "norm" not in name:
            tensor.normal_(std=0.5, generator=chance)
    return llm.eval()


def random_prompts(*lengths: int) -> list[Tensor]:
    chance = torch.Generator().manual_seed(7)
    return [torch.randn(P, toys.LLAMA["hidden_size"], generator=chance) for P in lengths]


@torch.no_grad()
def step_log_probs(llm: Llama, prompt: Tensor, answers: Tensor) -> Tensor:
    """Log-probability of each token of answers (n, T) after one prompt: full passes, no cache."""
    x = torch.cat([prompt.expand(len(answers), -1, -1), llm.embed(answers)], dim=1)
    log_probs = llm.logits(llm.hidden(x)[0]).log_softmax(-1)[:, len(prompt) - 1 : -1]
    return log_probs.gather(2, answers[..., None])[..., 0]


@torch.no_grad()
def greedy(llm: Llama, prompt: Tensor, eos_ids: list[int], most: int) -> list[int]:
    ids = []
    while len(ids) < most:
        x = torch.cat([prompt, llm.embed(torch.tensor(ids, dtype=torch.long))])
        token = llm.logits(llm.hidden(x[None])[0][0, -1]).argmax().item()
        if token in eos_ids:
            break
        ids.append(token)
    return ids


def every_answer(llm: Llama, prompt: Tensor, eos_ids, most: int, length_penalty: float):
    """(score, ids) of all answers that end or reach the limit, best first."""
    V = llm.config.vocab_size
    words = [i for i in range(V) if i not in eos_ids]
    ranked = []
    for length in range(1, most + 1):
        ends = range(V) if length == most else eos_ids
        answers = [[*a, e] for *a, e in itertools.product(*[words] * (length - 1), ends)]
        totals = step_log_probs(llm, prompt, torch.tensor(answers)).sum(dim=1)
        for total, answer in zip(totals.tolist(), answers, strict=True):
            ids = answer[:-1] if answer[-1] in eos_ids else answer
            ranked.append((total / length**length_penalty, ids))
    return sorted(ranked, reverse=True)


@pytest.mark.parametrize("eos_ids", [[2], [2, 5], [0, 3, 4]])
def test_one_beam_is_greedy_search(eos_ids):
    llm, prompts = toy_language(12), random_prompts(3, 9, 5, 1, 6, 7, 2, 8)
    answers = [
        best.ids for (best,) in beam_search(llm, prompts, eos_ids, SearchOptions(1, 1.0, 10))
    ]
    assert answers == [greedy(llm, prompt, eos_ids, 10) for prompt in prompts]
    assert len(set(map(len, answers))) > 2, "some answers should end earlier than others"


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("eos_ids", [[2], [2, 0]])
def test_a_wide_beam_is_exhaustive_search(length_penalty, eos_ids):
    llm = toy_language(5)
    for prompt in random_prompts(4, 7):
        expected = every_answer(llm, prompt, eos_ids, 4, length_penalty)
        hypotheses = beam_search(
            llm, [prompt], eos_ids, SearchOptions(len(expected), length_penalty, 4)
        )[0]
        assert len(hypotheses) == len(expected)
        for (wanted, ids), hypothesis in zip(expected[:10], hypotheses, strict=False):
            assert hypothesis.ids == ids
            assert hypothesis.score == pytest.approx(wanted, abs=1e-4)


@torch.no_grad()
def slow_beam(llm, prompt, eos_ids, W: int, most: int, length_penalty: float):
    """The rules of beam search with lists and full passes. -> W of (score, ids), best first"""
    running, finished = [(0.0, [])], []
    for length in range(1, most + 1):
        extended = []
        for total, ids in running:
            x = torch.cat([prompt, llm.embed(torch.tensor(ids, dtype=torch.long))])
            log_probs = llm.logits(llm.hidden(x[None])[0][0, -1]).log_softmax(-1)
            extended += [(total + lp, [*ids, i]) for i, lp in enumerate(log_probs.tolist())]
        extended.sort(reverse=True)
        for total, ids in extended[:W]:
            if ids[-1] in eos_ids:
                finished.append((total / length**length_penalty, ids[:-1]))
        finished = sorted(finished, reverse=True)[:W]
        running = [(total, ids) for total, ids in extended if ids[-1] not in eos_ids][:W]
        if len(finished) == W and running[0][0] / length**length_penalty <= finished[-1][0]:
            return finished
    cut = [(total / most**length_penalty, ids) for total, ids in running]
    return sorted(finished + cut, reverse=True)[:W]


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("eos_ids", [[2], list(range(9))])
def test_a_narrow_beam_equals_a_slow_search_of_the_same_rules(length_penalty, eos_ids):
    llm, prompts = toy_language(12), random_prompts(3, 9, 5, 1, 6, 2)
    together = beam_search(llm, prompts, eos_ids, SearchOptions(4, length_penalty, 8))
    for prompt, hypotheses in zip(prompts, together, strict=True):
        expected = slow_beam(llm, prompt, eos_ids, 4, 8, length_penalty)
        assert [h.ids for h in hypotheses] == [ids for _, ids in expected]
        assert [h.score for h in hypotheses] == pytest.approx([s for s, _ in expected], abs=1e-4)


@pytest.mark.parametrize("length_penalty", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("P", [1, 30])
def test_a_score_counts_the_answer_and_its_end_token_but_not_the_prompt(P, length_penalty):
    llm, (prompt,) = toy_language(12), random_prompts(P)
    for hypothesis in beam_search(llm, [prompt], [2], SearchOptions(4, length_penalty, 6))[0]:
        ended = hypothesis.ids if len(hypothesis.ids) == 6 else [*hypothesis.ids, 2]
        total = step_log_probs(llm, prompt, torch.tensor([ended])).sum().item()
        assert hypothesis.score == pytest.approx(total / len(ended) ** length_penalty, abs=1e-4)


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("eos_ids", [[2], [2, 5]])
def test_prompts_of_other_lengths_in_the_batch_change_nothing(beams, eos_ids):
    llm, prompts = toy_language(12), random_prompts(3, 20, 5, 1, 11)
    options = SearchOptions(beams, max_new_tokens=12)
    together = beam_search(llm, prompts, eos_ids, options)
    for prompt, hypotheses in zip(prompts, together, strict=True):
        single = beam_search(llm, [prompt], eos_ids, options)[0]
        assert [h.ids for h in hypotheses] == [h.ids for h in single]
        assert [h.score for h in hypotheses] == pytest.approx([h.score for h in single], abs=1e-4)


def test_hypotheses_are_distinct_and_best_first():
    options = SearchOptions(6, max_new_tokens=8)
    for hypotheses in beam_search(toy_language(12), random_prompts(3, 9), [2], options):
        assert len(hypotheses) == 6 == len({tuple(hypothesis.ids) for hypothesis in hypotheses})
        scores = [hypothesis.score for hypothesis in hypotheses]
        assert scores == sorted(scores, reverse=True)


@pytest.mark.parametrize("most", [1, 2, 5])
def test_no_answer_is_longer_than_the_limit_or_has_an_end_token(most):
    options = SearchOptions(3, max_new_tokens=most)
    hypotheses = beam_search(toy_language(12), random_prompts(3, 9), [2, 5], options)
    ids = [hypothesis.ids for clip in hypotheses for hypothesis in clip]
    assert max(map(len, ids)) == most
    assert not {2, 5} & set(itertools.chain(*ids))


class ScriptedLlm:
    """An LLM whose next word depends on the last word only. It records its masks and tokens."""

    words = ["</s>", "the", "a", "cat", "dog", "ran", "slept"]
    follow = {"</s>": {"the": 0.7, "a": 0.3}, "the": {"cat": 0.55, "dog": 0.45},
              "cat": {"slept": 0.6, "ran": 0.4}, "dog": {"ran": 0.98}}  # fmt: skip

    def __init__(self):
        self.masks, self.tokens = [], []
        self.chances = torch.full((7, 7), 1e-6)
        for word, chances in self.follow.items():
            for following, chance in chances.items():
                self.chances[self.words.index(word), self.words.index(following)] = chance

    def embed(self, ids):
        return torch.nn.functional.one_hot(ids, 7).float()

    def hidden(self, x, cache=None, positions=None, can_attend=None, **others):
        self.masks.append(can_attend)
        if cache:
            self.tokens.append([self.words[i] for i in x[0].argmax(-1)])
        return (x if cache else x[:, -1]), SimpleNamespace(keep=None)

    def logits(self, state):
        return self.chances[state.argmax(-1)].log()


def test_the_drawing_of_the_beam_mask_is_what_the_search_computes():
    llm = ScriptedLlm()
    beam_search(llm, [llm.embed(torch.zeros(3, dtype=torch.long))], [0], SearchOptions(2, 1.0, 4))
    rows = re.findall(r'beam "(.+)" +([01 ]+)$', beam_search.__doc__, re.M)
    assert [beam for beam, _ in rows] == [
        "the", "a", "the cat", "the dog", "the dog ran", "the cat slept",
    ]  # fmt: skip
    drawn = [[int(cell) for cell in cells.split()] for _, cells in rows]
    computed = [mask[0].int().tolist() for mask in llm.masks[1:]]  # the prompt has no mask
    assert computed == [drawn[:2], drawn[2:4], drawn[4:]]
    assert llm.tokens == [["the", "a"], ["cat", "dog"], ["ran", "slept"]]


# -------------------------------------------------------------------------- from clips to sentences


BAD = {
    "empty.wav": "the file is empty",
    "missing.wav": "no such file",
    "nan.wav": "must be from -1 to 1",
    "noise.wav": "not a format that",
}
THREE = SearchOptions(3, max_new_tokens=6)
SHORT = SearchOptions(1, max_new_tokens=2)
FORMATS = {".oga": "OGG", ".aif": "AIFF"}
HOW = {"search": THREE, "n_best": 3}


def assert_same(results, expected):
    for one, other in zip(results, expected, strict=True):
        assert (one.path, one.text, one.error) == (other.path, other.text, other.error)
        for a, b in zip(one.n_best, other.n_best, strict=True):
            assert a["text"] == b["text"] and a["score"] == pytest.approx(b["score"], abs=2e-4)


@pytest.mark.parametrize("batch_size", [2, 3, 16])
def test_clips_in_a_batch_are_translated_like_single_clips_and_in_order(model, clips, batch_size):
    paths = toys.good(clips)
    together = translate.translate(model, paths, **HOW, batch_size=batch_size)
    assert [result.path for result in together] == [str(path) for path in paths]
    assert len({result.text for result in together}) == len(paths)
    assert_same(together, [translate.translate(model, [path], **HOW)[0] for path in paths])


@pytest.mark.parametrize(
    "error",
    [torch.OutOfMemoryError("no room"), RuntimeError("DefaultCPUAllocator: can't allocate memory")],
)
def test_a_batch_too_large_for_memory_is_halved_with_the_same_result(
    model, clips, monkeypatch, error
):
    paths, sizes = toys.good(clips) * 2, []
    expected = translate.translate(model, paths, **HOW)
    search = translate.beam_search

    def little_memory(llm, prompts, *options):
        sizes.append(len(prompts))
        if len(prompts) > 2:
            raise error
        return search(llm, prompts, *options)

    monkeypatch.setattr(translate, "beam_search", little_memory)
    assert_same(translate.translate(model, paths, **HOW), expected)
    assert sizes[0] == len(paths) and max(size for size in sizes if size <= 2) == 2

    def no_memory(llm, prompts, *options):
        raise error

    monkeypatch.setattr(translate, "beam_search", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        translate.translate(model, paths, **HOW)


def test_clips_that_cannot_be_used_get_an_error_and_change_no_other_clip(model, clips):
    paths = toys.good(clips)
    bad = [clips / name for name in BAD]
    mixed = [clip for pair in zip(bad, paths, strict=True) for clip in pair]
    results = translate.translate(model, mixed, **HOW)
    assert_same(results[1::2], translate.translate(model, paths, **HOW))
    for result, (name, reason) in zip(results[::2], BAD.items(), strict=True):
        assert (result.text, result.score, result.n_best) == ("", None, [])
        assert name in result.error and reason in result.error


def test_a_list_without_a_usable_clip_is_not_an_error(model, clips):
    assert translate.translate(model, [clips / "empty.wav"])[0].error
    assert translate.translate(model, []) == []


def test_the_first_hypothesis_is_the_text_and_n_best_are_kept(model, clips):
    for result in translate.translate(model, toys.good(clips), search=THREE, n_best=2):
        assert len(result.n_best) == 2
        assert result.n_best[0] == {"text": result.text, "score": result.score}


def test_the_task_and_the_language_change_the_prompt(model, clips):
    def scores(**how):
        return [r.score for r in translate.translate(model, toys.good(clips), **how, search=THREE)]

    assert scores() == scores(task="st", source="fr", target="en")
    assert scores() != scores(task="asr")
    assert scores() != scores(source="de")


@pytest.mark.parametrize("training", [True, False])
def test_translation_has_no_dropout_and_keeps_the_training_mode(model, clips, training):
    expected = translate.translate(model, toys.good(clips), **HOW)
    model.train(training)
    assert_same(translate.translate(model, toys.good(clips), **HOW), expected)
    assert model.training == model.llm.training == training


def test_a_waveform_is_translated_like_its_file(model, clips):
    # soundfile.read returns float64.
    waveforms = [load_audio(path).double() for path in toys.good(clips)]
    results = translate.translate(model, waveforms, **HOW)
    expected = translate.translate(model, toys.good(clips), **HOW)
    assert [result.text for result in results] == [result.text for result in expected]
    assert {result.path for result in results} == {"waveform"}


def test_a_waveform_that_cannot_be_used_is_an_error_of_that_clip(model, clips):
    bad = [torch.zeros(0), torch.zeros(2, 99), torch.full((99,), torch.nan)]
    bad.append(torch.ones(99, dtype=torch.int16))  # as floats, it would be 32768 times too loud
    *results, last = translate.translate(model, [*bad, load_audio(clips / "good0.wav")], **HOW)
    assert all("expected a waveform (N,) of finite floats" in r.error for r in results)
    assert last.error is None


def test_change_alters_the_audio_before_it_is_encoded(model, clips):
    paths = toys.good(clips)
    loud = translate.translate(model, [3 * load_audio(path) for path in paths], **HOW)
    changed = translate.translate(model, paths, **HOW, change=lambda audio: 3 * audio)
    assert [r.score for r in changed] == [r.score for r in loud]
    assert changed != translate.translate(model, paths, **HOW)
    short = translate.translate(model, paths, **HOW, change=lambda audio: audio[:0])
    assert all(result.error for result in short)


def test_a_result_is_there_before_later_clips_are_read(model, clips, monkeypatch):
    loaded, load = [], translate.load_audio
    monkeypatch.setattr(translate, "load_audio", lambda path: loaded.append(path) or load(path))
    paths = sorted(toys.good(clips), key=translate.audio_seconds)  # they are read in this order
    results = translate.translate_in_order(model, paths, search=SHORT, batch_size=1)
    for n, result in enumerate(results, start=1):
        assert (result.path, len(loaded)) == (str(paths[n - 1]), n)


def test_clips_are_sorted_in_windows_so_that_the_first_need_not_wait(model, clips, monkeypatch):
    short = clips / "good1.wav"
    loaded, load = [], translate.load_audio
    monkeypatch.setattr(translate, "load_audio", lambda path: loaded.append(path) or load(path))
    results = translate.translate_in_order(
        model, [clips / "good2.wav"] * 33 + [short] * 2, search=SHORT, batch_size=1
    )
    next(results)
    assert short not in loaded


@pytest.mark.parametrize("task", ["asr", "st"])
def test_a_task_that_the_model_was_not_trained_on_is_an_error(model, clips, task):
    others = tuple({"asr", "st"} - {task})
    model.config = SimpleNamespace(**{**vars(model.config), "tasks": others})
    with pytest.raises(ValueError, match=f"task {task}: the model was trained on (st|asr)$"):
        translate.translate(model, toys.good(clips), task)


# --------------------------------------------------------------------------------------- long audio


def test_a_long_clip_is_cut_in_the_middle_of_its_pauses():
    audio = torch.tensor(toys.tone(440, 16000, 10.0)).float()
    for pause in (3.3, 6.5, 8.9):  # seconds
        audio[round(pause * 16000) :][:3200] = 0  # 0.2 s, the window
    pieces = split_at_quiet(audio, 4 * 16000)
    expected = [(0, 54400), (54400, 105600), (105600, 160000)]
    np.testing.assert_allclose(pieces, expected, atol=2)  # a tone may be at zero next to a pause


@pytest.mark.parametrize("n", [0, 1, 2, 999, 1000, 1001, 1002, 2500])
@pytest.mark.parametrize("most", [1, 2, 3, 1000])
@pytest.mark.parametrize("kind", ["silence", "constant", "noise"])
def test_pieces_cover_a_clip_without_a_gap_and_none_is_too_long(n, most, kind):
    noise = torch.randn(n, generator=torch.Generator().manual_seed(n))
    audio = {"silence": torch.zeros(n), "constant": torch.ones(n), "noise": noise}[kind]
    pieces = split_at_quiet(audio, most)
    assert pieces == split_at_quiet(audio.clone(), most)
    assert pieces[0][0] == 0 and pieces[-1][1] == n
    assert all(a[1] == b[0] for a, b in zip(pieces, pieces[1:]))
    assert all(end - start <= most for start, end in pieces)
    assert all(end - start >= most // 2 for start, end in pieces[:-1])
    if n <= most:
        assert len(pieces) == 1


def by_hand(model, path: Path, folder: Path, **how) -> list[translate.Translation]:
    """The pieces of a long clip, written to files of their own and translated as clips."""
    audio, files = load_audio(path), []
    for i, (start, end) in enumerate(split_at_quiet(audio, 30 * 16000)):
        files.append(folder / f"piece{i}.wav")
        soundfile.write(files[-1], audio[start:end].numpy(), 16000, subtype="FLOAT")
    return translate.translate(model, files, **how)


def test_a_long_clip_is_translated_in_pieces_that_cover_it(model, long_clip, tmp_path):
    [result] = translate.translate(model, [long_clip], **HOW)
    hand = by_hand(model, long_clip, tmp_path, **HOW)
    assert len(hand) == 3 and len({piece.text for piece in hand}) == 3
    assert [piece["text"] for piece in result.pieces] == [piece.text for piece in hand]
    assert result.text == " ".join(piece.text for piece in hand) and result.error is None
    assert result.score == pytest.approx(sum(piece.score for piece in hand) / 3, abs=2e-4)
    assert result.n_best == [{"text": result.text, "score": result.score}]

    starts = [piece["start"] for piece in result.pieces]
    ends = [piece["end"] for piece in result.pieces]
    assert starts == [0.0, *ends[:-1]] and ends[-1] == 65.0
    assert ends[:-1] == pytest.approx([21.5, 43.0], abs=0.2), "cut in the pauses"
    assert all(set(piece) == {"start", "end", "text"} for piece in result.pieces)


@pytest.mark.parametrize(
    "task, source, target, space",
    [("st", "en", "ja", ""), ("asr", "fr", "ja", " "), ("asr", "zh-CN", "en", "")],
)
def test_pieces_are_joined_with_the_space_of_the_written_language(
    model, long_clip, task, source, target, space
):
    [result] = translate.translate(model, [long_clip], task, source, target, SearchOptions(1))
    assert result.text == space.join(piece["text"] for piece in result.pieces if piece["text"])


def test_pieces_without_a_word_leave_no_gap():
    texts = ("one", -1.0), ("", -2.0), ("two", -1.5)
    clip = Clip("long.wav")
    clip.pieces = [
        Piece(i, i + 1, hypotheses=[Hypothesis([], score, i, text)])
        for i, (text, score) in enumerate(texts)
    ]
    result = translate.join_pieces(clip, 1, space=" ")
    assert (result.text, result.score, len(result.pieces)) == ("one two", -1.5, 3)
    assert result.tokens == 0 + 1 + 2


@pytest.mark.parametrize("batch_size", [2, 16])
def test_long_short_and_bad_clips_keep_their_order(model, clips, long_clip, batch_size):
    short = toys.good(clips)
    mixed = [long_clip, short[0], clips / "nan.wav", *short[1:], clips / "empty.wav", long_clip]
    results = translate.translate(model, mixed, **HOW, batch_size=batch_size)
    assert [result.path for result in results] == [str(path) for path in mixed]
    assert_same([results[1], *results[3:6]], translate.translate(model, short, **HOW))
    assert_same([results[0], results[-1]], translate.translate(model, [long_clip], **HOW) * 2)
    assert all(result.pieces == [] for result in results[1:-1])
    assert [bool(result.error) for result in results] == [r in (2, 6) for r in range(8)]


def test_only_one_batch_of_audio_is_in_memory(model, clips, long_clip, monkeypatch):
    loaded, seen = [], []
    load = translate.load_audio
    monkeypatch.setattr(translate, "load_audio", lambda path: loaded.append(path) or load(path))
    encode = LLaST.encode_speech

    def watched(self, audio):
        seen.append(len(loaded))
        return encode(self, audio)

    monkeypatch.setattr(LLaST, "encode_speech", watched)
    translate.translate(model, [long_clip, *toys.good(clips)], search=SHORT, batch_size=2)
    assert seen == [2, 4, 5, 5] and loaded[-1] == long_clip, "files decoded before each batch"


def test_a_clip_of_exactly_30_s_is_one_piece(model, tmp_path):
    for name, samples in (("fits", 30 * 1000), ("over", 30 * 1000 + 1)):
        soundfile.write(tmp_path / f"{name}.wav", np.zeros(samples), 1000)
    files = [tmp_path / "fits.wav", tmp_path / "over.wav"]
    fits, over = translate.translate(model, files, search=SHORT)
    assert fits.pieces == [] and len(over.pieces) == 2


# --------------------------------------------------------------------------------------------- BLEU

HYPOTHESES = ["The cat sleeps on the sofa.", "", "he went to the old Market", "Thanks a lot"]
REFERENCES = [
    "The cat sleeps on the couch.",
    "Where is the station?",
    "He went to the old market.",
    "Thank you",
]
CHINESE = ["我们明天去北京。", "他喜欢喝茶"], ["我们明天要去北京。", "她喜欢喝茶。"]
JAPANESE = ["猫は庭で静かに眠る。"], ["猫が庭で静かに眠る。"]


def test_scores_are_sacrebleus():
    scores = score(HYPOTHESES, REFERENCES)
    assert scores["bleu"] == round(sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score, 2)
    lower = sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES], lowercase=True).score
    assert scores["bleu_lc"] == round(lower, 2) > scores["bleu"] > 0
    assert scores["chrf"] == round(sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score, 2)
    assert "case:mixed" in scores["signature"] and "tok:13a" in scores["signature"]
    assert "nc:6" in scores["chrf_signature"]


def test_the_bootstrap_interval_is_that_of_sacrebleu():
    plain, scores = score(HYPOTHESES, REFERENCES), score(HYPOTHESES, REFERENCES, n_bootstrap=50)
    low, high = scores["bleu_interval"]
    assert low < scores["bleu"] < high and "bs:50" in scores["signature"]
    assert "bleu_interval" not in plain and scores["bleu"] == plain["bleu"]
    printed = sacrebleu.BLEU().corpus_score(HYPOTHESES, [REFERENCES], n_bootstrap=50).format()
    mean, half = map(float, re.search(r"μ = ([\d.]+) ± ([\d.]+)", printed).groups())
    assert [low, high] == pytest.approx([mean - half, mean + half], abs=0.011)


def test_an_empty_hypothesis_counts():
    without = [pair for pair in zip(HYPOTHESES, REFERENCES, strict=True) if pair[0]]
    kept, dropped = score(HYPOTHESES, REFERENCES), score(*map(list, zip(*without, strict=True)))
    assert kept["n"] == 4
    assert kept["bleu"] < dropped["bleu"] and kept["chrf"] < dropped["chrf"]


def test_hypotheses_and_references_of_different_number_are_an_error():
    with pytest.raises(ValueError, match="1 hypotheses for 4 references"):
        score(HYPOTHESES[:1], REFERENCES)


def test_chinese_has_the_tokenizer_of_sacrebleu_for_chinese():
    scores = score(*CHINESE, target="zh-CN")
    expected = sacrebleu.corpus_bleu(CHINESE[0], [CHINESE[1]], tokenize="zh").score
    assert scores["bleu"] == round(expected, 2) > score(*CHINESE)["bleu"] == 0
    assert "tok:zh|" in scores["signature"]


@pytest.mark.skipif(not (find_spec("MeCab") and find_spec("ipadic")), reason="no sacrebleu[ja]")
def test_japanese_has_the_tokenizer_mecab():
    scores = score(*JAPANESE, target="ja")
    expected = sacrebleu.corpus_bleu(JAPANESE[0], [JAPANESE[1]], tokenize="ja-mecab").score
    assert scores["bleu"] == round(expected, 2) > 0
    assert "tok:ja-mecab" in scores["signature"]


def test_without_mecab_the_error_names_the_package(without_mecab):
    with pytest.raises(ValueError, match=r'ja-mecab.* pip install "sacrebleu\[ja\]"'):
        score(*JAPANESE, target="ja")


def test_a_missing_mecab_is_reported_before_the_first_clip(without_mecab, monkeypatch):
    monkeypatch.setattr(translate, "translate", None)  # calling it would be a TypeError
    with pytest.raises(ValueError, match="pip install"):
        score_rows(None, [Row(Path("a.wav"), "a", "b", "en", "ja", 1.0)])


# ------------------------------------------------------------------------ the table of scored clips


def test_the_table_has_every_clip_and_names_the_failed_ones(tmp_path, capsys, monkeypatch):
    rows = [Row(Path(f"{i}.mp3"), "dit", text, "fr", "en", 1.0) for i, text in enumerate("abcd")]
    texts = ['she said "no" to me.', "", "two\nlines\tand a tab", '"unbalanced']
    results = [translate.Translation(str(r.path), t, -0.5) for r, t in zip(rows, texts)]
    results[1] = translate.Translation("1.mp3", error="1.mp3: no such file")
    monkeypatch.setattr(translate, "translate", lambda *args, **options: results)
    scores = score_rows(None, rows, tmp_path / "out.tsv")
    assert scores == score(texts, list("abcd")) | {"failed": 1, "low_score": -0.5}
    assert capsys.readouterr().err == "scored as an empty text: 1.mp3: no such file\n"
    with open(tmp_path / "out.tsv", encoding="utf-8", newline="") as file:
        head, *table = csv.reader(file, delimiter="\t")  # the dialect of pandas and spreadsheets
    assert head == ["clip", "reference", "hypothesis", "score", "error"]
    assert [cells[2] for cells in table] == [texts[0], "", "two lines and a tab", texts[3]]
    assert table[1] == ["1.mp3", "b", "", "", "1.mp3: no such file"]


def test_98_percent_of_the_translations_reach_the_low_score(monkeypatch):
    scores = [*torch.linspace(-2, -1, 101).tolist(), None]  # None: a clip with an error
    results = [translate.Translation("a.wav", "a", s, error="" if s else "broken") for s in scores]
    monkeypatch.setattr(translate, "translate", lambda *args, **options: results)
    rows = [Row(Path("a.wav"), "a", "a", "fr", "en", 1.0)] * len(results)
    assert score_rows(None, rows)["low_score"] == -1.98


def test_the_target_chooses_the_tokenizer_of_a_test_set(monkeypatch):
    result = translate.Translation("a.wav", "我们明天去北京。", -0.5)
    monkeypatch.setattr(translate, "translate", lambda *args, **options: [result])
    rows = [Row(Path("a.wav"), "a", "我们明天要去北京。", "en", "zh-CN", 1.0)]
    assert "tok:zh|" in score_rows(None, rows)["signature"]


# ------------------------------------------------------------------------------------- command line


@pytest.fixture
def command(run_main):
    return partial(run_main, translate)


def test_each_clip_gives_one_line(command, quick, model, clips):
    code, lines, err = command(*quick, *toys.good(clips))
    texts = [r.text for r in translate.translate(model, toys.good(clips), search=THREE)]
    assert lines == [f"{path}\t{text}" for path, text in zip(toys.good(clips), texts, strict=True)]
    assert (code, err) == (0, "")


def test_json_has_an_object_for_each_clip(command, quick, clips):
    code, lines, _ = command(*quick, "--json", *toys.good(clips), clips / "empty.wav")
    *objects, bad = map(json.loads, lines)
    assert [o["path"] for o in objects] == [str(path) for path in toys.good(clips)]
    assert all(o["text"] and o["score"] < 0 and o["error"] is None for o in objects)
    assert all(o["pieces"] == [] for o in objects)
    assert bad["text"] == "" and "the file is empty" in bad["error"]
    assert code == 1


def test_n_best_prints_n_lines_with_scores(command, quick, clips):
    code, lines, _ = command(*quick, "--n-best", 3, clips / "good0.wav")
    cells = [line.split("\t") for line in lines]
    assert [cell[0] for cell in cells] == [str(clips / "good0.wav")] * 3
    scores = [float(cell[1]) for cell in cells]
    assert scores == sorted(scores, reverse=True) and code == 0
    code, _, err = command(*quick, "--n-best", 4, clips / "good0.wav")
    assert code == 2 and "--n-best 4 needs at least 4 beams, but --beams is 3" in err


def test_an_answer_with_a_low_score_is_called_unlikely(made, clips, command):
    model = LLaST.from_pretrained(made / "trained")
    results = translate.translate(model, toys.good(clips), search=THREE)
    middle = sorted(result.score for result in results)[1]
    assert not any(result.unlikely for result in results), "a new model has no limit"
    model.config = replace(model.config, max_loss=-middle - 1e-4)
    model.save_pretrained(made / "unsure")
    beams = ("--model", made / "unsure", "--max-new-tokens", 6, "--beams", 3)
    _, lines, _ = command(*beams, *toys.good(clips))
    expected = ["\tunlikely" if result.score <= middle else "" for result in results]
    assert lines == [f"{r.path}\t{r.text}{mark}" for r, mark in zip(results, expected)]
    _, lines, _ = command(*beams, "--json", *toys.good(clips))
    assert [json.loads(line)["unlikely"] for line in lines] == [mark != "" for mark in expected]
    for other in (["--task", "asr"], ["--length-penalty", 0]):  # their scores are other numbers
        _, lines, _ = command(*beams, *other, *toys.good(clips))
        assert not any(line.endswith("unlikely") for line in lines)


def test_a_folder_and_a_list_can_name_clips(command, quick, clips, tmp_path):
    for path in toys.good(clips):
        shutil.copy(path, tmp_path)
    (tmp_path / "notes.md").write_text("no clip")
    (tmp_path / "list.txt").write_text(f"good2.wav\n\n{clips / 'good0.wav'}\n")
    _, lines, _ = command(*quick, tmp_path)
    assert [line.split("\t")[0] for line in lines] == [
        str(tmp_path / path.name) for path in sorted(toys.good(clips))
    ]
    _, lines, _ = command(*quick, tmp_path / "list.txt", clips / "good1.wav")
    assert [line.split("\t")[0] for line in lines] == [
        str(tmp_path / "good2.wav"), str(clips / "good0.wav"), str(clips / "good1.wav"),
    ]  # fmt: skip


@pytest.mark.parametrize("suffix", [".oga", ".aif", ".AIFF", ".au", ".caf", ".w64"])
def test_a_folder_gives_every_format_that_can_be_read(clips, tmp_path, suffix):
    toys.write(tmp_path / f"a{suffix}", np.zeros(1600), format=FORMATS.get(suffix))
    assert translate.audio_paths([str(tmp_path)]) == [tmp_path / f"a{suffix}"]


def test_a_file_of_a_folder_that_must_be_converted_is_an_error(command, quick, clips, tmp_path):
    shutil.copy(clips / "good0.wav", tmp_path)
    (tmp_path / "b.m4a").write_bytes(b"not readable")
    (tmp_path / "notes.md").touch()
    code, lines, err = command(*quick, tmp_path)
    assert code == 1 and len(lines) == 1
    assert err.startswith(f"{tmp_path / 'b.m4a'}: ") and "convert it with ffmpeg -i" in err


@pytest.mark.skipif(os.name == "nt", reason="names are Unicode there")
def test_a_name_that_is_not_utf8_stops_no_other_clip(command, quick, clips, tmp_path):
    odd = os.fsdecode(os.fsencode(tmp_path) + b"/\xe9t\xe9.wav")
    shutil.copy(clips / "good0.wav", odd)
    code, lines, err = command(*quick, odd, clips / "good1.wav")
    assert code in (0, 1) and len(lines) + len(err.splitlines()) == 2
    assert lines[-1].startswith(str(clips / "good1.wav"))
    assert r"\udce9t\udce9.wav" in (lines[0] if code == 0 else err)
    (tmp_path / "list.txt").write_bytes(b"\xe9t\xe9.wav\n")
    assert [str(path) for path in translate.audio_paths([tmp_path / "list.txt"])] == [odd]


@pytest.mark.parametrize("name", ["train", "tools.prepare", "tools.convert", "tools.plan"])
def test_every_command_escapes_what_stdout_cannot_encode(monkeypatch, name):
    module = importlib.import_module(name)
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    monkeypatch.setattr(sys, "argv", [name, "--no-such-option"])
    with pytest.raises(SystemExit):
        module.main()
    assert sys.stdout.errors == "backslashreplace"


def test_output_that_is_not_utf8_is_escaped_and_its_json_is_valid(
    command, quick, clips, tmp_path, monkeypatch
):
    path = tmp_path / "été.wav"
    shutil.copy(clips / "good0.wav", path)
    for flags, check in (
        ([], lambda text: text.startswith(str(tmp_path / r"\xe9t\xe9.wav"))),
        (["--json"], lambda text: json.loads(text)["path"] == str(path)),
    ):
        monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
        assert command(*quick, *flags, path)[0] == 0
        sys.stdout.flush()
        assert check(sys.stdout.buffer.getvalue().decode("ascii"))


def test_one_bad_clip_is_named_and_makes_the_exit_code_1(command, quick, clips):
    code, lines, err = command(*quick, clips / "good0.wav", clips / "empty.wav")
    assert code == 1 and len(lines) == 1
    assert err == f"{clips / 'empty.wav'}: the file is empty\n"


def test_json_of_a_long_clip_has_the_times_of_its_pieces(command, quick, long_clip):
    code, [text], _ = command(*quick, "--json", long_clip)
    clip = json.loads(text)
    assert code == 0 and clip["text"] == " ".join(piece["text"] for piece in clip["pieces"])
    assert clip["pieces"][0]["start"] == 0 and clip["pieces"][-1]["end"] == 65
    _, lines, _ = command(*quick, "--n-best", 2, long_clip)
    assert lines == [f"{long_clip}\t{clip['score']:.3f}\t{clip['text']}"]


def knows(*directions):
    """A stand-in for a model, for what asks about its directions only."""
    return SimpleNamespace(config=SimpleNamespace(directions=directions))


@pytest.mark.parametrize(
    "directions, lang, task, expected",
    [
        (("fr-en",), None, "st", ("fr", "en")),
        (("en-zh-CN",), None, "st", ("en", "zh-CN")),
        (("zh-CN-en",), None, "st", ("zh-CN", "en")),
        (("fr-en", "en-zh-CN"), "en", "st", ("en", "zh-CN")),
        (("fr-en", "en-zh-CN"), "fr", "st", ("fr", "en")),
        (("zh-CN-en", "en-zh-CN"), "zh-CN", "st", ("zh-CN", "en")),
        (("en-de", "en-zh-CN"), "en-de", "st", ("en", "de")),
        (("en-de", "en-zh-CN"), "en-zh-CN", "st", ("en", "zh-CN")),
    ],
)
def test_the_direction_is_the_one_of_lang_or_the_only_one(directions, lang, task, expected):
    assert translate.choose_direction(knows(*directions), lang, Path("run"), task) == expected


def test_a_transcription_takes_any_direction_of_the_language():
    model = knows("en-de", "en-zh-CN", "fr-en")
    for lang in ("en", "en-de"):
        assert translate.choose_direction(model, lang, Path("run"), "asr")[0] == "en"
    only_english = knows("en-de", "en-zh-CN")
    assert translate.choose_direction(only_english, None, Path("run"), "asr")[0] == "en"


@pytest.mark.parametrize(
    "lang, task, answer",
    [
        (None, "st", "--lang is missing; run has en-de, en-zh-CN, fr-en: choose one"),
        ("en", "st", "--lang is en; run has"),
        (None, "asr", "--lang is missing; run has"),
        ("de", "st", "--lang is de; run has en-de, en-zh-CN, fr-en: choose one"),
        ("zh-CN", "st", "--lang is zh-CN; run"),
        ("en-ja", "st", "--lang is en-ja; run"),
        ("french", "st", "--lang is french; "),
    ],
)
def test_an_ambiguous_or_unknown_direction_is_an_error_with_all_directions(lang, task, answer):
    with pytest.raises(ValueError, match=answer):
        translate.choose_direction(knows("en-de", "en-zh-CN", "fr-en"), lang, Path("run"), task)


def test_the_direction_reaches_the_prompt(command, made, clips, monkeypatch):
    toys.save_model(made, made / "outward", ("en-de", "en-zh-CN"))
    prompts_used = []

    def spy(model, paths, task, source, target, *options, **others):
        prompts_used.append((task, source, target))
        return []

    monkeypatch.setattr(translate, "translate_in_order", spy)
    for flags in (["--lang", "en-zh-CN"], ["--lang", "en-de"], ["--lang", "en", "--task", "asr"]):
        assert command("--model", made / "outward", clips / "good0.wav", *flags)[0] == 0
    assert prompts_used[:2] == [("st", "en", "zh-CN"), ("st", "en", "de")]
    assert prompts_used[2][:2] == ("asr", "en")


def test_after_ctrl_c_the_finished_results_are_printed_first(command, quick, clips, monkeypatch):
    longest, load = clips / "good2.wav", translate.load_audio

    def stop(path):
        if path == longest:
            raise KeyboardInterrupt
        return load(path)

    monkeypatch.setattr(translate, "load_audio", stop)
    paths = [longest, clips / "empty.wav", clips / "good0.wav", clips / "good1.wav"]
    code, lines, err = command(*quick, "--batch", 1, *paths)
    assert code == 130
    assert [line.split("\t")[0] for line in lines] == [str(path) for path in paths[2:]]
    assert err == f"{clips / 'empty.wav'}: the file is empty\n\nstopped\n"


def test_out_of_memory_names_the_phase(command, quick, clips, monkeypatch):
    def too_much(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    for where, name, message in (
        (LLaST, "from_pretrained", "out of memory while loading the model; use a smaller model"),
        (translate, "beam_search", "out of memory with one clip; use fewer beams"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, too_much)
            code, _, err = command(*quick, clips / "good0.wav")
        assert code == 2 and message in err and "80 GiB" in err


def test_nan_weights_are_an_error(model, clips):
    with torch.no_grad():
        model.projector.model[4].bias[0] = torch.nan
    with pytest.raises(ValueError, match="computes NaN: its weights are damaged"):
        translate.translate(model, toys.good(clips))


def test_the_end_token_is_counted_if_there_is_one(model, clips, monkeypatch):
    for most in (1, 2, 40):
        [result] = translate.translate(
            model, toys.good(clips)[:1], search=SearchOptions(1, 1.0, most)
        )
        assert result.tokens == most, "this model never ends an answer"
    monkeypatch.setattr(model.tokenizer, "eos_ids", [*range(1300)])
    [result] = translate.translate(model, toys.good(clips)[:1], search=SearchOptions(1, 1.0, most))
    assert (result.tokens, result.text) == (1, ""), "only the end token"


def test_a_name_too_long_for_a_file_is_one_bad_clip(command, quick, clips):
    name = "x" * 300 + ".wav"
    code, lines, err = command(*quick, name, clips / "good0.wav")
    assert (code, len(lines), err) == (1, 1, f"{name}: no such file\n")


def test_mistakes_give_exit_code_2_and_a_message_with_what_to_do(command, quick, clips, made):
    clip = clips / "good0.wav"
    toys.save_model(made, made / "two", ("de-en", "fr-en"))
    empty = made / "empty.txt"
    empty.write_text("\n\n")
    for arguments, answer in (
        (["--model", clips, clip], f"{clips} is not a saved LLaST: it has no llast.json"),
        ([*quick, "--lang", "french", clip], "--lang is french; "),
        ([*quick, "--lang", "de", clip], "--lang is de; "),
        (
            ["--model", made / "two", clip],
            "has de-en, fr-en: choose one",
        ),
        ([*quick, made / "trained"], "has no clips; expected audio"),
        ([*quick, made / "list.txt"], "list.txt"),
        ([*quick, empty], "has no clips"),
        ([*quick, "--lang", "fr,de", clip], "--lang is fr,de; "),
        ([*quick, "--lang", "en", "--task", "asr", clip], "--lang is en; "),
        ([*quick, "--length-penalty", 1000, clip], "--length-penalty is 1000.0; expected -10 to"),
        ([*quick, "--length-penalty", "nan", clip], "--length-penalty is nan; expected -10 to"),
    ):
        code, lines, err = command(*arguments)
        assert (code, lines) == (2, []), arguments
        assert err.startswith("translate.py: ") and answer in err and err.count("\n") == 1


def test_without_model_the_newest_finished_run_or_the_included_model_is_used_and_named(
    command, made, clips, tmp_path, monkeypatch
):
    monkeypatch.setattr(translate, "HERE", tmp_path)
    toys.save_model(made, tmp_path / "tiny" / "model")
    code, lines, err = command("--max-new-tokens", 2, clips / "good0.wav")
    assert code == 0 and len(lines) == 1
    assert err == f"no --model: using {tmp_path / 'tiny' / 'model'}\n"

    toys.save_model(made, tmp_path / "runs" / "not-finished")
    for age, name in enumerate(["b", "c", "a"]):
        toys.save_model(made, tmp_path / "runs" / name)
        (tmp_path / "runs" / name / "results.json").write_text("{}")
        os.utime(tmp_path / "runs" / name / "results.json", (10_000 - age, 10_000 - age))
    code, lines, err = command("--max-new-tokens", 2, clips / "good0.wav")
    assert code == 0 and len(lines) == 1
    assert err == f"no --model: using {tmp_path / 'runs' / 'b'}\n"
