"""BLEU of the preset base on the phrasebook and on human speech, compared with whisper-base.

    pip install -r benchmarks/requirements.txt
    python tools/prepare.py voice-prompts --lang fr --out corpus
    python benchmarks/speech.py --seeds 0,1,2

README.md lists what else it needs. It uses only the CPU. For each seed, three models are trained in
runs/speech, with the frozen weights in bfloat16:

base        train.py --preset base --dtype bfloat16 --compile, on the phrasebook
prompts     base, trained further on the prompts
projector   the same, but the LoRAs stay as they are

Two further trainings compare precisions: bfloat16 and float32 are base with --epochs 1.

whisper-base can translate by itself, with its own decoder (here run by faster-whisper). It is the
baseline for models with its encoder. Every training and every score goes into speech.json at once,
and is not repeated if it is there. So seeds can be added later. The script also writes the tables
in README.md.
"""

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from concurrent.futures import ProcessPoolExecutor
from dataclasses import replace
from functools import partial
from itertools import pairwise
from pathlib import Path
from statistics import mean

os.environ["CUDA_VISIBLE_DEVICES"] = ""  # all times are those of a CPU
import torch  # noqa: E402

HERE = Path(__file__).parent
ROOT = HERE.parent
sys.path.insert(0, str(ROOT))

import train  # noqa: E402
from benchmarks.measure import memory_line, write_below  # noqa: E402
from data import Row, read_corpus  # noqa: E402
from llast import LLaST  # noqa: E402
from lora import merge_lora  # noqa: E402
from tools.evaluate import cascade  # noqa: E402
from tools.reproduce import seed_list  # noqa: E402
from translate import SearchOptions, score, translate  # noqa: E402

RESULTS = HERE / "speech.json"
MODELS = ROOT / "runs" / "speech"
BASE = train.PRESETS["base"]
FURTHER = replace(BASE, epochs=3)  # the model can already translate, so fewer passes
PARTS = {"prompts": ("speech_encoder", "projector", "llm"), "projector": ("projector",)}
WHISPER = {"whisper-base, greedy": 1, "whisper-base, 5 beams": 5}  # name: beams
SCORED = {  # test set: systems that translate it. Those that are not greedy have five beams
    "phrasebook": (*WHISPER, "base", "base, float32", "prompts"),
    "prompts": (
        *WHISPER, "base", "prompts", "prompts, greedy", "prompts, length penalty 0.5",
        "prompts, cascade", "projector",
    ),
}  # fmt: skip


# ---------------------------------------------------------------------------------------- training


def train_base(options: str, out: Path) -> dict:
    """Train on the phrasebook, as train.py does. A training that was stopped continues."""
    options = [*f"--preset base --compile {options} --out".split(), str(out)]
    if not (out / "results.json").is_file():
        train.run(train.build_parser().parse_args(options))
    log = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    losses, times = {line["epoch"]: [] for line in log}, [0.0]
    for line in log:
        losses[line["epoch"]] += [line["loss"]] if "loss" in line else []
        times += [line["seconds"]] if "seconds" in line else []
    passes = [pass_of(losses[line["epoch"]], line) for line in log if "dev_loss" in line]
    # If a stopped training continues, the seconds in its log begin again at 0.
    seconds = sum(b - a if b > a else b for a, b in pairwise(times))
    return {"seconds": seconds, "passes": passes}


def train_further(parts: tuple, prompts: Path, source: Path, seed: int, out: Path) -> dict:
    """Train these parts of the model in the folder `source` on the prompts."""
    rows, losses, passes = read_corpus(prompts, "fr", "en")[0], [], []
    model = LLaST.from_pretrained(source, dtype=torch.bfloat16)
    model.compile_layers()
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    for name, p in trained.items():
        p.requires_grad_(name.startswith(parts))
    batches = train.make_batches(model, rows["train"], FURTHER, seed)
    dev = train.make_batches(model, rows["dev"], replace(FURTHER, asr=0.0), seed)

    def after_epoch(number):
        passes.append(pass_of(losses, train.dev_scores(model, dev)))
        losses.clear()
        print(out.name, passes[-1], flush=True)

    start = time.perf_counter()
    train.train_epochs(model, batches, FURTHER, lambda step: losses.append(step.loss), after_epoch)
    seconds = time.perf_counter() - start
    for p in trained.values():
        p.requires_grad_(True)  # only such tensors are saved
    model.save_pretrained(out)
    return {"seconds": seconds, "passes": passes}


