"""From audio files to text with a trained LLaST: beam search, translation, BLEU, the command line.

    python translate.py --model runs/fr clip.wav other.mp3

The rules of beam search are those of transformers, so both give the same hypotheses. Scores are
those of sacreBLEU. tests/test_translate.py compares beam search with an exhaustive search.

Sizes: B clips, W beams, P positions of a prompt, V vocabulary, D LLM width, N samples (16 kHz),
T text tokens, S audio positions.
"""

import argparse
import json
import os
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path

import sacrebleu
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import SPLITS, Row, end_id, parse_directions, prompt_for, prompt_ids, read_corpus
from llama import Cache, Llama
from llast import LLaST, phase, pick_device
from lora import merge_lora
from whisper_encoder import MAX_SECONDS, SAMPLE_RATE, AudioError, audio_seconds, load_audio

HERE = Path(__file__).parent
AUDIO_FILES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
UNSPACED = ("zh-CN", "ja")  # languages that are written without spaces between words


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
    # The first token follows the last position of a prompt. Position lengths - 1 is before padding.
    last, cache = llm.hidden(x, asked=(torch.arange(B, device=device), lengths - 1))  # (B, D)
    return last, cache, is_real


@torch.inference_mode()
def beam_search(
    llm: Llama, prompts: list[Tensor], ends: list[int], options: SearchOptions = SearchOptions()
) -> list[list[Hypothesis]]:
    """Return the best W answers to each of B prompts of embeddings (P, D), the best one first.

    The W beams of a clip are W tokens in one row of the LLM. The KV cache holds the prompt once,
    then W keys for each step, and is never reordered. Instead the rows of `can_attend` are
    reordered. They say which keys are a beam's own past. Here are 2 beams after 3 steps:

        keys:              prompt    step 1    step 2    step 3
                           . . .     the  a    cat dog   ran slept
        beam "the dog ran"  1 1 1     1   0     0   1     1   0
        beam "the cat slept" 1 1 1    1   0     1   0     0   1
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

SORTED_BATCHES = 32  # clips of so many batches are sorted by length together


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

    clip: int  # index of the clip
    name: str  # of the clip
    start: int = 0  # first sample
    end: int = 0  # last sample + 1
    audio: Tensor | None = None  # (N,); None if the clip cannot be used
    is_last: bool = True  # no other piece of the clip follows
    error: str | None = None
    hypotheses: list[Hypothesis] = field(default_factory=list)


def split_at_quiet(audio: Tensor, most: int) -> list[tuple[int, int]]:
    """Pieces of at most `most` samples, cut where a long clip is quietest. (N,) -> [(start, end)]

    A cut is the middle of the quietest 0.2 s in the second half of what a piece may take.
    """
    width = min(SAMPLE_RATE // 5, most - most // 2)
    pieces, start = [], 0
    while len(audio) - start > most:
        first = start + most // 2
        energy = audio[first : start + most].double().square().cumsum(dim=0)
        energy = torch.nn.functional.pad(energy, (1, 0))
        loudness = energy[width:] - energy[:-width]  # of the window that starts at each sample
        last_minimum = len(loudness) - 1 - int(loudness.flip(0).argmin())  # so few pieces
        cut = first + last_minimum + (width + 1) // 2
        pieces.append((start, cut))
        start = cut
    return [*pieces, (start, len(audio))]


def seconds_of(clip) -> float:
    """Return the length of a waveform or of a file; 0 if the file cannot be read."""
    try:
        return clip.numel() / SAMPLE_RATE if isinstance(clip, Tensor) else audio_seconds(clip)
    except AudioError:  # load_clip reports it
        return 0.0


def load_clip(clip, name: str, change: Callable | None) -> Tensor:
    """Read a file, or take a waveform, and apply `change`. -> (N,)"""
    audio = clip if isinstance(clip, Tensor) else load_audio(clip)
    audio = change(audio) if change else audio
    if audio.dim() != 1 or not len(audio):
        shape = tuple(audio.shape)
        raise AudioError(name, f"expected a waveform (N,) at 16 kHz, found the shape {shape}")
    if not audio.isfinite().all():
        raise AudioError(name, "the waveform has NaN or infinite samples")
    return audio


def read_pieces(clips: list, batch_size: int, progress: bool, change) -> Iterator[Piece]:
    """Yield the pieces of every clip. Clips of similar length come together: less padding.

    A file is decoded when it is needed, so memory holds one batch and one file.
    """
    indices, window = range(len(clips)), SORTED_BATCHES * batch_size
    order = (
        i
        for first in indices[::window]
        for i in sorted(indices[first : first + window], key=lambda i: seconds_of(clips[i]))
    )
    disable = None if progress else True  # None: only on a terminal
    for i in tqdm(order, "translating", len(clips), unit="clip", disable=disable):
        name = f"clip {i}" if isinstance(clips[i], Tensor) else str(clips[i])
        try:
            audio = load_clip(clips[i], name, change)
        except AudioError as error:
            yield Piece(i, name, error=str(error))
            continue
        for start, end in split_at_quiet(audio, MAX_SECONDS * SAMPLE_RATE):
            yield Piece(i, name, start, end, audio[start:end], is_last=end == len(audio))


def ids_of_prompt(model: LLaST, task: str, source: str, target: str) -> Tensor:
    """Token ids of the prompt, with AUDIO_ID at the place of the speech. -> (T,)"""
    prompt = prompt_for(task, source, target, model.config.template)
    return torch.tensor(prompt_ids(prompt, model.tokenizer)).to(model.device)


def end_ids(model: LLaST) -> list[int]:
    """Every token that ends an answer: those of the LLM, and that of the template."""
    return sorted({*model.tokenizer.eos_ids, end_id(model.config.template, model.tokenizer)})


@torch.inference_mode()
def answer(
    model: LLaST, ids: Tensor, inputs: list, embed: Callable, search: SearchOptions
) -> list[list[Hypothesis]]:
    """Return the hypotheses for each input, the best one first.

    `embed` turns the inputs into embeddings (S, D) for the place of the speech. A batch that does
    not fit into memory is divided into halves, with the same result.
    """
    try:
        prompts = [model.splice(ids, speech) for speech in embed(inputs)]
        return decode(model, beam_search(model.llm, prompts, end_ids(model), search))
    except torch.OutOfMemoryError:
        if len(inputs) == 1:
            raise
    # The error holds the tensors of the batch, so the halves are translated after its block.
    half = len(inputs) // 2
    first = answer(model, ids, inputs[:half], embed, search)
    return first + answer(model, ids, inputs[half:], embed, search)


def decode(model: LLaST, answers: list[list[Hypothesis]]) -> list[list[Hypothesis]]:
    """Add the texts, and round the scores."""
    if not all(answers):
        raise ValueError("the model computes NaN: its weights are damaged; train or copy it again")
    for hypothesis in (hypothesis for best in answers for hypothesis in best):
        hypothesis.text = model.tokenizer.decode(hypothesis.ids)
        hypothesis.score = round(hypothesis.score, 4)
    return answers


def answer_clips(
    model: LLaST, ids: Tensor, pieces: Iterator[Piece], batch_size: int, search: SearchOptions
) -> Iterator[list[Piece]]:
    """Yield the pieces of a clip, with their hypotheses, when the last one is answered."""
    clip = []
    while batch := list(islice(pieces, batch_size)):
        usable = [piece for piece in batch if not piece.error]
        audio = [piece.audio for piece in usable]
        answers = answer(model, ids, audio, model.encode_speech, search) if usable else []
        for piece, hypotheses in zip(usable, answers, strict=True):
            piece.hypotheses = hypotheses
        for piece in batch:
            clip.append(piece)
            if piece.is_last:
                yield clip
                clip = []


def join_pieces(pieces: list[Piece], n_best: int, space: str) -> Translation:
    """Join the best texts of the pieces of a clip. The score is the plain mean of their scores."""
    name = pieces[0].name
    if pieces[0].error:
        return Translation(name, error=pieces[0].error)
    best = [piece.hypotheses[0] for piece in pieces]
    text = space.join(hypothesis.text for hypothesis in best if hypothesis.text)
    score = round(sum(hypothesis.score for hypothesis in best) / len(best), 4)
    result = Translation(name, text, score, sum(hypothesis.length for hypothesis in best))
    if len(pieces) == 1:
        result.n_best = [{"text": h.text, "score": h.score} for h in pieces[0].hypotheses[:n_best]]
        return result
    result.n_best = [{"text": text, "score": score}]
    for piece, hypothesis in zip(pieces, best, strict=True):
        times = {"start": piece.start / SAMPLE_RATE, "end": piece.end / SAMPLE_RATE}
        result.pieces.append(times | {"text": hypothesis.text})
    return result


def in_order(results: Iterator[tuple[int, Translation]]) -> Iterator[Translation]:
    """Yield numbered results in the order of their numbers, each as soon as possible."""
    waiting, position = {}, 0
    try:
        for i, result in results:
            waiting[i] = result
            while position in waiting:
                yield waiting.pop(position)
                position += 1
    except KeyboardInterrupt:  # Ctrl-C must not lose what is finished
        yield from (waiting[i] for i in sorted(waiting))
        raise


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
    """Translate (task "st") or transcribe ("asr") clips, and yield the results in their order.

    A clip is a path or a waveform (N,) at 16 kHz, of any length. `change` alters the audio before
    it is encoded. A clip that cannot be used gets an error; the others are translated. For a clip
    over 30 s there is only one hypothesis: the best ones of its pieces, joined.
    """
    ids = ids_of_prompt(model, task, source, target)
    space = "" if (source if task == "asr" else target) in UNSPACED else " "
    pieces = read_pieces(clips, batch_size, progress, change)
    was_training = model.training
    model.eval()
    try:
        answered = answer_clips(model, ids, pieces, batch_size, search)
        yield from in_order((clip[0].clip, join_pieces(clip, n_best, space)) for clip in answered)
    finally:
        model.train(was_training)


def translate(*args, **options) -> list[Translation]:
    """Return the results of translate_in_order, which takes the same arguments, as a list."""
    return list(translate_in_order(*args, **options))


# ------------------------------------------------------------------------------------------- scores

# sacreBLEU's, chosen as the original does; with another one a score is another number.
TOKENIZERS = {"zh-CN": "zh", "ja": "ja-mecab"}
FIGURES = {"bleu": "BLEU", "bleu_lc": "lower-cased", "chrf": "chrF", "wer": "WER", "cer": "CER"}


def metrics(target: str) -> dict:
    """sacreBLEU's metrics for text of one language, cased, lower-cased and by characters."""
    tokenizer = TOKENIZERS.get(target, "13a")
    try:
        bleu, lower = (sacrebleu.BLEU(tokenize=tokenizer, lowercase=lc) for lc in (False, True))
    except RuntimeError as error:  # another tokenizer would give numbers that compare with nothing
        raise ValueError(
            f"BLEU of {target} needs sacreBLEU's tokenizer {tokenizer}, which is not installed: "
            'pip install "sacrebleu[ja]"'
        ) from error
    return {"bleu": bleu, "bleu_lc": lower, "chrf": sacrebleu.CHRF()}


