"""Measure more with a trained model: its cost in one step or two, and which part learns noise.

    python notebooks/experiments/after.py cascade runs/fr --out runs/cascade
    python notebooks/experiments/after.py noise-llm runs/fr --asr 0 --epochs 1 --out runs/noise

runs.py calls this script. All options are those of train.py. The results are written to line.json
in the folder --out.

end-to-end, cascade    translate the test clips in one step, or transcribe them first
noise-encoder, ...     train only one part of the model, or all, on noisy clips; then translate the
                       test clips with the same noise and without it
noise-before           translate them without training
"""

import json
import time
from pathlib import Path

import torch
from runs import means, score_texts  # it adds the folder of the repository to sys.path
from torch import Tensor

from data import Batches, Row, read_corpus
from llast import LLaST, pick_device
from lora import merge_lora
from tools.cost import Meter
from tools.evaluate import run_task
from train import PRESETS, build_parser, train_epochs, with_flags
from translate import SearchOptions, translate

TASKS = {"end-to-end": "st", "cascade": "cascade"}
PARTS = {  # where the names of the trained parameters begin
    "noise-before": (),
    "noise-encoder": ("speech_encoder",),
    "noise-llm": ("llm",),
    "noise-projector": ("projector",),
    "noise-all": ("speech_encoder", "llm", "projector"),
}


def add_noise(audio: Tensor) -> Tensor:
    """White noise with the same power as the clip. (N,) -> (N,)"""
    noise = torch.randn(len(audio), generator=torch.Generator().manual_seed(len(audio)))
    return audio + noise * audio.norm() / noise.norm()


def scores_of(results: list, rows: list[Row]) -> dict:
    return score_texts([result.text for result in results], [row.translation for row in rows])


def measure_cost(model: LLaST, task: str, rows: list[Row]) -> dict:
    """Scores, time and memory of translating the rows."""
    merge_lora(model)
    meter = Meter(model)
    with meter:
        results = run_task(model, [row.path for row in rows], task, "fr", "en", SearchOptions())
    cost = meter.figures(results, sum(row.seconds for row in rows))
    return {"test": {"fr-en": scores_of(results, rows)}, "cost": cost}


def measure_noise(model: LLaST, parts: tuple, splits: dict, settings, seed: int) -> dict:
    """Train the parts on noisy clips. Then measure the model with noise and without it."""
    options = settings.asr, model.tokenizer, settings.template, settings.batch, seed
    curve = []  # loss and norm of the gradient of each step
    for name, p in model.named_parameters():
        p.requires_grad_(p.requires_grad and name.startswith(parts))
    trained = sum(tensor.numel() for tensor in model.trained().values())
    if parts:
        batches = Batches(splits["train"], *options, change=add_noise)
        train_epochs(model, batches, settings, lambda s: curve.append((s.loss, s.grad_norm)))
    line = {"steps": len(curve), "trained_parameters": trained, "test": {}}
    if curve:
        line |= {"losses": means([x for x, _ in curve]), "grad_norms": means([x for _, x in curve])}
    merge_lora(model.eval())
    for suffix, change in ("", None), (" with noise", add_noise):
        dev = Batches(splits["dev"], 0.0, *options[1:], change=change)
        line["dev_loss" + suffix] = round(mean_loss(model, dev), 4)
        results = translate(model, [row.path for row in splits["test"]], change=change)
        line["test"]["fr-en" + suffix] = scores_of(results, splits["test"])
    return line


@torch.inference_mode()
def mean_loss(model: LLaST, batches: Batches) -> float:
    """The mean loss of an answer token."""
    losses = [model(batches.load(group)) for group in batches.groups(0)]
    return torch.cat(losses).mean().item()


def main():
    parser = build_parser()
    parser.add_argument("measurement", choices=[*TASKS, *PARTS])
    parser.add_argument("model", type=Path, help="folder of a trained model")
    args = parser.parse_args()
    start = time.time()
    settings = with_flags(PRESETS[args.preset], args)
    splits = read_corpus(settings.data, "fr", "en")[0]
    splits["train"] = splits["train"][: args.clips]
    device, dtype, _ = pick_device(args.dtype)
    model = LLaST.from_pretrained(args.model, device=device, dtype=dtype)
    if task := TASKS.get(args.measurement):
        line = measure_cost(model, task, splits["test"])
    else:
        line = measure_noise(model, PARTS[args.measurement], splits, settings, args.seed)
    args.out.mkdir(parents=True, exist_ok=True)
    line["seconds"] = round(time.time() - start, 1)
    (args.out / "line.json").write_text(json.dumps(line) + "\n")


if __name__ == "__main__":
    main()
