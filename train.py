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
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from tqdm import tqdm

from data import TEMPLATES, Batch, Batches, Row, describe_overlap, every_nth, parse_directions
from llast import (
    LLaST,
    LLaSTConfig,
    phase,
    pick_device,
)
from lora import merge_lora
from translate import SearchOptions, describe, metrics, read_splits, score_rows, translate
from whisper_encoder import WINDOWS

HERE = Path(__file__).parent
RECOMPUTE = ("none", "llm", "all")
LESS = "a smaller --batch with a larger --accumulate, --recompute all or --trim need less"
SMALLER = "smaller models (--encoder, --llm) need less"
DEV_CLIPS = 500  # of each direction: all of CoVoST-2's would take hours to score


@dataclass(frozen=True)
class Preset:
    """Every choice of a training run that is not a matter of the machine."""

    encoder: Path  # Whisper checkpoint
    llm: Path  # Llama checkpoint
    data: Path  # corpus
    lang: str  # directions
    template: str
    window: str
    encoder_rank: int
    encoder_alpha: float
    llm_rank: int
    llm_alpha: float
    dropout: float
    asr: float  # share of clips that are also transcribed
    en_step: int  # of the clips in English every n-th is trained on
    lr: float  # peak
    schedule: str
    warmup: float  # share of all steps
    batch: int  # positions
    accumulate: int  # batches in one step of the optimizer
    recompute: str  # whose activations, for the gradient: none, llm, all; slower, far less memory
    epochs: int
    beams: int


# The paper's systems: every number is that of the original's released configurations
# (workspace/llast_2b_tinyllama_chat.py, llast_8b_llama2_chat.py; the 14B has none, and takes those
# of the 8B), but for three. A batch is 16 rows of any length there, a budget of positions of about
# that size here. The learning rate falls along a cosine there; the paper says a line, so does this
# (--schedule cosine gives the other). Their frozen LLM is in 4 bits, this one in 16.
TINY, WEIGHTS = HERE / "tiny", HERE / "weights"
PAPER = dict(
    encoder=WEIGHTS / "whisper-large-v2", data=HERE / "corpus", lang="paper", window="30s",
    encoder_rank=128, encoder_alpha=64, llm_rank=512, llm_alpha=256, dropout=0.05, asr=1.0,
    en_step=1, lr=2e-4, schedule="linear", warmup=0.03, batch=6400, accumulate=2,
    recompute="all", epochs=1, beams=5,
)  # fmt: skip
PRESETS = {
    "tiny": Preset(
        encoder=TINY / "whisper", llm=TINY / "llama", data=TINY / "corpus", lang="fr",
        template="llama2", window="clip", encoder_rank=16, encoder_alpha=8, llm_rank=16,
        llm_alpha=8, dropout=0.0, asr=1.0, en_step=1, lr=1e-3, schedule="linear", warmup=0.05,
        batch=1100, accumulate=1, recompute="none", epochs=2, beams=5,
    ),
    "llast-2b": Preset(llm=WEIGHTS / "TinyLlama-1.1B-Chat-v1.0", template="tinyllama", **PAPER),
    "llast-8b": Preset(llm=WEIGHTS / "Llama-2-7b-chat-hf", template="llama2", **PAPER),
    "llast-14b": Preset(llm=WEIGHTS / "Llama-2-13b-chat-hf", template="llama2", **PAPER),
}  # fmt: skip


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description="Train a LLaST: speech in, text in another language out.",
        epilog="What is not given is as the preset has it.",
    )
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="tiny", help="the row of PRESETS to start from [tiny]")
    add("--lang", help="directions: fr (into English), fr,de, en-de, all, or paper for its nine")
    add("--data", type=Path, help="corpus in CoVoST-2's layout, as data.py prepares it")
    add("--encoder", type=Path, help="a Whisper checkpoint: folder, or one of OpenAI's .pt files")
    add("--llm", type=Path, help="a Llama checkpoint: folder")
    add("--out", type=Path, help="folder to write [runs/LANG]")
    add("--template", choices=TEMPLATES, help="how the prompt is written")
    add("--window", choices=WINDOWS, help="audio given to the encoder: padded to 30 s, or the clip")
    add("--trim", dest="window", action="store_const", const="clip", help="same as --window clip")
    add("--asr", type=float, help="share of clips that are also transcribed, 0 to 1")
    add("--en-step", type=int, help="of the clips in English train on every n-th")
    add("--clips", type=int, help="train on the first so many clips of each direction")
    add("--epochs", type=int, help="passes over all clips")
    add("--lr", type=float, help="peak learning rate")
    add("--schedule", choices=("linear", "cosine"), help="how the learning rate falls to 0")
    add("--batch", type=int, help="positions, speech and text, in a batch")
    add("--accumulate", type=int, help="batches in one step of the optimizer")
    add("--recompute", choices=RECOMPUTE,
        help="whose activations to compute again: less memory, more time")  # fmt: skip
    add("--compile", action="store_true",
        help="compile each layer: slow at first, then faster; on a CPU it needs g++")  # fmt: skip
    add("--seed", type=int, default=0, help="the one number that all randomness follows from [0]")
    return parser


