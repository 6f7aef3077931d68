"""Train a LLaST: from a corpus to a saved model with its scores.

    python train.py --lang fr                  the preset "tiny": minutes on a laptop
    python train.py --preset llast-8b          a system of the paper
    torchrun --nproc-per-node 8 train.py --preset llast-8b        on eight GPUs

Read it in this order: presets, flags, corpora, scores, stop and continue, the loop, several GPUs,
the run. For the loop itself, the parts "stop and continue" and "several GPUs" are not needed. The
loss is in llast.py. In a notebook, call LLaST.fresh(model_config(settings)), make_batches and
train_epochs. They write no files and print nothing.
"""

import argparse
import hashlib
import json
import math
import os
import random
import signal
import sys
import time
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from dataclasses import asdict, dataclass, replace
from itertools import accumulate
from pathlib import Path

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch.distributed.fsdp import FSDPModule, fully_shard
from tqdm import tqdm

from data import IGNORE, TEMPLATES, Batch, Batches, Row, describe_overlap, parse_directions
from llast import LLaST, LLaSTConfig, digests_of, explain_out_of_memory, pick_device
from lora import merge_lora
from translate import SearchOptions, describe, metrics, read_splits, score_rows, translate_in_order
from whisper_encoder import SAMPLE_RATE, WINDOWS, check_tensors, read_tensors

HERE = Path(__file__).parent
ADVICE_TRAINING = "use a smaller --batch and a larger --accumulate, or --recompute all"
ADVICE_MODELS = "use smaller models (--encoder, --llm)"
ONE_BEAM = SearchOptions(beams=1)  # for the dev scores, because it is fast
TINY, WEIGHTS = HERE / "tiny", HERE / "weights"
STATE = "state.safetensors"  # in the folder of a run that is not finished, see TrainState
# A stopped run can continue with other values of these settings. Most of them do not change the
# steps. Of the folders (encoder, llm, data), a SHA-256 of the content is compared instead.
NOT_COMPARED = "preset encoder llm data recompute beams max_failed save_minutes torch".split()

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
    accumulate: int  # batches in a step, on each GPU
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
    # be a lost disk, not a few broken files. Up to five such clips are allowed, unless all fail.
    max_failed: float = 0.01
    # Minutes between two saves of the state (see TrainState), from which a stopped run continues.
    # Its file has three numbers for each trained parameter, so writing it can take a while.
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
    # The smallest pair of public models, for a CPU or any GPU. The projector starts at random and
    # must learn where the words of the LLM are. This takes several epochs. In a first trial, 1e-3
    # learned more slowly. The rank in the LLM is twice that of "tiny", because this LLM cannot
    # translate. Only half of the clips are also transcribed, to save time.
    "base": Preset(
        encoder=WEIGHTS / "whisper-base", llm=WEIGHTS / "SmolLM2-135M-Instruct",
        data=TINY / "corpus", lang="fr", template="smollm2", window="clip", encoder_rank=16,
        llm_rank=32, dropout=0.0, asr=0.5, lr=5e-4, schedule="linear", warmup=0.05, batch=1400,
        accumulate=1, recompute="none", epochs=6, beams=5,
    ),
    # For one small GPU. Never trained. Its ranks are between those of "base" and of the paper.
    "small": Preset(
        **PAPER | dict(encoder=WEIGHTS / "whisper-small", lang="fr", encoder_rank=64, llm_rank=128),
        llm=WEIGHTS / "Llama-3.2-1B-Instruct", template="llama3",
    ),
    "llast-2b": Preset(llm=WEIGHTS / "TinyLlama-1.1B-Chat-v1.0", template="tinyllama", **PAPER),
    "llast-8b": Preset(llm=WEIGHTS / "Llama-2-7b-chat-hf", template="llama2", **PAPER),
    "llast-14b": Preset(llm=WEIGHTS / "Llama-2-13b-chat-hf", template="llama2", **PAPER),
    # The 8B system with newer models. Never trained.
    "llast-8b-llama3": Preset(
        **PAPER | dict(encoder=WEIGHTS / "whisper-large-v3"),
        llm=WEIGHTS / "Llama-3.1-8B-Instruct", template="llama3",
    ),
}  # fmt: skip
DOWNLOADS = {  # name of a folder: arguments of `hf download`
    "whisper-base": "openai/whisper-base config.json model.safetensors",
    "whisper-small": "openai/whisper-small config.json model.safetensors",
    "whisper-large-v2": "openai/whisper-large-v2 config.json model.safetensors",
    "whisper-large-v3": "openai/whisper-large-v3 config.json model.safetensors",
    "SmolLM2-135M-Instruct": "HuggingFaceTB/SmolLM2-135M-Instruct "
    "config.json generation_config.json tokenizer.json model.safetensors",
    "Llama-3.2-1B-Instruct": "meta-llama/Llama-3.2-1B-Instruct --exclude 'original/*'",
    "Llama-3.1-8B-Instruct": "meta-llama/Llama-3.1-8B-Instruct --exclude 'original/*'",
    "TinyLlama-1.1B-Chat-v1.0": "TinyLlama/TinyLlama-1.1B-Chat-v1.0 --exclude '*.bin'",
    "Llama-2-7b-chat-hf": "NousResearch/Llama-2-7b-chat-hf --exclude '*.bin'",
    "Llama-2-13b-chat-hf": "NousResearch/Llama-2-13b-chat-hf --exclude '*.bin'",
}


