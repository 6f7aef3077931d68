"""Train a LLaST: from a corpus to a saved model with its scores.

    python train.py --lang fr                  the preset "tiny": minutes on a laptop
    python train.py --preset llast-8b          a system of the paper

Read it in this order: presets, flags, corpora, scores, the loop, the run. The loss itself is in
llast.py. A notebook needs only train_epochs, which writes no file and prints nothing.
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

from data import IGNORE, TEMPLATES, Batch, Batches, Row, describe_overlap, parse_directions
from llast import LLaST, LLaSTConfig, explain_out_of_memory, pick_device
from lora import merge_lora
from translate import SearchOptions, describe, metrics, read_splits, score_rows, translate
from whisper_encoder import WINDOWS

HERE = Path(__file__).parent
LESS = "a smaller --batch with a larger --accumulate, or --recompute all, needs less"
SMALLER = "smaller models (--encoder, --llm) need less"
ONE_BEAM = SearchOptions(beams=1)  # for the dev scores, because it is fast

# ------------------------------------------------------------------------------------------ presets


@dataclass(frozen=True)
class Preset:
    """Every choice of a training run that does not depend on the machine."""

    encoder: Path  # folder of a Whisper checkpoint
    llm: Path  # folder of a Llama checkpoint
    data: Path  # folder of the corpus
    lang: str  # directions, as --lang takes them
    template: str  # the prompt as this LLM knows it, see data.TEMPLATES
    window: str  # "30s": audio is padded to what Whisper was trained on; "clip": it is not

    # A LoRA of a larger rank can learn a larger change. 0 leaves this model as it is.
    encoder_rank: int
    llm_rank: int
    dropout: float  # share of LoRA's inputs that are 0 in a step, against overfitting
    # The share of clips that are also transcribed. A transcript says which words are in the audio,
    # so the encoder and the projector learn more from each clip.
    asr: float

    # The step of AdamW. The learning rate rises for the first `warmup` of all steps: a new
    # projector gives the LLM random input, and AdamW's averages begin with very few gradients.
    # Then it falls to 0, because large steps at the end would only follow the latest batches.
    lr: float  # the peak
    schedule: str  # how it falls: linear or cosine
    warmup: float  # share of all steps
    # A batch is limited in positions of the LLM, speech and text: rows differ in length, so a
    # number of rows would say little about the memory. Accumulation makes a step of several.
    batch: int  # positions in a batch
    accumulate: int  # batches in a step
    recompute: str  # models that keep no activations: less memory, more time; none, llm, all
    epochs: int  # passes over all clips
    beams: int  # for the test scores

    # The change of a LoRA is multiplied by alpha / rank. The original's alpha is half of the rank.
    alpha_per_rank: float = 0.5
    # AdamW keeps two averages for each trained number: of its gradients and of their squares. A
    # step is lr * first / sqrt(second), so its size depends little on the scale of the gradients.
    # Each average keeps these shares of its old value in a step.
    betas: tuple[float, float] = (0.9, 0.999)
    # Weight decay pulls each trained number towards 0. For LoRA that is towards "no change", which
    # a low rank and few epochs already stay close to. The original has none either.
    weight_decay: float = 0.0
    # A longer gradient is shortened to this length. Otherwise one unusual batch would fill AdamW's
    # averages for many steps. 1.0 is also the original's value.
    clip_norm: float = 1.0
    # Clips of each direction that are scored after every epoch. To score all of CoVoST-2's dev
    # clips would take hours.
    dev_clips: int = 500
    # The share of an epoch's clips that may fail to load; five may always. More than that is not a
    # few broken files, but for example a disk that is gone.
    max_failed: float = 0.01


# The paper's systems have every number of the original's released configurations
# (workspace/llast_2b_tinyllama_chat.py, llast_8b_llama2_chat.py; there is none for the 14B, so it
# takes those of the 8B), with three differences. A batch there is 16 rows of any length, here it is
# a budget of about as many positions. The learning rate falls along a cosine there; the paper says
# linear, so this does (--schedule cosine gives the other). Their frozen LLM has 4 bits, ours 16.
TINY, WEIGHTS = HERE / "tiny", HERE / "weights"
PAPER = dict(
    encoder=WEIGHTS / "whisper-large-v2", data=HERE / "corpus", lang="paper", window="30s",
    encoder_rank=128, llm_rank=512, dropout=0.05, asr=1.0, lr=2e-4, schedule="linear", warmup=0.03,
    batch=6400, accumulate=2, recompute="all", epochs=1, beams=5,
)  # fmt: skip
PRESETS = {
    # Small models learn from larger steps, and they fit into memory without tricks.
    "tiny": Preset(
        encoder=TINY / "whisper", llm=TINY / "llama", data=TINY / "corpus", lang="fr",
        template="llama2", window="clip", encoder_rank=16, llm_rank=16, dropout=0.0, asr=1.0,
        lr=1e-3, schedule="linear", warmup=0.05, batch=1100, accumulate=1, recompute="none",
        epochs=2, beams=5,
    ),
    "llast-2b": Preset(llm=WEIGHTS / "TinyLlama-1.1B-Chat-v1.0", template="tinyllama", **PAPER),
    "llast-8b": Preset(llm=WEIGHTS / "Llama-2-7b-chat-hf", template="llama2", **PAPER),
    "llast-14b": Preset(llm=WEIGHTS / "Llama-2-13b-chat-hf", template="llama2", **PAPER),
}  # fmt: skip
PUBLIC = {  # folder: where it is published, what to download of it
    "whisper-large-v2": ("openai/whisper-large-v2", "config.json model.safetensors"),
    "TinyLlama-1.1B-Chat-v1.0": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "--exclude '*.bin'"),
    "Llama-2-7b-chat-hf": ("NousResearch/Llama-2-7b-chat-hf", "--exclude '*.bin'"),
    "Llama-2-13b-chat-hf": ("NousResearch/Llama-2-13b-chat-hf", "--exclude '*.bin'"),
}


def fetch(folder: Path) -> str:
    """The command that downloads a public checkpoint to the folder where a preset expects it."""
    name, files = PUBLIC[folder.name]
    return f"hf download {name} {files} --local-dir {short(folder)}"


def short(path: Path) -> str:
    """The path as a user would type it in the current folder."""
    return os.path.relpath(path) if path.absolute().is_relative_to(Path.cwd()) else str(path)


def model_config(settings: Preset) -> LLaSTConfig:
    """The part of the settings that is saved with the model."""
    shared = {k: v for k, v in asdict(settings).items() if k in LLaSTConfig.__dataclass_fields__}
    return LLaSTConfig(
        **shared | {"encoder": str(settings.encoder), "llm": str(settings.llm)},
        encoder_alpha=settings.alpha_per_rank * settings.encoder_rank,
        llm_alpha=settings.alpha_per_rank * settings.llm_rank,
        directions=tuple("-".join(pair) for pair in parse_directions(settings.lang)),
        tasks=("st", "asr") if settings.asr else ("st",),
    )


# -------------------------------------------------------------------------------------------- flags


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="tiny", help="options that you leave out [tiny]")
    add("--lang", help="directions: fr (into English), fr,de, en-de, all, or paper for its nine")
    add("--data", type=Path, help="folder of a corpus that tools/prepare.py wrote")
    add("--encoder", type=Path, help="folder of a Whisper checkpoint")
    add("--llm", type=Path, help="folder of a Llama checkpoint")
    add("--out", type=Path, help="folder to write [runs/LANG]")
    add("--template", choices=TEMPLATES, help="how the prompt is written")
    add("--window", choices=WINDOWS, help="audio for the encoder: padded to 30 s, or the clip")
    add("--encoder-rank", type=int, help="rank of the encoder's LoRA; 0 switches it off")
    add("--llm-rank", type=int, help="rank of the LLM's LoRA; 0 switches it off")
    add("--dropout", type=float, help="share of LoRA's inputs that are dropped in training")
    add("--asr", type=float, help="share of clips that are also transcribed, 0 to 1")
    add("--clips", type=int, help="train on the first so many clips of each direction")
    add("--epochs", type=int, help="passes over all clips")
    add("--lr", type=float, help="peak of the learning rate")
    add("--schedule", choices=("linear", "cosine"), help="how the learning rate falls to 0")
    add("--batch", type=int, help="positions (speech and text) in a batch")
    add("--accumulate", type=int, help="batches in one step of the optimizer")
    add("--recompute", choices=("none", "llm", "all"), help="models that keep no activations")
    add("--max-failed", type=float, help="share of clips that may fail to load [0.01]")
    add("--compile", action="store_true", help="compile each layer; on a CPU it needs g++")
    add("--seed", type=int, default=0, help="the number that all randomness depends on [0]")
    return parser


def with_flags(preset: Preset, args: argparse.Namespace) -> Preset:
    """The preset with the values of the command line, which are checked."""
    flags = {k: v for k, v in vars(args).items() if k in asdict(preset) and v is not None}
    settings = replace(preset, **flags)
    values = asdict(settings) | {"clips": 1 if args.clips is None else args.clips}
    limits = dict.fromkeys(("epochs", "clips", "batch", "accumulate"), (1, math.inf))
    limits |= dict.fromkeys(("encoder_rank", "llm_rank"), (0, math.inf))
    limits |= dict.fromkeys(("asr", "dropout", "max_failed"), (0, 1)) | {"lr": (1e-9, 1)}
    for name, (low, high) in limits.items():
        if not low <= values[name] <= high:
            raise ValueError(f"--{name.replace('_', '-')} is {values[name]}; use {low} to {high}")
    return settings


# ------------------------------------------------------------------------------------------ corpora


def read_corpora(settings: Preset, clips: int | None) -> dict[str, list[Row]]:
    """The rows of all directions by split. If `clips` is given, only so many train rows of each."""
    splits = {"train": [], "dev": [], "test": []}
    for source, target in parse_directions(settings.lang):
        metrics(target)  # a missing tokenizer for the scores is an error now, not after the run
        rows = read_splits(settings.data, source, target)
        if empty := [split for split in splits if not any(row.seconds for row in rows[split])]:
            corpus = f"the {source}-{target} corpus in {settings.data}"
            raise ValueError(f"{corpus} has no usable clips for {' and '.join(empty)}")
        splits["train"] += rows["train"][:clips]
        splits["dev"] += rows["dev"][: settings.dev_clips]
        splits["test"] += rows["test"]
    return splits


def by_direction(rows: list[Row]) -> dict[str, list[Row]]:
    directions = {}
    for row in rows:
        directions.setdefault(f"{row.source}-{row.target}", []).append(row)
    return directions


def print_corpora(splits: dict[str, list[Row]], batches: Batches, dev: Batches):
    """Print clips and minutes by direction and split, and the tasks of the first epoch."""
    examples = [example for group in batches.groups(0) + dev.groups(0) for example in group]
    transcribed = by_direction([example.row for example in examples if example.task == "asr"])
    columns = "{:12}{:8}{:>8}{:>10}{:>12}{:>12}"
    header = "direction", "split", "clips", "minutes", "translate", "transcribe"
    print("\n" + columns.format(*header))
    for split, rows in splits.items():
        for direction, group in sorted(by_direction(rows).items()):
            minutes = f"{sum(row.seconds for row in group) / 60:.1f}"
            n, n_asr = len(group), len(transcribed.get(direction, ())) if split == "train" else 0
            print(columns.format(direction, split, f"{n:,}", minutes, f"{n:,}", f"{n_asr:,}"))
    print(describe_overlap(splits["train"], splits["test"]))
    if too_long := batches.too_long + dev.too_long:
        first = ", ".join(f"{example.row.path} ({example.task})" for example in too_long[:5])
        size = f"{len(too_long):,} rows are longer than --batch {batches.budget} positions"
        print(f"{size} and are left out. The first: {first}")


# ------------------------------------------------------------------------------------------- scores


@torch.inference_mode()
def dev_scores(model: LLaST, dev: Batches) -> dict[str, float]:
    """Mean loss of an answer token for translation, and BLEU of each direction with one beam."""
    model.eval()
    losses = [model(batch) for group in dev.groups(0) if (batch := dev.load(group))]
    if not losses:
        raise ValueError(f"no dev clip can be read: {', '.join(map(str, dev.skipped))}")
    scores = {"dev_loss": round(torch.cat(losses).mean().item(), 4)}
    for direction, rows in by_direction(dev.rows).items():
        scores[f"dev_bleu {direction}"] = score_rows(model, rows, search=ONE_BEAM)["bleu"]
    return scores


def print_samples(model: LLaST, rows: list[Row]):
    """Print three dev clips with their reference and the translation of the model."""
    for row in random.Random(0).sample(rows, min(3, len(rows))):
        [result] = translate(model, [row.path], "st", row.source, row.target, ONE_BEAM)
        tqdm.write(f"    said      {row.sentence}")
        tqdm.write(f"    expected  {row.translation}")
        tqdm.write(f"    got       {result.text}")


# ----------------------------------------------------------------------------------------- the loop


@dataclass
class Step:
    """One step of the optimizer, for whoever watches the training."""

    number: int  # from 1 to n_steps, over all epochs
    n_steps: int
    epoch: int  # from 1
    lr: float
    grad_norm: float  # length of the gradient before it was clipped
    losses: torch.Tensor  # of every answer token: batch after batch, row after row
    batches: list[Batch]


def train_step(model: LLaST, batches: list[Batch], optimizer, clip_norm: float):
    """Change the trained weights once. -> losses (answer tokens,), length of the gradient

    The losses are divided by the number of tokens of the whole step, so that every token counts
    the same. Example: a batch with the losses 1, 1, 1, 1 and a batch with the loss 6. The mean of
    the five tokens is 10 / 5 = 2. The mean of the two means would be (1 + 6) / 2 = 3.5: the one
    token of the second batch would count as much as the four tokens of the first together.
    """
    n_tokens = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    step_losses = []
    for batch in batches:
        size = f"{len(batch.audio)} rows of {max(batch.positions)} positions"
        with explain_out_of_memory(f"in training, on a batch of {size}", LESS):
            losses = model(batch)  # one for each answer token
            (losses.sum() / n_tokens).backward()  # adds to the gradients of the batches before
        step_losses.append(losses.detach())
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm).item()
    losses = torch.cat(step_losses)
    if not math.isfinite(grad_norm):  # a step would turn the weights into NaN
        found = f"the loss is {losses.mean():.4g} and its gradient has length {grad_norm:.4g}"
        raise ValueError(f"{found}, so this step was not done; try a smaller --lr")
    with explain_out_of_memory("in a step of the optimizer", SMALLER):
        optimizer.step()
    optimizer.zero_grad(set_to_none=True)
    return losses, grad_norm


def train_epochs(model: LLaST, batches: Batches, settings, after_step=None, after_epoch=None):
    """Train the model in place: every epoch is one pass over the examples of `batches`.

    Writes no file and prints nothing. It calls after_step(Step) and after_epoch(number) if they
    are given. A ValueError ends it if a gradient is not finite or if too many clips are unreadable.
    """
    trained = [p for p in model.parameters() if p.requires_grad]
    decay = settings.weight_decay
    optimizer = torch.optim.AdamW(trained, betas=settings.betas, weight_decay=decay, fused=True)
    sizes = [len(batches.groups(epoch)) for epoch in range(settings.epochs)]
    number, n_steps = 0, sum(math.ceil(size / settings.accumulate) for size in sizes)
    n_clips, empty_steps = (
        len({row.path for row in batches.rows}),
        0,
    )  # the latest steps without a clip
    for epoch in range(settings.epochs):
        model.train()
        steps = load_steps(batches, epoch, settings.accumulate)
        for loaded in prefetch(steps, in_thread=model.device.type == "cuda"):
            number += 1
            empty_steps = 0 if loaded else empty_steps + 1
            check_failures(batches.skipped, n_clips, empty_steps, settings.max_failed)
            if not loaded:
                continue
            lr = optimizer.param_groups[0]["lr"] = learning_rate(number, n_steps, settings)
            losses, grad_norm = train_step(model, loaded, optimizer, settings.clip_norm)
            if after_step:
                after_step(Step(number, n_steps, epoch + 1, lr, grad_norm, losses, loaded))
        if after_epoch:
            after_epoch(epoch + 1)


def learning_rate(number: int, n_steps: int, settings: Preset) -> float:
    """The learning rate of step `number` of 1 to n_steps: it rises, then falls to 0."""
    warmup = max(1, round(settings.warmup * n_steps))
    left = (n_steps - number + 1) / max(1, n_steps - warmup)
    if settings.schedule == "cosine":
        left = (1 - math.cos(math.pi * min(1, left))) / 2
    return settings.lr * min(number / warmup, left)


def load_steps(batches: Batches, epoch: int, accumulate: int) -> Iterator[list[Batch]]:
    """Yield the batches of each step of an epoch, without the clips that cannot be read."""
    groups = batches.groups(epoch)
    for start in range(0, len(groups), accumulate):
        loaded = [batches.load(group) for group in groups[start : start + accumulate]]
        yield [batch for batch in loaded if batch is not None]


def prefetch(items: Iterator, in_thread: bool) -> Iterator:
    """Yield the items; a thread can make each item while the item before it is used.

    Use the thread if a GPU does the training. On a CPU, loading takes the time of the training.
    """
    if not in_thread:
        yield from items
        return
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, items, None)
        while (item := future.result()) is not None:
            future = thread.submit(next, items, None)
            yield item


def check_failures(failed: dict[Path, str], n_clips: int, empty_steps: int, max_share: float):
    """Raise an error if too many clips of the run cannot be read, for example if a disk is gone."""
    share = len(failed) / n_clips
    if empty_steps < 3 and (len(failed) <= 5 or share <= max_share):
        return
    first = "".join(f"\n    {path}: {reason}" for path, reason in list(failed.items())[:5])
    empty = ", and three steps in a row have no clip" if empty_steps == 3 else ""
    raise ValueError(
        f"{len(failed)} training clips ({share:.1%}) cannot be read{empty}; repair them or raise "
        f"--max-failed, now {max_share}. The first:{first}"
    )


# ------------------------------------------------------------------------------------------ the run


def run(args: argparse.Namespace) -> int:
    began = time.time()
    settings = with_flags(PRESETS[args.preset], args)
    out = args.out or HERE / "runs" / settings.lang.replace(",", "-")
    check_folders(settings, out)
    splits = read_corpora(settings, args.clips)
    start_files(args, settings, out)  # loading the models takes minutes: is the disk writable?
    model = load_model(settings, args)
    batches = make_batches(model, splits["train"], settings, args.seed)
    dev = make_batches(model, splits["dev"], replace(settings, asr=0.0), args.seed)
    print_corpora(splits, batches, dev)
    report = Report(model, dev, settings, out)
    try:
        with report.bar:
            train_epochs(model, batches, settings, report.after_step, report.after_epoch)
        for path, reason in (batches.skipped | dev.skipped).items():
            print(f"left out of the loss: {path}: {reason}")
        finish(model, splits["test"], settings, out, began)
    except ValueError as error:
        raise ValueError(f"{error}\n{saved_in(out)}") from error
    except KeyboardInterrupt:
        if report.n_done:
            model.save_pretrained(out)  # as it is now
        print(f"\nstopped by Ctrl-C. {saved_in(out)}", file=sys.stderr)
        return 130
    return 0


def saved_in(out: Path) -> str:
    is_saved = (out / "llast.json").is_file()
    return f"{'A' if is_saved else 'No'} model is saved in {short(out)}"


def check_folders(settings: Preset, out: Path):
    """Check that the models exist, and that a run may write to `out`."""
    for base in (settings.encoder, settings.llm):
        if not base.exists():
            hint = f"; get it with\n    {fetch(base)}" if base.name in PUBLIC else ""
            raise FileNotFoundError(f"{short(base)} does not exist{hint}")
    files = [path.name for path in out.glob("*")]
    if out.is_file() or "llast.json" in files or (files and "run.json" not in files):
        raise ValueError(
            f"{out} holds a trained model or files that are not a run's; name another folder with "
            "--out, or remove it"
        )


def start_files(args: argparse.Namespace, settings: Preset, out: Path):
    """Write run.json and an empty log.jsonl. A folder that cannot be written is an error here."""
    values = {name: getattr(args, name) for name in ("preset", "clips", "seed", "compile")}
    values = json.dumps(values | asdict(settings), default=lambda p: str(p.absolute()), indent=2)
    out.mkdir(parents=True, exist_ok=True)
    (out / "run.json").write_text(values + "\n")
    (out / "log.jsonl").write_text("")


def load_model(settings: Preset, args: argparse.Namespace) -> LLaST:
    """A new model on the device of this machine. Prints what it is made of."""
    torch.manual_seed(args.seed)
    device, dtype, reason = pick_device()
    print(f"{short(settings.encoder)}, {short(settings.llm)}, {short(settings.data)}; {reason}")
    with explain_out_of_memory("while loading the models", SMALLER):
        model = LLaST.fresh(model_config(settings), dtype, device)
    model.speech_encoder.recompute = settings.recompute == "all"
    model.llm.recompute = settings.recompute != "none"
    if args.compile:
        model.compile_layers()
    print_parts(model)
    return model


def print_parts(model: LLaST) -> dict[str, list[int]]:
    """Print the parameters of each part, trained and frozen. -> part: [trained, frozen]"""
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
    return counts


def make_batches(model: LLaST, rows: list[Row], settings: Preset, seed: int = 0) -> Batches:
    return Batches(rows, settings.asr, model.tokenizer, settings.template, settings.batch, seed)


class Report:
    """What the command does after a step and an epoch: progress bar, log, saving, dev scores."""

    def __init__(self, model: LLaST, dev: Batches, settings: Preset, out: Path):
        self.model, self.dev, self.epochs, self.out = model, dev, settings.epochs, out
        self.began, self.n_done, self.log_works = time.perf_counter(), 0, True
        self.bar = tqdm(unit="step", leave=False, dynamic_ncols=True, disable=None)

    def after_step(self, step: Step):
        loss, seconds = step.losses.mean().item(), time.perf_counter() - self.began
        self.n_done, self.bar.total = step.number, step.n_steps
        self.bar.update()
        self.bar.set_postfix_str(f"loss {loss:.3f}, lr {step.lr:.1e}")
        line = {"step": step.number, "epoch": step.epoch, "loss": round(loss, 5), "lr": step.lr}
        line |= {"grad_norm": round(step.grad_norm, 4), "seconds": round(seconds, 2)}
        self.log(line | {"clips": sum(len(batch.audio) for batch in step.batches)})

    def after_epoch(self, epoch: int):
        self.model.save_pretrained(self.out)
        with explain_out_of_memory("on the dev clips", LESS):
            scores = dev_scores(self.model, self.dev)
            self.log({"step": self.n_done, "epoch": epoch} | scores)
            text = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in scores.items())
            tqdm.write(f"epoch {epoch} of {self.epochs}: {text} (one beam)")
            print_samples(self.model, self.dev.rows)

    def log(self, line: dict):
        """Add a line to log.jsonl. If that fails, report it once: the training matters more."""
        try:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            if self.log_works:
                tqdm.write(f"log.jsonl cannot be written ({error}); training goes on without it")
            self.log_works = False


def finish(model: LLaST, rows: list[Row], settings: Preset, out: Path, began: float):
    """Write and print the test scores of every direction, and print how to use the model."""
    results, search = {}, SearchOptions(settings.beams)
    merge_lora(model)  # from here on the model only translates, and merged is faster
    for direction, group in by_direction(rows).items():
        with explain_out_of_memory(f"on a test clip, the model is saved in {short(out)}", SMALLER):
            results[direction] = score_rows(model, group, out / f"test.{direction}.tsv", search)
        print(f"test {describe(direction, results[direction])}")
    results["seconds"] = seconds = round(time.time() - began, 1)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    print(f"\n{seconds:.0f} s in all. The model and its scores are in {short(out)}. Try:")
    print(f"    python translate.py --model {short(out)} --lang {direction} {short(group[0].path)}")


def main() -> int:
    for stream in (sys.stdout, sys.stderr):  # a character that the terminal cannot show is escaped
        stream.reconfigure(errors="backslashreplace")
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
