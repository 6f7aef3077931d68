"""From audio files to text with a trained LLaST: beam search, translation, BLEU, the command line.

    python translate.py --model runs/fr clip.wav other.mp3

The rules of beam search are those of transformers, so both give the same hypotheses. Scores are
those of sacreBLEU. tests/test_translate.py compares beam search with the search of all answers.

Sizes: B clips, W beams, P positions of a prompt, V vocabulary, D LLM width, N samples (16 kHz),
T text tokens, S audio positions.
"""

import argparse
import json
import os
import shlex
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
# Suffixes of the files that libsndfile can read, and of those that must be converted first.
AUDIO_FILES = tuple(".wav .flac .ogg .oga .opus .mp3 .mp2 .aif .aiff .au .caf .w64 .sph".split())
OTHER_AUDIO_FILES = tuple(".m4a .mp4 .aac .webm .wma .amr .3gp .mka .mkv .mov".split())

# Languages without spaces between words, and the tokenizer of sacreBLEU for each. The others have
# the tokenizer 13a. The original has the same ones. BLEU with another tokenizer is not comparable.
TOKENIZERS = {"zh-CN": "zh", "ja": "ja-mecab"}


# -------------------------------------------------------------------------------------- beam search


@dataclass(frozen=True)
class SearchOptions:
    """The options of beam search."""

    beams: int = 5  # W; one beam is greedy search
    length_penalty: float = 1.0  # above 1 favours longer answers
    max_new_tokens: int = 256  # longest answer, its end token included


@dataclass
class Hypothesis:
    """A finished answer: token ids without the end token, and the score that ranks it."""

    ids: list[int]
    score: float  # log-probability / length ** length_penalty
    length: int  # tokens, the end token included
    text: str = ""  # the decoded ids


class Finished:
    """The best W finished hypotheses of one clip."""

    def __init__(self, options: SearchOptions):
        self.options = options
        self.best: list[Hypothesis] = []
        self.done = False

    def score(self, log_prob: float, length: int) -> float:
        """Divide by the length, because each further token makes the log-probability smaller."""
        return log_prob / length**self.options.length_penalty

    def add(self, ids: list[int], log_prob: float, length: int):
        """Keep a hypothesis if it is among the best W and the clip is not done."""
        if log_prob > -torch.inf and not self.done:
            self.best.append(Hypothesis(ids, self.score(log_prob, length), length))
            self.best.sort(key=lambda hypothesis: -hypothesis.score)
            del self.best[self.options.beams :]

    def check_done(self, best_running: float, length: int):
        """The clip is done if no running beam, ending now, would be among the best W."""
        if len(self.best) == self.options.beams:
            self.done |= self.score(best_running, length) <= self.best[-1].score


def read_prompts(llm: Llama, prompts: list[Tensor]) -> tuple[Tensor, Cache, Tensor]:
    """Run the LLM once over each prompt (P, D).

    Returns the last state of each prompt (B, D), the KV cache, and the padding mask (B, P).
    """
    B, device = len(prompts), prompts[0].device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    x = pad_sequence(prompts, batch_first=True)  # (B, P, D)
    is_real = torch.arange(x.shape[1], device=device) < lengths[:, None]  # (B, P)
    # The state at the last position of a prompt predicts the first token of the answer. Behind it
    # there is only padding, so its index is lengths - 1.
    last, cache = llm.hidden(x, selection=(torch.arange(B, device=device), lengths - 1))  # (B, D)
    return last, cache, is_real


