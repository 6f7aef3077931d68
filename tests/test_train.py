"""The command line of train.py: what it writes, that it repeats itself, what it refuses."""

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

import data
import llast
import toys
import train
import whisper_encoder
from data import Batch, Row
from llast import LLaST
from translate import SearchOptions, translate

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tiny" / "corpus"


@pytest.fixture
def corpus(tmp_path):
    """The first clips of the embedded French and German, so that an epoch takes seconds."""
    for language in ("fr", "de"):
        folder = tmp_path / "corpus" / language
        folder.mkdir(parents=True)
        (folder / "clips").symlink_to(CORPUS / language / "clips")
        table = CORPUS / language / f"{language}-en.tsv"
        columns = "path", "sentence", "translation", "split", "seconds"
        lines = [[row[c] for c in columns] for _, row in data.read_table(table, columns)]
        kept = [
            line
            for split, n in (("train", 24), ("dev", 4), ("test", 4))
            for line in [line for line in lines if line[3] == split][:n]
        ]
        toys.write_corpus(tmp_path / "corpus", kept, f"{language}-en")
    return tmp_path / "corpus"


def run(monkeypatch, *flags) -> int:
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    return train.main()


def flags_for(corpus, out, *more):
    return ("--data", corpus, "--out", out, "--epochs", 1, "--asr", 1, *more)


def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not(monkeypatch, corpus, tmp_path):
    weights = []
    for name, seed in (("a", 3), ("b", 3), ("c", 4)):
        assert run(monkeypatch, *flags_for(corpus, tmp_path / name, "--seed", seed)) == 0
        weights.append(load_file(tmp_path / name / "llast.safetensors"))
    a, b, c = weights
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert not all(torch.equal(a[name], c[name]) for name in a)


def test_a_run_writes_the_files_that_the_readme_names(monkeypatch, corpus, tmp_path, capsys):
    out = tmp_path / "run"
    assert run(monkeypatch, *flags_for(corpus, out, "--lang", "fr,de", "--asr", 0.5)) == 0
    results = json.loads((out / "results.json").read_text())
    for direction in ("fr-en", "de-en"):
        assert {"bleu", "bleu_lc", "chrf", "signature", "n"} <= results[direction].keys()
        lines = (out / f"test.{direction}.tsv").read_text().splitlines()
        assert lines[0].split("\t") == ["clip", "reference", "hypothesis", "score", "error"]
        assert len(lines) == 1 + results[direction]["n"] == 5
    assert results["seconds"] > 0
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, len(steps)))
    assert "dev_loss" in steps[-1]
    about = json.loads((out / "run.json").read_text())
    assert about["epochs"] == 1

    printed = capsys.readouterr().out
    table = [row for row in map(str.split, printed.splitlines()) if row[1:2] == ["train"]]
    assert [row[:3] + row[4:5] for row in table] == [
        ["de-en", "train", "24", "24"],  # direction, split, clips, of them to translate
        ["fr-en", "train", "24", "24"],
    ]
    assert sum(int(row[5]) for row in table) == 24  # to transcribe: half of all
    for part in ("encoder LoRA", "projector", "LLM LoRA"):
        assert part in printed
    command = next(line for line in printed.splitlines() if "python translate.py" in line)
    assert "--lang fr-en " in command  # of two directions
    clip = next((corpus / "de" / "clips").iterdir())
    short = SearchOptions(max_new_tokens=4)
    [result] = translate(LLaST.from_pretrained(out), [clip], source="de", search=short)
    assert result.error is None


