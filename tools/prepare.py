"""Prepare a corpus for train.py: CoVoST-2, FLEURS, or a table of your own."""

import argparse
import hashlib
import io
import json
import os
import re
import signal
import sys
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import soundfile
import torch
from torch import Tensor
from tqdm import tqdm

sys.path.insert(0, str(Path(__file__).parents[1]))  # the repository, whatever the folder is

from data import (
    FROM_ENGLISH,
    LANGUAGES,
    SPLITS,
    Entry,
    LeftOut,
    add_once,
    clip_path,
    join_covost,
    parse_directions,
    read_tsv,
    text_problem,
)
from whisper_encoder import MAX_SECONDS, SAMPLE_RATE, AudioError, audio_seconds, load_audio

FLEURS = dict(zip(LANGUAGES, (
    "en_us fr_fr es_419 cmn_hans_cn de_de ja_jp ca_es it_it ru_ru pt_br fa_ir et_ee mn_mn nl_nl "
    "tr_tr ar_eg sv_se lv_lv sl_si ta_in id_id cy_gb"
).split()))  # fmt: skip
FLEURS_HEADER = "id file_name raw_transcription transcription characters num_samples gender".split()
REASONS = {  # AudioError's reason -> that of the report; all others are "undecodable"
    "no such file": "missing", "the file is empty": "zero bytes",
    "the clip has no samples": "too short",
}  # fmt: skip
PART = ".part"  # ends the name of a file that is not whole yet


# Each corpus has a function that finds the folder of its clips and its tables, quickly, and one
# that reads the tables: its rows, by reason the rows that are in no split, a note for the report.


def existing(path: Path, what: str) -> Path:
    if not path.exists():
        raise FileNotFoundError(f"no {what}: looked for {path}")
    return path


def find_covost2(args: argparse.Namespace, source: str, target: str) -> tuple[Path, list[Path]]:
    """Common Voice's folder of the language, and CoVoST-2's table in the folder or one below."""
    root, name = args.common_voice, f"covost_v2.{source}_{target}.tsv"
    folders = [path for path in (root / source, root) if (path / "validated.tsv").is_file()]
    if not folders:
        raise FileNotFoundError(
            f"no Common Voice in {root}: looked for {source}/validated.tsv and validated.tsv"
        )
    tables = [
        path for path in (args.covost / name, *args.covost.glob(f"*/{name}")) if path.is_file()
    ]
    if not tables:
        raise FileNotFoundError(
            f"no translations: looked for {name} in {args.covost} and in the folders there. "
            f"CoVoST-2 has all languages into en, and en into {', '.join(FROM_ENGLISH)}"
        )
    clips = existing(folders[0] / "clips", "clips")
    return clips, [folders[0] / "validated.tsv", tables[0]]


def read_covost2(args: argparse.Namespace, source: str, tables: list[Path]):
    entries, left_out = join_covost(*tables)
    if not entries:
        raise ValueError(
            f"{tables[1]} and {tables[0]} have no clip of {', '.join(SPLITS)} in common"
        )
    return entries, left_out, ""


def find_fleurs(args: argparse.Namespace, source: str, target: str) -> tuple[Path, list[Path]]:
    here, there = args.fleurs / FLEURS[source], args.fleurs / FLEURS[target]
    tables = [folder / f"{split}.tsv" for split in SPLITS for folder in (here, there)]
    return existing(here / "audio", "audio"), [existing(path, "table") for path in tables]


def read_fleurs(args: argparse.Namespace, source: str, tables: list[Path]):
    """FLEURS has each sentence in every language: a translation is the target's row with its id."""
    entries, left_out = {}, {"no translation": [], "path twice": []}
    for split, spoken, translated in zip(SPLITS, tables[::2], tables[1::2]):
        columns = ("id", "file_name", "raw_transcription")
        here, there = (
            read_tsv(table, columns, header=FLEURS_HEADER, escape=None)
            for table in (spoken, translated)
        )
        texts = {row["id"]: row["raw_transcription"] for row in there.values()}
        for line, row in here.items():
            where, path = f"{spoken}:{line}", f"{split}/{row['file_name']}"
            if row["id"] in texts:
                text = texts[row["id"]]
                entry = Entry(where, path, row["raw_transcription"], text, split)
                add_once(entry, entries, left_out)
            else:
                left_out["no translation"].append((split, f"{where}: {path}: id {row['id']}"))
    return list(entries.values()), left_out, ""


