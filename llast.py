"""LLaST: speech goes through Whisper's encoder and an adaptor, and becomes words of an LLM.

    waveform -> encoder (+ LoRA) -> states (S, Da) -> projector -> (S, D) -> spliced into the prompt
             -> Llama (+ LoRA) -> the tokens of the answer

One training row: the speech replaces one id, so the row has P = S + T - 1 positions. The label of a
position is the token that the LLM has to predict there: the token of the next position. Only the
answer has labels; a dot is a position without one.

    row     <s>  [INST]  s1  s2  ...  sS  Please  ...  [/INST]  Where  is  it  ?     </s>
    label    .     .     .   .   ...  .     .     ...   Where   is     it  ?   </s>   .

Paper: LLaST (2407.15415). Reference: its xtuner code, model/llast.py, for the layers and names of
the adaptor, and for the place of the speech: in the turn of the user, before the instruction.

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
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from data import IGNORE, TEMPLATES, Batch, prompt_ids
from llama import TOKENIZER_FILES, Llama, Tokenizer, check_fields
from lora import add_lora, lora_layers
from whisper_encoder import (
    WhisperEncoder,
    clip_to_mel,
    must_match,
    n_states,
    read_json,
    read_tensors,
    weight_files,
)

FORMAT = 2  # number of the format of llast.json and llast.safetensors
BASES = ("encoder", "llm")  # the base models, by their names in LLaSTConfig

# Every linear layer of both base models except the head of the LLM, as find_all_linear_names of the
# original does.
ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LLM_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pick_device() -> tuple[torch.device, torch.dtype, str]:
    """The device, the precision of the frozen weights, and a sentence that explains the choice."""
    threads = torch.get_num_threads()
    reason = f"no CUDA device: CPU with {threads} thread{'s'[: threads > 1]}, float32"
    if not torch.cuda.is_available():
        return torch.device("cpu"), torch.float32, reason
    name = torch.cuda.get_device_name()
    if torch.cuda.is_bf16_supported():
        return torch.device("cuda"), torch.bfloat16, f"{name}, frozen weights in bfloat16"
    return torch.device("cuda"), torch.float32, f"{name}, float32 because it has no bfloat16"


@contextmanager
def explain_out_of_memory(during: str, advice: str):
    """Add to an out-of-memory error what was running and which options need less memory.

    The allocator of the CPU raises a RuntimeError; it becomes the same error as on a GPU.
    """
    try:
        yield
    except RuntimeError as error:
        on_cpu = any(
            words in str(error) for words in ("can't allocate memory", "not enough memory")
        )
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise torch.OutOfMemoryError(f"out of memory {during}; {advice}: {error}") from error


@dataclass(frozen=True)
class LLaSTConfig:
    """What a LLaST is made of: everything that must be the same in training and in use."""

    encoder: str  # folder of a Whisper checkpoint
    llm: str  # folder of a Llama checkpoint
    template: str  # key of data.TEMPLATES
    window: str  # "30s" or "clip": how a clip is padded, see whisper_encoder.clip_to_mel
    encoder_rank: int  # R of the LoRA in the encoder; 0 means no LoRA there
    encoder_alpha: float
    llm_rank: int  # R of the LoRA in the LLM; 0 means no LoRA there
    llm_alpha: float
    dropout: float  # of both LoRAs
    directions: tuple[str, ...]  # what it was trained to translate, such as "fr-en"
    tasks: tuple[str, ...] = ("st", "asr")  # what it was trained on: translation, transcription


class Projector(nn.Module):
    """The adaptor: three linear layers with exact GELU between them. (..., Da) -> (..., D)

    Its weights are float32 on every device. It is trained, and a step of the optimizer is often too
    small to change a number in half precision.
    """

    def __init__(self, Da: int, D: int):
        super().__init__()
        # `model` is the name in the original: its tensors are projector.model.0.weight and so on.
        self.model = nn.Sequential(
            nn.Linear(Da, D), nn.GELU(), nn.Linear(D, D), nn.GELU(), nn.Linear(D, D)
        )

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x.float())


class LLaST(nn.Module):
    """Two frozen base models, a LoRA in each, and the projector between them."""

    def __init__(
        self,
        config: LLaSTConfig,
        speech_encoder: WhisperEncoder,
        llm: Llama,
        tokenizer: Tokenizer | None,
        fingerprints: dict[str, str] | None = None,
    ):
        super().__init__()
        self.config, self.tokenizer, self.fingerprints = config, tokenizer, fingerprints
        self.speech_encoder = speech_encoder.requires_grad_(False)
        self.llm = llm.requires_grad_(False)
        # Before the LoRAs: they draw more random numbers for a higher rank, and runs with the same
        # seed should start from the same projector.
        Da, D = speech_encoder.config.d_model, llm.config.hidden_size
        self.projector = Projector(Da, D).to(llm.lm_head.weight.device)
        for base, targets, rank, alpha in (
            (speech_encoder, ENCODER_TARGETS, config.encoder_rank, config.encoder_alpha),
            (llm, LLM_TARGETS, config.llm_rank, config.llm_alpha),
        ):
            if rank:
                add_lora(base, targets, rank, alpha, config.dropout)

    @classmethod
    def fresh(cls, config, dtype=torch.float32, device="cpu", fingerprints=None) -> "LLaST":
        """Both published base models, LoRAs that change nothing, and an untrained projector.

        The fingerprints of the base models are taken before they are loaded, unless the caller has
        just taken them. So a base that changes during training is not recorded as the one used.
        """
        fingerprints = fingerprints or fingerprints_of(config)
        encoder = WhisperEncoder.from_pretrained(config.encoder, dtype, device)
        llm, tokenizer = Llama.from_pretrained(config.llm, dtype, device), Tokenizer(config.llm)
        # Tokens that no template uses do not matter: some folders name one beyond the weights.
        ids = [*prompt_ids(list(TEMPLATES[config.template]), tokenizer), *tokenizer.eos_ids]
        size = 1 + max(tokenizer.n_pieces - 1, *ids)
        if size > llm.config.vocab_size:
            raise ValueError(
                f"{config.llm}: the tokenizer has {size} tokens, but the weights have only "
                f"{llm.config.vocab_size}; use the tokenizer of this model"
            )
        return cls(config, encoder, llm, tokenizer, fingerprints)

    @property
    def device(self) -> torch.device:
        return self.llm.lm_head.weight.device

    def encode_speech(self, audio: list[Tensor]) -> list[Tensor]:
        """List of waveforms (N,) -> list of speech embeddings (S, D), one per clip."""
        M = self.speech_encoder.config.num_mel_bins
        mels = [clip_to_mel(clip.to(self.device), M, self.config.window).T for clip in audio]
        lengths = torch.tensor([len(mel) // 2 for mel in mels], device=self.device)
        mel = pad_sequence(mels, batch_first=True).transpose(1, 2)  # (B, M, 2S)
        mel = mel.to(self.speech_encoder.conv1.weight.dtype)
        # Keep only the states of the clip itself, not of the silence that fills a 30 s window.
        n_real = [n_states(len(clip)) for clip in audio]
        states = self.speech_encoder(mel, lengths, max(n_real))  # (B, n, Da)
        speech = self.projector(states).to(self.llm.lm_head.weight.dtype)
        return [embeddings[:n] for embeddings, n in zip(speech, n_real, strict=True)]

    def splice(self, ids: Tensor, speech: Tensor, at: int) -> Tensor:
        """Embeddings of ids (T,), with speech (S, D) in place of the id at index `at`. -> (P, D)

        `at` is the index of AUDIO_ID. It is an argument because a search for it in `ids` would make
        the CPU wait for the GPU, once for each row.
        """
        words = self.llm.embed(ids.clamp(min=0))  # (T, D)
        return torch.cat([words[:at], speech, words[at + 1 :]])

    def forward(self, batch: Batch) -> Tensor:
        """The loss of every answer token, its end token included, row by row. -> (answer tokens,)

        The row of each loss is (batch.labels != IGNORE).nonzero()[:, 0].

        Rows are padded on the right. So the speech and the words of a row have the same positions
        in every batch, and causal attention needs no mask: no token can see the padding behind it.
        The loss of a row does not depend on the other rows.
        """
        rows, labels = [], []
        speech = self.encode_speech(batch.audio)
        parts = zip(speech, batch.ids, batch.labels, batch.lengths, batch.audio_at, strict=True)
        for embeddings, ids, label, n, at in parts:
            rows.append(self.splice(ids[:n].to(self.device), embeddings, at))
            # The speech makes the row S - 1 longer, in front of the answer, where no label is.
            labels.append(F.pad(label[:n].to(self.device), (len(embeddings) - 1, 0), value=IGNORE))
        x = pad_sequence(rows, batch_first=True)  # (B, P, D)
        labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE)  # (B, P)

        # The state at position p predicts the token at p + 1. So shift the labels to the left: the
        # last position of the prompt gets the first token of the answer.
        next_tokens = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # (B, P)
        # The last MLP and the head are computed only at positions that have a label.
        selection = torch.where(next_tokens != IGNORE)
        hidden = self.llm.hidden(x, selection=selection)[0]  # (answer tokens, D)
        logits = self.llm.logits(hidden)  # (answer tokens, V)
        return F.cross_entropy(logits.float(), next_tokens[selection], reduction="none")

    def compile_layers(self):
        """Compile each layer in place, for any shape: slow at first, then faster."""
        if self.device.type == "cpu" and not shutil.which(os.environ.get("CXX", "g++")):
            raise ValueError("--compile on a CPU needs a C++ compiler, and g++ was not found")
        # A layer is compiled again for training, for use, for one clip, for a mask, and so on.
        torch._dynamo.config.recompile_limit = 64
        for layer in (*self.speech_encoder.layers, *self.llm.model.layers):
            layer.compile(dynamic=True)

    def trained(self) -> dict[str, Tensor]:
        """The tensors that training changes: both LoRAs and the projector."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def fill_trained(self, tensors: dict[str, Tensor], source):
        """Copy trained tensors into the model. Names and shapes must be exactly those it trains."""
        trained = self.trained()
        must_match(trained, tensors, source)
        for name, tensor in trained.items():
            tensor.copy_(tensors[name])

    def save_pretrained(self, folder):
        """Write the trained tensors (llast.safetensors) and their description (llast.json).

        Each file is complete before it gets its name. A process that is killed between the two
        renames leaves new tensors with the old description. Within one training run the
        description does not change, so that is a whole model. Otherwise loading is an error.
        """
        if any(layer.lora_A is None for layer in lora_layers(self)):
            raise ValueError("this LoRA was merged for good, so there is nothing to save")
        if not self.fingerprints:
            raise ValueError(
                "the base models have no fingerprints; build the model with LLaST.fresh"
            )
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = asdict(self.config)
        for base in BASES:  # relative, so that all folders can move together
            config[base] = os.path.relpath(Path(config[base]).resolve(), folder.resolve())
        description = {
            "config": config,
            "fingerprints": self.fingerprints,
            "versions": {"llast": FORMAT, "torch": torch.__version__},
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.trained().items()}
        digests = digests_of(description, tensors)
        save_file(tensors, folder / "llast.safetensors.tmp", digests)
        (folder / "llast.json.tmp").write_text(json.dumps(description, indent=2) + "\n")
        # safetensors makes files that only the owner can read. Give them normal permissions.
        shutil.copymode(folder / "llast.json.tmp", folder / "llast.safetensors.tmp")
        for name in ("llast.safetensors", "llast.json"):
            os.replace(folder / f"{name}.tmp", folder / name)

    @classmethod
    def from_pretrained(cls, folder, encoder=None, llm=None, device="cpu", dtype=torch.float32):
        """Read a folder of save_pretrained. An error if anything in it or in a base has changed.

        `encoder` and `llm` are the folders of the base models if these have moved.
        """
        folder = Path(folder)
        config, fingerprints, tensors = read_saved(folder)
        moved = {name: str(path) for name, path in (("encoder", encoder), ("llm", llm)) if path}
        config = replace(config, **moved)
        check_bases(config, fingerprints, folder)
        model = cls.fresh(config, dtype, device, fingerprints)
        model.fill_trained(tensors, folder)
        return model.eval()