def short(path: Path) -> str:
    """The path as one would type it here."""
    return os.path.relpath(path) if path.absolute().is_relative_to(Path.cwd()) else str(path)


def with_flags(preset: Preset, args: argparse.Namespace) -> Preset:
    """The preset with what the command line says otherwise."""
    given = {k: v for k, v in vars(args).items() if k in asdict(preset) and v is not None}
    settings = replace(preset, **given)
    for name in ("epochs", "batch", "accumulate", "en_step", "clips"):
        value = args.clips if name == "clips" else getattr(settings, name)
        if value is not None and value < 1:
            raise ValueError(f"--{name.replace('_', '-')} is {value}; 1 is the least")
    if not 0 <= settings.asr <= 1:
        raise ValueError(f"--asr is {settings.asr}; it is a share, from 0 (none) to 1 (every clip)")
    if not 0 < settings.lr < math.inf:
        raise ValueError(f"--lr is {settings.lr}; it has to be a number above 0")
    return settings


PUBLIC = {  # folder: where it is published, what to fetch of it
    "whisper-large-v2": ("openai/whisper-large-v2", "config.json model.safetensors"),
    "TinyLlama-1.1B-Chat-v1.0": (
        "TinyLlama/TinyLlama-1.1B-Chat-v1.0", "config.json tokenizer.model model.safetensors",
    ),
    "Llama-2-7b-chat-hf": ("NousResearch/Llama-2-7b-chat-hf", "--exclude '*.bin'"),
    "Llama-2-13b-chat-hf": ("NousResearch/Llama-2-13b-chat-hf", "--exclude '*.bin'"),
}  # fmt: skip


def fetch(folder: Path) -> str:
    """The command that downloads a public checkpoint to where it is expected."""
    name, what = PUBLIC[folder.name]
    return f"hf download {name} {what} --local-dir {short(folder)}"


def model_config(settings: Preset) -> LLaSTConfig:
    """What of the settings the model itself has to remember."""
    shape = {k: v for k, v in asdict(settings).items() if k in LLaSTConfig.__dataclass_fields__}
    shape |= {"encoder": str(settings.encoder), "llm": str(settings.llm)}
    directions = tuple("-".join(pair) for pair in parse_directions(settings.lang))
    return LLaSTConfig(**shape, directions=directions)


# ---------------------------------------------------------------------------- what is printed first


def print_parts(model: LLaST) -> list[int]:
    """How many parameters each part has, trained and frozen. -> both numbers of the whole"""
    names = {"speech_encoder": "encoder", "projector": "projector", "llm": "LLM"}
    parts = "encoder", "encoder LoRA", "projector", "LLM", "LLM LoRA", "all"
    counts = {part: [0, 0] for part in parts}
    for name, p in model.named_parameters():
        part = names[name.split(".")[0]] + (" LoRA" if "lora_" in name else "")
        for row in (part, "all"):
            counts[row][not p.requires_grad] += p.numel()
    print(f"\n{'part':14}{'trained':>14}{'frozen':>16}")
    for part, (trained, frozen) in counts.items():
        print(f"{part:14}{trained:14,}{frozen:16,}")
    print()
    return counts["all"]


