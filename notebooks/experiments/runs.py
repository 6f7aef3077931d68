"""Train the models of all experiments, and append one line per finished run to results.jsonl.

    python notebooks/experiments/runs.py --list
    python notebooks/experiments/runs.py --only none dual
    python notebooks/experiments/runs.py --parallel 12          a GPU, or many cores

A run is a call of train.py with the options in RUNS and a seed. The runs in AFTER_DUAL are calls of
after.py, which measures more with the trained model "dual" of the same seed. A run that already has
a line in results.jsonl is not repeated. So after an interruption the same command continues. The
models and what the scripts printed stay in runs/experiments/NAME-SEED.
"""

import argparse
import json
import os
import re
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from dataclasses import asdict
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

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
# the preset itself, with both LoRAs. Most comparisons use it.
RUNS = {
    "dual": "--lang fr",
    # LoRA in no model, only in the encoder (S-LoRA), only in the LLM (L-LoRA)
    "none": "--lang fr --encoder-rank 0 --llm-rank 0",
    "s-lora": "--lang fr --llm-rank 0",
    "l-lora": "--lang fr --encoder-rank 0",
    # Equally many steps: two passes with only translations, or one pass with as many transcriptions
    "asr-0": "--lang fr --asr 0 --epochs 2",
    "asr-1": "--lang fr --asr 1 --epochs 1",
    # One pass, as "asr-1", but also over German and Spanish clips
    "three-languages": "--lang fr,de,es --asr 1 --epochs 1",
    # Half and a quarter of the 1,360 French clips
    "dual-half": "--lang fr --clips 680",
    "none-half": "--lang fr --clips 680 --encoder-rank 0 --llm-rank 0",
    "s-lora-half": "--lang fr --clips 680 --llm-rank 0",
    "l-lora-half": "--lang fr --clips 680 --encoder-rank 0",
    "dual-quarter": "--lang fr --clips 340",
    # As many passes as "dual" and "asr-0", with transcripts of a part of the clips
    "asr-tenth": "--lang fr --asr 0.1",
    "asr-half": "--lang fr --asr 0.5",
    # Only the ranks change. The learning rate and alpha / rank stay those of the preset.
    "rank-1": "--lang fr --encoder-rank 1 --llm-rank 1",
    "rank-4": "--lang fr --encoder-rank 4 --llm-rank 4",
    "rank-64": "--lang fr --encoder-rank 64 --llm-rank 64",
    # Short, because computing 30 s for every clip is slow. Without --parallel: it changes seconds.
    "window-clip": "--lang fr --clips 400 --epochs 1",
    "window-30s": "--lang fr --clips 400 --epochs 1 --window 30s",
    # Only the first layers of the encoder, see cut_encoder
    "layers-2": "--lang fr --encoder runs/experiments/whisper-2",
    "layers-4": "--lang fr --encoder runs/experiments/whisper-4",
    # Translate the test clips in one step or in two: scores, seconds and memory. Also without
    # --parallel.
    "end-to-end": "--lang fr",
    "cascade": "--lang fr",
    # One pass over noisy clips, in which only one part of the model is trained further
    "noise-before": "--lang fr --asr 0 --epochs 1",  # no training, only the scores
    "noise-encoder": "--lang fr --asr 0 --epochs 1",
    "noise-llm": "--lang fr --asr 0 --epochs 1",
    "noise-projector": "--lang fr --asr 0 --epochs 1",
    "noise-all": "--lang fr --asr 0 --epochs 1",
}
AFTER_DUAL = ("end-to-end", "cascade", *(name for name in RUNS if name.startswith("noise-")))
SEEDS_OF = {"window-clip": (0,), "window-30s": (0,)}  # runs that have other seeds than SEEDS


def settings_of(name: str) -> dict:
    """The settings of a run as they are in its line: numbers, and paths inside the repository."""
    args = build_parser().parse_args(RUNS[name].split())
    settings = {"clips": args.clips} | asdict(with_flags(PRESETS[args.preset], args))
    if name in AFTER_DUAL:
        settings["measurement"] = name
    return json.loads(json.dumps(settings, default=relative_path))


def relative_path(path: Path) -> str:
    return os.path.relpath(ROOT / path, ROOT)


def command_of(name: str, seed: int) -> list[str]:
    """The command of a run in the folder of the repository, without "python"."""
    model, folder = (relative_path(MODELS / f"{run}-{seed}") for run in ("dual", name))
    options = [*RUNS[name].split(), "--seed", str(seed), "--out", folder]
    if name in AFTER_DUAL:
        return ["notebooks/experiments/after.py", name, model, *options]
    return ["train.py", *options]


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
            # A setting that train.py no longer has is not compared.
            elif other := [k for k, v in line["settings"].items() if settings.get(k, v) != v]:
                raise ValueError(
                    f"{RESULTS}: the line of {name}, seed {seed} was measured with other settings: "
                    f"{', '.join(other)}; delete the line to repeat the run"
                )
    return todo


