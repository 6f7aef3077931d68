"""BLEU on human speech and on the phrasebook: whisper-base alone, and trained models.

    python tools/prepare.py voice-prompts --lang fr --out corpus
    python benchmarks/speech.py --models runs/reproduce-base/seed0 runs/reproduce-base/seed1

whisper-base can translate by itself, with its own decoder (here run by faster-whisper). It is the
baseline for models with its encoder. Every score goes into speech.json at once, and a score that is
there is not computed again. So the script can be stopped, and models can be added later. It also
writes the table in README.md.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path

import torch

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

from benchmarks.measure import write_below  # noqa: E402
from data import Row, read_corpus  # noqa: E402
from llast import LLaST  # noqa: E402
from lora import merge_lora  # noqa: E402
from tools.evaluate import cascade  # noqa: E402
from train import PRESETS  # noqa: E402
from translate import SearchOptions, score, translate  # noqa: E402

RESULTS = HERE / "speech.json"


def whisper_systems(folder: Path) -> dict:
    """{name: a function that translates rows} for whisper-base with one and with five beams."""
    from ctranslate2.converters import TransformersConverter
    from faster_whisper import WhisperModel

    with tempfile.TemporaryDirectory() as converted:
        converter = TransformersConverter(str(folder), copy_files=["tokenizer.json"])
        converter.convert(f"{converted}/whisper-base")
        model = WhisperModel(f"{converted}/whisper-base", "cpu", compute_type="float32")

    def system(beams: int):
        # Temperature 0: by default it tries again at higher ones, with other answers each time.
        options = {"language": "fr", "task": "translate", "beam_size": beams, "temperature": 0}
        return lambda rows: [
            "".join(part.text for part in model.transcribe(str(row.path), **options)[0]).strip()
            for row in rows
        ]

    return {"whisper-base, greedy": system(1), "whisper-base, 5 beams": system(5)}


def trained_systems(folder: Path) -> dict:
    """{name: a function that translates rows} for a trained model, directly and as a cascade."""
    model, name = LLaST.from_pretrained(folder), folder.name
    merge_lora(model)
    languages = "fr", "en", SearchOptions()

    def direct(rows):
        return [r.text for r in translate(model, [row.path for row in rows], "st", *languages)]

    def two_steps(rows):
        return [r.text for r in cascade(model, [row.path for row in rows], *languages)]

    systems = {f"{name}, 5 beams": direct}
    return systems | ({f"{name}, cascade": two_steps} if "asr" in model.config.tasks else {})


def run(system, rows: list[Row]) -> dict:
    """BLEU with its 95 % interval, lower-cased BLEU and chrF of a system, and its time."""
    start = time.process_time()
    texts = system(rows)
    scores = score(texts, [row.translation for row in rows], n_bootstrap=1000)
    return scores | {"cpu_seconds": round(time.process_time() - start, 1)}


def table_lines(results: dict) -> list[str]:
    names = "test set", "system", "clips", "BLEU", "95 % interval", "lower-cased", "chrF", "CPU s"
    lines = [f"| {' | '.join(names)} |", f"|{' --- |' * len(names)}"]
    for key, r in results.items():
        low, high = r["bleu_interval"]
        lines.append(
            f"| {' | '.join(key.split(': '))} | {r['n']} | {r['bleu']:.1f} | {low:.1f} to "
            f"{high:.1f} | {r['bleu_lc']:.1f} | {r['chrf']:.1f} | {r['cpu_seconds']:,.0f} |"
        )
    signatures = {r["signature"] for r in results.values()}
    return [*lines, "", f"Signature: {', '.join(sorted(signatures))}"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--prompts", type=Path, default=HERE.parent / "corpus", help="corpus of voice prompts")
    add("--models", type=Path, nargs="*", default=[], help="trained models of the preset base")
    names = "prompts", "phrasebook"
    add("--tests", nargs="+", choices=names, default=names, help="test sets [both]")
    args = parser.parse_args()
    torch.set_num_threads(1)
    base = PRESETS["base"]
    tests = {
        "prompts": read_corpus(args.prompts, "fr", "en")[0]["test"],
        "phrasebook": read_corpus(base.data, "fr", "en")[0]["test"],
    }
    results = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    sources = [lambda: whisper_systems(base.encoder)]
    sources += [lambda folder=folder: trained_systems(folder) for folder in args.models]
    for source in sources:
        for name, system in source().items():
            for test in args.tests:
                key, rows = f"{test}: {name}", tests[test]
                if key not in results:
                    results[key] = run(system, rows)
                    text = json.dumps(results, indent=1, ensure_ascii=False)
                    RESULTS.write_text(text + "\n", encoding="utf-8")
                    print(key, results[key]["bleu"], flush=True)
                    write_below("speech", table_lines(dict(sorted(results.items()))))


if __name__ == "__main__":
    main()
