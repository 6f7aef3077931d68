"""Make the embedded encoder: a small Whisper encoder that has listened to the phrasebook.

    python tiny/make_encoder.py         needs espeak-ng, and what make_llm.py wrote

It plays the part of Whisper's encoder. It learns by CTC to write down what is said, in the pieces
of the LLM's vocabulary, at last by coming near the vectors that the LLM has for them; the layer
that wrote them is then thrown away. Voices and sentences of the embedded corpus's dev and test
parts are not in it.
"""

import argparse
import io
import json
import random
import sys
import time
from multiprocessing import Pool
from pathlib import Path

import numpy as np
import soundfile
import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from make_corpus import CORPUS, distinct, held_out_texts
from speak import make_room_for_inventions, recording, write_opus

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import group, read_corpus  # noqa: E402
from llama import Llama, Tokenizer  # noqa: E402
from tools.evaluate import edit_distance  # noqa: E402
from whisper_encoder import (  # noqa: E402
    WhisperConfig,
    WhisperEncoder,
    clip_to_mel,
    load_audio,
)

TINY = Path(__file__).parent
FOLDER, SPEECH = TINY / "whisper", TINY / "build"
SEED = 2
# Clips of each language by kind of voice: espeak-ng's own, or one invented for each clip.
CLIPS = {
    "pretrain": {"fr": 7000, "de": 7000, "es": 7000},
    "invented": {"fr": 9000, "de": 5000, "es": 5000},
}
CONFIG = {
    "architectures": ["WhisperModel"],
    "model_type": "whisper",
    "num_mel_bins": 80,
    "d_model": 192,
    "encoder_layers": 4,
    "encoder_attention_heads": 4,
    "encoder_ffn_dim": 768,
    "max_source_positions": 1500,
    "activation_function": "gelu",
    "scale_embedding": False,
    "torch_dtype": "float16",
}
BUDGET = 3200  # states in a batch
# Five legs: kind of voice, epochs, first and last learning rate, masks of SpecAugment, and whether
# a state writes a piece by coming near the LLM's vector of it, or through weights of the leg's own.
LEGS = (
    ("pretrain", 4, 2e-3, 4e-4, 2, False),
    ("pretrain", 4, 1.2e-3, 0.0, 1, False),
    ("invented", 8, 1.2e-3, 0.0, 1, False),
    ("invented", 3, 1e-3, 0.0, 1, True),
    ("invented", 3, 6e-4, 0.0, 1, True),
)
SHARPNESS = 20.0  # of the choice between near vectors
SETTLE = 200  # batches in which a layer finds the LLM's vectors before the encoder moves

Clip = tuple[Tensor, list[int]]  # log-mel (M, 2S) in half precision, and the pieces spoken


def listen(job) -> np.ndarray:
    """Speak one sentence, a quarter of the time through the corpus's codec. -> (M, 2S)

    No Tensor: each that comes from another process keeps a file open here.
    """
    text, language, voices, seed = job
    torch.set_num_threads(1)
    rng = random.Random(seed)
    audio, _ = recording(text, language, voices, rng)
    if rng.random() < 0.25:
        file = io.BytesIO()
        write_opus(file, audio)
        file.seek(0)
        audio = torch.from_numpy(soundfile.read(file, dtype="float32")[0])
    return clip_to_mel(audio, CONFIG["num_mel_bins"], "clip").half().numpy()


def make_speech(voices: str, language: str, file: Path):
    """CLIPS spoken, into a file, so that training can be repeated without espeak-ng."""
    seed, size = f"{SEED} {voices} {language}", CLIPS[voices][language]
    fresh = distinct(random.Random(seed), held_out_texts())
    texts = [next(fresh)[language] for _ in range(size)]
    jobs = [(text, language, voices, f"{seed} {i}") for i, text in enumerate(texts)]
    if voices == "invented":
        make_room_for_inventions()
    with Pool() as pool:
        mels = [torch.from_numpy(mel) for mel in pool.map(listen, jobs, chunksize=32)]
    torch.save((mels, texts), file.with_suffix(".part"))
    file.with_suffix(".part").replace(file)
    minutes = sum(mel.shape[1] for mel in mels) / 6000
    print(f"{voices} {language}: {size} clips, {minutes:.0f} minutes", flush=True)


