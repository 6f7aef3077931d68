"""Whisper's encoder: waveform -> log-mel spectrogram -> one vector for every 20 ms of speech.

    waveform (N,) -> log-mel (M, 2S) -> two convolutions, the second with stride 2 -> S states of Da

Paper: Whisper (2212.04356). References: openai/whisper audio.py and model.py for the numbers,
transformers' WhisperEncoder for the names. The decoder of a Whisper checkpoint is not needed here.
A clip enters alone or in any batch with the same result: tests/test_whisper_encoder.py.
"""

import io
import json
import math
import os
import re
import unicodedata
from collections.abc import Iterator
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

MAX_SECONDS = 30  # Whisper's window
MAX_PEAK = 32  # times full scale, 30 dB above any normal recording
MIN_RATE, MAX_RATE = 1_000, 400_000  # samples per second
MIN_MONO = 1e-3  # power of the mean of the channels, as a share of the power of the channels
BLOCK = 1 << 16  # samples per channel that are decoded at once
UNKNOWN = 1 << 40  # libsndfile reports at least so many samples if it does not know the length
AUDIO_FILES = tuple(".wav .flac .ogg .oga .opus .mp3 .mp2 .aif .aiff .au .caf .w64 .sph".split())
OTHER_AUDIO_FILES = tuple(".m4a .mp4 .aac .webm .wma .amr .3gp .mka .mkv .mov".split())
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


KNOWN_START = rb"ID3|\xff[\xe2-\xff]|RIFF|OggS|fLaC|FORM"  # the first two are those of an mp3
MP3_FRAME = b"\xff\xfb\x90\0"  # the start of a frame, by which libsndfile recognises an mp3
# A silent first frame of an mp3 ("Xing frame") that states how many frames follow
MP3_LENGTH = (
    rb"(?s)\xff[\xe2-\xff]..(..)?(\0{9}|\0{17}|\0{32})(Xing|Info)\0\0\0[\1\3\5\7\t\v\r\x0f]"
)
# In libsndfile's log: bytes of sound by the header, bytes of sound in the file
DATA_SIZE = r"(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)"


def open_bytes(data: bytes) -> soundfile.SoundFile:
    """Open a sound file. The length of an mp3 is exact if a frame states it, and UNKNOWN if not."""
    raw = io.BytesIO(data)
    file = soundfile.SoundFile(raw)
    tags_and_first_frame = data[: raw.tell()]
    if file.format == "MP3" and not re.search(MP3_LENGTH, tags_and_first_frame):
        return soundfile.SoundFile(Endless(data))
    return file


def open_audio(path: Path) -> soundfile.SoundFile:
    """Open a sound file that can be read to its end."""
    if not os.path.isfile(path):  # unlike Path.is_file, False for a name of any length
        forms = ("NFC", "NFD")  # é as one character, and as e with an accent
        twins = [path.parent / unicodedata.normalize(form, path.name) for form in forms]
        twin = any(map(os.path.isfile, twins))
        hint = "; a file exists whose name is written with other Unicode characters" if twin else ""
        raise AudioError(path, f"no such file{hint}")
    try:
        data = path.read_bytes()
        if not data:
            raise AudioError(path, "the file is empty")
        if path.suffix.lower() in (".mp3", ".mp2") and not re.match(KNOWN_START, data):
            data = MP3_FRAME + data  # the decoder skips bytes until a whole frame
        file = open_bytes(data)
    except OSError as error:
        raise AudioError(path, f"not readable ({error.strerror})") from error
    except soundfile.LibsndfileError as error:
        reason = error.error_string
        if "does not exist" in reason:  # what libsndfile says if it finds no frame of an mp3
            reason = "no mp3 frame in its first 64 kB"
        raise AudioError(path, f"not readable as audio ({reason})") from error
    if fault := find_fault(file, data):
        raise AudioError(path, fault)
    return file


def find_fault(file: soundfile.SoundFile, data: bytes) -> str:
    """The reason why an open file would not be read as it is, or "". data: the whole file"""
    if not MIN_RATE <= file.samplerate <= MAX_RATE:
        return f"its header states {file.samplerate} Hz, not {MIN_RATE} to {MAX_RATE} Hz"
    if file.frames == 0:
        return f"the clip has no samples by its header, but {len(data)} bytes; {CONVERT}"
    if file.format == "OGG" and data.count(b"OggS\0\2") > 1:  # first pages of a stream
        return f"several Ogg files in one, of which only the first could be read; {CONVERT}"
    if file.format != "MP3" and (file.frames >= UNKNOWN or "MPEG" in file.subtype):
        return f"a {file.format} file ({file.subtype}) that does not state its length; {CONVERT}"
    nist = re.match(rb"NIST_1A.{,1000}?sample_count -i (\d+)", data, re.DOTALL)
    is_cut = nist and int(nist[1]) > file.frames
    for stated, present in re.findall(DATA_SIZE, file.extra_info):
        is_cut = is_cut or int(present) < int(stated) < 0x7FFF0000  # larger: it was not known
    return "cut short: its header states more samples than the file has" if is_cut else ""


