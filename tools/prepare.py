"""Prepare a corpus for train.py: CoVoST-2, FLEURS, voice prompts, or a table of your own.

    find tables -> read rows -> check rows -> convert clips -> write the table -> report

The prepared corpus has the layout that data.py reads. A run that was stopped continues when it is
started again.
"""

import argparse
import csv
import gzip
import hashlib
import io
import json
import os
import re
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path, PurePosixPath

import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository's folder

from data import (
    FROM_ENGLISH,
    LANGUAGES,
    SPLITS,
    describe_overlap,
    is_blank,
    list_files,
    parse_directions,
    path_inside,
    read_table,
    write_table,
)
from whisper_encoder import MAX_SECONDS, SAMPLE_RATE, AudioError, audio_seconds, load_audio

FLEURS = dict(zip(LANGUAGES, (
    "en_us fr_fr es_419 cmn_hans_cn de_de ja_jp ca_es it_it ru_ru pt_br fa_ir et_ee mn_mn nl_nl "
    "tr_tr ar_eg sv_se lv_lv sl_si ta_in id_id cy_gb"
).split()))  # fmt: skip
FLEURS_HEADER = "id file_name raw_transcription transcription characters num_samples gender".split()
REASONS = {  # start of an AudioError's reason -> reason in the report; else "undecodable"
    "no such file": "missing", "the file is empty": "zero bytes",
    "the clip has no samples": "too short",
}  # fmt: skip
PLAIN = {"quoting": csv.QUOTE_NONE}  # a quotation mark is a character like any other
ESCAPED = PLAIN | {"escapechar": "\\"}  # as CoVoST-2's get_covost_splits.py reads its tables
UNUSED_SPLITS = ("dev_covost", "test_covost")  # CoVoST-2's own script does not use them either
N_TEST, N_DEV = 100, 50  # voice prompts in test and in dev; the others are in train
MIN_PROMPT_SECONDS = 0.3
DEBIAN = "en", "es", "fr", "it", "ru"  # it has prompts in these languages
PART = ".part"  # ends the name of a file that is not complete yet


@dataclass(frozen=True)
class Entry:
    """One row of the tables of a corpus."""

    place: str  # table and line, for messages
    path: str  # inside the folder of the clips
    sentence: str
    translation: str
    split: str


@dataclass
class Entries:
    """The rows of a direction, and the rows that are in no split, grouped by the reason."""

    by_path: dict[str, Entry] = field(default_factory=dict)
    left_out: dict[str, list[str]] = field(default_factory=dict)
    note: str = ""  # for the report

    def add(self, entry: Entry):
        """Add a row. If a path occurs twice, only its first row is used."""
        first = self.by_path.setdefault(entry.path, entry)
        if first is not entry:
            self.leave_out("path twice", f"{entry.place}: {entry.path}: first in {first.place}")

    def leave_out(self, reason: str, row: str):
        self.left_out.setdefault(reason, []).append(row)


# ----------------------------------------------------------------------------- find and read tables

# Each corpus has two functions. find_... returns the folder of the clips and the tables, and raises
# an error if they do not exist. read_... reads the tables.


def existing(path: Path, name: str, advice: str = "check the path") -> Path:
    if not path.exists():
        raise FileNotFoundError(f"no {name}: {path} does not exist; {advice}")
    return path


def find_covost2(args: argparse.Namespace, source: str, target: str) -> tuple[Path, list[Path]]:
    """The folder of the clips, and two tables: Common Voice's sentences and CoVoST-2's own."""
    root, name = args.common_voice, f"covost_v2.{source}_{target}.tsv"
    folders = [path for path in (root / source, root) if (path / "validated.tsv").is_file()]
    if not folders:
        raise FileNotFoundError(
            f"no Common Voice in {root}: neither {source}/validated.tsv nor validated.tsv exists; "
            "unpack it there, or name another folder"
        )
    tables = [
        path for path in (args.covost / name, *args.covost.glob(f"*/{name}")) if path.is_file()
    ]
    if not tables:
        raise FileNotFoundError(
            f"no translations: {name} is not in {args.covost} or a folder in it; unpack it there. "
            f"CoVoST-2 has all languages into en, and en into {', '.join(FROM_ENGLISH)}"
        )
    clips = existing(folders[0] / "clips", "clips")
    return clips, [folders[0] / "validated.tsv", tables[0]]