def speech(voices: str, tokenizer: Tokenizer) -> list[Clip]:
    """All clips in these voices, made if they are not there."""
    SPEECH.mkdir(exist_ok=True)
    clips: list[Clip] = []
    for language in CLIPS[voices]:
        file = SPEECH / f"{voices}_{language}.pt"
        if not file.exists():
            make_speech(voices, language, file)
        mels, texts = torch.load(file, weights_only=True)
        clips += [(mel, tokenizer.encode(text)) for mel, text in zip(mels, texts, strict=True)]
    return clips


def dev_clips(language: str, tokenizer: Tokenizer) -> list[Clip]:
    """The corpus's dev part, to watch how well unseen voices and sentences are heard."""
    rows = read_corpus(CORPUS, language, "en")[0]["dev"]
    mels = [clip_to_mel(load_audio(row.path), CONFIG["num_mel_bins"], "clip") for row in rows]
    return [(mel, tokenizer.encode(row.sentence)) for mel, row in zip(mels, rows, strict=True)]


def pad(mels: list[Tensor]) -> tuple[Tensor, Tensor]:
    """-> (B, M, 2S), (B,) states of each clip"""
    batch = pad_sequence([mel.float().T for mel in mels], batch_first=True).transpose(1, 2)
    return batch, torch.tensor([mel.shape[1] // 2 for mel in mels])


def spec_augment(mel: Tensor, masks: int) -> Tensor:
    """Hide bands of pitch and moments, `masks` of each, in every clip (1904.08779). (B, M, 2S)"""
    B, M, frames = mel.shape
    for clip in mel:
        for _ in range(masks):
            low, wide = torch.randint(M - 12, ()), torch.randint(12, ())
            clip[low : low + wide] = 0
            start, long = torch.randint(max(1, frames - 15), ()), torch.randint(15, ())
            clip[:, start : start + long] = 0
    return mel


class NearWords(nn.Module):
    """Scores of all pieces and the blank: how near a state comes to the LLM's vectors of them.

    (B, S, Da) -> (B, S, V + 1). The encoder learns to let one linear map lead from its states
    to the LLM's words; the projector can then learn that once, and not for each piece anew.
    """

    def __init__(self, words: Tensor):
        super().__init__()
        V, D = words.shape
        self.register_buffer("words", F.normalize(words.float(), dim=1))
        self.place = nn.Linear(CONFIG["d_model"], D)
        self.blank = nn.Parameter(torch.randn(1, D))

    def forward(self, states: Tensor) -> Tensor:
        vectors = torch.cat([self.words, F.normalize(self.blank, dim=1)])
        return SHARPNESS * F.normalize(self.place(states), dim=-1) @ vectors.T


def ctc(head: nn.Module, states: Tensor, lengths: Tensor, batch: list[Clip], blank: int) -> Tensor:
    """The loss of writing down what was said, whenever it was said."""
    scores = head(states).log_softmax(-1).transpose(0, 1)
    pieces = [torch.tensor(pieces) for _, pieces in batch]
    n_pieces = torch.tensor([len(p) for p in pieces])
    return F.ctc_loss(scores, torch.cat(pieces), lengths, n_pieces, blank=blank, zero_infinity=True)


def settle(head: nn.Module, encoder: WhisperEncoder, batches: list[list[Clip]], blank: int):
    """Train the head alone, so that what it asks of the encoder is not noise."""
    optimizer = torch.optim.AdamW(head.parameters(), lr=1e-2, weight_decay=0.0)
    for i, batch in enumerate(batches):
        optimizer.param_groups[0]["lr"] = 1e-2 * (1 - i / len(batches))
        mel, lengths = pad([mel for mel, _ in batch])
        with torch.no_grad():
            states = encoder(mel, lengths)
        ctc(head, states, lengths, batch, blank).backward()
        optimizer.step()
        optimizer.zero_grad()


@torch.no_grad()
def error_rate(encoder: WhisperEncoder, head: nn.Module, clips: list[Clip], blank: int) -> float:
    """Wrong, missing and extra pieces of the best path, as a share of the pieces spoken."""
    wrong = total = 0
    mel, lengths = pad([mel for mel, _ in clips])
    best = head(encoder(mel, lengths)).argmax(-1)
    for path, n, (_, said) in zip(best, lengths, clips, strict=True):
        heard = [i for i in torch.unique_consecutive(path[:n]).tolist() if i != blank]
        wrong, total = wrong + edit_distance(heard, said), total + len(said)
    return wrong / total


def save(encoder: WhisperEncoder):
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    weights = encoder.state_dict().items()
    weights = {f"model.encoder.{name}": tensor.half().contiguous() for name, tensor in weights}
    save_file(weights, FOLDER / "model.safetensors", metadata={"format": "pt"})


def new_encoder() -> WhisperEncoder:
    """Fresh weights, with Whisper's table of sinusoids for positions."""
    config = {name: CONFIG[name] for name in WhisperConfig.__dataclass_fields__}
    encoder = WhisperEncoder(WhisperConfig(**config))
    half = CONFIG["d_model"] // 2
    step = torch.exp(-torch.arange(half) * torch.log(torch.tensor(1e4)) / (half - 1))
    angle = torch.arange(CONFIG["max_source_positions"])[:, None] * step
    encoder.embed_positions.weight.data = torch.cat([angle.sin(), angle.cos()], dim=1)
    encoder.embed_positions.weight.requires_grad = False
    return encoder


def train_leg(leg: int, encoder: WhisperEncoder, tokenizer: Tokenizer, dev: dict[str, list[Clip]]):
    """A leg of training, with a fresh layer on top that writes pieces down or a blank."""
    voices, epochs, first_lr, last_lr, masks, near_words = LEGS[leg]
    clips, blank = speech(voices, tokenizer), tokenizer.n_pieces

    def size_of(clip: Clip) -> int:
        return clip[0].shape[1] // 2

    if near_words:
        head = NearWords(Llama.from_pretrained(TINY / "llama").model.embed_tokens.weight.detach())
        settle(head, encoder, group(clips, size_of, BUDGET, SEED, epochs)[:SETTLE], blank)
    else:
        head = nn.Linear(CONFIG["d_model"], blank + 1)
    steps = epochs * len(group(clips, size_of, BUDGET, SEED, 0))
    fall = 1 - last_lr / first_lr
    weights = [p for p in (*encoder.parameters(), *head.parameters()) if p.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=first_lr, betas=(0.9, 0.98), weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda i: min((i + 1) / 300, max(0.01, 1 - fall * i / steps))
    )
    start = time.time()
    for epoch in range(epochs):
        encoder.train()
        random.Random(f"{SEED} {leg} {epoch}").shuffle(clips)
        losses = []
        for batch in group(clips, size_of, BUDGET, SEED, epoch):
            mel, lengths = pad([mel for mel, _ in batch])
            states = encoder(spec_augment(mel, masks), lengths)
            loss = ctc(head, states, lengths, batch, blank)
            loss.backward()
            nn.utils.clip_grad_norm_(weights, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            schedule.step()
            losses.append(loss.item())
            if len(losses) % 100 == 0:
                mean, seconds = sum(losses[-100:]) / 100, time.time() - start
                print(f"leg {leg} epoch {epoch} step {len(losses)} of {steps // epochs} "
                      f"loss {mean:.3f} seconds {seconds:.0f}", flush=True)  # fmt: skip
        encoder.eval()
        errors = {name: round(error_rate(encoder, head, dev[name], blank), 3) for name in dev}
        print(
            f"leg {leg} epoch {epoch}: wrong pieces on unseen voices and sentences {errors}",
            flush=True,
        )
        save(encoder)


def main():
    torch.manual_seed(SEED)
    tokenizer = Tokenizer(TINY / "llama")
    dev = {language: dev_clips(language, tokenizer) for language in CLIPS["pretrain"]}
    encoder = new_encoder()
    for leg in range(len(LEGS)):
        train_leg(leg, encoder, tokenizer, dev)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # -h starts nothing
    main()