def find_table(args: argparse.Namespace, source: str, target: str) -> tuple[Path, list[Path]]:
    return existing(args.audio, "folder --audio"), [existing(args.table, "table --table")]


def read_table(args: argparse.Namespace, source: str, tables: list[Path]):
    """A table of one's own: path and translation, and as one likes sentence, lang and split."""
    optional = ("sentence", "lang", "split")
    entries, left_out = {}, {"other language": [], "path twice": []}
    rows = read_tsv(args.table, ("path", "translation"), optional)
    drawn = not any("split" in row for row in rows.values())
    for line, row in rows.items():
        where, path = f"{args.table}:{line}", row["path"]
        split = drawn_split(path) if drawn else row["split"] or "train"
        if split not in SPLITS:
            raise ValueError(f"{where}: the split is {split!r}; expected {', '.join(SPLITS)}")
        if row.get("lang", source) != source:
            left_out["other language"].append((split, f"{where}: {path}: {row['lang']}"))
        else:
            entry = Entry(where, path, row.get("sentence", ""), row["translation"], split)
            add_once(entry, entries, left_out)
    used = {entry.split for entry in entries.values()}
    if not used:
        others = ", ".join(sorted({repr(row["lang"]) for row in rows.values()}))
        found = f"its column lang holds {others}" if rows else "it holds no rows"
        raise ValueError(f"{args.table} has no row of {source}: {found}")
    if drawn and len(used) < len(SPLITS):
        raise ValueError(
            f"{args.table} has {len(entries)} rows of {source}, which is too few to draw dev and "
            f"test from: of 20, a draw by their names takes about one each, and it took "
            f"{' and '.join(sorted(used))}; the column split can say {', '.join(SPLITS)}"
        )
    note = "the table has no column split: 1 clip of 20 was drawn for dev, 1 for test"
    return list(entries.values()), left_out, note if drawn else ""


def drawn_split(path: str) -> str:
    """One clip of twenty for dev, one for test: by its name, so that it stays where it is."""
    place = int(hashlib.sha256(path.encode()).hexdigest(), 16) % 20
    return {0: "dev", 1: "test"}.get(place, "train")


CORPORA = {
    "covost2": (find_covost2, read_covost2),
    "fleurs": (find_fleurs, read_fleurs),
    "table": (find_table, read_table),
}


@dataclass(frozen=True)
class Converted:
    """What became of one clip."""

    seconds: float = 0.0
    problem: str = ""  # a word for the report; "" if there is none
    detail: str = ""
    was_there: bool = False


def convert(job: tuple[Path, Path, bool]) -> Converted:
    """Decode a clip once to FLAC, 16 kHz, mono, 16 bits. A long one is converted only if asked."""
    audio, flac, keep_long = job
    seconds = seconds_before(audio, flac)
    was_there = seconds > 0
    try:
        if not was_there:
            seconds = audio_seconds(audio)
            if seconds <= MAX_SECONDS or keep_long:
                seconds = write_flac(load_audio(audio), flac)
    except AudioError as error:
        return Converted(0.0, REASONS.get(error.reason, "undecodable"), error.reason)
    if seconds > MAX_SECONDS:
        return Converted(seconds, "too long", f"{seconds:.1f} s", was_there)
    return Converted(seconds, was_there=was_there)


def seconds_before(audio: Path, flac: Path) -> float:
    """How long the FLAC of an earlier run is; 0 if there is none or the clip is newer."""
    try:
        newer = audio.exists() and audio.stat().st_mtime > flac.stat().st_mtime
        return 0.0 if newer else audio_seconds(flac)
    except (AudioError, OSError):
        return 0.0


def write_flac(audio: Tensor, flac: Path) -> float:
    """Write (N,) samples whole or not at all; beyond -1..1 they clip. -> seconds"""
    samples = (audio * 32768).round().clamp(-32768, 32767).to(torch.int16)
    file = io.BytesIO()
    soundfile.write(file, samples.numpy(), SAMPLE_RATE, format="FLAC", subtype="PCM_16")
    flac.parent.mkdir(parents=True, exist_ok=True)
    write_whole(flac, file.getvalue())
    return len(samples) / SAMPLE_RATE


def write_whole(path: Path, content: bytes):
    """Under another name first, so that a file with this one is always complete."""
    part = path.with_name(path.name + PART)
    part.write_bytes(content)
    part.replace(path)


def as_worker():
    """One thread, as there is a process for each core; Ctrl-C is for the first process to hear."""
    torch.set_num_threads(1)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)


