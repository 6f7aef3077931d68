"""One sentence, spoken: espeak-ng, a voice, a speed, a pitch, and a little noise.

Used by make_corpus.py and make_encoder.py only; training and translating never need espeak-ng.
No voice of one group is in another, and families of voices (edward, edward2) stay together.
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
from data import SAMPLE_RATE, resample  # noqa: E402

ACCENTS = {"fr": ("fr-fr", "fr-be", "fr-ch"), "de": ("de",), "es": ("es", "es-419")}

VOICES = {  # espeak-ng's variants: the shape of a mouth, laid over any language
    "test": "Andrea Hugo benjamin f2 m3 rob".split(),
    "dev": "Mike linda michel".split(),
    "train": (
        "Alex Annie Denis Gustave Marco adam aunty f4 m1 m7 marcelo shelby travis victor"
    ).split(),
    "pretrain": (
        "Alicia Andy Diogo Gene Gene2 Henrique Jacky Lee Mario Michael Nguyen anika antonio "
        "belinda boris caleb david ed edward edward2 f1 f3 f5 grandma grandpa iven iven2 iven3 "
        "iven4 john klatt m2 m4 m5 m6 m8 max miguel norbert pablo paul pedro quincy robert sandro "
        "steph steph2 steph3 zac"
    ).split(),
}


def speak(text: str, voice: str, speed: int, pitch: int) -> Tensor:
    """espeak-ng's speech, without the silence around it. speed in words a minute -> (N,) 16 kHz"""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout", "--", text]
    wav = subprocess.run(command, capture_output=True, check=True).stdout
    samples, rate = soundfile.read(io.BytesIO(wav), dtype="float32")
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    around = rate // 20  # keep 50 ms on either side
    samples = samples[max(0, loud[0] - around) : loud[-1] + around]
    return resample(torch.from_numpy(samples.copy()), rate, SAMPLE_RATE)


def recording(text: str, language: str, group: str, rng: random.Random) -> tuple[Tensor, str]:
    """A clip as a microphone would give it, and the name of its voice. -> (N,) within -1..1"""
    variant = rng.choice(VOICES[group])
    accent = rng.choice(ACCENTS[language])
    audio = speak(text, f"{accent}+{variant}", rng.randint(145, 200), rng.randint(30, 70))
    noise = torch.randn(audio.shape, generator=torch.Generator().manual_seed(rng.getrandbits(40)))
    audio = audio / audio.abs().max() + noise * 10 ** rng.uniform(-3.5, -2)
    return audio / audio.abs().max() * rng.uniform(0.3, 0.9), variant


def write_opus(file, audio: Tensor):
    """Opus in an Ogg file, about 2.6 kB a second: small, and of good quality for speech."""
    soundfile.write(
        file, audio.numpy(), SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=0.95
    )
