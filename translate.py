"""Speech to text with a trained LLaST: beam search, scores, and the command line.

    python translate.py --model runs/fr clip.wav other.mp3
    python translate.py --model runs/fr --test fr

Beam search follows transformers' rules, so that both give the same hypotheses. One beam is greedy
search, and a beam as wide as all sentences is exhaustive search: tests/test_translate.py.
"""

import argparse
import json
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import sacrebleu
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from tqdm import tqdm

from data import (
    MAX_SECONDS,
    AudioError,
    Row,
    audio_seconds,
    check_language,
    load_audio,
    prompt_for,
    prompt_ids,
    read_corpus,
)
from llama import Cache, Llama
from llast import LLaST, pick_device
from lora import merge_lora

HERE = Path(__file__).parent
AUDIO_FILES = (".wav", ".flac", ".ogg", ".opus", ".mp3")


# -------------------------------------------------------------------------------------- beam search


@dataclass
class Hypothesis:
    """An answer: its tokens without the end, and the mean log-probability that ranks it."""

    ids: list[int]
    score: float


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
        self.best.append(Hypothesis(ids, self.score(log_prob, length)))
        self.best.sort(key=lambda hypothesis: -hypothesis.score)
        del self.best[self.W :]

    def check(self, best_running: float, length: int):
        """Done when all places are taken and no running beam, were it to end now, would get one."""
        if len(self.best) == self.W:
            self.done |= self.score(best_running, length) <= self.best[-1].score


