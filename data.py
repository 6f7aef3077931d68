"""From files to batches: audio, corpora, prompts, ASR-augmented sampling.

    corpus folder -> rows -> examples (translate / transcribe) -> batches of waveforms and token ids

Audio of any rate and channel count becomes 16 kHz mono. A corpus has the layout of Common Voice 4
with CoVoST-2 (2007.10310) beside it; `python data.py prepare -h` brings others into it.
`prompt_for` is the only place where a prompt is made, for training and for use alike. To see rows
and labels drawn: tests/test_data.py.
"""

import csv
import difflib
import math
import os
import random
import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from whisper_encoder import MAX_SECONDS, SAMPLE_RATE, AudioError, audio_seconds, load_audio

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
        hint = f"did you mean {known[near[0]]!r}? Known" if near and code else "known"
        raise ValueError(f"unknown language {code!r}; {hint}: {', '.join(LANGUAGES)}")
    return code


# CoVoST-2's directions: into English from all others, and from English into these.
FROM_ENGLISH = "de tr fa sv-SE mn zh-CN cy ca sl et id ar ta lv ja".split()
GROUPS = {
    "all": [(code, "en") for code in LANGUAGES if code != "en"]
    + [("en", code) for code in FROM_ENGLISH],
    "paper": [(code, "en") for code in ("fr", "es", "de", "it", "zh-CN", "ja")]
    + [("en", code) for code in ("ja", "de", "zh-CN")],
}


def parse_directions(text: str) -> list[tuple[str, str]]:
    """Source and target of each item of "fr,en-de", once each; "all" and "paper" are GROUPS."""
    directions = []
    for item in map(str.strip, text.split(",")):
        directions += GROUPS.get(item) or [parse_direction(item)]
    return list(dict.fromkeys(directions))


def parse_direction(text: str) -> tuple[str, str]:
    """Source and target of "fr" (into English), "fr-en" or "en-zh-CN"; one side is English."""
    if text == "en":
        raise ValueError("en lacks the language to translate into; name it, as in en-de")
    if text in LANGUAGES or "-" not in text:
        return check_language(text), "en"
    # A code may hold a hyphen itself; where no cut fits, the error is about the likeliest.
    cuts = [(text[:i], text[i + 1 :]) for i, c in enumerate(text) if c == "-"]
    known = [pair for pair in cuts if set(pair) <= LANGUAGES.keys()]
    near = [pair for pair in cuts if "en" in pair]
    source, target = map(check_language, (known or near or cuts)[0])
    if (source == "en") == (target == "en"):
        raise ValueError(f"{text}: exactly one side has to be English, as in CoVoST-2")
    return source, target


# ------------------------------------------------------------------------------------------ corpora

SPLITS = ("train", "dev", "test")
VISIBLE = re.compile(r"[^\s\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")
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
    text = re.sub(r"[\t\r\n]+", " ", str(cell))
    return '"' + text.replace('"', '""') + '"' if '"' in text else text


