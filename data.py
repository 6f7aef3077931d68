"""From a corpus folder to batches.

    clips and a table -> rows -> examples (translate or transcribe) -> ids and labels -> batches

A corpus is a folder of clips, corpus/fr/clips/, and a table with tabs between its cells,
corpus/fr/fr-en.tsv. You can write the table in a text editor or a spreadsheet. Seconds may be
missing: then the clip is opened to measure it. Other columns are ignored.

    path         sentence            translation               split    seconds
    a.wav        Le chat dort.       The cat sleeps.           train    1.48
    far/b.mp3    « Oui », dit-il.    "He said ""yes"" to me."    dev

One row of a batch. It is drawn with words instead of ids; "-" is IGNORE:

    ids      <s>  [INST]  AUDIO_ID  Please translate ... [/INST]  The  cat  sleeps  .  </s>
    labels   -    -       -         -                             The  cat  sleeps  .  </s>

The LLM gets the speech in the place of AUDIO_ID. `prompt_for` is the only function that makes a
prompt, for training and for translation.

Sizes: B rows, N samples of a clip, T ids.
"""

import csv
import difflib
import math
import os
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from whisper_encoder import (
    MAX_SECONDS,
    SAMPLE_RATE,
    AudioError,
    audio_seconds,
    load_audio,
    n_states,
)

LANGUAGES = {  # codes of Common Voice -> names in the prompt; English is the first
    "en": "English", "fr": "French", "es": "Spanish", "zh-CN": "Chinese", "de": "German",
    "ja": "Japanese", "ca": "Catalan", "it": "Italian", "ru": "Russian", "pt": "Portuguese",
    "fa": "Persian", "et": "Estonian", "mn": "Mongolian", "nl": "Dutch", "tr": "Turkish",
    "ar": "Arabic", "sv-SE": "Swedish", "lv": "Latvian", "sl": "Slovenian", "ta": "Tamil",
    "id": "Indonesian", "cy": "Welsh",
}  # fmt: skip


def check_language(code: str) -> str:
    """The code itself, if it is known. The error for an unknown code names the nearest one."""
    if code not in LANGUAGES:
        codes = {text.lower(): c for c, name in LANGUAGES.items() for text in (c, name)}
        near = [text for text in codes if text.startswith(code.lower())]
        near = near or difflib.get_close_matches(code.lower(), codes, n=1, cutoff=0.5)
        hint = f"did you mean {codes[near[0]]!r}? Known" if near and code else "known"
        raise ValueError(f"unknown language {code!r}; {hint}: {', '.join(LANGUAGES)}")
    return code


# CoVoST-2 translates all other languages into English, and English into these.
FROM_ENGLISH = "de tr fa sv-SE mn zh-CN cy ca sl et id ar ta lv ja".split()
GROUPS = {
    "all": ",".join([*list(LANGUAGES)[1:], *(f"en-{code}" for code in FROM_ENGLISH)]),
    "paper": "fr,es,de,it,zh-CN,ja,en-ja,en-de,en-zh-CN",
}


def parse_directions(text: str) -> list[tuple[str, str]]:
    """(source, target) of each item of a list such as "fr,en-de". "all" and "paper" are GROUPS."""
    items = ",".join(GROUPS.get(item.strip(), item) for item in text.split(",")).split(",")
    return list(dict.fromkeys(parse_direction(item.strip()) for item in items))


def parse_direction(text: str) -> tuple[str, str]:
    """(source, target) of "fr" (into English), "fr-en" or "en-zh-CN"."""
    if text == "en":
        raise ValueError("en lacks the language to translate into; name it, as in en-de")
    if text not in LANGUAGES and "-" in text and text.split("-").count("en") != 1:
        raise ValueError(f"{text}: exactly one side has to be English, as in fr-en or en-de")
    if text.startswith("en-"):
        return "en", check_language(text.removeprefix("en-"))
    return check_language(text.removesuffix("-en")), "en"


# ------------------------------------------------------------------------------------------ corpora

