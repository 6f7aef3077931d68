"""notebooks/experiments: a run becomes one line and is not repeated; what after.py measures."""

import importlib.util
import json
from pathlib import Path

import pytest
import torch

import toys
from data import Batches, read_corpus, read_table
from llama import Tokenizer
from whisper_encoder import WhisperEncoder

ROOT = Path(__file__).parents[1]
CORPUS = ROOT / "tiny" / "corpus"


def load_script():
    spec = importlib.util.spec_from_file_location("runs", ROOT / "notebooks/experiments/runs.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def runs(tmp_path, monkeypatch):
    """The script as a module. It writes to a temporary folder, and some of its runs are short."""
    module = load_script()
    encoder = toys.whisper_folder(tmp_path / "whisper", encoder_layers=1)
    llm = toys.llama_folder(tmp_path / "llama", num_hidden_layers=1)
    options = f"--encoder {encoder} --llm {llm} --data {tmp_path / 'corpus'} --epochs 1"
    toy_runs = dict.fromkeys(["toy", "dual", *module.AFTER_DUAL], options)
    monkeypatch.setattr(module, "RUNS", module.RUNS | toy_runs)
    monkeypatch.setattr(module, "MODELS", tmp_path / "models")
    monkeypatch.setattr(module, "RESULTS", tmp_path / "results.jsonl")
    return module


def write_corpus(root: Path):
    """Twelve clips to train on, two for dev and two for test."""
    (root / "fr").mkdir(parents=True)
    (root / "fr" / "clips").symlink_to(CORPUS / "fr" / "clips")
    columns = "path", "sentence", "translation", "split"
    rows = [row for _, row in read_table(CORPUS / "fr" / "fr-en.tsv", columns)]
    kept = []
    for split, n in (("train", 12), ("dev", 2), ("test", 2)):
        kept += [[row[c] for c in columns] for row in rows if row["split"] == split][:n]
    toys.write_corpus(root, kept)


def write_line(runs, name="toy", seed=0, **changes):
    """Append a line as a finished run does."""
    line = {"name": name, "seed": seed, "settings": runs.settings_of(name) | changes}
    with open(runs.RESULTS, "a") as file:
        file.write(json.dumps(line) + "\n")


def test_every_run_has_valid_options_and_no_two_runs_are_the_same():
    runs = load_script()
    settings = [json.dumps(runs.settings_of(name), sort_keys=True) for name in runs.RUNS]
    assert len(set(settings)) == len(settings)


def test_the_runs_with_and_without_transcription_have_equally_many_steps(runs):
    def n_steps(name: str) -> int:
        settings = runs.settings_of(name)
        rows = read_corpus(CORPUS, "fr", "en")[0]["train"]
        tokenizer = Tokenizer(ROOT / "tiny" / "llama")
        form = settings["template"], settings["batch"]
        batches = Batches(rows, settings["asr"], tokenizer, *form, seed=0)
        return sum(len(batches.groups(epoch)) for epoch in range(settings["epochs"]))

    assert n_steps("asr-0") == pytest.approx(n_steps("asr-1"), rel=0.02)


def test_a_finished_run_is_one_line_with_its_settings_and_scores(runs, tmp_path):
    write_corpus(tmp_path / "corpus")
    assert runs.do_all([("toy", 1)], parallel=1) == 0
    [line] = runs.read_results()
    assert (line["name"], line["seed"]) == ("toy", 1)
    assert line["settings"] == runs.settings_of("toy")
    assert line["steps"] >= len(line["losses"]) == len(line["grad_norms"]) > 0
    assert line["trained_parameters"] > 0 and line["seconds"] > 0 and line["dev_loss"] > 0
    assert set(line["dev_bleu"]) == set(line["test"]) == {"fr-en"}
    scores = line["test"]["fr-en"]
    low, high = scores["bleu_interval"]
    assert low <= scores["bleu"] <= high and 0 <= scores["exact"] <= 1 and scores["n"] == 2
    assert (tmp_path / "models" / "toy-1" / "llast.safetensors").is_file()
    assert runs.runs_to_do(["toy"], [0, 1]) == [("toy", 0)]


def test_a_run_that_failed_has_no_line_and_is_done_again(runs, capsys):
    assert runs.do_all([("toy", 0)], parallel=1) == 1  # there is no corpus
    assert "toy, seed 0 failed: train.py: no fr-en corpus" in capsys.readouterr().err
    assert runs.read_results() == []
    assert runs.runs_to_do(["toy"], [0]) == [("toy", 0)]


def test_a_line_that_was_measured_with_other_settings_is_an_error(runs):
    write_line(runs, lr=0.5)
    with pytest.raises(ValueError, match="toy, seed 0 was measured with other settings: lr;"):
        runs.runs_to_do(["toy"], None)


def test_measurements_of_a_model_come_after_its_training(runs, tmp_path):
    write_corpus(tmp_path / "corpus")
    assert runs.do_all([("noise-llm", 2), ("dual", 2)], parallel=1) == 0
    dual, noise = runs.read_results()
    assert (dual["name"], noise["name"]) == ("dual", "noise-llm")
    assert noise["settings"]["measurement"] == "noise-llm"
    assert noise["steps"] == len(noise["losses"]) == len(noise["grad_norms"]) > 0
    assert 0 < noise["trained_parameters"] < dual["trained_parameters"]
    assert set(noise["test"]) == {"fr-en", "fr-en with noise"}
    assert noise["dev_loss"] > 0 and noise["dev_loss with noise"] > 0


def test_a_measurement_without_its_model_is_an_error(runs, capsys):
    assert runs.do_all([("cascade", 0)], parallel=1) == 1
    assert "cascade, seed 0 needs the model" in capsys.readouterr().err
    assert runs.read_results() == []


def test_the_cascade_costs_more_than_one_step(model, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "notebooks" / "experiments")
    import after

    write_corpus(tmp_path)
    rows = read_corpus(tmp_path, "fr", "en")[0]["test"]
    one, two = (after.measure_cost(model, task, rows) for task in ("st", "cascade"))
    assert one["test"]["fr-en"]["n"] == two["cost"]["clips"] == 2
    assert one["cost"]["tflop"] < two["cost"]["tflop"]


def test_a_cut_encoder_has_the_first_layers_and_the_final_norm(runs):
    runs.cut_encoder(2)
    cut = WhisperEncoder.from_pretrained(runs.MODELS / "whisper-2")
    whole = WhisperEncoder.from_pretrained(ROOT / "tiny" / "whisper")
    whole.layers = whole.layers[:2]
    mel, lengths = torch.randn(1, 80, 60), torch.tensor([30])
    assert torch.equal(cut(mel, lengths, 30), whole(mel, lengths, 30))


def test_curves_have_a_fixed_number_of_means(runs):
    assert runs.means([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0]
    curve = runs.means([float(i) for i in range(1000)])
    assert len(curve) == 50 and curve[0] == 9.5


def test_a_line_names_the_commit_even_without_git(runs, monkeypatch):
    assert runs.commit()
    monkeypatch.setenv("PATH", "")
    assert runs.commit() == "unknown"
