"""One sentence, spoken by espeak-ng: a voice, a speed, a pitch, and a little noise.

Only scripts of this folder use it. Training and translating never need espeak-ng.
"""

import io
import random
import subprocess
import sys
from pathlib import Path

import numpy as np
import soundfile
import torch
from torch import Tensor

sys.path.insert(0, str(Path(__file__).parents[1]))
from whisper_encoder import SAMPLE_RATE, resample  # noqa: E402

# "fr", not "fr-fr": espeak-ng silently ignores a variant on an alias.
ACCENTS = {"fr": ("fr", "fr-be", "fr-ch"), "de": ("de",), "es": ("es", "es-419")}

# Variants of espeak-ng. A variant changes the voice in every language. No variant is in two splits,
# and variants with similar names (edward, edward2) are in the same split.
VOICES = {
    "test": "Andrea Hugo benjamin f2 m3 rob".split(),
    "dev": "Mike linda michel".split(),
    "train": (
        "Alex Annie Denis gustave Marco adam aunty f4 m1 m7 marcelo shelby travis victor"
    ).split(),
}


def check_voice(voice: str):
    """Raise ValueError if espeak-ng does not have the variant. It then speaks without it."""
    accent, _, _ = voice.partition("+")
    if espeak("a e i o u", voice) == espeak("a e i o u", accent):
        raise ValueError(f"espeak-ng speaks {voice} like {accent}: the variant is lost; check it")


def espeak(text: str, voice: str, speed: int = 175, pitch: int = 50) -> bytes:
    """A wav file. `voice` is accent+variant, `speed` is in words per minute."""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", "--", text]
    return subprocess.run(command, capture_output=True, check=True).stdout


def speak(text: str, voice: str, speed: int, pitch: int) -> Tensor:
    """The speech of espeak-ng without the silence before and after it. -> (N,)"""
    samples, rate = soundfile.read(io.BytesIO(espeak(text, voice, speed, pitch)), dtype="float32")
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    margin = rate // 20  # keep 50 ms on both sides
    samples = samples[max(0, loud[0] - margin) : loud[-1] + margin]
    return resample(torch.from_numpy(samples.copy()), rate, SAMPLE_RATE)


def recording(text: str, language: str, split: str, rng: random.Random) -> tuple[Tensor, str]:
    """A clip with weak noise, and the variant of its voice. -> (N,) between -1 and 1"""
    variant, accent = rng.choice(VOICES[split]), rng.choice(ACCENTS[language])
    voice = f"{accent}+{variant}"
    check_voice(voice)
    audio = speak(text, voice, rng.randint(145, 200), rng.randint(30, 70))
    noise = torch.randn(audio.shape, generator=torch.Generator().manual_seed(rng.getrandbits(40)))
    audio = audio / audio.abs().max() + noise * 10 ** rng.uniform(-3.5, -2)
    return audio / audio.abs().max() * rng.uniform(0.3, 0.9), variant


def write_opus(file, audio: Tensor):
    """Write Opus in an Ogg file, about 2.6 kB per second: small, and of good quality for speech."""
    soundfile.write(
        file, audio.numpy(), SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=0.95
    )