def test_the_loss_falls(monkeypatch, corpus, tmp_path):
    flags = flags_for(corpus, tmp_path / "run", "--asr", 0, "--batch", 300)
    assert run(monkeypatch, *flags[:-4], "--epochs", 3, *flags[-4:]) == 0
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    losses = [line["loss"] for line in map(json.loads, lines) if "loss" in line]
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_a_folder_with_a_model_or_with_other_files_is_refused_and_left_alone(
    monkeypatch, corpus, tmp_path, capsys
):
    out = tmp_path / "run"
    assert run(monkeypatch, *flags_for(corpus, out)) == 0
    before = {path: path.read_bytes() for path in out.iterdir()}
    for more in ((), ("--lr", 0.5)):
        assert run(monkeypatch, *flags_for(corpus, out, *more)) == 2
        assert "holds a trained model; name another folder" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in out.iterdir()} == before

    other = tmp_path / "letters"
    other.mkdir()
    (other / "love.txt").write_text("dear")
    assert run(monkeypatch, *flags_for(corpus, other)) == 2
    assert "not a run of this program" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lang", "german"), "did you mean 'de'"),
        (("--lang", "it"), "no it-en corpus in"),
        (("--data", "/nowhere"), "no fr-en corpus in /nowhere"),
        (("--asr", "2"), "--asr is 2.0; it must be from 0 to 1"),
        (("--dropout", "-0.1"), "--dropout is -0.1; it must be from 0 to 1"),
        (("--max-failed", "nan"), "--max-failed is nan; it must be from 0 to 1"),
        (("--llm-rank", "-1"), "--llm-rank is -1; it must be at least 0"),
        (("--preset", "llast-8b"), "get it with\n    hf download openai/whisper-large-v2"),
        (("--encoder", "/nowhere"), "/nowhere is no Whisper"),
        (("--epochs", "0"), "--epochs is 0; it must be at least 1"),
        (("--accumulate", "0"), "--accumulate is 0; it must be at least 1"),
        (("--clips", "-5"), "--clips is -5; it must be at least 1"),
        (("--lr", "nan"), "--lr is nan; it must be from"),
        (("--out", __file__), "is not a run of this program"),
        (("--out", f"{__file__}/run", "--clips", 1), "Not a directory"),
    ],
)
def test_what_cannot_be_done_is_said(monkeypatch, tmp_path, capsys, flags, message):
    assert run(monkeypatch, "--out", tmp_path / "run", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


def test_a_clip_that_breaks_after_the_start_is_left_out_and_named(
    monkeypatch, corpus, tmp_path, capsys
):
    broken = data.read_corpus(corpus, "fr", "en")[0]["train"][0].path.name

    def load(path):
        if path.name == broken:
            raise data.AudioError(path, "the disk lost it")
        return whisper_encoder.load_audio(path)

    monkeypatch.setattr(data, "load_audio", load)
    assert run(monkeypatch, *flags_for(corpus, tmp_path / "run")) == 0
    assert f"{broken}: the disk lost it" in capsys.readouterr().out


def test_out_of_memory_names_the_flags_that_help(monkeypatch, corpus, tmp_path, capsys):
    def too_much(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    for where, name, phase, flag in (
        (torch.optim.AdamW, "step", "in a step of the optimizer", "--llm"),
        (LLaST, "forward", "in training, on a batch of", "--recompute all"),
        (LLaST, "fresh", "while loading the models", "--llm"),
        (train, "score_rows", "on the dev clips", "--recompute all"),
        (train, "finish", "on a test clip", "--llm"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(where, name, too_much)
            assert run(patch, *flags_for(corpus, tmp_path / name)) == 2
        told = capsys.readouterr().err
        assert phase in told and flag in told and "80 GiB" in told


@pytest.mark.parametrize(
    ("times", "found"), [(math.nan, "has a loss of nan"), (1e30, "a gradient of length inf")]
)
def test_a_gradient_that_is_no_number_stops_the_run_before_it_reaches_the_model(
    monkeypatch, corpus, tmp_path, capsys, times, found
):
    out, forward = tmp_path / "run", LLaST.forward

    def diverge(model, batch):
        """From the second epoch on."""
        wrong = model.training and (out / "llast.json").is_file()
        return forward(model, batch) * (times if wrong else 1)

    monkeypatch.setattr(LLaST, "forward", diverge)
    flags = *flags_for(corpus, out), "--epochs", 2, "--schedule", "cosine"
    assert run(monkeypatch, *flags) == 2
    told, log = capsys.readouterr().err, (out / "log.jsonl").read_text()
    last = json.loads(log.splitlines()[-1])
    assert last["epoch"] == 1 and "dev_loss" in last and "NaN" not in log
    assert f"step {last['step'] + 1} has" in told and found in told
    assert "a smaller --lr may help" in told
    assert "The model of the last whole epoch is in" in told
    assert all(tensor.isfinite().all() for tensor in LLaST.from_pretrained(out).trained().values())

    monkeypatch.setattr(LLaST, "forward", lambda model, batch: forward(model, batch) * times)
    assert run(monkeypatch, *flags_for(corpus, tmp_path / "first")) == 2
    assert "No model is saved" in capsys.readouterr().err


def test_a_model_that_cannot_be_written_is_told(monkeypatch, corpus, tmp_path, capsys):
    def full(*_):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(llast, "save_file", full)
    assert run(monkeypatch, *flags_for(corpus, tmp_path / "run")) == 2
    assert "train.py: I/O error: No space left" in capsys.readouterr().err


def test_dev_clips_that_cannot_be_read_are_told(monkeypatch, corpus, tmp_path, capsys):
    dev = [row.path.name for row in data.read_corpus(corpus, "fr", "en")[0]["dev"]]
    lost = set(dev[:1])

    def load(path):
        if path.name in lost:
            raise data.AudioError(path, "the disk lost it")
        return whisper_encoder.load_audio(path)

    monkeypatch.setattr(data, "load_audio", load)
    assert run(monkeypatch, *flags_for(corpus, tmp_path / "run")) == 0
    assert f"left out of the loss: {corpus}/fr/clips/{dev[0]}: the disk" in capsys.readouterr().out
    lost.update(dev)
    assert run(monkeypatch, *flags_for(corpus, tmp_path / "none")) == 2
    assert "no dev clip can be read; the first: " in capsys.readouterr().err


def test_rows_over_the_budget_and_repeated_test_texts_are_printed(
    monkeypatch, corpus, tmp_path, capsys
):
    table = corpus / "fr" / "fr-en.tsv"
    lines = table.read_text().splitlines()
    cells = next(line for line in lines if "\ttest\t" in line).split("\t")
    first, second = [line.split("\t") for line in lines if "\ttrain\t" in line][:2]
    first[1:3], second[2] = cells[1:3], "word " * 2000
    text = table.read_text().splitlines()[3:]
    table.write_text("\n".join([lines[0], "\t".join(first), "\t".join(second), *text, ""]))
    assert run(monkeypatch, *flags_for(corpus, tmp_path / "run", "--batch", 300)) == 0
    printed = capsys.readouterr().out
    assert "of 4 test sentences, 1 are also in train; of 4 test translations, 1 are" in printed
    assert (
        f"1 rows longer than --batch are left out, such as {corpus}/fr/clips/{second[0]} (st)"
        in printed
    )


def test_what_is_made_ahead_comes_in_order_and_one_item_early():
    made = []

    def items():
        for i in range(4):
            made.append(i)
            yield i

    for i, (item, waited) in enumerate(train.prefetch(items(), in_thread=True)):
        latest = time.monotonic() + 10
        while len(made) < min(i + 2, 4) and time.monotonic() < latest:
            time.sleep(0.001)  # the thread is at work
        time.sleep(0.01)  # and does no more than it should
        assert item == i and waited >= 0 and made == list(range(min(i + 2, 4)))


def test_what_goes_wrong_ahead_is_raised_where_it_is_used():
    def items():
        yield 1
        raise ValueError("a broken table")

    found = train.prefetch(items(), in_thread=True)
    assert next(found)[0] == 1
    with pytest.raises(ValueError, match="a broken table"):
        next(found)


def test_a_split_without_a_usable_clip_is_told_before_the_training(
    monkeypatch, corpus, tmp_path, capsys
):
    table = corpus / "fr" / "fr-en.tsv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join("gone_" * ("\tdev\t" in line) + line for line in lines))
    assert run(monkeypatch, *flags_for(corpus, tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert "no such file" in err and "no dev clips that can be used" in err
    assert not (tmp_path / "run").exists()


def test_the_pace_says_what_is_lost_to_padding():
    audio = [torch.zeros(16_000), torch.zeros(32_001)]  # 50 states, and 101: one is begun
    rows = torch.zeros(2, 11, dtype=torch.long)
    pace = train.Pace()
    pace.add([Batch([], audio, rows, rows, torch.tensor([11, 9]), [1, 1])], waited=0.0)
    assert (pace.clips, pace.positions, pace.padded) == (2, 60 + 109, 2 * 109)
    assert pace.figures()["padding"] == round(1 - 169 / 218, 3)
    assert "22% padding, 0% waiting" in str(pace)


def test_ctrl_c_leaves_a_model_that_works(corpus, tmp_path):
    out = tmp_path / "run"
    flags = map(str, ("--data", corpus, "--out", out, "--epochs", 500))
    # A shell that starts these tests in the background has told its children to ignore Ctrl-C.
    process = subprocess.Popen(
        [sys.executable, ROOT / "train.py", *flags],
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = out / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert process.wait(timeout=60) == 130
    clip = next((corpus / "fr" / "clips").iterdir())
    [result] = translate(LLaST.from_pretrained(out), [clip], search=SearchOptions(max_new_tokens=4))
    assert result.error is None


def test_ctrl_c_before_the_first_step_leaves_no_model(monkeypatch, corpus, tmp_path, capsys):
    def stop(*_):
        raise KeyboardInterrupt

    flags = flags_for(corpus, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(train, "train", stop)
        assert run(patch, *flags) == 130
    assert capsys.readouterr().err == "\nstopped before the first step; nothing is saved\n"
    assert not (tmp_path / "run" / "llast.json").exists()
    assert run(monkeypatch, *flags) == 0, "the same command starts it again"


def test_the_command_to_try_names_a_direction_that_is_clear(capsys):
    rows = [Row(Path("a.mp3"), "x", "y", "en", target, 1.0) for target in ("de", "zh-CN")]
    train.print_command(rows, Path("run"))
    assert "--lang en-de a.mp3" in capsys.readouterr().out
    train.print_command(rows[:1], Path("run"))
    assert "--lang" not in capsys.readouterr().out


def test_a_short_run_of_both_tasks_reaches_every_trained_tensor(monkeypatch, corpus, tmp_path):
    assert run(monkeypatch, *flags_for(corpus, tmp_path / "run")) == 0
    weights = load_file(tmp_path / "run" / "llast.safetensors")
    assert all(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_B" in name)


# ----------------------------------------------------------------------------------------- compiled


@pytest.fixture
def in_pairs():
    """The embedded default with few layers, twice; the second is compiled."""
    if not shutil.which("g++"):
        pytest.skip("to compile for a CPU takes g++")
    settings, pair = train.PRESETS["tiny"], []
    for _ in range(2):
        torch.manual_seed(0)
        model = LLaST.fresh(train.model_config(settings))
        del model.speech_encoder.layers[1:]  # compiling takes seconds a layer
        del model.llm.model.layers[2:]  # one of all positions, and the last
        for tensor in model.trained().values():
            tensor.add_(0.01 * torch.randn_like(tensor))
        pair.append(model)
    pair[1].compile_layers()
    assert pair[1].speech_encoder.layers[0]._compiled_call_impl is not None
    assert pair[1].llm.model.layers[0]._compiled_call_impl is not None
    rows = train.read_corpus(settings.data, "fr", "en")[0]["dev"]
    return *pair, rows[:12]


def test_compiled_layers_give_the_same_loss_and_gradients(in_pairs):
    """Within 1e-4, for they add in another order."""
    *pair, rows = in_pairs
    found = []
    for model in pair:
        model.llm.recompute = True  # both at once is what the paper's sizes want
        batches = train.Batches(rows, 0.5, model.tokenizer, "llama2", 600, seed=0)
        losses = torch.cat([model.train()(batches.load(group)) for group in batches.groups(0)])
        losses.sum().backward()
        found.append((losses, [p.grad for p in model.parameters() if p.requires_grad]))
    (loss, plain), (again, compiled) = found
    torch.testing.assert_close(again, loss, rtol=1e-4, atol=1e-4)
    for before, after in zip(plain, compiled, strict=True):
        assert before.any() and (before - after).norm() <= 1e-4 * before.norm()


def test_compiled_layers_find_the_same_answers(in_pairs):
    *pair, rows = in_pairs
    paths = [row.path for row in rows]
    search = SearchOptions(max_new_tokens=9)
    plain, compiled = (translate(model.eval(), paths, search=search) for model in pair)
    assert [result.text for result in plain] == [result.text for result in compiled]
    assert [result.score for result in compiled] == pytest.approx(
        [result.score for result in plain], abs=2e-4
    )