def download_command(folder: Path) -> str:
    """The command that downloads a public checkpoint to the folder where a preset expects it."""
    return f"hf download {DOWNLOADS[folder.name]} --local-dir {short(folder)}"


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
    add("--accumulate", type=int, help="batches in one step, on each GPU")
    add("--recompute", choices=("none", "llm", "all"), help="models with activation checkpointing")
    add("--max-failed", type=float, help="share of clips that may fail to load [0.01]")
    add("--save-minutes", type=float, help="minutes between two saves [20]")
    add("--shard", action="store_true", help="divide the frozen weights over the GPUs")
    add("--dtype", choices=("float32", "bfloat16"), help="precision of the frozen weights")
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
    groups = dev.groups(0) if isinstance(model, FSDPModule) else my_share(dev.groups(0))
    losses = [model(batch).cpu() for group in groups if (batch := dev.load(group))]
    losses = sum(gather(losses), [])
    if not losses:
        raise ValueError(f"no dev clip can be read; fix them: {', '.join(map(str, dev.skipped))}")
    scores = {"dev_loss": round(torch.cat(losses).mean().item(), 4)}
    for direction, rows in by_direction(dev.rows).items():
        result = score_rows(model, rows, search=ONE_BEAM, translator=translate_share)
        scores[f"dev_bleu {direction}"] = result["bleu"]
    return scores


def print_samples(model: LLaST, rows: list[Row]):
    """Print three dev clips with their reference and the translation of the model."""
    for row in random.Random(0).sample(rows, min(3, len(rows))):
        [result] = translate_in_order(model, [row.path], "st", row.source, row.target, ONE_BEAM)
        got = result.text[:200] + " ..." * (len(result.text) > 200)  # some repeat a phrase
        layout = "    said      {}\n    expected  {}\n    got       {}"
        tqdm.write(layout.format(row.sentence, row.translation, got))


# ------------------------------------------------------------------------------- stop and continue