def cut_encoder(n_layers: int):
    """Write the encoder of the preset with only its first layers. Its final layer norm stays."""
    source, folder = PRESETS["tiny"].encoder, MODELS / f"whisper-{n_layers}"
    folder.mkdir(parents=True, exist_ok=True)
    kept = {}
    for name, tensor in load_file(source / "model.safetensors").items():
        layer = re.search(r"layers\.(\d+)\.", name)
        if not layer or int(layer[1]) < n_layers:
            kept[name] = tensor
    save_file(kept, folder / "model.safetensors")
    config = json.loads((source / "config.json").read_text()) | {"encoder_layers": n_layers}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def do_run(name: str, seed: int, threads: int) -> str:
    """Do one run in a process of its own, and append its line. Return a summary."""
    folder, dual = MODELS / f"{name}-{seed}", MODELS / f"dual-{seed}"
    if name in AFTER_DUAL and not (dual / "llast.json").is_file():
        advice = f"copy it, or delete its line in {RESULTS.name} and use --only dual"
        raise ValueError(f"{name}, seed {seed} needs the model {dual}, which is missing; {advice}")
    shutil.rmtree(folder, ignore_errors=True)  # left by a run that did not finish
    folder.parent.mkdir(parents=True, exist_ok=True)
    output = folder.with_suffix(".txt")
    command = [sys.executable, *command_of(name, seed)]
    threads = {"OMP_NUM_THREADS": str(threads)}
    with open(output, "w") as stream:
        code = subprocess.run(
            command, cwd=ROOT, env=os.environ | threads, stdout=stream, stderr=subprocess.STDOUT
        ).returncode
    if code:
        last = output.read_text().strip().splitlines()[-1:]
        raise ValueError(f"{name}, seed {seed} failed: {' '.join(last)}; see {output}")
    output.replace(folder / "output.txt")
    line = {"name": name, "seed": seed, "options": RUNS[name], "settings": settings_of(name)}
    line |= {"commit": commit(), "device": device_name() | threads} | read_run(folder)
    with open(RESULTS, "a") as stream:  # one write for each line, so parallel runs cannot mix lines
        stream.write(json.dumps(line) + "\n")
    bleu = ", ".join(f"{direction} {scores['bleu']}" for direction, scores in line["test"].items())
    return f"{name}, seed {seed}: {line['seconds']} s, BLEU {bleu}"


def read_run(folder: Path) -> dict:
    """What a line says about a finished run: steps, parameters, seconds, losses and scores."""
    if (folder / "line.json").is_file():  # after.py has already collected it
        return json.loads((folder / "line.json").read_text())
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
        "test": {name: scores | test_scores(folder, name) for name, scores in results.items()},
        "losses": means([line["loss"] for line in steps]),
        "grad_norms": means([line["grad_norm"] for line in steps]),
    }


def test_scores(folder: Path, direction: str) -> dict:
    """The scores of the test translations that train.py wrote."""
    columns = "hypothesis", "reference"
    rows = [row for _, row in read_table(folder / f"test.{direction}.tsv", columns)]
    texts, references = ([row[column] for row in rows] for column in columns)
    return score_texts(texts, references, direction.split("-", 1)[1])


def score_texts(texts: list[str], references: list[str], target: str = "en") -> dict:
    """BLEU with its 95 % interval, and the share of texts that equal their reference."""
    scores = score(texts, references, target, n_bootstrap=1000)
    exact = sum(text == reference for text, reference in zip(texts, references)) / len(texts)
    return {k: scores[k] for k in ("bleu", "bleu_interval", "n")} | {"exact": round(exact, 3)}


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


def do_runs(todo: list[tuple], parallel: int) -> int:
    """Do runs, `parallel` at a time. Return how many failed."""
    threads = 1 if parallel > 1 else torch.get_num_threads()
    failed = 0
    with ThreadPoolExecutor(parallel) as pool:
        jobs = [pool.submit(do_run, name, seed, threads) for name, seed in todo]
        try:
            for number, job in enumerate(as_completed(jobs), start=1):
                if error := job.exception():
                    failed += 1
                    print(f"runs.py: {error}", file=sys.stderr, flush=True)
                else:
                    print(f"{number} of {len(jobs)}: {job.result()}", flush=True)
        except KeyboardInterrupt:  # the scripts stop by themselves; do not start the other runs
            pool.shutdown(cancel_futures=True)
            raise
    return failed


def do_all(todo: list[tuple], parallel: int) -> int:
    """Do all runs, those that need the models "dual" last. Return how many failed."""
    for n_layers in (2, 4):
        if any(name == f"layers-{n_layers}" for name, _ in todo):
            cut_encoder(n_layers)
    last = [run for run in todo if run[0] in AFTER_DUAL]
    failed = do_runs([run for run in todo if run not in last], parallel)
    return failed + do_runs(last, parallel)


def print_list(names: list[str]):
    """Print each run, its command, and the seeds that have a line."""
    lines = read_results()
    for name in names:
        done = sorted(line["seed"] for line in lines if line["name"] == name)
        seeds = f"{len(done)} of {len(SEEDS_OF.get(name, SEEDS))} seeds"
        print(f"{name:16} {seeds:14} python {' '.join(command_of(name, 0))}")


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
        return 1 if do_all(runs_to_do(names, args.seeds), args.parallel) else 0
    except ValueError as error:
        print(f"runs.py: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("runs.py: stopped; the same command does the rest", file=sys.stderr)
        return 130


if __name__ == "__main__":
    sys.exit(main())