def convert_all(jobs: list[tuple[Path, Path, bool]], label: str) -> list[Converted]:
    """On all cores. Stopped, it lets the clips in work finish and leaves out the others."""
    with ProcessPoolExecutor(os.cpu_count(), initializer=as_worker) as pool:
        try:
            results = pool.map(convert, jobs, chunksize=8)
            return list(tqdm(results, label, len(jobs), unit="clip", dynamic_ncols=True))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


def refuse_another_corpus(folder: Path, about: dict):
    """Directions of one corpus may share a folder; clips of two corpora could share names."""
    if (folder / "clips").resolve() == Path(about["audio"]).resolve():
        raise ValueError(f"{folder} is the corpus itself; name another folder with --out")
    reports = sorted(folder.glob("prepared.*.json"))
    if (folder / "validated.tsv").exists() and not reports:
        raise ValueError(f"{folder} has a corpus that was not prepared here; name another --out")
    for file in reports:
        before = json.loads(file.read_text(encoding="utf-8"))
        other = [k for k in ("corpus", "audio") if before[k] != about[k]]
        if other:
            differs = "; ".join(f"{k}: {before[k]} there, {about[k]} now" for k in other)
            raise ValueError(f"{file} is of another corpus ({differs}); name another --out")


def jobs_for(entries: list[Entry], audio: Path, clips: Path) -> list[tuple[Path, Path, bool]]:
    """Where each clip is, where its FLAC goes, and whether it stays even if it is too long."""
    jobs, taken = [], {}
    for entry in entries:
        heard = clip_path(audio, entry.path, entry.where)
        name = prepared_name(entry)
        if name in taken:
            raise ValueError(f"{entry.where}: {entry.path} and {taken[name]} would both be {name}")
        taken[name] = entry.path
        jobs.append((heard, clips / name, entry.split == "test"))
    return jobs


def prepared_name(entry: Entry) -> str:
    return str(PurePosixPath(entry.path).with_suffix(".flac"))


def prepare(args: argparse.Namespace, source: str, target: str):
    """Convert the clips of a direction, write its tables, and report.

    A clip without usable audio leaves train and dev; in test it stays, or the score would be that
    of another test set. A row without a translation leaves all three.
    """
    find, read = CORPORA[args.corpus]
    audio, tables = find(args, source, target)
    folder = args.out / source
    about = {"direction": f"{source}-{target}", "corpus": args.corpus, "version": args.version}
    about |= {"audio": str(audio.resolve())}
    refuse_another_corpus(folder, about)
    entries, left_out, about["note"] = read(args, source, tables)
    report = new_report(about, tables, left_out)
    worded = []
    for entry in entries:
        if problem := text_problem(entry.translation):
            count(report, entry, "left out", problem)
        else:
            worded.append(entry)
    jobs = jobs_for(worded, audio, folder / "clips")
    for part in folder.rglob(f"*{PART}"):
        part.unlink()  # left by a run that was stopped
    results = convert_all(jobs, about["direction"])
    kept = []
    for entry, result in zip(worded, results):
        if result.problem:
            what = "kept in spite of" if entry.split == "test" else "left out"
            count(report, entry, what, result.problem, f": {result.detail}")
        if not result.problem or entry.split == "test":
            kept.append((entry, result))
    sum_up(report, kept)
    (folder / "clips").mkdir(parents=True, exist_ok=True)
    write_corpus(folder, target, [entry for entry, _ in kept], report)
    print_report(report, sum(result.was_there for result in results), folder)


def new_report(about: dict, tables: list[Path], left_out: LeftOut) -> dict:
    numbers = {"kept": 0, "hours": 0.0, "without a transcript": 0}
    return about | {
        "tables": {str(t): hashlib.sha256(t.read_bytes()).hexdigest() for t in tables},
        "splits": {s: numbers | {"left out": {}, "kept in spite of": {}} for s in SPLITS},
        "in no split": {reason: len(rows) for reason, rows in left_out.items()},
        "examples": {why: [row for _, row in rows[:5]] for why, rows in left_out.items() if rows},
    }


def count(report: dict, entry: Entry, what: str, problem: str, detail: str = ""):
    numbers = report["splits"][entry.split][what]
    numbers[problem] = numbers.get(problem, 0) + 1
    examples = report["examples"].setdefault(problem, [])
    if len(examples) < 5:
        examples.append(f"{entry.where}: {entry.path}{detail}")


