"""Speech to text with a trained LLaST: beam search, scores, and the command line.

    python translate.py --model runs/fr clip.wav other.mp3

Beam search follows transformers' rules, so that both give the same hypotheses. One beam is greedy
search, and a beam as wide as all sentences is exhaustive search: tests/test_translate.py. Scores
are sacreBLEU's.
"""

import argparse
import json
import os
import sys
from collections import Counter, defaultdict
from collections.abc import Iterator
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
from whisper_encoder import (
    MAX_SECONDS,
    SAMPLE_RATE,
    AudioError,
    audio_seconds,
    load_audio,
)

HERE = Path(__file__).parent
AUDIO_FILES = (".wav", ".flac", ".ogg", ".opus", ".mp3")
UNSPACED = ("zh-CN", "ja")  # written without spaces between words


# -------------------------------------------------------------------------------------- beam search


@dataclass
class Hypothesis:
    """An answer: its tokens without the end, and what ranks it: log-probability by length."""

    ids: list[int]
    score: float
    length: int  # the end counted, if it has one


class Finished:
    """The best W finished answers of one clip."""

    def __init__(self, W: int, length_penalty: float):
        self.W, self.length_penalty = W, length_penalty
        self.best: list[Hypothesis] = []
        self.done = False

    def score(self, log_prob: float, length: int) -> float:
        """Normalised over the answer alone, its end token counted; the prompt has no part in it."""
        return log_prob / length**self.length_penalty

    def add(self, ids: list[int], log_prob: float, length: int):
        """Take an answer in, unless no beam stands behind it or the clip is done."""
        if log_prob > -torch.inf and not self.done:
            self.best.append(Hypothesis(ids, self.score(log_prob, length), length))
            self.best.sort(key=lambda hypothesis: -hypothesis.score)
            del self.best[self.W :]

    def check(self, best_running: float, length: int):
        """Done when all places are taken and no running beam, were it to end now, would get one."""
        if len(self.best) == self.W:
            self.done |= self.score(best_running, length) <= self.best[-1].score


def read_prompts(llm: Llama, prompts: list[Tensor]) -> tuple[Tensor, Cache, Tensor]:
    """Read each prompt (P, D) once, for all of its beams.

    Returns the last state of each clip (B, D), the cache, and which of its keys are real rather
    than padding (B, P).
    """
    B, device = len(prompts), prompts[0].device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    x = pad_sequence(prompts, batch_first=True)  # (B, P, D)
    is_real = torch.arange(x.shape[1], device=device) < lengths[:, None]  # (B, P)
    last, cache = llm.hidden(x, asked=(torch.arange(B, device=device), lengths - 1))  # (B, D)
    return last, cache, is_real


