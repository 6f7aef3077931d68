"""tools/reproduce.py: prepare, train and evaluate what is missing, and write a table."""

import contextlib
import io
import json
import os
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path

import pytest

import toys
import train
from tools import evaluate, prepare, reproduce
from translate import SearchOptions

ROOT = Path(__file__).parents[2]
SHORT = partial(SearchOptions, max_new_tokens=4)


@pytest.fixture
def programs(monkeypatch):
    """Run the other programs in this process, and record their files. This is faster."""
    started = []

    def run_program(file, *words, accepted=0, gpus=1):
        started.append(Path(file).stem)
        monkeypatch.setattr(sys, "argv", [file, *map(str, words)])
        program = {"train": train.main, "evaluate": evaluate.main}.get(started[-1], prepare.main)
        printed = io.TextIOWrapper(io.BytesIO(), "utf-8")
        with contextlib.redirect_stdout(printed):
            assert program() in (0, accepted)
        printed.seek(0)
        return printed.read()

    monkeypatch.setattr(reproduce, "run_program", run_program)
    monkeypatch.setattr(train, "SearchOptions", SHORT)
    monkeypatch.setattr(train, "ONE_BEAM", SHORT(beams=1))
    return started


@pytest.fixture
def flags(tmp_path):
    """Options for toy models and a corpus of four clips."""
    toys.whisper_folder(tmp_path / "whisper", encoder_layers=1)
    toys.llama_folder(tmp_path / "llama", num_hidden_layers=1)
    for split in ("train", "dev", "test"):
        path = tmp_path / "data" / "fr" / "clips" / f"{split}.wav"
        toys.write(path, toys.tone(300, 16000))
    rows = [(f"{split}.wav", "un", "one", split, 0.2) for split in ("train", "dev", "test")]
    toys.write_corpus(tmp_path / "data", rows)
    models = "--encoder", tmp_path / "whisper", "--llm", tmp_path / "llama"
    return [*map(str, ("tiny", "--out", tmp_path / "out", *models, "--data", tmp_path / "data"))]


def scores_of(*bleus: float) -> dict:
    scores = {"n": 9, "failed": 0, "signature": "sig", "chrf_signature": "sig", "chrf": 1.0}
    directions = ("fr-en", "de-en")
    return {d: scores | {"bleu": b, "bleu_lc": b + 1} for d, b in zip(directions, bleus)}


# -------------------------------------------------------------------------------------------- steps


def test_only_what_is_missing_is_done(flags, programs, tmp_path, capsys):
    assert reproduce.main([*flags, "--seeds", "0,1"]) == 0
    assert programs == ["train", "train"]
    runs = sorted(tmp_path.glob("out/*/run.json"))
    assert [json.loads(run.read_text())["seed"] for run in runs] == [0, 1]
    table = (tmp_path / "out" / "table.md").read_text()
    assert "| direction | clips | seed 0 | seed 1 | mean | range | mean, lower-cased |\n" in table
    assert "2 of 2 seeds" in table and "| fr-en | 1 |" in table and "nrefs:1|case:mixed" in table

    (tmp_path / "out" / "seed1" / "results.json").unlink()
    (tmp_path / "data" / "fr" / "clips" / "test.wav").write_bytes(b"no audio at all")
    assert reproduce.main([*flags, "--seeds", "0,1,2"]) == 0
    assert programs == ["train", "train", "evaluate", "train"]
    assert "3 of 3 seeds" in (tmp_path / "out" / "table.md").read_text()
    evaluated = json.loads((tmp_path / "out" / "seed1" / "results.json").read_text())
    assert evaluated["fr-en"]["failed"] == 1


def test_a_model_with_other_settings_is_an_error(flags, programs, tmp_path, capsys):
    assert reproduce.main([*flags, "--seeds", "0"]) == 0
    assert reproduce.main([*flags, "--seeds", "0", "--lr", "0.5"]) == 2
    message = "seed0 has a model with lr 0.001, but this command has lr 0.5; use the same options"
    assert message in capsys.readouterr().err
    assert programs == ["train"]


