"""train.py: its options, the training loop, and the files that a run writes."""

import io
import json
import math
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
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
from data import read_corpus
from llast import LLaST
from train import PRESETS, compute_gradient, learning_rate, make_batches, model_config, train_epochs
from translate import SearchOptions, Translation, translate

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tiny" / "corpus"


@pytest.fixture
def corpus(tmp_path):
    return toys.small_corpus(tmp_path / "corpus", ("fr", "de"), (12, 2, 2))


@pytest.fixture
def toy(tmp_path):
    """Settings of a toy model and 12 rows. An epoch takes a fraction of a second."""
    settings = replace(
        PRESETS["tiny"],
        encoder=toys.whisper_folder(tmp_path / "whisper", encoder_layers=1),
        llm=toys.llama_folder(tmp_path / "llama", num_hidden_layers=1),
        batch=400,
        epochs=1,
    )
    return settings, read_corpus(CORPUS, "fr", "en")[0]["train"][:12]


def new_model(settings, rows, seed=0):
    torch.manual_seed(seed)
    model = LLaST.fresh(model_config(settings))
    return model, make_batches(model, rows, settings, seed)


def run(monkeypatch, *flags) -> int:
    # Models after a few steps write long nonsense, which takes most of the time of a test.
    short = partial(SearchOptions, max_new_tokens=12)
    monkeypatch.setattr(train, "SearchOptions", short)
    monkeypatch.setattr(train, "ONE_BEAM", short(beams=1))
    monkeypatch.setattr(sys, "argv", ["train.py", *map(str, flags)])
    monkeypatch.setattr(train.STOP, "received", None)  # forget the signal of an earlier run
    return train.main()


def flags_for(corpus, out, *more):
    models = ("--encoder", corpus / "whisper", "--llm", corpus / "llama")
    return ("--data", corpus, *models, "--out", out, "--epochs", 1, "--asr", 1, *more)


def settings_from(*flags) -> train.Preset:
    args = train.build_parser().parse_args(list(flags))
    return train.with_flags(PRESETS[args.preset], args)


def lose(monkeypatch, names):
    """From now on the clips of these names cannot be read."""

    def load(path):
        if path.name in names:
            raise data.AudioError(path, "the disk lost it")
        return whisper_encoder.load_audio(path)

    monkeypatch.setattr(data, "load_audio", load)


# ---------------------------------------------------------------------------------- presets, flags


def test_alpha_keeps_its_ratio_to_the_rank():
    config = model_config(settings_from("--preset", "llast-8b", "--encoder-rank", "32"))
    assert (config.encoder_rank, config.encoder_alpha) == (32, 16)
    assert (config.llm_rank, config.llm_alpha) == (512, 256)


def test_the_model_remembers_the_tasks_that_it_was_trained_on():
    assert model_config(settings_from("--asr", "0")).tasks == ("st",)
    assert model_config(settings_from("--asr", "0.1")).tasks == ("st", "asr")


def test_rank_0_switches_a_lora_off(toy):
    ranks = settings_from("--encoder-rank", "0", "--llm-rank", "0", "--dropout", "0.5")
    assert ranks.dropout == 0.5
    settings = replace(toy[0], encoder_rank=ranks.encoder_rank, llm_rank=ranks.llm_rank)
    model, batches = new_model(settings, toy[1])
    assert {name.split(".")[0] for name in model.trained()} == {"projector"}
    train_epochs(model, batches, settings)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--lang", "german"), "did you mean 'de'"),
        (("--lang", "it"), "no it-en corpus in"),
        (("--data", "/nowhere"), "no fr-en corpus in /nowhere"),
        (("--asr", "2"), "--asr is 2.0; it must be 0 to 1"),
        (("--dropout", "-0.1"), "--dropout is -0.1; it must be 0 to 1"),
        (("--max-failed", "nan"), "--max-failed is nan; it must be 0 to 1"),
        (("--llm-rank", "-1"), "--llm-rank is -1; it must be at least 0"),
        (("--preset", "llast-8b"), "get it with\n    hf download openai/whisper-large-v2"),
        (("--encoder", "/nowhere"), "/nowhere does not exist"),
        (("--epochs", "0"), "--epochs is 0; it must be at least 1"),
        (("--accumulate", "0"), "--accumulate is 0; it must be at least 1"),
        (("--clips", "0"), "--clips is 0; it must be at least 1"),
        (("--lr", "nan"), "--lr is nan; it must be"),
        (("--out", __file__), "is not an empty folder; choose another folder with --out"),
        (("--out", f"{__file__}/run", "--clips", 1), "Not a directory"),
    ],
)
def test_a_wrong_option_is_an_error_before_anything_is_written(
    monkeypatch, tmp_path, capsys, flags, message
):
    assert run(monkeypatch, "--out", tmp_path / "run", *flags) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------------------ corpora


