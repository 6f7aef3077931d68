"""The report of the experiments draws results.jsonl, and its sentences have the numbers of it."""

import importlib.util
import json
import sys
from pathlib import Path

import pytest

EXPERIMENTS = Path(__file__).parents[2] / "notebooks" / "experiments"
PACKAGES = "jupytext", "matplotlib", "nbclient"
MISSING = [name for name in PACKAGES if not importlib.util.find_spec(name)]
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
        if results and cell.source.startswith("conclude("):
            continue  # the sentences have the numbers of the real file
        if cell.cell_type == "code":
            exec(compile(cell.source, "<report>", "exec"), names)
        if last and last in cell.source:
            break
    return names


def test_the_report_is_drawn_and_its_sentences_have_the_numbers_of_the_file(monkeypatch):
    run_report(monkeypatch)


def test_the_page_has_the_cells_of_its_source(monkeypatch):
    monkeypatch.syspath_prepend(EXPERIMENTS.parent)
    import build
    import nbformat

    page = nbformat.read(EXPERIMENTS / "report.ipynb", as_version=4)
    cells = build.build(EXPERIMENTS / "report.py", solved=True).cells
    advice = "run: python notebooks/build.py --report"
    assert [cell.source for cell in page.cells] == [cell.source for cell in cells], advice


def made_up_line(name: str, seed: int) -> dict:
    """A line with everything that the report reads. The BLEU score is 70.0 or 71.0."""
    scores = {"bleu": 70.0 + seed, "bleu_interval": [66.0, 74.0]}
    line = {"name": name, "seed": seed, "device": {"device": "CPU"}, "seconds": 9.0}
    line |= {"test": {"fr-en": scores, "fr-en with noise": scores}, "steps": 9, "dev_loss": 0.5}
    line |= {"dev_loss with noise": 0.5, "cost": {"seconds": 9.0, "peak_gb": 1.0}}
    return line | {"trained_parameters": 9, "losses": [2.0, 1.0], "grad_norms": [2.0, 1.0]}


def write_results(file: Path, names) -> Path:
    lines = [json.dumps(made_up_line(name, seed)) for name in names for seed in (0, 1)]
    file.write_text("\n".join(lines))
    return file


def test_the_report_needs_no_run_but_draws_all_of_them(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(sys, "path", [str(EXPERIMENTS), *sys.path])
    import runs

    run_report(monkeypatch, tmp_path / "nothing.jsonl")
    assert f"not measured yet: {', '.join(runs.AFTER_DUAL[:2][::-1])}" in capsys.readouterr().out
    run_report(monkeypatch, write_results(tmp_path / "results.jsonl", runs.RUNS))
    output = capsys.readouterr().out
    assert "not measured yet" not in output
    for name in runs.RUNS:  # each run is in a figure
        assert f"\n{name}: test BLEU" in output, name


def test_a_sentence_with_another_number_than_the_file_is_an_error(monkeypatch, tmp_path, capsys):
    results = write_results(tmp_path / "results.jsonl", ["none"])
    names = run_report(monkeypatch, results, last="def conclude")
    conclude = names["conclude"]
    conclude("holds", "none 70.5, with the loss none 0.500")
    assert "HOLDS: none 70.5" in capsys.readouterr().out
    conclude("holds", "none 70.5 is below dual 99.9")  # dual is not in the file
    assert capsys.readouterr().out == "not measured yet\n"
    for sentence, problem in {
        "none 71.0": "the text says none 71.0, the file has 70.5",
        "none 70.5, none 0.400": "the text says none 0.400, the file has 0.500",
        "a gain of 0.5 to none 70.5": "with a name of runs.py, not .'of'.",
        "none 70.5 to 71.0": "not .'to'.",
        "none 70.5 (71.0)": "a number has no name",
    }.items():
        with pytest.raises(AssertionError, match=problem):
            conclude("holds", sentence)
    with pytest.raises(AssertionError, match="unknown verdict: perhaps"):
        conclude("perhaps", "none 70.5")
