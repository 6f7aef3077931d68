"""Train a LLaST: from a corpus to a saved model with its scores.

    python train.py --lang fr                  the preset "tiny": minutes on a laptop
    python train.py --preset llast-8b          a system of the paper

Read it in this order: presets, flags, corpora, scores, the loop, the run. The loss itself is in
llast.py. In a notebook, call LLaST.fresh(model_config(settings)), make_batches and train_epochs.
They write no files and print nothing.
"""

import argparse
import hashlib
import json
import math
import os
import random
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from data import IGNORE, TEMPLATES, Batch, Batches, Row, describe_overlap, parse_directions
from llast import (
    BASE_FIELDS,
    LLaST,
    LLaSTConfig,
    digests_of,
    explain_out_of_memory,
    fingerprints_of,
    pick_device,
)
from lora import merge_lora
from translate import SearchOptions, describe, metrics, read_splits, score_rows, translate
from whisper_encoder import WINDOWS, check_tensors, read_tensors

HERE = Path(__file__).parent
ADVICE_TRAINING = "use a smaller --batch and a larger --accumulate, or --recompute all"
ADVICE_MODELS = "use smaller models (--encoder, --llm)"
ADVICE_STATE = "delete its folder or choose another one with --out to start again"
ONE_BEAM = SearchOptions(beams=1)  # for the dev scores, because it is fast
TINY, WEIGHTS = HERE / "tiny", HERE / "weights"
STATE = "state.safetensors"  # the file of a run that is not finished, see TrainState
# These settings may change when a run continues, because they do not change the training.
FREE_SETTINGS = ("recompute", "beams", "max_failed", "save_minutes")

# ------------------------------------------------------------------------------------------ presets


@dataclass(frozen=True)
class Preset:
    """The settings of a training run."""

    encoder: Path  # folder of a Whisper checkpoint
    llm: Path  # folder of a Llama checkpoint
    data: Path  # folder of the corpus
    lang: str  # directions, written as for --lang
    template: str  # format of the prompt that this LLM was trained with, see data.TEMPLATES
    window: str  # "30s": pad audio to 30 s, as in Whisper's training; "clip": do not pad

    # A LoRA of a larger rank can learn a larger change. 0: no LoRA in this model.
    encoder_rank: int
    llm_rank: int
    dropout: float  # share of LoRA's inputs that are set to 0 at random, against overfitting
    # The share of clips that the model also learns to transcribe. The paper calls this
    # ASR-augmented training: a transcript says which words are in the audio.
    asr: float

    # First the learning rate rises (warm-up): a new projector gives the LLM random input, and AdamW
    # has seen few gradients (see `betas`). Then it falls towards 0: with large steps, the final
    # weights would depend too much on the last few batches.
    lr: float  # the highest learning rate
    schedule: str  # how the learning rate falls: linear or cosine
    warmup: float  # share of all steps in which it rises
    # The size of a batch is given in positions of the LLM (speech and text), because rows differ in
    # length and the memory depends on positions. With accumulation, several batches make a step.
    batch: int  # largest number of positions in a batch
    accumulate: int  # batches in a step
    recompute: str  # activation checkpointing: none, llm (only the LLM), all (also the encoder)
    epochs: int  # passes over all clips
    beams: int  # for the test scores

    # alpha / rank. LoRA multiplies its change by this number (see lora.py). The original has 0.5.
    alpha_per_rank: float = 0.5
    # For each weight, AdamW keeps a running average m of the gradient and a running average v of
    # its square. A step changes the weight by about lr * m / sqrt(v), so the size of the change
    # depends little on the scale of the gradients. `betas` are the shares of the old m and of the
    # old v that are kept in each step.
    betas: tuple[float, float] = (0.9, 0.999)
    # Weight decay pulls each trained weight towards 0. For LoRA, 0 means no change of the model. A
    # low rank and few epochs already limit the change, so we use no weight decay. The original
    # uses none either.
    weight_decay: float = 0.0
    # If the norm of the gradient is larger than this, the gradient is scaled down to this norm.
    # Otherwise one unusual batch would change AdamW's averages for many steps. The original also
    # uses 1.0.
    clip_norm: float = 1.0
    # Dev clips of each direction that are scored after every epoch. Scoring all dev clips of
    # CoVoST-2 after every epoch would be slow.
    dev_clips: int = 500
    # If more than this share of the training clips cannot be read, the training ends: the cause may
    # be a lost disk, not a few broken files. Up to five such clips are always allowed.
    max_failed: float = 0.01
    # Minutes between two saves of TrainState. A run that is stopped continues from there. The file
    # has three numbers for each trained parameter, so it should not be written after every step.
    save_minutes: float = 20.0