def read_covost2(args: argparse.Namespace, source: str, tables: list[Path]) -> Entries:
    """Join sentences and translations on path, as CoVoST-2's get_covost_splits.py does."""
    spoken, translated = tables
    rows = read_table(spoken, ["path", "sentence"], **ESCAPED)
    sentences = {row["path"]: row["sentence"] for _, row in rows}
    entries = Entries()
    for place, row in read_table(translated, ["path", "translation", "split"], **ESCAPED):
        path = row["path"]
        split = "train" if row["split"] == "train_covost" else row["split"]
        if split in UNUSED_SPLITS:
            entries.leave_out("extended dev or test", f"{place}: {path}: {split}")
        elif split not in SPLITS:
            entries.leave_out("unknown split", f"{place}: {path}: {split}")
        elif path not in sentences:
            entries.leave_out(f"not in {spoken.name}", f"{place}: {path}")
        else:
            entries.add(Entry(place, path, sentences[path], row["translation"], split))
    if not entries.by_path:
        raise ValueError(
            f"{translated} and {spoken} have no clip of {', '.join(SPLITS)} in common; use the "
            "same language, and Common Voice 4"
        )
    return entries


def find_fleurs(args: argparse.Namespace, source: str, target: str) -> tuple[Path, list[Path]]:
    folders = args.fleurs / FLEURS[source], args.fleurs / FLEURS[target]
    tables = [folder / f"{split}.tsv" for split in SPLITS for folder in folders]
    return existing(folders[0] / "audio", "audio"), [existing(path, "table") for path in tables]


def read_fleurs(args: argparse.Namespace, source: str, tables: list[Path]) -> Entries:
    """FLEURS has each sentence in every language: rows of a sentence have the same id."""
    entries, columns = Entries(), ["id", "file_name", "raw_transcription"]
    for split, spoken, translated in zip(SPLITS, tables[::2], tables[1::2]):
        rows = read_table(translated, columns, header=FLEURS_HEADER, **PLAIN)
        translations = {row["id"]: row["raw_transcription"] for _, row in rows}
        for place, row in read_table(spoken, columns, header=FLEURS_HEADER, **PLAIN):
            path, sentence = f"{split}/{row['file_name']}", row["raw_transcription"]
            if row["id"] in translations:
                entries.add(Entry(place, path, sentence, translations[row["id"]], split))
            else:
                entries.leave_out("no translation", f"{place}: {path}: id {row['id']}")
    return entries


def prompts_of(args: argparse.Namespace, language: str) -> Path:
    return args.share / "asterisk" / "sounds" / language


def find_voice_prompts(
    args: argparse.Namespace, source: str, target: str
) -> tuple[Path, list[Path]]:
    """The folder of the prompts, and the texts of both languages, as Debian installs them."""
    tables = []
    for code in (source, target):
        name = f"core-sounds-{code}"
        table = args.share / "doc" / f"asterisk-{name}" / f"{name}.txt.gz"
        tables.append(existing(table, f"texts of {code}", suggest_package(code)))
    audio = prompts_of(args, source)
    if not any(audio.glob("*.wav")):
        raise FileNotFoundError(
            f"no prompts of {source}: {audio} has no .wav file; {suggest_package(source, '-wav')}"
        )
    return audio, tables


def suggest_package(language: str, ending: str = "") -> str:
    if language in DEBIAN:
        return f"apt-get install asterisk-core-sounds-{language}{ending}"
    return "Debian does not have this language; tools/README.md says which files are needed"


