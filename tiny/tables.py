"""Write the tables of tiny/README.md from the result files.

    python tiny/tables.py

A table is between <!-- NAME --> and <!-- end --> in the README. tests/test_measure.py checks that
the tables in the README are those of the files.
"""

import json
import re
import statistics
from pathlib import Path

TINY = Path(__file__).resolve().parent
README = TINY / "README.md"
MEASURED = TINY / "results.json"  # written by measure.py
ATTENTION = TINY / "attention.json"  # written by attention.py
TRIALS = TINY / "trials.json"  # written by hand from the output of train.py
RUNS = TINY.parent / "notebooks" / "experiments" / "results.jsonl"  # written by runs.py

EXPERIMENTS = {  # name in results.jsonl: words in the table
    "none": "no LoRA, only the projector",
    "s-lora": "S-LoRA: only in the encoder",
    "l-lora": "L-LoRA: only in the LLM",
    "dual": "both (dual LoRA), the preset",
    "asr-0": "both, two passes, no transcription",
    "asr-1": "both, one pass, every clip also transcribed",
    "three-languages": "both, one pass, three languages",
}
CLAIMS = {  # claims of the paper: the run that should be better, and the other one
    "LoRA in the encoder helps": ("s-lora", "none"),
    "LoRA in the LLM helps": ("l-lora", "none"),
    "both are better than only the encoder's": ("dual", "s-lora"),
    "both are better than only the LLM's": ("dual", "l-lora"),
    "learning to transcribe helps, at equal steps": ("asr-1", "asr-0"),
    "two more languages help French": ("three-languages", "asr-1"),
}
SOUND = {
    "none": "the test clips as they are",
    "noise": "with white noise, 10 dB weaker than the speech",
    "mp3": "as mp3 with 44.1 kHz and two channels",
    "telephone": "telephone: 300 to 3,400 Hz, 8 kHz, mu-law",
}


def table(columns: list[str], rows: list[list]) -> str:
    """A Markdown table."""
    lines = [columns, ["---"] * len(columns), *rows]
    return "\n".join(f"| {' | '.join(map(str, line))} |" for line in lines)


def interval(scores: dict) -> str:
    """BLEU with half of the width of its 95 % interval."""
    low, high = scores["bleu_interval"]
    return f"{scores['bleu']:.1f} ± {(high - low) / 2:.1f}"


def bleu_row(name: str, scores: dict) -> list:
    return [name, scores["n"], interval(scores), f"{100 * scores['exact']:.0f} %"]


BLEU_COLUMNS = ["clips", "BLEU", "equal to the reference"]


def runs_of(name: str) -> list[dict]:
    """The lines of one run, seed after seed."""
    lines = [json.loads(line) for line in RUNS.read_text().splitlines()]
    return sorted((line for line in lines if line["name"] == name), key=lambda line: line["seed"])


def experiments_table() -> str:
    rows = []
    for name, words in EXPERIMENTS.items():
        group = runs_of(name)
        for direction in group[0]["test"]:
            tests = [line["test"][direction] for line in group]
            bleu = [scores["bleu"] for scores in tests]
            width = statistics.mean(s["bleu_interval"][1] - s["bleu_interval"][0] for s in tests)
            rows.append([
                words if direction == "fr-en" else "", direction, group[0]["steps"],
                f"{group[0]['trained_parameters']:,}",
                ", ".join(f"{line['dev_loss']:.3f}" for line in group),
                ", ".join(f"{line['dev_bleu'][direction]:.1f}" for line in group),
                ", ".join(f"{number:.1f}" for number in bleu),
                f"{statistics.mean(bleu):.1f}", f"± {width / 2:.1f}",
            ])  # fmt: skip
    columns = ["LoRA and data", "direction", "steps", "trained parameters", "dev loss", "dev BLEU"]
    devices = {line["device"]["device"] for name in EXPERIMENTS for line in runs_of(name)}
    commits = {line["commit"] for name in EXPERIMENTS for line in runs_of(name)}
    source = f"Device: {', '.join(sorted(devices))}. Commit: {', '.join(sorted(commits))}."
    return table([*columns, "test BLEU", "mean", "interval"], rows) + f"\n\n{source}"


