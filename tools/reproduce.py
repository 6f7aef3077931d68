"""Train a preset with several seeds, score each model, and write a table of the scores.

    python tools/reproduce.py tiny --seeds 0,1,2
    python tools/reproduce.py llast-8b --seeds 0,1,2 --common-voice cv-corpus-4 --covost covost

    prepare the corpus -> for each seed: train, evaluate -> write the table

A step that is already done is skipped. So a run that was stopped continues with the same command.
"""

import argparse
import json
import os
import shlex
import signal
import subprocess
import sys
from collections import defaultdict
from dataclasses import asdict
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's folder

from data import parse_directions
from tools.evaluate import CAVEAT, PUBLISHED
from train import (
    DOWNLOADS,
    HERE,
    NOT_COMPARED,
    PRESETS,
    STATE,
    Preset,
    download_command,
    short,
    with_flags,
)
from train import build_parser as train_parser

# ----------------------------------------------------------------------------------- other programs


def run_program(file: str, *words, accepted: int = 0, gpus: int = 1) -> str:
    """Run another program of this repository until its end. Returns what it printed to stdout.

    Its exit code must be 0 or `accepted`. With several GPUs, torchrun starts it once for each.

    Ctrl-C stops it in the same way as when it is started by hand: it saves its work first. It gets
    a session of its own, because otherwise the terminal would send it the signal a second time.
    """
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", str(gpus)] if gpus > 1 else []
    command = [*torchrun, str(HERE / file), *map(str, words)]
    print(f"\n$ {shlex.join(['python', *command])}", flush=True)
    process = subprocess.Popen(
        [sys.executable, *command], stdout=subprocess.PIPE, text=True, start_new_session=True,
        env=os.environ | {"PYTHONUNBUFFERED": "1"},  # print its lines at once
    )  # fmt: skip
    lines = []
    try:
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        code = process.wait()
    except KeyboardInterrupt:
        process.send_signal(signal.SIGINT)
        process.wait()
        raise
    if code == 128 + signal.SIGINT:
        raise KeyboardInterrupt
    if code not in (0, accepted):
        raise ValueError(f"{file} ended with the exit code {code}; see its message above")
    return "".join(lines)


# -------------------------------------------------------------------------------------------- steps


def prepare(settings: Preset, args: argparse.Namespace):
    """Prepare the directions of CoVoST-2 that the corpus does not have."""
    missing = [
        f"{source}-{target}"
        for source, target in parse_directions(settings.lang)
        if not (settings.data / source / f"{source}-{target}.tsv").is_file()
    ]
    if not missing:
        return
    if not (args.common_voice and args.covost):
        raise ValueError(
            f"{short(settings.data)} has no corpus of {', '.join(missing)}; name the folders of "
            "Common Voice and CoVoST-2 with --common-voice and --covost, or another --data"
        )
    folders = "--common-voice", args.common_voice, "--covost", args.covost
    words = "covost2", *folders, "--lang", ",".join(missing), "--out", settings.data
    run_program("tools/prepare.py", *words)


def check_bases(settings: Preset):
    """Raise an error if a base model is missing: before hours of work, not after them."""
    for base in (settings.encoder, settings.llm):
        if not base.exists():
            is_public = base.name in DOWNLOADS
            advice = f"get it with\n    {download_command(base)}" if is_public else "check its path"
            raise FileNotFoundError(f"{short(base)} does not exist; {advice}")


def train_and_evaluate(folder: Path, seed: int, settings: Preset, args) -> dict[str, dict]:
    """The test scores of one seed, by direction. The model is trained if it does not exist yet."""
    results = folder / "results.json"
    if not (folder / "llast.json").is_file() or (folder / STATE).exists():
        own = "--preset", args.preset, "--seed", seed, "--out", folder
        run_program("train.py", *own, *args.train_options, gpus=args.gpus)
    check_settings(folder / "run.json", seed, settings, args)
    if not results.is_file():  # train.py writes it; delete it to score the model again
        words = "--model", folder, "--test", settings.lang, "--beams", settings.beams, "--json"
        words += "--data", settings.data
        # The exit code is 1 if a clip cannot be read. The scores count it as an empty translation.
        output = run_program("tools/evaluate.py", *words, accepted=1)
        scores = {row.pop("direction"): row for row in map(json.loads, output.splitlines())}
        results.write_text(json.dumps(scores, indent=2) + "\n")
    scores = json.loads(results.read_text())
    return {name: scores[name] for name in map("-".join, parse_directions(settings.lang))}


def check_settings(file: Path, seed: int, settings: Preset, args: argparse.Namespace):
    """Raise ValueError if a model was trained with other settings than those of the command."""
    expected = asdict(settings) | {"seed": seed, "clips": args.clips}
    expected |= {"dtype": args.dtype} if args.dtype else {}
    expected = json.loads(json.dumps(expected, default=str))  # JSON stores tuples as lists
    expected["accumulate"] *= args.gpus  # as in run.json: batches of a step, on all GPUs
    actual = json.loads(file.read_text())
    for name in sorted(expected.keys() - set(NOT_COMPARED)):
        if actual.get(name) != expected[name]:
            raise ValueError(
                f"{file.parent} has a model with {name} {actual.get(name)}, but this command has "
                f"{name} {expected[name]}; use the same options, or choose another --out"
            )


