"""Does the LLM look at the states of a word while it writes this word?

    pip install -r tiny/requirements.txt
    python tiny/attention.py                needs espeak-ng; writes attention.json and attention.png

The model gets a clip, the prompt to transcribe it, and the right transcript. A position predicts
the next token. So the attention of a word is that of the positions that predict its tokens. Its
centre is the mean time of the states, weighted by the attention. espeak-ng reports when it begins
each word. For each clip, Spearman's rank correlation compares these times with the centres: 1 if
both are in the same order, 0 if they have nothing to do with each other.

The layer and the head with the highest mean correlation on the dev clips are used for the test
clips and for the figure. In a control, the words of the transcript are in reverse order. A head
that finds words by their content gives the same correlation again. A head that only moves forward
from word to word, whatever the words are, gives the opposite sign.
"""

import argparse
import ctypes
import json
import random
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from measure import digest_of_weights
from speak import ACCENTS, VOICES

TINY = Path(__file__).resolve().parent
sys.path.insert(0, str(TINY.parent))
from data import Row, read_corpus  # noqa: E402
from llast import LLaST  # noqa: E402
from lora import merge_lora  # noqa: E402
from translate import SearchOptions, ids_of_prompt, translate  # noqa: E402
from whisper_encoder import load_audio, log_mel_spectrogram  # noqa: E402

N_TEST = 100
SECONDS_PER_STATE = 0.02
SEED = 2407  # of make_corpus.py

# ------------------------------------------------------------------------------ times of the words


class Event(ctypes.Structure):
    """espeak_EVENT of espeak-ng's speak_lib.h."""

    _fields_ = [
        ("type", ctypes.c_int), ("id", ctypes.c_uint), ("text_position", ctypes.c_int),
        ("length", ctypes.c_int), ("milliseconds", ctypes.c_int), ("sample", ctypes.c_int),
        ("user_data", ctypes.c_void_p), ("name", ctypes.c_char * 8),
    ]  # fmt: skip


class Speaker:
    """espeak-ng as a library. Unlike the program, it also reports when it begins each word."""

    def __init__(self):
        self.library = ctypes.CDLL("libespeak-ng.so.1")
        synchronous, samples, events = 2, ctypes.POINTER(ctypes.c_short), ctypes.POINTER(Event)
        self.rate = self.library.espeak_Initialize(synchronous, 0, None, 0)
        # The attribute keeps the function alive as long as the library may call it.
        self.callback = ctypes.CFUNCTYPE(ctypes.c_int, samples, ctypes.c_int, events)(self.receive)
        self.library.espeak_SetSynthCallback(self.callback)

    def receive(self, samples, n_samples: int, events) -> int:
        if n_samples:
            self.blocks.append(np.ctypeslib.as_array(samples, (n_samples,)).copy())
        end_of_list, word, i = 0, 1, 0
        while events[i].type != end_of_list:
            if events[i].type == word and events[i].length:
                self.words.append((events[i].text_position - 1, events[i].sample / self.rate))
            i += 1
        return 0  # continue

    def speak(self, text: str, voice: str, speed: int, pitch: int) -> tuple[np.ndarray, list]:
        """Return the samples and, for each word, (index of its first character, seconds)."""
        self.blocks, self.words = [], []
        rate, pitch_range, by_character, utf8_phonemes_end_pause = 1, 3, 1, 0x1101
        self.library.espeak_SetVoiceByName(voice.encode())
        self.library.espeak_SetParameter(rate, speed, 0)
        self.library.espeak_SetParameter(pitch_range, pitch, 0)
        data = text.encode()
        self.library.espeak_Synth(
            data, len(data) + 1, 0, by_character, 0, utf8_phonemes_end_pause, None, None
        )
        return np.concatenate(self.blocks) / 32768, self.words