def score(hypotheses: list[str], references: list[str], target: str = "en") -> dict:
    """Corpus BLEU cased and lower-cased and chrF by sacreBLEU, with their signatures."""
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references")
    by = metrics(target)
    found = {k: round(m.corpus_score(hypotheses, [references]).score, 2) for k, m in by.items()}
    return found | {
        "signature": str(by["bleu"].get_signature()),  # the lower-cased differs in case:lc alone
        "chrf_signature": str(by["chrf"].get_signature()),
        "n": len(references),
    }


def read_splits(corpus: Path, source: str, target: str, asked=SPLITS) -> dict[str, list[Row]]:
    """The rows of a direction by split; what of those `asked` for cannot be used is told.

    A row with a misspelt split could have belonged to any, so it always is.
    """
    splits, unusable = read_corpus(corpus, source, target)
    told = [(s, reason) for s, reason in unusable if s in asked or s not in SPLITS]
    for split, reason in told[:5]:
        print(f"cannot be used for {split}: {reason}", file=sys.stderr)
    if told:
        numbers = Counter(split for split, _ in told).items()
        what = ", ".join(f"{n} row{'s'[: n > 1]} of {split}" for split, n in numbers)
        print(f"{source}-{target}: {what} cannot be used, see above", file=sys.stderr)
    return splits


