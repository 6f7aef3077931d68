"""Measure what a trained model of the preset "tiny" understands, and which of its parts it needs.

    python tiny/measure.py                measure tiny/model, and write tiny/results.json
    python tiny/measure.py --speak        make the clips in voices/ again; needs espeak-ng

tiny/tables.py writes the results into tiny/README.md. The measurements:

1. BLEU on other sound: other voices, noise, mp3, a telephone.
2. BLEU if the LLM gets only a part of the states, and if the LoRA of one model is switched off.
3. How well the score separates translations of the test clips from answers to silence, to noise,
   and to sentences outside the phrasebook.
"""

import argparse
import json
import shutil
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path

import soundfile
import torch
from safetensors import safe_open
from torch import Tensor

from speak import VOICES, speak, write_opus

TINY = Path(__file__).resolve().parent
sys.path.insert(0, str(TINY.parent))
from data import Row, read_corpus, read_table, write_table  # noqa: E402
from llast import LLaST, pick_device  # noqa: E402
from lora import lora_layers, merge_lora  # noqa: E402
from translate import SearchOptions, score, translate  # noqa: E402
from whisper_encoder import SAMPLE_RATE, load_audio, resample  # noqa: E402

RESULTS = TINY / "results.json"
VOICE_CLIPS = TINY / "voices"
N_SENTENCES = 50  # of the test part, spoken by each voice
# The last two are very different from all voices of the training part.
OTHER_VOICES = [*VOICES["test"], "Storm", "RicishayMax"]
N_PARTS = 100  # test clips for the second measurement
N_SOUNDS = 100  # clips of silence, and clips of noise
SEED = 2407


def read_test_rows() -> list[Row]:
    return read_corpus(TINY / "corpus", "fr", "en")[0]["test"]


# ----------------------------------------------------------------------------------- other voices


def make_voices():
    """Speak the first test sentences in each voice, and the sentences of outside.txt."""
    shutil.rmtree(VOICE_CLIPS, ignore_errors=True)
    VOICE_CLIPS.mkdir(parents=True)
    texts = [(row.sentence, row.translation) for row in read_test_rows()[:N_SENTENCES]]
    outside = (TINY / "outside.txt").read_text(encoding="utf-8").splitlines()
    jobs = [(voice, voice, *text) for voice in OTHER_VOICES for text in texts]
    for i, sentence in enumerate(outside):
        jobs.append(("outside", VOICES["test"][i % len(VOICES["test"])], sentence, ""))
    rows = []
    for i, (group, voice, sentence, translation) in enumerate(jobs):
        name = f"{i:03d}.ogg"
        audio = speak(sentence, f"fr+{voice}", speed=175, pitch=50)
        write_opus(VOICE_CLIPS / name, 0.6 * audio / audio.abs().max())
        rows.append((name, group, sentence, translation))
    write_table(VOICE_CLIPS / "clips.tsv", ("path", "group", "sentence", "translation"), rows)
    print(f"{len(rows)} clips in {VOICE_CLIPS}")


def read_voices() -> dict[str, list[Row]]:
    """The clips that make_voices wrote, by voice. "outside" has the sentences of outside.txt."""
    groups = {}
    for _, cells in read_table(VOICE_CLIPS / "clips.tsv", ("path", "group", "translation")):
        path = VOICE_CLIPS / cells["path"]
        row = Row(path, cells["sentence"], cells["translation"], "fr", "en", 0.0)
        groups.setdefault(cells["group"], []).append(row)
    return groups


# ------------------------------------------------------------------------------------ other sound


def add_noise(audio: Tensor) -> Tensor:
    """White noise, 10 dB weaker than the mean power of the clip."""
    noise = torch.randn(audio.shape, generator=torch.Generator().manual_seed(len(audio)))
    return audio + noise * audio.norm() / audio.shape[0] ** 0.5 * 10 ** (-10 / 20)


