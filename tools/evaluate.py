"""Score test sets of many directions: BLEU, chrF, word and character error rates, cascade, cost."""

import argparse
import json
import sys
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository, whatever the folder is

from data import Row, parse_directions
from llast import LLaST, phase, pick_device
from lora import merge_lora
from tools.cost import Meter
from translate import (
    FIGURES,
    HERE,
    UNSPACED,
    Translation,
    choose_direction,
    describe,
    ids_of_prompt,
    in_batches,
    metrics,
    newest_run,
    read_splits,
    score,
    translate,
    write_results,
)

# ------------------------------------------------------------------------------------------ cascade


def cascade(
    model: LLaST,
    paths: list,
    source: str,
    target: str,
    beams: int = 5,
    length_penalty: float = 1.0,
    max_new_tokens: int = 256,
    batch_size: int = 16,
    progress: bool = False,
) -> list[Translation]:
    """Transcribe, then translate the transcripts, which stand where speech would: the same model.

    A long clip is translated piece by piece; an empty transcript stays empty.
    """
    search = beams, length_penalty, max_new_tokens
    how = {"batch_size": batch_size, "progress": progress}
    results = translate(model, paths, "asr", source, target, *search, **how)

    def embed(texts: list[str]) -> list[Tensor]:
        tokens = [torch.tensor(model.tokenizer.encode(text)) for text in texts]
        return [model.llm.embed(t.to(model.device)) for t in tokens]

    spoken = []  # (result, piece, transcript)
    for result in results:
        pieces = result.pieces or [{"text": result.text}]
        spoken += [(result, piece, piece["text"]) for piece in pieces if piece["text"]]
    spoken.sort(key=lambda one: len(one[-1]))
    ids = ids_of_prompt(model, "st", source, target)
    translated = defaultdict(list)
    for (result, piece, _), answers in in_batches(model, ids, spoken, embed, batch_size, search):
        piece["text"] = answers[0].text
        result.tokens += answers[0].tokens
        translated[id(result)].append((piece, answers[0].score))
    for result in results:
        pieces = translated[id(result)]
        if not pieces:
            continue
        texts = [piece["text"] for piece in result.pieces or [pieces[0][0]]]
        result.text = ("" if target in UNSPACED else " ").join(text for text in texts if text)
        result.score = round(sum(score for _, score in pieces) / len(pieces), 4)
        result.n_best = [{"text": result.text, "score": result.score}]
    return results


# ------------------------------------------------------------------------------------------- scores


def edit_distance(a: list | str, b: list | str) -> int:
    """Fewest insertions, deletions and substitutions that make b of a."""
    row = list(range(len(b) + 1))  # row[j]: from what was read of a to the first j of b
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def error_rates(hypotheses: list[str], references: list[str], language: str) -> dict:
    """Word and character error rates of transcripts: edits per 100 of the references', all clips.

    Case and punctuation count as they stand. Chinese and Japanese have no words that one could
    split off, so there each character is one, and both rates are the same.
    """
    unspaced = language in UNSPACED

    def characters(text: str) -> str:
        return ("" if unspaced else " ").join(text.split())

    def rate(units) -> float:
        pairs = [(units(h), units(r)) for h, r in zip(hypotheses, references, strict=True)]
        edits = sum(edit_distance(h, r) for h, r in pairs)
        return round(100 * edits / sum(len(r) for _, r in pairs), 2)

    return {
        "wer": rate(characters if unspaced else str.split),
        "cer": rate(characters),
        "signature": f"case:mixed|punct:kept|words:{'characters' if unspaced else 'spaces'}",
        "n": len(references),
    }


def rows_with_reference(rows: list[Row], task: str) -> list[Row]:
    """All rows; for task "asr", those with a transcript. What scoring needs is seen to be there."""
    if task != "asr":
        metrics(rows[0].target)  # should a package be missing, say so before the work
        return rows
    spoken, source = [row for row in rows if row.sentence.strip()], rows[0].source
    if not spoken:
        raise ValueError(f"none of the {len(rows)} {source} clips has a transcript to compare with")
    if len(spoken) < len(rows):
        missing = len(rows) - len(spoken)
        print(f"{missing} {source} clips have no transcript: left out", file=sys.stderr)
    return spoken


def table_line(name: str, cells: list) -> str:
    """A line of a table: a name and columns of numbers."""
    shown = ["-" if c is None else f"{c:.1f}" if isinstance(c, float) else str(c) for c in cells]
    return f"{name:<22}" + "".join(f"{cell:>13}" for cell in shown)