def read_voice_prompts(args: argparse.Namespace, source: str, tables: list[Path]) -> Entries:
    """Join the texts of two languages: a prompt has the same name in every language."""
    audio, entries, prompts = prompts_of(args, source), Entries(), {}
    spoken, translated = map(read_prompt_texts, tables)
    for name, (place, sentence) in spoken.items():
        _, translation = translated.get(name, ("", ""))
        if problem := prompt_problem(audio / f"{name}.wav", sentence, translation):
            entries.leave_out(problem, f"{place}: {name}: {sentence}")
        else:
            prompts[name] = place, f"{name}.wav", sentence, translation
    names = {path.removesuffix(".wav") for path in list_files(audio) if path.endswith(".wav")}
    for name in sorted(names - set(spoken)):
        entries.leave_out(f"not in {tables[0].name}", f"{audio}: {name}")
    english = spoken if source == "en" else translated
    for name, split in draw_prompt_splits({name: english[name][1] for name in prompts}).items():
        entries.add(Entry(*prompts[name], split))
    return entries


def read_prompt_texts(table: Path) -> dict[str, tuple[str, str]]:
    """{name of a prompt: (place, text)}. A line is "name: text" or a comment after a semicolon."""
    try:
        lines = gzip.decompress(table.read_bytes()).decode("utf-8-sig").splitlines()
    except (gzip.BadGzipFile, EOFError, UnicodeDecodeError) as error:
        raise ValueError(f"{table} cannot be read ({error}); install its package again") from error
    texts = {}
    for number, line in enumerate(lines, start=1):
        name, colon, text = line.partition(":")
        if colon and not line.startswith(";"):
            texts.setdefault(name.strip(), (f"{table}:{number}", text.strip()))
    return texts


def prompt_problem(clip: Path, sentence: str, translation: str) -> str:
    """The reason why a prompt is left out; "" if it is usable. It may have no transcript."""
    if is_blank(translation):
        return "no translation"
    if re.search(r"[][(){}<>]", sentence + translation):
        return "text in brackets"  # a noise or a note, for example "[beep]" or "Pour (emphase)"
    try:
        seconds = audio_seconds(clip)
    except AudioError as error:
        return "missing" if error.reason.startswith("no such file") else "undecodable"
    if seconds < MIN_PROMPT_SECONDS:
        return f"shorter than {MIN_PROMPT_SECONDS} s"
    return "too long" if seconds > MAX_SECONDS else ""


def draw_prompt_splits(english: dict[str, str]) -> dict[str, str]:
    """The split of each prompt. Prompts with the same English words are in the same split.

    The hash of the English words gives the order: first test, then dev, then train. The order is
    the same for all languages. So most test prompts of one language are in test or in dev of
    another one, if both have about as many prompts.
    """

    def order(name: str) -> str:
        words = " ".join(re.findall(r"\w+", english[name].casefold()))
        return hashlib.sha256(words.encode()).hexdigest()

    splits = {}
    for _, group in groupby(sorted(english, key=order), key=order):
        is_test, is_dev = len(splits) < N_TEST, len(splits) < N_TEST + N_DEV
        splits |= dict.fromkeys(group, "test" if is_test else "dev" if is_dev else "train")
    return splits


def find_own_table(args: argparse.Namespace, source: str, target: str) -> tuple[Path, list[Path]]:
    return existing(args.audio, "folder --audio"), [existing(args.table, "table --table")]