SPLITS = ("train", "dev", "test")
csv.field_size_limit(1 << 30)  # one cell may be longer than the 128 KiB that Python allows


@dataclass(frozen=True)
class Row:
    """One clip of a corpus, and what is said in it in two languages."""

    path: Path
    sentence: str
    translation: str
    source: str  # language codes
    target: str
    seconds: float


def write_table(path: Path, columns, rows):
    """Write a tab-separated table. read_table, pandas and spreadsheets read the same cells again.

    A cell with a quotation mark is put in quotation marks, as csv does it, and the mark is doubled.
    A tab or a line break in a cell becomes a space. The table replaces an older one only when it
    is complete.
    """
    lines = ["\t".join(map(quote, row)) for row in (columns, *rows)]
    part = path.with_name(path.name + ".part")
    part.write_bytes("\n".join([*lines, ""]).encode(errors="backslashreplace"))
    part.replace(path)


def quote(cell) -> str:
    text = re.sub(r"[\t\r\n]+", " ", "" if cell is None else str(cell))
    return '"' + text.replace('"', '""') + '"' if '"' in text else text


def read_table(path: Path, columns, header=(), **dialect) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ("FILE:LINE", {column: cell}) for each row of a tab-separated table with `columns`.

    A table without a line of column names needs `header`. `dialect` is for csv.reader: without it,
    cells are quoted as write_table, pandas and spreadsheets do it.
    """
    file, line = str(path), 1
    rows = csv.reader(read_lines(path), delimiter="\t", strict=True, **dialect)
    try:
        header = header or next(rows, [])
        if missing := [name for name in columns if header.count(name) != 1]:
            raise csv.Error(f"the header needs the column {missing[0]} once, but is {header}")
        line = rows.line_num + 1
        for cells in rows:
            if len(cells) not in (0, len(header)):
                raise csv.Error(f"expected {len(header)} cells {header}, found {len(cells)}")
            if rows.line_num > line and not dialect:
                raise csv.Error("a cell in quotation marks contains a line break")
            if cells:
                yield f"{file}:{line}", dict(zip(header, cells))
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{file}:{line}: {error}; write one tab between two cells. A cell that begins with a "
            'quotation mark must end with one, and has "" for each mark inside'
        ) from error


def read_lines(path: Path) -> Iterator[str]:
    with open(path, "rb") as file:
        for line, text in enumerate(file, start=1):
            try:
                yield text.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{line}: not UTF-8; save the table as UTF-8") from error


def path_inside(name: str, clips: Path, files: set[str], place: str) -> str:
    """The path of a clip inside the folder of clips. A path that leads out of it is an error.

    `files` is the set of list_files(clips). Only other names are checked, because following the
    links of every clip is slow.
    """
    if name in files:
        return name
    folder = os.path.realpath(clips) + os.sep
    odd = "\0" in name or ".." in Path(name).parts
    if odd or not os.path.realpath(clips / name).startswith(folder):
        raise ValueError(
            f"{place}: the path {name!r} is not inside the audio folder {clips}; "
            "move the clip there and write its path in that folder"
        )
    return Path(name).as_posix()


def list_files(folder) -> Iterator[str]:
    """Yield the path inside `folder` of each file there and below. Links are left out."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                yield entry.name
            elif entry.is_dir(follow_symlinks=False):
                yield from (f"{entry.name}/{name}" for name in list_files(entry.path))


def is_blank(text: str) -> bool:
    """Whether no character of a text is visible, as in a cell of zero-width spaces."""
    return not re.search(r"[^\s\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]", text)


def find_corpus(root: Path, source: str, target: str) -> tuple[Path, Path]:
    """The table and the folder of clips of one direction."""
    folder = root / check_language(source)
    table, clips = folder / f"{source}-{target}.tsv", folder / "clips"
    if not (table.is_file() and clips.is_dir()):
        have = sorted(p.stem for p in root.glob("*/*-*.tsv") if (p.parent / "clips").is_dir())
        raise FileNotFoundError(
            f"no {source}-{target} corpus in {root}: it needs {table} and {clips}. Corpora there: "
            f"{', '.join(have) or 'none'}. --data names another folder; tools/prepare.py makes one"
        )
    return table, clips


