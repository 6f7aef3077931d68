"""From audio files to text with a trained LLaST: beam search, translation, BLEU, the command line.

    python translate.py --model runs/fr clip.wav other.mp3

Beam search follows the rules of transformers; benchmarks/compare.py compares the results. BLEU and
chrF are computed by sacreBLEU. On a tiny model, tests/test_translate.py compares beam search with
an exhaustive search over all answers.

Sizes: B clips, W beams, P positions that the LLM sees (here those of the prompt), V vocabulary,
D LLM width, N samples (16 kHz), T text tokens, S audio positions.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import sacrebleu
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import Row, end_id, parse_directions, prompt_for, prompt_ids, read_corpus, write_table
from llama import Cache, Llama
from llast import LLaST, explain_out_of_memory, pick_device
from lora import merge_lora
from whisper_encoder import MAX_SECONDS, SAMPLE_RATE, AudioError, audio_seconds, load_audio

HERE = Path(__file__).parent
# Suffixes of audio files. Those of the second line cannot be read: their error names the command
# that converts them.
AUDIO_FILES = ".wav .flac .ogg .oga .opus .mp3 .mp2 .aif .aiff .au .caf .w64 .sph".split()
AUDIO_FILES += ".m4a .mp4 .aac .webm .wma .amr .3gp .mka .mkv .mov".split()

# Languages without spaces between words, and the tokenizer of sacreBLEU for each. All other
# languages use 13a. The original uses the same tokenizers, and BLEU scores with different
# tokenizers cannot be compared.
TOKENIZERS = {"zh-CN": "zh", "ja": "ja-mecab"}


# -------------------------------------------------------------------------------------- beam search


@dataclass(frozen=True)
class SearchOptions:
    """Settings of beam_search."""

    beams: int = 5  # W; one beam is greedy search
    length_penalty: float = 1.0  # above 1 prefers longer answers, below 1 shorter ones
    max_new_tokens: int = 256  # length limit of an answer with its end token


@dataclass
class Hypothesis:
    """A finished answer: token ids without the end token, and the score that ranks it."""

    ids: list[int]
    score: float  # log-probability / length ** length_penalty
    length: int  # tokens, the end token included
    text: str = ""  # the decoded ids


class FinishedHypotheses:
    """The W best hypotheses of one clip."""

    def __init__(self, options: SearchOptions):
        self.options = options
        self.best: list[Hypothesis] = []
        self.done = False  # True when the search for this clip has stopped

    def score(self, log_prob: float, length: int) -> float:
        """Return log_prob / length ** length_penalty.

        Each further token makes the log-probability smaller. Without the division, short answers
        would almost always win.
        """
        return log_prob / length**self.options.length_penalty

    def add(self, ids: list[int], log_prob: float, length: int):
        """Keep a hypothesis if it is one of the W best and the clip is not done."""
        if log_prob > -torch.inf and not self.done:
            self.best.append(Hypothesis(ids, self.score(log_prob, length), length))
            self.best.sort(key=lambda hypothesis: -hypothesis.score)
            del self.best[self.options.beams :]

    def check_done(self, best_beam: float, length: int):
        """Stop if there are W hypotheses and the best beam, ended now, would beat none of them.

        A longer answer could still win, because its log-probability is divided by a larger length.
        transformers stops at the same point (early_stopping=False).
        """
        if len(self.best) == self.options.beams:
            self.done |= self.score(best_beam, length) <= self.best[-1].score


def prefill(llm: Llama, prompts: list[Tensor]) -> tuple[Tensor, Cache, Tensor]:
    """Run the LLM once over each prompt (P, D).

    Returns the last state of each prompt (B, D), the KV cache, and the padding mask (B, P).
    """
    B, device = len(prompts), prompts[0].device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    x = pad_sequence(prompts, batch_first=True)  # (B, P, D)
    is_real = torch.arange(x.shape[1], device=device) < lengths[:, None]  # (B, P)
    # The state at the last position of a prompt predicts the first token of the answer. After this
    # position there is only padding, so its index is lengths - 1.
    state, cache = llm.hidden(x, selection=(torch.arange(B, device=device), lengths - 1))  # (B, D)
    return state, cache, is_real


@torch.inference_mode()
def beam_search(
    llm: Llama, prompts: list[Tensor], end_ids: list[int], options: SearchOptions = SearchOptions()
) -> list[list[Hypothesis]]:
    """Return the W best answers to each of B prompts of embeddings (P, D), the best one first.

    A beam is an unfinished answer. Each step extends the W beams of a clip by one token and keeps
    the W best results. So one beam may be dropped, and another one extended twice. Many programs
    give each beam its own row of the KV cache, and copy rows after each step. Here the W beams of a
    clip share one row: the keys and values of the prompt once, then W more for each step, one for
    the new token of each beam. The LLM reads these W tokens in one call, all at the same position.

    The keys stay where they are. The mask `can_attend` says which of them a beam sees: the prompt
    without padding, and the beam's own tokens. A new beam copies the mask of the beam that it
    extends, and also sees its own new key. The mask of one clip with 2 beams:

                                     prompt    step 1     step 2      step 3
                                     p p p     the  a     cat  dog    ran  slept
        step 1  beam "the"           1 1 1      1   0
                beam "a"             1 1 1      0   1
        step 2  beam "the cat"       1 1 1      1   0      1    0
                beam "the dog"       1 1 1      1   0      0    1
        step 3  beam "the dog ran"   1 1 1      1   0      0    1      1     0
                beam "the cat slept" 1 1 1      1   0      1    0      0     1

    Step 2: both new beams extend "the", so both copy its mask. No beam sees the key of "a" again.
    Step 3: the best beam extends "the dog", so the masks change places. The keys do not.
    """
    # 1. Read each prompt once, for all of its beams.
    W, device = options.beams, prompts[0].device
    state, cache, is_real = prefill(llm, prompts)
    lengths = is_real.sum(dim=1)  # (B,)
    can_attend = is_real[:, None].repeat(1, W, 1)  # (B, W, P)
    state = state[:, None].repeat(1, W, 1)  # (B, W, D)
    answers = torch.empty(len(prompts), W, 0, dtype=torch.long, device=device)  # (B, W, 0)
    # The log-probability of each beam: the sum over its tokens. At first all beams of a clip are
    # equal, so only the first one may be extended.
    beam_total = torch.tensor([0.0] + [-torch.inf] * (W - 1), device=device).repeat(len(prompts), 1)
    finished = [FinishedHypotheses(options) for _ in prompts]
    # The clip of each row. Rows of clips that are done are removed later.
    clip_of = list(range(len(prompts)))
    end_tokens = torch.tensor(end_ids, device=device)

    for length in range(1, options.max_new_tokens + 1):
        # 2. Extend every beam by every token, and take the best extensions, sorted. `parent`
        # is the index of the beam that an extension continues.
        log_probs = llm.logits(state).float().log_softmax(-1)  # (B, W, V)
        total, parent, token = extend(beam_total, log_probs, len(end_ids))

        # 3. An extension with an end token is a hypothesis if it is one of the W best. These
        # are the first W columns, because the columns are sorted.
        is_end = torch.isin(token, end_tokens)
        for b, i in is_end[:, :W].nonzero().tolist():
            finished[clip_of[b]].add(answers[b, parent[b, i]].tolist(), total[b, i].item(), length)

        # 4. The W best extensions without an end token are the new beams. To find them, sort
        # 0 (no end) before 1 (end); a stable sort keeps the best ones first. If every token of the
        # vocabulary is an end token, fewer than W are left, and -inf marks the missing ones.
        unfinished = is_end.to(torch.int8).argsort(dim=1, stable=True)[:, :W]
        beam_total = total.masked_fill(is_end, -torch.inf).gather(1, unfinished)  # (B, W)
        token, parent = token.gather(1, unfinished), parent.gather(1, unfinished)
        answers = torch.cat([select_beams(answers, parent), token[..., None]], 2)  # (B, W, length)
        can_attend = select_beams(can_attend, parent)
        for clip, best_beam in zip(clip_of, beam_total[:, 0].tolist(), strict=True):
            finished[clip].check_done(best_beam, length)
        if length == options.max_new_tokens or all(hypotheses.done for hypotheses in finished):
            break

        # 5. Run the LLM over the new tokens: W tokens in each row, all at the same position.
        rows = [b for b, clip in enumerate(clip_of) if not finished[clip].done]
        # Removing rows copies the cache, so do it only when at least half of the clips are done.
        if 2 * len(rows) <= len(clip_of):
            cache.keep(rows)
            clip_of = [clip_of[b] for b in rows]
            beam_total, answers, token = beam_total[rows], answers[rows], token[rows]
            can_attend, lengths = can_attend[rows], lengths[rows]
        # Of the W new keys, each beam sees only its own.
        own_key = torch.eye(W, dtype=torch.bool, device=device).repeat(len(clip_of), 1, 1)
        can_attend = torch.cat([can_attend, own_key], dim=2)
        positions = (lengths + length - 1)[:, None].repeat(1, W)  # (B, W)
        state, cache = llm.hidden(llm.embed(token), cache, positions, can_attend)  # (B, W, D)

    # At the length limit, beams become hypotheses, too. Clips that are done ignore them.
    for b, clip in enumerate(clip_of):
        for ids, log_prob in zip(answers[b].tolist(), beam_total[b].tolist(), strict=True):
            finished[clip].add(ids, log_prob, len(ids))
    return [hypotheses.best for hypotheses in finished]


def extend(beam_total: Tensor, log_probs: Tensor, n_ends: int) -> tuple[Tensor, Tensor, Tensor]:
    """Extend every beam by every token. Return the best extensions, the best one first.

    beam_total (B, W), log_probs (B, W, V) -> log-probability, beam and new token of the extensions,
    three times (B, (n_ends+1)*W). This number is enough: at most n_ends*W extensions have an end
    token, so at least W do not.
    """
    B, W, V = log_probs.shape
    totals = (beam_total[..., None] + log_probs).flatten(1)  # (B, W*V)
    best, index = totals.topk(min((n_ends + 1) * W, W * V))  # (B, (n_ends+1)*W)
    return best, index // V, index % V


def select_beams(x: Tensor, parent: Tensor) -> Tensor:
    """Copy to each new beam the values of the beam that it extends. x (B, W, n), parent (B, W)"""
    return x.gather(1, parent[..., None].expand(-1, -1, x.shape[2]))  # (B, W, n)


# -------------------------------------------------------------------------- from clips to sentences


@dataclass
class Translation:
    """The result for one clip: a text with its score, or an error."""

    path: str
    text: str = ""
    score: float | None = None  # see Hypothesis.score; for a long clip the mean of its pieces
    tokens: int = 0  # of the text, end tokens included
    n_best: list[dict] = field(default_factory=list)  # text and score, the best one first
    unlikely: bool = False  # the loss is above config.max_loss: silence or unknown words?
    error: str | None = None
    # Only for a clip over 30 s: start (in seconds), end and text of each piece.
    pieces: list[dict] = field(default_factory=list)


@dataclass
class Piece:
    """A part of a clip, at most 30 s, that the encoder can read. A short clip is one piece."""

    start: int  # first sample
    end: int  # last sample + 1
    audio: Tensor | None = None  # (N,), None after the piece was translated
    hypotheses: list[Hypothesis] = field(default_factory=list)


class Clip:
    """A file or a waveform (N,), its pieces, and the error if it cannot be used."""

    def __init__(self, audio: Path | str | Tensor):
        self.audio, self.is_waveform = audio, isinstance(audio, Tensor)
        self.name = "waveform" if self.is_waveform else str(audio)
        self.pieces: list[Piece] = []
        self.error: str | None = None

    def seconds(self) -> float:
        if self.is_waveform:
            return self.audio.numel() / SAMPLE_RATE
        try:
            return audio_seconds(self.audio)
        except AudioError:  # load_pieces reports it
            return 0.0

    def load(self, change: Callable | None) -> Tensor:
        audio = self.audio if self.is_waveform else load_audio(self.audio)
        audio = change(audio) if change else audio
        is_waveform = audio.dim() == 1 and len(audio) > 0 and audio.is_floating_point()
        if not is_waveform or not audio.isfinite().all():
            raise AudioError(self.name, "expected a waveform (N,) of finite floats")
        return audio.float()

    def is_finished(self) -> bool:
        return bool(self.error or (self.pieces and all(piece.hypotheses for piece in self.pieces)))


def split_at_quiet(audio: Tensor, max_samples: int) -> list[tuple[int, int]]:
    """Cut a long clip at quiet places into pieces of at most `max_samples` samples.

    (N,) -> start and end of each piece. To find a cut, look at the second half of the next
    `max_samples` samples, find the quietest 0.2 s there, and cut in the middle of it.
    """
    width = min(SAMPLE_RATE // 5, max_samples - max_samples // 2)  # 0.2 s; less only in tests
    pieces, start = [], 0
    while len(audio) - start > max_samples:
        first = start + max_samples // 2
        # The energy of any 0.2 s is the difference of two values of the running sum.
        energy = audio[first : start + max_samples].double().square().cumsum(dim=0)
        energy = torch.nn.functional.pad(energy, (1, 0))
        loudness = energy[width:] - energy[:-width]
        # If several places are equally quiet, take the last one: this gives fewer pieces.
        last_minimum = len(loudness) - 1 - int(loudness.flip(0).argmin())
        cut = first + last_minimum + (width + 1) // 2
        pieces.append((start, cut))
        start = cut
    return [*pieces, (start, len(audio))]


def load_pieces(clips: list[Clip], batch_size: int, progress: bool, change) -> Iterator[Piece]:
    """Yield the pieces of all clips. Clips of similar length follow each other: less padding.

    To sort the clips, the length of each file is read first. A file is decoded only when it is
    needed, so memory holds the audio of one batch and one file.
    """
    window = 32 * batch_size  # sort this many clips at a time
    windows = (clips[i : i + window] for i in range(0, len(clips), window))
    ordered = (clip for window in windows for clip in sorted(window, key=Clip.seconds))
    # None: tqdm shows no progress bar if stderr is not a terminal
    is_hidden = None if progress else True
    for clip in tqdm(ordered, total=len(clips), unit="clip", leave=False, disable=is_hidden):
        try:
            audio = clip.load(change)
            cuts = split_at_quiet(audio, MAX_SECONDS * SAMPLE_RATE)
            clip.pieces = [Piece(start, end, audio[start:end]) for start, end in cuts]
        except AudioError as error:
            clip.error = str(error)
        yield from clip.pieces


def ids_of_prompt(model: LLaST, task: str, source: str, target: str) -> Tensor:
    """Token ids of the prompt, with AUDIO_ID at the place of the speech. -> (T,)"""
    prompt = prompt_for(task, source, target, model.config.template)
    return torch.tensor(prompt_ids(prompt, model.tokenizer)).to(model.device)


def end_ids_of(model: LLaST) -> list[int]:
    """Ids of the tokens that end an answer: the end tokens of the LLM and that of the template."""
    return sorted({*model.tokenizer.eos_ids, end_id(model.config.template, model.tokenizer)})


@torch.inference_mode()
def answer(model: LLaST, ids: Tensor, inputs: list, embed, search) -> list[list[Hypothesis]]:
    """Return the hypotheses for each input, the best one first.

    `embed` turns the inputs into embeddings (S, D) for the place of the speech: for audio it is
    model.encode_speech, and tools/evaluate.py also embeds texts. If a batch does not fit into
    memory, its two halves are computed one after the other. Only rounding can differ.
    """
    try:
        with explain_out_of_memory("with one clip", "use fewer beams or shorter answers"):
            at = int(ids.argmin())  # the place of AUDIO_ID, the only negative id
            prompts = [model.splice(ids, speech, at) for speech in embed(inputs)]
            answers = beam_search(model.llm, prompts, end_ids_of(model), search)
    except torch.OutOfMemoryError:
        if len(inputs) == 1:
            raise
        answers = None
    if answers is None:  # not in the except block: there the error keeps the tensors in memory
        half = len(inputs) // 2
        first = answer(model, ids, inputs[:half], embed, search)
        return first + answer(model, ids, inputs[half:], embed, search)
    if not all(answers):  # no comparison with NaN is true, so FinishedHypotheses.add keeps nothing
        raise ValueError("the model computes NaN: its weights are damaged; copy or train it again")
    for hypothesis in (hypothesis for best in answers for hypothesis in best):
        hypothesis.text = model.tokenizer.decode(hypothesis.ids)
        hypothesis.score = round(hypothesis.score, 4)
    return answers


def join_pieces(clip: Clip, n_best: int, space: str, max_loss=torch.inf) -> Translation:
    """Join the best texts of the pieces of a clip. Its score is the mean of their scores.

    Each piece counts equally, whatever its length is.
    """
    if clip.error:
        return Translation(clip.name, error=clip.error)
    best = [piece.hypotheses[0] for piece in clip.pieces]
    text = space.join(hypothesis.text for hypothesis in best if hypothesis.text)
    score = round(sum(hypothesis.score for hypothesis in best) / len(best), 4)
    result = Translation(clip.name, text, score, sum(hypothesis.length for hypothesis in best))
    result.unlikely = -score > max_loss
    hypotheses = clip.pieces[0].hypotheses[:n_best] if len(best) == 1 else [result]
    result.n_best = [{"text": h.text, "score": h.score} for h in hypotheses]
    for piece in clip.pieces if len(best) > 1 else ():
        times = {"start": piece.start / SAMPLE_RATE, "end": piece.end / SAMPLE_RATE}
        result.pieces.append(times | {"text": piece.hypotheses[0].text})
    return result


def translate_in_order(
    model: LLaST,
    clips: list,
    task: str = "st",
    source: str = "fr",
    target: str = "en",
    search: SearchOptions = SearchOptions(),
    n_best: int = 1,
    batch_size: int = 16,
    progress: bool = False,
    change: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[Translation]:
    """Translate (task "st") or transcribe ("asr") clips. Yield the results in the order of `clips`.

    A result is yielded when it and all earlier ones are finished. Because 32 batches of clips are
    sorted by length together, the first result can take a while.

    A clip is a path or a waveform (N,) at 16 kHz, of any length. `change` is a function that alters
    a waveform before it is encoded. If a clip cannot be used, its result has an error, and the
    others are translated. A clip over 30 s has only one hypothesis: the best texts of its pieces,
    joined. After Ctrl-C, the finished results are yielded before the program stops.
    """
    if task not in model.config.tasks:
        raise ValueError(f"task {task}: the model was trained on {', '.join(model.config.tasks)}")
    ids = ids_of_prompt(model, task, source, target)
    space = "" if (source if task == "asr" else target) in TOKENIZERS else " "
    # max_loss was measured with translations, whose scores were divided by the plain length.
    is_comparable = task == "st" and search.length_penalty == 1
    details = n_best, space, model.config.max_loss if is_comparable else torch.inf
    waiting = [Clip(clip) for clip in clips]  # clips whose result is not yielded yet, in order
    pieces = load_pieces([*waiting], batch_size, progress, change)  # a copy: `waiting` shrinks
    was_training = model.training
    model.eval()
    try:
        while batch := list(islice(pieces, batch_size)):
            answers = answer(model, ids, [p.audio for p in batch], model.encode_speech, search)
            for piece, hypotheses in zip(batch, answers, strict=True):
                piece.hypotheses, piece.audio = hypotheses, None
            while waiting and waiting[0].is_finished():
                yield join_pieces(waiting.pop(0), *details)
        # Clips that are left here have errors and come after the last batch.
        yield from (join_pieces(clip, *details) for clip in waiting)
    except KeyboardInterrupt:
        yield from (join_pieces(clip, *details) for clip in waiting if clip.is_finished())
        raise
    finally:
        model.train(was_training)


def translate(*args, **options) -> list[Translation]:
    """Return the results of translate_in_order as a list. The arguments are the same."""
    return list(translate_in_order(*args, **options))


# --------------------------------------------------------------------------------------------- BLEU

FIGURES = {"bleu": "BLEU", "bleu_lc": "lower-cased", "chrf": "chrF", "wer": "WER", "cer": "CER"}


def metrics(target: str) -> dict:
    """Return sacreBLEU's metrics for a target language: BLEU, BLEU of lower-cased text, chrF."""
    tokenizer = TOKENIZERS.get(target, "13a")
    try:
        bleu, lower = (sacrebleu.BLEU(tokenize=tokenizer, lowercase=lc) for lc in (False, True))
    except RuntimeError as error:
        raise ValueError(f'{target} needs {tokenizer}: pip install "sacrebleu[ja]"') from error
    return {"bleu": bleu, "bleu_lc": lower, "chrf": sacrebleu.CHRF()}