class TrainState:
    """Everything that changes in a training: trained weights, AdamW's averages, number of steps.

    `step` counts the steps that are done. It is also the position in the data, because the batches
    of an epoch are always the same. The learning rate and the random numbers of a step depend only
    on its number. So a run that loads this state continues exactly.
    """

    def __init__(self, model: LLaST, settings: Preset):
        trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
        options = dict(betas=settings.betas, weight_decay=settings.weight_decay, fused=True)
        self.optimizer = torch.optim.AdamW(trained.values(), **options)
        self.step, self.tensors = 0, model.trained()
        for name, p in trained.items():
            # AdamW would make these tensors in its first step. Its own `step` is used to correct
            # the averages, because they start with zeros.
            averages = {"exp_avg": torch.zeros_like(p), "exp_avg_sq": torch.zeros_like(p)}
            self.optimizer.state[p] = averages | {"step": torch.zeros((), device=p.device)}
            self.tensors |= {f"{name}.{key}": t for key, t in self.optimizer.state[p].items()}

    def update_weights(self, lr: float):
        """Do one step of AdamW with the gradients of the parameters."""
        self.optimizer.param_groups[0]["lr"] = lr
        with explain_out_of_memory("in a step of the optimizer", ADVICE_MODELS):
            self.optimizer.step()

    def save(self, file: Path, run: dict):
        """Write the state and `run`, the description of its run.

        The new file replaces the old one only when it is completely on the disk. So after a crash
        or a power cut, the file is the old one or the new one.
        """
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.tensors.items()}
        text, temporary = json.dumps(run | {"step": self.step}), file.with_suffix(".tmp")
        save_file(tensors, temporary, {"run": text} | digests_of(text, tensors))  # SHA-256
        wait_for_disk(temporary)
        os.replace(temporary, file)
        wait_for_disk(file.parent)

    def load(self, file: Path, run: dict) -> dict:
        """Continue from a saved state, and return the description of its run.

        Raises ValueError if the file is damaged, or if `run` is another run.
        """
        tensors = read_tensors(file)
        with safe_open(file, "pt") as stored:
            metadata = {"run": ""} | (stored.metadata() or {})
        if metadata != {"run": metadata["run"]} | digests_of(metadata["run"], tensors):
            raise ValueError(f"{file} was changed; copy it again or choose another --out")
        saved = json.loads(metadata["run"])
        other = [k for k, v in run.items() if saved.get(k) != v and k not in NOT_COMPARED]
        if other:
            text = ", ".join(f"{k} {run[k]!s:.12} instead of {saved.get(k)!s:.12}" for k in other)
            advice = "use its settings to continue it, or choose another folder with --out"
            raise ValueError(f"{file.parent} has a stopped run. Now you ask for {text}; {advice}")
        check_tensors(self.tensors, tensors, file)
        for name, tensor in self.tensors.items():
            tensor.copy_(tensors[name])
        self.step = saved["step"]
        return saved


def wait_for_disk(path: Path):
    """Wait until a file, or the names of the files in a folder, are safe from a power cut."""
    if os.name == "posix":  # Windows cannot open a folder
        number = os.open(path, os.O_RDONLY)
        os.fsync(number)
        os.close(number)


class StopSignals:
    """Remembers SIGINT (Ctrl-C) and SIGTERM (from a scheduler).

    A signal only sets `received`. An exception in the middle of a step could leave the weights of
    one step with the number of another one. So the loop looks at `received` between two steps, and
    the scoring between two clips. A second signal ends the program at once.
    """

    received = None

    def catch(self):
        self.received = None
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, self.handle)

    def handle(self, number, frame):
        self.received = number
        if n_ranks() == 1:  # torchrun sends its own signal after that of the terminal
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
            os.write(2, b"\nstopping soon; a second signal ends the program at once\n")


STOP = StopSignals()


# ----------------------------------------------------------------------------------------- the loop


@dataclass
class Step:
    """Information about one step of the optimizer. train_epochs gives it to after_step."""

    number: int  # from 1 to n_steps, over all epochs
    n_steps: int
    epoch: int  # from 1
    lr: float
    loss: float  # the mean over the answer tokens of all GPUs
    losses: torch.Tensor  # of every answer token: batch after batch, row after row
    grad_norm: float  # norm (length) of the gradient before clipping
    batches: list[Batch]  # with several GPUs, the batches and losses of this one

    @property
    def is_finite(self) -> bool:
        """Whether the step changes the weights. Otherwise it would make them NaN."""
        return math.isfinite(self.loss + self.grad_norm)


def compute_gradient(model: LLaST, batches: list[Batch], n_tokens: int, clip_norm: float):
    """Compute the gradient of one step, and scale it down if its norm is more than clip_norm.

    Returns the losses of all answer tokens, on the CPU, and the norm of the gradient before
    clipping.

    The losses are divided by n_tokens, the number of tokens of the step, so that every token counts
    the same. Example: a batch with the losses 1, 1, 1, 1 and a batch with the loss 6. The mean of
    the five tokens is 10 / 5 = 2. The mean of the two means would be (1 + 6) / 2 = 3.5: the one
    token of the second batch would count as much as the four tokens of the first together.
    """
    model.zero_grad(set_to_none=True)
    step_losses = []
    for batch in batches:
        size = f"{len(batch.audio)} rows of {max(batch.positions)} positions"
        with explain_out_of_memory(f"in training, on a batch of {size}", ADVICE_TRAINING):
            losses = model(batch)  # one for each answer token
            (losses.sum() / n_tokens).backward()  # is added to the gradients of the earlier batches
        step_losses.append(losses.detach())
    sum_gradients(model)
    grad_norm = torch.nn.utils.clip_grad_norm_(model.parameters(), clip_norm)
    # The only place of a step where the CPU waits for the GPU. In between, it is ahead of the GPU,
    # so the GPU always has work.
    losses = torch.cat([*step_losses, grad_norm[None]]).cpu()
    return losses[:-1], losses[-1].item()