def score_rows(
    model: LLaST,
    rows: list[Row],
    tsv: Path | None = None,
    search: SearchOptions = SearchOptions(),
    **options,
) -> dict:
    """Translate rows of one direction and score the translations."""
    source, target = rows[0].source, rows[0].target
    metrics(target)  # should a package be missing, say so before the work
    paths = [row.path for row in rows]
    results = translate(model, paths, "st", source, target, search, **options)
    references = [row.translation for row in rows]
    failed = write_results(rows, references, results, tsv)
    return score([r.text for r in results], references, target) | {"failed": failed}


def write_results(
    rows: list[Row], references: list[str], results: list[Translation], tsv: Path | None
) -> int:
    """Name the clips that failed, write a line for each to `tsv`. -> how many failed

    Nothing is dropped: a clip that failed counts as an empty hypothesis and is named.
    """
    failed = [result.error for result in results if result.error]
    for error in failed:
        print(f"scored as an empty text: {error}", file=sys.stderr)
    if tsv:
        lines = ["clip\treference\thypothesis\tscore\terror"]
        for row, reference, result in zip(rows, references, results, strict=True):
            cells = row.path.name, reference, result.text, str(result.score), result.error or ""
            lines.append("\t".join(map(one_line, cells)))
        tsv.write_text("\n".join(lines) + "\n", encoding="utf-8")
    return len(failed)