def print_corpus(splits: dict[str, list[Row]], batches: Batches):
    """Clips and minutes by language and split, and the mix of tasks in an epoch."""
    spoken = by_direction([e.row for group in batches.groups(0) for e in group if e.task == "asr"])
    print(
        f"{'direction':12}{'split':8}{'clips':>8}{'minutes':>10}{'translate':>12}{'transcribe':>12}"
    )
    for split, rows in splits.items():
        for direction, here in sorted(by_direction(rows).items()):
            n, minutes = len(here), sum(row.seconds for row in here) / 60
            asr = len(spoken.get(direction, ())) if split == "train" else 0
            print(f"{direction:12}{split:8}{n:8,}{minutes:10.1f}{n:12,}{asr:12,}")
    print(describe_overlap(splits["train"], splits["test"]))
    if batches.too_long:
        names = ", ".join(f"{e.row.path} ({e.task})" for e in batches.too_long[:5])
        print(f"{len(batches.too_long):,} rows longer than --batch are left out, such as {names}")
    print()


# ------------------------------------------------------------------------------------- the corpora


def read_all(settings: Preset, clips: int | None) -> dict[str, list[Row]]:
    """The splits of all directions together."""
    splits = {"train": [], "dev": [], "test": []}
    for source, target in parse_directions(settings.lang):
        metrics(target)  # a missing tokenizer for the scores is better known now than at the end
        found = read_splits(settings.data, source, target)
        for split, rows in found.items():
            if not any(row.seconds for row in rows):
                where = f"the {source}-{target} corpus in {settings.data}"
                raise ValueError(f"{where} has no {split} clips that can be used")
        splits["train"] += every_nth(found["train"], settings.en_step)[:clips]
        splits["dev"] += found["dev"][:DEV_CLIPS]
        splits["test"] += found["test"]
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
        if batch := batches.load(examples):
            losses = model(batch)
            total, tokens = total + losses.sum().item(), tokens + len(losses)
    model.train()
    if not tokens:
        path, reason = next(iter(batches.skipped.items()))
        raise ValueError(f"no dev clip can be read; the first: {path}: {reason}")
    return total / tokens


def dev_scores(model: LLaST, dev: Batches) -> dict[str, float]:
    """The loss, and BLEU of each direction with one beam."""
    scores = {"dev_loss": round(dev_loss(model, dev), 4)}
    greedy = SearchOptions(beams=1)
    for direction, rows in by_direction(dev.rows).items():
        scores[f"dev_bleu {direction}"] = score_rows(model, rows, search=greedy)["bleu"]
    return scores


def show_samples(model: LLaST, rows: list[Row]):
    """Three dev clips: what should have come out and what did."""
    for row in random.Random(0).sample(rows, min(3, len(rows))):
        languages = row.source, row.target
        [result] = translate(model, [row.path], "st", *languages, SearchOptions(beams=1))
        tqdm.write(f"    said      {row.sentence}")
        tqdm.write(f"    expected  {row.translation}")
        tqdm.write(f"    got       {result.text}")


# ---------------------------------------------------------------------------------------- the run


def refuse_what_is_there(out: Path):
    """A model is never written over, nor put among files that are not a run's."""
    instead = "name another folder with --out, or remove it"
    if (out / "llast.json").is_file():
        raise ValueError(f"{out} holds a trained model; {instead}")
    if out.is_file() or out.exists() and any(out.iterdir()) and not (out / "run.json").is_file():
        raise ValueError(f"{out} exists and is no run of this program; {instead}")