def train_epochs(
    model: LLaST, batches: Batches, settings, after_step=None, after_epoch=None, state=None
):
    """Train the model in place: every epoch is one pass over the examples of `batches`.

    It writes no file and prints nothing. It calls after_step(Step) after each step and
    after_epoch(number) after each epoch, unless they are None. If `state` is the TrainState of a
    stopped run, only the rest of that run is done. Raises ValueError if three steps in a row are
    not finite, if too many clips cannot be read, or if the first step changes the wrong tensors.
    """
    state = state or TrainState(model, settings)
    norms = None if state.step else tensor_norms(model)
    step_size = settings.accumulate * n_ranks()  # in batches
    sizes = [len(batches.groups(epoch)) for epoch in range(settings.epochs)]
    # The number of the last step of each epoch. The learning rate depends on the last of them.
    ends = list(accumulate(math.ceil(size / step_size) for size in sizes))
    n_clips = len({example.row.path for group in batches.groups(0) for example in group})
    n_bad = 0  # steps in a row without a finite gradient
    for epoch, (start, end) in enumerate(zip([0, *ends], ends)):
        if state.step > end:
            continue  # this epoch was finished before the run was stopped
        model.train()
        steps = load_steps(batches, epoch, step_size, state.step - start, model.device)
        # On a CPU, the training itself needs all cores.
        for step_batches in prefetch(steps) if model.device.type == "cuda" else steps:
            number = state.step + 1
            n_tokens = agree_on_step(step_batches, batches.skipped)
            check_failures(batches.skipped, n_clips, settings.max_failed)
            if not n_tokens:  # no clip of this step can be read
                state.step = number
                continue
            lr = learning_rate(number, ends[-1], settings)
            seed = random.Random(f"step {batches.seed} {number} {rank()}").getrandbits(63)
            torch.manual_seed(seed)  # for dropout; each step of each rank has its own seed
            losses, grad_norm = compute_gradient(model, step_batches, n_tokens, settings.clip_norm)
            loss = sum(gather(losses.sum().item())) / n_tokens
            step = Step(number, ends[-1], epoch + 1, lr, loss, losses, grad_norm, step_batches)
            if step.is_finite:
                state.update_weights(lr)
            state.step = number
            if after_step:
                after_step(step)
            n_bad = 0 if step.is_finite else n_bad + 1
            if n_bad == 3:
                raise ValueError("three steps in a row had no finite gradient; try a smaller --lr")
            if norms and step.is_finite:
                norms = check_first_step(norms, model)
        if after_epoch:
            after_epoch(epoch + 1)


@torch.no_grad()
def tensor_norms(model: LLaST) -> dict[str, float]:
    """The norm of every parameter. It shows later whether the parameter has changed."""
    norm = torch.linalg.vector_norm
    return {name: norm(p, dtype=torch.float64).item() for name, p in model.named_parameters()}


