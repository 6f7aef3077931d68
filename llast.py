"""LLaST: speech goes through Whisper's encoder and an adaptor, and becomes words of an LLM.

    waveform -> encoder (+ LoRA) -> states (S, Da) -> projector -> (S, D) -> spliced into the prompt
             -> Llama (+ LoRA) -> the answer's tokens

Paper: LLaST (2407.15415). Reference: its xtuner code, model/llast.py, for the adaptor's layers,
its names, and the place of the speech: in the user's turn, before the instruction.

Sizes, everywhere: B batch, N samples (16 kHz), M mel bins, S audio positions after the encoder
(50 a second), T text tokens, P positions the LLM sees, Da encoder width, D LLM width, H query
heads, Hk key/value heads, Dh head width, V vocabulary, R LoRA rank, W beam width.
"""

import hashlib
import json
import os
import shutil
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import lru_cache
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from data import AUDIO_ID, IGNORE, Batch, end_id
from llama import (
    Llama,
    Tokenizer,
    must_match,
    stored_tensors,
    weight_files,
)
from lora import add_lora, lora_layers
from whisper_encoder import WhisperEncoder, clip_to_mel, n_states

# Every linear layer of both bases except the LLM's head, as the original's
# find_all_linear_names has it.
ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LLM_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pick_device() -> tuple[torch.device, torch.dtype, str]:
    """The one place that chooses where and in what precision to compute, and says why."""
    if torch.cuda.is_available() and torch.cuda.is_bf16_supported():
        name = torch.cuda.get_device_name()
        return torch.device("cuda"), torch.bfloat16, f"{name}, frozen weights in bfloat16"
    if torch.cuda.is_available():
        name = torch.cuda.get_device_name()
        return torch.device("cuda"), torch.float32, f"{name}, float32 as it has no bfloat16"
    threads = torch.get_num_threads()
    reason = f"no CUDA device: CPU with {threads} thread{'s'[: threads > 1]}, float32"
    return torch.device("cpu"), torch.float32, reason


@contextmanager
def phase(what: str, less: str):
    """A lack of memory is told with the part of the work where it came, and what needs less."""
    try:
        yield
    except torch.OutOfMemoryError as error:
        raise torch.OutOfMemoryError(f"out of memory {what}; {less}: {error}") from error


@dataclass(frozen=True)
class LLaSTConfig:
    """What a LLaST is made of. Everything that training and use must agree on is here."""

    encoder: str  # a Whisper checkpoint: a folder, or one of OpenAI's files
    llm: str  # folder of a Llama checkpoint
    template: str  # key of data.TEMPLATES
    window: str  # "30s" or "clip": what the encoder is given, see whisper_encoder.clip_to_mel
    encoder_rank: int  # R of the LoRA in the encoder; 0 leaves the encoder as it is
    encoder_alpha: float
    llm_rank: int  # R of the LoRA in the LLM; 0 leaves the LLM as it is
    llm_alpha: float
    dropout: float  # inside both LoRAs
    directions: tuple[str, ...]  # what it was trained to translate, as "fr-en"


class Projector(nn.Module):
    """The adaptor: three linear layers, exact GELU between them. (..., Da) -> (..., D)"""

    def __init__(self, Da: int, D: int):
        super().__init__()
        # `model` is the original's name: its tensors are called projector.model.0.weight and so on.
        self.model = nn.Sequential(
            nn.Linear(Da, D), nn.GELU(), nn.Linear(D, D), nn.GELU(), nn.Linear(D, D)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.float())


