"""train.py on several ranks: the steps and the files are those of one process.

The ranks are CPU processes. rank.py has what they do. A step has 6 batches and the corpus has 13,
so in the last step only one rank has a batch.
"""

import json
import multiprocessing
import os
import socket
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import data
import rank
import toys
import train
from llama import Llama, LlamaConfig
from llast import LLaST
from tools import plan
from whisper_encoder import WhisperConfig, WhisperEncoder

ROOT = Path(__file__).parents[1]
LOST = "phrasebook_fr_00286.ogg"  # two batches of the last rank have only this clip


def make_bases(folder: Path, whisper: dict, llama: dict, name=""):
    toys.whisper_folder(folder / f"{name}whisper", **whisper)
    toys.llama_folder(folder / f"{name}llama", **llama)


def job(*arguments, **options) -> list:
    return ["command", arguments, options]


def run_ranks(n: int, folder: Path, jobs: list) -> tuple[list, list[str]]:
    """Do the jobs on n ranks. -> for each job, the results of all ranks; the output of each rank"""
    # The fork server imports torch once for all processes.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["rank"])
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]  # a free one
    processes = [
        context.Process(target=rank.main, args=(i, n, port, folder, jobs)) for i in range(n)
    ]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    output = [(folder / f"output_{n}_{i}").read_text() for i in range(n)]
    results = folder / f"results_{n}.json"
    assert results.is_file(), output
    return json.loads(results.read_text()), output


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    """A folder with all runs, and by name the exit codes of all ranks, the bytes and the output."""
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join(sys.path))  # for the fork server
        return folder, do_runs(folder)


def do_runs(folder: Path) -> dict:
    make_bases(folder, {"encoder_layers": 2}, {"num_hidden_layers": 2})
    wide = dict(hidden_size=128, intermediate_size=352, num_attention_heads=8, head_dim=16)
    make_bases(
        folder,
        dict(d_model=96, encoder_attention_heads=6, encoder_ffn_dim=384),
        wide | {"num_key_value_heads": 2},
        "wide_",
    )
    rows = data.read_corpus(ROOT / "tiny" / "corpus", "fr", "en")[0]
    cells = [
        (row.path.name, row.sentence, row.translation, split, row.seconds)
        for split, n in (("train", 7), ("dev", 2), ("test", 3))
        for row in rows[split][:n]
    ]
    (folder / "corpus" / "fr").mkdir(parents=True)
    (folder / "corpus" / "fr" / "clips").symlink_to(rows["train"][0].path.parent)
    toys.write_corpus(folder / "corpus", cells)

    done = {
        "one": rank.command(folder, "one"),
        "one stopped": rank.command(folder, "one_stopped", stop_at=1),
        "one lost": rank.command(folder, "one_lost", lost=[LOST]),
    }
    jobs = {
        "two stopped": job("two_stopped", stop_at=2),
        "one, two sharded": job("one_two_sharded", "--shard", start="one_stopped"),
        "two lost": job("two_lost", lost=[LOST]),
        "two infinite": job("two_infinite", infinite=True, stop_at=2),
        "sent": ["count_sent_bytes", [False], {}],
        "sent sharded": ["count_sent_bytes", [True], {}],
    }
    results, done["two ranks"] = run_ranks(2, folder, list(jobs.values()))
    done |= dict(zip(jobs, results, strict=True))
    jobs = {
        "two, three sharded": job("two_three_sharded", "--shard", start="two_stopped"),
        "three lost sharded": job("three_lost", "--shard", lost=[LOST]),
        "three stopped": job("three_stopped", stop_at=1),
        "three died": job("three_died", die_at=1),
    }
    results, done["three ranks"] = run_ranks(3, folder, list(jobs.values()))
    done |= dict(zip(jobs, results))  # the last job has no result
    done["three, one"] = rank.command(folder, "three_one", start="three_stopped")
    return done


def log_of(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]