def read_blocks(path: Path, file: soundfile.SoundFile) -> Iterator[Tensor]:
    """Decode an open file until no samples are left. Yields (samples, channels)."""
    n = 0
    try:
        while len(block := file.read(BLOCK, "float32", always_2d=True)):
            yield torch.from_numpy(block)
            n += len(block)
    except soundfile.LibsndfileError as error:
        raise AudioError(path, f"the data is damaged ({error.error_string})") from error
    if n < file.frames < UNKNOWN:
        raise AudioError(path, f"cut short, {n} of {file.frames} samples are there")
    rest = file.name.read()  # file.name is what was opened: the bytes
    if file.format == "MP3" and len(rest) > 512 and is_mp3(rest):
        raise AudioError(path, f"several mp3 files in one, or damaged; {CONVERT}")


def is_mp3(data: bytes) -> bool:
    """Whether bytes are an mp3. Tags are not and one frame of padding is not."""
    try:
        return len(open_bytes(MP3_FRAME + data).read(4096)) == 4096
    except soundfile.LibsndfileError:
        return False


def audio_seconds(path) -> float:
    """Length of a clip. Only a file that does not state its length is decoded."""
    with open_audio(path := Path(path)) as file:
        if file.frames < UNKNOWN:
            return file.frames / file.samplerate
        return sum(len(block) for block in read_blocks(path, file)) / file.samplerate


def load_audio(path) -> Tensor:
    """Decode a sound file to (N,) at 16 kHz, mono, full scale 1."""
    blocks, power, mono_power = [], 0.0, 0.0
    with open_audio(path := Path(path)) as file:
        for block in read_blocks(path, file):
            mono = block.mean(dim=1)
            blocks.append(mono)
            power += block.square().mean(dim=1).sum()
            mono_power += mono.square().sum()
    if not blocks:
        raise AudioError(path, "the clip has no samples")
    if mono_power < MIN_MONO * power:
        raise AudioError(path, "its channels cancel each other (opposite phase); keep one of them")
    audio = torch.cat(blocks)  # (N,)
    peak = audio.norm(torch.inf)  # also of samples that are not numbers
    if not peak <= MAX_PEAK:  # for example 16-bit integers, stored as floats
        raise AudioError(path, f"samples are not numbers or too large: {peak:g}; full scale is 1")
    del blocks, block, mono
    return resample(audio, file.samplerate, SAMPLE_RATE)


ZEROS = 48  # zero crossings of the sinc on each side; more make the cut-off steeper
KAISER_BETA = 8.0  # shape of the window; attenuation above the cut-off is about 80 dB
ROLLOFF = 0.945  # middle of the transition, as a share of the lower Nyquist frequency
PHASES = 32  # output samples that one matrix product computes from one window of the input
ROWS = 1024  # windows of the input that are copied at once


@lru_cache(maxsize=512)
def sinc_filters(cutoff: float, from_step: int, to_step: int, first: int) -> Tensor:
    """Low-pass filters for the output samples from first on. -> (width, PHASES or fewer)

    A column is the filter of one output sample. All columns start at the same input sample.
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

    Frequencies above the lower of the two Nyquist frequencies are removed: there is no aliasing.
    Each from_step input samples become to_step output samples. So every to_step-th output sample
    has the same filter, and its windows of the input are from_step apart: a strided convolution.
    """
    if from_rate == to_rate:
        return audio
    divisor = math.gcd(from_rate, to_rate)
    from_step, to_step = from_rate // divisor, to_rate // divisor
    repeat = math.ceil(PHASES / to_step)  # 48 kHz -> 16 kHz is 3 : 1, but 96 : 32 is faster
    from_step, to_step = from_step * repeat, to_step * repeat
    cutoff = ROLLOFF * min(1, to_step / from_step)  # as a share of the input's Nyquist frequency
    reach = math.ceil(ZEROS / cutoff)  # input samples that a filter uses on each side

    n_rows = math.ceil(len(audio) / from_step)
    padded = F.pad(audio, (reach, reach + n_rows * from_step - len(audio)))
    result = torch.empty(n_rows, to_step, dtype=audio.dtype)
    for first in range(0, to_step, PHASES):
        filters = sinc_filters(cutoff, from_step, to_step, first).double()
        windows = padded[first * from_step // to_step :].unfold(0, len(filters), from_step)
        for row in range(0, n_rows, ROWS):  # a few at a time, because their copy is large
            rows = slice(row, min(row + ROWS, n_rows))
            result[rows, first : first + PHASES] = windows[rows].double() @ filters
    return result.flatten()[: math.ceil(len(audio) * to_step / from_step)]


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