@torch.inference_mode()
def beam_search(
    llm: Llama,
    prompts: list[Tensor],
    eos_ids: list[int],
    beams: int = 5,
    length_penalty: float = 1.0,
    max_new_tokens: int = 256,
) -> list[list[Hypothesis]]:
    """The most probable answers to each of B prompts of embeddings (P, D): up to W, best first.

    A step extends every running beam by every token and keeps the best W that go on; an end token
    counts only if it is among the best W itself. At the limit the running beams are ranked too.

    The beams of a clip are W tokens in one row of the LLM. Its cache holds the prompt once, then W
    keys a step, never reordered: `can_attend` says which of them are a beam's own past.
    """
    W, device = beams, prompts[0].device
    finished = [Finished(W, length_penalty) for _ in prompts]
    clips = list(range(len(prompts)))  # which clip a row is; B rows, fewer as clips are done
    last, cache, is_real = read_prompts(llm, prompts)
    lengths = is_real.sum(dim=1)  # (B,)
    can_attend = is_real[:, None].repeat(1, W, 1)  # (B, W, P)
    last = last[:, None].repeat(1, W, 1)  # (B, W, D)
    # At first all beams of a clip are one and the same, so only the first may be continued.
    running = torch.tensor([0.0] + [-torch.inf] * (W - 1), device=device).repeat(len(clips), 1)
    answers = torch.empty(len(clips), W, 0, dtype=torch.long, device=device)  # (B, W, 0)
    ends = torch.tensor(eos_ids, device=device)

    for length in range(1, max_new_tokens + 1):
        log_probs = llm.logits(last).float().log_softmax(-1)  # (B, W, V)
        best, beam, token = extend(running, log_probs, len(ends))
        is_end = torch.isin(token, ends)
        for b, i in is_end[:, :W].nonzero().tolist():
            finished[clips[b]].add(answers[b, beam[b, i]].tolist(), best[b, i].item(), length)

        go_on = is_end.to(torch.int8).argsort(dim=1, stable=True)[:, :W]  # still best first
        running = best.masked_fill(is_end, -torch.inf).gather(1, go_on)  # (B, W)
        token, beam = token.gather(1, go_on), beam.gather(1, go_on)
        for clip, best_running in zip(clips, running[:, 0].tolist(), strict=True):
            finished[clip].check(best_running, length)
        answers = torch.cat([of_beams(answers, beam), token[..., None]], dim=2)  # (B, W, length)
        can_attend = of_beams(can_attend, beam)
        if length == max_new_tokens or all(clip.done for clip in finished):
            break

        going = [b for b, clip in enumerate(clips) if not finished[clip].done]
        if 2 * len(going) <= len(clips):  # at half, for to leave is to copy what stays
            cache.keep(going)
            clips = [clips[b] for b in going]
            running, answers, token = running[going], answers[going], token[going]
            can_attend, lengths = can_attend[going], lengths[going]
        itself = torch.eye(W, dtype=torch.bool, device=device).repeat(len(clips), 1, 1)
        can_attend = torch.cat([can_attend, itself], dim=2)  # W keys more than the cache has
        positions = (lengths + length - 1)[:, None].repeat(1, W)  # (B, W)
        last, cache = llm.hidden(llm.embed(token), cache, positions, can_attend)  # (B, W, D)

    for b, clip in enumerate(clips):  # at the limit the running beams are answers too
        for ids, log_prob in zip(answers[b].tolist(), running[b].tolist(), strict=True):
            finished[clip].add(ids, log_prob, len(ids))
    return [clip.best for clip in finished]


def extend(running: Tensor, log_probs: Tensor, n_ends: int) -> tuple[Tensor, Tensor, Tensor]:
    """Every beam followed by every token: the sums of the best, which beam, which token.

    running (B, W), log_probs (B, W, V) -> three of (B, (n_ends+1)*W), best first: so many that W of
    them go on even if every beam could end in each of the ends.
    """
    B, W, V = log_probs.shape
    totals = (running[..., None] + log_probs).flatten(1)  # (B, W*V)
    best, index = totals.topk(min((n_ends + 1) * W, W * V))  # (B, (n_ends+1)*W)
    return best, index // V, index % V


def of_beams(x: Tensor, beam: Tensor) -> Tensor:
    """What belongs to the beams that go on. x (B, W, n), beam (B, W) -> (B, W, n)"""
    return x.gather(1, beam[..., None].expand(-1, -1, x.shape[2]))


# ---------------------------------------------------------------------------------------- translate


@dataclass
class Translation:
    """What came of one clip: a text with its score, or the reason why there is none."""

    path: str
    text: str = ""
    score: float | None = None  # log-probability over length ** length_penalty
    tokens: int = 0  # written for it, ends counted
    n_best: list[dict] = field(default_factory=list)  # text and score of each answer, best first
    error: str | None = None
    pieces: list[dict] = field(default_factory=list)  # of a long clip: start and end in s, text


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


def waveforms(paths: list, results: list[Translation], progress: bool) -> Iterator[tuple]:
    """What the encoder hears, (clip, first sample, last + 1, waveform), shortest clip first.

    A clip over 30 s comes in pieces, cut where it is quietest. A file is decoded when its turn
    comes, so memory holds one batch and one file; why a file is no use goes into `results`.
    """
    seconds = {}
    for i, path in enumerate(paths):
        try:
            seconds[i] = audio_seconds(path)
        except AudioError as error:
            results[i].error = str(error)
    order = sorted(seconds, key=seconds.get)  # similar lengths waste little padding
    for i in tqdm(order, "translating", unit="clip", disable=None if progress else True):
        try:
            audio = load_audio(paths[i])
        except AudioError as error:
            results[i].error = str(error)
            continue
        for start, end in split_at_quiet(audio, MAX_SECONDS * SAMPLE_RATE):
            yield i, start, end, audio[start:end]


