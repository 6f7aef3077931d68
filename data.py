"""From a corpus folder to batches.

    clips and a table -> rows -> examples (translate or transcribe) -> ids and labels -> batches

A corpus is a folder of clips, corpus/fr/clips/, and a table with tabs between its cells,
corpus/fr/fr-en.tsv. You can write the table in a text editor or a spreadsheet. The column seconds
may be missing or empty. Then the length is read from the sound file. Other columns are ignored.

    path         sentence            translation             split    seconds
    a.wav        Le chat dort.       The cat sleeps.         train    1.48
    far/b.mp3    « Oui », dit-il.    "He said ""yes""."      dev

A cell that contains a quotation mark is in quotation marks, and each " inside it is doubled.

One row of a batch, with words instead of ids. "-" is IGNORE, a position without a loss:

    ids      <s>  [INST]  AUDIO_ID  Please  ...  [/INST]  Where  is  it  ?  </s>
    labels   -    -       -         -       ...  -        Where  is  it  ?  </s>

Here the label of a token is the token itself. LLaST.forward shifts the labels, because a position
predicts the next token. It also replaces AUDIO_ID by the speech embeddings.
`prompt_for` makes the prompts for training and for translation.

Sizes: B rows, N samples of a clip, T ids.
"""

import csv
import difflib
import gc
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

LANGUAGES = {  # codes of Common Voice -> names in the prompt; GROUPS skips the first, English
    "en": "English", "fr": "French", "es": "Spanish", "zh-CN": "Chinese", "de": "German",
    "ja": "Japanese", "ca": "Catalan", "it": "Italian", "ru": "Russian", "pt": "Portuguese",
    "fa": "Persian", "et": "Estonian", "mn": "Mongolian", "nl": "Dutch", "tr": "Turkish",
    "ar": "Arabic", "sv-SE": "Swedish", "lv": "Latvian", "sl": "Slovenian", "ta": "Tamil",
    "id": "Indonesian", "cy": "Welsh",
}  # fmt: skip


def check_language(code: str) -> str:
    """Return the code. The ValueError for an unknown code names the most similar known code."""
    if code not in LANGUAGES:
        # Lower-case codes and names -> codes: "zh-cn" and "chinese" -> "zh-CN".
        codes = {text.lower(): c for c, name in LANGUAGES.items() for text in (c, name)}
        similar = [text for text in codes if text.startswith(code.lower())]
        similar = similar or difflib.get_close_matches(code.lower(), codes, n=1, cutoff=0.5)
        hint = f"did you mean {codes[similar[0]]!r}? If not, " if similar and code else ""
        raise ValueError(f"unknown language {code!r}; {hint}write one of {', '.join(LANGUAGES)}")
    return code


# CoVoST-2 has translations from every other language into English, and from English into these.
FROM_ENGLISH = "de tr fa sv-SE mn zh-CN cy ca sl et id ar ta lv ja".split()
GROUPS = {
    "all": ",".join([*list(LANGUAGES)[1:], *(f"en-{code}" for code in FROM_ENGLISH)]),
    "paper": "fr,es,de,it,zh-CN,ja,en-ja,en-de,en-zh-CN",  # the directions of the paper
}


def parse_directions(text: str) -> list[tuple[str, str]]:
    """Return (source, target) of each direction in a list such as "fr,en-de", each only once.

    "all" and "paper" are replaced by the lists in GROUPS.
    """
    items = []
    for item in map(str.strip, text.split(",")):
        items += GROUPS.get(item, item).split(",")
    return list(dict.fromkeys(map(parse_direction, items)))


