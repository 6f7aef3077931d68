"""Train a LLaST.

    python train.py --lang fr                        the embedded default, minutes on a laptop
    python train.py --preset llast-8b --encoder W --llm L --data C --lang fr,de,es

One flat loop; every choice is a flag or a line of PRESETS. The loss is that of llast.py, the scores
are those of translate.py. To see it run: README.md.
"""

import argparse
import json
import math
import os
import random
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from tqdm import tqdm

from data import Batches, Row, check_language, read_corpus
from llast import LLaST, LLaSTConfig, pick_device
from translate import describe, score_rows, translate
from whisper_encoder import WINDOWS

HERE = Path(__file__).parent


@dataclass(frozen=True)
class Preset:
    """Every number of a training run that is not a matter of the machine or the corpus."""

    template: str
    window: str
    encoder_rank: int
    encoder_alpha: float
    llm_rank: int
    llm_alpha: float
    dropout: float
    asr: float  # share of clips that are also transcribed
    lr: float  # peak
    warmup: float  # share of all steps
    batch: int  # positions
    accumulate: int  # batches in one step of the optimizer
    epochs: int
    beams: int


# The paper's systems, with every number of the original's released configs but two: a batch is 16
# rows of any length there, a budget of positions of about that size here; and the learning rate
# falls along a cosine there, along a line here, as the paper says.
PAPER = dict(
    window="30s", encoder_rank=128, encoder_alpha=64, llm_rank=512, llm_alpha=256,
    dropout=0.05, asr=1.0, lr=2e-4, warmup=0.03, batch=6400, accumulate=2, epochs=1, beams=5,
)  # fmt: skip
PRESETS = {
    "tiny": Preset(
        template="llama2", window="clip", encoder_rank=16, encoder_alpha=32, llm_rank=16,
        llm_alpha=32, dropout=0.0, asr=0.0, lr=1e-3, warmup=0.05, batch=1100, accumulate=1,
        epochs=5, beams=5,
    ),
    "llast-2b": Preset(template="tinyllama", **PAPER),  # whisper-large-v2, TinyLlama-1.1B-Chat
    "llast-8b": Preset(template="llama2", **PAPER),  # whisper-large-v2, Llama-2-7b-chat
    "llast-14b": Preset(template="llama2", **PAPER),  # whisper-large-v2, Llama-2-13b-chat
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    tiny = HERE / "tiny"
    parser = argparse.ArgumentParser(
        description="Train a LLaST: speech in, text in another language out.",
        formatter_class=argparse.ArgumentDefaultsHelpFormatter,
    )
    add = parser.add_argument
    add("--lang", default="fr", help="languages spoken, as fr or fr,de,es; the target is English")
    add("--preset", choices=PRESETS, default="tiny", help="the row of PRESETS to start from")
    add("--data", type=Path, default=tiny / "corpus", help="corpus in CoVoST-2's layout")
    add("--encoder", type=Path, default=tiny / "whisper", help="folder of a Whisper checkpoint")
    add("--llm", type=Path, default=tiny / "llama", help="folder of a Llama checkpoint")
    add("--out", type=Path, help="folder to write; runs/LANG if not given")
    add("--asr", type=float, help="share of clips also transcribed; the preset's if not given")
    add("--clips", type=int, help="train on the first so many clips of each language")
    add("--window", choices=WINDOWS, help="what the encoder is given; the preset's if not given")
    add("--epochs", type=int, help="passes over all clips; the preset's if not given")
    add("--lr", type=float, help="peak learning rate; the preset's if not given")
    add("--batch", type=int, help="positions, speech and text; the preset's if not given")
    add("--accumulate", type=int, help="batches in one optimizer step; the preset's if not given")
    add("--seed", type=int, default=0, help="the one number that all randomness follows from")
    return parser


def short(path: Path) -> str:
    """The path as one would type it here."""
    return os.path.relpath(path) if path.absolute().is_relative_to(Path.cwd()) else str(path)


def with_flags(preset: Preset, args: argparse.Namespace) -> Preset:
    """The preset with what the command line says otherwise."""
    values = asdict(preset)
    for name in values:
        if getattr(args, name, None) is not None:
            values[name] = getattr(args, name)
    return Preset(**values)


# ---------------------------------------------------------------------------- what is printed first


def print_parts(model: LLaST):
    """How many parameters each part has and which of them are trained."""
    groups = {
        "encoder": ("speech_encoder.", False),
        "encoder LoRA": ("speech_encoder.", True),
        "projector": ("projector.", None),
        "LLM": ("llm.", False),
        "LLM LoRA": ("llm.", True),
    }
    print(f"\n{'part':14}{'trained':>14}{'frozen':>16}")
    totals = [0, 0]
    for label, (prefix, lora) in groups.items():
        counts = [0, 0]
        for name, parameter in model.named_parameters():
            if name.startswith(prefix) and lora in (None, "lora_" in name):
                counts[0 if parameter.requires_grad else 1] += parameter.numel()
        print(f"{label:14}{counts[0]:14,}{counts[1]:16,}")
        totals = [total + count for total, count in zip(totals, counts, strict=True)]
    print(f"{'all':14}{totals[0]:14,}{totals[1]:16,}\n")


def print_corpus(splits: dict[str, list[Row]], batches: Batches):
    """Clips and minutes by language and split, and the mix of tasks in an epoch."""
    examples = [example for group in batches.groups(0) for example in group]
    print(
        f"{'direction':12}{'split':8}{'clips':>8}{'minutes':>10}{'translate':>12}{'transcribe':>12}"
    )
    for split, rows in splits.items():
        for direction, here in sorted(by_direction(rows).items()):
            minutes = sum(row.seconds for row in here) / 60
            drawn = [e.task for e in examples if f"{e.row.source}-{e.row.target}" == direction]
            tasks = [drawn.count("st"), drawn.count("asr")] if split == "train" else [len(here), 0]
            print(f"{direction:12}{split:8}{len(here):8,}{minutes:10.1f}"
                  f"{tasks[0]:12,}{tasks[1]:12,}")  # fmt: skip
    print()


# ------------------------------------------------------------------------------------- the corpora


def read_all(args: argparse.Namespace, languages: list[str]) -> dict[str, list[Row]]:
    """The splits of all languages together; clips that cannot be used are counted and named."""
    splits = {"train": [], "dev": [], "test": []}
    for language in languages:
        found, unusable = read_corpus(args.data, language, "en")
        for reason in unusable[:5]:
            print(f"cannot be used: {reason}")
        if unusable:
            print(f"{language}: {len(unusable)} clips cannot be used; the first are named above")
        for split, rows in found.items():
            if not rows:
                raise ValueError(f"the {language}-en corpus in {args.data} has no {split} clips")
            splits[split] += rows[: args.clips] if split == "train" else rows
    return splits


def by_direction(rows: list[Row]) -> dict[str, list[Row]]:
    directions = {}
    for row in rows:
        directions.setdefault(f"{row.source}-{row.target}", []).append(row)
    return directions


# ----------------------------------------------------------------------------------- the evaluation


@torch.inference_mode()
def dev_loss(model: LLaST, batches: Batches) -> float:
    """Mean loss of an answer token over the dev rows, to translate only."""
    model.eval()
    total = tokens = 0
    for examples in batches.groups(0):
        batch = batches.load(examples)
        if batch is None:
            continue
        losses = model(batch)
        total, tokens = total + losses.sum().item(), tokens + len(losses)
    model.train()
    return total / tokens


def show_samples(model: LLaST, rows: list[Row]):
    """Three dev clips: what should have come out and what did."""
    for row in random.Random(0).sample(rows, min(3, len(rows))):
        [result] = translate(model, [row.path], "st", row.source, row.target, beams=1)
        tqdm.write(f"    said      {row.sentence}")
        tqdm.write(f"    expected  {row.translation}")
        tqdm.write(f"    got       {result.text}")


# ---------------------------------------------------------------------------------------- the run


def refuse_another_run(out: Path, about: dict):
    """The same command may run again; a folder made with other settings is not touched."""
    file = out / "run.json"
    if file.is_file():
        before = json.loads(file.read_text())
        other = [k for k in about if before.get(k) != about[k]]
        if other:
            changes = "; ".join(f"{k}: {before.get(k)} there, {about[k]} now" for k in other)
            raise ValueError(
                f"{out} holds a run with other settings ({changes}). "
                f"Name another folder with --out, or remove this one"
            )
    elif out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists and is no run of this program; name another with --out")


def train(model: LLaST, batches: Batches, dev: Batches, settings: Preset, out: Path):
    """The whiteboard loop: loss, gradient, step; dev scores and a save after every epoch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0)
    per_epoch = [
        math.ceil(len(batches.groups(e)) / settings.accumulate) for e in range(settings.epochs)
    ]
    steps = sum(per_epoch)
    warmup = max(1, round(settings.warmup * steps))

    def share_of_peak(step: int) -> float:
        return min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
    bar = tqdm(total=steps, unit="step", dynamic_ncols=True)
    for epoch in range(settings.epochs):
        model.train()
        groups = batches.groups(epoch)
        for start in range(0, len(groups), settings.accumulate):
            began = time.perf_counter()
            loaded = [batches.load(g) for g in groups[start : start + settings.accumulate]]
            loaded = [batch for batch in loaded if batch is not None]
            # Divide by the tokens of all batches of the step, so that each counts the same.
            tokens = sum(int((batch.labels >= 0).sum()) for batch in loaded)
            total = 0.0
            for batch in loaded:
                loss = model(batch).sum() / tokens
                loss.backward()
                total += loss.item()
            grad_norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
            lr = schedule.get_last_lr()[0]
            optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)

            clips = sum(len(batch.audio) for batch in loaded)
            speed = clips / (time.perf_counter() - began)
            bar.update()
            bar.set_postfix_str(f"loss {total:.3f}, lr {lr:.1e}, {speed:.0f} clips/s")
            line = {"step": bar.n, "epoch": epoch + 1, "loss": round(total, 5), "lr": lr}
            log(out, line | {"grad_norm": round(grad_norm, 4), "clips_per_second": round(speed, 1)})
        model.save_pretrained(out)
        line = {"step": bar.n, "epoch": epoch + 1, "dev_loss": round(dev_loss(model, dev), 4)}
        for direction, rows in by_direction(dev.rows).items():
            line[f"dev_bleu {direction}"] = score_rows(model, rows, beams=1)["bleu"]
        log(out, line)
        scores = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in line.items() if "dev" in k)
        tqdm.write(f"epoch {epoch + 1} of {settings.epochs}: {scores} (one beam)")
        show_samples(model, dev.rows)
    bar.close()


def log(out: Path, line: dict):
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def finish(model: LLaST, rows: list[Row], settings: Preset, out: Path, began: float):
    """Test scores of every direction, written and printed, and how to use the model."""
    results = {}
    for direction, here in by_direction(rows).items():
        scores = score_rows(model, here, out / f"test.{direction}.tsv", beams=settings.beams)
        results[direction] = scores
        print(f"test {describe(direction, scores)}")
    results["seconds"] = round(time.time() - began, 1)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(
        f"\n{results['seconds']:.0f} s in all. The model and its scores are in {short(out)}. Try:"
    )
    print_command(rows, out)


def print_command(rows: list[Row], out: Path):
    """How to translate a test clip; a model of several languages has to be told which it hears."""
    lang = f" --lang {rows[0].source}" if len(by_direction(rows)) > 1 else ""
    print(f"    python translate.py --model {short(out)}{lang} {short(rows[0].path)}")


def run(args: argparse.Namespace):
    began = time.time()
    settings = with_flags(PRESETS[args.preset], args)
    languages = [check_language(code) for code in args.lang.split(",")]
    out = args.out or HERE / "runs" / args.lang.replace(",", "-")
    if args.preset != "tiny" and HERE / "tiny" in (args.encoder.parent, args.llm.parent):
        raise ValueError(f"--preset {args.preset} needs real weights: give --encoder and --llm")
    about = vars(args) | asdict(settings)
    about = {k: v if isinstance(v, int | float) else str(v) for k, v in about.items() if k != "out"}
    refuse_another_run(out, about)
    torch.manual_seed(args.seed)
    device, dtype, reason = pick_device()
    print(f"device      {reason}")
    for label, path in (("encoder", args.encoder), ("LLM", args.llm), ("corpus", args.data)):
        print(f"{label:11} {short(path)}")

    splits = read_all(args, languages)
    shape = {k: v for k, v in asdict(settings).items() if k in LLaSTConfig.__dataclass_fields__}
    directions = tuple(f"{language}-en" for language in languages)
    config = LLaSTConfig(str(args.encoder), str(args.llm), directions=directions, **shape)
    model = LLaST(config, dtype).to(device)
    print_parts(model)
    drawn = model.tokenizer, settings.template, settings.batch, args.seed
    batches = Batches(splits["train"], settings.asr, *drawn)
    dev = Batches(splits["dev"], 0.0, *drawn)
    print_corpus(splits, batches)

    out.mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text(json.dumps(about, indent=2) + "\n")
    (out / "log.jsonl").write_text("")
    try:
        train(model, batches, dev, settings, out)
        for path, reason in batches.skipped.items():
            print(f"left out of training: {path}: {reason}")
        finish(model, splits["test"], settings, out, began)
    except KeyboardInterrupt:
        print("\nstopped by Ctrl-C; saving what has been learnt so far")
        model.save_pretrained(out)
        print_command(splits["test"], out)
        return 130
    return 0


def main() -> int:
    args = build_parser().parse_args()
    try:
        return run(args)
    except (ValueError, FileNotFoundError) as error:
        print(f"train.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    sys.exit(main())