def test_what_is_missing_is_an_error_before_the_first_step(flags, programs, tmp_path, capsys):
    assert reproduce.main([*flags, "--lang", "fr,de"]) == 2
    printed = capsys.readouterr().err
    assert "has no corpus of de-en; name the folders of Common Voice and CoVoST-2 with" in printed
    assert reproduce.main([*flags, "--llm", str(tmp_path / "none")]) == 2
    assert "none does not exist; check its path" in capsys.readouterr().err
    assert reproduce.main(["llast-8b", "--encoder", str(tmp_path / "whisper")]) == 2
    assert "hf download NousResearch/Llama-2-7b-chat-hf" in capsys.readouterr().err
    assert reproduce.main([*flags, "--preset", "llast-8b"]) == 2
    assert "--preset llast-8b is not for this program" in capsys.readouterr().err
    assert programs == []


def test_a_missing_corpus_is_prepared_first(flags, monkeypatch, tmp_path):
    commands = []

    def run_program(*words):
        commands.append([str(word) for word in words])
        raise KeyboardInterrupt

    monkeypatch.setattr(reproduce, "run_program", run_program)
    more = ["--lang", "fr,de", "--common-voice", "cv", "--covost", "covost"]
    assert reproduce.main([*flags, *more]) == 130
    [[file, *words]] = commands
    assert file == "tools/prepare.py"
    args = prepare.build_parser().parse_args(words)
    assert (args.lang, args.out) == ("de-en", tmp_path / "data")


def test_ctrl_c_stops_the_training_which_saves_its_state(flags, tmp_path):
    out = tmp_path / "out"
    command = [sys.executable, str(ROOT / "tools" / "reproduce.py"), *flags, "--seeds", "0"]
    command += ["--epochs", "3000"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log = out / "seed0" / "log.jsonl"
    while process.poll() is None and not (log.exists() and log.read_text()):
        time.sleep(0.05)
    os.kill(process.pid, signal.SIGINT)
    _, printed = process.communicate(timeout=60)
    assert process.returncode == 130
    assert printed.endswith("stopped; the same command continues from here\n")
    assert (out / "seed0" / train.STATE).is_file() and not (out / "table.md").exists()


# ------------------------------------------------------------------------------------------ table


def test_the_table_has_the_mean_and_the_range_of_the_seeds():
    by_seed = {0: scores_of(40.0, 30.0), 2: scores_of(44.0, 31.0)}
    lines = reproduce.table_lines(by_seed, is_covost=False)
    assert lines == [
        "| direction | clips | seed 0 | seed 2 | mean | range | mean, lower-cased |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| fr-en | 9 | 40.0 | 44.0 | 42.0 | 40.0 to 44.0 | 43.0 |",
        "| de-en | 9 | 30.0 | 31.0 | 30.5 | 30.0 to 31.0 | 31.5 |",
        "| average |  | 35.0 | 37.5 | 36.2 | 35.0 to 37.5 | 37.2 |",
        "",
        "fr-en, de-en: sig",
    ]


def test_published_scores_are_next_to_those_of_covost2_only(tmp_path):
    lines = reproduce.table_lines({0: scores_of(40.0)}, is_covost=True)
    names = [cell.strip() for cell in lines[0].split("|")]
    cells = dict(zip(names, (cell.strip() for cell in lines[2].split("|")), strict=True))
    assert (cells["LLaST-2B"], cells["LLaST-8B"], cells["LLaST-14B"]) == ("41.2", "44.1", "45.1")
    assert lines[-1] == evaluate.CAVEAT

    settings = train.replace(train.PRESETS["tiny"], data=tmp_path)
    assert not reproduce.is_covost2(settings)
    (tmp_path / "fr").mkdir()
    for corpus in ("covost2", "voice-prompts"):
        (tmp_path / "fr" / "prepared.fr-en.json").write_text(json.dumps({"corpus": corpus}))
        assert reproduce.is_covost2(settings) == (corpus == "covost2")