def claims_table() -> str:
    """A claim is seen if each seed of the better run is above each seed of the other run."""
    rows = []
    for claim, names in CLAIMS.items():
        better, other = ([x["test"]["fr-en"]["bleu"] for x in runs_of(name)] for name in names)
        difference = statistics.mean(better) - statistics.mean(other)
        seen = "not seen: the seeds overlap"
        if min(better) > max(other):
            seen = "seen"
        elif max(better) < min(other):
            seen = "against it"
        losses = [statistics.mean(x["dev_loss"] for x in runs_of(name)) for name in names]
        rows.append([claim, f"{difference:+.1f}", f"{losses[0] - losses[1]:+.3f}", seen])
    return table(["claim", "BLEU, difference of the means", "dev loss", "in three seeds"], rows)


def model_line() -> str:
    weights = json.loads(MEASURED.read_text())["weights"]
    return f"SHA-256 of the trained tensors of the measured model: `{weights}`"


def sound_table() -> str:
    sound = json.loads(MEASURED.read_text())["sound"]
    names = {name: SOUND.get(name, f"test sentences in the voice `{name}`") for name in sound}
    rows = [bleu_row(names[name], scores) for name, scores in sound.items()]
    return table(["sound", *BLEU_COLUMNS], rows)


def parts_table() -> str:
    parts = json.loads(MEASURED.read_text())["parts"]
    rows = [bleu_row(name, scores) for name, scores in parts.items()]
    return table(["what the model uses", *BLEU_COLUMNS], rows)


def scores_table() -> str:
    scores = json.loads(MEASURED.read_text())["scores"]
    rows = []
    for name, group in scores["groups"].items():
        marked = f"{group['unlikely']} ({100 * group['unlikely'] / group['n']:.0f} %)"
        areas = [group.get(f"auc of {x}", "-") for x in ("test clips", "right translations")]
        rows.append([name, group["n"], f"{group['median']:.2f}", marked, *areas])
    columns = ["clips", "number", "median score", "marked `unlikely`"]
    return table([*columns, "area, all test clips", "area, right translations"], rows)


def trials_table() -> str:
    rows = []
    for trial in json.loads(TRIALS.read_text()):
        scores = [trial[name] for name in ("noise", "telephone", "voices", "test")]
        dev = ", ".join(f"{score:.1f}" for score in trial["dev"] or ()) or "-"
        scores = ["-" if score is None else f"{score:.1f}" for score in scores]
        options = f"`{trial['options']}`" if trial["options"] else "-"
        rows.append([trial["clips"], options, trial["device"], dev, *scores])
    columns = ["training clips", "options", "device", "dev", "dev, noise", "dev, telephone"]
    return table([*columns, "dev, other voices", "test"], rows)


def attention_table() -> str:
    results = json.loads(ATTENTION.read_text())
    rows = [
        [split, values["clips"], values["words"], f"{values['mean']:.2f}", f"{values['low']:.2f}"]
        for split, values in results["correlation"].items()
    ]
    columns = ["clips of", "clips", "words", "mean rank correlation", "10 % of the clips are below"]
    return f"Layer {results['layer']}, head {results['head']}:\n\n{table(columns, rows)}"


TABLES = {
    "experiments": experiments_table,
    "claims": claims_table,
    "model": model_line,
    "sound": sound_table,
    "parts": parts_table,
    "scores": scores_table,
    "attention": attention_table,
    "trials": trials_table,
}


def write_tables(text: str) -> str:
    """Replace each table that the text has a place for."""
    for name, make in TABLES.items():
        if f"<!-- {name} -->" in text:
            place = rf"(<!-- {name} -->\n).*?(<!-- end -->)"
            text = re.sub(place, lambda m, make=make: f"{m[1]}{make()}\n{m[2]}", text, flags=re.S)
    return text


if __name__ == "__main__":
    README.write_text(write_tables(README.read_text(encoding="utf-8")), encoding="utf-8")