@dataclass
class Answer:
    """One answer of the model, decoded."""

    text: str
    score: float
    tokens: int  # its end counted


def fill(result: Translation, pieces: list[tuple[int, int, list[Answer]]], n_best: int, space: str):
    """Write what was found into the result of a clip. pieces: first sample, last + 1, answers

    Of several pieces the best texts are joined, and the plain mean of their scores is the score.
    """
    best = [answers[0] for *_, answers in pieces]
    result.text = space.join(answer.text for answer in best if answer.text)
    result.score = round(sum(answer.score for answer in best) / len(best), 4)
    result.tokens = sum(answer.tokens for answer in best)
    if len(pieces) == 1:
        result.n_best = [{"text": a.text, "score": a.score} for a in pieces[0][-1][:n_best]]
        return
    result.n_best = [{"text": result.text, "score": result.score}]
    for start, end, answers in pieces:
        times = {"start": start / SAMPLE_RATE, "end": end / SAMPLE_RATE}
        result.pieces.append(times | {"text": answers[0].text})


def ids_of_prompt(model: LLaST, task: str, source: str, target: str) -> Tensor:
    """(T,), AUDIO_ID where that goes which was heard."""
    prompt = prompt_for(task, source, target, model.config.template)
    return torch.tensor(prompt_ids(prompt, model.tokenizer)).to(model.device)


@torch.inference_mode()
def answers_to(model: LLaST, ids: Tensor, heard: list, embed, search: tuple) -> list[list[Answer]]:
    """The answers to each of `heard`, best first.

    `embed` turns what was heard into what stands for it in the prompt, (S, D) each; `search` holds
    what beam_search takes after the ends. A batch that does not fit into memory is done in halves,
    with the same result.
    """
    ends = {*model.tokenizer.eos_ids, end_id(model.config.template, model.tokenizer)}
    try:
        prompts = [model.splice(ids, x) for x in embed(heard)]
        found = beam_search(model.llm, prompts, sorted(ends), *search)
        if not all(found):
            raise ValueError("the model answers with NaN: are its weights whole?")
        return [
            [Answer(model.tokenizer.decode(h.ids), round(h.score, 4), h.length) for h in best]
            for best in found
        ]
    except torch.OutOfMemoryError:
        if len(heard) == 1:
            raise
    half = len(heard) // 2  # out here the error no longer holds what was allocated
    first = answers_to(model, ids, heard[:half], embed, search)
    return first + answers_to(model, ids, heard[half:], embed, search)


def in_batches(model: LLaST, ids: Tensor, items, embed, batch_size: int, search: tuple) -> Iterator:
    """Each item with the answers to its last part, which is what was heard."""
    items = iter(items)
    while batch := list(islice(items, batch_size)):
        found = answers_to(model, ids, [heard for *_, heard in batch], embed, search)
        yield from zip(batch, found, strict=True)


def translate(
    model: LLaST,
    paths: list,
    task: str = "st",
    source: str = "fr",
    target: str = "en",
    beams: int = 5,
    length_penalty: float = 1.0,
    max_new_tokens: int = 256,
    n_best: int = 1,
    batch_size: int = 16,
    progress: bool = False,
) -> list[Translation]:
    """Translate (task "st") or transcribe ("asr") audio files of any length, in the order given.

    A clip that cannot be used gets an `error` and an empty text;
    the others are not touched by it. Of a clip over 30 s only the best answer is kept, joined from
    those of its pieces.
    """
    search = beams, length_penalty, max_new_tokens
    ids = ids_of_prompt(model, task, source, target)
    results = [Translation(str(path)) for path in paths]
    pieces = defaultdict(list)  # of each clip, in order: first sample, last + 1, answers
    was_training = model.training
    model.eval()
    heard, embed = waveforms(paths, results, progress), model.encode_speech
    for (i, start, end, _), answers in in_batches(model, ids, heard, embed, batch_size, search):
        pieces[i].append((start, end, answers))
    model.train(was_training)
    written = source if task == "asr" else target
    for i, parts in pieces.items():
        fill(results[i], parts, n_best, space="" if written in UNSPACED else " ")
    return results


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