def read_prompts(llm: Llama, prompts: list[Tensor], W: int) -> tuple[Tensor, Cache, Tensor]:
    """Read each prompt (P, D) once, then give each of its W beams what was read.

    Beam w of clip b is row b * W + w. Returns the last state of each row (B*W, D), the cache, and
    which of its keys are real rather than padding (B*W, P).
    """
    B, device = len(prompts), prompts[0].device
    lengths = torch.tensor([len(prompt) for prompt in prompts], device=device)
    x = pad_sequence(prompts, batch_first=True)  # (B, P, D)
    is_real = torch.arange(x.shape[1], device=device) < lengths[:, None]  # (B, P)
    hidden, cache = llm.hidden(x)  # (B, P, D)
    last = hidden[torch.arange(B, device=device), lengths - 1]  # (B, D)
    cache = [(k.repeat_interleave(W, dim=0), v.repeat_interleave(W, dim=0)) for k, v in cache]
    return last.repeat_interleave(W, dim=0), cache, is_real.repeat_interleave(W, dim=0)


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
    """
    B, W, V = len(prompts), beams, llm.config.vocab_size
    device = prompts[0].device
    finished = [Finished(W, length_penalty) for _ in prompts]
    last, cache, is_real = read_prompts(llm, prompts, W)
    lengths = is_real.sum(dim=1)  # (B*W,)
    # At first all beams of a clip are one and the same, so only the first may be continued.
    running = torch.tensor([0.0] + [-torch.inf] * (W - 1), device=device).repeat(B, 1)  # (B, W)
    answers = torch.empty(B * W, 0, dtype=torch.long, device=device)  # (B*W, 0)
    n_ends = len(eos_ids)

    for length in range(1, max_new_tokens + 1):
        log_probs = llm.logits(last).float().log_softmax(-1).view(B, W, V)  # (B, W, V)
        totals = (running[..., None] + log_probs).flatten(1)  # (B, W*V)
        # W of these go on even if every beam could end in each of the ends.
        best, index = totals.topk(min((n_ends + 1) * W, W * V))  # (B, (n_ends+1)*W)
        beam, token = index // V, index % V
        is_end = torch.isin(token, torch.tensor(eos_ids, device=device))

        for b, i in is_end[:, :W].nonzero().tolist():
            if best[b, i] > -torch.inf and not finished[b].done:
                ids = answers[b * W + beam[b, i]].tolist()
                finished[b].add(ids, best[b, i].item(), length)

        go_on = is_end.to(torch.int8).argsort(dim=1, stable=True)[:, :W]  # still best first
        running = best.masked_fill(is_end, -torch.inf).gather(1, go_on)  # (B, W)
        token, beam = token.gather(1, go_on), beam.gather(1, go_on)
        for b in range(B):
            finished[b].check(running[b, 0].item(), length)
        rows = (beam + W * torch.arange(B, device=device)[:, None]).flatten()  # (B*W,)
        answers = torch.cat([answers[rows], token.view(-1, 1)], dim=1)  # (B*W, length)
        if length == max_new_tokens or all(clip.done for clip in finished):
            break

        cache = [(k[rows], v[rows]) for k, v in cache]
        is_real = torch.cat([is_real, is_real.new_ones(B * W, 1)], dim=1)  # (B*W, P + length)
        positions = (lengths + length - 1)[:, None]  # (B*W, 1)
        hidden, cache = llm.hidden(llm.embed(token.view(-1, 1)), cache, positions, is_real)
        last = hidden[:, 0]  # (B*W, D)

    for b, clip in enumerate(finished):
        if not clip.done:
            for w in range(W):
                if running[b, w] > -torch.inf:
                    clip.add(answers[b * W + w].tolist(), running[b, w].item(), length)
    return [clip.best for clip in finished]


# ---------------------------------------------------------------------------------------- translate


@dataclass
class Translation:
    """What came of one clip: a text with its score, or the reason why there is none."""

    path: str
    text: str = ""
    score: float | None = None  # mean log-probability of a token
    n_best: list[dict] = field(default_factory=list)  # text and score of each answer, best first
    error: str | None = None


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
    """Translate (task "st") or transcribe ("asr") audio files, in the order given.

    A clip that cannot be used gets an `error` and an empty text; the others are not touched by it.
    """
    prompt = prompt_for(task, source, target, model.config.template)
    ids = torch.tensor(prompt_ids(prompt, model.tokenizer)).to(model.device)
    results = [Translation(str(path)) for path in paths]
    seconds = {}
    for i, path in enumerate(paths):
        try:
            seconds[i] = audio_seconds(path)
            if seconds[i] > MAX_SECONDS:
                reason = (
                    f"{seconds[i]:.1f} s long; the encoder hears {MAX_SECONDS} s: split the clip"
                )
                raise AudioError(path, reason)
        except AudioError as error:
            seconds.pop(i, None)
            results[i].error = str(error)

    was_training = model.training
    model.eval()
    order = sorted(seconds, key=seconds.get)  # similar lengths waste little padding
    for start in tqdm(range(0, len(order), batch_size), "translating", disable=not progress):
        clips = {}
        for i in order[start : start + batch_size]:
            try:
                clips[i] = load_audio(paths[i])
            except AudioError as error:
                results[i].error = str(error)
        if not clips:
            continue
        with torch.inference_mode():
            speech = model.encode_speech(list(clips.values()))
            prompts = [model.splice(ids, heard) for heard in speech]
        eos_ids = model.tokenizer.eos_ids
        answers = beam_search(model.llm, prompts, eos_ids, beams, length_penalty, max_new_tokens)
        for i, hypotheses in zip(clips, answers, strict=True):
            texts = [(model.tokenizer.decode(h.ids), round(h.score, 4)) for h in hypotheses]
            results[i].text, results[i].score = texts[0]
            results[i].n_best = [{"text": t, "score": s} for t, s in texts[:n_best]]
    model.train(was_training)
    return results


# ------------------------------------------------------------------------------------------- scores


def score(hypotheses: list[str], references: list[str]) -> dict:
    """Corpus BLEU cased and lower-cased and chrF by sacreBLEU, with the signature of the first."""
    if len(hypotheses) != len(references):
        raise ValueError(f"{len(hypotheses)} hypotheses for {len(references)} references")
    bleu, lower = sacrebleu.BLEU(), sacrebleu.BLEU(lowercase=True)
    return {
        "bleu": round(bleu.corpus_score(hypotheses, [references]).score, 2),
        "bleu_lc": round(lower.corpus_score(hypotheses, [references]).score, 2),
        "chrf": round(sacrebleu.CHRF().corpus_score(hypotheses, [references]).score, 2),
        "signature": str(bleu.get_signature()),
        "n": len(references),
    }


def score_rows(model: LLaST, rows: list[Row], tsv: Path | None = None, **how) -> dict:
    """Translate rows of one direction and score them; `tsv` gets a line for every clip.

    Nothing is dropped: a clip that failed counts as an empty hypothesis and is named.
    """
    direction = {"source": rows[0].source, "target": rows[0].target}
    results = translate(model, [row.path for row in rows], **direction, **how)
    failed = [result.error for result in results if result.error]
    for error in failed:
        print(f"scored as an empty translation: {error}", file=sys.stderr)
    if tsv:
        lines = ["clip\treference\thypothesis\tscore"]
        for row, result in zip(rows, results, strict=True):
            cells = row.path.name, row.translation, result.text, str(result.score)
            lines.append("\t".join(map(one_line, cells)))
        tsv.write_text("\n".join(lines) + "\n", encoding="utf-8")
    scores = score([result.text for result in results], [row.translation for row in rows])
    return scores | {"failed": len(failed)}


def one_line(text: str) -> str:
    """Text that stays in its cell and on its line."""
    return " ".join(text.split())


def describe(direction: str, scores: dict) -> str:
    """Scores as one line for a reader, the signature with them."""
    return (
        f"{direction} on {scores['n']} clips: BLEU {scores['bleu']:.1f}, lower-cased "
        f"{scores['bleu_lc']:.1f}, chrF {scores['chrf']:.1f}  ({scores['signature']})"
    )


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
        if argument.is_dir():
            inside = sorted(p for p in argument.iterdir() if p.suffix.lower() in AUDIO_FILES)
            if not inside:
                raise FileNotFoundError(f"{argument} holds no {', '.join(AUDIO_FILES)} file")
            paths += inside
        elif argument.suffix == ".txt":
            lines = argument.read_text(encoding="utf-8-sig").splitlines()
            paths += [argument.parent / line.strip() for line in lines if line.strip()]
        else:
            paths.append(argument)
    return paths


def choose_source(model: LLaST, lang: str | None, where: Path) -> str:
    """The language of the speech: as asked, or the only one that the model has learnt."""
    known = sorted({direction.rsplit("-", 1)[0] for direction in model.config.directions})
    if lang is None and len(known) > 1:
        raise ValueError(f"{where} knows {', '.join(known)}; say which is spoken with --lang")
    lang = check_language(lang or known[0])
    if lang not in known:
        raise ValueError(f"{where} was not trained on {lang!r}; it knows {', '.join(known)}")
    return lang


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Translate or transcribe speech with a trained LLaST.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("audio", nargs="*", help="audio files, folders of them, or .txt files with a path a line")
    add("--model", type=Path, help="folder that train.py wrote; without it the newest in runs/")
    add("--lang", help="language spoken, if the model knows several")
    add("--task", choices=("st", "asr"), default="st", help="st translates, asr transcribes")
    add("--beams", type=int, default=5, help="beams; 1 is greedy search")
    add("--length-penalty", type=float, default=1.0, help="above 1 favours longer answers")
    add("--max-new-tokens", type=int, default=256, help="longest answer, in tokens")
    add("--n-best", type=int, default=1, help="answers to print for a clip, with their scores")
    add("--batch", type=int, default=16, help="clips translated at once")
    add("--json", action="store_true", help="one JSON object a clip")
    add("--test", metavar="LANGS", help="score the test set of these languages, as fr,de")
    add("--data", type=Path, default=HERE / "tiny" / "corpus", help="corpus that --test reads")
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


def run(args: argparse.Namespace) -> int:
    if not args.audio and not args.test:
        raise ValueError("nothing to do: name audio files, or a test set with --test fr")
    for name in ("beams", "max_new_tokens", "n_best", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; 1 is the least")
    if args.n_best > args.beams:
        raise ValueError(f"--n-best {args.n_best} wants that many beams; --beams is {args.beams}")
    folder = args.model or newest_run(HERE / "runs")
    if not args.model:
        print(f"no --model given: using the newest, {folder}", file=sys.stderr)
    device, dtype, _ = pick_device()
    model = LLaST.from_pretrained(folder, args.encoder, args.llm, device, dtype)
    merge_lora(model)
    how = {
        "beams": args.beams,
        "length_penalty": args.length_penalty,
        "max_new_tokens": args.max_new_tokens,
        "batch_size": args.batch,
    }
    failed = 0
    for lang in args.test.split(",") if args.test else []:
        rows = read_corpus(args.data, choose_source(model, lang, folder), "en")[0]["test"]
        if not rows:
            raise ValueError(f"the {lang}-en corpus in {args.data} has no test clips")
        tsv = folder / f"test.{lang}-en.tsv"
        scores = score_rows(model, rows, tsv, progress=True, **how)
        print(json.dumps(scores) if args.json else describe(f"{lang}-en", scores))
        print(f"every clip with its reference and its translation: {tsv}", file=sys.stderr)
        failed += scores["failed"]
    if args.audio:
        paths = audio_paths(args.audio)
        source = choose_source(model, args.lang, folder)
        results = translate(model, paths, args.task, source, n_best=args.n_best, **how)
        for result in results:
            show(result, args)
        failed += sum(result.error is not None for result in results)
    return 1 if failed else 0


def main() -> int:
    args = build_parser().parse_args()
    try:
        return run(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"translate.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
