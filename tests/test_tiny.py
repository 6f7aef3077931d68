"""tiny/: the encoder is the published one, no dev or test sentence is in train, files are small."""

import hashlib
import json
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import toys
import translate
from data import read_table
from whisper_encoder import WhisperEncoder

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tiny" / "corpus"
LANGUAGES = ("de", "es", "fr")
README = (ROOT / "README.md").read_text(encoding="utf-8")


def sha256_in_readme(start: str) -> str:
    """The SHA-256 in the row of tiny/README.md that begins with `start`."""
    readme = (ROOT / "tiny" / "README.md").read_text(encoding="utf-8")
    return re.search(rf"^\| {re.escape(start)} \| `(\w{{64}})`", readme, re.M)[1]


@pytest.fixture
def scripts(monkeypatch):
    """The modules of tiny/, which are scripts outside the library."""
    monkeypatch.syspath_prepend(ROOT / "tiny")
    import make_corpus
    import speak

    return make_corpus, speak


def rows(language: str) -> list[dict[str, str]]:
    columns = "path", "sentence", "translation", "split", "client_id"
    return [row for _, row in read_table(CORPUS / language / f"{language}-en.tsv", columns)]


def by_split(column: str, languages) -> dict[str, set[str]]:
    values = {"train": set(), "dev": set(), "test": set()}
    for language in languages:
        for row in rows(language):
            values[row["split"]].add(row[column])
    return values


def test_the_included_encoder_is_the_published_one():
    stored = hashlib.sha256((ROOT / "tiny" / "whisper" / "model.safetensors").read_bytes())
    assert stored.hexdigest() == sha256_in_readme("`whisper/model.safetensors`")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_encoder_is_stored_in_float16_and_loaded_in_the_precision_of_the_device(dtype):
    folder = ROOT / "tiny" / "whisper"
    stored = load_file(folder / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.float16}
    loaded = WhisperEncoder.from_pretrained(folder, dtype).state_dict()
    assert {tensor.dtype for tensor in loaded.values()} == {dtype}
    for name, tensor in loaded.items():
        assert tensor.equal(stored[f"model.encoder.{name}"].to(dtype)), name


def test_take_encoder_keeps_every_tensor_of_the_encoder_and_nothing_else(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tiny")
    import take_encoder

    source = toys.whisper_folder(tmp_path / "whisper")
    config = json.loads((source / "config.json").read_text())
    config |= {"activation_function": "gelu", "scale_embedding": False, "decoder_layers": 6}
    (source / "config.json").write_text(json.dumps(config))
    take_encoder.take_encoder(source, tmp_path / "out")
    taken = load_file(tmp_path / "out" / "model.safetensors")
    published = load_file(source / "model.safetensors")
    assert set(taken) == {name for name in published if name.startswith("model.encoder.")}
    for name, tensor in taken.items():
        assert tensor.equal(published[name].half()), name
    assert "decoder_layers" not in (tmp_path / "out" / "config.json").read_text()


def test_the_french_test_rows_never_change():
    texts = [
        "\t".join([row["path"], row["sentence"], row["translation"]]) + "\n"
        for row in rows("fr")
        if row["split"] == "test"
    ]
    start = "path, sentence and translation of the 200 French test rows"
    assert len(texts) == 200
    assert hashlib.sha256("".join(texts).encode()).hexdigest() == sha256_in_readme(start)


@pytest.mark.parametrize(
    "column, languages",
    [("client_id", LANGUAGES), ("translation", LANGUAGES), *[("sentence", [x]) for x in LANGUAGES]],
)
def test_no_voice_and_no_sentence_is_in_two_splits(column, languages):
    values = by_split(column, languages)
    assert all(values.values())
    assert not values["train"] & (values["dev"] | values["test"])
    assert not values["dev"] & values["test"]


@pytest.mark.parametrize("language", LANGUAGES)
def test_every_clip_is_in_the_table_once(language):
    clips = sorted(path.name for path in (CORPUS / language / "clips").iterdir())
    assert clips == sorted(row["path"] for row in rows(language))


def test_each_split_has_its_own_voices(scripts):
    _, speak = scripts
    voices = [voice.lower() for group in speak.VOICES.values() for voice in group]
    assert len(set(voices)) == len(voices)
    for split, used in by_split("client_id", LANGUAGES).items():
        assert used == set(speak.VOICES[split])


def test_held_out_texts_are_exactly_those_of_dev_and_test(scripts):
    make_corpus, _ = scripts
    held_out = make_corpus.held_out_texts()
    for language in LANGUAGES:
        for row in rows(language):
            texts = {row["sentence"], row["translation"]}
            assert not texts & held_out if row["split"] == "train" else texts <= held_out


def test_the_phrasebook_prints_ten_sentences_each_with_its_translation(scripts, run_main):
    import phrasebook

    _, lines, _ = run_main(phrasebook, "--lang", "de", "--seed", "1")
    rng = random.Random("1")
    texts = [phrasebook.sentence(rng) for _ in range(10)]
    assert lines == [line for text in texts for line in (text["de"], f"    {text['en']}")]


@pytest.mark.skipif(not shutil.which("espeak-ng"), reason="espeak-ng is not installed")
def test_a_voice_that_espeak_ng_does_not_have_is_refused(scripts):
    _, speak = scripts
    for lost in ("fr-fr+m3", "fr+Gustave"):
        with pytest.raises(ValueError, match="the variant is lost"):
            speak.check_voice(lost)
    for group in speak.VOICES.values():
        for voice in group:
            speak.check_voice(f"fr+{voice}")


@pytest.mark.skipif(not shutil.which("git"), reason="git is not installed")
def test_the_files_in_git_are_below_78_megabytes():
    listed = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, text=True)
    files = [ROOT / name for name in listed.stdout.split("\0") if name]
    if ROOT / "llast.py" not in files:
        pytest.skip("not a checkout of this project")
    assert sum(file.stat().st_size for file in files if file.exists()) < 78e6


def test_the_included_model_translates_the_clip_of_the_readme(run_main, monkeypatch):
    clip = re.search(r"python translate.py (tiny/corpus/\S+)", README)[1]
    [reference] = [row["translation"] for row in rows("fr") if row["path"] == Path(clip).name]
    monkeypatch.setattr(
        translate, "pick_device", lambda _: (torch.device("cpu"), torch.float32, "")
    )
    _, lines, _ = run_main(translate, "--model", ROOT / "tiny" / "model", ROOT / clip)
    assert [line.split("\t")[1:] for line in lines] == [[reference]]
