"""Whisper's encoder: waveform -> log-mel spectrogram -> one vector for every 20 ms of speech.

    waveform (N,) -> log-mel (M, 2S) -> two convolutions, the second with stride 2 -> S states of Da

Paper: Whisper (2212.04356). References: openai/whisper audio.py and model.py for the numbers,
transformers' WhisperEncoder for the names. The decoder of a Whisper checkpoint is not needed here.
A clip enters alone or in any batch with the same result: tests/test_whisper_encoder.py.
"""

import json
import math
import os
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SAMPLE_RATE = 16_000  # samples a second
N_FFT = 400  # samples, 25 ms: one Fourier transform
HOP = 160  # samples, 10 ms: one mel frame
STEP = 2 * HOP  # samples, 20 ms: one encoder state, because the second convolution has stride 2
MAX_SAMPLES = 30 * SAMPLE_RATE  # Whisper was trained on windows of exactly this length
WINDOWS = ("30s", "clip")


# --------------------------------------------------------------------------- sound file -> waveform

MAX_SECONDS = 30  # Whisper's window; a longer clip has no place in it
MAX_PEAK = 32  # times full scale: 30 dB more than any recording should have


class AudioError(ValueError):
    """A clip that cannot be used, and why."""

    def __init__(self, path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


def open_audio(path: Path) -> soundfile.SoundFile:
    """The file, opened, once it is known to be one that can be read."""
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name of any length
        raise AudioError(path, "no such file")
    if path.stat().st_size == 0:
        raise AudioError(path, "the file is empty")
    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        reason = error.error_string
        if "does not exist" in reason:  # what libsndfile says where it finds no frames of an mp3
            reason = "no mp3 audio in it"
        raise AudioError(path, f"not readable as audio ({reason})") from error
    except TypeError as error:  # soundfile asks for the rate of a file that ends in .raw
        raise AudioError(path, "not readable as audio (it has no header)") from error
    if file.frames > 1 << 40:  # what a FLAC that was streamed says of itself
        raise AudioError(path, "its header does not say how long it is; convert it once more")
    return file


def audio_seconds(path) -> float:
    """How long a clip is by its header, without decoding it."""
    with open_audio(Path(path)) as file:
        return file.frames / file.samplerate


def load_audio(path) -> Tensor:
    """Any file that soundfile reads (wav, flac, ogg, mp3) -> (N,) at 16 kHz, mono, full scale 1."""
    path = Path(path)
    with open_audio(path) as file:
        promised, rate = file.frames, file.samplerate
        try:
            samples = file.read(promised, "float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise AudioError(path, f"not readable as audio ({error.error_string})") from error
    audio = torch.from_numpy(samples).mean(dim=1)  # (N,)
    if len(audio) == 0:
        raise AudioError(path, "the clip has no samples")
    if len(audio) < promised:
        raise AudioError(path, f"cut short, {len(audio)} of {promised} samples are there")
    if not audio.isfinite().all():
        raise AudioError(path, "the clip holds samples that are not numbers (NaN or infinite)")
    if (peak := audio.abs().max()) > MAX_PEAK:  # floats that stand for 16-bit integers, say
        raise AudioError(path, f"its samples reach {peak:.0f}; full scale is 1")
    return resample(audio, rate, SAMPLE_RATE)


ZEROS = 48  # zero crossings of the sinc on either side: more make the cut-off steeper
KAISER_BETA = 8.0  # shape of the window: about 80 dB of attenuation beyond the cut-off
ROLLOFF = 0.945  # the middle of the transition, as a part of the lower Nyquist frequency


@lru_cache(maxsize=8)
def sinc_table(from_step: int, to_step: int) -> Tensor:
    """A low-pass filter for each position between two input samples. -> (to_step, taps)"""
    cutoff = ROLLOFF * min(1, to_step / from_step)  # as a part of the input's Nyquist frequency
    half = math.ceil(ZEROS / cutoff)  # input samples that the filter sees on either side
    phase = torch.arange(to_step, dtype=torch.float64)[:, None] / to_step
    t = cutoff * (torch.arange(-half, half + 1) - phase)  # (to_step, taps)
    width = (1 - (t / ZEROS) ** 2).clamp(min=0).sqrt()
    kaiser = torch.special.i0(KAISER_BETA * width) / torch.special.i0(torch.tensor(KAISER_BETA))
    return (cutoff * torch.sinc(t) * kaiser).float()


def resample(audio: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Band-limited interpolation with a Kaiser-windowed sinc. (N,) -> (ceil(N to/from),)

    Nothing above the lower of the two Nyquist frequencies survives, so nothing folds back.
    """
    if from_rate == to_rate:
        return audio
    divisor = math.gcd(from_rate, to_rate)
    from_step, to_step = from_rate // divisor, to_rate // divisor
    table = sinc_table(from_step, to_step)
    half = table.shape[1] // 2
    windows = torch.nn.functional.pad(audio, (half, half)).unfold(0, table.shape[1], 1)  # (N, taps)

    n_out = math.ceil(len(audio) * to_step / from_step)
    pieces = []
    for start in range(0, n_out, SAMPLE_RATE):  # a piece at a time, to keep memory small
        j = torch.arange(start, min(start + SAMPLE_RATE, n_out)) * from_step
        pieces.append((windows[j // to_step] * table[j % to_step]).sum(dim=1))
    return torch.cat(pieces)


# ------------------------------------------------------------------------------ waveform -> log-mel


@lru_cache
def mel_filters(n_mels: int) -> Tensor:
    """Triangles that sum Fourier bins into mel bins, equal in area. -> (M, N_FFT/2 + 1)

    The Slaney mel scale (linear below 1 kHz, logarithmic above), as Whisper's mel_filters.npz.
    """
    linear_step = 200 / 3  # Hz per mel below 1 kHz
    log_step = math.log(6.4) / 27  # of the logarithm of the frequency, per mel, above it
    knee = 1000 / linear_step  # mel

    top = knee + math.log(SAMPLE_RATE / 2 / 1000) / log_step
    mels = torch.linspace(0, top, n_mels + 2, dtype=torch.float64)
    above = 1000 * torch.exp(log_step * (mels - knee))
    corners = torch.where(mels < knee, linear_step * mels, above)  # Hz
    bins = torch.linspace(0, SAMPLE_RATE / 2, N_FFT // 2 + 1, dtype=torch.float64)  # Hz

    left, middle, right = corners[:-2, None], corners[1:-1, None], corners[2:, None]
    rising = (bins - left) / (middle - left)
    falling = (right - bins) / (right - middle)
    triangles = torch.minimum(rising, falling).clamp(min=0)
    return (triangles * 2 / (right - left)).float()


def log_mel_spectrogram(audio: Tensor, n_mels: int) -> Tensor:
    """Whisper's picture of sound. (..., N) at 16 kHz, full scale 1 -> (..., M, N // HOP)

    Each waveform of a batch is scaled by its own loudest point, so its picture does not depend on
    its neighbours.
    """
    window = torch.hann_window(N_FFT, device=audio.device)
    spectrum = torch.stft(audio, N_FFT, HOP, window=window, return_complex=True)
    spectrum = spectrum[..., :-1]  # the last frame is half outside the clip
    power = spectrum.real**2 + spectrum.imag**2
    mel = mel_filters(n_mels).to(audio.device) @ power

    log = mel.clamp(min=1e-10).log10()
    loudest = log.amax(dim=(-2, -1), keepdim=True)
    log = torch.maximum(log, loudest - 8)  # keep 80 dB under the loudest point
    return (log + 4) / 4


def n_states(n_samples: int) -> int:
    """How many encoder states a clip is worth: one for each STEP that it has begun."""
    return math.ceil(n_samples / STEP)


def clip_to_mel(audio: Tensor, n_mels: int, window: str) -> Tensor:
    """The log-mel of one clip as the encoder wants it. (N,) -> (M, 2S)

    window "30s" pads the clip with silence to Whisper's own window; "clip" pads it only to a whole
    STEP, which costs a short clip a small part of the work. Neither looks at any other clip.
    """
    if window not in WINDOWS:
        raise ValueError(f"window is {window!r}; it can be one of {WINDOWS}")
    if not 0 < len(audio) <= MAX_SAMPLES:
        seconds = len(audio) / SAMPLE_RATE
        raise ValueError(
            f"the clip has {seconds:.2f} s; the encoder takes more than 0 and up to 30"
        )
    length = MAX_SAMPLES if window == "30s" else n_states(len(audio)) * STEP
    return log_mel_spectrogram(F.pad(audio, (0, length - len(audio))), n_mels)


# ------------------------------------------------------------------------------------- the encoder


@dataclass(frozen=True)
class WhisperConfig:
    """The part of a Whisper checkpoint's config.json that shapes the encoder."""

    num_mel_bins: int  # M
    d_model: int  # Da
    encoder_layers: int
    encoder_attention_heads: int  # H
    encoder_ffn_dim: int
    max_source_positions: int  # the largest S

    @classmethod
    def from_json(cls, path):
        raw = read_json(Path(path))
        missing = [name for name in cls.__dataclass_fields__ if name not in raw]
        if missing:
            raise ValueError(f"{path} has no {missing}; is it the config.json of a Whisper model?")
        for name, ours in (("activation_function", "gelu"), ("scale_embedding", False)):
            if raw.get(name, ours) != ours:
                raise ValueError(f"{path} asks for {name}={raw[name]!r}; only {ours!r} is built")
        return cls(**{name: raw[name] for name in cls.__dataclass_fields__})


class SelfAttention(nn.Module):
    """Every state looks at every real state of its own clip. (B, S, Da) -> (B, S, Da)

    Given n, only the first n look: (B, n, Da).
    """

    def __init__(self, config: WhisperConfig):
        super().__init__()
        Da = config.d_model
        self.n_heads = config.encoder_attention_heads
        self.q_proj = nn.Linear(Da, Da)
        self.k_proj = nn.Linear(Da, Da, bias=False)  # a shift of all keys would cancel in softmax
        self.v_proj = nn.Linear(Da, Da)
        self.out_proj = nn.Linear(Da, Da)

    def forward(self, x: Tensor, can_attend: Tensor | None, n: int | None = None) -> Tensor:
        B, S, Da = x.shape
        H = self.n_heads
        q = self.q_proj(x[:, :n]).view(B, -1, H, Da // H).transpose(1, 2)  # (B, H, n, Dh)
        k = self.k_proj(x).view(B, S, H, Da // H).transpose(1, 2)  # (B, H, S, Dh)
        v = self.v_proj(x).view(B, S, H, Da // H).transpose(1, 2)  # (B, H, S, Dh)
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=can_attend)  # (B, H, n, Dh)
        y = y.transpose(1, 2).flatten(2)  # (B, n, Da)
        return self.out_proj(y)


class EncoderLayer(nn.Module):
    """Attention, then a two-layer MLP; each reads normed states and adds to them.

    Given n, to the first n alone, which are returned.
    """

    def __init__(self, config: WhisperConfig):
        super().__init__()
        Da = config.d_model
        self.self_attn = SelfAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(Da)
        self.fc1 = nn.Linear(Da, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, Da)
        self.final_layer_norm = nn.LayerNorm(Da)  # the checkpoint's name for the norm of the MLP

    def forward(self, x: Tensor, can_attend: Tensor | None, n: int | None = None) -> Tensor:
        x = x[:, :n] + self.self_attn(self.self_attn_layer_norm(x), can_attend, n)  # (B, n, Da)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class WhisperEncoder(nn.Module):
    """The encoder half of Whisper, with the checkpoint's names."""

    def __init__(self, config: WhisperConfig):
        super().__init__()
        self.config = config
        M, Da = config.num_mel_bins, config.d_model
        self.conv1 = nn.Conv1d(M, Da, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(Da, Da, kernel_size=3, padding=1, stride=2)
        self.embed_positions = nn.Embedding(config.max_source_positions, Da)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(Da)
        self.recompute = False  # keep a layer's input only, and run it again in the backward pass

    def forward(self, mel: Tensor, lengths: Tensor | None = None, n: int | None = None) -> Tensor:
        """mel (B, M, 2S); lengths (B,) states of each clip, None if all fill S -> (B, S, Da)

        Beyond a clip's length the states mean nothing, and nothing before it depends on them.

        Where only the first n states are needed, (B, n, Da) comes back: they look at all S, but the
        last layer makes no others. In a 30 s window with a short clip that is most of a layer.
        """
        B, M, frames = mel.shape
        S = frames // 2
        if S > self.config.max_source_positions:
            raise ValueError(
                f"{frames} mel frames make {S} states; this encoder has positions for "
                f"{self.config.max_source_positions}: split the clip"
            )
        can_attend = None
        if lengths is not None and bool((lengths < S).any()):
            is_real = torch.arange(S, device=mel.device) < lengths[:, None]  # (B, S)
            can_attend = is_real[:, None, None]  # (B, 1, 1, S)
            # A convolution pads a lone clip with zeros, so in a batch zeros must follow it too. The
            # second, with stride 2, never looks beyond a clip's last frame.
            is_frame = is_real.repeat_interleave(2, dim=1)[:, None]  # (B, 1, 2S)
            mel = torch.where(is_frame, mel, 0)  # (B, M, 2S)

        x = F.gelu(self.conv1(mel))  # (B, Da, 2S)
        x = F.gelu(self.conv2(x)).transpose(1, 2)  # (B, S, Da)
        x = x + self.embed_positions.weight[:S]
        for layer in self.layers:
            needed = n if layer is self.layers[-1] else None
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, can_attend, needed, use_reentrant=False)
            else:
                x = layer(x, can_attend, needed)
        return self.layer_norm(x)

    @classmethod
    def from_pretrained(
        cls, path, dtype: torch.dtype = torch.float32, device="cpu"
    ) -> "WhisperEncoder":
        """Read a Hugging Face folder of Whisper with safetensors.

        Every tensor of the encoder must be there with its shape; the decoder is left out by name.
        """
        path = Path(path)
        files = weight_files(path)
        config = WhisperConfig.from_json(path / "config.json")
        with torch.device("meta"):
            encoder = cls(config)
        weights = {}
        for name, tensor in chain.from_iterable(map(stored_tensors, files)):
            name = name.removeprefix("model.")  # ...ForConditionalGeneration adds it
            if not name.startswith(("decoder.", "proj_out.")):
                weights[name.removeprefix("encoder.")] = tensor.to(device, dtype)
        must_match(encoder.state_dict(), weights, path)
        encoder.load_state_dict(weights, assign=True)
        return encoder


# ------------------------------------------------------------------------------------ weight files

# llama.py holds the same four functions: either file can be read, or taken away,
# without the other.


def read_json(path: Path) -> dict:
    """The object that a JSON file holds; what is none is an error that names the file."""
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{path} holds no JSON object but {found!r:.40}")
    return found


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder: one, or the shards that its index names."""
    if (folder / "model.safetensors").is_file():
        return [folder / "model.safetensors"]
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        raise FileNotFoundError(
            f"{folder} is not a Hugging Face folder with model.safetensors (or its index). Convert "
            f"other weights with: python tools/convert.py whisper|llama {folder} --out NEW_FOLDER"
        )
    shards = sorted(set(read_json(index)["weight_map"].values()))
    absent = [shard for shard in shards if not (folder / Path(shard).name).is_file()]
    if absent:
        raise FileNotFoundError(f"{folder} lacks {absent}, which {index.name} names")
    return [folder / Path(shard).name for shard in shards]


def stored_tensors(file: Path):
    """Every (name, tensor) of a safetensors file, each read when it is needed."""
    try:
        with safe_open(file, "pt") as stored:
            for name in stored.keys():  # noqa: SIM118, it is not a dict
                yield name, stored.get_tensor(name)
    except Exception as error:
        raise ValueError(f"{file} cannot be read as weights, is it cut short? {error!r}") from error


def must_match(wanted: dict[str, Tensor], found: dict[str, Tensor], where):
    """Refuse, with lists, weights that do not have exactly the wanted names and shapes."""
    common = sorted(wanted.keys() & found.keys())
    wrong = {
        "missing": sorted(wanted.keys() - found.keys()),
        "unexpected": sorted(found.keys() - wanted.keys()),
        "of another shape": [
            f"{name} {tuple(found[name].shape)}, not {tuple(wanted[name].shape)}"
            for name in common
            if found[name].shape != wanted[name].shape
        ],
    }
    if any(wrong.values()):
        lists = "; ".join(f"{len(v)} {k}: {', '.join(v[:8])}" for k, v in wrong.items() if v)
        raise ValueError(f"the weights in {where} do not fit the configuration there: {lists}")