# The numbers of the paper's systems are those of the original's released configurations
# (workspace/llast_2b_tinyllama_chat.py, llast_8b_llama2_chat.py). There is no file for the 14B
# system: it uses the numbers of the 8B system. Three settings are different:
# 1. Batch: 16 rows of any length in the original, a limit of about as many positions here.
# 2. Schedule: cosine in the original, linear in the paper and here. --schedule cosine changes it.
# 3. Frozen LLM: 4 bits in the original, bfloat16 (GPU) or float32 (CPU) here.
PAPER = dict(
    encoder=WEIGHTS / "whisper-large-v2", data=HERE / "corpus", lang="paper", window="30s",
    encoder_rank=128, llm_rank=512, dropout=0.05, asr=1.0, lr=2e-4, schedule="linear", warmup=0.03,
    batch=6400, accumulate=2, recompute="all", epochs=1, beams=5,
)  # fmt: skip
PRESETS = {
    # Small models can use a higher learning rate and need no activation checkpointing.
    "tiny": Preset(
        encoder=TINY / "whisper", llm=TINY / "llama", data=TINY / "corpus", lang="fr",
        template="llama2", window="clip", encoder_rank=16, llm_rank=16, dropout=0.0, asr=1.0,
        lr=1e-3, schedule="linear", warmup=0.05, batch=1100, accumulate=1, recompute="none",
        epochs=2, beams=5, alpha_per_rank=1.0,
    ),
    "llast-2b": Preset(llm=WEIGHTS / "TinyLlama-1.1B-Chat-v1.0", template="tinyllama", **PAPER),
    "llast-8b": Preset(llm=WEIGHTS / "Llama-2-7b-chat-hf", template="llama2", **PAPER),
    "llast-14b": Preset(llm=WEIGHTS / "Llama-2-13b-chat-hf", template="llama2", **PAPER),
}  # fmt: skip
DOWNLOADS = {  # name of a folder: (Hugging Face repository, files or options for `hf download`)
    "whisper-large-v2": ("openai/whisper-large-v2", "config.json model.safetensors"),
    "TinyLlama-1.1B-Chat-v1.0": ("TinyLlama/TinyLlama-1.1B-Chat-v1.0", "--exclude '*.bin'"),
    "Llama-2-7b-chat-hf": ("NousResearch/Llama-2-7b-chat-hf", "--exclude '*.bin'"),
    "Llama-2-13b-chat-hf": ("NousResearch/Llama-2-13b-chat-hf", "--exclude '*.bin'"),
}


def download_command(folder: Path) -> str:
    """The command that downloads a public checkpoint to the folder where a preset expects it."""
    name, files = DOWNLOADS[folder.name]
    return f"hf download {name} {files} --local-dir {short(folder)}"


def short(path: Path) -> str:
    """The path relative to the current folder if it is inside it, otherwise the whole path."""
    return os.path.relpath(path) if path.absolute().is_relative_to(Path.cwd()) else str(path)


def model_config(settings: Preset) -> LLaSTConfig:
    """The part of the settings that is saved with the model."""
    values = asdict(settings) | {"encoder": str(settings.encoder), "llm": str(settings.llm)}
    return LLaSTConfig(
        **{k: v for k, v in values.items() if k in LLaSTConfig.__dataclass_fields__},
        encoder_alpha=settings.alpha_per_rank * settings.encoder_rank,
        llm_alpha=settings.alpha_per_rank * settings.llm_rank,
        directions=tuple("-".join(pair) for pair in parse_directions(settings.lang)),
        tasks=("st", "asr") if settings.asr else ("st",),
    )


