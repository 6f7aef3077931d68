"""tools/prepare.py: Common Voice with CoVoST-2, FLEURS and tables of your own become a corpus."""

import gzip
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

import data
import tools.prepare as command
import toys
import train
from data import Batches
from llama import Tokenizer

ROOT = Path(__file__).parents[2]
SECONDS = 0.36  # a ten-thousandth of an hour


def write_clip(path: Path, seconds: float = SECONDS, rate: int = 16000, seed: int = 0, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    n = round(seconds * rate)
    noise = np.random.default_rng(seed).normal(size=n) * 0.01
    samples = 0.4 * np.sin(2 * np.pi * 300 * np.arange(n) / rate) + noise
    soundfile.write(path, samples.astype(np.float32), rate, **how)


def write_lines(path: Path, *lines: str, end: str = "\n", mark: str = ""):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes((mark + end.join([*lines, ""])).encode())


def prepare(*flags) -> int:
    return command.main([*map(str, flags)])


def content(folder: Path) -> dict[str, bytes]:
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {str(path.relative_to(folder)): path.read_bytes() for path in files}


CLIPS = [  # file, sentence, translation, split; None where a table has no line for it
    ("good1", '"Oui", dit-il', 'He said: "yes"', "train"),
    ("good2", "une \\\t tabulation", "a \\\\ and a \\\t tab", "train_covost"),
    ("good3", "", "no transcript", "train"),
    ("good4", "quatre", "four", "dev"),
    ("good5", "cinq", "five", "test"),
    ("covost", "six", "six", "dev_covost"),
    ("covost2", "six", "six", "test_covost"),
    ("unknown", None, "seven", "train"),
    ("untranslated", "huit", None, None),
    ("missing1", "neuf", "nine", "train"),
    ("missing2", "neuf", "nine", "dev"),
    ("missing3", "neuf", "nine", "test"),
    ("zero1", "dix", "ten", "train"),
    ("zero2", "dix", "ten", "test"),
    ("broken", "onze", "eleven", "train"),
    ("cut", "douze", "twelve", "dev"),
    ("silent", "treize", "thirteen", "train"),
    ("long1", "quatorze", "fourteen", "train"),
    ("long2", "quatorze", "fourteen", "test"),
    ("wordless1", "quinze", "", "train"),
    ("wordless2", "quinze", " ", "test"),
    ("remove1", "seize", "REMOVE", "train"),
    ("remove2", "seize", "please REMOVE this", "test"),
]


@pytest.fixture
def common_voice(tmp_path):
    """A made-up French Common Voice 4 with CoVoST-2's table, and with every kind of bad row."""
    clips = tmp_path / "cv" / "fr" / "clips"
    spoken = ["client_id\tpath\tsentence\tup_votes\tdown_votes\tage\tgender\taccent"]
    translated = ["path\ttranslation\tsplit"]
    for i, (name, sentence, translation, split) in enumerate(CLIPS):
        if name.startswith(("good", "cut", "wordless", "remove")):
            write_clip(clips / f"{name}.mp3", rate=(16000, 44100)[i % 2], seed=i)
        if sentence is not None:
            spoken.append(f"x\t{name}.mp3\t{sentence}\t2\t0\t\t\t")
        if translation is not None:
            translated.append(f"{name}.mp3\t{translation}\t{split}")
    translated.append("good4.mp3\tagain\ttrain")
    for name in ("zero1", "zero2"):
        (clips / f"{name}.mp3").touch()
    (clips / "broken.mp3").write_bytes(b"no audio at all")
    whole = (clips / "cut.mp3").read_bytes()
    (clips / "cut.mp3").write_bytes(whole[: len(whole) // 2])
    write_clip(clips / "silent.mp3", 0, format="WAV")
    for name in ("long1", "long2"):
        write_clip(clips / f"{name}.mp3", 30.1, rate=8000)
    # As they come: a mark at the start, and lines that end as on Windows.
    write_lines(tmp_path / "cv" / "fr" / "validated.tsv", *spoken, end="\r\n", mark="\ufeff")
    write_lines(tmp_path / "covost" / "fr" / "covost_v2.fr_en.tsv", *translated)
    return tmp_path


def flags_for(folder: Path, *more) -> tuple:
    return ("covost2", "--common-voice", folder / "cv", "--covost", folder / "covost",
            "--lang", "fr", "--out", folder / "out", *more)  # fmt: skip


def report_of(folder: Path, direction: str = "fr-en") -> dict:
    file = folder / "out" / direction.split("-")[0] / f"prepared.{direction}.json"
    return json.loads(file.read_text())


# ------------------------------------------------------------------------------------ common voice


def test_the_report_counts_every_row_once(common_voice, capsys):
    assert prepare(*flags_for(common_voice, "--version", "cv-corpus-4")) == 0
    report = report_of(common_voice)
    cv = common_voice / "cv" / "fr"
    tables = [cv / "validated.tsv", common_voice / "covost" / "fr" / "covost_v2.fr_en.tsv"]
    examples = report.pop("examples")
    assert report == {
        "direction": "fr-en",
        "corpus": "covost2",
        "version": "cv-corpus-4",
        "audio": str(cv / "clips"),
        "note": "",
        "tables": {str(path): sha256(path.read_bytes()).hexdigest() for path in tables},
        "splits": {
            "train": {
                "kept": 3, "hours": 0.0003, "without a transcript": 1,
                "left out": {
                    "empty text": 1, "REMOVE": 1, "missing": 1, "zero bytes": 1, "undecodable": 1,
                    "too short": 1, "too long": 1,
                },
                "kept in spite of": {},
            },
            "dev": {
                "kept": 1, "hours": 0.0001, "without a transcript": 0,
                "left out": {"missing": 1, "undecodable": 1}, "kept in spite of": {},
            },
            "test": {
                "kept": 4, "hours": 0.0001, "without a transcript": 0,
                "left out": {"empty text": 1, "REMOVE": 1},
                "kept in spite of": {"missing": 1, "zero bytes": 1, "too long": 1},
            },
        },
        "in no split": {"extended dev or test": 2, "not in validated.tsv": 1, "path twice": 1},
        "overlap": "of 4 test sentences, 0 are also in train; "
        "of 4 test translations, 0 are also in train",
    }  # fmt: skip
    table = str(tables[1])
    assert examples["REMOVE"] == [f"{table}:22: remove1.mp3", f"{table}:23: remove2.mp3"]
    assert examples["missing"][2] == f"{table}:12: missing3.mp3: no such file"
    assert examples["path twice"] == [f"{table}:24: good4.mp3: first in {table}:5"]
    assert examples["too long"] == [
        f"{table}:{n}: long{i}.mp3: 30.1 s" for n, i in ((18, 1), (19, 2))
    ]
    printed = capsys.readouterr().out
    for line in (
        "fr-en, covost2, version cv-corpus-4",
        "kept 3 1 4",
        "hours 0.0003 0.0001 0.0001",
        "left out: undecodable 1 1 0",
        "kept in spite of: missing 0 0 1",
        "2 rows left out, in no split: extended dev or test",
        "0 clips were converted before",
    ):
        assert line in " ".join(printed.split())


def test_read_corpus_reads_what_prepare_wrote(common_voice):
    assert prepare(*flags_for(common_voice)) == 0
    splits, unusable = data.read_corpus(common_voice / "out", "fr", "en")
    read = {
        split: [(row.path.name, row.sentence, row.translation, row.seconds) for row in rows]
        for split, rows in splits.items()
    }
    assert read == {
        "train": [
            ("good1.flac", '"Oui", dit-il', 'He said: "yes"', SECONDS),
            ("good2.flac", "une   tabulation", "a \\ and a   tab", SECONDS),
            ("good3.flac", "", "no transcript", SECONDS),
        ],
        "dev": [("good4.flac", "quatre", "four", SECONDS)],
        # The score counts every clip of the test set, whether it can be heard or not.
        "test": [
            ("good5.flac", "cinq", "five", SECONDS),
            ("missing3.flac", "neuf", "nine", 0.0),
            ("zero2.flac", "dix", "ten", 0.0),
            ("long2.flac", "quatorze", "fourteen", 30.1),
        ],
    }
    assert [(split, line.split(": ")[1]) for split, line in unusable] == [
        ("test", "no such file")
    ] * 2
    clips = common_voice / "out" / "fr" / "clips"
    assert not (clips / "long1.flac").exists() and not (clips / "covost.flac").exists()
    for name in ("good1", "good2"):
        heard = data.load_audio(common_voice / "cv" / "fr" / "clips" / f"{name}.mp3")
        about = soundfile.info(clips / f"{name}.flac")
        assert (about.samplerate, about.channels, about.subtype) == (16000, 1, "PCM_16")
        kept = data.load_audio(clips / f"{name}.flac")
        np.testing.assert_allclose(kept, heard, atol=0.51 / 32768)
    assert data.audio_seconds(clips / "long2.flac") == 30.1


def test_samples_beyond_full_scale_clip_and_do_not_wrap(tmp_path):
    command.write_flac(torch.tensor([0.0, 0.5, 1.0, 1.5, -1.0, -1.5]), tmp_path / "a.flac")
    samples, _ = soundfile.read(tmp_path / "a.flac", dtype="int16")
    assert samples.tolist() == [0, 16384, 32767, 32767, -32768, -32768]


@pytest.mark.skipif(not shutil.which("ffmpeg"), reason="ffmpeg is not installed")
def test_mp3_files_streamed_by_ffmpeg_are_all_prepared(tmp_path):
    """Common Voice's files have no Xing frame, because ffmpeg cannot write it into a pipe."""
    clips = tmp_path / "cv" / "fr" / "clips"
    clips.mkdir(parents=True)
    spoken, translated = ["client_id\tpath\tsentence"], ["path\ttranslation\tsplit"]
    for i, split in enumerate(("train_covost", "train", "dev", "test")):
        seconds, rate = 1.7 + 0.31 * i, (48000, 44100, 32000, 22050)[i]
        write_clip(tmp_path / f"{i}.wav", seconds, rate, seed=i)
        tag = ["-metadata", "title=a title"] if i % 2 else ["-id3v2_version", "0"]
        flags = ["-q:a", "4"] if i > 1 else ["-b:a", "64k"]
        words = ["ffmpeg", "-v", "error", "-i", tmp_path / f"{i}.wav", "-ac", "1", *tag, *flags]
        words += ["-c:a", "libmp3lame", "-f", "mp3", "-"]
        stream = subprocess.run(words, stdout=subprocess.PIPE, check=True).stdout
        (clips / f"{i}.mp3").write_bytes(stream)
        spoken.append(f"x\t{i}.mp3\tdit {i}")
        translated.append(f"{i}.mp3\tsaid {i}\t{split}")
    write_lines(tmp_path / "cv" / "fr" / "validated.tsv", *spoken)
    write_lines(tmp_path / "covost" / "covost_v2.fr_en.tsv", *translated)
    assert prepare(*flags_for(tmp_path)) == 0
    splits, unusable = data.read_corpus(tmp_path / "out", "fr", "en")
    assert not unusable and [len(rows) for rows in splits.values()] == [2, 1, 1]
    for i, row in enumerate(row for rows in splits.values() for row in rows):
        # The encoder adds at most two frames of silence at each end.
        assert 0 <= row.seconds - (1.7 + 0.31 * i) < 4 * 1152 / 22050
        original, clip = (command.load_audio(path) for path in (tmp_path / f"{i}.wav", row.path))
        assert float(clip.std()) == pytest.approx(float(original.std()), rel=0.1)


def test_a_split_without_a_usable_clip_makes_the_exit_code_1(common_voice, capsys):
    clips = common_voice / "cv" / "fr" / "clips"
    (clips / "good4.mp3").unlink()  # the only good clip of dev
    assert prepare(*flags_for(common_voice)) == 1
    assert "fr-en has no usable clip in dev;" in capsys.readouterr().err
    for name in ("good5", "long2"):
        (clips / f"{name}.mp3").unlink()
    shutil.rmtree(common_voice / "out")
    assert prepare(*flags_for(common_voice)) == 1
    assert "no usable clip in dev, test;" in capsys.readouterr().err
    assert len(data.read_corpus(common_voice / "out", "fr", "en")[0]["train"]) == 3


def test_a_link_to_itself_is_a_missing_clip(common_voice):
    clip = common_voice / "cv" / "fr" / "clips" / "missing1.mp3"
    clip.symlink_to(clip.name)
    assert prepare(*flags_for(common_voice)) == 0
    assert report_of(common_voice)["splits"]["train"]["left out"]["missing"] == 1


def test_common_voice_may_be_the_folder_of_one_language(common_voice):
    flags = list(flags_for(common_voice))
    flags[2], flags[4] = common_voice / "cv" / "fr", common_voice / "covost" / "fr"
    assert prepare(*flags) == 0
    assert report_of(common_voice)["splits"]["train"]["kept"] == 3


def test_training_runs_on_what_was_prepared(common_voice, monkeypatch, capsys):
    assert prepare(*flags_for(common_voice)) == 0
    monkeypatch.setattr(sys, "argv", ["train.py", "--data", str(common_voice / "out"), "--asr", "1",
                        "--epochs", "1", "--out", str(common_voice / "run")])  # fmt: skip
    assert train.main() == 0
    results = json.loads((common_voice / "run" / "results.json").read_text())
    assert results["fr-en"]["n"] == 4


# ------------------------------------------------------------------------------ stopped and resumed


def many_clips(folder: Path, n: int, seconds: float = 0.2):
    """A corpus of n clips, which are one file under many names."""
    clips = folder / "cv" / "fr" / "clips"
    write_clip(clips / "0.mp3", seconds)
    for i in range(1, n):
        os.link(clips / "0.mp3", clips / f"{i}.mp3")
    spoken = [f"{i}.mp3\tdit {i}" for i in range(n)]
    splits = ["train", "dev", "test"]
    translated = [f"{i}.mp3\tsaid {i}\t{splits[i % 3]}" for i in range(n)]
    write_lines(folder / "cv" / "fr" / "validated.tsv", "path\tsentence", *spoken)
    name = "covost_v2.fr_en.tsv"
    write_lines(folder / "covost" / name, "path\ttranslation\tsplit", *translated)


def test_a_stopped_run_continues_and_gives_the_same_corpus(tmp_path, monkeypatch, capsys):
    many_clips(tmp_path, 60)
    assert prepare(*flags_for(tmp_path)) == 0
    expected = content(tmp_path / "out")
    shutil.rmtree(tmp_path / "out")

    def stop_soon(results, *_, **__):
        for i, result in enumerate(results):
            if i == 3:
                raise KeyboardInterrupt
            yield result

    monkeypatch.setattr(os, "cpu_count", lambda: 1)
    with monkeypatch.context() as patch:
        patch.setattr(command, "tqdm", stop_soon)
        assert prepare(*flags_for(tmp_path)) == 130
    assert "the same command continues" in capsys.readouterr().err
    clips = tmp_path / "out" / "fr" / "clips"
    there = {path: path.stat().st_mtime_ns for path in clips.iterdir()}
    assert 3 < len(there) < 60 and {path.suffix for path in there} == {".flac"}
    assert os.listdir(tmp_path / "out" / "fr") == ["clips"]  # no table names half a corpus

    (clips / "7.flac.part").write_bytes(b"half")  # as a crash leaves it
    assert prepare(*flags_for(tmp_path)) == 0
    assert content(tmp_path / "out") == expected
    assert {path: path.stat().st_mtime_ns for path in there} == there
    assert f"{len(there)} clips were converted before" in capsys.readouterr().out


def test_ctrl_c_leaves_complete_files_and_no_traceback(tmp_path):
    many_clips(tmp_path, 400, seconds=20.0)
    clips = tmp_path / "out" / "fr" / "clips"
    words = [sys.executable, ROOT / "tools" / "prepare.py", *map(str, flags_for(tmp_path))]
    process = subprocess.Popen(
        words, stderr=subprocess.PIPE, start_new_session=True, text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    while process.poll() is None and not list(clips.glob("*.flac")):
        time.sleep(0.01)
    os.killpg(process.pid, signal.SIGINT)  # a terminal tells all processes
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "Traceback" not in printed and printed.endswith("continues from here\n")
    assert all(data.audio_seconds(path) == 20.0 for path in clips.iterdir())


def test_a_clip_that_was_recorded_again_is_converted_again(common_voice, capsys):
    assert prepare(*flags_for(common_voice)) == 0
    clip = common_voice / "cv" / "fr" / "clips" / "good1.mp3"
    write_clip(clip, 0.2)
    os.utime(clip, (time.time() + 9, time.time() + 9))
    assert prepare(*flags_for(common_voice)) == 0
    splits, _ = data.read_corpus(common_voice / "out", "fr", "en")
    assert splits["train"][0].seconds == 0.2
    shutil.rmtree(clip.parent)  # a FLAC does not need its mp3 any more
    clip.parent.mkdir()
    capsys.readouterr()
    assert prepare(*flags_for(common_voice)) == 0
    assert "6 clips were converted before" in capsys.readouterr().out
    assert data.read_corpus(common_voice / "out", "fr", "en")[0] == splits


def test_directions_of_one_language_share_clips_and_sentences(tmp_path, capsys):
    clips = tmp_path / "cv" / "en" / "clips"
    for name in "abc":
        write_clip(clips / f"{name}.mp3")
    spoken = [f"{name}.mp3\tsaid {name}" for name in "abc"]
    write_lines(tmp_path / "cv" / "en" / "validated.tsv", "path\tsentence", *spoken)
    for target, names in (("de", "ab"), ("ja", "bc")):
        rows = [f"{name}.mp3\t{target} {name}\ttrain" for name in names]
        file = tmp_path / "covost" / f"covost_v2.en_{target}.tsv"
        write_lines(file, "path\ttranslation\tsplit", *rows)
    flags = list(flags_for(tmp_path))
    flags[6] = "en-de,en-ja"
    assert prepare(*flags) == 1  # only train has clips
    assert "1 clips were converted before" in capsys.readouterr().out
    for target, names in (("de", "ab"), ("ja", "bc")):
        rows = data.read_corpus(tmp_path / "out", "en", target)[0]["train"]
        expected = [(f"{name}.flac", f"said {name}", f"{target} {name}") for name in names]
        assert [(row.path.name, row.sentence, row.translation) for row in rows] == expected
        assert report_of(tmp_path, f"en-{target}")["splits"]["train"]["kept"] == 2


# ------------------------------------------------------------------------------------------- fleurs


def write_fleurs(folder: Path, code: str, rows: list[tuple[str, int, str]]):
    for split in ("train", "dev", "test"):
        here = [(i, text) for s, i, text in rows if s == split]
        lines = []
        for i, text in here:
            name = f"{code}{i}.wav"
            lines.append(f"{i}\t{name}\t{text}\t{text.lower()}\tx | y\t5760\tMALE")
            write_clip(folder / code / "audio" / split / name)
        write_lines(folder / code / f"{split}.tsv", *lines)


def test_fleurs_is_joined_by_the_ids_of_its_sentences(tmp_path):
    french = [
        ("train", 1, 'Un "mot".'),
        ("train", 2, "Seul."),
        ("dev", 3, "A\\n."),
        ("test", 4, "B."),
    ]
    english = [("train", 1, 'A "word".'), ("dev", 3, "a."), ("test", 4, "b."), ("test", 5, "c.")]
    write_fleurs(tmp_path / "fleurs", "fr_fr", french)
    write_fleurs(tmp_path / "fleurs", "en_us", english)
    flags = ("--fleurs", tmp_path / "fleurs", "--lang", "fr,en-fr", "--out", tmp_path / "out")
    assert prepare("fleurs", *flags) == 0
    splits, unusable = data.read_corpus(tmp_path / "out", "fr", "en")
    assert not unusable
    clips = tmp_path / "out" / "fr" / "clips"
    rows = [(split, str(row.path.relative_to(clips)), row.sentence, row.translation)
            for split, rows in splits.items() for row in rows]  # fmt: skip
    assert rows == [
        ("train", "train/fr_fr1.flac", 'Un "mot".', 'A "word".'),
        ("dev", "dev/fr_fr3.flac", "A\\n.", "a."),  # no escape in FLEURS
        ("test", "test/fr_fr4.flac", "B.", "b."),
    ]
    report = report_of(tmp_path)
    assert report["in no split"] == {"no translation": 1}
    assert report["examples"]["no translation"][0].endswith("train.tsv:2: train/fr_fr2.wav: id 2")
    assert report_of(tmp_path, "en-fr")["in no split"]["no translation"] == 1


def test_every_language_has_a_folder_in_fleurs():
    assert command.FLEURS["zh-CN"] == "cmn_hans_cn" and command.FLEURS["cy"] == "cy_gb"
    for code, folder in command.FLEURS.items():
        assert folder.startswith(code[:2]) or code == "zh-CN"
    assert set(command.FLEURS) == set(data.LANGUAGES)


# ----------------------------------------------------------------------------------- voice prompts


def write_prompts(share: Path, language: str, texts: str, clips: dict[str, float]):
    """Write the files that Debian's packages of a language install. Clips are 8 kHz, as there."""
    file = share / "doc" / f"asterisk-core-sounds-{language}" / f"core-sounds-{language}.txt.gz"
    file.parent.mkdir(parents=True)
    file.write_bytes(gzip.compress(texts.encode()))
    for name, seconds in clips.items():
        write_clip(share / "asterisk" / "sounds" / language / f"{name}.wav", seconds, rate=8000)


def prompt_flags(folder: Path, language: str = "fr") -> tuple:
    return ("voice-prompts", "--share", folder / "share", "--lang", language,
            "--out", folder / "out")  # fmt: skip


@pytest.fixture
def prompts(tmp_path):
    """160 French and 154 Spanish prompts. Two prompts each have the same English text."""
    english = "".join(f"n/{i}: Say {i // 2}.\n" for i in range(160))
    for language, word, n in (("fr", "dites", 160), ("es", "diga", 154)):
        texts = "".join(f"n/{i}: {word} {i}\n" for i in range(n))
        write_prompts(tmp_path / "share", language, texts, {f"n/{i}": 0.3 for i in range(n)})
        write_clip(tmp_path / "share" / "asterisk" / "sounds" / language / "on.wav", 0.3)
    write_prompts(tmp_path / "share", "en", english, {})
    return tmp_path


def test_prompts_with_the_same_english_text_are_in_one_split(prompts):
    translations = {}
    for language in ("fr", "es"):
        assert prepare(*prompt_flags(prompts, language)) == 0
        splits, _ = data.read_corpus(prompts / "out", language, "en")
        assert [len(splits[split]) for split in ("test", "dev")] == [100, 50]
        translations[language] = {s: {r.translation for r in rows} for s, rows in splits.items()}
        train, dev, test = (translations[language][split] for split in ("train", "dev", "test"))
        assert train and not train & dev and not train & test and not dev & test
    # A model can be trained on both languages: the tests of one are not in train of the other.
    assert not translations["fr"]["test"] & translations["es"]["train"]
    assert not translations["es"]["test"] & translations["fr"]["train"]


def test_every_prompt_that_is_left_out_is_in_the_report(prompts):
    share = prompts / "share"
    texts = "\ufeff; a comment: of the file\nhello: Bonjour !\nsilent:\nshort: Court\nlong: Long\n"
    texts += "beep: [un son]\nnote: deux\nlost: perdu\nbroken: mal\nonly-here: seul\nhello: Salut\n"
    english = "".join(
        f"{n}: {n}\n" for n in "hello silent short long beep lost broken other".split()
    )
    shutil.rmtree(share)
    clips = dict.fromkeys("hello silent beep note only-here not-in-list".split(), 0.3)
    write_prompts(share, "fr", texts, clips | {"short": 0.29, "long": 30.1})
    write_prompts(share, "en", english + "note: two (loud)\n", {})
    (share / "asterisk" / "sounds" / "fr" / "broken.wav").write_bytes(b"no audio at all")
    assert prepare(*prompt_flags(prompts)) == 1  # train and dev have no clip
    rows = data.read_corpus(prompts / "out", "fr", "en")[0]["test"]
    assert {(r.path.name, r.sentence, r.translation) for r in rows} == {
        ("hello.flac", "Bonjour !", "hello"), ("silent.flac", "", "silent"),
    }  # fmt: skip
    report = report_of(prompts)
    assert report["splits"]["test"]["without a transcript"] == 1
    assert report["in no split"] == {
        "shorter than 0.3 s": 1, "too long": 1, "text in brackets": 2, "missing": 1,
        "undecodable": 1, "no translation": 1, "not in core-sounds-fr.txt.gz": 1,
    }  # fmt: skip
    assert re.search(r"txt\.gz:8: lost: perdu$", report["examples"]["missing"][0])


def test_the_error_for_a_missing_package_names_it(prompts, capsys):
    def says(language: str = "fr") -> str:
        return refused(capsys, *prompt_flags(prompts, language))

    assert "no texts of it: " in says("it")
    assert "does not exist; apt-get install asterisk-core-sounds-it\n" in says("it")
    assert "has no .wav file; apt-get install asterisk-core-sounds-en-wav\n" in says("en-fr")
    assert "does not exist; Debian does not have this language; tools/README.md" in says("cy")
    table = prompts / "share" / "doc" / "asterisk-core-sounds-fr" / "core-sounds-fr.txt.gz"
    for content in (b"", b"plain", table.read_bytes()[:40]):
        table.write_bytes(content)
        if content:
            assert "core-sounds-fr.txt.gz cannot be read" in says()
    assert not (prompts / "out").exists()


# ----------------------------------------------------------------------------- a table of your own


def table_flags(folder: Path, *more) -> tuple:
    return ("table", "--table", folder / "mine.tsv", "--audio", folder / "audio", "--lang", "cy-en",
            "--out", folder / "out", *more)  # fmt: skip


def test_a_table_without_transcripts_gives_only_translation_examples(tmp_path):
    lines = ["path\ttranslation\tlang\tsplit"]
    for i, split in enumerate(["train", "", "dev", "test", "train"]):
        write_clip(tmp_path / "audio" / "far" / f"{i}.wav")
        lines.append(f"far/{i}.wav\tsaid {i}\t{'fr' if i == 4 else 'cy'}\t{split}")
    write_lines(tmp_path / "mine.tsv", *lines)
    assert prepare(*table_flags(tmp_path)) == 0
    splits, _ = data.read_corpus(tmp_path / "out", "cy", "en")
    assert [row.path.name for row in splits["train"]] == ["0.flac", "1.flac"]
    assert [len(rows) for rows in splits.values()] == [2, 1, 1]
    report = report_of(tmp_path, "cy-en")
    assert report["in no split"] == {"other language": 1}
    assert report["splits"]["train"]["without a transcript"] == 2

    tokenizer = Tokenizer(toys.llama_folder(tmp_path / "llama"))
    batches = Batches(splits["train"], 1.0, tokenizer, "llama2", 1000, seed=1)
    drawn = [example for group in batches.groups(0) for example in group]
    assert [example.task for example in drawn] == ["st", "st"]
    assert len(batches.load(drawn).audio) == 2


def test_the_cells_of_your_own_table_are_read_as_a_spreadsheet_wrote_them(tmp_path):
    lines = [
        "path\ttranslation\tsentence\tsplit",
        '0.wav\t"He said ""no"" to me."\tAC\\DC\ttrain',
        '1.wav\tPlease REMOVE this.\tun "mot"\ttrain',
        "2.wav\t\u200b\ufeff \tdeux\ttrain",
        f"{tmp_path}/audio/3.wav\tthree\t\u200b\tdev",
        "4.wav\tThree.\ttrois\ttest",
    ]
    for i in range(5):
        write_clip(tmp_path / "audio" / f"{i}.wav")
    write_lines(tmp_path / "mine.tsv", *lines)
    assert prepare(*table_flags(tmp_path)) == 0
    splits, unusable = data.read_corpus(tmp_path / "out", "cy", "en")
    rows = [(r.path.name, r.sentence, r.translation) for rows in splits.values() for r in rows]
    assert not unusable and rows == [
        ("0.flac", "AC\\DC", 'He said "no" to me.'),
        ("1.flac", 'un "mot"', "Please REMOVE this."),
        ("3.flac", "", "three"),
        ("4.flac", "trois", "Three."),
    ]
    report = report_of(tmp_path, "cy-en")
    assert report["splits"]["train"]["left out"] == {"empty text": 1}
    assert report["splits"]["dev"]["without a transcript"] == 1


def test_the_report_counts_test_texts_that_are_also_in_train(tmp_path, capsys):
    lines = ["path\ttranslation\tsentence\tsplit"]
    rows = [("one", "un", "train"), ("two", "deux", "train"), ("three", "trois", "dev"),
            ("one", "une", "test"), ("two", "deux", "test"), ("six", "six", "test")]  # fmt: skip
    for i, cells in enumerate(rows):
        write_clip(tmp_path / "audio" / f"{i}.wav")
        lines.append("\t".join([f"{i}.wav", *cells]))
    write_lines(tmp_path / "mine.tsv", *lines)
    assert prepare(*table_flags(tmp_path)) == 0
    line = "of 3 test sentences, 1 are also in train; of 3 test translations, 2 are also in train"
    assert line in capsys.readouterr().out
    assert report_of(tmp_path, "cy-en")["overlap"] == line


def test_without_a_split_column_the_name_of_a_clip_decides_its_split(tmp_path, capsys):
    lines = [f"{i}.wav\tsaid {i}\tdit {i}" for i in range(100)]
    for i in range(100):
        write_clip(tmp_path / "audio" / f"{i}.wav", 0.01)
    write_lines(tmp_path / "mine.tsv", "path\ttranslation\tsentence", *lines)
    assert prepare(*table_flags(tmp_path)) == 0
    assert "1 clip of 20 was drawn for dev, 1 for test" in capsys.readouterr().out
    assert "no column split" in report_of(tmp_path, "cy-en")["note"]
    splits, _ = data.read_corpus(tmp_path / "out", "cy", "en")
    assert all(2 <= len(splits[split]) <= 10 for split in ("dev", "test"))
    assert splits["dev"][0].sentence.startswith("dit")
    # More rows, and in another order: a clip stays in its split.
    write_clip(tmp_path / "audio" / "new.wav", 0.01)
    more = ["new.wav\tnew\tnew", *reversed(lines)]
    write_lines(tmp_path / "mine.tsv", "path\ttranslation\tsentence", *more)
    assert prepare(*table_flags(tmp_path)) == 0
    again, _ = data.read_corpus(tmp_path / "out", "cy", "en")
    for split in ("train", "dev", "test"):
        assert {row.path for row in splits[split]} <= {row.path for row in again[split]}


# ----------------------------------------------------------------------------------------- refusals


def refused(capsys, *flags) -> str:
    """The error message, which is one line."""
    capsys.readouterr()
    assert prepare(*flags) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("prepare.py: ") and printed.count("\n") == 1
    return printed


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            "../a.wav\tx\ttrain",
            r"mine\.tsv:2: the path '\.\./a\.wav' is not inside",
        ),
        ("/etc/passwd\tx\ttrain", r"mine\.tsv:2: the path '/etc/passwd' is not inside"),
        ("link.wav\tx\ttrain", r"mine\.tsv:2: the path 'link\.wav' is not inside"),
        ("\tx\ttrain", r"mine\.tsv:2: the path '' is not inside"),
        ("a.wav\tx\tvalid", r"mine\.tsv:2: the split is 'valid'; write one of train, dev, test"),
        ('a.wav\t"No", he said.\ttrain', r"mine\.tsv:2: .* quotation mark ends with one"),
        ("a.wav\tx", r"mine\.tsv:2: expected 3 cells \['path', 'translation', 'split'\], found 2"),
        ("a.wav\tx\ttrain\na.mp3\ty\ttrain", r":3: a\.mp3 and a\.wav would both become a\.flac"),
        ("", r"mine\.tsv has no row of cy: it has no rows"),
    ],
)
def test_a_bad_row_is_named_and_nothing_is_written(tmp_path, capsys, row, message):
    write_clip(tmp_path / "audio" / "a.wav")
    write_clip(tmp_path / "a.wav")
    (tmp_path / "audio" / "link.wav").symlink_to(tmp_path / "a.wav")
    write_lines(tmp_path / "mine.tsv", "path\ttranslation\tsplit", row)
    assert re.search(message, refused(capsys, *table_flags(tmp_path)))
    assert not (tmp_path / "out").exists()


def test_the_error_for_a_table_of_other_languages_names_them(tmp_path, capsys):
    write_clip(tmp_path / "audio" / "a.wav")
    write_lines(tmp_path / "mine.tsv", "path\ttranslation\tlang", "a.wav\tx\twelsh")
    assert "no row of cy: its column lang has ['welsh']" in refused(capsys, *table_flags(tmp_path))


def test_missing_files_are_reported_before_any_work(common_voice, capsys):
    def says(**changes):
        flags = list(flags_for(common_voice))
        for name, value in changes.items():
            flags[flags.index("--" + name.replace("_", "-")) + 1] = value
        return refused(capsys, *flags)

    assert re.search(r"no translations: covost_v2\.fr_en\.tsv is not in x", says(covost="x"))
    assert "no Common Voice in x: neither fr/validated.tsv" in says(common_voice="x")
    assert "no Common Voice in" in says(lang="fr,de")
    assert "did you mean 'fr'" in says(lang="french")
    assert "write it, as in en-de" in says(lang="en")
    assert not (common_voice / "out").exists()
    (common_voice / "cv" / "en" / "clips").mkdir(parents=True)
    write_lines(common_voice / "cv" / "en" / "validated.tsv", "path\tsentence")
    assert "en into de, tr, fa" in says(lang="en-fr")
    write_lines(common_voice / "covost" / "covost_v2.en_de.tsv", "path\ttranslation\tsplit")
    assert "have no clip of train, dev, test in common" in says(lang="en-de")
    fleurs = ("fleurs", "--fleurs", common_voice, "--lang", "fr", "--out", common_voice / "out")
    assert "no audio: " in refused(capsys, *fleurs)
    nowhere = ("table", "--table", "x", "--audio", common_voice)
    more = ("--lang", "fr", "--out", common_voice / "out")
    assert "no table --table: x does not exist" in refused(capsys, *nowhere, *more)
    assert "run the command once for each direction" in refused(
        capsys, *table_flags(common_voice)[:6], "fr,de", "--out", common_voice / "out"
    )


def test_a_table_that_is_too_small_to_draw_from_is_refused(tmp_path, capsys):
    write_clip(tmp_path / "audio" / "a.wav")
    write_lines(tmp_path / "mine.tsv", "path\ttranslation", "a.wav\tx")
    assert "1 rows, too few" in refused(capsys, *table_flags(tmp_path))


def test_a_corpus_is_not_overwritten_and_not_mixed_with_another(common_voice, capsys):
    flags = list(flags_for(common_voice))
    flags[8] = common_voice / "cv"
    before = content(common_voice / "cv")
    assert "has the original clips; choose another folder" in refused(capsys, *flags)
    assert content(common_voice / "cv") == before

    flags[8] = common_voice / "out"
    write_lines(common_voice / "out" / "fr" / "validated.tsv", "path\tsentence", "mine\tmine")
    assert "a corpus that prepare.py did not make" in refused(capsys, *flags)
    (common_voice / "out" / "fr" / "validated.tsv").unlink()

    assert prepare(*flags) == 0
    before = content(common_voice / "out")
    report = common_voice / "out" / "fr" / "prepared.fr-en.json"
    for text in ("{", "[1]", "{}"):
        report.write_text(text)
        assert "prepared.fr-en.json is not a report (" in refused(capsys, *flags)
    report.write_bytes(before["fr/prepared.fr-en.json"])
    write_clip(common_voice / "audio" / "good1.wav")
    write_lines(common_voice / "mine.tsv", "path\ttranslation\tsplit", "good1.wav\tx\ttrain")
    mine = list(table_flags(common_voice))
    mine[6] = "fr"
    message = refused(capsys, *mine)
    assert re.search(r"another corpus \(corpus: covost2 there, table now; audio: .* there", message)
    assert content(common_voice / "out") == before


def test_the_examples_in_the_help_can_be_parsed(capsys):
    for flags in (["-h"], ["covost2", "-h"]):
        with pytest.raises(SystemExit) as ended:
            command.main(flags)
        assert ended.value.code == 0
    printed = capsys.readouterr().out
    for example in re.findall(r"^  python tools/prepare\.py (.*)$", printed, re.M):
        assert command.build_parser().parse_args(example.split()).lang
    assert "prepare.py fleurs" in printed and "--common-voice" in printed