def as_mp3(audio: Tensor) -> Tensor:
    """Through an mp3 file with 44.1 kHz and two channels."""
    samples = resample(audio, SAMPLE_RATE, 44_100).clamp(-1, 1)
    return write_and_read(torch.stack([samples, samples], dim=1), 44_100, "clip.mp3")


def as_telephone(audio: Tensor) -> Tensor:
    """300 to 3,400 Hz, in a file with 8 kHz and 8 bits per sample (mu-law)."""
    spectrum = torch.fft.rfft(audio)
    hertz = torch.linspace(0, SAMPLE_RATE / 2, len(spectrum))
    spectrum[(hertz < 300) | (hertz > 3400)] = 0
    samples = resample(torch.fft.irfft(spectrum, len(audio)), SAMPLE_RATE, 8_000).clamp(-1, 1)
    return write_and_read(samples, 8_000, "clip.wav", subtype="ULAW")


def write_and_read(samples: Tensor, rate: int, name: str, **options) -> Tensor:
    """Write a file, and read it as translate.py reads the file of a user."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        soundfile.write(path, samples.numpy(), rate, **options)
        return load_audio(path)


def silent_clips() -> list[Tensor]:
    """Clips of 1 to 4 s that have only very weak noise, as from a microphone in a quiet room."""
    rng = torch.Generator().manual_seed(SEED)
    return [1e-3 * clip for clip in noise_clips(rng)]


def noise_clips(rng: torch.Generator | None = None) -> list[Tensor]:
    """Clips of 1 to 4 s of loud noise: half white, half with more power at low frequencies."""
    rng = rng or torch.Generator().manual_seed(SEED + 1)
    clips = []
    for i in range(N_SOUNDS):
        n = int(SAMPLE_RATE * (1 + 3 * torch.rand((), generator=rng)))
        noise = torch.randn(n, generator=rng)
        if i % 2:  # the power is divided by the frequency ("pink" noise)
            spectrum = torch.fft.rfft(noise)
            noise = torch.fft.irfft(spectrum / torch.arange(1, len(spectrum) + 1).sqrt(), n)
        clips.append(0.5 * noise / noise.abs().max())
    return clips


# ------------------------------------------------------------------------------------ the measures


def bleu_of(model: LLaST, rows: list[Row], change=None) -> dict:
    """BLEU of the translations with its 95 % interval, and the share that equals the reference."""
    results = translate(model, [row.path for row in rows], change=change)
    texts, references = [r.text for r in results], [row.translation for row in rows]
    scores = score(texts, references, n_bootstrap=1000)
    exact = sum(text == reference for text, reference in zip(texts, references)) / len(rows)
    return {key: scores[key] for key in ("bleu", "bleu_interval", "n")} | {"exact": round(exact, 3)}


def measure_sound(model: LLaST, rows: list[Row], voices: dict[str, list[Row]]) -> dict[str, dict]:
    sound = {"none": None, "noise": add_noise, "mp3": as_mp3, "telephone": as_telephone}
    results = {name: bleu_of(model, rows, change) for name, change in sound.items()}
    spoken = {name: bleu_of(model, group) for name, group in voices.items() if name != "outside"}
    return results | {f"fr+{name}": scores for name, scores in spoken.items()}


@contextmanager
def keep_states(model: LLaST, choose):
    """Inside the block, the LLM gets only choose(speech embeddings) of a clip."""
    encode = model.encode_speech
    model.encode_speech = lambda audio: [choose(speech) for speech in encode(audio)]
    try:
        yield
    finally:
        del model.encode_speech  # the method of the class is used again


@contextmanager
def without_lora(model: LLaST, *parts: str):
    """Inside the block, the LoRA of "encoder" or "llm" changes nothing. It must not be merged."""
    modules = {"encoder": model.speech_encoder, "llm": model.llm}
    layers = [layer for part in parts for layer in lora_layers(modules[part])]
    scales = [layer.scale for layer in layers]
    for layer in layers:
        layer.scale = 0.0
    try:
        yield
    finally:
        for layer, scale in zip(layers, scales):
            layer.scale = scale


def measure_parts(model: LLaST, rows: list[Row]) -> dict[str, dict]:
    """BLEU with a part of the states, and with a part of the model."""
    states = {
        "everything": lambda speech: speech,
        "only the first 20 states": lambda speech: speech[:20],
        "without the first 20 states": lambda speech: speech[20:],
        "only the first half of the states": lambda speech: speech[: (len(speech) + 1) // 2],
    }
    results = {}
    for name, choose in states.items():
        with keep_states(model, choose):
            results[name] = bleu_of(model, rows)
    for name, parts in {
        "encoder LoRA switched off": ["encoder"],
        "LLM LoRA switched off": ["llm"],
        "both LoRAs switched off": ["encoder", "llm"],
    }.items():
        with without_lora(model, *parts):
            results[name] = bleu_of(model, rows)
    return results


def auc(high: list[float], low: list[float]) -> float:
    """The probability that a random value of `high` is above one of `low`; equal values: 1/2.

    This is the area under the ROC curve: 1.0 separates perfectly, 0.5 does not separate.
    """
    difference = torch.tensor(high)[:, None] - torch.tensor(low)
    return round(((difference > 0).float() + (difference == 0) / 2).mean().item(), 4)


def measure_scores(model: LLaST, rows: list[Row], outside: list[Row]) -> dict[str, dict]:
    """The scores of answers to the test clips and to sounds without a known sentence."""
    results = translate(model, [row.path for row in rows])
    right = [r.text == row.translation for r, row in zip(results, rows)]
    known = {
        "test clips": results,
        "right translations": [r for r, is_right in zip(results, right) if is_right],
        "wrong translations": [r for r, is_right in zip(results, right) if not is_right],
    }
    other = {
        "silence": translate(model, silent_clips()),
        "noise": translate(model, noise_clips()),
        "outside sentences": translate(model, [row.path for row in outside]),
    }
    scores = {name: [r.score for r in group] for name, group in (known | other).items()}
    summary = {}
    for name, group in (known | other).items():
        if group:
            median = round(torch.tensor(scores[name]).median().item(), 3)
            n_unlikely = sum(result.unlikely for result in group)
            summary[name] = {"n": len(group), "median": median, "unlikely": n_unlikely}
    for name in other:
        for reference in ("test clips", "right translations"):
            summary[name][f"auc of {reference}"] = auc(scores[reference], scores[name])
    return {"max_loss": model.config.max_loss, "groups": summary}


def digest_of_weights(model: Path) -> str:
    """The SHA-256 of the trained tensors, which llast.py stores with them."""
    with safe_open(model / "llast.safetensors", "pt") as file:
        return file.metadata()["llast.safetensors"]


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--speak", action="store_true", help="make the clips in voices/ and stop")
    parser.add_argument("--model", type=Path, default=TINY / "model", help="[tiny/model]")
    parser.add_argument("--only", choices=("parts", "sound", "scores"), help="one measurement")
    args = parser.parse_args()
    if args.speak:
        make_voices()
        return
    device, dtype, _ = pick_device()
    model = LLaST.from_pretrained(args.model, device=device, dtype=dtype)
    weights = digest_of_weights(args.model)
    rows, voices = read_test_rows(), read_voices()
    measures = {  # the LoRAs are merged after the first, because merged weights are faster
        "parts": lambda: measure_parts(model, rows[:N_PARTS]),
        "sound": lambda: measure_sound(model, rows, voices),
        "scores": lambda: measure_scores(model, rows, voices["outside"]),
    }
    results = json.loads(RESULTS.read_text()) if args.only and RESULTS.is_file() else {}
    if results.get("weights") != weights:  # of another model
        results = {"weights": weights, "beams": SearchOptions().beams}
    for name in [args.only] if args.only else measures:
        if name != "parts":
            merge_lora(model)
        results[name] = measures[name]()
        print(json.dumps({name: results[name]}, indent=1))
    RESULTS.write_text(json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