def read_corpus(
    root, source: str, target: str
) -> tuple[dict[str, list[Row]], list[tuple[str, str]]]:
    """The rows of one direction by split, and (split, reason) of each row that cannot be used.

    A clip is opened only if its row has no seconds. An error in the table is a ValueError.
    """
    table, clips = find_corpus(Path(root), source, target)
    files, places = set(list_files(clips)), {}
    splits, unusable = {split: [] for split in SPLITS}, []
    for place, cells in read_table(table, ("path", "sentence", "translation", "split")):
        name, split = path_inside(cells["path"], clips, files, place), cells["split"]
        if split not in SPLITS:
            raise ValueError(f"{place}: the split is {split!r}; write one of {', '.join(SPLITS)}")
        if places.setdefault(name, place) != place:
            raise ValueError(f"{place}: {name} is also in {places[name]}; keep one of the two rows")
        path = clips / name
        if is_blank(cells["translation"]):  # nothing to learn, nothing to score against
            unusable.append((split, f"{path}: empty translation ({place})"))
            continue
        seconds, reason = clip_seconds(path, name in files, cells.get("seconds", ""), place)
        if seconds > MAX_SECONDS and split != "test":  # a test clip is translated in pieces
            reason = f"{path}: {seconds:.1f} s long; the encoder takes {MAX_SECONDS} s"
        if reason:
            unusable.append((split, reason))
        if not reason or split == "test":  # a score of fewer clips could not be compared
            texts = "" if is_blank(cells["sentence"]) else cells["sentence"], cells["translation"]
            splits[split].append(Row(path, *texts, source, target, seconds))
    return splits, unusable


def clip_seconds(path: Path, is_listed: bool, cell: str, place: str) -> tuple[float, str]:
    """Length of a clip, and why it cannot be used ("" if it can)."""
    if not re.fullmatch(r"(\d+\.?\d*(e-\d+)?)?", cell):
        raise ValueError(f"{place}: seconds is {cell!r}; write a number such as 2.5, or nothing")
    try:
        seconds = float(cell) if cell and is_listed else audio_seconds(path)
    except AudioError as error:
        return 0.0, str(error)
    return seconds, "" if seconds else f"{path}: the clip has no samples"


def describe_overlap(train: list, test: list) -> str:
    """One line: how many sentences and translations of the test rows are also in train."""
    parts = []
    for column in ("sentence", "translation"):
        in_train = {getattr(row, column).strip() for row in train}
        texts = [text for row in test if (text := getattr(row, column).strip())]
        n = sum(text in in_train for text in texts)
        parts.append(f"of {len(texts):,} test {column}s, {n:,} are also in train")
    return "; ".join(parts)


# ------------------------------------------------------------------------------------------ prompts

# Special pieces of a prompt. They get their ids by name, so a "<s>" in a sentence of the corpus
# stays text (llama.Tokenizer explains the exception).
BOS, EOS, AUDIO = "<s>", "</s>", "<audio>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"  # a turn of ChatML
AUDIO_ID = -300  # marks the place of the speech; no real token has this id
IGNORE = -100  # F.cross_entropy skips targets with this value; no real token has this id

# The pieces of a prompt. The last piece closes the answer.
TEMPLATES = {
    "llama2": (BOS, "[INST] ", AUDIO, "\n{instruction} [/INST]", EOS),
    # The prompt of the original LLaST for TinyLlama. It has one </s> more than TinyLlama's own
    # prompt, which is tinyllama-chat.
    "tinyllama": (
        BOS, "<|user|>\n", AUDIO, "\n{instruction}", EOS, "\n<|assistant|>", EOS, "\n", EOS,
    ),
    "tinyllama-chat": (
        BOS, "<|user|>\n", AUDIO, "\n{instruction}", EOS, "\n<|assistant|>\n", EOS,
    ),
    "chatml": (
        BOS, IM_START, "user\n", AUDIO, "\n{instruction}", IM_END,
        "\n", IM_START, "assistant\n", IM_END,
    ),
    "plain": (BOS, AUDIO, "\n{instruction}\n", EOS),  # for models without chat training
}  # fmt: skip
INSTRUCTIONS = {
    "st": "Please translate the {source} sentence into {target}.",
    "asr": "Please transcribe the {source} sentence into {source}.",
}