def table(scores: dict[str, dict]) -> list[str]:
    """Scores of several directions, their plain mean, and below it each signature once."""
    figures = [key for key in FIGURES if all(key in found for found in scores.values())]
    lines = [table_line("direction", ["clips", "failed", *(FIGURES[key] for key in figures)])]
    for direction, found in scores.items():
        lines.append(table_line(direction, [found[key] for key in ("n", "failed", *figures)]))
    means = [sum(found[key] for found in scores.values()) / len(scores) for key in figures]
    lines.append(table_line(f"average of {len(scores)}", ["", "", *means]))
    signed = defaultdict(list)
    for direction, found in scores.items():
        own = [found[key] for key in ("signature", "chrf_signature") if key in found]
        signed[",  chrF ".join(own)].append(direction)
    return lines + [f"{', '.join(names)}: {signature}" for signature, names in signed.items()]


PUBLISHED = {
    "published BLEU": ("fr-en", "ja-en", "de-en", "zh-CN-en", "es-en", "it-en"),
    "Whisper-large-v2": (36.4, 26.1, 36.3, 18.0, 40.1, 30.9),
    "SeamlessM4T-large-v2": (42.1, 23.8, 39.9, 22.2, 42.9, 40.0),
    "Qwen-Audio": (38.5, None, 33.9, 15.7, 39.7, 36.0),
    "LLaST-2B": (41.2, 24.2, 36.8, 19.2, 43.2, 39.3),
    "LLaST-8B": (44.1, 24.4, 40.8, 23.3, 45.3, 42.1),
    "LLaST-14B": (45.1, None, None, None, None, None),
}
CAVEAT = """\
On CoVoST-2's test sets: beside another corpus they compare with nothing. Quoted from Table 2 of a
later paper (PLaST, AAAI 2026), not from the papers of these models; the 45.1 is the headline in
summaries of LLaST, and that it is the 14B model's is inferred. Casing differs between papers (the
code of LLaST lower-cases both sides, as the column "lower-cased" does), and so do the releases of
Common Voice that the clips come from."""


def published(directions: list[str]) -> list[str]:
    """The published scores of those of the directions that have some, and what to mind."""
    columns = [i for i, name in enumerate(PUBLISHED["published BLEU"]) if name in directions]
    if not columns:
        return [f"no published BLEU at hand for {', '.join(directions)}"]
    rows = {name: [values[i] for i in columns] for name, values in PUBLISHED.items()}
    return [*(table_line(name, cells) for name, cells in rows.items() if any(cells)), CAVEAT]


# ------------------------------------------------------------------------------------- command line


def corpus_of(folder: Path) -> Path:
    """What a model was trained on, by the run.json beside it; without one the embedded corpus."""
    file = folder / "run.json"
    if file.is_file():
        return Path(json.loads(file.read_text())["data"])
    return HERE / "tiny" / "corpus"


def tsv_of(folder: Path, task: str, name: str) -> Path:
    """Where --test writes every clip; test.*.tsv is that of the training."""
    return folder / f"scored.{task}.{name}.tsv"


def must_be_writable(file: Path):
    """An error if not; the file is as it was before, or is not there as before."""
    was_there = file.exists()
    file.open("a").close()
    if not was_there:
        file.unlink()


def run_task(model: LLaST, paths: list, task: str, source: str, target: str, **how):
    if task == "cascade":
        return cascade(model, paths, source, target, **how)
    return translate(model, paths, task, source, target, **how)


def score_results(rows: list[Row], results: list[Translation], tsv: Path | None, task: str) -> dict:
    """Scores of the results of rows of one direction; `tsv` gets a line for each."""
    references = [row.sentence if task == "asr" else row.translation for row in rows]
    failed = write_results(rows, references, results, tsv)
    source, target = rows[0].source, rows[0].target
    rate, language = (error_rates, source) if task == "asr" else (score, target)
    return rate([r.text for r in results], references, language) | {"failed": failed}


def test_rows(model: LLaST, args, folder: Path, corpus: Path) -> dict[str, list[Row]]:
    """The rows of each test set that --test names, looked up before the first clip, for that may
    take hours."""
    tests = {}
    for source, target in parse_directions(args.test):
        name = source if args.task == "asr" else f"{source}-{target}"
        choose_direction(model, name, folder, args.task)  # or an error
        if name in tests:
            continue  # a language is transcribed once, whatever it is translated into
        rows = read_splits(corpus, source, target, asked=["test"])["test"]
        if not rows:
            raise ValueError(f"the {source}-{target} corpus in {corpus} has no test clips")
        tests[name] = rows_with_reference(rows, args.task)
    for name in tests:
        must_be_writable(tsv_of(folder, args.task, name))
    return tests