def test_a_split_without_usable_clips_is_an_error_before_the_training(
    monkeypatch, corpus, tmp_path, capsys
):
    table = corpus / "fr" / "fr-en.tsv"
    lines = table.read_text().splitlines(keepends=True)
    table.write_text("".join("gone_" * ("\tdev\t" in line) + line for line in lines))
    assert run(monkeypatch, *flags_for(corpus, tmp_path / "run")) == 2
    err = capsys.readouterr().err
    assert "no such file" in err and "has no usable clips for dev" in err
    assert not (tmp_path / "run").exists()


def test_rows_over_the_budget_are_counted_and_named(toy, capsys):
    settings, rows = toy
    long = [replace(row, translation="word " * 2000) for row in rows[:7]]
    model, batches = new_model(replace(settings, asr=0.0), long + rows[7:])
    dev = make_batches(model, [*long[:1], *rows[7:]], settings)
    train.print_corpora({"train": [], "dev": [], "test": []}, batches, dev)
    out = capsys.readouterr().out
    assert "8 rows are longer than --batch 400 positions and are left out" in out
    assert sum(str(row.path) in out for row in long) == 5


def test_the_table_of_the_corpus_counts_test_sentences_that_are_also_in_train(toy, capsys):
    settings, rows = toy
    model, batches = new_model(settings, rows)
    unseen = [replace(row, sentence="autre chose") for row in rows[:3]]
    train.print_corpora(
        {"train": rows, "dev": rows[:1], "test": rows[3:5] + unseen}, batches, batches
    )
    out = capsys.readouterr().out
    assert "fr-en       train         12" in out
    assert "of 5 test sentences, 2 are also in train" in out


# ---------------------------------------------------------------------------------------- the loop


