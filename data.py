"""From files to batches: audio, corpora, prompts, ASR-augmented sampling.

    corpus folder -> rows -> examples (translate / transcribe) -> batches of waveforms and token ids

Audio of any rate and channel count becomes 16 kHz mono. A corpus has the layout of Common Voice 4
with CoVoST-2 (2007.10310) beside it. `prompt_for` is the only place where a prompt is made, for
training and for use alike. To see rows and labels drawn: tests/test_data.py.
"""

import csv
import difflib
import math
import random
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import soundfile
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

SAMPLE_RATE = 16_000  # samples a second
MAX_SECONDS = 30  # Whisper's window; a longer clip has no place in it
STATES_PER_SECOND = 50  # what Whisper's encoder makes of a second

LANGUAGES = {  # Common Voice's codes and the names that the prompt uses
    "en": "English", "fr": "French", "es": "Spanish", "zh-CN": "Chinese", "de": "German",
    "ja": "Japanese", "ca": "Catalan", "it": "Italian", "ru": "Russian", "pt": "Portuguese",
    "fa": "Persian", "et": "Estonian", "mn": "Mongolian", "nl": "Dutch", "tr": "Turkish",
    "ar": "Arabic", "sv-SE": "Swedish", "lv": "Latvian", "sl": "Slovenian", "ta": "Tamil",
    "id": "Indonesian", "cy": "Welsh",
}  # fmt: skip


def check_language(code: str) -> str:
    """The code itself, if the project knows it; else an error that names the nearest."""
    if code not in LANGUAGES:
        known = {name.lower(): c for c, name in LANGUAGES.items()} | {
            c.lower(): c for c in LANGUAGES
        }
        near = [name for name in known if name.startswith(code.lower())]
        near = near or difflib.get_close_matches(code.lower(), known, n=1, cutoff=0.5)
        hint = f"did you mean {known[near[0]]!r}? " if near and code else ""
        raise ValueError(f"unknown language {code!r}; {hint}Known: {', '.join(LANGUAGES)}")
    return code


# -------------------------------------------------------------------------------------------- audio


class AudioError(ValueError):
    """A clip that cannot be used, and why."""

    def __init__(self, path, reason: str):
        super().__init__(f"{path}: {reason}")
        self.path, self.reason = path, reason


def open_audio(path: Path) -> soundfile.SoundFile:
    """The file, opened, once it is known to be one that can be read."""
    if not path.is_file():
        raise AudioError(path, "no such file")
    if path.stat().st_size == 0:
        raise AudioError(path, "the file is empty")
    try:
        file = soundfile.SoundFile(path)
    except soundfile.LibsndfileError as error:
        raise AudioError(path, f"not readable as audio ({error.error_string})") from error
    if file.frames > 1 << 40:  # what a FLAC that was streamed says of itself
        raise AudioError(path, "its header does not say how long it is; convert it once more")
    return file


def audio_seconds(path) -> float:
    """How long a clip is by its header, without decoding it."""
    with open_audio(Path(path)) as file:
        return file.frames / file.samplerate


def load_audio(path) -> Tensor:
    """Any file that soundfile reads (wav, flac, ogg, mp3) -> (N,) at 16 kHz, mono, within -1..1."""
    path = Path(path)
    with open_audio(path) as file:
        promised, rate = file.frames, file.samplerate
        try:
            samples = file.read(dtype="float32", always_2d=True)
        except soundfile.LibsndfileError as error:
            raise AudioError(path, f"not readable as audio ({error.error_string})") from error
    audio = torch.from_numpy(samples).mean(dim=1)  # (N,)
    if len(audio) == 0:
        raise AudioError(path, "the clip has no samples")
    if len(audio) < promised:
        raise AudioError(path, f"cut short, {len(audio)} of {promised} samples are there")
    if not audio.isfinite().all():
        raise AudioError(path, "the clip holds samples that are not numbers (NaN or infinite)")
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


# ------------------------------------------------------------------------------------------ corpora


@dataclass(frozen=True)
class Row:
    """One clip of a corpus and what is said in it, in two languages."""

    path: Path
    sentence: str
    translation: str
    source: str  # language codes
    target: str
    seconds: float


