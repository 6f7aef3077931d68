"""From sound files to English text: this project and faster-whisper, both with whisper-base.

    pip install -r benchmarks/requirements.txt
    python benchmarks/speed.py --model runs/speech/base-0

Ours is a trained model of the preset "base": the encoder of whisper-base and SmolLM2-135M.
faster-whisper runs whisper-base with CTranslate2, which is written in C++ for fast translation. It
also needs the file tokenizer.json of openai/whisper-base in weights/whisper-base. Its temperature
is 0: by default it tries again at higher temperatures, which takes longer and gives other answers
each time. All use the CPU with one thread and five beams, and take turns. Writes speed.json and a
table in README.md.
"""

import argparse
import json
import platform
import statistics
import sys
import tempfile
import time
from functools import partial
from importlib.metadata import version
from pathlib import Path

import torch
from ctranslate2.converters import TransformersConverter
from faster_whisper import WhisperModel

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.measure import write_below  # noqa: E402
from data import read_corpus  # noqa: E402
from llast import LLaST  # noqa: E402
from lora import merge_lora  # noqa: E402
from train import PRESETS  # noqa: E402
from translate import SearchOptions, translate  # noqa: E402

N_CLIPS, ROUNDS, BEAMS = 8, 3, 5


def load_ours(folder: Path, precision: str):
    """A function (paths, clips in a batch) -> texts."""
    model = LLaST.from_pretrained(folder, dtype=getattr(torch, precision))
    merge_lora(model)
    search = SearchOptions(BEAMS)

    def run(paths: list[Path], batch_size: int) -> list[str]:
        results = translate(model, paths, "st", "fr", "en", search, batch_size=batch_size)
        return [result.text for result in results]

    return run


def load_peer(folder: Path, precision: str):
    """A function paths -> texts."""
    model = WhisperModel(str(folder), device="cpu", compute_type=precision, cpu_threads=1)

    def run(paths: list[Path]) -> list[str]:
        options = {"language": "fr", "task": "translate", "beam_size": BEAMS, "temperature": 0}
        answers = [model.transcribe(str(path), **options)[0] for path in paths]
        return ["".join(segment.text for segment in segments).strip() for segments in answers]

    return run


def measure(runs: dict, paths: list[Path]) -> dict[str, dict]:
    """Median seconds of each system, by the clock and of the CPU."""
    times = {name: [] for name in runs}
    for _ in range(ROUNDS):
        for name, run in runs.items():
            clock, cpu = time.perf_counter(), time.process_time()
            run(paths)
            times[name].append((time.perf_counter() - clock, time.process_time() - cpu))
    medians = {name: [statistics.median(t) for t in zip(*times[name])] for name in runs}
    return {name: {"clock": clock, "cpu": cpu} for name, (clock, cpu) in medians.items()}


def table_row(name: str, result: dict, ours: dict, seconds: float) -> str:
    by_cpu, by_clock = (seconds / result[key] for key in ("cpu", "clock"))
    return f"| {name} | {by_cpu:.2f} | {by_clock:.2f} | {ours['cpu'] / result['cpu']:.2f} |"


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a trained model of preset base")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = PRESETS["base"]
    rows = read_corpus(base.data, "fr", "en")[0]["test"][:N_CLIPS]
    paths = [row.path for row in rows]
    with tempfile.TemporaryDirectory() as folder:
        converter = TransformersConverter(str(base.encoder), copy_files=["tokenizer.json"])
        converter.convert(f"{folder}/whisper-base")
        runs = {}
        for precision in ("float32", "bfloat16"):
            ours = load_ours(args.model, precision)
            for n in (1, N_CLIPS):
                runs[f"ours, {precision}, batch of {n}"] = partial(ours, batch_size=n)
        for precision in ("float32", "int8"):
            runs[f"faster-whisper, {precision}"] = load_peer(f"{folder}/whisper-base", precision)
        results = measure(runs, paths)
    seconds = sum(row.seconds for row in rows)
    names = ("torch", "faster-whisper", "ctranslate2")
    packages = ", ".join(f"{name} {version(name)}" for name in names)
    clips = f"{len(rows)} clips of {seconds / len(rows):.1f} s on average"
    machine = (
        f"{platform.machine()}, 1 thread, {packages}: median of {ROUNDS} turns, {BEAMS} beams, "
        f"{clips}; ours: the preset base"
    )
    content = {"date": time.strftime("%Y-%m-%d"), "machine": machine, "seconds": seconds}
    content["results"] = results
    text = json.dumps(content, indent=1, ensure_ascii=False)
    (HERE / "speed.json").write_text(text + "\n", encoding="utf-8")
    lines = [f"{content['date']}, {machine}.", ""]
    lines += ["| system | audio s per CPU s | audio s per s | speed : ours one by one |"]
    lines += ["| --- | --- | --- | --- |"]
    first = next(iter(results.values()))
    lines += [table_row(name, result, first, seconds) for name, result in results.items()]
    write_below("speed", lines)


if __name__ == "__main__":
    main()