def read_own_table(args: argparse.Namespace, source: str, tables: list[Path]) -> Entries:
    """A table of your own: path and translation, optionally sentence, lang and split."""
    entries, languages = Entries(), set()
    has_splits = False
    for place, row in read_table(args.table, ["path", "translation"]):
        path, has_splits = row["path"], "split" in row
        split = (row["split"] or "train") if has_splits else draw_split(path)
        if split not in SPLITS:
            raise ValueError(f"{place}: the split is {split!r}; write one of {', '.join(SPLITS)}")
        languages.add(row.get("lang", source))
        if row.get("lang", source) != source:
            entries.leave_out("other language", f"{place}: {path}: {row['lang']}")
        else:
            entries.add(Entry(place, path, row.get("sentence", ""), row["translation"], split))
    if not entries.by_path:
        content = f"its column lang has {sorted(languages)}" if languages else "it has no rows"
        raise ValueError(
            f"{args.table} has no row of {source}: {content}; check --lang and --table"
        )
    if not has_splits:
        check_drawn_splits(args.table, entries)
        entries.note = "the table has no column split: 1 clip of 20 was drawn for dev, 1 for test"
    return entries


def draw_split(path: str) -> str:
    """Draw one clip of 20 for dev and one for test, always the same ones for the same paths."""
    number = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 20
    return {0: "dev", 1: "test"}.get(number, "train")


def check_drawn_splits(table: Path, entries: Entries):
    missing = set(SPLITS) - {entry.split for entry in entries.by_path.values()}
    if missing:
        raise ValueError(
            f"{table} has {len(entries.by_path)} rows, too few to draw dev and test from them: "
            f"no row was drawn for {', '.join(sorted(missing))}. Add a column split with "
            f"{', '.join(SPLITS)}"
        )


CORPORA = {
    "covost2": (find_covost2, read_covost2),
    "fleurs": (find_fleurs, read_fleurs),
    "voice-prompts": (find_voice_prompts, read_voice_prompts),
    "table": (find_own_table, read_own_table),
}


# --------------------------------------------------------------------------------------- check rows


def text_problem(entry: Entry, corpus: str) -> str:
    """The reason why the text of a row cannot be used; "" if it can."""
    if is_blank(entry.translation):
        return "empty text"
    is_marked = corpus == "covost2" and re.search(r"\bREMOVE\b", entry.translation)
    return "REMOVE" if is_marked else ""  # CoVoST-2's mark for a bad translation


@dataclass(frozen=True)
class Clip:
    """A row whose clip is to be converted."""

    entry: Entry
    audio: Path
    name: str  # path of the FLAC inside the folder of clips
    flac: Path


def plan_clips(entries: list[Entry], audio: Path, clips: Path) -> list[Clip]:
    """Find each clip and name its FLAC. It is an error if two clips get the same name."""
    files, planned = set(list_files(audio)), {}
    for entry in entries:
        path = path_inside(entry.path, audio, files, entry.place)
        if os.path.isabs(path):
            path = os.path.relpath(os.path.realpath(path), os.path.realpath(audio))
        name = PurePosixPath(path).with_suffix(".flac").as_posix()
        clip = Clip(entry, audio / path, name, clips / name)
        if other := planned.get(name):
            paths = f"{entry.path} and {other.entry.path}"
            raise ValueError(f"{entry.place}: {paths} would both become {name}; rename one of them")
        planned[name] = clip
    return list(planned.values())


# ------------------------------------------------------------------------------------ convert clips


@dataclass(frozen=True)
class Converted:
    """The result of one clip."""

    seconds: float = 0.0  # of the FLAC; 0 if there is none
    problem: str = ""  # a reason for the report; "" if there is none
    detail: str = ""
    was_there: bool = False  # an earlier run has converted it


def convert(clip: Clip) -> Converted:
    """Decode a clip and write it as FLAC, 16 kHz, mono, 16 bits.

    A clip that is too long is written only if it is in test: test clips are translated in pieces.
    """
    seconds = seconds_before(clip)
    was_there = seconds > 0
    try:
        if not was_there:
            audio = load_audio(clip.audio)
            seconds = len(audio) / SAMPLE_RATE
            if seconds > MAX_SECONDS and clip.entry.split != "test":
                return Converted(0.0, "too long", f"{seconds:.1f} s")
            write_flac(audio, clip.flac)
    except AudioError as error:
        reasons = [REASONS[start] for start in REASONS if error.reason.startswith(start)]
        return Converted(0.0, *(reasons or ["undecodable"]), error.reason)
    if seconds > MAX_SECONDS:
        return Converted(seconds, "too long", f"{seconds:.1f} s", was_there)
    return Converted(seconds, was_there=was_there)