def read_table(
    path: Path, columns, optional=(), header: list[str] | None = None, **dialect
) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield place ("FILE:LINE", for messages) and named cells of each row of a tab-separated table.

    A table without a line of column names needs `header`. `dialect` is for csv.reader: without it,
    cells are quoted as write_table, pandas and spreadsheets do it.
    """
    rows, file = read_cells(path, dialect or {"strict": True}), str(path)
    line, header = (1, header) if header else next(rows, (1, None))
    if header is None:
        raise ValueError(f"{path}:1: expected a header with {list(columns)}, found an empty file")
    if missing := [name for name in columns if name not in header]:
        raise ValueError(
            f"{path}:{line}: no column {missing} in the header {header}; "
            "write the column names in the first line, with tabs between them"
        )
    wanted = [(name, header.index(name)) for name in (*columns, *optional) if name in header]
    for line, cells in rows:
        if len(cells) != len(header):
            raise ValueError(
                f"{path}:{line}: expected {len(header)} cells ({', '.join(header)}), found "
                f"{len(cells)}; write exactly one tab between two cells"
            )
        yield f"{file}:{line}", {name: cells[i] for name, i in wanted}


def read_cells(path: Path, dialect: dict):
    """Yield line number and cells of each row of a tab-separated table."""
    with open(path, encoding="utf-8-sig", newline="") as file:
        rows = csv.reader(file, delimiter="\t", **dialect)
        line = 1
        try:
            for cells in rows:
                if rows.line_num > line and "strict" in dialect:
                    raise csv.Error("a cell in quotation marks contains a line break")
                if cells:
                    yield line, cells
                line = rows.line_num + 1
        except UnicodeDecodeError as error:
            raise ValueError(
                f"{path}:{first_line_not_utf8(path)}: expected UTF-8, found other bytes "
                f"({error.reason}); save the table as UTF-8"
            ) from error
        except csv.Error as error:
            raise ValueError(
                f"{path}:{line}: {error}; a cell that begins with a quotation mark must end with "
                'one, and marks inside it must be doubled: "He said ""no"" to me."'
            ) from error


def first_line_not_utf8(path: Path) -> int:
    with open(path, "rb") as file:
        for line, text in enumerate(file, start=1):
            try:
                text.decode()
            except UnicodeDecodeError:
                return line


def path_inside(name: str, clips: Path, files: set[str], where: str) -> str:
    """The path of a clip from the folder of clips on. A path that leads out of it is an error.

    What is in `files` (from list_files) is inside. To follow the links of each clip would be slow.
    """
    if name in files:
        return name
    if name and "\0" not in name and ".." not in Path(name).parts:
        real, folder = os.path.realpath(clips / name), os.path.realpath(clips)
        if real.startswith(folder + os.sep):
            path = Path(real).relative_to(folder) if Path(name).is_absolute() else Path(name)
            return path.as_posix()
    raise ValueError(
        f"{where}: the path {name!r} is not inside the audio folder {clips}; "
        "move the clip there and write its path from that folder on"
    )


def list_files(folder) -> Iterator[str]:
    """Paths of all files below a folder, from that folder on. Links are left out."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                yield entry.name
            elif entry.is_dir(follow_symlinks=False):
                yield from (f"{entry.name}/{name}" for name in list_files(entry.path))


def is_blank(text: str) -> bool:
    """Whether no character of a text is visible, as in a cell of zero-width spaces."""
    return not VISIBLE.search(text)