def assert_same_run(folder: Path, expected: Path):
    """The logs, the trained tensors and the test tables of two runs are equal within 1e-5."""
    lines, expected_lines = log_of(folder), log_of(expected)
    assert len(lines) == len(expected_lines)
    for line, expected_line in zip(lines, expected_lines):
        for name in line.keys() - {"seconds", "clips_per_second"}:
            assert line[name] == pytest.approx(expected_line[name], abs=2e-5), (line, expected_line)
    weights = load_file(folder / "llast.safetensors")
    for name, tensor in load_file(expected / "llast.safetensors").items():
        torch.testing.assert_close(weights[name], tensor, rtol=0, atol=1e-5)
    results = [json.loads((path / "results.json").read_text()) for path in (folder, expected)]
    assert results[0]["fr-en"] == results[1]["fr-en"]
    tables = [(path / "test.fr-en.tsv").read_text().splitlines() for path in (folder, expected)]
    clips = [[line.split("\t")[:3] for line in table] for table in tables]  # without the scores
    assert clips[0] == clips[1]
    assert sorted(path.name for path in folder.iterdir()) == sorted(
        path.name for path in expected.iterdir()
    )


def test_sigterm_on_one_rank_stops_all_ranks_after_the_same_step_row_14(runs):
    folder, done = runs
    assert done["one stopped"] == 143
    assert done["two stopped"] == [143] * 2 and done["three stopped"] == [143] * 3
    for name, step in (("one", 1), ("two", 2), ("three", 1)):
        assert (folder / f"{name}_stopped" / train.STATE).is_file()
        assert log_of(folder / f"{name}_stopped")[-1]["step"] == step


def test_two_sharded_ranks_continue_the_run_of_one_process_row_16(runs):
    folder, done = runs
    assert done["one"] == 0 and done["one, two sharded"] == [0, 0]
    assert_same_run(folder / "one_two_sharded", folder / "one")


def test_three_sharded_ranks_continue_the_run_of_two_row_16(runs):
    folder, done = runs
    assert done["two, three sharded"] == [0, 0, 0]
    assert_same_run(folder / "two_three_sharded", folder / "one")


def test_one_process_continues_the_run_of_three_ranks_row_16(runs):
    folder, done = runs
    assert done["three, one"] == 0
    assert_same_run(folder / "three_one", folder / "one")


@pytest.mark.parametrize("name", ["two_lost", "three_lost"])
def test_a_clip_that_one_rank_cannot_read_is_left_out_and_named(runs, name):
    folder, done = runs
    assert done["two lost"] == [0, 0] and done["three lost sharded"] == [0, 0, 0]
    assert_same_run(folder / name, folder / "one_lost")
    output = done["two ranks" if name == "two_lost" else "three ranks"]
    assert [text.count(f"{LOST}: the disk lost it") for text in output] == [1] + [0] * len(
        output[1:]
    )


def test_an_infinite_gradient_of_one_rank_is_skipped_by_all_row_18(runs):
    folder, done = runs
    assert done["two infinite"] == [143, 143]
    first, second = log_of(folder / "two_infinite")
    assert len(first["skipped"]) == first["clips"] and "loss" in second
    weights = load_file(folder / "two_infinite" / "llast.safetensors")
    assert all(tensor.isfinite().all() for tensor in weights.values())


def test_only_rank_0_prints(runs):
    _, done = runs
    assert done["two ranks"][0].count("LLM LoRA") == 4  # in each of the 4 runs
    assert done["two ranks"][1] == ""


def test_a_rank_that_dies_ends_the_run_with_a_message_row_15(runs):
    folder, done = runs
    for output in done["three ranks"][:2]:
        assert "has lost another rank, or waited too long for it" in output.splitlines()[-1]
    assert not (folder / "three_died" / "results.json").exists()


@pytest.mark.skipif(sys.platform != "linux", reason="counts the bytes of Linux's TCP connections")
@pytest.mark.parametrize("shard", [False, True])
def test_the_plan_has_the_bytes_that_two_ranks_send(runs, shard):
    folder, done = runs
    with torch.device("meta"):
        encoder = WhisperEncoder(WhisperConfig.from_json(folder / "wide_whisper" / "config.json"))
        llm = Llama(LlamaConfig.from_json(folder / "wide_llama" / "config.json"))
        model = LLaST(train.model_config(rank.WIDE), encoder, llm, tokenizer=None)
    trained = sum(p.numel() for p in model.trained().values())
    layers = [2 * size for size in plan.layer_bytes(model)]  # float32 instead of bfloat16
    planned = plan.sent_bytes(rank.WIDE, trained, layers, 2, shard)
    for sent in done["sent sharded" if shard else "sent"]:
        assert sent == pytest.approx(planned, rel=0.02)


def test_shard_needs_torchrun(monkeypatch, capsys, runs):
    folder, _ = runs
    assert rank.command(folder, "not_sharded", "--shard") == 2
    assert "use torchrun" in capsys.readouterr().err