def read_tsv(path: Path, columns: tuple[str, ...]) -> list[dict[str, str]]:
    """Rows of a tab-separated table. A quote is an ordinary character; a backslash escapes."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        reader = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\")
        missing = [name for name in columns if name not in (reader.fieldnames or [])]
        if missing:
            raise ValueError(f"{path}: no column {missing} in the header {reader.fieldnames}")
        return list(reader)


def corpus_languages(root) -> list[str]:
    """The languages that a corpus folder holds, from its own folders."""
    return sorted(p.parent.name for p in Path(root).glob("*/validated.tsv"))


def read_corpus(root, source: str, target: str) -> tuple[dict[str, list[Row]], list[str]]:
    """All rows of one direction by split ("train", "dev", "test"), and which clips are unusable.

    root/SOURCE holds clips/, validated.tsv (path, sentence) and covost_v2.SOURCE_TARGET.tsv (path,
    translation, split), joined on path as CoVoST's get_covost_splits.py does.
    """
    folder = Path(root) / check_language(source)
    spoken, translated = folder / "validated.tsv", folder / f"covost_v2.{source}_{target}.tsv"
    for need in (spoken, translated, folder / "clips"):
        if not need.exists():
            have = ", ".join(corpus_languages(root)) or "none"
            raise FileNotFoundError(
                f"no {source}-{target} corpus in {root}: looked for {need}. "
                f"Languages with data there: {have}"
            )
    sentences = {row["path"]: row["sentence"] for row in read_tsv(spoken, ("path", "sentence"))}
    splits, unusable = {"train": [], "dev": [], "test": []}, []
    for row in read_tsv(translated, ("path", "translation", "split")):
        split = "train" if row["split"] == "train_covost" else row["split"]
        if row["path"] not in sentences or split not in splits:
            continue  # the official script joins the same way
        path = folder / "clips" / row["path"]
        try:
            seconds = audio_seconds(path)
            if not 0 < seconds <= MAX_SECONDS:
                raise AudioError(path, f"{seconds:.1f} s long, not within 0 to {MAX_SECONDS}")
        except AudioError as error:
            unusable.append(str(error))
            if split == "train":
                continue
            seconds = 0.0  # a test clip stays: leaving it out would make the score another one
        texts = sentences[row["path"]], row["translation"]
        splits[split].append(Row(path, *texts, source, target, seconds))
    return splits, unusable


# ------------------------------------------------------------------------------------------ prompts

# Pieces of a prompt that are not text. They become ids by name, so a text that looks like one of
# them can never pass for it.
BOS, EOS, AUDIO = "<s>", "</s>", "<audio>"
AUDIO_ID = -300  # stands where the speech goes; no real token has it
IGNORE = -100  # F.cross_entropy skips targets with this value; no real token has it

TEMPLATES = {  # the original's chat templates, LLaST's `{input}` being audio and instruction
    "llama2": (BOS, "[INST] ", AUDIO, "\n{instruction} [/INST]"),
    "tinyllama": (BOS, "<|user|>\n", AUDIO, "\n{instruction}", EOS, "\n<|assistant|>", EOS, "\n"),
}
INSTRUCTIONS = {
    "st": "Please translate the {source} sentence into {target}.",
    "asr": "Please transcribe the {source} sentence into {source}.",
}


def prompt_for(task: str, source: str, target: str, template: str = "llama2") -> list[str]:
    """The pieces of a prompt, in order: text, and BOS, EOS and AUDIO where those stand.

    task is "st" (translate) or "asr" (transcribe); source and target are language codes.
    """
    if task not in INSTRUCTIONS or template not in TEMPLATES:
        raise ValueError(
            f"no prompt for task {task!r} with template {template!r}; "
            f"tasks: {', '.join(INSTRUCTIONS)}; templates: {', '.join(TEMPLATES)}"
        )
    names = {
        "source": LANGUAGES[check_language(source)],
        "target": LANGUAGES[check_language(target)],
    }
    instruction = INSTRUCTIONS[task].format(**names)
    return [piece.format(instruction=instruction) for piece in TEMPLATES[template]]


def prompt_ids(prompt: list[str], tokenizer) -> list[int]:
    """Token ids of a prompt, each piece of text on its own, AUDIO_ID once for all of the speech."""
    special = {BOS: [tokenizer.bos_id], EOS: [tokenizer.eos_id], AUDIO: [AUDIO_ID]}
    return [
        i
        for piece in prompt
        for i in (special[piece] if piece in special else tokenizer.encode(piece))
    ]


# -------------------------------------------------------------------------------- examples, batches


@dataclass(frozen=True)
class Example:
    """A clip and what to do with it."""

    row: Row
    task: str

    @property
    def answer(self) -> str:
        return self.row.translation if self.task == "st" else self.row.sentence


@dataclass
class Batch:
    """What one training step sees: B clips and B rows of ids, padded on the right."""

    audio: list[Tensor]  # B waveforms (N,), each of its own length
    ids: Tensor  # (B, T)
    labels: Tensor  # (B, T), the id where it is part of the answer, else IGNORE
    lengths: Tensor  # (B,), ids of each row; the rest is padding


def examples_for(rows: list[Row], asr: float, seed: int, epoch: int) -> list[Example]:
    """ASR-augmented sampling: every row to translate, and the share `asr` also to transcribe.

    1.0 is the original's mix, every clip once each. Shuffled as a function of (seed, epoch) alone.
    """
    if not 0 <= asr <= 1:
        raise ValueError(f"--asr is {asr}; it is a share, from 0 (none) to 1 (every clip)")
    rng = random.Random(f"examples {seed} {epoch}")
    heard = rng.sample(rows, round(asr * len(rows)))
    examples = [Example(row, "st") for row in rows] + [Example(row, "asr") for row in heard]
    rng.shuffle(examples)
    return examples


def group(examples: list, size_of, budget: int, seed: int, epoch: int) -> list[list]:
    """Batches of similar size: rows times the longest row stays within `budget` positions.

    Sorting happens inside windows of the shuffled order, so that batches differ between epochs.
    """
    rng = random.Random(f"batches {seed} {epoch}")
    window = 50 * max(1, budget // max(1, max(map(size_of, examples))))
    batches = []
    for start in range(0, len(examples), window):
        batch, longest = [], 0
        for example in sorted(examples[start : start + window], key=size_of):
            longest = max(longest, size_of(example))
            if batch and longest * (len(batch) + 1) > budget:
                batches.append(batch)
                batch, longest = [], size_of(example)
            batch.append(example)
        batches.append(batch)
    rng.shuffle(batches)
    return batches


def answer_row(example: Example, tokenizer, template: str) -> tuple[list[int], list[int]]:
    """Ids of prompt, answer and end, and the labels: the answer and the end that closes it."""
    row = example.row
    prompt = prompt_ids(prompt_for(example.task, row.source, row.target, template), tokenizer)
    answer = tokenizer.encode(example.answer) + [tokenizer.eos_id]
    return prompt + answer, [IGNORE] * len(prompt) + answer


@lru_cache(maxsize=8192)
def remembered_audio(path: Path) -> Tensor:
    """A small corpus is decoded once and then stays in memory; of a large one, the newest clips."""
    return load_audio(path)


def collate(examples: list[Example], tokenizer, template: str) -> Batch:
    """Load the clips and draw the rows."""
    rows = [answer_row(example, tokenizer, template) for example in examples]
    ids, labels = zip(*rows, strict=True)
    return Batch(
        audio=[remembered_audio(example.row.path) for example in examples],
        ids=pad_sequence([torch.tensor(row) for row in ids], batch_first=True),
        labels=pad_sequence(
            [torch.tensor(row) for row in labels], batch_first=True, padding_value=IGNORE
        ),
        lengths=torch.tensor([len(row) for row in ids]),
    )


class Batches:
    """The batches of a training run, epoch by epoch: a function of (seed, epoch) alone."""

    def __init__(
        self,
        rows: list[Row],
        asr: float,
        tokenizer,
        template: str,
        budget: int,
        seed: int,
    ):
        self.rows, self.asr, self.seed, self.budget = rows, asr, seed, budget
        self.tokenizer, self.template = tokenizer, template
        self.sizes: dict[Example, int] = {}
        self.skipped: dict[Path, str] = {}  # clips that failed, and why

    def size_of(self, example: Example) -> int:
        """Positions of the LLM that a row takes: its speech and its text."""
        if example not in self.sizes:
            ids, _ = answer_row(example, self.tokenizer, self.template)
            speech = math.ceil(example.row.seconds * STATES_PER_SECOND)
            self.sizes[example] = speech + len(ids)
        return self.sizes[example]

    def groups(self, epoch: int) -> list[list[Example]]:
        """What goes together, before any audio is read."""
        examples = examples_for(self.rows, self.asr, self.seed, epoch)
        return group(examples, self.size_of, self.budget, self.seed, epoch)

    def load(self, examples: list[Example]) -> Batch | None:
        """These examples with their audio; a clip that fails is left out, and remembered."""
        while examples:
            try:
                return collate(examples, self.tokenizer, self.template)
            except AudioError as error:
                self.skipped[error.path] = error.reason
                examples = [e for e in examples if e.row.path != error.path]
        return None
