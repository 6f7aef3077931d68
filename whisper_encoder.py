"""Whisper's encoder: sound file -> waveform -> log-mel spectrogram -> one state per 20 ms.

    waveform (N,) -> log-mel (M, 2S) -> two convolutions, the second with stride 2 -> states (S, Da)

A state is the vector of Da numbers that the encoder computes for 20 ms of sound. The decoder of a
Whisper checkpoint is not loaded, because the LLM takes its place. At the first reading, skip the
part "sound file -> waveform": it reads many file formats and changes the sample rate to 16 kHz.

Paper: Whisper (2212.04356). The formulas are those of openai/whisper (audio.py, model.py). The
modules have the names of transformers' WhisperEncoder, so its weights can be loaded, and the
results are the same. A clip gets the same states, up to rounding, by itself and in a batch. For
both see tests/test_whisper_encoder.py.

Sizes: B batch, N samples, M mel bins, S states, n states that the caller needs (the first n of S),
Da width, H heads, Dh head width.
"""

import io
import json
import math
import os
import re
import unicodedata
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache, update_wrapper
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
SAMPLES_PER_STATE = 2 * HOP  # 20 ms: the second convolution of the encoder has stride 2
MAX_SECONDS = 30  # Whisper was trained on windows of this length
MAX_SAMPLES = MAX_SECONDS * SAMPLE_RATE
WINDOWS = ("30s", "clip")  # pad each clip to 30 s, or only to a whole number of states


# --------------------------------------------------------------------------- sound file -> waveform

# The samples of a normal recording are between -1 and 1. Above 32, the file is broken or its
# samples have another scale.
MAX_PEAK = 32
MIN_RATE, MAX_RATE = 1_000, 400_000  # samples per second
# In libsndfile, a frame is one sample of every channel. A file with this number of frames or more
# does not say its length.
MAX_FRAMES = 1 << 40
CONVERT = "convert it with ffmpeg -i FILE OUTPUT.flac"


