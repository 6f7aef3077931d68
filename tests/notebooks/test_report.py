"""The report of the experiments draws results.jsonl, and its sentences have the numbers of it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "notebooks" / "experiments"
MISSING = [name for name in ("jupytext", "matplotlib") if not importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"notebooks/requirements.txt is not installed: {', '.join(MISSING)}"
)


def run_report(monkeypatch, results=None, last="") -> dict:
    """Execute the cells of the report, up to the one that contains `last`. Return its names."""
    monkeypatch.setenv("MPLBACKEND", "agg")
    import jupytext
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    monkeypatch.chdir(EXPERIMENTS)
    monkeypatch.setattr(sys, "path", [str(EXPERIMENTS), *sys.path])
    if results:
        import runs

        monkeypatch.setattr(runs, "RESULTS", results)
    names = {"__name__": "report"}
    for cell in jupytext.read(EXPERIMENTS / "report.py", fmt="py:percent").cells:
        if cell.cell_type == "code":
            exec(compile(cell.source, "<report>", "exec"), names)
        if last and last in cell.source:
            break
    return names


def test_the_report_is_drawn_and_its_sentences_have_the_numbers_of_the_file(monkeypatch):
    run_report(monkeypatch)


def test_a_sentence_with_another_number_than_the_file_is_an_error(monkeypatch, tmp_path, capsys):
    scores = {"bleu": 70.0, "bleu_interval": [66.0, 74.0]}
    line = {"name": "none", "steps": 9, "trained_parameters": 9, "seconds": 9.0, "dev_loss": 0.5}
    line |= {"device": {"device": "CPU"}, "test": {"fr-en": scores}}
    results = tmp_path / "results.jsonl"
    results.write_text("".join(json.dumps(line | {"seed": seed}) + "\n" for seed in (0, 1)))
    names = run_report(monkeypatch, results, last="def conclude")
    names["draw"](("none", "dual"))
    names["conclude"]("holds", "none 70.0")
    assert "HOLDS: none 70.0" in capsys.readouterr().out
    with pytest.raises(AssertionError, match="the text says none 71.0, the file has 70.0"):
        names["conclude"]("holds", "none 71.0")