def score(hypotheses: list, references: list, target: str = "en", n_bootstrap: int = 0) -> dict:
    """Return BLEU, BLEU of lower-cased text and chrF of a corpus, with sacreBLEU's signatures.

    With n_bootstrap (1000 is usual), "bleu_interval" is [low, high], the 95 % confidence interval.
    sacreBLEU estimates it from the BLEU of n_bootstrap random samples of the sentences.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references")
    named = metrics(target)
    scores = {k: round(m.corpus_score(hypotheses, [references]).score, 2) for k, m in named.items()}
    if n_bootstrap > 1:
        result = named["bleu"].corpus_score(hypotheses, [references], n_bootstrap)
        # sacreBLEU has no public names for the mean and the half width of the interval.
        scores["bleu_interval"] = [round(result._mean + d, 2) for d in (-result._ci, result._ci)]
    scores["signature"] = str(named["bleu"].get_signature())
    scores["chrf_signature"] = str(named["chrf"].get_signature())
    return scores | {"n": len(references)}


def read_splits(corpus: Path, source: str, target: str, wanted=()) -> dict[str, list[Row]]:
    """Return {split: rows} of a direction.

    Print the rows that cannot be used: those of the splits `wanted`, or of all splits.
    """
    splits, unusable = read_corpus(corpus, source, target)
    reasons = [f"{split}: {reason}" for split, reason in unusable if split in (wanted or splits)]
    for reason in reasons[:5]:
        print(f"unusable row in {reason}", file=sys.stderr)
    if reasons:
        print(f"{source}-{target}: unusable rows (up to 5 shown): {len(reasons)}", file=sys.stderr)
    return splits


def score_rows(model, rows: list, tsv=None, search=SearchOptions(), translator=None, **options):
    """Translate rows of one direction and score the translations. -> dict

    "low_score" is the score that 98 % of the translations reach. `translator` is a function that is
    used instead of `translate`, for example to divide the clips over several GPUs.
    """
    source, target = rows[0].source, rows[0].target
    metrics(target)  # report a missing package before the long work
    paths, references = [row.path for row in rows], [row.translation for row in rows]
    results = (translator or translate)(model, paths, "st", source, target, search, **options)
    counts = {"failed": write_results(rows, references, results, tsv)}
    scores = torch.tensor([result.score for result in results if not result.error] or [-100.0])
    counts["low_score"] = round(scores.quantile(0.02).item(), 4)
    return score([r.text for r in results], references, target) | counts


def write_results(rows: list[Row], references: list, results: list, tsv: Path | None) -> int:
    """Write one line per clip to `tsv`, print the errors, and return the number of failed clips.

    A clip that failed counts as an empty hypothesis: without it the score would be too good.
    """
    if tsv:
        cells = [
            (row.path.name, reference, result.text, result.score, result.error)
            for row, reference, result in zip(rows, references, results, strict=True)
        ]
        write_table(tsv, ("clip", "reference", "hypothesis", "score", "error"), cells)
    errors = [result.error for result in results if result.error]
    for error in errors:
        print(f"scored as an empty text: {error}", file=sys.stderr)
    return len(errors)


def describe(direction: str, scores: dict) -> str:
    """Return one line with the scores of a direction and their signature."""
    figures = [f"{name} {scores[key]:.1f}" for key, name in FIGURES.items() if key in scores]
    return f"{direction} on {scores['n']} clips: {', '.join(figures)}  ({scores['signature']})"


# ------------------------------------------------------------------------------------- command line


def audio_paths(arguments: list[str]) -> list[Path]:
    """Return the paths of the clips in files, folders, and .txt files with one path per line."""
    paths = []
    for argument in map(Path, arguments):
        clips = [argument]
        if os.path.isdir(argument):  # Path.is_dir raises an error for a name that is too long
            clips = [f for f in sorted(argument.iterdir()) if f.suffix.lower() in AUDIO_FILES]
        elif argument.suffix == ".txt":  # surrogateescape keeps names that are not UTF-8
            lines = argument.read_text("utf-8-sig", "surrogateescape").splitlines()
            clips = [argument.parent / line.strip() for line in lines if line.strip()]
        if not clips:
            raise ValueError(f"{argument} has no clips; expected audio such as .wav, .mp3, .flac")
        paths += clips
    return paths


def choose_direction(model: LLaST, lang: str | None, folder: Path, task: str) -> tuple[str, str]:
    """Return the (source, target) of `lang`, such as "fr" or "en-de".

    If `lang` is None, return the only direction of the model. For the task "asr" the target does
    not matter, so any trained direction with this source is used.
    """
    trained = parse_directions(",".join(model.config.directions))
    fitting = [pair for pair in trained if lang in (None, pair[0], "-".join(pair))]
    if task == "asr":
        fitting = list(dict(fitting).items())  # one direction for each source
    if len(fitting) != 1:
        names = ", ".join(model.config.directions)
        raise ValueError(f"--lang is {lang or 'missing'}; {folder} has {names}: choose one")
    return fitting[0]


def add_options(parser: argparse.ArgumentParser):
    """Add the options of both translate.py and tools/evaluate.py."""
    add = parser.add_argument
    add("--model", type=Path, help="folder of a trained model [newest in runs/, or tiny/model]")
    add("--beams", type=int, default=5, help="number of beams [5]; 1 is greedy search")
    add("--length-penalty", type=float, default=1.0, help="above 1 prefers longer answers [1]")
    add("--max-new-tokens", type=int, default=256, help="longest answer, in tokens [256]")
    add("--batch", type=int, default=16, help="clips in a batch [16]")
    add("--json", action="store_true", help="print one JSON object per line")
    add("--dtype", choices=("float32", "bfloat16"), help="precision of the frozen weights")
    add("--compile", action="store_true", help="compile the layers; on a CPU this needs g++")
    add("--encoder", type=Path, help="new folder of the encoder, if it was moved")
    add("--llm", type=Path, help="new folder of the LLM, if it was moved")


def check_options(args: argparse.Namespace) -> SearchOptions:
    """Check what argparse cannot check: values and combinations. Return the search options."""
    for name in ("beams", "max_new_tokens", "n_best", "batch"):
        if (value := getattr(args, name, 1)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected 1 or more")
    if not abs(args.length_penalty) <= 10:
        raise ValueError(f"--length-penalty is {args.length_penalty}; expected -10 to 10")
    if (n := getattr(args, "n_best", 1)) > args.beams:
        raise ValueError(f"--n-best {n} needs at least {n} beams, but --beams is {args.beams}")
    return SearchOptions(args.beams, args.length_penalty, args.max_new_tokens)


def load_model(args: argparse.Namespace) -> tuple[LLaST, Path]:
    """Load the trained model and merge its LoRA. Return it with its folder."""
    folder = args.model
    if not folder:
        runs = (HERE / "runs").glob("*/results.json")  # written by finished runs
        newest = max(runs, key=lambda file: file.stat().st_mtime, default=None)
        folder = newest.parent if newest else HERE / "tiny" / "model"
        print(f"no --model: using {folder}", file=sys.stderr)
    device, dtype, _ = pick_device(args.dtype)
    with explain_out_of_memory("while loading the model", "use a smaller model"):
        model = LLaST.from_pretrained(folder, args.encoder, args.llm, device, dtype)
        merge_lora(model, delete_lora=True)
    if args.compile:
        model.compile_layers()
    return model, folder


def print_json(value: dict, file=None):
    """Print an object on one line. If the output is not UTF-8, escape all but ASCII characters."""
    is_utf8 = (file or sys.stdout).encoding.lower().replace("-", "") == "utf8"
    tqdm.write(json.dumps(value, ensure_ascii=not is_utf8), file)


def show(result: Translation, as_json: bool, n_best: int = 1):
    """Print one line for a clip, or one line for each of its n_best hypotheses.

    If the best hypothesis has a low score, the lines end with a tab and the word "unlikely".
    """
    mark = "\tunlikely" if result.unlikely else ""
    if as_json:
        print_json(asdict(result))
    elif result.error:
        tqdm.write(result.error, sys.stderr)
    else:
        for best in result.n_best:
            score = f"{best['score']:.3f}\t" if n_best > 1 else ""
            tqdm.write(f"{result.path}\t{score}{' '.join(best['text'].split())}{mark}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Translate or transcribe with a trained LLaST.")
    add = parser.add_argument
    add("audio", nargs="+", help="audio files, folders, or .txt files with one path per line")
    add("--lang", help="direction, such as fr (into English) or en-de, if the model has several")
    add("--task", choices=("st", "asr"), default="st", help="translate [st] or transcribe (asr)")
    add("--n-best", type=int, default=1, help="hypotheses to print for each clip up to 30 s [1]")
    add_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    search = check_options(args)
    paths = audio_paths(args.audio)
    model, folder = load_model(args)
    direction = choose_direction(model, args.lang, folder, args.task)
    options = {"batch_size": args.batch, "n_best": args.n_best, "progress": len(paths) > args.batch}
    failed = False
    for result in translate_in_order(model, paths, args.task, *direction, search, **options):
        show(result, args.json, args.n_best)
        failed = failed or result.error is not None
    return 1 if failed else 0


def run_command(name: str, run: Callable, args: argparse.Namespace) -> int:
    """Run a command. Return its exit code: 2 after an error, 130 after Ctrl-C."""
    # Print each line at once. Escape characters that stdout cannot encode, such as \u4e2d.
    sys.stdout.reconfigure(errors="backslashreplace", line_buffering=True)
    try:
        return run(args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"{name}: {error}", file=sys.stderr)
        return 2


def main() -> int:
    return run_command("translate.py", run, build_parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