class AudioError(ValueError):
    """A clip that cannot be used, with its path and the reason."""

    def __init__(self, path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


class BytesWithHugeSize(io.BytesIO):
    """The bytes of an mp3 file, with a size that is far too large.

    An mp3 file often does not say how long it is. Then libsndfile guesses the length from the size
    of the file and stops there, so it may stop before the end. If the file looks very large,
    libsndfile reads until there are no more bytes.
    """

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        if (offset, whence) == (0, os.SEEK_END):  # libsndfile does this to get the size
            return super().seek(1 << 60)
        return super().seek(offset, whence)


# The header of an mp3 frame (a few hundred samples that are coded together). In front of other
# bytes it makes libsndfile treat them as mp3.
MP3_FRAME = b"\xff\xfb\x90\0"
# An mp3 file may begin with a silent frame that says how many frames follow. It is a frame header
# (4 bytes), perhaps a checksum (2), zeros (9, 17 or 32), "Xing" or "Info", and flags (4). The last
# bit of the flags must be 1: the number of frames is present.
XING = rb"(?s)\xff[\xe2-\xff]..(..)?(\0{9}|\0{17}|\0{32})(Xing|Info)\0\0\0[\1\3\5\7\t\v\r\x0f]"
# libsndfile writes such a line to its log if the size in the header is not the size in the file:
# "data : 64000 (should be 32000)".
DATA_SIZE = r"(?:data|SSND|Data Size|riff|Riff size) *: (\d+) \(should be (\d+)\)"


def open_bytes(data: bytes) -> soundfile.SoundFile:
    """Open the bytes of a sound file.

    In the result, file.frames is the exact number of samples, or more than MAX_FRAMES if the
    length is not known.
    """
    raw = io.BytesIO(data)
    file = soundfile.SoundFile(raw)
    tags_and_first_frame = data[: raw.tell()]  # libsndfile has read this far
    if file.format == "MP3" and not re.search(XING, tags_and_first_frame):
        return soundfile.SoundFile(BytesWithHugeSize(data))
    return file


def open_audio(path: Path) -> soundfile.SoundFile:
    """Open a sound file. Raise AudioError if it cannot be read to its end."""
    # In Python 3.11, Path.is_file raises an error if the name is too long. This returns False.
    if not os.path.isfile(path):
        # A letter such as é can be one character (NFC) or two (NFD, common on macOS).
        names = [path.parent / unicodedata.normalize(form, path.name) for form in ("NFC", "NFD")]
        hint = "; the same name in the other Unicode form exists: rename it"
        raise AudioError(path, "no such file" + (hint if any(map(os.path.isfile, names)) else ""))
    try:
        data = path.read_bytes()
        # Some mp3 files begin with other bytes. With a frame header in front, libsndfile searches
        # for the next frame. The pattern matches the files that stay as they are: empty files ($),
        # mp3 files that begin with a tag or a frame, and wav, ogg, flac or aiff files.
        if path.suffix.lower() == ".mp3" and not re.match(rb"$|ID3|\xff|RIFF|OggS|fLaC|FORM", data):
            data = MP3_FRAME + data
        file = open_bytes(data)
    except (OSError, soundfile.LibsndfileError) as error:
        reason = getattr(error, "strerror", f"not a format that libsndfile can read; {CONVERT}")
        raise AudioError(path, reason if path.stat().st_size else "the file is empty") from error
    if fault := find_fault(file, data):
        raise AudioError(path, fault)
    return file


def find_fault(file: soundfile.SoundFile, data: bytes) -> str:
    """Return why a file cannot be read completely, or "". `data` is the content of the file."""
    if not MIN_RATE <= file.samplerate <= MAX_RATE:
        return f"the sample rate is {file.samplerate} Hz; it must be {MIN_RATE} to {MAX_RATE} Hz"
    if file.format == "OGG" and data.count(b"OggS\0\2") > 1:  # first page of a stream
        return f"the file contains several Ogg streams, only the first can be read; {CONVERT}"
    if file.format != "MP3" and (file.frames >= MAX_FRAMES or "MPEG" in file.subtype):
        return f"a {file.format} file ({file.subtype}) that does not say its length; {CONVERT}"
    for stated, present in re.findall(DATA_SIZE, file.extra_info):
        # A program that writes to a pipe does not know the size. It writes a number of at least
        # 0x7FFF0000 instead. Such a file is not cut.
        if int(present) < int(stated) < 0x7FFF0000:
            return f"cut short: {present} of {stated} bytes of sound are there; copy it again"
    return ""


def read_blocks(path: Path, file: soundfile.SoundFile):
    """Decode an open file to its end. Yields blocks (samples, channels)."""
    n = 0
    try:
        while len(block := file.read(1 << 16, "float32", always_2d=True)):
            yield torch.from_numpy(block)
            n += len(block)
    except soundfile.LibsndfileError as error:
        raise AudioError(path, f"the data is damaged ({error.error_string})") from error
    if file.frames < MAX_FRAMES and n != file.frames:
        raise AudioError(path, f"cut or damaged, has {n} of {file.frames} samples; copy it again")
    # The bytes after the last sample. At most 512 bytes are a tag or padding, not a second mp3.
    rest = file.name.read()  # file.name is the BytesIO that was opened
    if file.format == "MP3" and len(rest) > 512 and is_mp3(rest):
        raise AudioError(path, f"it contains several mp3 files, or it is damaged; {CONVERT}")


def is_mp3(data: bytes) -> bool:
    """Return True if mp3 frames can be decoded from these bytes.

    Tags (title, artist) and padding give fewer than 4096 samples.
    """
    try:
        return len(open_bytes(MP3_FRAME + data).read(4096)) == 4096
    except soundfile.LibsndfileError:
        return False


def in_thread(read):
    """Return a function that calls `read` in another thread.

    libsndfile calls Python code to get the bytes of a file, and an error inside such a call is
    lost. Ctrl-C raises KeyboardInterrupt, but only in the main thread. So it is never raised inside
    such a call.
    """

    def run(path):
        with ThreadPoolExecutor(1) as thread:
            return thread.submit(read, Path(path)).result()

    return update_wrapper(run, read)  # run gets the name and the docstring of read


@in_thread
def audio_seconds(path: Path) -> float:
    """Return the exact length of a clip.

    Most files say their length. Only the others are decoded, to count their samples.
    """
    with open_audio(path) as file:
        n = file.frames if file.frames < MAX_FRAMES else sum(map(len, read_blocks(path, file)))
    return n / file.samplerate


@in_thread
def load_audio(path: Path) -> Tensor:
    """Read a sound file: 16,000 samples per second, mono, normally -1 to 1. -> (N,)"""
    with open_audio(path) as file:
        # A file without samples has no block, but torch.cat needs at least one tensor.
        samples = torch.cat([torch.empty(0, file.channels), *read_blocks(path, file)])
    audio = samples.mean(dim=1)  # (N,)
    if len(audio) == 0:
        raise AudioError(path, "the clip has no samples, or its header says so")
    # The peak is the largest absolute value. In a damaged file it can be NaN or infinite. If 16-bit
    # integers were stored as floats, it can be 32768. `not`, because NaN <= 32 is False.
    if not (peak := samples.norm(torch.inf)) <= MAX_PEAK:
        raise AudioError(path, f"samples must be from -1 to 1, but the largest is {peak:g}")
    # If the left channel is minus the right one, their mean is almost silent. Here it has less than
    # 1/1000 of the energy of a channel.
    if audio.norm() ** 2 < 1e-3 * samples.norm() ** 2 / file.channels:
        raise AudioError(path, "its channels cancel each other (opposite phase); keep one of them")
    del samples  # resample needs the memory
    return resample(audio, file.samplerate, SAMPLE_RATE)


# Resampling changes the sample rate. Each new sample is a weighted sum of the old samples near it.
# The weights are a sinc function. It is the ideal low-pass filter: it keeps all frequencies below a
# cut-off and removes those above it. A sinc never ends, so a Kaiser window fades it out. The
# Nyquist frequency is half of the sample rate: samples cannot represent higher frequencies.
ZEROS = 48  # zero crossings of the sinc on each side; more of them make the cut-off steeper
KAISER_BETA = 8.0  # a larger value removes more above the cut-off, but makes it less steep
ROLLOFF = 0.945  # the cut-off, as a share of the lower of the two Nyquist frequencies
OUTPUTS_PER_WINDOW = 32  # output samples that are computed from the same slice of the input
WINDOWS_PER_PRODUCT = 1024  # slices of the input in one matrix product


@lru_cache(maxsize=512)
def sinc_filters(cutoff: float, from_step: int, to_step: int, first: int) -> Tensor:
    """Return the weights of the output samples from `first` on. -> (width, OUTPUTS_PER_WINDOW)

    Column j has the weights of output sample first + j. All columns belong to the same slice of the
    input. The next output sample has a later place in this slice. So the weights of column j + 1
    begin at the same row as those of column j, or at a later row. The last group of output samples
    can have fewer columns.
    """
    reach = math.ceil(ZEROS / cutoff)  # input samples with a weight, on each side of the centre
    # The place of each output sample in the input. The unit is 1 / to_step of an input sample.
    position = torch.arange(first, min(first + OUTPUTS_PER_WINDOW, to_step)) * from_step
    centre = position // to_step  # last input sample before each output sample
    width = 2 * reach + 1 + int(centre[-1] - centre[0])
    # Distance of each input sample (row) from the centre of each output sample (column).
    tap = torch.arange(width)[:, None] - reach + centre[0] - centre
    # Distance from the exact place of the output sample, in zero crossings of the sinc.
    t = cutoff * (tap - (position % to_step).double() / to_step)
    kaiser = torch.special.i0(KAISER_BETA * (1 - (t / ZEROS) ** 2).clamp(min=0).sqrt())
    kaiser = kaiser / torch.special.i0(torch.tensor(KAISER_BETA))
    return torch.where(tap.abs() <= reach, cutoff * torch.sinc(t) * kaiser, 0)


def resample(audio: Tensor, from_rate: int, to_rate: int) -> Tensor:
    """Change the sample rate of a waveform. (N,) -> (ceil(N * to_rate / from_rate),)

    It removes frequencies above the lower of the two Nyquist frequencies. Otherwise they would be
    changed into wrong, lower frequencies (aliasing).

    from_step input samples become to_step output samples (44.1 kHz: 441 become 160). So output
    samples i and i + to_step use the same weights, and there are only to_step different filters.
    The input is cut into windows, one every from_step samples. A matrix product multiplies many
    windows by the filters. It is computed in float64, because each sum has many terms.
    """
    if from_rate == to_rate:
        return audio
    divisor = math.gcd(from_rate, to_rate)
    # 48 kHz -> 16 kHz is 3 : 1, one output for each window. Steps of 96 and 32 give 32 outputs for
    # each window. These are fewer and larger products, which are faster.
    repeat = math.ceil(OUTPUTS_PER_WINDOW * divisor / to_rate)
    from_step, to_step = (rate // divisor * repeat for rate in (from_rate, to_rate))
    cutoff = ROLLOFF * min(1, to_step / from_step)  # as a share of the input's Nyquist frequency
    reach = math.ceil(ZEROS / cutoff)  # as in sinc_filters

    n_windows = math.ceil(len(audio) / from_step)
    padded = F.pad(audio, (reach, reach + n_windows * from_step - len(audio)))
    result = torch.empty(n_windows, to_step, dtype=audio.dtype)
    for first in range(0, to_step, OUTPUTS_PER_WINDOW):
        filters = sinc_filters(cutoff, from_step, to_step, first)
        windows = padded[first * from_step // to_step :].unfold(0, len(filters), from_step)
        # Windows overlap, so a copy of all of them would be much larger than the clip.
        for start in range(0, n_windows, WINDOWS_PER_PRODUCT):
            part = slice(start, min(start + WINDOWS_PER_PRODUCT, n_windows))
            result[part, first : first + OUTPUTS_PER_WINDOW] = windows[part].double() @ filters
    return result.flatten()[: math.ceil(len(audio) * to_step / from_step)]


# ------------------------------------------------------------------------------ waveform -> log-mel


@lru_cache
def mel_filters(n_mels: int, device="cpu") -> Tensor:
    """Return the weights that sum Fourier bins into mel bins. -> (M, N_FFT/2 + 1)

    The mel scale has small steps at low frequencies and large steps at high frequencies, like human
    hearing. This one is Slaney's: linear below 1 kHz, logarithmic above. The weights of a mel bin
    are a triangle, and all triangles have the same area. tests/test_whisper_encoder.py compares the
    resulting spectrogram with that of transformers.
    """
    linear_step = 200 / 3  # Hz per mel below 1 kHz
    log_step = math.log(6.4) / 27  # 27 mels from 1 kHz to 6.4 kHz, in equal ratios
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
    return (triangles * 2 / (right - left)).float().to(device)


def log_mel_spectrogram(audio: Tensor, n_mels: int) -> Tensor:
    """Return the log-mel spectrogram that Whisper reads. (..., N) -> (..., M, N // HOP)

    It is the logarithm of the energy in each mel bin, every 10 ms. The sounds of speech differ in
    these energies, and there are fewer of them than samples.

    Values more than 80 dB below the maximum of the same waveform are raised to that limit. Each
    waveform of a batch has its own maximum, so the other waveforms change nothing.
    """
    window = torch.hann_window(N_FFT, device=audio.device)
    spectrum = torch.stft(audio, N_FFT, HOP, window=window, return_complex=True)
    spectrum = spectrum[..., :-1]  # Whisper leaves out the last frame, centred at the end
    power = spectrum.real**2 + spectrum.imag**2
    mel = mel_filters(n_mels, audio.device) @ power

    log = mel.clamp(min=1e-10).log10()
    maximum = log.amax(dim=(-2, -1), keepdim=True)
    log = torch.maximum(log, maximum - 8)  # 8 in log10 of the power is 80 dB
    return (log + 4) / 4  # Whisper's scaling


def n_states(n_samples: int) -> int:
    """Return the number of encoder states of a clip: one for every 20 ms, rounded up."""
    return math.ceil(n_samples / SAMPLES_PER_STATE)


def clip_to_mel(audio: Tensor, n_mels: int, window: str) -> Tensor:
    """Log-mel spectrogram of one clip, padded with silence. (N,) -> (M, 2S)

    window "30s" pads to 30 s, as in Whisper's training. "clip" pads with less than 20 ms, to a
    whole number of states, so a short clip needs much less work.
    """
    if window not in WINDOWS:
        raise ValueError(f"window is {window!r}; use one of {WINDOWS}")
    if not 0 < len(audio) <= MAX_SAMPLES:
        raise ValueError(f"the clip has {len(audio):,} samples; use 1 to {MAX_SAMPLES:,} (30 s)")
    length = MAX_SAMPLES if window == "30s" else n_states(len(audio)) * SAMPLES_PER_STATE
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
        """Read config.json.

        Raises ValueError for a missing or wrong value, and for an option that this file does not
        implement.
        """
        raw = read_json(Path(path))
        for name, value in (("activation_function", "gelu"), ("scale_embedding", False)):
            if raw.get(name, value) != value:
                raise ValueError(f"{path}: {name} is {raw[name]!r}; only {value!r} is supported")
        for name in cls.__dataclass_fields__:
            if type(raw.get(name)) is not int or not 0 < raw[name] <= 100_000:
                raise ValueError(f"{path} has no valid {name} (int), found {raw.get(name)!r:.40}")
        config = cls(**{name: raw[name] for name in cls.__dataclass_fields__})
        if config.d_model % config.encoder_attention_heads or config.encoder_layers > 1000:
            raise ValueError(f"{path}: heads must divide d_model, at most 1000 layers: {config}")
        return config


class SelfAttention(nn.Module):
    """Each state attends to all states of its clip, but not to padding. (B, S, Da) -> (B, S, Da)

    can_attend (B, 1, 1, S) is True at real states and False at padding. None means no padding.
    If n is given, only the first n states are computed: (B, n, Da). See WhisperEncoder.forward.
    """

    def __init__(self, config: WhisperConfig):
        super().__init__()
        Da = config.d_model
        self.n_heads = config.encoder_attention_heads
        self.q_proj = nn.Linear(Da, Da)
        # A bias of the keys would add the same number to all scores of a query. Softmax ignores
        # such a number, so the bias would have no effect.
        self.k_proj = nn.Linear(Da, Da, bias=False)
        self.v_proj = nn.Linear(Da, Da)
        self.out_proj = nn.Linear(Da, Da)

    def forward(self, x: Tensor, can_attend: Tensor | None, n: int | None = None) -> Tensor:
        B, S, Da = x.shape
        H = self.n_heads
        q = self.q_proj(x[:, :n]).view(B, -1, H, Da // H).transpose(1, 2)  # (B, H, n, Dh)
        k = self.k_proj(x).view(B, S, H, Da // H).transpose(1, 2)  # (B, H, S, Dh)
        v = self.v_proj(x).view(B, S, H, Da // H).transpose(1, 2)  # (B, H, S, Dh)
        if x.device.type == "cpu" and torch.is_grad_enabled():
            # On a CPU, the backward pass of attention is much slower in bfloat16 than in float32.
            q, k, v = q.float(), k.float(), v.float()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=can_attend)  # (B, H, n, Dh)
        return self.out_proj(y.transpose(1, 2).flatten(2).to(x.dtype))  # (B, n, Da)


class EncoderLayer(nn.Module):
    """Attention, then an MLP. Each reads normalized states and adds its result to them.

    If n is given, only the first n states are computed and returned.
    """

    def __init__(self, config: WhisperConfig):
        super().__init__()
        Da = config.d_model
        self.self_attn = SelfAttention(config)
        self.self_attn_layer_norm = nn.LayerNorm(Da)
        self.fc1 = nn.Linear(Da, config.encoder_ffn_dim)
        self.fc2 = nn.Linear(config.encoder_ffn_dim, Da)
        self.final_layer_norm = nn.LayerNorm(Da)  # before the MLP; checkpoints use this name

    def forward(self, x: Tensor, can_attend: Tensor | None, n: int | None = None) -> Tensor:
        x = x[:, :n] + self.self_attn(self.self_attn_layer_norm(x), can_attend, n)  # (B, n, Da)
        return x + self.fc2(F.gelu(self.fc1(self.final_layer_norm(x))))


class WhisperEncoder(nn.Module):
    """The encoder of Whisper. The modules have the names that checkpoints use."""

    def __init__(self, config: WhisperConfig):
        super().__init__()
        self.config = config
        M, Da = config.num_mel_bins, config.d_model
        self.conv1 = nn.Conv1d(M, Da, kernel_size=3, padding=1)
        self.conv2 = nn.Conv1d(Da, Da, kernel_size=3, padding=1, stride=2)
        self.embed_positions = nn.Embedding(config.max_source_positions, Da)
        self.layers = nn.ModuleList(EncoderLayer(config) for _ in range(config.encoder_layers))
        self.layer_norm = nn.LayerNorm(Da)
        # Activation checkpointing: run each layer again in the backward pass, to save memory.
        self.recompute = False

    def forward(self, mel: Tensor, lengths: Tensor | None = None, n: int | None = None) -> Tensor:
        """Encode log-mel spectrograms: (B, M, 2S) -> (B, S, Da).

        lengths (B,) is the number of real states of each clip, on the CPU, because a decision
        depends on it. None means that no clip is padded.
        Do not use the states after the length of a clip. They do not change its other states.

        If n is given, the last layer computes only the first n states: (B, n, Da). They still
        attend to all S. For a short clip in a window of 30 s this saves most of that layer's work.
        """
        S, max_S = mel.shape[2] // 2, self.config.max_source_positions
        if S > max_S:
            raise ValueError(f"a clip has {S} states; this encoder takes {max_S}: split the clip")
        can_attend = None
        if lengths is not None and (lengths < S).any():  # attention is faster without a mask
            is_real = (torch.arange(S) < lengths[:, None]).to(mel.device, non_blocking=True)
            can_attend = is_real[:, None, None]  # (B, 1, 1, S)
            # The first convolution reads one frame after the end of a clip. It pads a single clip
            # with zeros there, so in a batch zeros must follow each clip too. The caller can have
            # other values there. The second convolution never reads after the last frame.
            is_frame = is_real.repeat_interleave(2, dim=1)[:, None]  # (B, 1, 2S): 2 per state
            mel = torch.where(is_frame, mel, 0)  # (B, M, 2S)

        x = F.gelu(self.conv1(mel))  # (B, Da, 2S)
        x = F.gelu(self.conv2(x)).transpose(1, 2) + self.embed_positions.weight[:S]  # (B, S, Da)
        for layer in self.layers:
            last_n = n if layer is self.layers[-1] else None
            if self.recompute and torch.is_grad_enabled():
                x = checkpoint(layer, x, can_attend, last_n, use_reentrant=False)
            else:
                x = layer(x, can_attend, last_n)
        return self.layer_norm(x)

    @classmethod
    def from_pretrained(cls, folder, dtype=torch.float32, device="cpu") -> "WhisperEncoder":
        """Read a Hugging Face folder of Whisper with safetensors.

        The files must contain every tensor of the encoder with the right shape. The decoder is not
        loaded.
        """
        folder = Path(folder)
        stored = {}
        for file in weight_files(folder):
            for name, tensor in read_tensors(file).items():
                # model.encoder.conv1.weight -> conv1.weight; some files have no "model."
                name = name.removeprefix("model.")
                if not name.startswith(("decoder.", "proj_out.")):
                    stored[name.removeprefix("encoder.")] = tensor
        config = WhisperConfig.from_json(folder / "config.json")
        with torch.device("meta"):  # a tensor there has a shape, but no memory
            encoder = cls(config)
        check_tensors(encoder.state_dict(), stored, folder)
        # The files are mapped into memory: a tensor is read from the disk only when it is used, for
        # example by a conversion in this line.
        weights = {name: tensor.to(device, dtype) for name, tensor in stored.items()}
        # assign: the tensors become the parameters. They cannot be copied into meta tensors.
        encoder.load_state_dict(weights, assign=True)
        return encoder


# ------------------------------------------------------------------------------------ weight files

# The other files of this repository use these functions too.


def read_json(path: Path) -> dict:
    """Read a JSON file that contains one object, as a dict. Raises ValueError otherwise."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:  # RecursionError: nested too deep
        raise ValueError(f"{path} is not JSON: {error}; download or copy it again") from error
    if not isinstance(value, dict):
        raise ValueError(f"{path} must contain a JSON object, found {value!r:.40}; copy it again")
    return value


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of a Hugging Face folder: one file, or all shards."""
    single, shards = folder / "model.safetensors", sorted(folder.glob("model-*-of-*.safetensors"))
    if not single.is_file() and not shards:
        convert = f"python tools/convert.py whisper|llama {folder} --out FOLDER"
        raise FileNotFoundError(f"{folder} has no model.safetensors; for other weights: {convert}")
    return [single] if single.is_file() else shards


def read_tensors(file: Path) -> dict[str, Tensor]:
    """Return the tensors of a safetensors file by name.

    The file is mapped into memory: the data is read from the disk when a tensor is used.
    """
    try:
        return load_file(file)
    except Exception as error:  # safetensors raises several types for a damaged file
        raise ValueError(f"{file} cannot be read as weights; is it complete? {error!r}") from error


def check_tensors(expected: dict[str, Tensor], stored: dict[str, Tensor], source):
    """Compare the stored tensors with the expected ones.

    Raises ValueError with the differences if names or shapes differ, or if a stored tensor does not
    have floats. `source` is the folder or file for the message.
    """
    wrong = [f"missing: {name}" for name in sorted(expected.keys() - stored.keys())]
    wrong += [f"unexpected: {name}" for name in sorted(stored.keys() - expected.keys())]
    for name in sorted(expected.keys() & stored.keys()):
        shape, tensor = tuple(expected[name].shape), stored[name]
        if tuple(tensor.shape) != shape or not tensor.is_floating_point():
            actual = f"{tuple(tensor.shape)} {tensor.dtype}"
            wrong.append(f"other shape or type: {name} is {actual}, not floats of {shape}")
    if wrong:
        shown = "; ".join([*wrong[:8], "use weights and configuration of the same model"])
        raise ValueError(f"{source}: {len(wrong)} tensors do not fit the configuration: {shown}")