@torch.inference_mode()
def beam_search(
    llm: Llama, prompts: list[Tensor], ends: list[int], options: SearchOptions = SearchOptions()
) -> list[list[Hypothesis]]:
    """Return the best W answers to each of B prompts of embeddings (P, D), the best one first.

    The W beams of a clip are W tokens in one row of the LLM. The KV cache holds the prompt once,
    then W keys for each step. It is never reordered: the rows of `can_attend` are, and they say
    which keys belong to the past of a beam. Example: 2 beams after 3 steps.

        keys                   prompt    step 1     step 2      step 3
                               p p p     the  a     cat  dog    ran  slept
        beam "the dog ran"     1 1 1      1   0      0    1      1     0
        beam "the cat slept"   1 1 1      1   0      1    0      0     1
    """
    # Step 1. Read each prompt once, for all of its beams.
    W, device = options.beams, prompts[0].device
    last, cache, is_real = read_prompts(llm, prompts)
    lengths = is_real.sum(dim=1)  # (B,)
    can_attend = is_real[:, None].repeat(1, W, 1)  # (B, W, P)
    last = last[:, None].repeat(1, W, 1)  # (B, W, D)
    answers = torch.empty(len(prompts), W, 0, dtype=torch.long, device=device)  # (B, W, 0)
    # All beams of a clip are equal at first, so only the first one may be extended.
    running = torch.tensor([0.0] + [-torch.inf] * (W - 1), device=device).repeat(len(prompts), 1)
    finished = [Finished(options) for _ in prompts]
    clips = list(range(len(prompts)))  # the clip of each row; rows of finished clips are removed
    end_tokens = torch.tensor(ends, device=device)

    for length in range(1, options.max_new_tokens + 1):
        # Step 2. Extend every beam by every token, and take the best extensions.
        log_probs = llm.logits(last).float().log_softmax(-1)  # (B, W, V)
        best, beam, token = extend(running, log_probs, len(ends))

        # Step 3. An extension that ends is a hypothesis if it is one of the best W.
        is_end = torch.isin(token, end_tokens)
        for b, i in is_end[:, :W].nonzero().tolist():
            finished[clips[b]].add(answers[b, beam[b, i]].tolist(), best[b, i].item(), length)

        # Step 4. The best W extensions that do not end are the new beams, still best first.
        going_on = is_end.to(torch.int8).argsort(dim=1, stable=True)[:, :W]
        running = best.masked_fill(is_end, -torch.inf).gather(1, going_on)  # (B, W)
        token, beam = token.gather(1, going_on), beam.gather(1, going_on)
        answers = torch.cat([select_beams(answers, beam), token[..., None]], 2)  # (B, W, length)
        can_attend = select_beams(can_attend, beam)
        for clip, best_running in zip(clips, running[:, 0].tolist(), strict=True):
            finished[clip].check_done(best_running, length)
        if length == options.max_new_tokens or all(clip.done for clip in finished):
            break

        # Step 5. Run the LLM over the new tokens.
        rows = [b for b, clip in enumerate(clips) if not finished[clip].done]
        # Removing rows copies the cache, so do it only when at least half of the clips are done.
        if 2 * len(rows) <= len(clips):
            cache.keep(rows)
            clips = [clips[b] for b in rows]
            running, answers, token = running[rows], answers[rows], token[rows]
            can_attend, lengths = can_attend[rows], lengths[rows]
        itself = torch.eye(W, dtype=torch.bool, device=device).repeat(len(clips), 1, 1)
        can_attend = torch.cat([can_attend, itself], dim=2)  # the W keys of this step
        positions = (lengths + length - 1)[:, None].repeat(1, W)  # (B, W)
        last, cache = llm.hidden(llm.embed(token), cache, positions, can_attend)  # (B, W, D)

    for b, clip in enumerate(clips):  # beams that still run at the limit are hypotheses, too
        for ids, log_prob in zip(answers[b].tolist(), running[b].tolist(), strict=True):
            finished[clip].add(ids, log_prob, len(ids))
    return [clip.best for clip in finished]


def extend(running: Tensor, log_probs: Tensor, n_ends: int) -> tuple[Tensor, Tensor, Tensor]:
    """Extend every beam by every token. Return the best sums, their beams and their tokens.

    running (B, W), log_probs (B, W, V) -> three times (B, (n_ends+1)*W), best first. If every beam
    ends in each of the end tokens, W other extensions are still left.
    """
    B, W, V = log_probs.shape
    totals = (running[..., None] + log_probs).flatten(1)  # (B, W*V)
    best, index = totals.topk(min((n_ends + 1) * W, W * V))  # (B, (n_ends+1)*W)
    return best, index // V, index % V


def select_beams(x: Tensor, beam: Tensor) -> Tensor:
    """Give each new beam the row of the beam that it extends. x (B, W, n), beam (B, W)"""
    return x.gather(1, beam[..., None].expand(-1, -1, x.shape[2]))  # (B, W, n)