def one_line(text: str) -> str:
    """Text that stays in its cell and on its line."""
    return " ".join(text.split())


def describe(direction: str, scores: dict) -> str:
    """Scores as one line for a reader, the signature with them."""
    found = [f"{name} {scores[key]:.1f}" for key, name in FIGURES.items() if key in scores]
    return f"{direction} on {scores['n']} clips: {', '.join(found)}  ({scores['signature']})"


# ------------------------------------------------------------------------------------- command line


def newest_run(runs: Path) -> Path:
    """The run whose model was saved last."""
    saved = sorted(runs.glob("*/llast.json"), key=lambda path: path.stat().st_mtime)
    if not saved:
        raise FileNotFoundError(f"no trained model in {runs}; make one with: python train.py")
    return saved[-1].parent


def audio_paths(arguments: list[str]) -> list[Path]:
    """Clips named one by one, all audio of a folder, or the lines of a .txt file, in order."""
    paths = []
    for argument in map(Path, arguments):
        if os.path.isdir(argument):  # unlike Path's, for a name of any length
            inside = sorted(p for p in argument.iterdir() if p.suffix.lower() in AUDIO_FILES)
            if not inside:
                raise FileNotFoundError(f"{argument} holds no {', '.join(AUDIO_FILES)} file")
            paths += inside
        elif argument.suffix == ".txt":
            if not argument.is_file():
                raise FileNotFoundError(f"{argument}: no such file")
            try:
                lines = argument.read_text(encoding="utf-8-sig").splitlines()
            except UnicodeDecodeError as error:
                raise ValueError(f"{argument} is not in UTF-8; save it as UTF-8") from error
            listed = [argument.parent / line.strip() for line in lines if line.strip()]
            if not listed:
                raise ValueError(f"{argument} names no clip; expected a path a line")
            paths += listed
        else:
            paths.append(argument)
    return paths


def choose_direction(model: LLaST, lang: str | None, where: Path, task: str) -> tuple[str, str]:
    """Source and target: as asked ("fr" or "en-de"), or the only one that the model has learnt.

    A transcript has no target, so for task "asr" any direction of a source will do.
    """
    known = parse_directions(",".join(model.config.directions))
    names = ", ".join(map("-".join, known))
    fits = [pair for pair in known if lang is None or lang in (pair[0], "-".join(pair))]
    if task == "asr":
        fits = list(dict(fits).items())
    if not fits:
        if (task, lang) != ("asr", "en"):
            parse_directions(lang)  # a mistyped language has an error of its own
        raise ValueError(f"{where} was not trained on {lang!r}; it knows {names}")
    if len(fits) > 1:
        raise ValueError(f"{where} knows {names}; say which with --lang")
    return fits[0]


