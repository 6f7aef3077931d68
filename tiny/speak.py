"""One sentence, spoken: espeak-ng, a voice, a speed, a pitch, and a little noise.

Only make_corpus.py uses it. Training and translating never need espeak-ng.
No voice of one group is in another, and families of voices (edward, edward2) stay together.
"""

import io
import os
import random
import re
import shutil
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

VOICES = {  # espeak-ng's variants: the shape of a mouth, laid over any language
    "test": "Andrea Hugo benjamin f2 m3 rob".split(),
    "dev": "Mike linda michel".split(),
    "train": (
        "Alex Annie Denis gustave Marco adam aunty f4 m1 m7 marcelo shelby travis victor"
    ).split(),
    "pretrain": (
        "Alicia Andy Diogo Gene Gene2 Henrique Jacky Lee Mario Michael Nguyen anika antonio "
        "belinda boris caleb david ed edward edward2 f1 f3 f5 grandma grandpa iven iven2 iven3 "
        "iven4 john klatt m2 m4 m5 m6 m8 max miguel norbert pablo paul pedro quincy robert sandro "
        "steph steph2 steph3 zac"
    ).split(),
}
INVENTED = Path(__file__).parent / "build" / "espeak-ng-data"  # a copy, for variants of our own


def make_room_for_inventions():
    """Copy espeak-ng's data without its own variants: it lists at most 349 voices in all."""
    version = subprocess.run(["espeak-ng", "--version"], capture_output=True, text=True).stdout
    shutil.rmtree(INVENTED, ignore_errors=True)
    shutil.copytree(re.search(r"Data at: (.*)", version)[1].strip(), INVENTED)
    shutil.rmtree(INVENTED / "voices" / "!v")
    (INVENTED / "voices" / "!v").mkdir()


def invented_voice(rng: random.Random) -> str:
    """Write a variant with a throat, a mouth and a melody drawn by chance; returns its name."""
    between, maybe = rng.uniform, lambda share: rng.random() < share
    low = between(60, 210)
    size = between(90, 114) if low < 150 else between(97, 120)  # a high voice has a short throat
    lines = ["language variant", f"pitch {low:.0f} {low * between(1.15, 1.7):.0f}"]
    for i in range(9):
        place, strength, width = size * between(0.95, 1.05), between(60, 130), between(60, 160)
        lines.append(f"formant {i} {place:.0f} {strength:.0f} {width:.0f}")
    lines.append(f"voicing {between(50, 180):.0f}")
    lines.append(f"consonants {between(50, 130):.0f} {between(50, 130):.0f}")
    lines.append(f"flutter {rng.randint(0, 6)}")
    lines.append(f"roughness {rng.randint(0, 4)}")
    if maybe(0.3):
        lines.append(f"echo {rng.randint(20, 140)} {rng.randint(5, 15)}")
    if maybe(0.3):
        lines.append("breath 0" + "".join(f" {rng.randint(0, 6)}" for _ in range(7)))
    if maybe(0.5):
        bands = ((hz * between(0.7, 1.3), between(40, 255)) for hz in (150, 600, 1500, 3000))
        lines.append("tone" + "".join(f" {hz:.0f} {height:.0f}" for hz, height in bands))
    if maybe(0.25):
        lines.append(f"klatt {rng.randint(1, 6)}")
    if maybe(0.5):
        lines.append(f"intonation {rng.randint(1, 4)}")
    for name, usual, spread in (
        ("stressAdd", (0, 0, 0, 0, 0, 0, 20, 60), 25),
        ("stressAmp", (18, 18, 20, 20, 20, 22, 22, 20), 3),
    ):
        if maybe(0.5):
            lines.append(name + "".join(f" {u + rng.randint(-spread, spread)}" for u in usual))
    name = f"invented{os.getpid()}"  # overwritten by this process's next voice
    (INVENTED / "voices" / "!v" / name).write_text("\n".join(lines) + "\n")
    return name


def espeak(text: str, voice: str, speed: int = 175, pitch: int = 50) -> bytes:
    """-> a WAV file; voice is accent+variant"""
    command = ["espeak-ng", "-v", voice, "-s", str(speed), "-p", str(pitch), "--stdout"]
    if "+invented" in voice:
        command += ["--path", str(INVENTED.parent)]
    return subprocess.run([*command, "--", text], capture_output=True, check=True).stdout


def check_voice(voice: str):
    """Make sure that the variant is heard: espeak-ng silently speaks without one it cannot find."""
    accent, _, _ = voice.partition("+")
    if espeak("a e i o u", voice) == espeak("a e i o u", accent):
        raise ValueError(f"espeak-ng speaks {voice} as it speaks {accent}: the variant is lost")


def speak(text: str, voice: str, speed: int, pitch: int) -> Tensor:
    """espeak-ng's speech, without the silence around it. speed in words a minute -> (N,) 16 kHz"""
    samples, rate = soundfile.read(io.BytesIO(espeak(text, voice, speed, pitch)), dtype="float32")
    loud = np.flatnonzero(np.abs(samples) > 0.01)
    around = rate // 20  # keep 50 ms on either side
    samples = samples[max(0, loud[0] - around) : loud[-1] + around]
    return resample(torch.from_numpy(samples.copy()), rate, SAMPLE_RATE)


def recording(text: str, language: str, group: str, rng: random.Random) -> tuple[Tensor, str]:
    """A clip as a microphone would give it, and the name of its voice. -> (N,) within -1..1"""
    variant = invented_voice(rng) if group == "invented" else rng.choice(VOICES[group])
    accent = rng.choice(ACCENTS[language])
    check_voice(f"{accent}+{variant}")
    audio = speak(text, f"{accent}+{variant}", rng.randint(145, 200), rng.randint(30, 70))
    noise = torch.randn(audio.shape, generator=torch.Generator().manual_seed(rng.getrandbits(40)))
    audio = audio / audio.abs().max() + noise * 10 ** rng.uniform(-3.5, -2)
    return audio / audio.abs().max() * rng.uniform(0.3, 0.9), variant


def write_opus(file, audio: Tensor):
    """Opus in an Ogg file, about 2.6 kB a second: small, and of good quality for speech."""
    soundfile.write(
        file, audio.numpy(), SAMPLE_RATE, format="OGG", subtype="OPUS", compression_level=0.95
    )
