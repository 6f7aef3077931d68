"""Whisper's encoder: sound file -> waveform -> log-mel spectrogram -> one vector per 20 ms.

    waveform (N,) -> log-mel (M, 2S) -> two convolutions, the second with stride 2 -> S states of Da

Paper: Whisper (2212.04356). References: openai/whisper audio.py and model.py for the numbers,
transformers' WhisperEncoder for the names. The decoder of a Whisper checkpoint is not needed here.
A clip has the same states alone and in any batch: tests/test_whisper_encoder.py.
Sizes: B batch, N samples, M mel bins, S states, n needed states, Da width, H heads, Dh head width.
"""

import io
import json
import math
import os
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import soundfile
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

SAMPLE_RATE = 16_000  # samples per second
N_FFT = 400  # samples (25 ms) of one Fourier transform
HOP = 160  # samples (10 ms) per mel frame
STEP = 2 * HOP  # samples (20 ms) per encoder state: the second convolution has stride 2
MAX_SECONDS = 30  # Whisper was trained on windows of this length
MAX_SAMPLES = MAX_SECONDS * SAMPLE_RATE
WINDOWS = ("30s", "clip")


# --------------------------------------------------------------------------- sound file -> waveform

MAX_PEAK = 32  # times full scale, 30 dB above any normal recording
MIN_RATE, MAX_RATE = 1_000, 400_000  # samples per second
UNKNOWN = 1 << 40  # libsndfile reports more samples than this if it does not know the length
CONVERT = "convert it with ffmpeg -i FILE OUTPUT.flac"