def add_options(parser: argparse.ArgumentParser):
    """Add the options that translate.py and tools/evaluate.py have in common."""
    add = parser.add_argument
    add("--model", type=Path, help="folder that train.py wrote [the newest one in runs/]")
    add("--beams", type=int, default=5, help="beams [5]; 1 is greedy search")
    add("--length-penalty", type=float, default=1.0, help="above 1 favours longer answers [1]")
    add("--max-new-tokens", type=int, default=256, help="longest answer, in tokens [256]")
    add("--batch", type=int, default=16, help="clips in a batch [16]")
    add("--json", action="store_true", help="print JSON objects, one on a line")
    add("--compile", action="store_true",
        help="compile each layer: slow at first, then faster; on a CPU it needs g++")  # fmt: skip
    add("--encoder", type=Path, help="folder of the encoder, if it was moved")
    add("--llm", type=Path, help="folder of the LLM, if it was moved")


def check_options(args: argparse.Namespace):
    """Check values and combinations of options that argparse cannot check."""
    for name in ("beams", "max_new_tokens", "n_best", "batch"):
        if getattr(args, name, 1) < 1:
            raise ValueError(
                f"--{name.replace('_', '-')} is {getattr(args, name)}; expected 1 or more"
            )
    if not abs(args.length_penalty) <= 10:
        raise ValueError(f"--length-penalty is {args.length_penalty}; expected -10 to 10")
    if args.lang and "," in args.lang:
        raise ValueError(f"--lang is {args.lang}; name one direction, it is for all audio files")
    if getattr(args, "n_best", 1) > args.beams:
        n = args.n_best
        raise ValueError(f"--n-best {n} needs at least {n} beams, but --beams is {args.beams}")


def search_options(args: argparse.Namespace) -> SearchOptions:
    return SearchOptions(args.beams, args.length_penalty, args.max_new_tokens)


def load_model(args: argparse.Namespace) -> tuple[LLaST, Path]:
    """Load the model for use, with its LoRA merged. Return it with its folder."""
    folder = args.model or newest_run(HERE / "runs")
    if not args.model:
        print(f"no --model: the newest one is {folder}", file=sys.stderr)
    device, dtype, _ = pick_device()
    with phase("while loading the model", "a smaller one needs less"):
        model = LLaST.from_pretrained(folder, args.encoder, args.llm, device, dtype)
        merge_lora(model, for_good=True)
    if args.compile:
        model.compile_layers()
    return model, folder


def print_json(value: dict, file=None):
    """Print an object on a line. Escape what is not ASCII if the output is not UTF-8."""
    is_utf8 = (file or sys.stdout).encoding.lower().replace("-", "") == "utf8"
    print(json.dumps(value, ensure_ascii=not is_utf8), file=file, flush=True)


def show(result: Translation, as_json: bool, n_best: int = 1):
    """Print one line for a clip, or one line for each of its n_best hypotheses."""
    if as_json:
        print_json(asdict(result))
    elif result.error:
        print(result.error, file=sys.stderr)
    elif n_best == 1:
        print(f"{result.path}\t{one_line(result.text)}", flush=True)
    else:
        for best in result.n_best:
            print(f"{result.path}\t{best['score']:.3f}\t{one_line(best['text'])}", flush=True)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Translate or transcribe with a trained LLaST.")
    add = parser.add_argument
    add("audio", nargs="+", help="audio files, folders, or .txt files with a path on each line")
    add("--lang", help="language or direction (fr or en-de), if the model has several")
    add("--task", choices=("st", "asr"), default="st",
        help="st translates [st], asr transcribes")  # fmt: skip
    add("--n-best", type=int, default=1,
        help="hypotheses to print of a clip, with scores [1]; over 30 s there is one")  # fmt: skip
    add_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    check_options(args)
    paths = audio_paths(args.audio)
    model, folder = load_model(args)
    direction = choose_direction(model, args.lang, folder, args.task)
    options = {"batch_size": args.batch, "n_best": args.n_best, "progress": len(paths) > args.batch}
    failed = False
    with phase("even with one clip at a time", "fewer --beams or --max-new-tokens need less"):
        clips = translate_in_order(
            model, paths, args.task, *direction, search_options(args), **options
        )
        for result in clips:
            show(result, args.json, args.n_best)
            failed |= result.error is not None
    return 1 if failed else 0


def run_command(name: str, run: Callable, args: argparse.Namespace) -> int:
    """Run a command. Return its exit code: 2 after an error, 130 after Ctrl-C."""
    sys.stdout.reconfigure(errors="backslashreplace")  # escape what stdout cannot encode
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