# -------------------------------------------------------------------------------------------- flags


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--preset", choices=PRESETS, default="tiny", help="defaults of the other options [tiny]")
    add("--lang", help="fr (into English), fr,de, en-de, all, or paper (its nine directions)")
    add("--data", type=Path, help="folder of a corpus that tools/prepare.py wrote")
    add("--encoder", type=Path, help="folder of a Whisper checkpoint")
    add("--llm", type=Path, help="folder of a Llama checkpoint")
    add("--out", type=Path, help="folder to write [runs/LANG]")
    add("--template", choices=TEMPLATES, help="format of the prompt; it must fit the LLM")
    add("--window", choices=WINDOWS, help="30s: pad every clip to 30 s; clip: do not pad")
    add("--encoder-rank", type=int, help="rank of the encoder's LoRA; 0 switches it off")
    add("--llm-rank", type=int, help="rank of the LLM's LoRA; 0 switches it off")
    add("--dropout", type=float, help="share of LoRA's inputs that are set to 0 at random")
    add("--asr", type=float, help="share of clips that are also transcribed, 0 to 1")
    add("--clips", type=int, help="use only the first CLIPS train clips of each direction")
    add("--epochs", type=int, help="passes over all clips")
    add("--lr", type=float, help="highest learning rate")
    add("--schedule", choices=("linear", "cosine"), help="how the learning rate falls")
    add("--batch", type=int, help="largest number of positions (speech and text) in a batch")
    add("--accumulate", type=int, help="batches in one step of the optimizer")
    add("--recompute", choices=("none", "llm", "all"), help="models with activation checkpointing")
    add("--max-failed", type=float, help="share of clips that may fail to load [0.01]")
    add("--save-minutes", type=float, help="minutes between two saves of the whole state [20]")
    add("--compile", action="store_true", help="compile each layer; on a CPU it needs g++")
    add("--seed", type=int, default=0, help="random seed [0]")
    return parser


def with_flags(preset: Preset, args: argparse.Namespace) -> Preset:
    """The preset, changed by the options of the command line. A value out of range is an error."""
    flags = {k: v for k, v in vars(args).items() if k in asdict(preset) and v is not None}
    settings = replace(preset, **flags)
    values = asdict(settings) | {"clips": args.clips}
    limits = dict.fromkeys(("epochs", "clips", "batch", "accumulate"), (1, math.inf))
    limits |= dict.fromkeys(("encoder_rank", "llm_rank", "save_minutes"), (0, math.inf))
    limits |= dict.fromkeys(("asr", "dropout", "max_failed"), (0, 1)) | {"lr": (1e-9, 1)}
    for name, (low, high) in limits.items():
        if values[name] is not None and not low <= values[name] <= high:
            rule = f"at least {low}" if high == math.inf else f"{low} to {high}"
            raise ValueError(f"--{name.replace('_', '-')} is {values[name]}; it must be {rule}")
    return settings


# ------------------------------------------------------------------------------------------ corpora


def read_corpora(settings: Preset, clips: int | None) -> dict[str, list[Row]]:
    """The rows of all directions, by split.

    If `clips` is a number, only the first `clips` train rows of each direction are used.
    """
    splits = {"train": [], "dev": [], "test": []}
    for source, target in parse_directions(settings.lang):
        metrics(target)  # check now that BLEU can be computed, not after hours of training
        rows = read_splits(settings.data, source, target)
        # A test clip that cannot be read stays in the rows with 0 seconds.
        if empty := [split for split in splits if not any(row.seconds for row in rows[split])]:
            corpus = f"the {source}-{target} corpus in {settings.data}"
            raise ValueError(f"{corpus} has no usable clips for {' and '.join(empty)}; add some")
        splits["train"] += rows["train"][:clips]
        splits["dev"] += rows["dev"][: settings.dev_clips]
        splits["test"] += rows["test"]
    return splits


def by_direction(rows: list[Row]) -> dict[str, list[Row]]:
    """Group rows by direction, for example "fr-en"."""
    directions = {}
    for row in rows:
        directions.setdefault(f"{row.source}-{row.target}", []).append(row)
    return directions


def print_corpora(splits: dict[str, list[Row]], batches: Batches, dev: Batches):
    """Print clips and minutes by direction and split.

    Every clip is translated. `transcribe` counts the transcription examples of the first epoch.
    """
    # groups() also finds the rows that are longer than a batch.
    examples = [example for group in batches.groups(0) + dev.groups(0) for example in group]
    transcribed = by_direction([example.row for example in examples if example.task == "asr"])
    layout = "{:12}{:8}{:>8}{:>10}{:>12}{:>12}"
    print("\n" + layout.format("direction", "split", "clips", "minutes", "translate", "transcribe"))
    for split, rows in splits.items():
        for direction, group in sorted(by_direction(rows).items()):
            minutes = f"{sum(row.seconds for row in group) / 60:.1f}"
            n, n_asr = len(group), len(transcribed.get(direction, ())) if split == "train" else 0
            print(layout.format(direction, split, f"{n:,}", minutes, f"{n:,}", f"{n_asr:,}"))
    print(describe_overlap(splits["train"], splits["test"]))
    if too_long := batches.too_long + dev.too_long:
        first = ", ".join(f"{example.row.path} ({example.task})" for example in too_long[:5])
        size = f"{len(too_long):,} rows are longer than --batch {batches.budget} positions"
        print(f"{size} and are left out. The first: {first}")