class AudioError(ValueError):
    """A clip that cannot be used, with its path and the reason."""

    def __init__(self, path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class Endless(io.BytesIO):
    """The bytes of an mp3 file, with a size that is far too large.

    An mp3 need not state its length. libsndfile then estimates it from the size of the file and
    reads no further, so it would cut many files. With this size it reads until no bytes are left.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if (offset, whence) == (0, os.SEEK_END):
            return super().seek(1 << 60)
        return super().seek(offset, whence)


MP3_FRAME = b"\xff\xfb\x90\0"  # the start of a frame
# An mp3 may begin with a silent frame that states how many frames follow (the Xing frame).
XING = rb"(?s)\xff[\xe2-\xff]..(..)?(\0{9}|\0{17}|\0{32})(Xing|Info)\0\0\0[\1\3\5\7\t\v\r\x0f]"
# How libsndfile's log reports the size of the samples: by the header, and in the file.
DATA_SIZE = r"(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)"


def open_bytes(data: bytes) -> soundfile.SoundFile:
    """Open the bytes of a sound file. file.frames is its exact length, or more than UNKNOWN."""
    raw = io.BytesIO(data)
    file = soundfile.SoundFile(raw)
    tags_and_first_frame = data[: raw.tell()]
    if file.format == "MP3" and not re.search(XING, tags_and_first_frame):
        return soundfile.SoundFile(Endless(data))
    return file


def open_audio(path: Path) -> soundfile.SoundFile:
    """Open a sound file that can be read to its end."""
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name of any length
        twins = [path.parent / unicodedata.normalize(form, path.name) for form in ("NFC", "NFD")]
        hint = "; the same name in the other Unicode form exists: rename it"
        raise AudioError(path, "no such file" + hint * any(map(os.path.isfile, twins)))
    try:
        data = path.read_bytes()
        if path.suffix.lower() == ".mp3" and not re.match(rb"$|ID3|\xff|RIFF|OggS|fLaC|FORM", data):
            data = MP3_FRAME + data  # other bytes first: the decoder then looks for the next frame
        file = open_bytes(data)
    except (OSError, soundfile.LibsndfileError) as error:
        reason = getattr(error, "strerror", "no sound in a format that libsndfile reads")
        raise AudioError(path, reason if path.stat().st_size else "the file is empty") from error
    if fault := find_fault(file, data):
        raise AudioError(path, fault)
    return file


def find_fault(file: soundfile.SoundFile, data: bytes) -> str:
    """The reason why a file cannot be read completely, or "". data: all bytes of the file"""
    if not MIN_RATE <= file.samplerate <= MAX_RATE:
        return f"its header states {file.samplerate} Hz, not {MIN_RATE} to {MAX_RATE} Hz"
    if file.format == "OGG" and data.count(b"OggS\0\2") > 1:  # first page of a stream
        return f"several Ogg files in one, of which only the first could be read; {CONVERT}"
    if file.format != "MP3" and (file.frames >= UNKNOWN or "MPEG" in file.subtype):
        return f"a {file.format} file ({file.subtype}) that does not state its length; {CONVERT}"
    for stated, present in re.findall(DATA_SIZE, file.extra_info):
        if int(present) < int(stated) < 0x7FFF0000:  # more means "not known yet"
            return f"cut short: its header states {stated} bytes of sound, the file has {present}"
    return ""


def read_blocks(path: Path, file: soundfile.SoundFile):
    """Decode an open file to its end. Yields (samples, channels)."""
    n = 0
    try:
        while len(block := file.read(1 << 16, "float32", always_2d=True)):
            yield torch.from_numpy(block)
            n += len(block)
    except soundfile.LibsndfileError as error:
        raise AudioError(path, f"the data is damaged ({error.error_string})") from error
    if n != file.frames < UNKNOWN:
        raise AudioError(path, f"cut short or damaged, {n} of {file.frames} samples are there")
    rest = file.name.read()  # file.name is the BytesIO that was opened
    if file.format == "MP3" and len(rest) > 512 and is_mp3(rest):
        raise AudioError(path, f"several mp3 files in one, or damaged; {CONVERT}")


def is_mp3(data: bytes) -> bool:
    """Whether bytes have the sound of an mp3. Tags have none, and padding is too short."""
    try:
        return len(open_bytes(MP3_FRAME + data).read(4096)) == 4096
    except soundfile.LibsndfileError:
        return False


def in_thread(read):
    """Run a function that reads a file in a thread of its own.

    libsndfile calls Python code to get the bytes. Ctrl-C raises its error in the main thread only;
    there it could hit this code, and an error inside such a call is lost.
    """

    def run(path):
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(read, Path(path)).result()

    return run


@in_thread
def audio_seconds(path: Path) -> float:
    """Exact length of a clip. Only a file that does not state its length is decoded."""
    with open_audio(path) as file:
        n = file.frames if file.frames < UNKNOWN else sum(map(len, read_blocks(path, file)))
    return n / file.samplerate


@in_thread
def load_audio(path: Path) -> Tensor:
    """Waveform of a sound file: 16 kHz, mono, full scale 1. -> (N,)"""
    with open_audio(path) as file:
        samples = torch.cat([torch.empty(0, file.channels), *read_blocks(path, file)])
    audio = samples.mean(dim=1)  # (N,)
    if len(audio) == 0:
        raise AudioError(path, "the clip has no samples by its header")
    peak = samples.norm(torch.inf)
    if not peak <= MAX_PEAK:  # NaN, infinite, or for example 16-bit integers as floats
        raise AudioError(path, f"samples are not numbers or too large: {peak:g}; full scale is 1")
    if audio.norm() ** 2 < 1e-3 * samples.norm() ** 2 / file.channels:  # 30 dB below the channels
        raise AudioError(path, "its channels cancel each other (opposite phase); keep one of them")
    return resample(audio, file.samplerate, SAMPLE_RATE)


ZEROS = 48  # zero crossings of the sinc on each side; more make the cut-off steeper
KAISER_BETA = 8.0  # shape of the window; attenuation above the cut-off is about 80 dB
ROLLOFF = 0.945  # middle of the transition, as a share of the lower Nyquist frequency
PHASES = 32  # neighbouring output samples that are computed from one window of the input
ROWS = 1024  # windows in one matrix product


@lru_cache(maxsize=512)
def sinc_filters(cutoff: float, from_step: int, to_step: int, first: int) -> Tensor:
    """Low-pass filters of up to PHASES output samples, one per column. -> (width, columns)

    All columns start at the same input sample, so the filters move down from column to column.
    """
    reach = math.ceil(ZEROS / cutoff)
    position = torch.arange(first, min(first + PHASES, to_step)) * from_step
    centre = position // to_step  # last input sample before each output sample
    width = 2 * reach + 1 + int(centre[-1] - centre[0])
    tap = torch.arange(width)[:, None] - reach + centre[0] - centre
    t = cutoff * (tap - (position % to_step).double() / to_step)
    kaiser = torch.special.i0(KAISER_BETA * (1 - (t / ZEROS) ** 2).clamp(min=0).sqrt())
    kaiser = kaiser / torch.special.i0(torch.tensor(KAISER_BETA))
    return torch.where(tap.abs() <= reach, cutoff * torch.sinc(t) * kaiser, 0).float()


def resample(audio: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Band-limited interpolation with a Kaiser-windowed sinc. (N,) -> (ceil(N to/from),)

    It removes frequencies above the lower of the two Nyquist frequencies, so nothing aliases.
    from_step input samples become to_step output samples (44.1 kHz: 441 become 160). So every
    to_step-th output sample has the same filter: a convolution with to_step filters and stride
    from_step, here as matrix products. They add in float64, because a filter has many terms.
    """
    if from_rate == to_rate:
        return audio
    divisor = math.gcd(from_rate, to_rate)
    repeat = math.ceil(PHASES * divisor / to_rate)  # 48 kHz -> 16 kHz: 96 : 32 is faster than 3 : 1
    from_step, to_step = (rate // divisor * repeat for rate in (from_rate, to_rate))
    cutoff = ROLLOFF * min(1, to_step / from_step)  # as a share of the input's Nyquist frequency
    reach = math.ceil(ZEROS / cutoff)  # input samples that a filter uses on each side

    n_rows = math.ceil(len(audio) / from_step)
    padded = F.pad(audio, (reach, reach + n_rows * from_step - len(audio)))
    result = torch.empty(n_rows, to_step, dtype=audio.dtype)
    for first in range(0, to_step, PHASES):
        filters = sinc_filters(cutoff, from_step, to_step, first).double()
        windows = padded[first * from_step // to_step :].unfold(0, len(filters), from_step)
        for row in range(0, n_rows, ROWS):  # a few at a time, because windows overlap: a big copy
            rows = slice(row, min(row + ROWS, n_rows))
            result[rows, first : first + PHASES] = windows[rows].double() @ filters
    return result.flatten()[: math.ceil(len(audio) * to_step / from_step)]


# ------------------------------------------------------------------------------ waveform -> log-mel


@lru_cache
def mel_filters(n_mels: int) -> Tensor:
    """Weights that sum Fourier bins into mel bins: triangles of equal area. -> (M, N_FFT/2 + 1)

    The mel scale is Slaney's: linear below 1 kHz, logarithmic above. Equal to Whisper's
    mel_filters.npz.
    """
    linear_step = 200 / 3  # Hz per mel below 1 kHz
    log_step = math.log(6.4) / 27  # log Hz per mel above 1 kHz
    knee = 1000 / linear_step  # 1 kHz in mel

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
    """Whisper's input. (..., N) at 16 kHz, full scale 1 -> (..., M, N // HOP)

    Each waveform of a batch is limited by its own maximum, so it does not depend on the others.
    """
    window = torch.hann_window(N_FFT, device=audio.device)
    spectrum = torch.stft(audio, N_FFT, HOP, window=window, return_complex=True)
    spectrum = spectrum[..., :-1]  # half of the last frame is outside the clip
    power = spectrum.real**2 + spectrum.imag**2
    mel = mel_filters(n_mels).to(audio.device) @ power

    log = mel.clamp(min=1e-10).log10()
    maximum = log.amax(dim=(-2, -1), keepdim=True)
    log = torch.maximum(log, maximum - 8)  # a range of 80 dB
    return (log + 4) / 4


def n_states(n_samples: int) -> int:
    """Number of encoder states of a clip: one per STEP, also for an incomplete last one."""
    return math.ceil(n_samples / STEP)


def clip_to_mel(audio: Tensor, n_mels: int, window: str) -> Tensor:
    """Log-mel spectrogram of one clip, padded with silence. (N,) -> (M, 2S)

    window "30s" pads to 30 s, as in Whisper's training. "clip" pads only to a whole STEP, so a
    short clip needs much less work.
    """
    if window not in WINDOWS:
        raise ValueError(f"window is {window!r}; it can be one of {WINDOWS}")
    if not 0 < len(audio) <= MAX_SAMPLES:
        raise ValueError(f"the clip has {len(audio):,} samples, not 1 to {MAX_SAMPLES:,} (30 s)")
    length = MAX_SAMPLES if window == "30s" else n_states(len(audio)) * STEP
    return log_mel_spectrogram(F.pad(audio, (0, length - len(audio))), n_mels)


# ------------------------------------------------------------------------------------- the encoder


@dataclass(frozen=True)
class WhisperConfig:
    """The values in config.json of a Whisper checkpoint that change what the encoder computes."""

    num_mel_bins: int  # M
    d_model: int  # Da
    encoder_layers: int
    encoder_attention_heads: int  # H, divides Da
    encoder_ffn_dim: int
    max_source_positions: int  # the largest S

    @classmethod
    def from_json(cls, path) -> "WhisperConfig":
        """Read config.json. A wrong or missing value is an error, and so is an unknown feature."""
        raw = read_json(Path(path))
        for name, built in (("activation_function", "gelu"), ("scale_embedding", False)):
            if raw.get(name, built) != built:
                raise ValueError(f"{path} asks for {name}={raw[name]!r}; only {built!r} is built")
        for name in cls.__dataclass_fields__:
            if type(raw.get(name)) is not int or not 0 < raw[name] <= 100_000:
                raise ValueError(f"{path} has no valid {name} (int), found {raw.get(name)!r:.40}")
        config = cls(**{name: raw[name] for name in cls.__dataclass_fields__})
        if config.d_model % config.encoder_attention_heads or config.encoder_layers > 1000:
            raise ValueError(f"{path} describes a model that cannot exist: {config}")
        return config


class SelfAttention(nn.Module):
    """Each state attends to all states of its clip, but not to padding. (B, S, Da) -> (B, S, Da)

    With n, only the first n states are computed: (B, n, Da).
    """

    def __init__(self, config: WhisperConfig):
        super().__init__()
        Da = config.d_model
        self.n_heads = config.encoder_attention_heads
        self.q_proj = nn.Linear(Da, Da)
        self.k_proj = nn.Linear(Da, Da, bias=False)  # softmax would cancel a bias of all keys
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
    """Attention, then an MLP. Each reads normalised states and adds its result to them.

    With n, only the first n states are computed and returned.
    """

    def __init__(self, config: WhisperConfig):
        super().__init__()
        Da = config.d_model
        self.self_attn = SelfAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(Da)
        self.fc1 = nn.Linear(Da, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, Da)
        self.final_layer_norm = nn.LayerNorm(Da)  # of the MLP; this is its name in checkpoints

    def forward(self, x: Tensor, can_attend: Tensor | None, n: int | None = None) -> Tensor:
        x = x[:, :n] + self.self_attn(self.self_attn_layer_norm(x), can_attend, n)  # (B, n, Da)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class WhisperEncoder(nn.Module):
    """The encoder of Whisper. Modules have the names of the checkpoint."""

    def __init__(self, config: WhisperConfig):
        super().__init__()
        self.config = config
        M, Da = config.num_mel_bins, config.d_model
        self.conv1 = nn.Conv1d(M, Da, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(Da, Da, kernel_size=3, padding=1, stride=2)
        self.embed_positions = nn.Embedding(config.max_source_positions, Da)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(Da)
        # Activation checkpointing: run each layer again in the backward pass
        self.recompute = False

    def forward(self, mel: Tensor, lengths: Tensor | None = None, n: int | None = None) -> Tensor:
        """mel (B, M, 2S), lengths (B,) in states (None: all have S) -> (B, S, Da)

        States after the length of a clip are padding. They have no meaning and no influence.

        With n, the last layer computes only the first n states: (B, n, Da). They still attend to
        all S. For a short clip in a window of 30 s this saves most of that layer.
        """
        S, most = mel.shape[2] // 2, self.config.max_source_positions
        if S > most:
            raise ValueError(f"a clip has {S} states; this encoder takes {most}: split the clip")
        can_attend = None
        if lengths is not None and bool((lengths < S).any()):
            is_real = torch.arange(S, device=mel.device) < lengths[:, None]  # (B, S)
            can_attend = is_real[:, None, None]  # (B, 1, 1, S)
            # The first convolution pads a single clip with zeros, so in a batch zeros must follow
            # each clip. The second one has stride 2 and never reads after the last frame.
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
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu") -> "WhisperEncoder":
        """Read a Hugging Face folder of Whisper with safetensors.

        Every tensor of the encoder must be there with its shape. The decoder is left out.
        """
        folder = Path(folder)
        stored = {}
        for file in weight_files(folder):
            for name, tensor in read_tensors(file).items():
                name = name.removeprefix("model.")  # added by WhisperForConditionalGeneration
                if not name.startswith(("decoder.", "proj_out.")):
                    stored[name.removeprefix("encoder.")] = tensor
        config = WhisperConfig.from_json(folder / "config.json")
        with torch.device("meta"):
            encoder = cls(config)
        must_match(encoder.state_dict(), stored, folder)
        # Each tensor is read here, one after the other, from the files that are mapped into memory.
        weights = {name: tensor.to(device, dtype) for name, tensor in stored.items()}
        encoder.load_state_dict(weights, assign=True)
        return encoder


# ------------------------------------------------------------------------------------ weight files

# llama.py and llast.py import these.


def read_json(path: Path) -> dict:
    """The object in a JSON file. Anything else is an error that names the file."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: thousands of brackets
        raise ValueError(f"{path} is not JSON: {error}; download or copy it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must hold a JSON object, found {value!r:.40}")
    return value


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files of a Hugging Face folder: one file, or all shards."""
    one, shards = folder / "model.safetensors", sorted(folder.glob("model-*-of-*.safetensors"))
    if not one.is_file() and not shards:
        convert = f"python tools/convert.py whisper|llama {folder} --out FOLDER"
        raise FileNotFoundError(f"{folder} has no model.safetensors; for other weights: {convert}")
    return [one] if one.is_file() else shards


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Every tensor of a safetensors file by its name. The file is mapped into memory, not read."""
    try:
        return load_file(file)
    except Exception as error:
        raise ValueError(f"{file} cannot be read as weights; is it complete? {error!r}") from error


def must_match(expected: dict[str, Tensor], stored: dict[str, Tensor], source):
    """Raise an error unless names and shapes are the expected ones and all numbers are floats."""
    wrong = [f"missing: {name}" for name in sorted(expected.keys() - stored.keys())]
    wrong += [f"unexpected: {name}" for name in sorted(stored.keys() - expected.keys())]
    for name in sorted(expected.keys() & stored.keys()):
        shape, tensor = tuple(expected[name].shape), stored[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            found = f"{tuple(tensor.shape)} {tensor.dtype}"
            wrong.append(f"other shape or type: {name} is {found}, not floats of {shape}")
    if wrong:
        shown = "; ".join(wrong[:8])
        raise ValueError(f"{source}: {len(wrong)} tensors do not fit the configuration: {shown}")