def word_times(speaker: Speaker, row: Row, split: str) -> list[float]:
    """The seconds in the clip at which each word of a row begins.

    The sentence is spoken again as make_corpus.py did it. Words are separated by spaces. So "L'eau"
    is one word.
    """
    rng = random.Random(f"{SEED} {row.path.name}")
    variant, accent = rng.choice(VOICES[split]), rng.choice(ACCENTS[row.source])
    speed, pitch = rng.randint(145, 200), rng.randint(30, 70)
    samples, words = speaker.speak(row.sentence, f"{accent}+{variant}", speed, pitch)
    loud = np.flatnonzero(np.abs(samples) > 0.01)  # speak.py cuts the silence around the speech
    start = max(0, loud[0] / speaker.rate - 0.05)
    seconds = min(len(samples), loud[-1] + speaker.rate // 20) / speaker.rate - start
    if abs(seconds - row.seconds) > 0.08:  # at a comma, library and program differ a little
        raise ValueError(f"{row.path.name} has {row.seconds:.2f} s, but espeak-ng {seconds:.2f} s")
    times = {}
    for index, time in words:  # "L'eau" has two events; its time is that of the first
        times.setdefault(row.sentence[:index].count(" "), time - start)
    return [times.get(i, float("nan")) for i in range(len(row.sentence.split(" ")))]


# --------------------------------------------------------------------------------------- attention


def attention_maps(model: LLaST, row: Row, task: str, text: str) -> Tensor:
    """The attention of each word of an answer to the states. -> (layers, heads, words, states)"""
    maps, attention = [], F.scaled_dot_product_attention

    def watch(q, k, v, attn_mask=None, is_causal=False, enable_gqa=False):
        keys = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
        logits = q @ keys.transpose(2, 3) / q.shape[-1] ** 0.5
        future = torch.ones(logits.shape[-2:], dtype=torch.bool).triu(1)
        maps.append(logits.masked_fill(future, -torch.inf).softmax(-1)[0])
        return attention(q, k, v, attn_mask, is_causal=is_causal, enable_gqa=enable_gqa)

    with torch.inference_mode():
        [speech] = model.encode_speech([load_audio(row.path)])
        ids = ids_of_prompt(model, task, row.source, row.target)
        at, answer = int(ids.argmin()), model.tokenizer.encode(text)
        x = torch.cat([model.splice(ids, speech, at), model.llm.embed(torch.tensor(answer))])
        F.scaled_dot_product_attention = watch
        try:
            model.llm.hidden(x[None])
        finally:
            F.scaled_dot_product_attention = attention
    first = len(ids) + len(speech) - 2  # the last position of the prompt predicts the first token
    tokens = torch.stack(maps)[:, :, first : first + len(answer), at : at + len(speech)]
    words = [len(model.tokenizer.decode(answer[: i + 1]).split()) - 1 for i in range(len(answer))]
    owner = torch.tensor(words).clamp(min=0)
    return torch.stack([tokens[:, :, owner == i].mean(2) for i in range(len(text.split()))], dim=2)


def centres(maps: Tensor) -> Tensor:
    """The mean time of the states, weighted by the attention. (..., states) -> (...)"""
    times = SECONDS_PER_STATE * (torch.arange(maps.shape[-1]) + 0.5)
    return maps @ times / maps.sum(-1)


def rank_correlation(times: Tensor, values: Tensor) -> Tensor:
    """Spearman's rank correlation. times (words,), values (..., words) -> (...)"""
    a, b = (x.argsort(-1).argsort(-1).float() for x in (times, values))
    a, b = (x - x.mean(-1, keepdim=True) for x in (a, b))
    return (a * b).sum(-1) / (a.norm(dim=-1) * b.norm(dim=-1))


def correlations(model: LLaST, rows: list[Row], times: list, order: int = 1) -> Tensor:
    """Rank correlation of each clip in each layer and head. -> (clips, layers, heads)

    order -1: the words of the transcript are in reverse order.
    """
    result = []
    for row, seconds in zip(rows, times, strict=True):
        text = " ".join(row.sentence.split()[::order])
        starts = torch.tensor(seconds[::order])
        is_known = ~starts.isnan()  # espeak-ng has one event for words that it joins, as "est à"
        values = centres(attention_maps(model, row, "asr", text))[..., is_known]
        result.append(rank_correlation(starts[is_known], values))
    return torch.stack(result)


def describe(values: Tensor, times: list) -> dict:
    """A line of the table: mean, and the value that 90 % of the clips reach."""
    low, mean = values.quantile(0.1).item(), values.mean().item()
    n_words = sum(map(len, times))
    return {"clips": len(values), "words": n_words, "mean": round(mean, 3), "low": round(low, 3)}


# -------------------------------------------------------------------------------------- the figure


def draw(model: LLaST, row: Row, times: list[float], layer: int, head: int):
    """Draw a clip's spectrogram above the attention of its transcript and of its translation."""
    import matplotlib.pyplot as plt  # here, because only this function needs it

    mel = log_mel_spectrogram(load_audio(row.path), 80)
    seconds = mel.shape[1] / 100
    figure, axes = plt.subplots(
        3, 1, figsize=(9, 9), dpi=100, sharex=True, height_ratios=(2, 3, 3), layout="constrained"
    )
    axes[0].imshow(mel, origin="lower", aspect="auto", cmap="cividis", extent=(0, seconds, 0, 80))
    axes[0].set_ylabel("mel bin")
    for time, word in zip(times, row.sentence.split(" ")):
        axes[0].text(time, 81, word, rotation=30, fontsize=9)
    answers = {"asr": ("transcript", row.sentence), "st": ("translation", row.translation)}
    for axis, (task, (name, text)) in zip(axes[1:], answers.items()):
        attention = attention_maps(model, row, task, text)[layer, head]  # (words, states)
        attention = attention / attention.amax(1, keepdim=True)
        extent = (0, attention.shape[1] * SECONDS_PER_STATE, len(attention) - 0.5, -0.5)
        image = axis.imshow(attention, aspect="auto", cmap="cividis", extent=extent)
        axis.plot(centres(attention), range(len(attention)), "w.", markersize=9)
        axis.set_yticks(range(len(attention)), text.split())
        axis.set_ylabel(f"words of the {name}")
    for axis in axes:
        for time in times:
            axis.axvline(time, color="white", linewidth=0.6)
    axes[2].set_xlabel("time in the clip (seconds); one state every 20 ms")
    axes[0].set_title(
        f"Attention of the LLM to the states of the encoder (layer {layer + 1}, head {head + 1})\n"
        "white lines: beginnings of the spoken words; dots: centres of attention\n\n"
    )
    figure.colorbar(image, ax=axes[1:], label="attention; the largest of each word is 1")
    figure.savefig(TINY / "attention.png")


def choose_example(model: LLaST, rows: list[Row], times: list) -> int:
    """The index of the first clip of 8 or more words without a mistake in both tasks."""
    for i, row in enumerate(rows):
        if len(row.sentence.split()) >= 8 and not torch.tensor(times[i]).isnan().any():
            answers = [
                translate(model, [row.path], task, search=SearchOptions(1))[0].text
                for task in ("asr", "st")
            ]
            if answers == [row.sentence, row.translation]:
                return i
    raise ValueError("no clip was transcribed and translated without a mistake; train longer")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, default=TINY / "model", help="[tiny/model]")
    folder = parser.parse_args().model
    model = LLaST.from_pretrained(folder)
    merge_lora(model)
    splits, speaker = read_corpus(TINY / "corpus", "fr", "en")[0], Speaker()
    rows = {"dev": splits["dev"], "test": splits["test"][:N_TEST]}
    times = {split: [word_times(speaker, row, split) for row in rows[split]] for split in rows}
    dev = correlations(model, rows["dev"], times["dev"])
    best = int(dev.mean(0).argmax())
    layer, head = divmod(best, dev.shape[2])
    test = correlations(model, rows["test"], times["test"])
    control = correlations(model, rows["test"], times["test"], order=-1)
    results = {
        "weights": digest_of_weights(folder),
        "layer": layer + 1,
        "head": head + 1,
        "dev_means": [[round(value, 3) for value in line] for line in dev.mean(0).tolist()],
        "correlation": {
            "dev": describe(dev[:, layer, head], times["dev"]),
            "test": describe(test[:, layer, head], times["test"]),
            "test, words in reverse order": describe(control[:, layer, head], times["test"]),
        },
    }
    (TINY / "attention.json").write_text(json.dumps(results, indent=1) + "\n")
    print(json.dumps(results, indent=1))
    example = choose_example(model, rows["test"], times["test"])
    draw(model, rows["test"][example], times["test"][example], layer, head)


if __name__ == "__main__":
    main()