def find_corpus(root: Path, source: str, target: str) -> tuple[Path, Path]:
    """The table and the folder of clips of one direction."""
    folder = root / check_language(source)
    table, clips = folder / f"{source}-{target}.tsv", folder / "clips"
    for path in (table, clips):
        if not path.exists():
            tables = root.glob("*/*-*.tsv")
            have = sorted(p.stem for p in tables if p.name.startswith(f"{p.parent.name}-"))
            raise FileNotFoundError(
                f"no {source}-{target} corpus in {root}: {path} does not exist. Corpora there: "
                f"{', '.join(have) or 'none'}. Name another folder with --data, or make the corpus "
                "with tools/prepare.py"
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
    columns = "path", "sentence", "translation", "split"
    for where, cells in read_table(table, columns, ["seconds"]):
        name, split = path_inside(cells["path"], clips, files, where), cells["split"]
        if split not in SPLITS:
            raise ValueError(f"{where}: the split is {split!r}; write one of {', '.join(SPLITS)}")
        if places.setdefault(name, where) != where:
            raise ValueError(f"{where}: {name} is also in {places[name]}; keep one of the two rows")
        path = clips / name
        if is_blank(cells["translation"]):  # nothing to learn, nothing to score against
            unusable.append((split, f"{path}: empty translation ({where})"))
            continue
        seconds, reason = clip_seconds(path, name in files, cells.get("seconds", ""), where)
        if seconds > MAX_SECONDS and split != "test":  # a test clip is translated in pieces
            reason = f"{path}: {seconds:.1f} s long; the encoder takes {MAX_SECONDS} s"
        if reason:
            unusable.append((split, reason))
        if not reason or split == "test":  # without it the score could not be compared with others
            texts = "" if is_blank(cells["sentence"]) else cells["sentence"], cells["translation"]
            splits[split].append(Row(path, *texts, source, target, seconds))
    return splits, unusable


def clip_seconds(path: Path, is_listed: bool, cell: str, where: str) -> tuple[float, str]:
    """Length of a clip, and why it cannot be used ("" if it can)."""
    try:
        stated = float(cell or 0)
    except ValueError:
        stated = math.nan
    if not 0 <= stated < math.inf:
        raise ValueError(f"{where}: seconds is {cell!r}; write a number such as 2.5, or nothing")
    try:
        seconds = stated if stated and is_listed else audio_seconds(path)
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


def every_nth(rows: list[Row], n: int) -> list[Row]:
    """Sub-sampling of English: every n-th row of each direction from it, all rows of the others."""
    if n < 1:
        raise ValueError(f"--en-step is {n}; 1 keeps every row, 2 every second, and so on")
    seen, kept = Counter(), []
    for row in rows:
        if row.source != "en" or seen[row.target] % n == 0:
            kept.append(row)
        seen[row.target] += row.source == "en"
    return kept


# ------------------------------------------------------------------------------------------ prompts

# Pieces of a prompt that are not text. They become ids by name: a text that looks like one of them
# does not pass for it (see llama.Tokenizer for the exception).
BOS, EOS, AUDIO = "<s>", "</s>", "<audio>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"  # a turn of ChatML
AUDIO_ID = -300  # stands where the speech goes; no real token has it
IGNORE = -100  # F.cross_entropy skips targets with this value; no real token has it

# The pieces of a prompt, and last the one that closes the answer.
TEMPLATES = {
    "llama2": (BOS, "[INST] ", AUDIO, "\n{instruction} [/INST]", EOS),
    # The original's string for TinyLlama, which has one </s> more than the model's own, below it.
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
    "plain": (BOS, AUDIO, "\n{instruction}\n", EOS),  # for models that have learnt no chat
}  # fmt: skip
INSTRUCTIONS = {
    "st": "Please translate the {source} sentence into {target}.",
    "asr": "Please transcribe the {source} sentence into {source}.",
}


def prompt_for(task: str, source: str, target: str, template: str = "llama2") -> list[str]:
    """The pieces of a prompt, in order: text, and special pieces where those stand.

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
    return [piece.format(instruction=instruction) for piece in TEMPLATES[template][:-1]]


def prompt_ids(pieces: list[str], tokenizer) -> list[int]:
    """Token ids of a prompt, each piece of text on its own, AUDIO_ID once for all of the speech."""
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
    """The token that closes an answer: learnt in training, and where a translation stops."""
    return prompt_ids(TEMPLATES[template][-1:], tokenizer)[0]


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

    @property
    def positions(self) -> list[int]:
        """What each row takes in the LLM; its speech stands where one id stood."""
        speech = [math.ceil(len(a) * STATES_PER_SECOND / SAMPLE_RATE) for a in self.audio]
        return [n + int(T) - 1 for n, T in zip(speech, self.lengths, strict=True)]


def examples_for(rows: list[Row], asr: float, seed: int, epoch: int) -> list[Example]:
    """ASR-augmented sampling: every row to translate, the share `asr` of clips also to transcribe.

    1.0 is the original's mix. A clip of several directions is transcribed once, one without a
    sentence never. Shuffled as a function of (seed, epoch) alone.
    """
    if not 0 <= asr <= 1:
        raise ValueError(f"--asr is {asr}; it is a share, from 0 (none) to 1 (every clip)")
    rng = random.Random(f"examples {seed} {epoch}")
    spoken = {}
    for row in rows:
        if row.sentence.strip():
            spoken.setdefault(row.path, row)
    heard = rng.sample(list(spoken.values()), round(asr * len(spoken)))
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
    answer = tokenizer.encode(example.answer) + [end_id(template, tokenizer)]
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