def seconds_before(clip: Clip) -> float:
    """How long the FLAC of an earlier run is; 0 if there is none or the clip is newer."""
    try:
        is_newer = clip.audio.exists() and clip.audio.stat().st_mtime > clip.flac.stat().st_mtime
        return 0.0 if is_newer else audio_seconds(clip.flac)
    except (AudioError, OSError):
        return 0.0


def write_flac(audio: Tensor, flac: Path):
    """Write (N,) samples. Samples beyond -1..1 are clipped."""
    samples = (audio * 32768).round().clamp(-32768, 32767).to(torch.int16)
    file = io.BytesIO()
    soundfile.write(file, samples.numpy(), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    write_whole(flac, file.getvalue())


def write_whole(path: Path, content: bytes):
    """Write under another name first, so that a file with this name is always complete."""
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(path.name + PART)
    part.write_bytes(content)
    part.replace(path)


def as_worker():
    """Set up a process: one thread, because each core has a process; the parent handles Ctrl-C."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def convert_all(clips: list[Clip], label: str) -> list[Converted]:
    """Convert on all cores. After Ctrl-C, finish the clips in progress and skip the others."""
    with ProcessPoolExecutor(os.cpu_count(), initializer=as_worker) as pool:
        try:
            results = pool.map(convert, clips, chunksize=8)
            return list(tqdm(results, label, len(clips), unit="clip", dynamic_ncols=True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ------------------------------------------------------------------------------------------ prepare


def prepare(args: argparse.Namespace, source: str, target: str) -> list[str]:
    """Convert the clips of a direction, write its table, and report.

    Returns the splits that should have clips and have none.
    """
    find, read = CORPORA[args.corpus]
    audio, tables = find(args, source, target)
    folder, direction = args.out / source, f"{source}-{target}"
    origin = {"corpus": args.corpus, "version": args.version, "audio": os.path.realpath(audio)}
    check_out(folder, audio, origin)
    entries = read(args, source, tables)
    report = new_report({"direction": direction} | origin, tables, entries)

    checked = []
    for entry in entries.by_path.values():
        if problem := text_problem(entry, args.corpus):
            count(report, entry, "left out", problem)
        else:
            checked.append(entry)
    clips = plan_clips(checked, audio, folder / "clips")
    for part in folder.rglob(f"*{PART}"):
        part.unlink()  # left by a run that was stopped
    kept = keep_usable(clips, convert_all(clips, direction), report)

    (folder / "clips").mkdir(parents=True, exist_ok=True)
    # Write the report before the table: check_out refuses a table without a report.
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    write_whole(folder / f"prepared.{direction}.json", text.encode())
    write_corpus(folder / f"{direction}.tsv", kept)
    print_report(report, sum(result.was_there for _, result in kept), folder)
    # A table of your own may be only a test set. The other corpora have all three splits.
    usable = {clip.entry.split for clip, result in kept if result.seconds}
    wanted = {e.split for e in entries.by_path.values()} if args.corpus == "table" else set(SPLITS)
    return [split for split in SPLITS if split in wanted - usable]


def check_out(folder: Path, audio: Path, origin: dict):
    """Raise an error if the folder already has another corpus.

    Directions of one corpus share a folder. Clips of two corpora could have the same name.
    """
    if os.path.realpath(folder / "clips") == os.path.realpath(audio):
        raise ValueError(f"{folder} has the original clips; choose another folder with --out")
    reports = sorted(folder.glob("prepared.*.json"))
    tables = [*folder.glob(f"{folder.name}-*.tsv"), *folder.glob("validated.tsv")]
    if tables and not reports:
        raise ValueError(
            f"{folder} has a corpus that prepare.py did not make; choose another --out"
        )
    for file in reports:
        try:
            before = json.loads(file.read_text(encoding="utf-8"))
            others = [key for key in ("corpus", "audio") if before[key] != origin[key]]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise ValueError(f"{file} is not a report ({error!r}); choose another --out") from error
        if others:
            differs = "; ".join(f"{k}: {before[k]} there, {origin[k]} now" for k in others)
            raise ValueError(f"{file} is of another corpus ({differs}); choose another --out")


def keep_usable(
    clips: list[Clip], results: list[Converted], report: dict
) -> list[tuple[Clip, Converted]]:
    """The rows of the prepared corpus. Their numbers and all problems are added to `report`.

    A clip without usable audio is left out of train and dev. It stays in test: without it the score
    could not be compared with others.
    """
    kept = []
    for clip, result in zip(clips, results, strict=True):
        in_test = clip.entry.split == "test"
        if result.problem:
            key = "kept in spite of" if in_test else "left out"
            count(report, clip.entry, key, result.problem, f": {result.detail}")
        if not result.problem or in_test:
            kept.append((clip, result))
    for split, numbers in report["splits"].items():
        rows = [(c.entry, r) for c, r in kept if c.entry.split == split]
        seconds = sum(result.seconds for _, result in rows if not result.problem)
        numbers["kept"], numbers["hours"] = len(rows), round(seconds / 3600, 4)
        numbers["without a transcript"] = sum(is_blank(entry.sentence) for entry, _ in rows)
    train, test = ([c.entry for c, _ in kept if c.entry.split == s] for s in ("train", "test"))
    report["overlap"] = describe_overlap(train, test)
    return kept


def write_corpus(table: Path, kept: list[tuple[Clip, Converted]]):
    """The table that data.read_corpus reads. A clip without audio has no seconds."""
    rows = [
        (c.name, c.entry.sentence, c.entry.translation, c.entry.split, r.seconds or "")
        for c, r in kept
    ]
    write_table(table, ("path", "sentence", "translation", "split", "seconds"), rows)


# ----------------------------------------------------------------------------------------- report


def new_report(origin: dict, tables: list[Path], entries: Entries) -> dict:
    numbers = {"kept": 0, "hours": 0.0, "without a transcript": 0}
    return origin | {
        "note": entries.note,
        "tables": {str(t): hashlib.sha256(t.read_bytes()).hexdigest() for t in tables},
        "splits": {s: numbers | {"left out": {}, "kept in spite of": {}} for s in SPLITS},
        "in no split": {reason: len(rows) for reason, rows in entries.left_out.items()},
        "examples": {reason: rows[:5] for reason, rows in entries.left_out.items()},
    }


def count(report: dict, entry: Entry, key: str, problem: str, detail: str = ""):
    """Count one row with a problem. The first five of each problem are named."""
    numbers = report["splits"][entry.split][key]
    numbers[problem] = numbers.get(problem, 0) + 1
    examples = report["examples"].setdefault(problem, [])
    if len(examples) < 5:
        examples.append(f"{entry.place}: {entry.path}{detail}")


def print_report(report: dict, n_before: int, folder: Path):
    """Print every number of the report by split, and examples of each problem."""
    print(f"\n{report['direction']}, {report['corpus']}, version {report['version']}")
    print(f"{'':34}" + "".join(f"{split:>10}" for split in SPLITS))
    splits = report["splits"].values()
    for name in ("kept", "hours", "without a transcript"):
        print(f"{name:34}" + "".join(f"{numbers[name]:10,}" for numbers in splits))
    for key in ("left out", "kept in spite of"):
        for problem in dict.fromkeys(p for numbers in splits for p in numbers[key]):
            label = f"{key}: {problem}"
            print(f"{label:34}" + "".join(f"{n[key].get(problem, 0):10,}" for n in splits))
    for reason, n in report["in no split"].items():
        print(f"{n:,} row{'s'[: n > 1]} left out, in no split: {reason}")
    for reason, rows in report["examples"].items():
        for row in rows:
            print(f"    {reason}: {row}")
    print(report["overlap"])
    if report["note"]:
        print(report["note"])
    print(f"{n_before:,} clips were converted before. The corpus and this report: {folder}")


# ----------------------------------------------------------------------------------------- command

EXAMPLES = """
examples:
  python tools/prepare.py covost2 --common-voice cv-corpus-4 --covost covost --lang fr,de --out C
  python tools/prepare.py fleurs --fleurs fleurs --lang fr --out F
  python tools/prepare.py voice-prompts --lang fr --out V
  python tools/prepare.py table --table mine.tsv --audio recordings --lang cy --out M

Each can be stopped with Ctrl-C and continues when it is started again. Then train with
  python train.py --data C --lang fr,de
"""


def build_parser() -> argparse.ArgumentParser:
    raw = argparse.RawDescriptionHelpFormatter
    description = "Join a corpus's tables, convert its clips once to 16 kHz FLAC, and report."
    parser = argparse.ArgumentParser(description=description, epilog=EXAMPLES, formatter_class=raw)
    corpora = parser.add_subparsers(dest="corpus", required=True, metavar="CORPUS")
    needed = {"type": Path, "required": True, "metavar": "PATH"}
    covost2 = corpora.add_parser("covost2", help="CoVoST-2 and Common Voice 4")
    add = covost2.add_argument
    add("--common-voice", help="folder with validated.tsv and clips, or one per language", **needed)
    add("--covost", help="folder with the unpacked covost_v2.fr_en.tsv and so on", **needed)
    fleurs = corpora.add_parser("fleurs", help="FLEURS, joined by the ids of its sentences")
    fleurs.add_argument("--fleurs", help="folder with fr_fr/train.tsv, fr_fr/audio/train", **needed)
    prompts = corpora.add_parser("voice-prompts", help="prompts of the telephone system Asterisk")
    share = "where Debian installs asterisk-core-sounds-fr, -fr-wav and -en [/usr/share]"
    prompts.add_argument("--share", type=Path, default="/usr/share", metavar="PATH", help=share)
    table = corpora.add_parser("table", help="a table and recordings of your own")
    columns = "tab-separated: path, translation; optional sentence, lang, split (without it, "
    columns += "1 clip of 20 is drawn for dev and 1 for test)"
    table.add_argument("--table", help=columns, **needed)
    table.add_argument("--audio", help="folder of its clips", **needed)
    for corpus in (covost2, fleurs, prompts, table):
        add = corpus.add_argument
        add("--lang", required=True, help="directions: fr (into English), fr,de, en-de, all, paper")
        add("--out", help="folder to write", **needed)
        add("--version", default="not stated", help="the corpus's version, for the report")
    return parser


def run_prepare(args: argparse.Namespace) -> int:
    directions = parse_directions(args.lang)
    if args.corpus == "table" and len(directions) > 1:
        raise ValueError(
            f"--lang {args.lang} has {len(directions)} directions, but a table has one; run the "
            "command once for each direction"
        )
    find, _ = CORPORA[args.corpus]
    for direction in directions:  # report missing files before hours of work
        find(args, *direction)
    code = 0
    for source, target in directions:
        if empty := prepare(args, source, target):
            print(
                f"prepare.py: {source}-{target} has no usable clip in {', '.join(empty)}; "
                "see the numbers above",
                file=sys.stderr,
            )
            code = 1
    return code


def main(argv: list[str] | None = None) -> int:
    sys.stdout.reconfigure(errors="backslashreplace")  # escape what stdout cannot encode
    args = build_parser().parse_args(argv)
    try:
        return run_prepare(args)
    except KeyboardInterrupt:
        print("\nstopped; the same command continues from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, BrokenProcessPool) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # handle SIGTERM like Ctrl-C
    sys.exit(main())
