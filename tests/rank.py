"""What each process of tests/test_ranks.py does."""

import json
import os
import shutil
import signal
import socket
import struct
import sys
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from unittest.mock import patch

import torch
from torch.distributed.tensor import DTensor

import data
import train
import whisper_encoder
from llast import LLaST
from translate import SearchOptions

BATCHES = 6  # in a step, of all ranks together
# With a large rank, the gradients are large compared with the headers of the messages.
WIDE = replace(train.PRESETS["tiny"], encoder_rank=64, llm_rank=64, accumulate=2)


def command(
    folder: Path, out: str, *flags, start=None, stop_at=0, die_at=0, lost=(), infinite=False
) -> int:
    """Run train.py with toy models in this process. Return its exit code.

    It continues a copy of the folder `start`. The clips `lost` cannot be read. After step `stop_at`
    the last rank gets SIGTERM, after step `die_at` it ends without a word. If `infinite` is True,
    the last rank has an infinite gradient in step 1.
    """
    if start and train.rank() == 0:
        shutil.copytree(folder / start, folder / out)
    train.gather(None)  # the other ranks wait for the copy
    flags = ["--data", folder / "corpus", "--out", folder / out, "--epochs", 1, *flags]
    flags += ["--encoder", folder / "whisper", "--llm", folder / "llama", "--batch", 200]
    flags += ["--accumulate", BATCHES // train.n_ranks()]
    after_step, short = train.Report.after_step, partial(SearchOptions, max_new_tokens=6)
    sum_gradients, is_last = train.sum_gradients, train.rank() == train.n_ranks() - 1
    steps = []

    def sum_changed_gradients(model):
        if infinite and is_last and not steps:
            next(model.projector.parameters()).grad.fill_(torch.inf)
        sum_gradients(model)

    def change_after_step(report, step):
        steps.append(step)
        after_step(report, step)
        if is_last:
            if step.number == stop_at:
                os.kill(os.getpid(), signal.SIGTERM)
            if step.number == die_at:
                os._exit(9)

    def load_audio(path):
        if path.name in lost:
            raise data.AudioError(path, "the disk lost it")
        return whisper_encoder.load_audio(path)

    with (
        patch.object(sys, "argv", ["train.py", *map(str, flags)]),
        patch.object(train, "SearchOptions", short),
        patch.object(train, "ONE_BEAM", short(beams=1)),
        patch.object(train, "print_samples", lambda *_: None),  # to save time
        patch.object(train, "join_ranks", nullcontext),  # they are already connected
        patch.object(data, "load_audio", load_audio),
        patch.object(train, "sum_gradients", sum_changed_gradients),
        patch.object(train.Report, "after_step", change_after_step),
    ):
        return train.main()


def sent_bytes() -> int:
    """Bytes that this process has sent on all its TCP connections. Only on Linux."""
    total = 0
    for name in Path("/proc/self/fd").iterdir():
        if name.is_socket():
            with socket.socket(fileno=os.dup(int(name.name))) as connection:
                if connection.proto == socket.IPPROTO_TCP:
                    info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 256)
                    sent, sent_again = struct.unpack_from("QQ", info, 200)  # see linux/tcp.h
                    total += sent - sent_again  # a busy machine repeats some packets
    return total


def count_sent_bytes(folder: Path, shard: bool) -> int:
    """Train a model with wide layers. Return the bytes that this rank sends in step 2."""
    train.STOP.catch()  # forget the signal of an earlier job
    bases = {"encoder": folder / "wide_whisper", "llm": folder / "wide_llama"}
    settings = replace(WIDE, **bases, batch=200, epochs=1)
    model = LLaST.fresh(train.model_config(settings))
    if shard:
        train.shard_base(model, torch.device("cpu"), torch.float32)
    with torch.inference_mode():  # a run can continue with the dev scores, and then train
        model(train.empty_batch())
    rows = data.read_corpus(folder / "corpus", "fr", "en")[0]["train"][:4]
    counts = [sent_bytes()]
    batches = train.make_batches(model, rows, settings)
    train.train_epochs(model, batches, settings, lambda step: counts.append(sent_bytes()))
    for name, p in model.named_parameters():  # each rank has only its part of the layers again
        assert isinstance(p, DTensor) == (shard and ".layers." in name and "lora_" not in name)
        if isinstance(p, DTensor):
            assert p.to_local().shape[0] * train.n_ranks() == p.shape[0]
    return counts[2] - counts[1]  # after the first pass, PyTorch collects one layer too much


def main(number: int, n: int, port: int, folder: Path, jobs: list):
    """Do the jobs as rank `number` of n, with the environment of torchrun.

    A job is [function, arguments, options]. Rank 0 writes what the functions return on all ranks.
    """
    os.environ |= {"RANK": str(number), "LOCAL_RANK": str(number), "WORLD_SIZE": str(n)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_RUN_ID": "x"}
    output = os.open(folder / f"output_{n}_{number}", os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    torch.set_num_threads(1)
    with train.join_ranks():
        done = []
        for name, arguments, options in jobs:
            done.append(train.gather(globals()[name](folder, *arguments, **options)))
            if number == 0:
                (folder / f"results_{n}.json").write_text(json.dumps(done))