# ------------------------------------------------------------------------------------------- scores


@torch.inference_mode()
def dev_scores(model: LLaST, dev: Batches) -> dict[str, float]:
    """The mean loss of an answer token of the dev translations, and BLEU of each direction.

    BLEU is computed with one beam.
    """
    model.eval()
    losses = [model(batch) for group in dev.groups(0) if (batch := dev.load(group))]
    if not losses:
        raise ValueError(f"no dev clip can be read; fix them: {', '.join(map(str, dev.skipped))}")
    scores = {"dev_loss": round(torch.cat(losses).mean().item(), 4)}
    for direction, rows in by_direction(dev.rows).items():
        scores[f"dev_bleu {direction}"] = score_rows(model, rows, search=ONE_BEAM)["bleu"]
    return scores


def print_samples(model: LLaST, rows: list[Row]):
    """Print three dev clips with their reference and the translation of the model."""
    for row in random.Random(0).sample(rows, min(3, len(rows))):
        [result] = translate(model, [row.path], "st", row.source, row.target, ONE_BEAM)
        layout = "    said      {}\n    expected  {}\n    got       {}"
        tqdm.write(layout.format(row.sentence, row.translation, result.text))


# ----------------------------------------------------------------------------------------- the loop


@dataclass
class Step:
    """Information about one step of the optimizer. train_epochs gives it to after_step."""

    number: int  # from 1 to n_steps, over all epochs
    n_steps: int
    epoch: int  # from 1
    lr: float
    grad_norm: float  # norm (length) of the gradient before clipping
    losses: torch.Tensor  # of every answer token: batch after batch, row after row
    batches: list[Batch]


class TrainState:
    """Everything that changes in a training: trained weights, AdamW's averages, number of steps.

    `step` counts the steps that are done. It is also the position in the data, because the batches
    of an epoch are always the same. The learning rate and the random numbers of a step depend only
    on its number. So a run that loads this state continues exactly.
    """

    def __init__(self, model: LLaST, settings: Preset):
        self.step = 0
        self.tensors = model.trained()
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        betas, decay = settings.betas, settings.weight_decay
        self.optimizer = torch.optim.AdamW(
            trained.values(), betas=betas, weight_decay=decay, fused=True
        )
        for name, p in trained.items():
            # AdamW would make these tensors in its first step.
            averages = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] = {"step": torch.zeros((), device=p.device)} | averages
            for key, tensor in self.optimizer.state[p].items():
                self.tensors[f"{name}.{key}"] = tensor.detach()

    def save(self, file: Path, run: dict):
        """Write the state, with a description of its run. After a crash, the file is old or new."""
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}
        metadata = {"run": json.dumps(run | {"step": self.step})}
        temporary = file.with_name(file.name + ".tmp")
        save_file(tensors, temporary, metadata | digests_of_state(metadata, tensors))
        write_to_disk(temporary)
        os.replace(temporary, file)
        write_to_disk(file.parent)

    def load(self, file: Path):
        """Continue from a saved state. Raises ValueError if the file is damaged."""
        metadata, tensors = read_metadata(file), read_tensors(file)
        digests = digests_of_state({"run": metadata["run"]}, tensors)
        if metadata != metadata | digests:
            raise ValueError(f"{file} has changed since it was written; {ADVICE_STATE}")
        check_tensors(self.tensors, tensors, file)
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
        self.step = json.loads(metadata["run"])["step"]


def digests_of_state(metadata: dict[str, str], tensors: dict) -> dict[str, str]:
    """SHA-256 of the metadata, and of the names and values of the tensors."""
    return digests_of({"config": metadata, "fingerprints": {}}, tensors)


def read_metadata(file: Path) -> dict[str, str]:
    """The metadata of a state. It is at the beginning of the file, so this is fast."""
    try:
        with safe_open(file, "pt") as stored:
            return {"run": "{}"} | stored.metadata()
    except Exception as error:  # safetensors raises several types for a damaged file
        raise ValueError(f"{file} is damaged: {error!r}; {ADVICE_STATE}") from error


def write_to_disk(path: Path):
    """Wait until the disk has this file or the names in this folder, in case the power fails."""
    number = os.open(path, os.O_RDONLY)
    os.fsync(number)
    os.close(number)


