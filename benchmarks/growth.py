"""How time and memory grow with the length of a clip, the batch, the beams and the answer.

    python benchmarks/growth.py                      the embedded default
    python benchmarks/growth.py --size llast-2b      geometry of the paper's systems, on CUDA

One number is varied at a time, the others stay: for translating, and for the loss with its
gradient, a training step without the optimizer, whose part does not grow. Answers never end by
themselves, so that each has the wanted length. Medians; memory is what the work needs
on top of the model. Writes growth.json, growth.png and the table in README.md.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import matplotlib.pyplot as plt
import torch
from compare import (
    NEVER,
    PROMPT,
    SIZES,
    build_ours,
    in_window,
    row_of,
    training_batch,
)
from PIL import Image
from tqdm import tqdm

from benchmarks.measure import noise, peak_of, seconds_of, write_below
from data import AUDIO_ID
from llast import LLaST, pick_device
from lora import merge_lora
from translate import SearchOptions, beam_search

HERE = Path(__file__).parent
USUAL = {"seconds": 5, "batch": 4, "beams": 5, "answer": 24}
SWEEPS = {
    "seconds": (1, 2, 5, 10, 15, 20, 25, 30),
    "batch": (1, 2, 4, 8, 16, 32),
    "beams": (1, 2, 3, 5, 8, 10),
    "answer": (8, 16, 32, 64, 128),
}
LABELS = {
    "seconds": "seconds of a clip",
    "batch": "clips at once",
    "beams": "beams",
    "answer": "tokens of an answer",
}


def translating(model: LLaST, seconds: float, batch: int, beams: int, answer: int):
    prompt, _ = row_of(model.llm.config.vocab_size, 0)
    ids = torch.tensor(prompt, device=model.device)
    audio = [noise(seconds, i) for i in range(batch)]

    @torch.inference_mode()
    def work():
        prompts = [
            model.splice(ids, speech, prompt.index(AUDIO_ID))
            for speech in model.encode_speech(audio)
        ]
        beam_search(model.llm, prompts, [NEVER], SearchOptions(beams, 1.0, answer))

    return work


def training(model: LLaST, seconds: float, batch: int, **_):
    rows = training_batch(model.llm.config.vocab_size, [0] * batch)
    rows.audio = [noise(seconds, i) for i in range(batch)]

    def work():
        model(rows).sum().backward()
        model.zero_grad(set_to_none=True)

    return work


def measure(work, device, times: int) -> tuple[float, float]:
    """Median seconds, and megabytes at the peak."""
    work()
    taken = statistics.median(seconds_of(work, device) for _ in range(times))
    return taken, peak_of(work, device) / 1e6


def sweep(model: LLaST, times: int) -> list[dict]:
    """A line for each value that is tried, of a training step and of translating."""
    lines = []
    for what, work_of, names in (
        ("training", training, ("seconds", "batch")),
        ("translating", translating, SWEEPS),
    ):
        if what == "translating":
            merge_lora(model.eval())
        for name in names:
            for value in tqdm(SWEEPS[name], f"{what}, {LABELS[name]}", disable=None):
                work = work_of(model, **USUAL | {name: value})
                try:
                    seconds, megabytes = measure(work, model.device, times)
                except torch.OutOfMemoryError:
                    tqdm.write(f"{what} with {value} {LABELS[name]} does not fit: left out")
                    continue
                about = {"work": what, "varied": name, "value": value}
                lines.append(about | {"s": seconds, "mb": megabytes})
    return lines


def draw(lines: list[dict], title: str):
    figure, axes = plt.subplots(2, len(SWEEPS), figsize=(13, 5.6), sharex="col")
    for column, name in enumerate(SWEEPS):
        for row, (key, unit) in enumerate((("s", "seconds"), ("mb", "MB on top of the model"))):
            axis = axes[row][column]
            for what, color in (("translating", "tab:blue"), ("training", "tab:orange")):
                here = [n for n in lines if n["varied"] == name and n["work"] == what]
                if here:
                    label = {"translating": "translating", "training": "gradient (training)"}[what]
                    axis.plot([n["value"] for n in here], [n[key] for n in here], "o-",
                              color=color, markersize=4, label=label)  # fmt: skip
            axis.set_xlim(left=0)
            axis.set_ylim(bottom=0)
            axis.grid(alpha=0.3)
            if column == 0:
                axis.set_ylabel(unit)
            if row == 1:
                axis.set_xlabel(LABELS[name])
    axes[0][0].legend(frameon=False)
    figure.suptitle(title, fontsize=10)
    figure.tight_layout()
    figure.savefig(HERE / "growth.png", dpi=80)
    Image.open(HERE / "growth.png").quantize(32).save(HERE / "growth.png", optimize=True)


def table(lines: list[dict]) -> list[str]:
    rows = ["| varied | value | translating, s | MB | gradient, s | MB |", "|" + " --- |" * 6]
    for name, values in SWEEPS.items():
        for value in values:
            cells = [LABELS[name], str(value)]
            for what in ("translating", "training"):
                here = [n for n in lines if (n["work"], n["varied"], n["value"])
                        == (what, name, value)]  # fmt: skip
                cells += [f"{here[0]['s']:.3f}", f"{here[0]['mb']:,.0f}"] if here else ["", ""]
            rows.append("| " + " | ".join(cells) + " |")
    return rows


def main():
    device, dtype, reason = pick_device()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=["tiny", *SIZES], default="tiny")
    parser.add_argument("--times", type=int, default=5, help="runs of each; the median counts")
    args = parser.parse_args()
    torch.manual_seed(0)
    model = in_window(build_ours(args.size, device, dtype).train(), "clip")
    lines = sweep(model, args.times)
    about = {"size": args.size, "device": reason, "torch": torch.__version__,
             "date": time.strftime("%Y-%m-%d"), "times": args.times, "usual": USUAL}  # fmt: skip
    (HERE / "growth.json").write_text(json.dumps(about | {"lines": lines}, indent=1) + "\n")
    usual = f"{USUAL['seconds']} s, {USUAL['batch']} clips, {USUAL['beams']} beams, " \
            f"{USUAL['answer']} tokens"  # fmt: skip
    draw(lines, f"{args.size}, {reason}, torch {torch.__version__}; where not varied: {usual}")
    heading = f"{about['date']}, {args.size}, {reason}, torch {torch.__version__}, median of " \
           f"{args.times}; where not varied {usual}, the clip's own length, prompt of " \
           f"{PROMPT} tokens:\n"  # fmt: skip
    write_below("growth", [heading, *table(lines)])


if __name__ == "__main__":
    main()
