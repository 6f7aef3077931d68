"""LLaST: Whisper's encoder and an adaptor turn speech into embeddings for the prompt of an LLM.

    waveform -> encoder (+ LoRA) -> states (S, Da) -> projector -> speech embeddings (S, D)
             -> inserted into the prompt -> Llama (+ LoRA) -> the tokens of the answer

The base models stay frozen: they keep what they know, and only the small trained parts need memory
for gradients and the optimizer. The projector maps encoder states to the space of the LLM's token
embeddings. The LoRAs change both base models a little, to fit this task.

One training row of T ids. S speech embeddings s1 ... sS replace the one id AUDIO_ID, so the row has
P = S + T - 1 positions. "-" is IGNORE:

    row          <s>  [INST]  s1  s2  ...  sS  Please  ...  [/INST]  Where  is  it  ?     </s>
    labels       -    -       -   -   ...  -   -       ...  -        Where  is  it  ?     </s>
    next_tokens  -    -       -   -   ...  -   -       ...  Where    is     it  ?   </s>  -

`labels` has each token at its own position, as in data.py. `next_tokens` has for each position the
token that the LLM must predict there, which is the label of the next position. The loss uses
next_tokens. In training, the right answer is part of the input ("teacher forcing"). This does not
show the solution: a position sees only itself and earlier positions, never its next token.

Paper: LLaST (2407.15415). The layers and names of the adaptor, and the place of the speech (in the
turn of the user, before the instruction), are those of the original code: its file model/llast.py,
written for the library xtuner.

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
from llama import Llama, Tokenizer, check_fields, tokenizer_files
from lora import add_lora, lora_layers
from whisper_encoder import (
    WhisperEncoder,
    check_tensors,
    clip_to_mel,
    n_states,
    read_json,
    read_tensors,
    weight_files,
)

FORMAT = 3  # version of the format of llast.json and llast.safetensors
BASE_FIELDS = ("encoder", "llm")  # the fields of LLaSTConfig that name a base model

# LoRA changes every linear layer of both base models except the head of the LLM. The original
# trains the same layers.
ENCODER_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2")
LLM_TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


def pick_device(dtype: str | None = None) -> tuple[torch.device, torch.dtype, str]:
    """Return the device, the precision of the frozen weights, and a sentence about both.

    `dtype` is "float32", "bfloat16" or None. None means bfloat16 on a GPU that has it, and float32
    elsewhere.
    """
    on_gpu = torch.cuda.is_available()
    cpu = f"no CUDA device: CPU (threads: {torch.get_num_threads()})"
    name = torch.cuda.get_device_name() if on_gpu else cpu
    dtype = dtype or ("bfloat16" if on_gpu and torch.cuda.is_bf16_supported() else "float32")
    reason = f"{name}, frozen weights in {dtype}"
    return torch.device("cuda" if on_gpu else "cpu"), getattr(torch, dtype), reason


@contextmanager
def explain_out_of_memory(during: str, advice: str):
    """Add to an out-of-memory error what was running and which options need less memory.

    On a CPU, PyTorch raises RuntimeError instead of torch.OutOfMemoryError. It is converted.
    """
    cpu_messages = ("can't allocate memory", "not enough memory")
    try:
        yield
    except RuntimeError as error:
        on_cpu = any(message in str(error) for message in cpu_messages)
        if not on_cpu and not isinstance(error, torch.OutOfMemoryError):
            raise
        raise torch.OutOfMemoryError(f"out of memory {during}; {advice}: {error}") from error


@dataclass(frozen=True)
class LLaSTConfig:
    """The settings that are saved with a model.

    The trained weights fit only the same base models, template, window, ranks and alphas.
    """

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
    # What it was trained on. st: speech translation. asr: automatic speech recognition, that is, to
    # write the words in the spoken language.
    tasks: tuple[str, ...] = ("st", "asr")
    # The score of an answer is minus the mean loss of its tokens. An answer with a larger loss than
    # this one is unlikely to be right. train.py measures the limit at the end.
    max_loss: float = 100.0


class Projector(nn.Module):
    """The adaptor: three linear layers with GELU between them. (..., Da) -> (..., D)

    GELU is the exact function, not its tanh approximation. The weights are float32 on every device,
    for the same reason as A and B in lora.py.
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
    """Two frozen base models, a LoRA in each, and the projector between them.

    `fingerprints` has the SHA-256 of the files of each base model: see the function `fingerprint`.
    """

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
        # Create the projector before the LoRAs. A LoRA of higher rank uses more random values, and
        # for one seed the projector should start the same for every rank.
        Da, D = speech_encoder.config.d_model, llm.config.hidden_size
        self.projector = Projector(Da, D).to(llm.lm_head.weight.device)
        if config.encoder_rank:
            rank, alpha = config.encoder_rank, config.encoder_alpha
            add_lora(speech_encoder, ENCODER_TARGETS, rank, alpha, config.dropout)
        if config.llm_rank:
            add_lora(llm, LLM_TARGETS, config.llm_rank, config.llm_alpha, config.dropout)

    @classmethod
    def fresh(cls, config, dtype=torch.float32, device="cpu", fingerprints=None) -> "LLaST":
        """Return a new model: pretrained base models, LoRAs that change nothing, random projector.

        The fingerprints are computed before the base models are loaded, or given by the caller. If
        a file of a base model changes during training, the saved fingerprints still describe the
        files that were used.
        """
        fingerprints = fingerprints or fingerprints_of(config)
        encoder = WhisperEncoder.from_pretrained(config.encoder, dtype, device)
        llm, tokenizer = Llama.from_pretrained(config.llm, dtype, device), Tokenizer(config.llm)
        # Of the special tokens, check only those that this template needs. Some folders list other
        # tokens, with ids that are too large for the vocabulary of the weights.
        ids = [*prompt_ids(list(TEMPLATES[config.template]), tokenizer), *tokenizer.eos_ids]
        largest_id = max(tokenizer.n_pieces - 1, *ids)
        if largest_id >= llm.config.vocab_size:
            raise ValueError(
                f"{config.llm}: the tokenizer has a token with id {largest_id}, but the weights "
                f"have only {llm.config.vocab_size} tokens; use the tokenizer of this model"
            )
        return cls(config, encoder, llm, tokenizer, fingerprints)

    @property
    def device(self) -> torch.device:
        return self.llm.lm_head.weight.device

    def encode_speech(self, audio: list[Tensor]) -> list[Tensor]:
        """List of waveforms (N,) -> list of speech embeddings (S, D), one per clip."""
        M = self.speech_encoder.config.num_mel_bins
        mels = [clip_to_mel(clip.to(self.device), M, self.config.window).T for clip in audio]
        lengths = torch.tensor([len(mel) // 2 for mel in mels])
        # Here S is that of the longest clip, or of the 30 s window.
        mel = pad_sequence(mels, batch_first=True).transpose(1, 2)  # (B, M, 2S)
        mel = mel.to(self.speech_encoder.conv1.weight.dtype)
        # Keep only the states of the clip itself, not of the silence that fills a 30 s window.
        n_real = [n_states(len(clip)) for clip in audio]
        states = self.speech_encoder(mel, lengths, max(n_real))  # (B, n, Da)
        speech = self.projector(states).to(self.llm.lm_head.weight.dtype)  # (B, n, D)
        return [embeddings[:n] for embeddings, n in zip(speech, n_real, strict=True)]

    def splice(self, ids: Tensor, speech: Tensor, audio_index: int) -> Tensor:
        """Embeddings of ids (T,), with speech (S, D) in place of the id at audio_index. -> (P, D)

        `audio_index` is the index of AUDIO_ID in `ids`. It is an argument, because searching for it
        on the GPU would make the CPU wait, once for each row.
        """
        # AUDIO_ID is negative and has no embedding. Any other id can replace it here, because its
        # embedding is left out below.
        words = self.llm.embed(ids.clamp(min=0))  # (T, D)
        return torch.cat([words[:audio_index], speech, words[audio_index + 1 :]])

    def forward(self, batch: Batch) -> Tensor:
        """Return the loss of each answer token, end tokens included. -> (answer tokens,)

        First come the losses of row 0, then those of row 1, and so on.

        Rows are padded on the right. So a token has the same position in every batch. Causal
        attention needs no mask, because no token can see the padding after it. The loss of a row
        does not depend on the other rows.

        The labels stay on the CPU. Their number decides the shapes below, and asking a GPU for it
        would make the CPU wait. Copies to the GPU do not wait either (non_blocking).
        """
        rows, labels = [], []
        speech = self.encode_speech(batch.audio)
        batch_ids = batch.ids.to(self.device, non_blocking=True)
        parts = zip(speech, batch_ids, batch.labels, batch.lengths, batch.audio_at, strict=True)
        for embeddings, ids, row_labels, n_ids, audio_index in parts:
            rows.append(self.splice(ids[:n_ids], embeddings, audio_index))
            # One id became S embeddings, so the row is S - 1 longer. Add S - 1 IGNORE labels. They
            # can go to the front, because everything before the answer is IGNORE.
            labels.append(F.pad(row_labels[:n_ids], (len(embeddings) - 1, 0), value=IGNORE))
        x = pad_sequence(rows, batch_first=True)  # (B, P, D)
        labels = pad_sequence(labels, batch_first=True, padding_value=IGNORE)  # (B, P)

        # The state at position p predicts the token at p + 1. So shift the labels to the left: at
        # the last position of the prompt, the LLM must predict the first token of the answer.
        next_tokens = F.pad(labels[:, 1:], (0, 1), value=IGNORE)  # (B, P)
        # The last MLP and the head are computed only where there is a next token to predict.
        row, position = torch.where(next_tokens != IGNORE)
        places = torch.stack([row, position, next_tokens[row, position]])  # (3, answer tokens)
        row, position, targets = places.to(self.device, non_blocking=True)
        hidden = self.llm.hidden(x, selection=(row, position))[0]  # (answer tokens, D)
        return F.cross_entropy(self.llm.logits(hidden).float(), targets, reduction="none")

    def compile_layers(self):
        """Call torch.compile for every layer. The first calls are slow, later calls are faster."""
        compiler = os.environ.get("CXX", "g++")
        if self.device.type == "cpu" and not shutil.which(compiler):
            advice = f"install {compiler} or leave out --compile"
            raise ValueError(f"--compile on a CPU needs a C++ compiler; {advice}")
        # By default PyTorch stops compiling after 8 versions of a layer. More are needed: for
        # training and translation, for one clip and several, with and without a mask, and so on.
        torch._dynamo.config.recompile_limit = 64
        for layer in (*self.speech_encoder.layers, *self.llm.model.layers):
            layer.compile(dynamic=True)

    def trained(self) -> dict[str, Tensor]:
        """The tensors that training changes: both LoRAs and the projector."""
        return {name: p.detach() for name, p in self.named_parameters() if p.requires_grad}

    def fill_trained(self, tensors: dict[str, Tensor], model_path):
        """Copy trained tensors into the model. The names and shapes must be those of trained().

        `model_path` is the place of the tensors, for error messages.
        """
        trained = self.trained()
        check_tensors(trained, tensors, model_path)
        for name, tensor in trained.items():
            tensor.copy_(tensors[name])

    def save_pretrained(self, folder):
        """Write the trained tensors (llast.safetensors) and their description (llast.json).

        Both files are first written under temporary names and then renamed, so a half-written file
        never has the final name. If the program is killed between the two renames, the new tensors
        are next to the old llast.json. If the description has not changed, this folder still loads.
        In other cases from_pretrained raises an error.
        """
        if any(layer.lora_A is None for layer in lora_layers(self)):
            raise ValueError("merge_lora(delete_lora=True) deleted the LoRA; save before merging")
        if not self.fingerprints:
            raise ValueError("fingerprints are missing; create the model with LLaST.fresh")
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        config = asdict(self.config)
        for base in BASE_FIELDS:  # relative paths: all folders can be moved together
            config[base] = os.path.relpath(Path(config[base]).resolve(), folder.resolve())
        description = {
            "config": config,
            "fingerprints": self.fingerprints,
            "versions": {"llast": FORMAT, "torch": torch.__version__},
        }
        tensors = {name: tensor.cpu().contiguous() for name, tensor in self.trained().items()}
        digests = digests_of([config, self.fingerprints], tensors)
        save_file(tensors, folder / "llast.safetensors.tmp", digests)  # as metadata of the file
        (folder / "llast.json.tmp").write_text(json.dumps(description, indent=2) + "\n")
        # safetensors makes files that only the owner can read. Give them normal permissions.
        shutil.copymode(folder / "llast.json.tmp", folder / "llast.safetensors.tmp")
        for name in ("llast.safetensors", "llast.json"):
            os.replace(folder / f"{name}.tmp", folder / name)

    @classmethod
    def from_pretrained(cls, folder, encoder=None, llm=None, device="cpu", dtype=torch.float32):
        """Read a folder that save_pretrained wrote.

        Raise ValueError if a file of the folder or of a base model has changed since then.
        `encoder` and `llm` are the new folders of the base models, if they were moved.
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
    json_file, weights_file = folder / "llast.json", folder / "llast.safetensors"
    for file in (json_file, weights_file):
        if not file.is_file():
            raise FileNotFoundError(f"{folder} is not a saved LLaST: it has no {file.name}")
    description = read_json(json_file)
    required_keys = {"versions": ["llast"], "config": BASE_FIELDS, "fingerprints": BASE_FIELDS}
    for name, keys in required_keys.items():
        part = description.get(name)
        if not isinstance(part, dict) or not part.keys() >= set(keys):
            wanted = f"{name} must contain {' and '.join(keys)}"
            raise ValueError(f"{json_file}: {wanted}, found {part!r:.60}; copy the file again")
    if description["versions"]["llast"] != FORMAT:
        raise ValueError(
            f"{json_file} has format {description['versions']['llast']!r:.40}, but this program "
            f"reads only {FORMAT}; train again, or use the version of the program that wrote it"
        )
    tensors = read_tensors(weights_file)
    with safe_open(weights_file, "pt") as stored:
        saved_digests = stored.metadata() or {}
    digests = digests_of([description["config"], description["fingerprints"]], tensors)
    if changed := [name for name, digest in digests.items() if saved_digests.get(name) != digest]:
        raise ValueError(
            f"{folder}: llast.json and llast.safetensors do not belong together, or were changed: "
            f"see {' and '.join(changed)}; copy both files again, or train again"
        )
    # JSON stores tuples as lists.
    values = {k: tuple(v) if isinstance(v, list) else v for k, v in description["config"].items()}
    config = check_fields(LLaSTConfig, values, json_file, lowest=0)
    bases = {k: os.path.normpath(folder.resolve() / values[k]) for k in BASE_FIELDS}
    return replace(config, **bases), description["fingerprints"], tensors


def digests_of(content, tensors: dict[str, Tensor]) -> dict[str, str]:
    """Return a SHA-256 of `content` as JSON, and one of the names and values of the tensors.

    llast.safetensors stores both, so from_pretrained can see whether the two files belong together.
    """
    text = json.dumps(content, sort_keys=True)
    digest = hashlib.sha256()
    for name in sorted(tensors):
        digest.update(name.encode())
        digest.update(tensors[name].contiguous().flatten().view(torch.uint8).numpy())
    described = hashlib.sha256(text.encode()).hexdigest()
    return {"llast.json": described, "llast.safetensors": digest.hexdigest()}


def check_bases(config: LLaSTConfig, fingerprints: dict[str, str], model_path):
    """Raise an error if a base model is missing, or is not the one that was used in training.

    `model_path` is the place of the trained model, for error messages.
    """
    for name, expected in fingerprints.items():
        base = Path(getattr(config, name))
        if not base.exists():
            raise FileNotFoundError(
                f"{model_path} was trained on the {name} in {base}, which does not exist; "
                f"give its new folder with --{name} PATH (in Python: {name}=PATH)"
            )
        actual = fingerprint(base, name)
        if actual != expected:
            raise ValueError(
                f"{model_path} was trained on another {name} than the one in {base}: expected "
                f"fingerprint {expected:.12}, found {actual:.12}; give the right folder with "
                f"--{name} PATH (in Python: {name}=PATH)"
            )


def fingerprints_of(config: LLaSTConfig) -> dict[str, str]:
    """Return {"encoder": SHA-256, "llm": SHA-256} of the base models."""
    return {name: fingerprint(Path(getattr(config, name)), name) for name in BASE_FIELDS}


def fingerprint(base: Path, name: str) -> str:
    """Return one SHA-256 of all files that are read from a base model.

    These are its weights and config.json, and for an LLM the files of the tokenizer.
    """
    others = [base / "config.json", *(tokenizer_files(base) if name == "llm" else ())]
    files = weight_files(base) + [other for other in others if other.is_file()]
    digest = hashlib.sha256()
    for file in sorted(files):
        digest.update(file.name.encode())
        with open(file, "rb") as stream:
            digest.update(hashlib.file_digest(stream, "sha256").digest())
    return digest.hexdigest()