class Pace:
    """How fast an epoch has gone so far, and what was lost to padding and to waiting for data.

    Positions are those of the LLM, with its padding; that of a 30 s window is not among it.
    """

    def __init__(self):
        self.began, self.waited = time.perf_counter(), 0.0
        self.clips = self.positions = self.padded = 0

    def add(self, loaded: list[Batch], waited: float):
        self.waited += waited
        for batch in loaded:
            self.clips += len(batch.audio)
            self.positions += sum(batch.positions)
            self.padded += len(batch.audio) * max(batch.positions)

    def figures(self) -> dict[str, float]:
        seconds = time.perf_counter() - self.began
        return {
            "clips_per_second": round(self.clips / seconds, 1),
            "positions_per_second": round(self.positions / seconds),
            "padding": round(1 - self.positions / max(1, self.padded), 3),
            "waiting": round(self.waited / seconds, 3),
        }

    def __str__(self) -> str:
        clips, n, lost, idle = self.figures().values()
        return f"{clips:.0f} clips/s, {n:,} positions/s, {lost:.0%} padding, {idle:.0%} waiting"


def steps_of(batches: Batches, epoch: int, accumulate: int) -> Iterator[list[Batch]]:
    """The batches of each step of an epoch."""
    groups = batches.groups(epoch)
    for start in range(0, len(groups), accumulate):
        loaded = [batches.load(group) for group in groups[start : start + accumulate]]
        yield [batch for batch in loaded if batch is not None]


def timed(items: Iterator, ahead: bool) -> Iterator[tuple]:
    """Each item, and the seconds waited for it.

    `ahead` has a thread make it while the one before is in use. On a CPU that takes time from those
    that compute: with it, the first epoch of the embedded default, which decodes every clip, went
    at two thirds of the speed of the others.
    """
    coming = None
    with ThreadPoolExecutor(1) as thread:
        while True:
            began = time.perf_counter()
            item = coming.result() if coming else next(items, None)
            waited = time.perf_counter() - began
            if item is None:
                return
            coming = thread.submit(next, items, None) if ahead else None
            yield item, waited


def train(model: LLaST, batches: Batches, dev: Batches, settings: Preset, out: Path):
    """The whiteboard loop: loss, gradient, step; dev scores and a save after every epoch."""
    trained = [p for p in model.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=settings.lr, weight_decay=0.0, fused=True)
    epochs = range(settings.epochs)
    steps = sum(math.ceil(len(batches.groups(e)) / settings.accumulate) for e in epochs)
    warmup = max(1, round(settings.warmup * steps))

    def share_of_peak(step: int) -> float:
        left = (steps - step) / max(1, steps - warmup)
        if settings.schedule == "cosine":
            left = (1 - math.cos(math.pi * min(1, left))) / 2
        return min((step + 1) / warmup, left)

    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share_of_peak)
    # On a terminal only. Its line is full of numbers, so there is none drawn of how far it is.
    looks = "{percentage:3.0f}% {n_fmt}/{total_fmt} [{elapsed}<{remaining}{postfix}]"
    bar = tqdm(total=steps, leave=False, dynamic_ncols=True, disable=None, bar_format=looks)
    ahead = model.device.type == "cuda"
    done = 0  # steps
    for epoch in epochs:
        model.train()
        pace = Pace()
        for loaded, waited in timed(steps_of(batches, epoch, settings.accumulate), ahead):
            # Divide by the tokens of all batches of the step, so that each counts the same.
            tokens = sum(int((batch.labels >= 0).sum()) for batch in loaded)
            total = 0.0
            for batch in loaded:
                asked = f"on a batch of {len(batch.audio)} rows of {max(batch.positions)} positions"
                with phase(f"in training, {asked}", LESS):
                    loss = model(batch).sum() / tokens
                    loss.backward()
                total += loss.item()
            grad_norm = torch.nn.utils.clip_grad_norm_(trained, 1.0).item()
            if not math.isfinite(grad_norm):  # a step would make NaN of weights
                raise ValueError(
                    f"step {done + 1} has a loss of {total:.4g} and a gradient of length "
                    f"{grad_norm:.4g}; a smaller --lr may help. {saved_in(out)}"
                )
            lr = schedule.get_last_lr()[0]
            with phase("in a step of the optimizer", SMALLER):
                optimizer.step()
            schedule.step()
            optimizer.zero_grad(set_to_none=True)

            bar.update()
            done += 1
            pace.add(loaded, waited)
            bar.set_postfix_str(f"loss {total:.3f}, lr {lr:.1e}, {pace}")
            line = {"step": done, "epoch": epoch + 1, "loss": round(total, 5), "lr": lr}
            log(out, line | {"grad_norm": round(grad_norm, 4)} | pace.figures())
        speed = str(pace)  # before the dev clips take their time
        model.save_pretrained(out)
        with phase("on the dev clips", LESS):
            line = {"step": done, "epoch": epoch + 1} | dev_scores(model, dev)
            log(out, line)
            scores = ", ".join(f"{k.replace('_', ' ')} {v}" for k, v in line.items() if "dev" in k)
            tqdm.write(f"epoch {epoch + 1} of {settings.epochs}: {scores} (one beam)\n    {speed}")
            show_samples(model, dev.rows)
    bar.close()


