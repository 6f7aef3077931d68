"""Score test sets with a trained LLaST: BLEU, chrF, WER and CER, cascade, published scores, cost.

python tools/evaluate.py --model runs/fr --test fr,de
python tools/evaluate.py --model runs/fr --task cascade --stats clip.wav
"""

import argparse
import json
import sys
from collections import defaultdict
from contextlib import nullcontext
from pathlib import Path

import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's folder

from data import Row, parse_directions
from llast import LLaST
from tools.cost import Meter
from translate import (
    FIGURES,
    HERE,
    TOKENIZERS,
    SearchOptions,
    Translation,
    add_options,
    answer,
    audio_paths,
    check_options,
    choose_direction,
    describe,
    ids_of_prompt,
    load_model,
    metrics,
    print_json,
    read_splits,
    run_command,
    score,
    show,
    translate,
    write_results,
)
from whisper_encoder import audio_seconds

EMBEDDED = HERE / "tiny" / "corpus"

# ------------------------------------------------------------------------------------------ cascade


def cascade(
    model: LLaST,
    clips: list,
    source: str,
    target: str,
    search: SearchOptions,
    batch_size: int = 16,
    progress: bool = False,
) -> list[Translation]:
    """Transcribe each clip, then translate its transcript.

    The transcript replaces the speech in the prompt. Both steps use the same model. A long clip is
    translated piece by piece. An empty transcript stays empty.
    """
    options = {"batch_size": batch_size, "progress": progress}
    results = translate(model, clips, "asr", source, target, search, **options)

    def embed(transcripts: list[tuple]) -> list[Tensor]:
        ids = [torch.tensor(model.tokenizer.encode(piece["text"])) for _, piece in transcripts]
        return [model.llm.embed(i.to(model.device)) for i in ids]

    transcripts = []  # (result, piece) of each transcript that is not empty
    for result in results:
        pieces = result.pieces or [{"text": result.text}]
        transcripts += [(result, piece) for piece in pieces if piece["text"]]
    transcripts.sort(key=lambda transcript: len(transcript[1]["text"]))
    ids = ids_of_prompt(model, "st", source, target)
    translated = defaultdict(list)  # id of a result: its (piece, score) pairs
    for start in range(0, len(transcripts), batch_size):
        batch = transcripts[start : start + batch_size]
        answers = answer(model, ids, batch, embed, search)
        for (result, piece), (best, *_) in zip(batch, answers, strict=True):
            piece["text"] = best.text
            result.tokens += best.length
            translated[id(result)].append((piece, best.score))
    for result in results:
        if pieces := translated[id(result)]:
            texts = [piece["text"] for piece in result.pieces or [pieces[0][0]]]
            result.text = ("" if target in TOKENIZERS else " ").join(text for text in texts if text)
            result.score = round(sum(score for _, score in pieces) / len(pieces), 4)
            result.n_best = [{"text": result.text, "score": result.score}]
    return results


# ------------------------------------------------------------------------------------------- scores