def parse_direction(text: str) -> tuple[str, str]:
    """Return (source, target) of "fr" (into English), "fr-en" or "en-zh-CN"."""
    if text == "en":
        raise ValueError("the direction 'en' has no target language; write it, as in en-de")
    # "zh-CN" has a hyphen, but it is one language. For "zh-cn", check_language gives a hint.
    is_code = text.lower() in map(str.lower, LANGUAGES)
    if not is_code and "-" in text and text.split("-").count("en") != 1:
        raise ValueError(f"{text}: exactly one side has to be English, as in fr-en or en-de")
    if text.startswith("en-"):
        return "en", check_language(text.removeprefix("en-"))
    return check_language(text.removesuffix("-en")), "en"


# ------------------------------------------------------------------------------------------ corpora

SPLITS = ("train", "dev", "test")
csv.field_size_limit(1 << 30)  # csv allows 128 KiB per cell, and a column of notes may need more


@dataclass(frozen=True)
class Row:
    """One clip of a corpus, its sentence, and the translation of this sentence."""

    path: Path
    sentence: str
    translation: str
    source: str  # language code of the sentence
    target: str  # language code of the translation
    seconds: float


def write_table(path: Path, columns, rows):
    """Write a tab-separated table, which read_table, pandas and spreadsheets read in the same way.

    A cell that contains " is written as "...", with each " inside doubled, as csv does it. A tab or
    a line break in a cell becomes a space. An existing table is replaced only after the new one is
    completely written.
    """
    lines = ["\t".join(map(quote, row)) for row in (columns, *rows)]
    temporary = path.with_name(path.name + ".part")
    # A file name may have bytes that are not UTF-8. They are written as \udce9, for example.
    temporary.write_bytes("\n".join([*lines, ""]).encode(errors="backslashreplace"))
    temporary.replace(path)


def quote(cell) -> str:
    """Return a cell as text for a tab-separated table. None is an empty cell."""
    text = re.sub(r"[\t\r\n]+", " ", "" if cell is None else str(cell))
    return '"' + text.replace('"', '""') + '"' if '"' in text else text


def read_table(path: Path, columns, header=(), **dialect) -> Iterator[tuple[str, dict[str, str]]]:
    """Yield ("FILE:LINE", {column: cell}) for each row of a tab-separated table with `columns`.

    header: the column names, if the first line of the table does not have them. dialect: options of
    csv.reader, if the table has other quoting rules than those of write_table. tools/prepare.py
    uses both for downloaded tables.
    """
    file, line = str(path), 1
    rows = csv.reader(read_lines(path), delimiter="\t", strict=True, **dialect)
    try:
        header = header or next(rows, [])
        if wrong := [name for name in columns if header.count(name) != 1]:
            raise csv.Error(f"the header must have the column {wrong[0]} once, but it is {header}")
        line = rows.line_num + 1
        for cells in rows:
            if len(cells) not in (0, len(header)):
                raise csv.Error(f"expected {len(header)} cells {header}, found {len(cells)}")
            # If a quotation mark is missing, a row goes on in the next line. Other dialects allow
            # such rows.
            if rows.line_num > line and not dialect:
                raise csv.Error("a cell in quotation marks contains a line break")
            if cells:
                yield f"{file}:{line}", dict(zip(header, cells))
            line = rows.line_num + 1
    except csv.Error as error:
        raise ValueError(
            f"{file}:{line}: {error}; check that cells are separated by one tab, and that a cell "
            'that begins with a quotation mark ends with one and has "" for each mark inside'
        ) from error


