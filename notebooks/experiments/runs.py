"""Train the models of all experiments, and append one line per finished run to results.jsonl.

    python notebooks/experiments/runs.py --list
    python notebooks/experiments/runs.py --only none dual
    python notebooks/experiments/runs.py --parallel 12          a GPU, or many cores

A run is a call of train.py with the options in RUNS and a seed. A run that already has a line in
results.jsonl is not repeated. So after an interruption the same command continues. The models and
what train.py printed stay in runs/experiments/NAME-SEED.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path.insert(0, str(ROOT))
from data import read_table  # noqa: E402
from train import PRESETS, build_parser, with_flags  # noqa: E402
from translate import score  # noqa: E402

RESULTS = HERE / "results.jsonl"
MODELS = ROOT / "runs" / "experiments"
SEEDS = (0, 1, 2)
N_MEANS = 50  # length of the loss and gradient curves in a line

# Name of a run: its options of train.py. Everything else is as in the preset "tiny", so "dual" is
# the preset itself, with both LoRAs. Several comparisons use it. "asr-0" and "asr-1" have equally
# many steps: two passes with only translations, or one pass with as many transcriptions. The runs
# with one pass are compared with each other: "three-languages" adds other languages to "asr-1".
RUNS = {
    "dual": "--lang fr",
    "none": "--lang fr --encoder-rank 0 --llm-rank 0",
    "s-lora": "--lang fr --llm-rank 0",
    "l-lora": "--lang fr --encoder-rank 0",
    "asr-0": "--lang fr --asr 0 --epochs 2",
    "asr-1": "--lang fr --asr 1 --epochs 1",
    "three-languages": "--lang fr,de,es --asr 1 --epochs 1",
}
SEEDS_OF = {}  # runs that have other seeds than SEEDS


def settings_of(name: str) -> dict:
    """The settings of a run as they are in its line: numbers, and paths inside the repository."""
    args = build_parser().parse_args(RUNS[name].split())
    settings = {"clips": args.clips} | asdict(with_flags(PRESETS[args.preset], args))
    return json.loads(json.dumps(settings, default=relative_path))


def relative_path(path: Path) -> str:
    return os.path.relpath(path, ROOT)


def read_results() -> list[dict]:
    """The lines of results.jsonl, or [] if there is no such file."""
    lines = RESULTS.read_text().splitlines() if RESULTS.is_file() else []
    return [json.loads(line) for line in lines]


def runs_to_do(names: list[str], seeds: list[int] | None) -> list[tuple]:
    """(name, seed) of each run without a line. A line with other settings is an error."""
    lines = {(line["name"], line["seed"]): line for line in read_results()}
    todo = []
    for name in names:
        settings = settings_of(name)
        for seed in seeds or SEEDS_OF.get(name, SEEDS):
            line = lines.get((name, seed))
            if line is None:
                todo.append((name, seed))
            elif other := [k for k, v in line["settings"].items() if settings.get(k) != v]:
                raise ValueError(
                    f"{RESULTS}: the line of {name}, seed {seed} was measured with other settings: "
                    f"{', '.join(other)}; delete the line to repeat the run"
                )
    return todo


def train_one(name: str, seed: int, threads: int) -> str:
    """Train and score one model in a process of its own, and append its line. Return a summary."""
    folder = MODELS / f"{name}-{seed}"
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that did not finish
    folder.parent.mkdir(parents=True, exist_ok=True)
    output = folder.with_suffix(".txt")
    command = [sys.executable, ROOT / "train.py", *RUNS[name].split()]
    command += ["--seed", str(seed), "--out", folder]
    threads = {"OMP_NUM_THREADS": str(threads)}
    with open(output, "w") as stream:
        code = subprocess.run(
            command, env=os.environ | threads, stdout=stream, stderr=subprocess.STDOUT
        ).returncode
    if code:
        last = output.read_text().strip().splitlines()[-1:]
        raise ValueError(f"{name}, seed {seed}: train.py failed: {' '.join(last)}; see {output}")
    output.replace(folder / "output.txt")
    line = {"name": name, "seed": seed, "options": RUNS[name], "settings": settings_of(name)}
    line |= {"commit": commit(), "device": device_name() | threads} | read_run(folder)
    with open(RESULTS, "a") as stream:  # one write for each line, so parallel runs cannot mix lines
        stream.write(json.dumps(line) + "\n")
    bleu = ", ".join(f"{direction} {scores['bleu']}" for direction, scores in line["test"].items())
    return f"{name}, seed {seed}: {line['seconds']} s, dev loss {line['dev_loss']}, BLEU {bleu}"


def read_run(folder: Path) -> dict:
    """What a line says about a finished run: steps, parameters, seconds, losses and scores."""
    log = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    steps = [line for line in log if "loss" in line]
    results = json.loads((folder / "results.json").read_text())
    trained = sum(tensor.numel() for tensor in load_file(folder / "llast.safetensors").values())
    last = log[-1]  # the scores after the last epoch
    return {
        "steps": len(steps),
        "trained_parameters": trained,
        "seconds": results.pop("seconds"),
        "dev_loss": last["dev_loss"],
        "dev_bleu": {k.split()[1]: v for k, v in last.items() if k.startswith("dev_bleu")},
        "test": {name: scores | test_details(folder, name) for name, scores in results.items()},
        "losses": means([line["loss"] for line in steps]),
        "grad_norms": means([line["grad_norm"] for line in steps]),
    }


def test_details(folder: Path, direction: str) -> dict:
    """The 95 % interval of BLEU, and the share of answers that equal their reference."""
    columns = "reference", "hypothesis"
    rows = [row for _, row in read_table(folder / f"test.{direction}.tsv", columns)]
    references, texts = ([row[column] for row in rows] for column in columns)
    scores = score(texts, references, direction.split("-", 1)[1], n_bootstrap=1000)
    exact = sum(text == reference for text, reference in zip(texts, references)) / len(rows)
    return {"bleu_interval": scores["bleu_interval"], "exact": round(exact, 3)}


def means(values: list[float]) -> list[float]:
    """Up to N_MEANS means of equally many neighbouring values: a curve that is short and smooth."""
    parts = torch.tensor(values).tensor_split(min(N_MEANS, len(values)))
    return [round(part.mean().item(), 4) for part in parts]


def commit() -> str:
    """The commit of the code. "+" means that files were changed since then."""
    if not shutil.which("git"):
        return "unknown"
    git = ["git", "-C", str(ROOT)]
    head = subprocess.run([*git, "rev-parse", "--short", "HEAD"], capture_output=True, text=True)
    if head.returncode:
        return "unknown"
    changed = subprocess.run([*git, "diff", "--quiet", "HEAD", "--", "*.py", "tiny"]).returncode
    return head.stdout.strip() + ("+" if changed else "")


def device_name() -> dict:
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"device": gpu or "CPU", "torch": torch.__version__}


def train_all(todo: list[tuple], parallel: int) -> int:
    """Do all runs, `parallel` at a time. Return the exit code: 1 if a run failed."""
    threads = 1 if parallel > 1 else torch.get_num_threads()
    failed = 0
    with ThreadPoolExecutor(parallel) as pool:
        jobs = [pool.submit(train_one, name, seed, threads) for name, seed in todo]
        try:
            for number, job in enumerate(as_completed(jobs), start=1):
                if error := job.exception():
                    failed += 1
                    print(f"runs.py: {error}", file=sys.stderr, flush=True)
                else:
                    print(f"{number} of {len(jobs)}: {job.result()}", flush=True)
        except KeyboardInterrupt:  # train.py stops by itself; do not start the other runs
            pool.shutdown(cancel_futures=True)
            return 130
    return 1 if failed else 0


def print_list(names: list[str]):
    """Print each run, its command, and the seeds that have a line."""
    lines = read_results()
    for name in names:
        done = sorted(line["seed"] for line in lines if line["name"] == name)
        seeds = f"{len(done)} of {len(SEEDS_OF.get(name, SEEDS))} seeds"
        print(f"{name:20} {seeds:14} python train.py {RUNS[name]}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--only", nargs="+", choices=RUNS, metavar="NAME", help="run only these [all]")
    add("--seeds", nargs="+", type=int, help="run only these seeds [0 1 2 for most runs]")
    add("--list", action="store_true", help="print the runs and what is done, and stop")
    add(
        "--parallel",
        type=int,
        default=1,
        help="runs at the same time [1]; with more than one, each uses one thread",
    )
    args = parser.parse_args()
    names = args.only or list(RUNS)
    if args.list:
        print_list(names)
        return 0
    try:
        return train_all(runs_to_do(names, args.seeds), args.parallel)
    except ValueError as error:
        print(f"runs.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