def read_saved(folder: Path) -> tuple[LLaSTConfig, dict[str, str], dict[str, Tensor]]:
    """Configuration, fingerprints of the base models, and trained tensors of a saved model."""
    text, weights = folder / "llast.json", folder / "llast.safetensors"
    for file in (text, weights):
        if not file.is_file():
            raise FileNotFoundError(f"{folder} is not a saved LLaST: it has no {file.name}")
    description = read_json(text)
    needed = {"versions": ("llast",), "config": BASES, "fingerprints": BASES}
    for name, keys in needed.items():
        part = description.get(name)
        if not isinstance(part, dict) or not part.keys() >= set(keys):
            raise ValueError(f"{text}: {name} must have {keys}, found {part!r:.60}")
    if description["versions"]["llast"] != FORMAT:
        raise ValueError(
            f"{text} has format {description['versions']['llast']!r:.40}, but this program reads "
            f"only {FORMAT}; train again, or use the version of the program that wrote it"
        )
    tensors = read_tensors(weights)
    with safe_open(weights, "pt") as stored:
        saved = stored.metadata() or {}
    digests = digests_of(description, tensors)
    if changed := [name for name, digest in digests.items() if saved.get(name) != digest]:
        raise ValueError(
            f"{folder}: {' and '.join(changed)} changed after the model was saved, or are of two "
            f"different models; copy both files again, or train again"
        )
    # JSON has no tuples: it has lists in their place.
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in description["config"].items()}
    config = check_fields(LLaSTConfig, values, text, lowest=0)
    bases = {k: os.path.normpath(folder.resolve() / values[k]) for k in BASES}
    return replace(config, **bases), description["fingerprints"], tensors