# ------------------------------------------------------------------------------------------ table


def markdown(cells) -> str:
    """A line of a table. None becomes an empty cell."""
    texts = ["" if c is None else f"{c:.1f}" if isinstance(c, float) else str(c) for c in cells]
    return f"| {' | '.join(texts)} |"


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def score_cells(by_seed: dict[int, dict], directions: list[str]) -> list:
    """BLEU of each seed, their mean and range, and the mean of lower-cased BLEU.

    Several directions count the same, whatever their numbers of clips are.
    """
    bleu, lower_cased = (
        [mean([scores[name][key] for name in directions]) for scores in by_seed.values()]
        for key in ("bleu", "bleu_lc")
    )
    return [*bleu, mean(bleu), f"{min(bleu):.1f} to {max(bleu):.1f}", mean(lower_cased)]


def table_lines(by_seed: dict[int, dict], is_covost: bool) -> list[str]:
    """Lines of a Markdown table: each direction, their average, and the published scores."""
    first = next(iter(by_seed.values()))
    directions, columns = list(first), PUBLISHED["published BLEU"]
    systems = {
        name: {direction: values[columns.index(direction)] for direction in columns}
        for name, values in list(PUBLISHED.items())[1:]
        if is_covost and set(columns) & set(directions)
    }
    header = ["direction", "clips", *(f"seed {seed}" for seed in by_seed)]
    header += ["mean", "range", "mean, lower-cased", *systems]
    lines = [markdown(header), markdown(["---"] * len(header))]
    signatures = defaultdict(list)
    for name in directions:
        published = [scores.get(name) for scores in systems.values()]
        cells = [name, first[name]["n"], *score_cells(by_seed, [name]), *published]
        lines.append(markdown(cells))
        signatures[first[name]["signature"]].append(name)
    if len(directions) > 1:
        lines.append(markdown(["average", None, *score_cells(by_seed, directions)]))
    lines += ["", *(f"{', '.join(names)}: {text}" for text, names in signatures.items())]
    if systems:
        lines += ["", "The columns after the lower-cased mean are published scores.", CAVEAT]
    return lines


def is_covost2(settings: Preset) -> bool:
    """Whether prepare.py made the corpus from CoVoST-2. Published scores are only for its clips."""
    reports = [
        settings.data / source / f"prepared.{source}-{target}.json"
        for source, target in parse_directions(settings.lang)
    ]
    return all(
        file.is_file() and json.loads(file.read_text(encoding="utf-8"))["corpus"] == "covost2"
        for file in reports
    )


def write_table(by_seed: dict[int, dict], settings: Preset, args: argparse.Namespace) -> str:
    """Write table.md, with the seeds that are done, and return it."""
    done = f"{len(by_seed)} of {len(args.seeds)} seed{'s'[: len(args.seeds) > 1]}"
    title = f"BLEU of the preset {args.preset} {shlex.join(args.train_options)}".rstrip()
    lines = [f"{title}, {done}. Range: from the lowest to the highest seed.", ""]
    text = "\n".join(lines + table_lines(by_seed, is_covost2(settings))) + "\n"
    (args.out / "table.md").write_text(text, encoding="utf-8")
    return text


# ------------------------------------------------------------------------------------- command line


def seed_list(text: str) -> list[int]:
    return [int(seed) for seed in text.split(",")]


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.splitlines()[0], epilog="It also takes all options of train.py."
    )
    add = parser.add_argument
    add("preset", choices=PRESETS, help="defaults of the other options")
    add("--seeds", type=seed_list, default=[0, 1, 2], help="random seeds [0,1,2]")
    add("--out", type=Path, help="folder for the models and the table [runs/reproduce-PRESET]")
    add("--gpus", type=int, default=1, help="GPUs of this computer for the training [1]")
    add("--common-voice", type=Path, help="Common Voice 4, if the corpus is not prepared yet")
    add("--covost", type=Path, help="tables of CoVoST-2, if the corpus is not prepared yet")
    return parser


def parse_options(argv: list[str] | None) -> tuple[argparse.Namespace, Preset]:
    """The options of this program, and the settings of train.py that the others mean."""
    args, args.train_options = build_parser().parse_known_args(argv)
    options = train_parser().parse_args(["--preset", args.preset, *args.train_options])
    if options.preset != args.preset:
        raise ValueError(f"--preset {options.preset} is not for this program; leave it out")
    args.clips, args.dtype = options.clips, options.dtype
    args.out = args.out or HERE / "runs" / f"reproduce-{args.preset}"
    return args, with_flags(PRESETS[args.preset], options)


def main(argv: list[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # escape what stdout cannot encode
    try:
        args, settings = parse_options(argv)
        check_bases(settings)
        prepare(settings, args)
        by_seed = {}
        for seed in args.seeds:
            by_seed[seed] = train_and_evaluate(args.out / f"seed{seed}", seed, settings, args)
            table = write_table(by_seed, settings, args)
        print(f"\n{table}\nThis table: {short(args.out / 'table.md')}")
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here", file=sys.stderr)
        return 130
    except (ValueError, OSError) as error:
        print(f"reproduce.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # handle SIGTERM like Ctrl-C
    sys.exit(main())