def read_lines(path: Path) -> Iterator[str]:
    """Yield the lines of a UTF-8 file.

    Spreadsheets may begin a file with a byte order mark, which "utf-8-sig" removes.
    """
    with open(path, "rb") as file:
        for line, text in enumerate(file, start=1):
            try:
                yield text.decode("utf-8-sig" if line == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise ValueError(f"{path}:{line}: not UTF-8; save the table as UTF-8") from error


def path_inside(name: str, clips: Path, files: set[str], place: str) -> str:
    """Return the path of a clip relative to `clips`. A path to a place outside is an error.

    A name in `files`, the set of list_files(clips), is inside. Only other names, such as links, are
    checked with realpath, because realpath is slow.
    """
    if name in files:
        return name
    folder = os.path.realpath(clips) + os.sep
    is_unsafe = "\0" in name or ".." in Path(name).parts
    if is_unsafe or not os.path.realpath(clips / name).startswith(folder):
        raise ValueError(f"{place}: the path {name!r} is not inside {clips}; move the clip there")
    return Path(name).as_posix()


def list_files(folder) -> Iterator[str]:
    """Yield the relative path of each file in `folder` and its subfolders, without links."""
    with os.scandir(folder) as entries:
        for entry in entries:
            if entry.is_file(follow_symlinks=False):
                yield entry.name
            elif entry.is_dir(follow_symlinks=False):
                yield from (f"{entry.name}/{name}" for name in list_files(entry.path))


VISIBLE = re.compile(r"[^\s\u200b-\u200f\u202a-\u202e\u2060-\u2064\ufeff]")


def is_blank(text: str) -> bool:
    """Return True if a text has only spaces and invisible characters, such as zero-width spaces."""
    return not VISIBLE.search(text)


def find_corpus(root: Path, source: str, target: str) -> tuple[Path, Path]:
    """Return the table and the folder of clips of one direction."""
    folder = root / check_language(source)
    table, clips = folder / f"{source}-{target}.tsv", folder / "clips"
    if not (table.is_file() and clips.is_dir()):
        names = sorted(p.stem for p in root.glob("*/*-*.tsv") if (p.parent / "clips").is_dir())
        raise FileNotFoundError(
            f"no {source}-{target} corpus in {root}: it needs {table} and {clips}. Corpora there: "
            f"{', '.join(names) or 'none'}. --data names another folder; tools/prepare.py makes one"
        )
    return table, clips


def read_corpus(root, source: str, target: str) -> tuple[dict, list]:
    """Read the table of one direction. Return {split: rows} and [(split, reason), ...].

    The second result has an entry for each row that cannot be used. A clip is opened only if its
    row has no seconds or 0, or if it is a link. An error in the table is a ValueError.
    """
    # Python's garbage collection would search all rows again and again while they are made.
    gc.disable()
    try:
        return read_rows(*find_corpus(Path(root), source, target), source, target)
    finally:
        gc.enable()


def read_rows(table: Path, clips: Path, source: str, target: str) -> tuple[dict, list]:
    """Read the rows of one table. The result is that of read_corpus."""
    files, places = set(list_files(clips)), {}  # places: clip -> "FILE:LINE" of its row
    splits, unusable = {split: [] for split in SPLITS}, []
    for place, cells in read_table(table, ("path", "sentence", "translation", "split")):
        name, split = path_inside(cells["path"], clips, files, place), cells["split"]
        if split not in SPLITS:
            raise ValueError(f"{place}: the split is {split!r}; write one of {', '.join(SPLITS)}")
        if name in places:
            raise ValueError(f"{place}: {name} is also in {places[name]}; keep one of the two rows")
        places[name] = place
        path = clips / name
        # The model cannot learn from an empty translation, and a test clip needs a reference.
        if is_blank(cells["translation"]):
            unusable.append((split, f"{path}: empty translation ({place})"))
            continue
        seconds, reason = clip_seconds(path, cells.get("seconds", ""), place, name in files)
        if seconds > MAX_SECONDS and split != "test":  # a test clip is translated in pieces
            reason = f"{path}: {seconds:.1f} s long; the encoder takes {MAX_SECONDS} s"
        if reason:
            unusable.append((split, reason))
        # Other unusable clips stay in a test set: a score of fewer clips could not be compared.
        if not reason or split == "test":
            sentence = "" if is_blank(cells["sentence"]) else cells["sentence"]
            splits[split].append(Row(path, sentence, cells["translation"], source, target, seconds))
    return splits, unusable


def clip_seconds(path: Path, cell: str, place: str, is_listed: bool) -> tuple[float, str]:
    """Return the length of a clip, and why it cannot be used: "" if it can.

    `cell` has its seconds in the table. If it is "" or 0, they are read from the file. `is_listed`:
    the clip is one of list_files.
    """
    if not re.fullmatch(r"(\d+\.?\d*(e-\d+)?)?", cell):
        raise ValueError(f"{place}: seconds is {cell!r}; write a number such as 2.5, or nothing")
    try:
        stated = float(cell or 0) if is_listed else 0
        seconds = stated or audio_seconds(path)
    except AudioError as error:
        return 0.0, str(error)
    return seconds, "" if seconds else f"{path}: the clip has no samples"


def describe_overlap(train: list, test: list) -> str:
    """Return one line: how many sentences and translations of the test rows are also in train.

    The score of a test set is too high if the model has seen its sentences.
    """
    parts = []
    for column in ("sentence", "translation"):
        in_train = {getattr(row, column).strip() for row in train}
        texts = [text for row in test if (text := getattr(row, column).strip())]
        n = sum(text in in_train for text in texts)
        parts.append(f"of {len(texts):,} test {column}s, {n:,} are also in train")
    return "; ".join(parts)


# ------------------------------------------------------------------------------------------ prompts

# Special tokens of a prompt. `prompt_ids` looks up their ids and does not encode them as text. So
# "<s>" in a sentence of the corpus is ordinary text (llama.Tokenizer explains the exception). BOS
# and EOS are the first and last token of a text, whatever their names are in a tokenizer.
BOS, EOS, AUDIO = "<s>", "</s>", "<audio>"
IM_START, IM_END = "<|im_start|>", "<|im_end|>"  # ChatML: begin and end of a chat message
# Llama 3: begin and end of the name of a role (user or assistant), and the end of a chat message
ROLE_START, ROLE_END, EOT = "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
NAMED_TOKENS = (IM_START, IM_END, ROLE_START, ROLE_END, EOT)
AUDIO_ID = -300  # marks the place of the speech; no real token has this id
IGNORE = -100  # F.cross_entropy skips targets with this value; no real token has this id
MESSAGE = (AUDIO, "\n{instruction}")  # what the user says
CHATML = (IM_START, "user\n", *MESSAGE, IM_END, "\n", IM_START, "assistant\n", IM_END)

# The pieces of each prompt in order: texts and special tokens. The last piece is not in the prompt:
# it is the end token of the answer.
TEMPLATES = {
    "llama2": (BOS, "[INST] ", AUDIO, "\n{instruction} [/INST]", EOS),
    # The prompt of the original LLaST for TinyLlama. TinyLlama itself was trained with the prompt
    # "tinyllama-chat", which has one </s> less.
    "tinyllama": (BOS, "<|user|>\n", *MESSAGE, EOS, "\n<|assistant|>", EOS, "\n", EOS),
    "tinyllama-chat": (BOS, "<|user|>\n", *MESSAGE, EOS, "\n<|assistant|>\n", EOS),
    "chatml": (BOS, *CHATML),
    # The prompt of SmolLM2: a system message, and no BOS
    "smollm2": (IM_START, "system\nYou are a helpful AI assistant named SmolLM, trained by "
                "Hugging Face", IM_END, "\n", *CHATML),
    # The prompt of Llama 3, without a system message
    "llama3": (BOS, ROLE_START, "user", ROLE_END, "\n\n", *MESSAGE, EOT,
               ROLE_START, "assistant", ROLE_END, "\n\n", EOT),
    "plain": (BOS, AUDIO, "\n{instruction}\n", EOS),  # for models without chat training
}  # fmt: skip
INSTRUCTIONS = {
    "st": "Please translate the {source} sentence into {target}.",
    "asr": "Please transcribe the {source} sentence into {source}.",
}


def prompt_for(task: str, source: str, target: str, template: str = "llama2") -> list[str]:
    """Return the pieces of a prompt in order: texts and special tokens.

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
    """Return the token ids of a prompt, with AUDIO_ID at the place of the speech.

    Each text is encoded by itself, so its ids do not depend on the pieces before and after it.
    """
    special = {BOS: tokenizer.bos_id, EOS: tokenizer.eos_id, AUDIO: AUDIO_ID}
    special |= {piece: tokenizer.special_id(piece) for piece in pieces if piece in NAMED_TOKENS}
    ids = []
    for piece in pieces:
        ids += [special[piece]] if piece in special else tokenizer.encode(piece)
    return ids


def end_id(template: str, tokenizer) -> int:
    """Return the id of the token that ends an answer in training.

    Translation also stops at the end tokens of the LLM (translate.end_ids_of).
    """
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
    """Return how many positions a row has in the LLM: states of the clip + ids - 1 for AUDIO_ID."""
    return n_states(n_samples) + n_ids - 1


@dataclass
class Batch:
    """B examples that go through the model together. Padding is on the right."""

    examples: list[Example]  # B
    audio: list[Tensor]  # B waveforms (N,), each of its own length
    ids: Tensor  # (B, T)
    labels: Tensor  # (B, T), the id where it is part of the answer, else IGNORE
    lengths: Tensor  # (B,), number of ids of each row without padding
    audio_at: list[int]  # B indices of AUDIO_ID; reading them from a GPU tensor would be slow

    @property
    def positions(self) -> list[int]:
        """The number of positions of each row, see n_positions."""
        return [n_positions(len(a), n) for a, n in zip(self.audio, self.lengths.tolist())]


def examples_for(rows: list[Row], asr: float, seed: int, epoch: int) -> list[Example]:
    """Return one translation example per row, and transcription examples for a share of the clips.

    The share `asr` of the clips is chosen at random. This is ASR-augmented training (2407.15415);
    the original LLaST uses 1.0. A clip that belongs to several directions is transcribed only once.
    A clip without a sentence is not transcribed. The same arguments always give the same list.
    """
    if not 0 <= asr <= 1:
        raise ValueError(f"--asr is {asr}; it is a share, from 0 (none) to 1 (every clip)")
    # The seed of Random can be a text. The same text gives the same numbers on every machine.
    rng = random.Random(f"examples {seed} {epoch}")
    row_of_clip = {}
    for row in rows:
        if row.sentence.strip():
            row_of_clip.setdefault(row.path, row)
    sample = rng.sample(list(row_of_clip.values()), round(asr * len(row_of_clip)))
    examples = [Example(row, "st") for row in rows] + [Example(row, "asr") for row in sample]
    rng.shuffle(examples)
    return examples


def group(examples: list, size_of, budget: int, seed: int, epoch: int) -> list[list]:
    """Return batches of examples of similar size, because computing padding is a waste of time.

    The number of rows times the longest row is at most `budget` positions. The examples come in
    random order, and only those of about 50 batches are sorted by size together. If all were
    sorted together, every epoch would have nearly the same batches.
    """
    rng = random.Random(f"batches {seed} {epoch}")
    longest = max(map(size_of, examples))
    window = 50 * max(1, budget // max(1, longest))
    batches = []
    for start in range(0, len(examples), window):
        batches.append([])
        for example in sorted(examples[start : start + window], key=size_of):
            # This example is the longest of its batch, because they are sorted.
            if batches[-1] and size_of(example) * (len(batches[-1]) + 1) > budget:
                batches.append([])
            batches[-1].append(example)
    rng.shuffle(batches)
    return batches


def answer_row(example: Example, tokenizer, template: str) -> tuple[list[int], list[int]]:
    """Return ids (prompt, answer, end token) and labels (IGNORE for the prompt) of an example."""
    row = example.row
    prompt = prompt_ids(prompt_for(example.task, row.source, row.target, template), tokenizer)
    answer = tokenizer.encode(example.answer) + [end_id(template, tokenizer)]
    return prompt + answer, [IGNORE] * len(prompt) + answer


def collate(examples: list[Example], tokenizer, template: str, read_audio=load_audio) -> Batch:
    """Make a Batch: read the clips, and pad the ids and the labels to the same length."""
    ids, labels = zip(*(answer_row(example, tokenizer, template) for example in examples))
    return Batch(
        examples=examples,
        audio=[read_audio(example.row.path) for example in examples],
        ids=pad_sequence([*map(torch.tensor, ids)], batch_first=True),
        labels=pad_sequence([*map(torch.tensor, labels)], batch_first=True, padding_value=IGNORE),
        lengths=torch.tensor([len(row) for row in ids]),
        audio_at=[row.index(AUDIO_ID) for row in ids],
    )


CACHE_BYTES = 2 * 10**9  # of decoded clips in memory, almost 9 hours


class Batches:
    """The batches of a training run. The same arguments and epoch always give the same batches.

    `change` is a function (N,) -> (N,) that alters each clip before it is encoded, for example one
    that adds noise.
    """

    def __init__(self, rows: list[Row], asr, tokenizer, template, budget, seed, change=None):
        self.rows, self.asr, self.seed, self.budget = rows, asr, seed, budget
        self.tokenizer, self.template, self.change = tokenizer, template, change
        self.sizes: dict[Example, int] = {}
        self.skipped: dict[Path, str] = {}  # clips that failed, and why
        self.too_long: list[Example] = []  # rows that the latest call of groups() left out
        self.decoded: dict[Path, Tensor] = {}
        self.decoded_bytes = 0

    def size_of(self, example: Example) -> int:
        """Return the number of positions of an example, without reading its clip."""
        if example not in self.sizes:
            ids, _ = answer_row(example, self.tokenizer, self.template)
            # 8.06 * 16000 is 128960.00000000001. Without round(), ceil would add a sample, and
            # n_states a state.
            n_samples = math.ceil(round(example.row.seconds * SAMPLE_RATE, 3))
            self.sizes[example] = n_positions(n_samples, len(ids))
        return self.sizes[example]

    def groups(self, epoch: int) -> list[list[Example]]:
        """Return the examples of each batch of an epoch, without those longer than the budget."""
        examples = examples_for(self.rows, self.asr, self.seed, epoch)
        self.too_long = [e for e in examples if self.size_of(e) > self.budget]
        if len(self.too_long) == len(examples):
            raise ValueError(f"no row fits in --batch {self.budget} positions; use a larger one")
        examples = [e for e in examples if self.size_of(e) <= self.budget]
        return group(examples, self.size_of, self.budget, self.seed, epoch)

    def load(self, examples: list[Example]) -> Batch | None:
        """Make a batch of the examples whose clip can be read. Return None if there is none."""
        while examples:
            try:
                return collate(examples, self.tokenizer, self.template, self.read_audio)
            except AudioError as error:
                self.skipped[error.path] = error.reason
                examples = [e for e in examples if e.row.path != error.path]
        return None

    def read_audio(self, path: Path) -> Tensor:
        """Read a clip and keep it in memory, up to CACHE_BYTES of clips. -> (N,)

        If the corpus is larger, the clips that were read first stay in memory, and the others are
        read again in every epoch.
        """
        audio = self.decoded.get(path)
        if audio is None:
            audio = load_audio(path)
            if len(audio) > MAX_SECONDS * SAMPLE_RATE:  # its seconds in the table are wrong
                raise AudioError(path, f"over {MAX_SECONDS} s; correct its seconds in the table")
            if self.decoded_bytes + audio.nbytes <= CACHE_BYTES:
                self.decoded[path] = audio
                self.decoded_bytes += audio.nbytes
        # A clone, because `change` must not modify the clip in memory.
        return self.change(audio.clone()) if self.change else audio