def edit_distance(a: list | str, b: list | str) -> int:
    """The smallest number of insertions, deletions and substitutions that turn a into b."""
    row = list(range(len(b) + 1))  # row[j]: distance of b[:j] to the part of a so far
    for i, x in enumerate(a, start=1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, start=1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def error_rates(hypotheses: list[str], references: list[str], language: str) -> dict:
    """Word and character error rates of a corpus: edits per 100 words (characters) of references.

    Differences of case and punctuation count as edits. Chinese and Japanese have no spaces between
    words. There each character is a word, so both rates are equal.
    """
    unspaced = language in TOKENIZERS

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
    """All rows; for "asr" only those with a transcript. Also check that BLEU can be computed."""
    if task != "asr":
        metrics(rows[0].target)  # a missing package must be an error before the work
        return rows
    spoken, source = [row for row in rows if row.sentence.strip()], rows[0].source
    if not spoken:
        raise ValueError(
            f"none of the {len(rows)} {source} clips has a transcript to compare with; fill the "
            "column sentence of the corpus"
        )
    if len(spoken) < len(rows):
        missing = len(rows) - len(spoken)
        print(f"{missing} {source} clips have no transcript and are left out", file=sys.stderr)
    return spoken


def table_line(name: str, cells: list) -> str:
    """A line of a table: a name and columns of numbers."""
    texts = ["-" if c is None else f"{c:.1f}" if isinstance(c, float) else str(c) for c in cells]
    return f"{name:<22}" + "".join(f"{text:>13}" for text in texts)


def score_table(scores: dict[str, dict]) -> list[str]:
    """Lines with the scores of several directions, their plain mean, and each signature once."""
    figures = [key for key in FIGURES if all(key in row for row in scores.values())]
    lines = [table_line("direction", ["clips", "failed", *(FIGURES[key] for key in figures)])]
    for direction, row in scores.items():
        lines.append(table_line(direction, [row[key] for key in ("n", "failed", *figures)]))
    means = [sum(row[key] for row in scores.values()) / len(scores) for key in figures]
    lines.append(table_line(f"average of {len(scores)}", ["", "", *means]))
    directions = defaultdict(list)  # of each signature
    for direction, row in scores.items():
        signatures = [row[key] for key in ("signature", "chrf_signature") if key in row]
        directions[",  chrF ".join(signatures)].append(direction)
    return lines + [f"{', '.join(names)}: {signature}" for signature, names in directions.items()]


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
These are scores on the test sets of CoVoST-2. Do not compare them with scores on another corpus.
They are quoted from Table 2 of a later paper (PLaST, AAAI 2026), not from the papers of these
models. The 45.1 is from summaries of LLaST; we infer that it is the score of the 14B model. The
papers differ in casing: the code of LLaST lower-cases both sides, like the column "lower-cased".
They also differ in the release of Common Voice from which the clips are."""


def published_table(directions: list[str]) -> list[str]:
    """Lines with the published scores of the directions, if there are any, and how to read them."""
    columns = [i for i, name in enumerate(PUBLISHED["published BLEU"]) if name in directions]
    if not columns:
        return []
    rows = {name: [values[i] for i in columns] for name, values in PUBLISHED.items()}
    return [*(table_line(name, cells) for name, cells in rows.items() if any(cells)), CAVEAT]


# ------------------------------------------------------------------------------------- command line


def corpus_of(folder: Path) -> Path:
    """The corpus that a model was trained on. Without a run.json it is the included corpus."""
    file = folder / "run.json"
    if not file.is_file():
        return EMBEDDED
    try:
        return Path(json.loads(file.read_text(encoding="utf-8"))["data"])
    except (KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(
            f"the path of the corpus cannot be read from {file} ({error!r}); name it with --data"
        ) from error


def tsv_of(folder: Path, task: str, name: str) -> Path:
    """The file for the results of all test clips. train.py already writes test.*.tsv there."""
    return folder / f"scored.{task}.{name}.tsv"


def check_writable(file: Path):
    """Raise an error if the file cannot be written. Change nothing."""
    exists = file.exists()
    file.open("a").close()
    if not exists:
        file.unlink()


def run_task(model: LLaST, clips: list, task: str, *languages_and_search, **options):
    if task == "cascade":
        return cascade(model, clips, *languages_and_search, **options)
    return translate(model, clips, task, *languages_and_search, **options)


def score_results(rows: list[Row], results: list[Translation], tsv: Path | None, task: str) -> dict:
    """Score the results of rows of one direction, and write each of them to `tsv`."""
    references = [row.sentence if task == "asr" else row.translation for row in rows]
    failed = write_results(rows, references, results, tsv)
    source, target = rows[0].source, rows[0].target
    rate, language = (error_rates, source) if task == "asr" else (score, target)
    return rate([r.text for r in results], references, language) | {"failed": failed}


def read_tests(model: LLaST, args, folder: Path, corpus: Path) -> dict[str, list[Row]]:
    """The rows of each test set. Every wrong option is an error before the first translation."""
    tests = {}
    for source, target in parse_directions(args.test):
        name = source if args.task == "asr" else f"{source}-{target}"
        try:
            choose_direction(model, name, folder, args.task)
        except ValueError as error:
            trained = ", ".join(model.config.directions)
            raise ValueError(
                f"--test {args.test}: {folder} was not trained on {name}, only on {trained}"
            ) from error
        if name in tests:
            continue  # for en-de,en-ja, English is transcribed once
        rows = read_splits(corpus, source, target, ["test"])["test"]
        if not rows:
            raise ValueError(
                f"the {source}-{target} corpus in {corpus} has no test clips; use another --data"
            )
        tests[name] = rows_with_reference(rows, args.task)
    for name in tests:
        check_writable(tsv_of(folder, args.task, name))
    return tests


def run_tests(model: LLaST, args, folder: Path, search: SearchOptions, meter) -> list[Translation]:
    """Score the test sets that --test names. Return the results of all clips."""
    corpus = args.data or corpus_of(folder)
    tests = read_tests(model, args, folder, corpus)
    print(f"corpus: {corpus}", file=sys.stderr)
    options = {"batch_size": args.batch, "progress": True}
    scores, all_results = {}, []
    for name, rows in tests.items():
        tsv = tsv_of(folder, args.task, name)
        paths, languages = [row.path for row in rows], (rows[0].source, rows[0].target)
        with meter:
            results = run_task(model, paths, args.task, *languages, search, **options)
        all_results += results
        scores[name] = score_results(rows, results, tsv, args.task)
        print(f"every clip with its reference and its hypothesis: {tsv}", file=sys.stderr)
        if args.json:
            print_json({"direction": name, "task": args.task} | scores[name])
        else:  # the table of several directions is printed at the end
            file = sys.stdout if len(tests) == 1 else sys.stderr
            print(describe(name, scores[name]), file=file)
    if len(tests) > 1 and not args.json:
        print(*score_table(scores), sep="\n")
    if args.task != "asr" and corpus.resolve() != EMBEDDED.resolve():
        for line in published_table(list(tests)):
            print(line, file=sys.stderr if args.json else sys.stdout)
    return all_results


def run_clips(model: LLaST, args, folder: Path, search: SearchOptions, meter) -> list[Translation]:
    """Translate or transcribe single clips and print the results."""
    paths = audio_paths(args.audio)
    languages = choose_direction(model, args.lang, folder, args.task)
    with meter:
        results = run_task(model, paths, args.task, *languages, search, batch_size=args.batch)
    for result in results:
        show(result, args.json)
    return results


def print_cost(cost: dict[str, float | None], as_json: bool):
    """Print to stderr, so that stdout has only texts and scores."""
    if as_json:
        print_json(cost, file=sys.stderr)
        return
    for name, value in cost.items():
        number = "unknown" if value is None else f"{value:,}"
        print(f"{name.replace('_', ' '):18}{number:>12}", file=sys.stderr)


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Score test sets with a trained LLaST.")
    add = parser.add_argument
    add("audio", nargs="*", help="instead of --test: audio files, folders or .txt files, as for "
        "translate.py")  # fmt: skip
    add("--test", metavar="LANGS", help="directions to score, as fr,de,en-ja")
    add("--data", type=Path, help="corpus [the one that the model was trained on]")
    add("--lang", help="with audio files: language or direction, if the model has several")
    add("--task", choices=("st", "asr", "cascade"), default="st",
        help="st translates [st], asr transcribes, cascade translates the transcript")  # fmt: skip
    add("--stats", action="store_true", help="print time, FLOPs, memory and energy at the end")
    add_options(parser)
    return parser


def run(args: argparse.Namespace) -> int:
    search = check_options(args)
    if bool(args.test) == bool(args.audio):
        inputs = "both" if args.test else "neither"
        raise ValueError(f"expected --test or audio files, found {inputs}; give one of the two")
    for name, need in (("data", "test"), ("lang", "audio")):
        if getattr(args, name) and not getattr(args, need):
            other = "--test" if need == "test" else "audio files"
            raise ValueError(f"--{name} is only for {other}, which are not given; leave it out")
    model, folder = load_model(args)
    meter = Meter(model) if args.stats else nullcontext()
    results = (run_tests if args.test else run_clips)(model, args, folder, search, meter)
    if args.stats:
        used = [result.path for result in results if not result.error]
        print_cost(meter.figures(results, sum(map(audio_seconds, map(Path, used)))), args.json)
    return 1 if any(result.error for result in results) else 0


def main() -> int:
    return run_command("evaluate.py", run, build_parser().parse_args())


if __name__ == "__main__":
    sys.exit(main())