def test_a_notebook_trains_in_three_lines_without_files_and_output(
    toy, tmp_path, monkeypatch, capfd
):
    settings, rows = toy
    steps, epochs = [], []
    before = sorted(tmp_path.rglob("*"))
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()

    model = LLaST.fresh(model_config(settings))
    batches = make_batches(model, rows, settings)
    train_epochs(model, batches, replace(settings, epochs=2), steps.append, epochs.append)

    assert capfd.readouterr() == ("", "") and sorted(tmp_path.rglob("*")) == before
    assert epochs == [1, 2] and len(steps) == steps[0].n_steps > 4
    assert [step.epoch for step in steps] == [1] * (len(steps) // 2) + [2] * (len(steps) // 2)
    assert [step.number for step in steps] == list(range(1, len(steps) + 1))
    for step in steps:
        labels = torch.cat([batch.labels.flatten() for batch in step.batches])
        assert step.losses.shape == (int((labels >= 0).sum()),)
        assert math.isfinite(step.grad_norm)
        assert step.lr == learning_rate(step.number, len(steps), settings) > 0


def test_the_loss_falls(toy):
    losses, rows = [], toy[1][:6]
    settings = replace(toy[0], llm=PRESETS["tiny"].llm, asr=0.0, batch=150, epochs=5)
    model, batches = new_model(settings, rows)
    train_epochs(model, batches, settings, lambda step: losses.append(step.losses.mean().item()))
    assert sum(losses[-3:]) < 0.7 * sum(losses[:3])


def test_two_batches_of_a_step_give_the_gradient_of_one_large_batch(toy):
    settings, rows = toy
    examples = [data.Example(row, "st") for row in rows]
    gradients, losses = [], []
    for groups in ([examples[:5], examples[5:]], [examples]):
        model, batches = new_model(settings, rows)
        loaded = [batches.load(group) for group in groups]
        n_tokens = sum(int((batch.labels != data.IGNORE).sum()) for batch in loaded)
        found, norm = compute_gradient(model, loaded, n_tokens, 1e9)
        gradients.append({name: p.grad for name, p in model.named_parameters() if p.requires_grad})
        losses.append(found)
    torch.testing.assert_close(losses[0], losses[1], rtol=1e-4, atol=1e-4)
    for name, tensor in gradients[0].items():
        torch.testing.assert_close(tensor, gradients[1][name], rtol=1e-3, atol=1e-5, msg=name)


def test_the_settings_reach_the_optimizer_and_the_clipping(toy, monkeypatch):
    settings, rows = toy
    settings = replace(settings, betas=(0.8, 0.95), weight_decay=0.3, clip_norm=0.123)
    adamw, clip, seen = torch.optim.AdamW, torch.nn.utils.clip_grad_norm_, {}
    monkeypatch.setattr(
        torch.optim, "AdamW", lambda params, **options: seen.update(options) or adamw(params)
    )
    monkeypatch.setattr(
        torch.nn.utils,
        "clip_grad_norm_",
        lambda params, norm: seen.update(norm=norm) or clip(params, norm),
    )
    train_epochs(*new_model(settings, rows), settings)
    assert (seen["betas"], seen["weight_decay"], seen["norm"]) == ((0.8, 0.95), 0.3, 0.123)


@pytest.mark.parametrize("schedule", ["linear", "cosine"])
def test_the_learning_rate_rises_to_its_peak_and_falls_towards_0(schedule):
    settings = replace(PRESETS["tiny"], schedule=schedule, warmup=0.1, lr=0.5)
    rates = [learning_rate(number, 100, settings) for number in range(1, 101)]
    peak = rates.index(max(rates))
    assert rates[:10] == pytest.approx([0.05 * n for n in range(1, 11)])
    assert 9 <= peak <= 10 and max(rates) == pytest.approx(0.5)
    assert rates[peak:] == sorted(rates[peak:], reverse=True) and 0 < rates[-1] < 0.01


def test_prefetch_yields_in_order_and_makes_one_item_early():
    made = []

    def items():
        for i in range(4):
            made.append(i)
            yield i

    for i, item in enumerate(train.prefetch(items())):
        latest = time.monotonic() + 10
        while len(made) < min(i + 2, 4) and time.monotonic() < latest:
            time.sleep(0.001)  # the thread is at work
        time.sleep(0.01)  # and it must not do more
        assert item == i and made == list(range(min(i + 2, 4)))


def test_an_error_in_the_thread_is_raised_where_the_item_is_used():
    def items():
        yield 1
        raise ValueError("a broken table")

    items_early = train.prefetch(items())
    assert next(items_early) == 1
    with pytest.raises(ValueError, match="a broken table"):
        next(items_early)


def test_a_step_without_a_clip_is_left_out_and_an_epoch_without_one_ends_the_training_row_22(
    toy, monkeypatch
):
    settings, rows = toy
    settings = replace(settings, max_failed=1.0, batch=145, asr=0.0)
    model, batches = new_model(settings, rows)
    names = [[example.row.path.name for example in group] for group in batches.groups(0)]
    numbers = []
    lose(monkeypatch, names[2] + names[4])
    train_epochs(model, batches, settings, lambda step: numbers.append(step.number))
    assert numbers == [n + 1 for n in range(len(names)) if n not in (2, 4)]

    lose(monkeypatch, sum(names, []))
    model, batches = new_model(settings, rows)
    with pytest.raises(ValueError, match="training clips .100.0%. cannot be read") as error:
        train_epochs(model, batches, settings, lambda step: pytest.fail("a step without a clip"))
    assert str(error.value).count("the disk lost it") == 5


def test_more_than_five_failed_clips_and_1_percent_end_the_training(toy, monkeypatch):
    settings, rows = toy
    for n_lost, max_failed, ends in ((5, 0.01, False), (6, 0.01, True), (6, 0.5, False)):
        changed = replace(settings, max_failed=max_failed, epochs=2)
        lose(monkeypatch, {row.path.name for row in rows[:n_lost]})
        model, batches = new_model(changed, rows)
        if not ends:
            train_epochs(model, batches, changed)
            assert len(batches.skipped) == n_lost
            continue
        with pytest.raises(ValueError) as error:
            train_epochs(model, batches, changed)
        assert "6 training clips (50.0%) cannot be read" in str(error.value)
        assert str(error.value).count("the disk lost it") == 5 and "--max-failed" in str(
            error.value
        )


# ------------------------------------------------------------------------------------------ the run


def test_two_runs_with_one_seed_are_equal_and_another_seed_is_not(toy):
    settings, rows = toy
    weights = []
    for seed in (3, 3, 4):
        model, batches = new_model(replace(settings, dropout=0.1), rows, seed)
        train_epochs(model, batches, settings)
        weights.append(model.trained())
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
        assert len(lines) == 1 + results[direction]["n"] == 3
    assert results["seconds"] > 0
    steps = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
    assert [line["step"] for line in steps if "loss" in line] == list(range(1, len(steps)))
    assert all(line["clips_per_second"] > 0 for line in steps if "loss" in line)
    assert "dev_loss" in steps[-1]
    assert json.loads((out / "run.json").read_text())["epochs"] == 1
    weights = load_file(out / "llast.safetensors")
    assert all(tensor.abs().sum() > 0 for name, tensor in weights.items() if "lora_B" in name)

    printed = capsys.readouterr().out
    assert "llama/tokenizer.model\n" in printed
    table = [row for row in map(str.split, printed.splitlines()) if row[1:2] == ["train"]]
    assert [row[:3] + row[4:5] for row in table] == [
        ["de-en", "train", "12", "12"],  # direction, split, clips, of them to translate
        ["fr-en", "train", "12", "12"],
    ]
    assert sum(int(row[5]) for row in table) == 12  # to transcribe: half of all
    assert "of 4 test sentences, 0 are also in train" in printed
    for part in ("encoder LoRA", "projector", "LLM LoRA"):
        assert part in printed
    command = next(line for line in printed.splitlines() if "python translate.py" in line)
    assert "--lang de-en " in command and f"{CORPUS.name}/de/clips/" in command
    clip = next((corpus / "de" / "clips").iterdir())
    short = SearchOptions(max_new_tokens=4)
    model = LLaST.from_pretrained(out)
    [result] = translate(model, [clip], source="de", search=short)
    assert result.error is None
    assert 0 < model.config.max_loss < 20


def test_a_folder_with_a_model_or_with_other_files_is_refused_and_not_changed(
    monkeypatch, corpus, tmp_path, capsys
):
    for name in ("llast.json", "letter.txt"):
        out = tmp_path / name.split(".")[0]
        out.mkdir()
        (out / name).write_text("dear")
        assert run(monkeypatch, *flags_for(corpus, out)) == 2
        assert "choose another folder with --out" in capsys.readouterr().err
        assert [path.read_text() for path in out.iterdir()] == ["dear"]


def test_a_read_only_folder_is_an_error_before_the_models_are_loaded_row_6(
    monkeypatch, corpus, tmp_path, capsys
):
    monkeypatch.setattr(LLaST, "fresh", lambda *_: pytest.fail("the models were loaded"))

    def read_only(path, *_, **__):
        raise PermissionError(13, "Permission denied", str(path))

    monkeypatch.setattr(Path, "mkdir", read_only)
    assert run(monkeypatch, *flags_for(corpus, tmp_path / "run")) == 2
    assert "Permission denied" in capsys.readouterr().err


def test_a_log_that_cannot_be_written_is_reported_once_and_training_goes_on_row_5(
    monkeypatch, corpus, tmp_path, capsys
):
    out, prepare = tmp_path / "run", train.start_files

    def lose_the_log(*args):
        prepare(*args)
        (out / "log.jsonl").unlink()
        (out / "log.jsonl").mkdir()

    monkeypatch.setattr(train, "start_files", lose_the_log)
    assert run(monkeypatch, *flags_for(corpus, out)) == 0
    assert capsys.readouterr().out.count("log.jsonl cannot be written") == 1
    assert (out / "llast.json").is_file() and (out / "results.json").is_file()


def test_output_that_the_terminal_cannot_show_is_escaped(monkeypatch):
    stream = io.TextIOWrapper(io.BytesIO(), encoding="ascii")
    monkeypatch.setattr(sys, "stdout", stream)
    monkeypatch.setattr(train, "run", lambda args: print("Où ?") or 0)
    assert run(monkeypatch) == 0
    stream.flush()
    assert stream.buffer.getvalue() == b"O\\xf9 ?\n"


def test_a_clip_that_breaks_after_the_start_is_left_out_and_named(
    monkeypatch, corpus, tmp_path, capsys
):
    splits, _ = read_corpus(corpus, "fr", "en")
    broken = [splits[split][0].path.name for split in ("train", "dev")]
    lose(monkeypatch, broken)
    assert run(monkeypatch, *flags_for(corpus, tmp_path / "run")) == 0
    out = capsys.readouterr().out
    for name in broken:
        assert (
            f"left out, because it cannot be read: {corpus}/fr/clips/{name}: the disk lost it"
            in out
        )


def test_dev_clips_that_cannot_be_read_are_an_error(monkeypatch, corpus, tmp_path, capsys):
    dev = [row.path.name for row in read_corpus(corpus, "fr", "en")[0]["dev"]]
    lose(monkeypatch, dev)
    assert run(monkeypatch, *flags_for(corpus, tmp_path / "none")) == 2
    err = capsys.readouterr().err
    assert "no dev clip can be read; fix them: " in err and dev[0] in err


@pytest.mark.parametrize(("n", "printed"), ((200, "a" * 200), (201, "a" * 200 + " ...")))
def test_a_sample_shows_at_most_200_characters(monkeypatch, corpus, capsys, n, printed):
    answer = Translation("clip.wav", "a" * n)
    monkeypatch.setattr(train, "translate_in_order", lambda *args: [answer])
    train.print_samples(None, read_corpus(corpus, "fr", "en")[0]["dev"])
    assert f"got       {printed}\n" in capsys.readouterr().out


def test_too_many_failed_clips_keep_the_last_good_model(monkeypatch, corpus, tmp_path, capsys):
    out, saved = tmp_path / "run", {}
    names = {row.path.name for row in read_corpus(corpus, "fr", "en")[0]["train"]}
    print_samples = train.print_samples

    def lose_the_disk(*args):
        print_samples(*args)
        saved.update(
            {name: (out / name).read_bytes() for name in ("llast.json", "llast.safetensors")}
        )
        lose(monkeypatch, names)

    monkeypatch.setattr(train, "print_samples", lose_the_disk)
    monkeypatch.setattr(data, "CACHE_BYTES", 0)  # read every clip in every epoch
    assert run(monkeypatch, *flags_for(corpus, out), "--epochs", 2) == 2
    err = capsys.readouterr().err
    assert "training clips" in err and "cannot be read" in err and "A model is saved in" in err
    assert saved and all((out / name).read_bytes() == content for name, content in saved.items())
    assert not (out / "results.json").exists()


def test_out_of_memory_names_the_phase_and_the_options_that_help_row_31(
    monkeypatch, corpus, tmp_path, capsys
):
    def too_much(*_, **__):
        raise torch.OutOfMemoryError("tried to allocate 80 GiB")

    for owner, name, phase, flag in (
        (torch.optim.AdamW, "step", "in a step of the optimizer", "--llm"),
        (LLaST, "forward", "in training, on a batch of", "--recompute all"),
        (LLaST, "fresh", "while loading the models", "--llm"),
        (train, "dev_scores", "on the dev clips", "--recompute all"),
    ):
        with monkeypatch.context() as patch:
            patch.setattr(owner, name, too_much)
            assert run(patch, *flags_for(corpus, tmp_path / name)) == 2
        err = capsys.readouterr().err
        assert phase in err and flag in err and "80 GiB" in err
        assert name == "fresh" or "model is saved in" in err
    with monkeypatch.context() as patch:
        patch.setattr(train, "dev_scores", lambda *_: {})
        patch.setattr(train, "score_rows", too_much)
        assert run(patch, *flags_for(corpus, tmp_path / "test")) == 2
    err = capsys.readouterr().err
    assert "on a dev or test clip" in err and "A model is saved in" in err


@pytest.mark.parametrize(
    ("factor", "problem"), [(math.nan, "its loss is nan"), (1e30, "its gradient norm is inf")]
)
def test_a_step_that_is_not_finite_is_skipped_and_three_in_a_row_end_the_run_row_17(
    monkeypatch, corpus, tmp_path, capsys, factor, problem
):
    out, forward, after_step = tmp_path / "run", LLaST.forward, train.Report.after_step
    numbers, weights = [1], []

    def diverge(model, batch):
        is_bad = model.training and numbers[-1] in (3, 5, 6, 8, 9, 10)
        return forward(model, batch) * (factor if is_bad else 1)

    def watch(report, step):
        after_step(report, step)
        numbers.append(step.number + 1)
        weights.append({name: t.clone() for name, t in report.model.trained().items()})

    monkeypatch.setattr(LLaST, "forward", diverge)
    monkeypatch.setattr(train.Report, "after_step", watch)
    flags = *flags_for(corpus, out), "--batch", 145, "--epochs", 2, "--save-minutes", 0
    assert run(monkeypatch, *flags) == 2
    printed, log = capsys.readouterr(), (out / "log.jsonl").read_text()
    assert numbers[-1] == 11 and "NaN" not in log
    assert "three steps in a row" in printed.err and "try a smaller --lr" in printed.err
    assert "No model is saved" in printed.err and "continues" in printed.err
    assert printed.out.count(" is skipped: ") == 6 and problem in printed.out
    skipped = [line for line in map(json.loads, log.splitlines()) if "skipped" in line]
    assert [line["step"] for line in skipped] == [3, 5, 6, 8, 9, 10]
    for line in skipped:
        before, after = (weights[line["step"] - i] for i in (2, 1))
        assert all(torch.equal(before[name], after[name]) for name in before)
        assert line["skipped"] and all(path in printed.out for path in line["skipped"])
    assert not torch.equal(*(weights[i]["projector.model.0.weight"] for i in (2, 3)))


def test_a_model_that_cannot_be_written_is_an_error(monkeypatch, corpus, tmp_path, capsys):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    monkeypatch.setattr(llast, "save_file", full)
    assert run(monkeypatch, *flags_for(corpus, tmp_path / "run")) == 2
    assert "train.py: I/O error: No space left" in capsys.readouterr().err


def test_ctrl_c_leaves_a_model_that_works(corpus, tmp_path):
    out = tmp_path / "run"
    flags = map(str, flags_for(corpus, out, "--epochs", 3, "--batch", 145))
    process = subprocess.Popen([sys.executable, ROOT / "train.py", *flags], stderr=subprocess.PIPE)
    log = out / "log.jsonl"
    deadline = time.monotonic() + 120
    while not (log.is_file() and log.read_text()) and time.monotonic() < deadline:
        time.sleep(0.1)
    os.kill(process.pid, signal.SIGINT)
    assert b"stopped by SIGINT. A model is saved in" in process.communicate(timeout=60)[1]
    assert process.returncode == 130
    clip = next((corpus / "fr" / "clips").iterdir())
    [result] = translate(LLaST.from_pretrained(out), [clip], search=SearchOptions(max_new_tokens=4))
    assert result.error is None


def test_ctrl_c_before_the_first_step_leaves_no_model_and_the_run_can_start_again(
    monkeypatch, corpus, tmp_path, capsys
):
    flags = flags_for(corpus, tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr(train, "train_epochs", send(signal.SIGINT))
        assert run(patch, *flags) == 130
    assert "stopped by SIGINT. No model is saved" in capsys.readouterr().err
    assert not (tmp_path / "run" / "llast.json").exists()
    assert run(monkeypatch, *flags) == 0


# ----------------------------------------------------------------------------------------- compiled


@pytest.mark.filterwarnings("ignore:The .grad attribute")
def test_compiled_layers_give_the_same_gradients_and_translations(toy, monkeypatch):
    """Traced only. To generate C++ code takes minutes: see tests/slow/test_compile.py."""
    compile_module = torch.nn.Module.compile
    monkeypatch.setattr(
        torch.nn.Module,
        "compile",
        lambda layer, **options: compile_module(layer, backend="eager", **options),
    )
    results = []
    for compiled in (False, True):
        model, batches = new_model(*toy)
        for tensor in model.trained().values():
            tensor.add_(0.01)
        if compiled:
            model.compile_layers()
            assert model.speech_encoder.layers[0]._compiled_call_impl is not None
            assert model.llm.model.layers[0]._compiled_call_impl is not None
        model.llm.recompute = True  # large models need both
        losses = model.train()(batches.load(batches.groups(0)[0]))
        losses.sum().backward()
        gradients = [p.grad for p in model.parameters() if p.requires_grad]
        paths, search = [row.path for row in toy[1][:2]], SearchOptions(2, max_new_tokens=3)
        results.append((losses, gradients, translate(model, paths, search=search)))
    (plain, gradients, texts), (losses, others, same_texts) = results
    torch.testing.assert_close(losses, plain, rtol=1e-4, atol=1e-4)
    for gradient, other in zip(gradients, others, strict=True):
        assert gradient.any() and (gradient - other).norm() <= 1e-4 * gradient.norm()
    assert [result.text for result in texts] == [result.text for result in same_texts]


# ------------------------------------------------------------------------------- stop and continue
# The rows are those of the list of faults that a run must survive.


class Killed(BaseException):
    """Ends a run as SIGKILL does: nothing in train.py catches it."""


MORE = ("--dropout", 0.1, "--accumulate", 2, "--epochs", 2, "--batch", 145)
N_STEPS = 10  # of these options, for the corpus `small`


def at_step(monkeypatch, number, action):
    """Call the action in the step `number`, after the line of the log is written."""
    after_step = train.Report.after_step

    def watch(report, step):
        after_step(report, step)
        if step.number == number:
            action()

    monkeypatch.setattr(train.Report, "after_step", watch)


def die():
    raise Killed


def send(number):
    return lambda *_: os.kill(os.getpid(), number)


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A corpus that no test changes, a run of it, and a run that was killed in its second epoch.

    The state of the killed run is that of the first epoch.
    """
    root = tmp_path_factory.mktemp("small")
    corpus = toys.small_corpus(root / "corpus", ("fr",), (6, 1, 1))
    with pytest.MonkeyPatch.context() as patch:
        assert run(patch, *flags_for(corpus, root / "whole", *MORE)) == 0
        at_step(patch, N_STEPS // 2 + 3, die)
        with pytest.raises(Killed):
            run(patch, *flags_for(corpus, root / "stopped", *MORE))
    return root


@pytest.fixture
def whole(small):
    """The results of the run that nobody stopped."""
    return toys.run_results(small / "whole")


@pytest.fixture
def stopped(small, tmp_path):
    """A copy of the killed run."""
    return shutil.copytree(small / "stopped", tmp_path / "stopped")


@pytest.fixture
def command(small, tmp_path):
    return flags_for(small / "corpus", tmp_path / "run", *MORE)


def state_of(toy, step=0):
    model, batches = new_model(*toy)
    state = train.TrainState(model, toy[0])
    state.step = step
    return state


def test_a_killed_run_continues_exactly_rows_7_to_9(monkeypatch, command, tmp_path, whole, capsys):
    # If the machine has a GPU, the training runs there, and this is row 9.
    out = tmp_path / "run"
    for step, minutes in ((2, 0), (4, 20), (N_STEPS // 2, 0), (8, 20)):
        with monkeypatch.context() as patch:
            at_step(patch, step, die)
            with pytest.raises(Killed):
                run(patch, *command, "--save-minutes", minutes)
    with open(out / "log.jsonl", "a") as log:
        log.write('{"step": 9, "ep')  # the process was killed while it wrote
    assert run(monkeypatch, *command) == 0
    assert toys.run_results(out) == whole
    printed = capsys.readouterr().out.splitlines()
    continued = [line for line in printed if line.startswith("continuing")]
    assert continued == [f"continuing after step {step}" for step in (2, 2, 5, 5)]
    names = "llast.json llast.safetensors log.jsonl results.json run.json test.fr-en.tsv".split()
    assert sorted(path.name for path in out.iterdir()) == names
    assert run(monkeypatch, *command) == 2
    assert "already has a model" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("owner", "name", "n_calls", "number"),
    [
        (LLaST, "forward", 5, signal.SIGTERM),  # in training
        (torch.optim.AdamW, "step", 3, signal.SIGINT),
        (train.Report, "log", 4, signal.SIGTERM),
        (train, "print_samples", 1, signal.SIGINT),  # in the dev scores
        (train, "merge_lora", 1, signal.SIGTERM),  # after the last epoch
        (data, "load_audio", 5, signal.SIGINT),  # while the training waits for data
    ],
)
def test_a_signal_saves_the_state_and_the_model_at_any_place_row_12(
    monkeypatch, command, tmp_path, whole, capsys, owner, name, n_calls, number
):
    out, function, calls = tmp_path / "run", getattr(owner, name), []

    def interrupt(*args, **options):
        calls.append(name)
        result = function(*args, **options)
        if len(calls) == n_calls:
            os.kill(os.getpid(), number)
        return result

    with monkeypatch.context() as patch:
        patch.setattr(owner, name, interrupt)
        assert run(patch, *command) == 128 + number
    assert f"stopped by {number.name}. " in capsys.readouterr().err
    assert (out / train.STATE).exists()
    assert LLaST.from_pretrained(out)
    assert run(monkeypatch, *command) == 0
    assert toys.run_results(out) == whole


def test_a_signal_stops_the_training_at_the_end_of_the_step_row_12(monkeypatch, command, tmp_path):
    at_step(monkeypatch, 3, send(signal.SIGTERM))
    assert run(monkeypatch, *command) == 143
    lines = (tmp_path / "run" / "log.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3]


def test_ctrl_c_while_the_models_are_loaded_writes_no_model(monkeypatch, command, tmp_path, capsys):
    def interrupt(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(LLaST, "fresh", interrupt)
    assert run(monkeypatch, *command) == 130
    assert "stopped by SIGINT" in capsys.readouterr().err
    assert not list((tmp_path / "run").glob("*.safetensors"))


def test_a_signal_waits_for_the_end_of_a_save_and_a_second_one_does_not_row_13(
    monkeypatch, command, tmp_path, whole
):
    out, wait_for_disk, handlers = tmp_path / "run", train.wait_for_disk, []

    def interrupt(path):
        if not handlers:
            assert path.suffix == ".tmp"
            os.kill(os.getpid(), signal.SIGTERM)
            handlers.extend(map(signal.getsignal, (signal.SIGTERM, signal.SIGINT)))
        wait_for_disk(path)

    with monkeypatch.context() as patch:
        patch.setattr(train, "wait_for_disk", interrupt)
        assert run(patch, *command) == 143
    assert handlers == [signal.SIG_DFL] * 2
    assert not (out / "state.tmp").exists()
    assert run(monkeypatch, *command) == 0
    assert toys.run_results(out) == whole


def test_a_state_that_is_killed_while_it_is_saved_can_be_loaded_row_1(toy, tmp_path):
    state, rng = state_of(toy, step=1), random.Random(0)
    state.save(tmp_path / train.STATE, {})
    for _ in range(15):
        child = os.fork()
        if not child:
            while True:
                state.step += 1
                state.save(tmp_path / train.STATE, {})
        time.sleep(rng.uniform(0, 0.05))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        assert state_of(toy).load(tmp_path / train.STATE, {})["step"] >= 1


def watch_the_disk(monkeypatch) -> list[str]:
    """The files that are flushed, renamed and deleted from now on, in this order."""
    calls, replace, unlink = [], os.replace, Path.unlink

    def note(call, path, then=lambda: None):
        calls.append(f"{call} {Path(path).name}")
        then()

    name_of = "/proc/self/fd/{}".format
    monkeypatch.setattr(os, "fsync", lambda n: note("flush", os.readlink(name_of(n))))
    monkeypatch.setattr(os, "replace", lambda a, b: note("rename", b, lambda: replace(a, b)))
    monkeypatch.setattr(Path, "unlink", lambda path: note("delete", path, lambda: unlink(path)))
    return calls


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="not Linux")
def test_a_state_is_on_the_disk_before_it_gets_its_name_row_2(toy, tmp_path, monkeypatch):
    calls, state = watch_the_disk(monkeypatch), state_of(toy)
    state.save(tmp_path / train.STATE, {})
    assert calls == ["flush state.tmp", "rename state.safetensors", f"flush {tmp_path.name}"]


@pytest.mark.skipif(not os.path.exists("/proc/self/fd"), reason="not Linux")
def test_the_state_is_saved_before_the_model_and_deleted_after_it_row_2(
    monkeypatch, command, tmp_path
):
    calls = watch_the_disk(monkeypatch)
    assert run(monkeypatch, *command) == 0
    saved = ["flush state.tmp", "rename state.safetensors", "flush run"]
    model = ["rename llast.safetensors", "rename llast.json"]
    names = ("llast.safetensors", "llast.json", "results.json", "run")
    end = [*(f"flush {name}" for name in names), "delete state.safetensors"]
    assert calls == [*(saved + model) * 2, *model, "rename test.fr-en.tsv", *end]


def test_a_state_that_was_cut_or_changed_is_refused_rows_3_and_4(toy, tmp_path):
    state, file, rng = state_of(toy, step=7), tmp_path / train.STATE, random.Random(0)
    state.save(file, {"epochs": 2})
    whole = file.read_bytes()
    for length in [0, 7, 1000, len(whole) - 1, *(rng.randrange(len(whole)) for _ in range(5))]:
        file.write_bytes(whole[:length])
        with pytest.raises(ValueError, match=train.STATE):
            state_of(toy).load(file, {"epochs": 2})
    places = [whole.index(b"step") + 8, *(rng.randrange(8, len(whole)) for _ in range(20))]
    for place in places:
        byte = whole[place] ^ 1 << rng.randrange(8)
        file.write_bytes(whole[:place] + bytes([byte]) + whole[place + 1 :])
        with pytest.raises(ValueError, match=train.STATE):
            state_of(toy).load(file, {"epochs": 2})


def test_a_state_with_another_tensor_name_is_refused(toy, tmp_path):
    state, file = state_of(toy), tmp_path / train.STATE
    name = "projector.model.0.weight.exp_avg"
    state.tensors[name + "2"] = state.tensors.pop(name)
    state.save(file, {})
    with pytest.raises(ValueError, match=f"missing: {name};.*unexpected: {name}2;"):
        state_of(toy).load(file, {})


def test_a_full_disk_keeps_the_last_state_and_the_run_continues_row_5(
    monkeypatch, command, tmp_path, whole, capsys
):
    def full(*_, **__):
        raise SafetensorError("I/O error: No space left on device")

    out = tmp_path / "run"
    with monkeypatch.context() as patch:
        at_step(patch, 3, lambda: patch.setattr(train, "save_file", full))
        assert run(patch, *command, "--save-minutes", 0) == 2
    assert "No space left" in capsys.readouterr().err
    assert run(monkeypatch, *command) == 0
    assert "continuing after step 3\n" in capsys.readouterr().out
    assert toys.run_results(out) == whole


def test_the_next_batch_is_the_same_with_and_without_a_thread_row_10(toy):
    numbers = []
    for in_thread in (False, True):
        model, batches = new_model(*toy)
        steps = train.load_steps(batches, 1, 2, 1, model.device)
        steps = train.prefetch(steps) if in_thread else steps
        numbers.append([[batch.ids.tolist() for batch in step] for step in steps])
    assert numbers[0] == numbers[1] and len(numbers[0]) > 1


def test_a_stopped_run_is_refused_with_other_settings_and_not_changed_row_11(
    monkeypatch, small, stopped, capsys
):
    files = {path: path.read_bytes() for path in stopped.iterdir()}
    more = *MORE, "--lr", 0.002, "--llm-rank", 4, "--seed", 1, "--clips", 3
    assert run(monkeypatch, *flags_for(small / "corpus", stopped, *more)) == 2
    err = capsys.readouterr().err
    assert "clips 3 instead of None, seed 1 instead of 0, llm_rank 4 instead of 16" in err
    assert "lr 0.002 instead of 0.001" in err and "choose another folder with --out" in err
    assert {path: path.read_bytes() for path in stopped.iterdir()} == files


@pytest.mark.parametrize(
    ("file", "name"),
    [
        ("whisper/config.json", "encoder_sha256"),
        ("llama/config.json", "llm_sha256"),
        ("fr/fr-en.tsv", "rows_sha256"),
    ],
)
def test_a_stopped_run_is_refused_with_other_models_or_rows_row_29(
    monkeypatch, small, tmp_path, stopped, capsys, file, name
):
    corpus = shutil.copytree(small / "corpus", tmp_path / "corpus", symlinks=True)
    text = (corpus / file).read_text()
    if file.endswith("json"):
        (corpus / file).write_text(text + "\n")
    else:
        first = next(line for line in text.splitlines() if "\ttrain\t" in line)
        (corpus / file).write_text(text.replace(first, first.replace("\ttrain", "!\ttrain")))
    assert run(monkeypatch, *flags_for(corpus, stopped, *MORE)) == 2
    assert f"{name} " in capsys.readouterr().err


def test_a_stopped_run_continues_with_moved_models_and_a_moved_corpus(
    monkeypatch, small, tmp_path, stopped, whole
):
    moved = shutil.copytree(small / "corpus", tmp_path / "moved", symlinks=True)
    more = "--recompute", "all", "--dtype", "float32"  # float32 is the default on a CPU
    assert run(monkeypatch, *flags_for(moved, stopped, *MORE, *more)) == 0
    assert toys.run_results(stopped)[0] == whole[0]


def test_two_runs_in_one_folder_are_refused_row_39(monkeypatch, command, capsys):
    codes = []
    at_step(monkeypatch, 2, lambda: codes.append(run(monkeypatch, *command)))
    assert run(monkeypatch, *command) == 0
    assert codes == [2] and "another run writes to" in capsys.readouterr().err


def test_a_folder_that_cannot_be_locked_is_reported(monkeypatch, command, capsys):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # as on Windows
    assert run(monkeypatch, *command) == 0
    assert "do not start a second run in this folder" in capsys.readouterr().out


@pytest.mark.parametrize("is_frozen", [False, True])
def test_a_first_step_that_changes_the_wrong_tensors_is_an_error(toy, monkeypatch, is_frozen):
    model, batches = new_model(*toy)
    state = train.TrainState(model, toy[0])
    names = {id(p): name for name, p in model.named_parameters()}
    name = "llm.model.norm.weight" if is_frozen else "projector.model.2.bias"
    parameters = state.optimizer.param_groups[0]["params"]
    if is_frozen:
        step = state.optimizer.step
        weight = model.llm.model.norm.weight
        monkeypatch.setattr(state.optimizer, "step", lambda: step() or weight.detach().add_(1e-6))
    else:
        state.optimizer.param_groups[0]["params"] = [p for p in parameters if names[id(p)] != name]
    with pytest.raises(ValueError, match=f"the first step is wrong: .*{name}"):
        train_epochs(model, batches, toy[0], state=state)