def compute_gradient(model: LLaST, batches: list[Batch], clip_norm: float):
    """Compute the gradient of one step, and scale it down if its norm is more than clip_norm.

    Returns the losses of all answer tokens, on the CPU, and the norm of the gradient before
    clipping.

    The losses are divided by the number of tokens of the whole step, so that every token counts
    the same. Example: a batch with the losses 1, 1, 1, 1 and a batch with the loss 6. The mean of
    the five tokens is 10 / 5 = 2. The mean of the two means would be (1 + 6) / 2 = 3.5: the one
    token of the second batch would count as much as the four tokens of the first together.
    """
    n_tokens = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    model.zero_grad(set_to_none=True)
    step_losses = []
    for batch in batches:
        size = f"{len(batch.audio)} rows of {max(batch.positions)} positions"
        with explain_out_of_memory(f"in training, on a batch of {size}", ADVICE_TRAINING):
            losses = model(batch)  # one for each answer token
            (losses.sum() / n_tokens).backward()  # is added to the gradients of the earlier batches
        step_losses.append(losses.detach())
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    # The only place of a step where the CPU waits for the GPU. In between, it is ahead of the GPU,
    # so the GPU always has work.
    losses = torch.cat([*step_losses, grad_norm[None]]).cpu()
    losses, grad_norm = losses[:-1], losses[-1].item()
    if not math.isfinite(grad_norm):  # this step would make the weights NaN
        problem = f"the loss is {losses.mean():.4g} and its gradient has length {grad_norm:.4g}"
        raise ValueError(f"{problem}, so this step was not done; try a smaller --lr")
    return losses, grad_norm


def train_epochs(
    model: LLaST, batches: Batches, settings, after_step=None, after_epoch=None, state=None
):
    """Train the model in place: every epoch is one pass over the examples of `batches`.

    It writes no file and prints nothing. It calls after_step(Step) after each step and
    after_epoch(number) after each epoch, unless they are None. If `state` is the TrainState of an
    earlier run, only the rest of that run is done. Raises ValueError if a gradient is not finite,
    or if too many clips cannot be read.
    """
    state = state or TrainState(model, settings)
    sizes = [len(batches.groups(epoch)) for epoch in range(settings.epochs)]
    # The number of the last step of each epoch. The learning rate depends on the last of them.
    ends = list(accumulate(math.ceil(size / settings.accumulate) for size in sizes))
    n_clips = len({row.path for row in batches.rows})
    empty_steps = 0  # steps in a row without a clip that can be read
    for epoch, (start, end) in enumerate(zip([0, *ends], ends)):
        if state.step > end:
            continue  # an earlier run has done this epoch
        model.train()
        position = state.step - start  # steps of this epoch that are done
        steps = load_steps(batches, epoch, settings.accumulate, position, model.device)
        for step_batches in prefetch(steps, in_thread=model.device.type == "cuda"):
            number = state.step + 1
            empty_steps = 0 if step_batches else empty_steps + 1
            check_failures(batches.skipped, n_clips, empty_steps, settings.max_failed)
            if not step_batches:
                state.step = number
                continue
            lr = learning_rate(number, ends[-1], settings)
            torch.manual_seed(random_seed(batches.seed, number))  # for dropout
            losses, grad_norm = compute_gradient(model, step_batches, settings.clip_norm)
            with explain_out_of_memory("in a step of the optimizer", ADVICE_MODELS):
                state.optimizer.param_groups[0]["lr"] = lr
                state.optimizer.step()
            state.step = number
            if after_step:
                after_step(Step(number, ends[-1], epoch + 1, lr, grad_norm, losses, step_batches))
        if after_epoch:
            after_epoch(epoch + 1)


def random_seed(seed: int, number: int, rank: int = 0) -> int:
    """The seed of a step. It is different for every step and for every process (`rank`)."""
    return random.Random(f"step {seed} {number} {rank}").getrandbits(63)


def learning_rate(number: int, n_steps: int, settings: Preset) -> float:
    """The learning rate of step `number`, from 1 to n_steps.

    It rises to settings.lr, then it falls. It would be 0 at step n_steps + 1, so the last step also
    changes the weights.
    """
    warmup = max(1, round(settings.warmup * n_steps))
    share_left = (n_steps - number + 1) / max(1, n_steps - warmup)
    if settings.schedule == "cosine":
        share_left = (1 - math.cos(math.pi * min(1, share_left))) / 2
    return settings.lr * min(number / warmup, share_left)