class LLaST(nn.Module):
    """Two frozen bases, a LoRA in each, and the projector between them."""

    def __init__(
        self,
        config: LLaSTConfig,
        speech_encoder: WhisperEncoder,
        llm: Llama,
        tokenizer: Tokenizer | None,
    ):
        super().__init__()
        self.config, self.tokenizer = config, tokenizer
        self.speech_encoder, self.llm = speech_encoder, llm
        self.speech_encoder.requires_grad_(False)
        self.llm.requires_grad_(False)
        for base, targets, rank, alpha in (
            (self.speech_encoder, ENCODER_TARGETS, config.encoder_rank, config.encoder_alpha),
            (self.llm, LLM_TARGETS, config.llm_rank, config.llm_alpha),
        ):
            if rank:
                add_lora(base, targets, rank, alpha, config.dropout)
        Da, D = self.speech_encoder.config.d_model, self.llm.config.hidden_size
        self.projector = Projector(Da, D).to(llm.lm_head.weight.device)

    @classmethod
    def fresh(cls, config: LLaSTConfig, dtype: torch.dtype = torch.float32, device="cpu"):
        """Both bases as they were published, with a LoRA that changes nothing and a new projector.

        Each tensor goes to its device as it is read, so that no second copy of a base is held.
        """
        encoder = WhisperEncoder.from_pretrained(config.encoder, dtype, device)
        llm, tokenizer = Llama.from_pretrained(config.llm, dtype, device), Tokenizer(config.llm)
        if tokenizer.vocab_size > llm.config.vocab_size:
            raise ValueError(
                f"{config.llm}: the tokenizer has {tokenizer.vocab_size} tokens, the weights have "
                f"room for {llm.config.vocab_size}; they belong to different models"
            )
        end_id(config.template, tokenizer)  # a template that the tokenizer cannot write is refused
        return cls(config, encoder, llm, tokenizer)

    @property
    def device(self) -> torch.device:
        return self.llm.lm_head.weight.device

    def encode_speech(self, audio: list[Tensor]) -> list[Tensor]:
        """Waveforms (N,) of any lengths -> for each the LLM positions it is worth, (S, D)."""
        M = self.speech_encoder.config.num_mel_bins
        mels = [clip_to_mel(clip.to(self.device), M, self.config.window).T for clip in audio]
        lengths = torch.tensor([len(mel) // 2 for mel in mels], device=self.device)
        mel = pad_sequence(mels, batch_first=True).transpose(1, 2)  # (B, M, 2S)
        mel = mel.to(self.speech_encoder.conv1.weight.dtype)
        # Keep each clip's own states: not the silence of a 30 s window, not a neighbour's length.
        n_real = [n_states(len(clip)) for clip in audio]
        states = self.speech_encoder(mel, lengths, max(n_real))  # (B, n, Da)
        speech = self.projector(states).to(self.llm.lm_head.weight.dtype)
        return [clip[:n] for clip, n in zip(speech, n_real, strict=True)]

    def splice(self, ids: Tensor, speech: Tensor) -> Tensor:
        """The row the LLM sees: embedded ids (T,) with speech where AUDIO_ID stands. -> (P, D)"""
        words = self.llm.embed(ids.clamp(min=0))  # (T, D)
        at = (ids == AUDIO_ID).nonzero().item()
        return torch.cat([words[:at], speech, words[at + 1 :]])

    def forward(self, batch: Batch) -> Tensor:
        """The loss of every answer token of the batch, its end token included. -> (answer tokens,)

        Rows are padded on the right only, so positions count from 0 in each row, plain causal
        attention is enough, and a row's loss does not depend on the rows beside it.
        """
        rows, labels = [], []
        speech = self.encode_speech(batch.audio)
        for heard, ids, label, n in zip(
            speech, batch.ids, batch.labels, batch.lengths, strict=True
        ):
            ids, label = ids[:n].to(self.device), label[:n].to(self.device)
            rows.append(self.splice(ids, heard))
            # The answer stands at the end, so in front of it every position is ignored alike.
            labels.append(F.pad(label, (len(heard) - 1, 0), value=IGNORE))
        x = pad_sequence(rows, batch_first=True)  # (B, P, D)
        labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE)  # (B, P)

        following = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # position p predicts that at p + 1
        asked = torch.where(following != IGNORE)  # here alone work the last MLP and the head
        hidden = self.llm.hidden(x, asked=asked)[0]  # (answer tokens, D)
        logits = self.llm.logits(hidden)  # (answer tokens, V)
        return F.cross_entropy(logits.float(), following[asked], reduction="none")

    def compile_layers(self):
        """Compile each layer in place, for any shape: slow at first, then faster."""
        if self.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise ValueError("--compile on a CPU needs a C++ compiler, and there is no g++")
        # Training and use, one clip and many, with padding and without: each is compiled once.
        torch._dynamo.config.recompile_limit = 64
        for layer in (*self.speech_encoder.layers, *self.llm.model.layers):
            layer.compile(dynamic=True)

    def trained(self) -> dict[str, Tensor]:
        """The tensors that training changes: both LoRAs and the projector."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def fill_trained(self, tensors: dict[str, Tensor], where):
        """Take over trained tensors, exactly those that this model trains."""
        trained = self.trained()
        must_match(trained, tensors, where)
        for name, tensor in trained.items():
            tensor.copy_(tensors[name])

    def save_pretrained(self, folder):
        """Write what was trained (llast.safetensors) and on what (llast.json).

        Both are complete before either gets its name, so a broken save leaves the one before.
        """
        if any(layer.lora_A is None for layer in lora_layers(self)):
            raise ValueError("the LoRA was merged for good; what was trained is no longer there")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        bases = {"encoder": Path(self.config.encoder), "llm": Path(self.config.llm)}
        about = {
            "config": asdict(self.config)
            | {
                name: os.path.relpath(base.resolve(), folder.resolve())
                for name, base in bases.items()
            },
            "fingerprints": fingerprints_of(self.config),
            "versions": {"llast": 1, "torch": torch.__version__},
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.trained().items()}
        save_file(tensors, folder / "llast.safetensors.tmp")
        (folder / "llast.json.tmp").write_text(json.dumps(about, indent=2) + "\n")
        # safetensors lets nobody else read its files; they shall be as readable as any other.
        shutil.copymode(folder / "llast.json.tmp", folder / "llast.safetensors.tmp")
        for name in ("llast.safetensors", "llast.json"):
            os.replace(folder / f"{name}.tmp", folder / name)

    @classmethod
    def from_pretrained(cls, folder, encoder=None, llm=None, device="cpu", dtype=torch.float32):
        """Read what save_pretrained wrote; every tensor must fit and the bases must be the same.

        `encoder` and `llm` say where the bases are now, if they have moved.
        """
        folder = Path(folder)
        config, fingerprints = read_about(folder)
        moved = {name: str(path) for name, path in (("encoder", encoder), ("llm", llm)) if path}
        config = replace(config, **moved)
        check_bases(config, fingerprints, folder)
        model = cls.fresh(config, dtype, device)
        model.fill_trained(dict(stored_tensors(folder / "llast.safetensors")), folder)
        return model.eval()


def read_about(folder: Path) -> tuple[LLaSTConfig, dict[str, str]]:
    """llast.json: the configuration, its folders made whole, and the bases' fingerprints."""
    for name in ("llast.json", "llast.safetensors"):
        if not (folder / name).is_file():
            raise FileNotFoundError(f"{folder} is no saved LLaST: it has no {name}")
    try:
        about = json.loads((folder / "llast.json").read_text())
        config = about["config"] | {"directions": tuple(about["config"]["directions"])}
        for name in ("encoder", "llm"):
            config[name] = os.path.normpath(folder.resolve() / config[name])
        return LLaSTConfig(**config), about["fingerprints"]
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder}/llast.json cannot be used: {error!r}") from error