def digests_of(description: dict, tensors: dict[str, Tensor]) -> dict[str, str]:
    """SHA-256 of what llast.json describes, and of the tensors of llast.safetensors."""
    text = json.dumps([description["config"], description["fingerprints"]], sort_keys=True)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy())
    described = hashlib.sha256(text.encode()).hexdigest()
    return {"llast.json": described, "llast.safetensors": digest.hexdigest()}


def check_bases(config: LLaSTConfig, fingerprints: dict[str, str], source):
    """Raise an error if a base model is missing, or is not the one that `source` was trained on."""
    for name, expected in fingerprints.items():
        base = Path(getattr(config, name))
        if not base.exists():
            raise FileNotFoundError(
                f"{source} was trained on the {name} in {base}, which does not exist; "
                f"give its folder with --{name} PATH"
            )
        actual = fingerprint(base, name)
        if actual != expected:
            raise ValueError(
                f"{source} was trained on another {name} than the one in {base}: fingerprint "
                f"{expected:.12}, found {actual:.12}; give the right folder with --{name} PATH"
            )


def fingerprints_of(config: LLaSTConfig) -> dict[str, str]:
    """The fingerprint of each base model."""
    return {name: fingerprint(Path(getattr(config, name)), name) for name in BASES}


def fingerprint(base: Path, name: str) -> str:
    """SHA-256 of the files that are read of a base model: weights, configuration, tokenizer."""
    others = ["config.json", *(TOKENIZER_FILES if name == "llm" else ())]
    files = weight_files(base) + [base / other for other in others if (base / other).is_file()]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode())
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