def pass_of(losses: list[float], scores: dict) -> dict:
    """What happened in one pass: mean loss of its steps, dev loss and dev BLEU after it."""
    return {"loss": round(mean(losses), 3)} | {k: v for k, v in scores.items() if "dev" in k}


def run_training(function, out: Path) -> dict:
    """Run a training in a process of its own. Returns its passes, its time and its memory."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as process:
        return process.submit(with_peak, function, out).result()


def with_peak(function, out: Path) -> dict:
    training = function(out=out)
    cost = {"threads": torch.get_num_threads(), "peak_gb": round(memory_line("VmHWM") / 1e9, 2)}
    return training | cost


# ----------------------------------------------------------------------------------------- systems


def whisper_systems() -> dict:
    """{name: a function that translates rows} for whisper-base with one and with five beams."""
    from ctranslate2.converters import TransformersConverter
    from faster_whisper import WhisperModel

    with tempfile.TemporaryDirectory() as converted:
        converter = TransformersConverter(str(BASE.encoder), copy_files=["tokenizer.json"])
        converter.convert(f"{converted}/whisper-base")
        model = WhisperModel(f"{converted}/whisper-base", "cpu", compute_type="float32")

    def system(beams: int, rows: list[Row]) -> list[str]:
        # Temperature 0: by default it tries again at higher ones, with other answers each time.
        options = {"language": "fr", "task": "translate", "beam_size": beams, "temperature": 0}
        return [
            "".join(part.text for part in model.transcribe(str(row.path), **options)[0]).strip()
            for row in rows
        ]

    return {name: partial(system, beams) for name, beams in WHISPER.items()}


def trained_systems(name: str, folder: Path) -> dict:
    """{name: a function that translates rows} for a trained model in several ways."""
    in_bfloat16 = LLaST.from_pretrained(folder, dtype=torch.bfloat16)
    in_float32 = LLaST.from_pretrained(folder, dtype=torch.float32)
    merge_lora(in_bfloat16)
    merge_lora(in_float32)
    five_beams = SearchOptions()
    greedy, prefer_short = SearchOptions(beams=1), SearchOptions(length_penalty=0.5)

    def direct(model: LLaST, search: SearchOptions, rows: list[Row]) -> list[str]:
        paths = [row.path for row in rows]
        return [result.text for result in translate(model, paths, "st", "fr", "en", search)]

    def two_steps(rows: list[Row]) -> list[str]:
        paths = [row.path for row in rows]
        return [result.text for result in cascade(in_bfloat16, paths, "fr", "en", five_beams)]

    return {
        name: partial(direct, in_bfloat16, five_beams),
        f"{name}, float32": partial(direct, in_float32, five_beams),
        f"{name}, greedy": partial(direct, in_bfloat16, greedy),
        f"{name}, length penalty 0.5": partial(direct, in_bfloat16, prefer_short),
        f"{name}, cascade": two_steps,
    }


def run(system, rows: list[Row]) -> dict:
    """BLEU with its 95 % interval and chrF of a system, its time, and its first translations."""
    start = time.process_time()
    texts = system(rows)
    seconds = time.process_time() - start
    scores = score(texts, [row.translation for row in rows], n_bootstrap=1000)
    return scores | {"cpu_seconds": round(seconds, 1), "first": texts[:3]}


# ------------------------------------------------------------------------------------------ tables


def table(*rows) -> list[str]:
    """The lines of a table. The first row has the names of the columns."""
    line = ["---"] * len(rows[0])
    return [f"| {' | '.join(cells)} |" for cells in (rows[0], line, *rows[1:])]


def training_row(name: str, training: dict) -> list[str]:
    """Time and memory of a training, and its scores after each pass."""
    minutes, threads = training["seconds"] / 60, training["threads"]
    cost = f"{minutes:.0f}", str(threads), f"{training['peak_gb']:.1f}"
    curves = (
        ", ".join(f"{line[key]:.{digits}f}" for line in training["passes"])
        for key, digits in (("loss", 2), ("dev_loss", 2), ("dev_bleu fr-en", 1))
    )
    return [*name.split("-"), *cost, *curves]


def score_row(name: str, seeds: dict) -> list[str]:
    """The scores of a system on a test set, for all its seeds."""
    bleus = []
    for _, scores in sorted(seeds.items()):
        low, high = scores["bleu_interval"]
        bleus.append(f"{scores['bleu']:.1f} ({low:.1f} to {high:.1f})")
    bleu, chrf, seconds = (
        mean(scores[key] for scores in seeds.values()) for key in ("bleu", "chrf", "cpu_seconds")
    )
    return [*name.split(": "), ", ".join(bleus), f"{bleu:.1f}", f"{chrf:.1f}", f"{seconds:.0f}"]


def tables(results: dict) -> list[str]:
    names = ["model", "seed", "minutes", "threads", "peak GB"]
    names += ["loss of each pass", "dev loss", "dev BLEU"]
    trainings = [training_row(*item) for item in sorted(results["trainings"].items())]
    lines = [*table(names, *trainings), ""]
    names = "test set", "system", "BLEU of each seed (95 % interval)", "mean", "chrF", "CPU s"
    lines += table(names, *(score_row(*item) for item in sorted(results["scores"].items())))
    signatures = {r["signature"] for seeds in results["scores"].values() for r in seeds.values()}
    return [*lines, "", f"Signature: {', '.join(sorted(signatures))}"]


def save(results: dict):
    text = json.dumps(results, indent=1, ensure_ascii=False) + "\n"
    RESULTS.with_suffix(".tmp").write_text(text, encoding="utf-8")
    os.replace(RESULTS.with_suffix(".tmp"), RESULTS)
    write_below("speech", tables(results))


# --------------------------------------------------------------------------------------------- run


def train_all(results: dict, prompts: Path, seeds: list[int]):
    trainings = {}
    for seed in seeds:
        base = MODELS / f"base-{seed}"
        trainings[base.name] = partial(train_base, f"--dtype bfloat16 --seed {seed}")
        for name, parts in PARTS.items():
            trainings[f"{name}-{seed}"] = partial(train_further, parts, prompts, base, seed)
    for dtype in ("bfloat16", "float32"):
        trainings[f"{dtype}-0"] = partial(train_base, f"--dtype {dtype} --epochs 1")
    for name, function in trainings.items():
        if name not in results["trainings"]:
            results["trainings"][name] = run_training(function, MODELS / name)
            save(results)


def score_all(results: dict, tests: dict[str, list[Row]], seeds: list[int]):
    models = [("whisper-base", "0", whisper_systems)]  # it is not trained, so it has no seed
    for name in ("base", *PARTS):
        folders = {str(seed): MODELS / f"{name}-{seed}" for seed in seeds}
        models += [(name, seed, partial(trained_systems, name, f)) for seed, f in folders.items()]
    places = [(test, name) for test, names in SCORED.items() for name in names]
    for model, seed, load in models:
        todo = [
            (test, name)
            for test, name in places
            if name.startswith(model) and seed not in results["scores"].get(f"{test}: {name}", {})
        ]
        systems = load() if todo else {}
        for test, name in todo:
            scores = run(systems[name], tests[test])
            results["scores"].setdefault(f"{test}: {name}", {})[seed] = scores
            print(f"{test}, {name}, seed {seed}: BLEU {scores['bleu']}", flush=True)
            save(results)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--prompts", type=Path, default=ROOT / "corpus", help="corpus of voice prompts [corpus]")
    add("--seeds", type=seed_list, default=[0, 1, 2], help="random seeds [0,1,2]")
    args = parser.parse_args()
    tests = {
        "prompts": read_corpus(args.prompts, "fr", "en")[0]["test"],
        "phrasebook": read_corpus(BASE.data, "fr", "en")[0]["test"],
    }
    empty = {"trainings": {}, "scores": {}}
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else empty
    train_all(results, args.prompts, args.seeds)
    score_all(results, tests, args.seeds)


if __name__ == "__main__":
    main()