def load_steps(
    batches: Batches, epoch: int, size: int, n_done: int, device
) -> Iterator[list[Batch]]:
    """Yield the batches of each step of an epoch, without the clips that cannot be read.

    A step has `size` batches. The first n_done steps of the epoch are left out.
    """
    groups = batches.groups(epoch)
    for start in range(n_done * size, len(groups), size):
        loaded = [batches.load(group) for group in groups[start : start + size]]
        yield [to_device(batch, device) for batch in loaded if batch is not None]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy the audio and the ids of a batch to a GPU. LLaST.forward needs the labels on the CPU.

    From pinned memory (memory that is never moved to the disk), a GPU copies by itself. Neither the
    CPU nor the computation of the step before has to wait.
    """
    if device.type != "cuda":
        return batch
    tensors = torch.cat(batch.audio), batch.ids  # one copy instead of one for each clip
    audio, ids = (tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
    return replace(batch, audio=list(audio.split([len(clip) for clip in batch.audio])), ids=ids)


def prefetch(items: Iterator, in_thread: bool) -> Iterator:
    """Yield the items. With in_thread, a thread makes the next item while this one is used.

    This helps if the training runs on a GPU. On a CPU, the training needs all cores itself.
    """
    if not in_thread:
        yield from items
        return
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, items, None)  # gives None after the last item
        while (item := future.result()) is not None:
            future = thread.submit(next, items, None)
            yield item


def check_failures(failed: dict[Path, str], n_clips: int, empty_steps: int, max_share: float):
    """Raise an error if too many clips of the run cannot be read, for example if a disk is lost.

    Too many: three steps in a row without a clip, or more than five clips and more than max_share.
    """
    share = len(failed) / n_clips
    if empty_steps < 3 and (len(failed) <= 5 or share <= max_share):
        return
    reason, advice = f"but --max-failed is {max_share}", "repair them or raise the limit"
    if empty_steps == 3:
        reason, advice = "and three steps in a row have no clip", "repair them"
    first = "".join(f"\n    {path}: {why}" for path, why in list(failed.items())[:5])
    problem = f"{len(failed)} training clips ({share:.1%}) cannot be read, {reason}"
    raise ValueError(f"{problem}; {advice}. The first:{first}")


# ------------------------------------------------------------------------------------------ the run


def run(args: argparse.Namespace) -> int:
    start_time = time.time()
    settings = with_flags(PRESETS[args.preset], args)
    out = args.out or HERE / "runs" / settings.lang.replace(",", "-")
    check_folders(settings, out)
    splits = read_corpora(settings, args.clips)
    # Loading the models can take minutes. Before that, report a disk that cannot be written, and a
    # saved state of another run.
    description = describe_run(args, settings, splits["train"])
    start_files(args, settings, out, description)
    model = load_model(settings, args, description)
    batches = make_batches(model, splits["train"], settings, args.seed)
    # asr=0.0: the dev loss is the loss of translation.
    dev = make_batches(model, splits["dev"], replace(settings, asr=0.0), args.seed)
    print_corpora(splits, batches, dev)
    state = TrainState(model, settings)
    if (out / STATE).exists():
        state.load(out / STATE)
        print(f"\ncontinuing after step {state.step}")
    report = Report(model, dev, settings, out, state, description)
    try:
        with report.bar:
            train_epochs(model, batches, settings, report.after_step, report.after_epoch, state)
        for path, reason in (batches.skipped | dev.skipped).items():
            print(f"left out, because it cannot be read: {path}: {reason}")
        finish(model, splits, settings, out, start_time)
    except ValueError as error:
        raise ValueError(f"{error}\n{saved_in(out)}") from error
    except KeyboardInterrupt:
        if state.step:
            report.save()  # with the steps since the last epoch
        print(f"\nstopped by Ctrl-C. {saved_in(out)}", file=sys.stderr)
        return 130
    return 0


def saved_in(out: Path) -> str:
    """The sentence "A model is saved in ..." or "No model is saved in ..."."""
    return f"{'A' if (out / 'llast.json').is_file() else 'No'} model is saved in {short(out)}"


def check_folders(settings: Preset, out: Path):
    """Check that the models exist, and that a run may write to `out`."""
    for base in (settings.encoder, settings.llm):
        if not base.exists():
            hint = f"; get it with\n    {download_command(base)}" if base.name in DOWNLOADS else ""
            raise FileNotFoundError(f"{short(base)} does not exist{hint}")
    files = [path.name for path in out.glob("*")]
    is_finished = "llast.json" in files and STATE not in files
    if out.is_file() or is_finished or (files and "run.json" not in files):
        problem = "already has a model" if is_finished else "is not an empty folder"
        raise ValueError(f"{out} {problem}; choose another folder with --out")


def describe_run(args: argparse.Namespace, settings: Preset, rows: list[Row]) -> dict:
    """What must be the same when a run continues: settings, base models and training rows.

    Base models and rows are described by SHA-256. Their folders may be moved.
    """
    values = asdict(settings) | {"clips": args.clips, "seed": args.seed, "compile": args.compile}
    digest = hashlib.sha256()
    for row in rows:
        path = row.path.relative_to(settings.data).as_posix()
        digest.update(ascii((path, *list(vars(row).values())[1:])).encode())
    values |= fingerprints_of(model_config(settings)) | {"data": digest.hexdigest()}
    return {name: value for name, value in values.items() if name not in FREE_SETTINGS}


def start_files(args: argparse.Namespace, settings: Preset, out: Path, description: dict):
    """Write run.json and an empty log.jsonl, or prepare the files of a stopped run to continue.

    Raises OSError if the folder cannot be written, and ValueError if the stopped run was another.
    """
    values = {name: getattr(args, name) for name in ("preset", "clips", "seed", "compile")}
    values = json.dumps(values | asdict(settings), default=lambda p: str(p.absolute()), indent=2)
    out.mkdir(parents=True, exist_ok=True)
    step, log = 0, out / "log.jsonl"
    if (out / STATE).exists():
        saved = json.loads(read_metadata(out / STATE)["run"])
        step = saved.pop("step")
        now = json.loads(json.dumps(description))  # JSON stores tuples as lists
        if other := [k for k in saved | now if saved.get(k) != now.get(k)]:
            text = ", ".join(
                f"{k} {saved.get(k)!s:.12} before, {now.get(k)!s:.12} now" for k in other
            )
            advice = "use the same ones to continue, or choose another folder with --out"
            raise ValueError(f"{out} has a run with other settings: {text}; {advice}")
    (out / "run.json").write_text(values + "\n")
    lines = log.read_text().splitlines(keepends=True) if step else []
    # TODO: the line of a killed run may be incomplete
    log.write_text("".join(line for line in lines if keep_line(json.loads(line), step)))


def keep_line(line: dict, step: int) -> bool:
    """Whether a line of the log stays when a run continues after `step`.

    The lines of later steps are written again. The dev scores of an epoch that ends with this step
    are computed again.
    """
    return line["step"] < step or line["step"] == step and "loss" in line


def load_model(settings: Preset, args: argparse.Namespace, fingerprints: dict) -> LLaST:
    """A new model, on the GPU if there is one. Also prints its parameter counts."""
    torch.manual_seed(args.seed)
    device, dtype, reason = pick_device()
    print(f"{short(settings.encoder)}, {short(settings.llm)}, {short(settings.data)}; {reason}")
    fingerprints = {name: fingerprints[name] for name in BASE_FIELDS}
    with explain_out_of_memory("while loading the models", ADVICE_MODELS):
        model = LLaST.fresh(model_config(settings), dtype, device, fingerprints)
    model.speech_encoder.recompute = settings.recompute == "all"
    model.llm.recompute = settings.recompute != "none"
    if args.compile:
        model.compile_layers()
    print_parts(model)
    return model


def print_parts(model: LLaST) -> dict[str, list[int]]:
    """Print and return the number of parameters of each part: {part: [trained, frozen]}."""
    names = {"speech_encoder": "encoder", "projector": "projector", "llm": "LLM"}
    parts = "encoder", "encoder LoRA", "projector", "LLM", "LLM LoRA", "all"
    counts = {part: [0, 0] for part in parts}
    for name, p in model.named_parameters():
        part = names[name.split(".")[0]] + (" LoRA" if "lora_" in name else "")
        for row in (part, "all"):
            counts[row][0 if p.requires_grad else 1] += p.numel()
    print(f"\n{'part':14}{'trained':>14}{'frozen':>16}")
    for part, (trained, frozen) in counts.items():
        print(f"{part:14}{trained:14,}{frozen:16,}")
    return counts


def make_batches(model: LLaST, rows: list[Row], settings: Preset, seed: int = 0) -> Batches:
    """The batches of `rows` with the settings of this run."""
    return Batches(rows, settings.asr, model.tokenizer, settings.template, settings.batch, seed)


class Report:
    """What the command does after each step and each epoch of train_epochs.

    After a step: the progress bar and a line in log.jsonl. After an epoch: save the model and
    print dev scores.
    """

    def __init__(self, model: LLaST, dev: Batches, settings: Preset, out: Path, state, description):
        self.model, self.dev, self.settings, self.out = model, dev, settings, out
        self.state, self.description = state, description
        self.start_time = self.step_start = self.last_save = time.perf_counter()
        self.log_works = True
        # disable=None: no progress bar if stderr is not a terminal
        self.bar = tqdm(initial=state.step, unit="step", leave=False, disable=None)

    def after_step(self, step: Step):
        loss, now = step.losses.mean().item(), time.perf_counter()
        n_clips = sum(len(batch.audio) for batch in step.batches)
        rate, self.step_start = n_clips / (now - self.step_start), now
        self.bar.total = step.n_steps
        self.bar.update()
        self.bar.set_postfix_str(f"loss {loss:.3f}, lr {step.lr:.1e}, {rate:.1f} clips/s")
        line = {"step": step.number, "epoch": step.epoch, "loss": round(loss, 5), "lr": step.lr}
        line |= {"grad_norm": round(step.grad_norm, 4), "seconds": round(now - self.start_time, 2)}
        self.log(line | {"clips": n_clips, "clips_per_second": round(rate, 1)})
        if now - self.last_save >= 60 * self.settings.save_minutes:
            self.save_state()

    def save_state(self):
        self.state.save(self.out / STATE, self.description)
        self.last_save = time.perf_counter()

    def save(self):
        """Save the state, and then the model. While there is a state, the model is not the last."""
        self.save_state()
        self.model.save_pretrained(self.out)
        for name in ("llast.safetensors", "llast.json", "."):
            write_to_disk(self.out / name)

    def after_epoch(self, epoch: int):
        self.save()
        with explain_out_of_memory("on the dev clips", ADVICE_TRAINING):
            scores = dev_scores(self.model, self.dev)
            self.log({"step": self.state.step, "epoch": epoch} | scores)
            text = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in scores.items())
            tqdm.write(f"epoch {epoch} of {self.settings.epochs}: {text} (one beam)")
            print_samples(self.model, self.dev.rows)
        self.step_start = time.perf_counter()  # the next step did not begin before

    def log(self, line: dict):
        """Add a line to log.jsonl. If the file cannot be written, print this once and continue."""
        try:
            with open(self.out / "log.jsonl", "a") as file:
                file.write(json.dumps(line) + "\n")
        except OSError as error:
            if self.log_works:
                tqdm.write(f"log.jsonl cannot be written ({error}); training goes on without it")
            self.log_works = False


def finish(model: LLaST, splits: dict, settings: Preset, out: Path, start_time: float):
    """Write and print the test scores of every direction, and print how to use the model.

    Also save the limit above which translate.py calls an answer unlikely.
    """
    results, search = {}, SearchOptions(settings.beams)
    merge_lora(model)  # From here on the model only translates, and merged weights are faster.
    dev = by_direction(splits["dev"]).values()
    lowest = min(score_rows(model, rows, search=search)["low_score"] for rows in dev)
    model.config = replace(model.config, max_loss=-lowest)
    model.save_pretrained(out)
    for direction, group in by_direction(splits["test"]).items():
        with explain_out_of_memory(f"on a test clip ({saved_in(out)})", ADVICE_MODELS):
            tsv = out / f"test.{direction}.tsv"
            results[direction] = score_rows(model, group, tsv, search, progress=True)
        print(f"test {describe(direction, results[direction])}")
    results["seconds"] = seconds = round(time.time() - start_time, 1)
    (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
    (out / STATE).unlink()  # from now on, the run is finished
    print(f"\n{seconds:.0f} s in all. The model and its scores are in {short(out)}. Try:")
    # The example is a clip of the last direction.
    print(f"    python translate.py --model {short(out)} --lang {direction} {short(group[0].path)}")


def main() -> int:
    # Print an escape such as \u4e2d for a character that the terminal cannot show. stderr does so
    # by default.
    sys.stdout.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args()
    try:
        return run(args)
    except KeyboardInterrupt:
        print("\nstopped", file=sys.stderr)
        return 130
    except (ValueError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        tqdm.write(f"train.py: {error}", file=sys.stderr)  # a progress bar may be on this line
        return 2


if __name__ == "__main__":
    sys.exit(main())