def prompt_for(task: str, source: str, target: str, template: str = "llama2") -> list[str]:
    """The pieces of a prompt in order, text and special pieces.

    task is "st" (translate) or "asr" (transcribe). source and target are language codes.
    """
    if task not in INSTRUCTIONS or template not in TEMPLATES:
        raise ValueError(
            f"no prompt for task {task!r} with template {template!r}; "
            f"tasks: {', '.join(INSTRUCTIONS)}; templates: {', '.join(TEMPLATES)}"
        )
    source, target = LANGUAGES[check_language(source)], LANGUAGES[check_language(target)]
    instruction = INSTRUCTIONS[task].format(source=source, target=target)
    return [piece.format(instruction=instruction) for piece in TEMPLATES[template][:-1]]


def prompt_ids(pieces: list[str], tokenizer) -> list[int]:
    """Token ids of a prompt. Each text is encoded separately; AUDIO_ID is there once."""
    special = {BOS: tokenizer.bos_id, EOS: tokenizer.eos_id, AUDIO: AUDIO_ID}
    ids = []
    for piece in pieces:
        if piece in special:
            ids.append(special[piece])
        elif piece in (IM_START, IM_END):
            ids.append(tokenizer.special_id(piece))
        else:
            ids += tokenizer.encode(piece)
    return ids


def end_id(template: str, tokenizer) -> int:
    """The token that closes an answer. A translation stops at this token."""
    return prompt_ids(TEMPLATES[template][-1:], tokenizer)[0]


# -------------------------------------------------------------------------------- examples, batches


@dataclass(frozen=True)
class Example:
    """A row and a task: "st" (translate) or "asr" (transcribe)."""

    row: Row
    task: str

    @property
    def answer(self) -> str:
        return self.row.translation if self.task == "st" else self.row.sentence


def n_positions(n_samples: int, n_ids: int) -> int:
    """Positions of a row in the LLM: its ids, with the states of its clip in place of AUDIO_ID."""
    return n_states(n_samples) + n_ids - 1


@dataclass
class Batch:
    """What one training step sees: B examples with their clips and ids. Padding is on the right."""

    examples: list[Example]  # B
    audio: list[Tensor]  # B waveforms (N,), each of its own length
    ids: Tensor  # (B, T)
    labels: Tensor  # (B, T), the id where it is part of the answer, else IGNORE
    lengths: Tensor  # (B,), number of ids of each row without padding
    audio_at: list[int]  # B, the index of AUDIO_ID in each row

    @property
    def positions(self) -> list[int]:
        """n_positions of each row."""
        return [n_positions(len(a), n) for a, n in zip(self.audio, self.lengths.tolist())]


def examples_for(rows: list[Row], asr: float, seed: int, epoch: int) -> list[Example]:
    """Every row as an example to translate, and a random share `asr` of the clips to transcribe.

    This is ASR-augmented training (2407.15415); the original LLaST uses 1.0. A clip of several
    directions is transcribed once, a clip without a sentence never. The order depends only on seed
    and epoch.
    """
    if not 0 <= asr <= 1:
        raise ValueError(f"--asr is {asr}; it is a share, from 0 (none) to 1 (every clip)")
    rng = random.Random(f"examples {seed} {epoch}")
    spoken = {}
    for row in rows:
        if row.sentence.strip():
            spoken.setdefault(row.path, row)
    sample = rng.sample(list(spoken.values()), round(asr * len(spoken)))
    examples = [Example(row, "st") for row in rows] + [Example(row, "asr") for row in sample]
    rng.shuffle(examples)
    return examples