def saved_in(out: Path) -> str:
    saved = (out / "llast.json").is_file()
    return f"The model of the last whole epoch is in {short(out)}" if saved else "No model is saved"


def log(out: Path, line: dict):
    with open(out / "log.jsonl", "a") as file:
        file.write(json.dumps(line) + "\n")


def finish(model: LLaST, rows: list[Row], settings: Preset, out: Path, began: float):
    """Test scores of every direction, written and printed, and how to use the model."""
    results = {}
    merge_lora(model)  # it is saved, and from here on only translates
    search = SearchOptions(settings.beams)
    for direction, here in by_direction(rows).items():
        scores = score_rows(model, here, out / f"test.{direction}.tsv", search)
        results[direction] = scores
        print(f"test {describe(direction, scores)}")
    results["seconds"] = seconds = round(time.time() - began, 1)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{seconds:.0f} s in all. The model and its scores are in {short(out)}. Try:")
    print_command(rows, out)


def print_command(rows: list[Row], out: Path):
    """How to translate a test clip; a model of several directions has to be told which."""
    first, *others = by_direction(rows)
    lang = f" --lang {first}" if others else ""
    print(f"    python translate.py --model {short(out)}{lang} {short(rows[0].path)}")


def run(args: argparse.Namespace) -> int:
    began = time.time()
    settings = with_flags(PRESETS[args.preset], args)
    out = args.out or HERE / "runs" / settings.lang.replace(",", "-")
    refuse_what_is_there(out)
    for base in (settings.encoder, settings.llm):
        if base.name in PUBLIC and not base.exists():
            raise FileNotFoundError(f"{short(base)} is not there; get it with\n    {fetch(base)}")
    about = {name: getattr(args, name) for name in ("preset", "clips", "seed", "compile")}
    about |= asdict(settings)
    about = {k: str(v.absolute()) if isinstance(v, Path) else v for k, v in about.items()}
    torch.manual_seed(args.seed)
    device, dtype, reason = pick_device()
    print(f"device      {reason}")
    print(f"encoder     {short(settings.encoder)}")
    print(f"LLM         {short(settings.llm)}")
    print(f"corpus      {short(settings.data)}")

    splits = read_all(settings, args.clips)
    with phase("while loading the models", SMALLER):
        model = LLaST.fresh(model_config(settings), dtype, device)
    model.speech_encoder.recompute = settings.recompute == "all"
    model.llm.recompute = settings.recompute != "none"
    if args.compile:
        model.compile_layers()
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
        for path, reason in (batches.skipped | dev.skipped).items():
            print(f"left out of the loss: {path}: {reason}")
        with phase(f"on a test clip, the model is saved in {short(out)}", SMALLER):
            finish(model, splits["test"], settings, out, began)
    except KeyboardInterrupt:
        if not (out / "log.jsonl").stat().st_size:
            print("\nstopped before the first step; nothing is saved", file=sys.stderr)
            return 130
        print("\nstopped by Ctrl-C; saving what has been learnt so far")
        model.save_pretrained(out)
        print(f"it is in {short(out)}, without test scores. Try:")
        print_command(splits["test"], out)
        return 130
    return 0


def main() -> int:
    args = build_parser().parse_args()
    try:
        return run(args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        tqdm.write(f"train.py: {error}", file=sys.stderr)  # there may be a bar on this line
        return 2


if __name__ == "__main__":
    sys.exit(main())
