"""The embedded default keeps apart what its README says it keeps apart."""

import csv
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tiny" / "corpus"
LANGUAGES = sorted(folder.name for folder in CORPUS.iterdir())


def table(path: Path) -> dict[str, dict]:
    with open(path, encoding="utf-8", newline="") as file:
        rows = csv.DictReader(file, delimiter="\t", quoting=csv.QUOTE_NONE, escapechar="\\")
        return {row["path"]: row for row in rows}


def by_split(column: str, languages=LANGUAGES) -> dict[str, set[str]]:
    """What a column of either table holds in each split."""
    found = {"train": set(), "dev": set(), "test": set()}
    for language in languages:
        spoken = table(CORPUS / language / "validated.tsv")
        for path, row in table(CORPUS / language / f"covost_v2.{language}_en.tsv").items():
            found[row["split"]].add((spoken[path] | row)[column])
    return found


@pytest.mark.parametrize("column", ["client_id", "translation"])
def test_no_voice_and_no_meaning_of_dev_or_test_is_in_training_in_any_language(column):
    found = by_split(column)
    assert all(found.values())
    assert not found["train"] & (found["dev"] | found["test"])
    assert not found["dev"] & found["test"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_clip_is_in_the_tables_once_and_every_sentence_in_one_split(language):
    clips = {path.name for path in (CORPUS / language / "clips").iterdir()}
    assert clips == table(CORPUS / language / "validated.tsv").keys()
    assert clips == table(CORPUS / language / f"covost_v2.{language}_en.tsv").keys()
    found = by_split("sentence", [language])
    assert not found["train"] & (found["dev"] | found["test"])


def test_the_files_in_git_are_below_30_megabytes():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    if listed.returncode:
        pytest.skip("not a git checkout")
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    assert sum(file.stat().st_size for file in files if file.exists()) < 30e6