def score_rows(model: LLaST, rows: list[Row], tsv: Path | None = None, **how) -> dict:
    """Translate rows of one direction and score what came of them."""
    source, target = rows[0].source, rows[0].target
    metrics(target)  # should a package be missing, say so before the work
    results = translate(model, [row.path for row in rows], "st", source, target, **how)
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


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Translate or transcribe with a trained LLaST.")
    add = parser.add_argument
    add("audio", nargs="+", help="audio files, folders of them, or .txt files with a path a line")
    add("--model", type=Path, help="folder that train.py wrote; without it the newest in runs/")
    add("--lang", help="language spoken, or direction as en-de, if the model knows several")
    add("--task", choices=("st", "asr"), default="st",
        help="st translates [st], asr transcribes")  # fmt: skip
    add("--beams", type=int, default=5, help="beams [5]; 1 is greedy search")
    add("--length-penalty", type=float, default=1.0, help="above 1 favours longer answers [1]")
    add("--max-new-tokens", type=int, default=256, help="longest answer, in tokens [256]")
    add("--n-best", type=int, default=1,
        help="answers to print of an audio file, scored [1]; a clip over 30 s has one")  # fmt: skip
    add("--batch", type=int, default=16, help="clips translated at once [16]")
    add("--json", action="store_true", help="one JSON object a clip")
    add("--compile", action="store_true",
        help="compile each layer: slow at first, then faster; on a CPU it needs g++")  # fmt: skip
    add("--encoder", type=Path, help="where the encoder's folder is now, if it has moved")
    add("--llm", type=Path, help="where the LLM's folder is now, if it has moved")
    return parser


def show(result: Translation, args: argparse.Namespace):
    """One line for a clip; with --n-best a line for each answer."""
    if args.json:
        print(json.dumps(asdict(result), ensure_ascii=False))
    elif result.error:
        print(result.error, file=sys.stderr)
    elif args.n_best == 1:
        print(f"{result.path}\t{one_line(result.text)}")
    else:
        for answer in result.n_best:
            print(f"{result.path}\t{answer['score']:.3f}\t{one_line(answer['text'])}")


def check(args: argparse.Namespace):
    """What a flag alone cannot know to be wrong."""
    for name in ("beams", "max_new_tokens", "n_best", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; 1 is the least")
    if not abs(args.length_penalty) <= 10:
        raise ValueError(f"--length-penalty is {args.length_penalty}; expected -10 to 10")
    if args.lang and "," in args.lang:
        raise ValueError(f"--lang is {args.lang}; all audio files are in one direction, name one")
    if args.n_best > args.beams:
        raise ValueError(f"--n-best {args.n_best} wants that many beams; --beams is {args.beams}")


def run(args: argparse.Namespace) -> int:
    check(args)
    paths = audio_paths(args.audio)
    folder = args.model or newest_run(HERE / "runs")
    if not args.model:
        print(f"no --model given: using the newest, {folder}", file=sys.stderr)
    device, dtype, _ = pick_device()
    with phase("while loading the model", "a smaller one needs less"):
        model = LLaST.from_pretrained(folder, args.encoder, args.llm, device, dtype)
        merge_lora(model, for_good=True)
    direction = choose_direction(model, args.lang, folder, args.task)
    if args.compile:
        model.compile_layers()
    how = {name: getattr(args, name) for name in ("beams", "length_penalty", "max_new_tokens")}
    how |= {"batch_size": args.batch, "n_best": args.n_best, "progress": len(paths) > args.batch}
    with phase("even with one clip at a time", "fewer --beams or --max-new-tokens need less"):
        results = translate(model, paths, args.task, *direction, **how)
    for result in results:
        show(result, args)
    return 1 if any(result.error for result in results) else 0


def main() -> int:
    args = build_parser().parse_args()
    try:
        return run(args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"translate.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
