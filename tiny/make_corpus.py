"""Make the embedded corpus: phrasebook sentences, spoken, in the layout that data.py reads.

    python tiny/make_corpus.py          needs espeak-ng

The dev and test sentences are drawn first. None of them, in any of the four languages, is in the
train split or in a text that make_llm.py draws.
"""

import argparse
import random
import shutil
import sys
from collections.abc import Iterator
from multiprocessing import Pool
from pathlib import Path

import phrasebook
from speak import recording, write_opus

sys.path.insert(0, str(Path(__file__).parents[1]))
from data import write_table  # noqa: E402
from whisper_encoder import audio_seconds  # noqa: E402

TINY = Path(__file__).parent
CORPUS = TINY / "corpus"
SEED = 2407
SIZES = {  # clips
    "fr": {"test": 200, "dev": 80, "train": 1360},
    "de": {"test": 100, "dev": 40, "train": 480},
    "es": {"test": 100, "dev": 40, "train": 480},
}


def distinct(rng: random.Random, exclude: set[str]) -> Iterator[dict[str, str]]:
    """Yield sentences in all languages. No text is in `exclude`, and no text comes twice."""
    exclude = set(exclude)
    while True:
        meaning = phrasebook.sentence(rng)
        if exclude.isdisjoint(meaning.values()):
            exclude.update(meaning.values())
            yield meaning


def held_out() -> dict[str, list[dict[str, str]]]:
    """The sentences of dev and test in all languages, as many as the largest corpus needs."""
    fresh = distinct(random.Random(SEED), set())
    sizes = {split: max(size[split] for size in SIZES.values()) for split in ("test", "dev")}
    return {split: [next(fresh) for _ in range(size)] for split, size in sizes.items()}


def held_out_texts() -> set[str]:
    """Every dev and test sentence in every language. No training may use these texts."""
    meanings = [meaning for part in held_out().values() for meaning in part]
    return {text for meaning in meanings for text in meaning.values()}


def make_clip(job) -> str:
    """Speak and write one clip, and return the voice. The result depends only on the arguments."""
    path, text, language, split = job
    audio, voice = recording(text, language, split, random.Random(f"{SEED} {path.name}"))
    write_opus(path, audio)
    return voice


def make_language(language: str):
    """Write the clips and the table of one language."""
    folder = CORPUS / language
    shutil.rmtree(folder, ignore_errors=True)
    (folder / "clips").mkdir(parents=True)
    fresh = distinct(random.Random(f"{SEED} {language}"), held_out_texts())
    parts = held_out() | {"train": [next(fresh) for _ in range(SIZES[language]["train"])]}

    rows = []
    for split, size in SIZES[language].items():
        for meaning in parts[split][:size]:
            name = f"phrasebook_{language}_{len(rows):05d}.ogg"
            row = {"path": name, "sentence": meaning[language], "translation": meaning["en"]}
            rows.append(row | {"split": split})
    jobs = [(folder / "clips" / r["path"], r["sentence"], language, r["split"]) for r in rows]
    with Pool() as pool:
        for row, voice in zip(rows, pool.imap(make_clip, jobs, chunksize=16), strict=True):
            seconds = audio_seconds(folder / "clips" / row["path"])
            row |= {"seconds": seconds, "client_id": voice}
    table = folder / f"{language}-en.tsv"
    write_table(table, rows[0].keys(), [row.values() for row in rows])
    megabytes = sum(job[0].stat().st_size for job in jobs) / 1e6
    print(f"{language}: {len(rows)} clips, {megabytes:.1f} MB, {SIZES[language]}", flush=True)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__.splitlines()[0]).parse_args()  # -h starts nothing
    for language in SIZES:
        make_language(language)