def check_first_step(norms: dict[str, float], model: LLaST):
    """Raise ValueError if the first step did not change a trained tensor, or changed a frozen one.

    A of a LoRA does not change in the first step: its gradient is a product with B, which is 0.
    """
    changed = {name for name, norm in tensor_norms(model).items() if norm != norms[name]}
    trained = model.trained().keys()
    still = [name for name in trained - changed if "lora_A" not in name]
    if still or changed - trained:
        problem = f"it did not change {still[:5]}, and it changed {list(changed - trained)[:5]}"
        raise ValueError(f"the first step is wrong: {problem}; check which tensors AdamW gets")


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

    A step has `size` batches. The first n_done steps of the epoch are left out. With several ranks,
    each loads its share of every step, and all of them have the same number of batches.
    """
    groups = batches.groups(epoch)
    for start in range(n_done * size, len(groups), size):
        loaded = [batches.load(group) for group in my_share(groups[start : start + size])]
        if n_ranks() > 1:
            loaded += [None] * (size // n_ranks() - len(loaded))
            loaded = [batch or empty_batch() for batch in loaded]
        yield [to_device(batch, device) for batch in loaded if batch is not None]


def to_device(batch: Batch, device: torch.device) -> Batch:
    """Copy the audio and the ids of a batch to a GPU. LLaST.forward needs the labels on the CPU.

    From pinned memory (memory that is never moved to the disk), a GPU copies without the CPU. So
    the CPU does not wait, and the copy can run while the GPU still computes the step before.
    """
    if device.type != "cuda":
        return batch
    tensors = torch.cat(batch.audio), batch.ids  # one copy instead of one for each clip
    with torch.cuda.device(device):  # otherwise a thread pins memory for the first GPU
        audio, ids = (tensor.pin_memory().to(device, non_blocking=True) for tensor in tensors)
    return replace(batch, audio=list(audio.split([len(clip) for clip in batch.audio])), ids=ids)


def prefetch(items: Iterator) -> Iterator:
    """Yield the items. A thread makes the next item while this one is used."""
    with ThreadPoolExecutor(1) as thread:
        future = thread.submit(next, items, None)  # gives None after the last item
        while (item := future.result()) is not None:
            future = thread.submit(next, items, None)
            yield item


def check_failures(failed: dict[Path, str], n_clips: int, max_share: float):
    """Raise an error if too many clips of the run cannot be read, for example if a disk is lost.

    Too many: all of them, or more than five clips and more than the share max_share.
    """
    share = len(failed) / n_clips
    if share == 1 or (len(failed) > 5 and share > max_share):
        first = "".join(f"\n    {path}: {why}" for path, why in list(failed.items())[:5])
        problem = f"{len(failed)} training clips ({share:.1%}) cannot be read"
        advice = f"but --max-failed is {max_share}; repair them or raise the limit"
        raise ValueError(f"{problem}, {advice}. The first:{first}")


# ------------------------------------------------------------------------------------ several GPUs

# torchrun starts one process, a "rank", for each GPU. All ranks have the same trained weights. In
# each step, every rank computes the gradient of its own batches. Then the gradients are summed, and
# all ranks do the same step. This is called data parallel. Only rank 0 prints and writes files. In
# a run without torchrun there is only rank 0, and these functions change nothing.
#
# PyTorch has a class for this, DistributedDataParallel. It sends the gradients during the backward
# pass. Here they are small, because only LoRA and the projector are trained, so sum_gradients sends
# them after it. tools/plan.py prints how many bytes a GPU sends.


def rank() -> int:
    return dist.get_rank() if dist.is_initialized() else 0


def n_ranks() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def on_rank_0(function):
    """Return a function that does nothing on the other ranks."""
    return lambda *args: function(*args) if rank() == 0 else None


@contextmanager
def join_ranks():
    """Connect the processes that torchrun started. All ranks except rank 0 print only errors."""
    if not dist.is_torchelastic_launched():
        yield
        return
    backend = "gloo"
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        backend = "cpu:gloo,cuda:nccl"  # gloo sends numbers and texts, NCCL sends gradients
    dist.init_process_group(backend)
    nowhere = open(os.devnull, "w") if rank() else None
    try:
        with redirect_stdout(nowhere or sys.stdout), redirect_stderr(nowhere or sys.stderr):
            yield
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and "gloo" not in str(error):
            raise  # not from the connection
        problem = f"rank {rank()} has lost another rank, or waited too long for it"
        advice = "see the message of that rank, then start the same command again"
        raise ConnectionError(f"{problem}; {advice}") from error
    dist.destroy_process_group()


def my_share(items: list) -> list:
    """The items of this rank: of 3 ranks, rank 1 has the items 1, 4, 7, and so on."""
    return items[rank() :: n_ranks()]


def gather(value) -> list:
    """The values of all ranks, in the order of the ranks. All ranks must call this together."""
    values = [value] * n_ranks()
    if n_ranks() > 1:
        dist.all_gather_object(values, value)
    return values


def agree_on_step(batches: list[Batch], failed: dict[Path, str]) -> int:
    """Return the number of answer tokens in the batches of all ranks.

    Also add to `failed` the clips that the other ranks could not read. If a rank got a signal,
    stop all ranks here, before the step.
    """
    n_tokens = sum(int((batch.labels != IGNORE).sum()) for batch in batches)
    messages = gather((n_tokens, dict(failed), STOP.received))
    for _, others, signal_number in messages:
        failed |= others
        STOP.received = STOP.received or signal_number
    if STOP.received:
        raise KeyboardInterrupt
    return sum(n for n, *_ in messages)


def sum_gradients(model: LLaST):
    """Replace the gradients of each rank by their sum over all ranks."""
    for p in model.parameters():
        if p.requires_grad and n_ranks() > 1:
            dist.all_reduce(p.grad)  # the default operation is a sum


def empty_batch() -> Batch:
    """A row that is a second of silence, without an answer: its loss and its gradient are 0.

    A rank computes it if it has no batch. Otherwise its gradients would be None, and they could not
    be summed. And with --shard, all ranks must call a divided layer together.
    """
    ids, labels, lengths = torch.tensor([[0]]), torch.tensor([[IGNORE]]), torch.tensor([1])
    return Batch([], [torch.zeros(SAMPLE_RATE)], ids, labels, lengths, audio_at=[0])


def shard_base(model: LLaST, device: torch.device, dtype: torch.dtype):
    """Divide the frozen weights of all layers over the ranks, and move the model to the GPU.

    For each layer, the ranks collect its weights, compute, and keep only their own parts again.
    What is trained is not divided, so the steps and the files are those of a run without --shard.
    """
    trained = {p for p in model.parameters() if p.requires_grad}
    for part in (*model.speech_encoder.layers, *model.llm.model.layers, model):
        # Read and convert one layer at a time: the whole base may be too large for one GPU.
        for p in part.parameters():
            p.data = p.data.to(device, p.dtype if p in trained else dtype)
        # The last part is the model. It divides nothing more, but it connects the layers: while one
        # computes, the next one is collected.
        fully_shard(part, ignored_params=set(model.parameters()) if part is model else trained)
    # Keys and values that a layer returns are views. PyTorch warns, because nobody may change them.
    warnings.filterwarnings("ignore", ".*returned a view tensor")
    # The first pass makes the tensors for collected weights. In scoring (inference mode), it would
    # make tensors that cannot be used for training.
    model(empty_batch()).sum().backward()


def translate_share(model: LLaST, paths: list[Path], *args, **options) -> list:
    """Like translate(), but each rank translates a share of the clips. All get all results."""
    # With --shard, all ranks must call each layer together, so all translate all clips.
    share = paths if isinstance(model, FSDPModule) else my_share(paths)
    results = []
    for result in translate_in_order(model, share, *args, **options):
        if STOP.received and n_ranks() == 1:  # several ranks stop together, see agree_on_step
            raise KeyboardInterrupt
        results.append(result)
    if share is paths:
        return results
    joined = [None] * len(paths)
    for i, part in enumerate(gather(results)):
        joined[i :: n_ranks()] = part
    return joined


# ------------------------------------------------------------------------------------------ the run


def run(args: argparse.Namespace) -> int:
    start_time = time.time()
    settings = with_flags(PRESETS[args.preset], args)
    if args.shard and n_ranks() == 1:
        raise ValueError("--shard needs several processes, but there is one; use torchrun")
    out = args.out or HERE / "runs" / settings.lang.replace(",", "-")
    check_folders(settings, out)
    splits = read_corpora(settings, args.clips)
    with lock(out):
        model = load_model(settings, args)
        batches = make_batches(model, splits["train"], settings, args.seed)
        # asr=0.0: the dev loss is the loss of translation.
        dev = make_batches(model, splits["dev"], replace(settings, asr=0.0), args.seed)
        print_corpora(splits, batches, dev)
        state = TrainState(model, settings)
        description = describe_run(args, settings, splits["train"], model)
        start_files(out, description, state)
        report = Report(state, description, model, dev, settings, out)
        STOP.catch()  # an earlier signal ends the program at once, because nothing can be lost
        try:
            with report.bar:
                train_epochs(model, batches, settings, report.after_step, report.after_epoch, state)
            for path, reason in (batches.skipped | dev.skipped).items():
                print(f"left out, because it cannot be read: {path}: {reason}")
            finish(model, splits, settings, out, start_time)
        except KeyboardInterrupt:
            if state.step:
                report.save()  # also the model, so that it can be used
            gather(None)  # torchrun ends all ranks when one has ended, so wait for rank 0
            raise KeyboardInterrupt(saved_in(out)) from None
        except (ValueError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
            raise ValueError(f"{error}\n{saved_in(out)}") from error
    return 0


def saved_in(out: Path) -> str:
    """A sentence about the saved model, and if the run can continue, one about this."""
    text = f"{'A' if (out / 'llast.json').is_file() else 'No'} model is saved in {short(out)}."
    return text + " The same command continues the run." * (out / STATE).is_file()


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


def lock(out: Path):
    """Open run.json. While it is open, a second run in this folder is an error."""
    if rank():
        return open(os.devnull)
    out.mkdir(parents=True, exist_ok=True)
    file = open(out / "run.json", "a")
    try:
        import fcntl

        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
        advice = "wait until it ends, or choose another folder with --out"
        file.close()
        raise ValueError(f"another run writes to {out}; {advice}") from error
    except (ImportError, OSError) as error:  # Windows, and some network disks
        print(f"{out} cannot be locked ({error}); do not start a second run in this folder")
    return file


def describe_run(args, settings: Preset, rows: list[Row], model: LLaST) -> dict:
    """The content of run.json: settings, and SHA-256 of the training rows and the base models."""
    values = {name: getattr(args, name) for name in ("preset", "clips", "seed", "compile")}
    # Not args.dtype: if it is None, the precision depends on the machine.
    dtype = str(model.llm.lm_head.weight.dtype).removeprefix("torch.")
    values |= asdict(settings) | {"torch": torch.__version__, "dtype": dtype}
    values["accumulate"] *= n_ranks()  # the same steps with another number of GPUs
    values |= {f"{name}_sha256": digest for name, digest in model.fingerprints.items()}
    digest = hashlib.sha256()
    for row in rows:  # the path inside the corpus, because the corpus may be moved
        digest.update(ascii(replace(row, path=row.path.relative_to(settings.data))).encode())
    values["rows_sha256"] = digest.hexdigest()
    return json.loads(json.dumps(values, default=lambda path: str(path.absolute())))


def start_files(out: Path, description: dict, state: TrainState):
    """Write run.json and log.jsonl. If the folder has a stopped run, prepare to continue it.

    The log keeps only the lines before the saved state. The later steps are done again.
    """
    log, size = out / "log.jsonl", 0
    if (out / STATE).exists():
        size = state.load(out / STATE, description)["log_size"]
    runs = gather(description | {"step": state.step})
    if any(run != runs[0] for run in runs):
        raise ValueError("the ranks have different files or settings; use the same everywhere")
    if rank():
        return
    (out / "run.json").write_text(json.dumps(description, indent=2) + "\n")
    log.touch()
    os.truncate(log, min(size, log.stat().st_size))
    if state.step:
        print(f"\ncontinuing after step {state.step}")


def load_model(settings: Preset, args: argparse.Namespace) -> LLaST:
    """A new model, on the GPU if there is one. Also prints its parameter counts."""
    torch.manual_seed(args.seed)
    device, dtype, reason = pick_device(args.dtype)
    print(f"{short(settings.encoder)}, {short(settings.llm)}, {short(settings.data)}; {reason}")
    with explain_out_of_memory("while loading the models", ADVICE_MODELS):
        if args.shard:  # None and cpu: the weights stay in the file until they are divided
            model = LLaST.fresh(model_config(settings), None, "cpu")
            shard_base(model, device, dtype)
        else:
            model = LLaST.fresh(model_config(settings), dtype, device)
    model.speech_encoder.recompute = settings.recompute == "all"
    model.llm.recompute = settings.recompute != "none"
    if args.compile:
        model.compile_layers()
    print(f"the tokenizer is {short(model.tokenizer.file)}")
    print_parts(model)
    return model


def print_parts(model: LLaST):
    """Print the number of trained and frozen parameters of each part."""
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


def make_batches(model: LLaST, rows: list[Row], settings: Preset, seed: int = 0) -> Batches:
    """The batches of `rows` with the settings of this run."""
    return Batches(rows, settings.asr, model.tokenizer, settings.template, settings.batch, seed)


class Report:
    """What the command does after each step and each epoch of train_epochs.

    After a step: the progress bar and a line in log.jsonl. After an epoch: save the model and
    print dev scores.
    """

    def __init__(self, state: TrainState, description: dict, model, dev: Batches, settings, out):
        self.state, self.description, self.model, self.dev = state, description, model, dev
        self.settings, self.out, self.saved_step, self.log_works = settings, out, state.step, True
        self.start_time = self.step_start = self.save_time = time.perf_counter()
        # disable=None: no progress bar if stderr is not a terminal
        self.bar = tqdm(initial=state.step, unit="step", leave=False, disable=None)

    def after_step(self, step: Step):
        paths = sum(gather([str(e.row.path) for batch in step.batches for e in batch.examples]), [])
        now = time.perf_counter()
        rate, self.step_start = len(paths) / (now - self.step_start), now
        self.bar.total = step.n_steps
        self.bar.update()
        self.bar.set_postfix_str(f"loss {step.loss:.3f}, lr {step.lr:.1e}, {rate:.1f} clips/s")
        line = {"step": step.number, "epoch": step.epoch}
        if step.is_finite:
            line |= {"loss": round(step.loss, 5), "lr": step.lr}
            line["grad_norm"] = round(step.grad_norm, 4)
        else:
            line["skipped"] = paths
            problem = f"its loss is {step.loss:.4g}, its gradient norm is {step.grad_norm:.4g}"
            tqdm.write(f"step {step.number} is skipped: {problem}; check {', '.join(paths)}")
        line |= {"seconds": round(now - self.start_time, 2)}
        self.log(line | {"clips": len(paths), "clips_per_second": round(rate, 1)})
        if now - self.save_time >= 60 * self.settings.save_minutes:
            self.save_state()

    @on_rank_0
    def save_state(self):
        """Save the state, unless the state of this step is already saved.

        A second save would keep the line that after_epoch has written to the log since then. A run
        that continues would write this line again.
        """
        if self.state.step != self.saved_step:
            size = (self.out / "log.jsonl").stat().st_size
            self.state.save(self.out / STATE, self.description | {"log_size": size})
            self.save_time, self.saved_step = time.perf_counter(), self.state.step

    @on_rank_0
    def save(self):
        """Save the state, then the model. As long as there is a state, the run is not finished."""
        self.save_state()
        self.model.save_pretrained(self.out)

    def after_epoch(self, epoch: int):
        self.save()
        with explain_out_of_memory("on the dev clips", ADVICE_TRAINING):
            scores = dev_scores(self.model, self.dev)
            self.log({"step": self.state.step, "epoch": epoch} | scores)
            text = ", ".join(f"{name.replace('_', ' ')} {n}" for name, n in scores.items())
            tqdm.write(f"epoch {epoch} of {self.settings.epochs}: {text} (one beam)")
            print_samples(self.model, self.dev.rows)
        self.step_start = time.perf_counter()  # the next step did not begin before

    @on_rank_0
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
    if not isinstance(model, FSDPModule):
        merge_lora(model)  # From here on the model only translates, and merged weights are faster.
    options = dict(search=search, translator=translate_share)
    with explain_out_of_memory("on a dev or test clip", ADVICE_MODELS):
        dev = by_direction(splits["dev"]).values()
        lowest = min(score_rows(model, rows, **options)["low_score"] for rows in dev)
        model.config = replace(model.config, max_loss=-lowest)
        on_rank_0(model.save_pretrained)(out)
        for direction, group in by_direction(splits["test"]).items():
            tsv = out / f"test.{direction}.tsv" if rank() == 0 else None
            results[direction] = score_rows(model, group, tsv, progress=True, **options)
            print(f"test {describe(direction, results[direction])}")
    results["seconds"] = seconds = round(time.time() - start_time, 1)
    if rank() == 0:
        (out / "results.json").write_text(json.dumps(results, indent=2) + "\n")
        for name in ("llast.safetensors", "llast.json", "results.json", "."):
            wait_for_disk(out / name)
        (out / STATE).unlink()  # from now on, the run is finished
    print(f"\nThis took {seconds:.0f} s. The model and its scores are in {short(out)}. Try:")
    # The example is a clip of the last direction.
    print(f"    python translate.py --model {short(out)} --lang {direction} {short(group[0].path)}")


def main() -> int:
    # Print an escape such as \u4e2d for a character that the terminal cannot show. stderr does so
    # by default.
    sys.stdout.reconfigure(errors="backslashreplace")
    args = build_parser().parse_args()
    try:
        with join_ranks():
            return run(args)
    except KeyboardInterrupt as stop:
        number = STOP.received or signal.SIGINT
        if rank() == 0:
            print(f"\nstopped by {signal.Signals(number).name}. {stop}", file=sys.stderr)
        return 128 + number
    except (ValueError, OSError, SafetensorError, torch.OutOfMemoryError) as error:
        tqdm.write(f"train.py: {error}", file=sys.stderr)  # a progress bar may be on this line
        return 2


if __name__ == "__main__":
    sys.exit(main())