# -------------------------------------------------------------------------- from clips to sentences


@dataclass
class Translation:
    """The result for one clip: a text with its score, or an error."""

    path: str
    text: str = ""
    score: float | None = None  # log-probability / length ** length_penalty, mean of all pieces
    tokens: int = 0  # of the text, end tokens included
    n_best: list[dict] = field(default_factory=list)  # text and score of hypotheses, best first
    error: str | None = None
    pieces: list[dict] = field(default_factory=list)  # of a long clip: start and end in s, text


@dataclass
class Piece:
    """A part of a clip that the encoder gets at once. A clip up to 30 s is one piece."""

    start: int  # first sample
    end: int  # last sample + 1
    audio: Tensor | None = None  # (N,), until the piece is answered
    hypotheses: list[Hypothesis] = field(default_factory=list)


class Clip:
    """A file or a waveform (N,), its pieces, and the error if it cannot be used."""

    def __init__(self, source: Path | str | Tensor):
        self.source, self.is_waveform = source, isinstance(source, Tensor)
        self.name = "waveform" if self.is_waveform else str(source)
        self.pieces: list[Piece] = []
        self.error: str | None = None

    def seconds(self) -> float:
        if self.is_waveform:
            return self.source.numel() / SAMPLE_RATE
        try:
            return audio_seconds(self.source)
        except AudioError:  # read_pieces reports it
            return 0.0

    def load(self, change: Callable | None) -> Tensor:
        audio = self.source if self.is_waveform else load_audio(self.source)
        audio = change(audio) if change else audio
        if audio.dim() != 1 or not len(audio) or not audio.isfinite().all():
            raise AudioError(self.name, "expected a waveform (N,) of finite numbers")
        return audio

    def is_finished(self) -> bool:
        return bool(self.error or self.pieces and all(piece.hypotheses for piece in self.pieces))