def group(examples: list, size_of, budget: int, seed: int, epoch: int) -> list[list]:
    """Put examples of similar size into one batch, because padding is lost work.

    The number of rows times the longest row is at most `budget` positions. Sorting is limited to
    windows of the shuffled order, so that the batches differ between epochs.
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
    """Ids (prompt, answer, end token) and labels (IGNORE for the prompt) of an example."""
    row = example.row
    prompt = prompt_ids(prompt_for(example.task, row.source, row.target, template), tokenizer)
    answer = tokenizer.encode(example.answer) + [end_id(template, tokenizer)]
    return prompt + answer, [IGNORE] * len(prompt) + answer


def collate(examples: list[Example], tokenizer, template: str, read_audio=load_audio) -> Batch:
    """Read the clips and pad the rows."""
    ids, labels = zip(*(answer_row(example, tokenizer, template) for example in examples))
    return Batch(
        examples=examples,
        audio=[read_audio(example.row.path) for example in examples],
        ids=pad_sequence([*map(torch.tensor, ids)], batch_first=True),
        labels=pad_sequence([*map(torch.tensor, labels)], batch_first=True, padding_value=IGNORE),
        lengths=torch.tensor([len(row) for row in ids]),
        audio_at=[row.index(AUDIO_ID) for row in ids],
    )


CACHE_BYTES = 2 * 10**9  # of decoded clips in memory, about 8 hours


class Batches:
    """The batches of a training run. They depend only on the arguments, seed and epoch.

    `change` is a function (N,) -> (N,) that alters each clip before it is encoded, such as noise.
    """

    def __init__(
        self, rows: list[Row], asr, tokenizer, template: str, budget: int, seed: int, change=None
    ):
        self.rows, self.asr, self.seed, self.budget = rows, asr, seed, budget
        self.tokenizer, self.template, self.change = tokenizer, template, change
        self.sizes: dict[Example, int] = {}
        self.skipped: dict[Path, str] = {}  # clips that failed, and why
        self.too_long: list[Example] = []  # rows of the last epoch that are longer than the budget
        self.decoded: dict[Path, Tensor] = {}
        self.decoded_bytes = 0

    def size_of(self, example: Example) -> int:
        """n_positions of an example, without reading its clip."""
        if example not in self.sizes:
            ids, _ = answer_row(example, self.tokenizer, self.template)
            # The product may have a rounding error, and n_states would round it up.
            n_samples = math.ceil(round(example.row.seconds * SAMPLE_RATE, 3))
            self.sizes[example] = n_positions(n_samples, len(ids))
        return self.sizes[example]

    def groups(self, epoch: int) -> list[list[Example]]:
        """The examples of each batch of an epoch. Rows longer than the budget are left out."""
        examples = examples_for(self.rows, self.asr, self.seed, epoch)
        self.too_long = [e for e in examples if self.size_of(e) > self.budget]
        if len(self.too_long) == len(examples):
            raise ValueError(
                f"none of {len(examples)} rows fits in --batch {self.budget} positions"
            )
        examples = [e for e in examples if self.size_of(e) <= self.budget]
        return group(examples, self.size_of, self.budget, self.seed, epoch)

    def load(self, examples: list[Example]) -> Batch | None:
        """A batch of these examples without those whose clip fails; None if all clips fail."""
        while examples:
            try:
                return collate(examples, self.tokenizer, self.template, self.read_audio)
            except AudioError as error:
                self.skipped[error.path] = error.reason
                examples = [e for e in examples if e.row.path != error.path]
        return None

    def read_audio(self, path: Path) -> Tensor:
        """Read a clip once and keep it, up to CACHE_BYTES of clips. -> (N,)

        Of a corpus that does not fit, each epoch finds the same part in memory.
        """
        audio = self.decoded.get(path)
        if audio is None:
            audio = load_audio(path)
            if self.decoded_bytes + audio.nbytes <= CACHE_BYTES:
                self.decoded[path] = audio
                self.decoded_bytes += audio.nbytes
        return self.change(audio.clone()) if self.change else audio