def run_tests(model: LLaST, args, folder: Path, how: dict, meter) -> list[Translation]:
    """Score the test sets that --test names. -> what came of their clips"""
    corpus = args.data or corpus_of(folder)
    tests = test_rows(model, args, folder, corpus)
    print(f"the corpus: {corpus}", file=sys.stderr)
    scores, everything = {}, []
    for name, rows in tests.items():
        tsv = tsv_of(folder, args.task, name)
        paths, pair = [row.path for row in rows], (rows[0].source, rows[0].target)
        with meter:
            results = run_task(model, paths, args.task, *pair, progress=True, **how)
        everything += results
        found = scores[name] = score_results(rows, results, tsv, args.task)
        print(f"every clip with its reference and its hypothesis: {tsv}", file=sys.stderr)
        if args.json:
            print(json.dumps({"direction": name, "task": args.task} | found), flush=True)
        else:  # of several, the table comes last; until then this tells how it goes
            print(describe(name, found), file=sys.stdout if len(tests) == 1 else sys.stderr)
    if len(tests) > 1 and not args.json:
        print(*table(scores), sep="\n")
    if args.published:
        print(*published(list(tests)), sep="\n", file=sys.stderr if args.json else sys.stdout)
    return everything


def show_cost(cost: dict[str, float | None], as_json: bool):
    """On stderr, so that texts and scores stay alone on stdout."""
    if as_json:
        print(json.dumps(cost), file=sys.stderr)
        return
    for name, value in cost.items():
        shown = "unknown" if value is None else f"{value:,}"
        print(f"{name.replace('_', ' '):18}{shown:>12}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Score test sets with a trained LLaST.")
    add = parser.add_argument
    add("--test", metavar="LANGS", required=True, help="directions to score, as fr,de,en-ja")
    add("--model", type=Path, help="folder that train.py wrote; without it the newest in runs/")
    add("--data", type=Path, help="the corpus [the one the model was trained on]")
    add("--task", choices=("st", "asr", "cascade"), default="st",
        help="st translates [st], asr transcribes, cascade translates the transcript")  # fmt: skip
    add("--published", action="store_true", help="print published scores beside those of --test")
    add("--stats", action="store_true", help="print time, arithmetic, memory and energy at the end")
    add("--beams", type=int, default=5, help="beams [5]; 1 is greedy search")
    add("--length-penalty", type=float, default=1.0, help="above 1 favours longer answers [1]")
    add("--max-new-tokens", type=int, default=256, help="longest answer, in tokens [256]")
    add("--batch", type=int, default=16, help="clips translated at once [16]")
    add("--json", action="store_true", help="one JSON object a direction")
    add("--compile", action="store_true",
        help="compile each layer: slow at first, then faster; on a CPU it needs g++")  # fmt: skip
    add("--encoder", type=Path, help="where the encoder's folder is now, if it has moved")
    add("--llm", type=Path, help="where the LLM's folder is now, if it has moved")
    return parser


def check(args: argparse.Namespace):
    """What a flag alone cannot know to be wrong."""
    for name in ("beams", "max_new_tokens", "batch"):
        if getattr(args, name) < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {getattr(args, name)}; 1 is the least")
    if not abs(args.length_penalty) <= 10:
        raise ValueError(f"--length-penalty is {args.length_penalty}; expected -10 to 10")
    if args.published and args.task == "asr":
        raise ValueError("--published stands beside the BLEU of --test, which --task asr has not")


def run(args: argparse.Namespace) -> int:
    check(args)
    folder = args.model or newest_run(HERE / "runs")
    if not args.model:
        print(f"no --model given: using the newest, {folder}", file=sys.stderr)
    device, dtype, _ = pick_device()
    with phase("while loading the model", "a smaller one needs less"):
        model = LLaST.from_pretrained(folder, args.encoder, args.llm, device, dtype)
        merge_lora(model, for_good=True)
    if args.compile:
        model.compile_layers()
    how = {name: getattr(args, name) for name in ("beams", "length_penalty", "max_new_tokens")}
    how["batch_size"] = args.batch
    meter = Meter(model) if args.stats else nullcontext()
    with phase("even with one clip at a time", "fewer --beams or --max-new-tokens need less"):
        everything = run_tests(model, args, folder, how, meter)
    if args.stats:
        show_cost(meter.figures(everything), args.json)
    return 1 if any(result.error for result in everything) else 0


def main() -> int:
    args = build_parser().parse_args()
    try:
        return run(args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, torch.OutOfMemoryError) as error:
        print(f"evaluate.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