def check_bases(config: LLaSTConfig, fingerprints: dict[str, str], where: Path):
    """Refuse a base that is not there, or that is another than `where` was trained on."""
    for name, wanted in fingerprints.items():
        base = Path(getattr(config, name))
        if not base.exists():
            raise FileNotFoundError(
                f"{where} was trained on the {name} in {base}, which is not there; "
                f"say where it is now with --{name} PATH"
            )
        found = fingerprint(base.resolve(), name)
        if found != wanted:
            raise ValueError(
                f"{where} was trained on another {name} than the one in {base}: "
                f"fingerprint {wanted[:12]}, found {found[:12]}"
            )


def fingerprints_of(config: LLaSTConfig) -> dict[str, str]:
    bases = {"encoder": config.encoder, "llm": config.llm}
    return {kind: fingerprint(Path(base).resolve(), kind) for kind, base in bases.items()}


@lru_cache
def fingerprint(base: Path, kind: str) -> str:
    """SHA-256 of what is read of a base: configuration, weights, of an LLM the tokenizer."""
    if base.is_file():
        files = [base]
    else:  # Hugging Face's files go before Meta's
        meta = not (base / "config.json").is_file() and list(base.glob("consolidated.*.pth"))
        about = ["params.json" if meta else "config.json"]
        if kind == "llm":
            about += ["tokenizer.model", "added_tokens.json"]
        files = meta or weight_files(base)
        files += [base / name for name in about if (base / name).is_file()]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode() if file != base else b"")
        with open(file, "rb") as stream:
            while block := stream.read(1 << 20):
                digest.update(block)
    return digest.hexdigest()