def split_at_quiet(audio: Tensor, most: int) -> list[tuple[int, int]]:
    """Cut a long clip at quiet places into pieces of at most `most` samples.

    (N,) -> start and end of each piece. A cut is in the middle of the quietest 0.2 s in the second
    half of the longest possible piece.
    """
    width = min(SAMPLE_RATE // 5, most - most // 2)
    pieces, start = [], 0
    while len(audio) - start > most:
        first = start + most // 2
        energy = audio[first : start + most].double().square().cumsum(dim=0)
        energy = torch.nn.functional.pad(energy, (1, 0))
        loudness = energy[width:] - energy[:-width]  # of the 0.2 s after each sample
        # Of several quietest places take the last one: fewer pieces.
        last_minimum = len(loudness) - 1 - int(loudness.flip(0).argmin())
        cut = first + last_minimum + (width + 1) // 2
        pieces.append((start, cut))
        start = cut
    return [*pieces, (start, len(audio))]


def read_pieces(clips: list[Clip], batch_size: int, progress: bool, change) -> Iterator[Piece]:
    """Yield the pieces of all clips. Clips of similar length come together: less padding.

    A file is decoded when it is needed, so memory holds one batch and one file.
    """
    window = 32 * batch_size  # so many clips are sorted by length together
    windows = (clips[i : i + window] for i in range(0, len(clips), window))
    ordered = (clip for window in windows for clip in sorted(window, key=Clip.seconds))
    # disable=None: no progress bar if stderr is not a terminal
    for clip in tqdm(ordered, total=len(clips), unit="clip", disable=not progress or None):
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


def end_ids(model: LLaST) -> list[int]:
    """Every token that ends an answer: those of the LLM, and that of the template."""
    return sorted({*model.tokenizer.eos_ids, end_id(model.config.template, model.tokenizer)})


@torch.inference_mode()
def answer(model: LLaST, ids: Tensor, inputs: list, embed, search) -> list[list[Hypothesis]]:
    """Return the hypotheses for each input, the best one first.

    `embed` turns the inputs into embeddings (S, D) for the place of the speech. A batch that does
    not fit into memory is divided into halves, with the same result.
    """
    try:
        with explain_out_of_memory("with one clip", "fewer --beams or --max-new-tokens need less"):
            at = int(ids.argmin())  # AUDIO_ID is the only negative id
            prompts = [model.splice(ids, speech, at) for speech in embed(inputs)]
            answers = beam_search(model.llm, prompts, end_ids(model), search)
    except torch.OutOfMemoryError:
        if len(inputs) == 1:
            raise
        answers = None
    if answers is None:  # outside the except block the error no longer holds the tensors
        half = len(inputs) // 2
        first = answer(model, ids, inputs[:half], embed, search)
        return first + answer(model, ids, inputs[half:], embed, search)
    if not all(answers):
        raise ValueError("the model computes NaN: its weights are damaged; train or copy it again")
    for hypothesis in (hypothesis for best in answers for hypothesis in best):
        hypothesis.text = model.tokenizer.decode(hypothesis.ids)
        hypothesis.score = round(hypothesis.score, 4)
    return answers


def join_pieces(clip: Clip, n_best: int, space: str) -> Translation:
    """Join the best texts of the pieces of a clip. The score is the plain mean of their scores."""
    if clip.error:
        return Translation(clip.name, error=clip.error)
    best = [piece.hypotheses[0] for piece in clip.pieces]
    text = space.join(hypothesis.text for hypothesis in best if hypothesis.text)
    score = round(sum(hypothesis.score for hypothesis in best) / len(best), 4)
    result = Translation(clip.name, text, score, sum(hypothesis.length for hypothesis in best))
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
    """Translate (task "st") or transcribe ("asr") clips. Yield the results in order, without delay.

    A clip is a path or a waveform (N,) at 16 kHz, of any length. `change` alters the audio before
    it is encoded. A clip that cannot be used gets an error; the others are translated. For a clip
    over 30 s there is only one hypothesis: the best ones of its pieces, joined. After Ctrl-C the
    finished results are yielded first.
    """
    if task not in model.config.tasks:
        raise ValueError(f"task {task}: the model was trained on {', '.join(model.config.tasks)}")
    ids = ids_of_prompt(model, task, source, target)
    space = "" if (source if task == "asr" else target) in TOKENIZERS else " "
    waiting = [Clip(clip) for clip in clips]  # those without a yielded result, in order
    pieces = read_pieces([*waiting], batch_size, progress, change)
    was_training = model.training
    model.eval()
    try:
        while batch := list(islice(pieces, batch_size)):
            answers = answer(model, ids, [p.audio for p in batch], model.encode_speech, search)
            for piece, hypotheses in zip(batch, answers, strict=True):
                piece.hypotheses, piece.audio = hypotheses, None
            while waiting and waiting[0].is_finished():
                yield join_pieces(waiting.pop(0), n_best, space)
        yield from (join_pieces(clip, n_best, space) for clip in waiting)  # those with errors
    except KeyboardInterrupt:
        yield from (join_pieces(clip, n_best, space) for clip in waiting if clip.is_finished())
        raise
    finally:
        model.train(was_training)


def translate(*args, **options) -> list[Translation]:
    """Return the results of translate_in_order, which takes the same arguments, as a list."""
    return list(translate_in_order(*args, **options))


# --------------------------------------------------------------------------------------------- BLEU

FIGURES = {"bleu": "BLEU", "bleu_lc": "lower-cased", "chrf": "chrF", "wer": "WER", "cer": "CER"}


def metrics(target: str) -> dict:
    """sacreBLEU's metrics for a language: BLEU, BLEU of lower-cased text, chrF."""
    tokenizer = TOKENIZERS.get(target, "13a")
    try:
        bleu, lower = (sacrebleu.BLEU(tokenize=tokenizer, lowercase=lc) for lc in (False, True))
    except RuntimeError as error:
        package = 'pip install "sacrebleu[ja]"'
        raise ValueError(f"BLEU of {target} needs the tokenizer {tokenizer}: {package}") from error
    return {"bleu": bleu, "bleu_lc": lower, "chrf": sacrebleu.CHRF()}


def score(hypotheses: list, references: list, target: str = "en", n_bootstrap: int = 0) -> dict:
    """Return BLEU, BLEU of lower-cased text and chrF of a corpus, with sacreBLEU's signatures.

    With n_bootstrap samples of the sentences (1000 is usual), "bleu_interval" has the limits of the
    95 % interval of BLEU.
    """
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references")
    named = metrics(target)
    scores = {k: round(m.corpus_score(hypotheses, [references]).score, 2) for k, m in named.items()}
    if n_bootstrap > 1:
        result = named["bleu"].corpus_score(hypotheses, [references], n_bootstrap)
        scores["bleu_interval"] = [round(result._mean + d, 2) for d in (-result._ci, result._ci)]
    scores["signature"] = str(named["bleu"].get_signature())
    scores["chrf_signature"] = str(named["chrf"].get_signature())
    return scores | {"n": len(references)}


def read_splits(corpus: Path, source: str, target: str, wanted=()) -> dict[str, list[Row]]:
    """The rows of a direction by split. Rows that cannot be used are named, if `wanted` or all."""
    splits, unusable = read_corpus(corpus, source, target)
    reasons = [f"{split}: {reason}" for split, reason in unusable if split in (wanted or splits)]
    for reason in reasons[:5]:
        print(f"cannot be used for {reason}", file=sys.stderr)
    if reasons:
        print(f"{source}-{target}: rows that cannot be used: {len(reasons)}", file=sys.stderr)
    return splits


def score_rows(model, rows: list[Row], tsv=None, search=SearchOptions(), **options) -> dict:
    """Translate rows of one direction and score the translations."""
    source, target = rows[0].source, rows[0].target
    metrics(target)  # a missing package must be an error before the work
    paths, references = [row.path for row in rows], [row.translation for row in rows]
    results = translate(model, paths, "st", source, target, search, **options)
    failed = write_results(rows, references, results, tsv)
    return score([r.text for r in results], references, target) | {"failed": failed}


def write_results(rows: list[Row], references: list, results: list, tsv: Path | None) -> int:
    """Write a line for each clip to `tsv`. Name the clips that failed, and return their number.

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
    """The scores of a direction on one line, with their signature."""
    figures = [f"{name} {scores[key]:.1f}" for key, name in FIGURES.items() if key in scores]
    return f"{direction} on {scores['n']} clips: {', '.join(figures)}  ({scores['signature']})"


# ------------------------------------------------------------------------------------- command line


def audio_paths(arguments: list[str]) -> list[Path]:
    """The clips that arguments name: files, folders, and .txt files with a path on each line."""
    paths = []
    for argument in map(Path, arguments):
        clips = [argument]
        if os.path.isdir(argument):  # Path.is_dir raises an error for a name that is too long
            clips = clips_in(argument)
        elif argument.suffix == ".txt":  # surrogateescape: a file name need not be UTF-8
            lines = argument.read_text("utf-8-sig", "surrogateescape").splitlines()
            clips = [argument.parent / line.strip() for line in lines if line.strip()]
        if not clips:
            raise ValueError(f"{argument} names no clip; expected audio such as .wav, .mp3, .flac")
        paths += clips
    return paths


def clips_in(folder: Path) -> list[Path]:
    """The audio files of a folder. Those of a format that cannot be read are named."""
    files = sorted(folder.iterdir())
    for file in files:
        if file.suffix.lower() in OTHER_AUDIO_FILES:
            command = shlex.join(["ffmpeg", "-i", str(file), str(file.with_suffix(".flac"))])
            print(f"skipped {file}; convert it with: {command}", file=sys.stderr)
    return [file for file in files if file.suffix.lower() in AUDIO_FILES]


def choose_direction(model: LLaST, lang: str | None, folder: Path, task: str) -> tuple[str, str]:
    """Source and target that `lang` names ("fr" or "en-de"), or the only ones of the model.

    A transcript has no target, so for the task "asr" any direction with that source is chosen.
    """
    trained = parse_directions(",".join(model.config.directions))
    fitting = [pair for pair in trained if lang in (None, pair[0], "-".join(pair))]
    if task == "asr":
        fitting = list(dict(fitting).items())
    if len(fitting) != 1:
        names = ", ".join(model.config.directions)
        raise ValueError(f"--lang is {lang or 'missing'}; {folder} has {names}: name one")
    return fitting[0]


def add_options(parser: argparse.ArgumentParser):
    """Add the options that translate.py and tools/evaluate.py have in common."""
    add = parser.add_argument
    add("--model", type=Path, help="folder that train.py wrote [the newest one in runs/]")
    add("--beams", type=int, default=5, help="beams [5]; 1 is greedy search")
    add("--length-penalty", type=float, default=1.0, help="above 1 favours longer answers [1]")
    add("--max-new-tokens", type=int, default=256, help="longest answer, in tokens [256]")
    add("--batch", type=int, default=16, help="clips in a batch [16]")
    add("--json", action="store_true", help="print JSON objects, one on a line")
    add("--compile", action="store_true", help="compile the layers; on a CPU this needs g++")
    add("--encoder", type=Path, help="folder of the encoder, if it was moved")
    add("--llm", type=Path, help="folder of the LLM, if it was moved")


def check_options(args: argparse.Namespace):
    """Check values and combinations of options that argparse cannot check."""
    for name in ("beams", "max_new_tokens", "n_best", "batch"):
        if (value := getattr(args, name, 1)) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; expected 1 or more")
    if not abs(args.length_penalty) <= 10:
        raise ValueError(f"--length-penalty is {args.length_penalty}; expected -10 to 10")
    if getattr(args, "n_best", 1) > args.beams:
        raise ValueError(f"--n-best {args.n_best} needs as many beams, but --beams is {args.beams}")


def load_model(args: argparse.Namespace) -> tuple[LLaST, Path]:
    """Load the model for use, with its LoRA merged. Return it with its folder."""
    folder = args.model
    if not folder:
        saved = sorted((HERE / "runs").glob("*/llast.json"), key=lambda path: path.stat().st_mtime)
        if not saved:
            raise FileNotFoundError(f"no trained model in {HERE / 'runs'}; run python train.py")
        folder = saved[-1].parent
        print(f"no --model: the newest one is {folder}", file=sys.stderr)
    device, dtype, _ = pick_device()
    with explain_out_of_memory("while loading the model", "a smaller one needs less"):
        model = LLaST.from_pretrained(folder, args.encoder, args.llm, device, dtype)
        merge_lora(model, delete_lora=True)
    if args.compile:
        model.compile_layers()
    return model, folder


def print_json(value: dict, file=None):
    """Print an object on a line. Escape what is not ASCII if the output is not UTF-8."""
    is_utf8 = (file or sys.stdout).encoding.lower().replace("-", "") == "utf8"
    tqdm.write(json.dumps(value, ensure_ascii=not is_utf8), file)


def show(result: Translation, as_json: bool, n_best: int = 1):
    """Print one line for a clip, or one line for each of its n_best hypotheses."""
    if as_json:
        print_json(asdict(result))
    elif result.error:
        tqdm.write(result.error, sys.stderr)
    else:
        for best in result.n_best:
            score = f"{best['score']:.3f}\t" if n_best > 1 else ""
            tqdm.write(f"{result.path}\t{score}{' '.join(best['text'].split())}")


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Translate or transcribe with a trained LLaST.")
    add = parser.add_argument
    add("audio", nargs="+", help="audio files, folders, or .txt files with a path on each line")
    add("--lang", help="language or direction (fr or en-de), if the model has several")
    add("--task", choices=("st", "asr"), default="st", help="translate [st] or transcribe (asr)")
    add("--n-best", type=int, default=1, help="hypotheses of a clip of up to 30 s to print [1]")
    add_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    check_options(args)
    paths = audio_paths(args.audio)
    model, folder = load_model(args)
    direction = choose_direction(model, args.lang, folder, args.task)
    options = {"batch_size": args.batch, "n_best": args.n_best, "progress": len(paths) > args.batch}
    search = SearchOptions(args.beams, args.length_penalty, args.max_new_tokens)
    failed = False
    for result in translate_in_order(model, paths, args.task, *direction, search, **options):
        show(result, args.json, args.n_best)
        failed |= result.error is not None
    return 1 if failed else 0


def run_command(name: str, run: Callable, args: argparse.Namespace) -> int:
    """Run a command. Return its exit code: 2 after an error, 130 after Ctrl-C."""
    # Print each line at once, and escape the characters that stdout cannot encode.
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