def sum_up(report: dict, kept: list[tuple[Entry, Converted]]):
    for split, numbers in report["splits"].items():
        here = [(entry, result) for entry, result in kept if entry.split == split]
        seconds = sum(result.seconds for _, result in here if not result.problem)
        numbers["kept"], numbers["hours"] = len(here), round(seconds / 3600, 4)
        numbers["without a transcript"] = sum(not entry.sentence.strip() for entry, _ in here)


def write_corpus(folder: Path, target: str, kept: list[Entry], report: dict):
    """The layout of read_corpus. The sentences of the source's other directions are kept."""
    spoken, direction = folder / "validated.tsv", f"{folder.name}_{target}"
    before = read_tsv(spoken, ("path", "sentence")).values() if spoken.exists() else []
    sentences = {row["path"]: row["sentence"] for row in before}
    sentences |= {prepared_name(entry): entry.sentence for entry in kept}
    rows = [(prepared_name(entry), entry.translation, entry.split) for entry in kept]
    text = json.dumps(report, indent=2, ensure_ascii=False) + "\n"
    # First the report: from then on the folder is known to be ours.
    write_whole(folder / f"prepared.{direction}.json", text.encode())
    write_tsv(spoken, ("path", "sentence"), sentences.items())
    write_tsv(folder / f"covost_v2.{direction}.tsv", ("path", "translation", "split"), rows)


def write_tsv(path: Path, columns: tuple[str, ...], rows):
    """A table from which read_tsv reads the same cells again."""
    lines = ["\t".join(re.sub(r"[\\\t\r\n]", r"\\\g<0>", cell) for cell in row) for row in rows]
    write_whole(path, "\n".join(["\t".join(columns), *lines, ""]).encode())


def print_report(report: dict, were_there: int, folder: Path):
    """Every number of the report, by split, and examples of what is not as it should be."""
    print(f"\n{report['direction']}, {report['corpus']}, version {report['version']}")
    print(f"{'':34}" + "".join(f"{split:>10}" for split in SPLITS))
    splits = report["splits"].values()
    for name in ("kept", "hours", "without a transcript"):
        print(f"{name:34}" + "".join(f"{numbers[name]:10,}" for numbers in splits))
    for what in ("left out", "kept in spite of"):
        for problem in dict.fromkeys(p for numbers in splits for p in numbers[what]):
            label = f"{what}: {problem}"
            print(f"{label:34}" + "".join(f"{n[what].get(problem, 0):10,}" for n in splits))
    for reason, n in report["in no split"].items():
        if n:
            print(f"{n:,} row{'s'[: n > 1]} in no split: {reason}")
    for reason, rows in report["examples"].items():
        for row in rows:
            print(f"    {reason}: {row}")
    if report["note"]:
        print(report["note"])
    print(f"{were_there:,} clips were converted before. The corpus and this report: {folder}")


EXAMPLES = """
examples:
  python tools/prepare.py covost2 --common-voice cv-corpus-4 --covost covost --lang fr,de --out C
  python tools/prepare.py fleurs --fleurs fleurs --lang fr --out F
  python tools/prepare.py table --table mine.tsv --audio recordings --lang cy --out M

Each can be stopped with Ctrl-C and goes on when it is started again. Then train with
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
    table = corpora.add_parser("table", help="a table and recordings of your own")
    columns = "tab-separated: path, translation; optional sentence, lang, split (without it, "
    columns += "1 clip of 20 is drawn for dev and 1 for test)"
    table.add_argument("--table", help=columns, **needed)
    table.add_argument("--audio", help="folder of its clips", **needed)
    for corpus in (covost2, fleurs, table):
        add = corpus.add_argument
        add("--lang", required=True, help="directions: fr (into English), fr,de, en-de, all, paper")
        add("--out", help="folder to write", **needed)
        add("--version", default="not stated", help="the corpus's version, for the report")
    return parser


def run_prepare(args: argparse.Namespace):
    directions = parse_directions(args.lang)
    if args.corpus == "table" and len(directions) > 1:
        raise ValueError(f"--lang {args.lang}: a table is prepared one direction at a time")
    find, _ = CORPORA[args.corpus]
    for direction in directions:  # what is missing shows before hours of work
        find(args, *direction)
    for direction in directions:
        prepare(args, *direction)


def main(argv: list[str] | None = None) -> int:
    args = build_parser().parse_args(argv)
    try:
        run_prepare(args)
    except KeyboardInterrupt:
        print("\nstopped; the same command goes on from here", file=sys.stderr)
        return 130
    except (ValueError, OSError, BrokenProcessPool) as error:
        print(f"prepare.py: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # a scheduler's stop is a Ctrl-C
    sys.exit(main())
