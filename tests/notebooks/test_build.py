"""The notebooks are those of their sources, and every check refuses typical wrong answers.

The test of the checks runs the sources as plain Python, without Jupyter.
"""

import importlib.util
import re
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
NOTEBOOKS = ROOT / "notebooks"
MISSING = [
    name
    for name in ("jupytext", "nbclient", "matplotlib", "IPython")
    if not importlib.util.find_spec(name)
]
pytestmark = [
    pytest.mark.skipif(
        bool(MISSING), reason=f"notebooks/requirements.txt is not installed: {', '.join(MISSING)}"
    ),
    # matplotlib calls this method of a tensor in a way that numpy does not like.
    pytest.mark.filterwarnings("ignore:__array__ implementation:DeprecationWarning"),
]
SOURCES = sorted((NOTEBOOKS / "source").glob("*.py"))
if not MISSING:
    sys.path.insert(0, str(NOTEBOOKS))
    import build
    import nbformat

each_source = pytest.mark.parametrize("source", SOURCES, ids=lambda path: path.stem)


@pytest.fixture(autouse=True)
def show_no_figures(monkeypatch):
    monkeypatch.setenv("MPLBACKEND", "agg")
    import matplotlib.pyplot as plt

    monkeypatch.setattr(plt, "show", lambda: plt.close("all"))
    monkeypatch.setattr(sys, "path", [*sys.path])


def execute(cell, names: dict):
    exec(compile(cell.source, "<cell>", "exec"), names)


def texts_of(notebook) -> list[tuple[str, str]]:
    return [(cell.cell_type, cell.source) for cell in notebook.cells]


@each_source
def test_the_exercise_notebook_is_the_build_of_its_source(source):
    expected = nbformat.writes(build.build(source, solved=False)) + "\n"
    file = NOTEBOOKS / f"{source.stem}.ipynb"
    assert file.read_text(encoding="utf-8") == expected, "run: python notebooks/build.py"


@each_source
def test_the_solved_notebook_has_the_cells_of_its_source(source):
    solved = nbformat.read(NOTEBOOKS / "solved" / f"{source.stem}.ipynb", as_version=4)
    advice = f"run: python notebooks/build.py --run {source.stem[:2]}"
    assert texts_of(solved) == texts_of(build.build(source, solved=True)), advice


@each_source
def test_an_exercise_notebook_contains_no_line_of_a_solution(source):
    exercise = "\n".join(cell.source for cell in build.build(source, solved=False).cells)
    for cell in build.read_source(source):
        for solution in build.SOLUTION.finditer(cell.source + "\n"):
            for line in map(str.strip, solution.group().splitlines()):
                assert len(line) < 26 or line not in exercise, line


@each_source
def test_every_exercise_has_a_check_directly_below_and_three_wrong_answers(source):
    cells = [cell for cell in build.read_source(source) if cell.cell_type == "code"]
    tags = [build.tags_of(cell) for cell in cells]
    exercises = [i for i, tag in enumerate(tags) if "exercise" in tag]
    assert 2 <= len(exercises) <= 4
    for i in exercises:
        assert "check" in tags[i + 1], cells[i].source
        assert build.SOLUTION.search(cells[i].source + "\n")
        assert all("wrong" in tag for tag in tags[i + 2 : i + 5]), cells[i].source


@each_source
def test_a_notebook_has_at_most_40_cells_and_lines_that_fit_its_page(source):
    cells = build.build(source, solved=True).cells
    assert len(cells) <= 40
    assert max(len(line) for cell in cells for line in cell.source.splitlines()) <= 92


@each_source
def test_every_check_accepts_the_solution_and_refuses_the_wrong_answers(source, monkeypatch):
    monkeypatch.chdir(NOTEBOOKS)
    names, check = {"__name__": "notebook"}, None
    for cell in build.read_source(source):
        tags = build.tags_of(cell)
        if cell.cell_type != "code" or "slow" in tags:
            continue
        if "wrong" not in tags:
            execute(cell, names)
            check = cell if "check" in tags else check
            continue
        names_with_error = dict(names)
        execute(cell, names_with_error)
        with pytest.raises(AssertionError, match=re.escape(cell.metadata["expects"])):
            execute(check, names_with_error)


@each_source
def test_an_exercise_notebook_stops_at_its_first_exercise(source, monkeypatch):
    monkeypatch.chdir(NOTEBOOKS)
    names, last = {"__name__": "notebook"}, None
    with pytest.raises(NotImplementedError, match="your turn"):
        for last in build.build(source, solved=False).cells:
            if last.cell_type == "code":
                execute(last, names)
    assert {"exercise", "check"} & set(build.tags_of(last)), last.source


# ----------------------------------------------------------------------------- the solved notebooks


def outputs_of(source):
    solved = nbformat.read(NOTEBOOKS / "solved" / f"{source.stem}.ipynb", as_version=4)
    return [output for cell in solved.cells for output in cell.get("outputs", ())]


@each_source
def test_a_solved_notebook_has_figures_and_sound_and_no_error(source):
    outputs = outputs_of(source)
    assert not [o for o in outputs if o.output_type == "error" or o.get("name") == "stderr"]
    data = [output.data for output in outputs if "data" in output]
    assert sum("image/png" in item for item in data) >= 2
    assert sum("<audio" in item.get("text/html", "") for item in data) >= 1


@each_source
def test_a_solved_notebook_is_small_and_names_no_folder_of_its_author(source):
    text = (NOTEBOOKS / "solved" / f"{source.stem}.ipynb").read_text(encoding="utf-8")
    assert len(text) <= 400_000
    printed = str([o.get("text", "") or o.data.get("text/plain", "") for o in outputs_of(source)])
    assert not re.search(r"/(home|root|Users|tmp)/", printed)


def test_the_page_for_teachers_links_to_every_notebook():
    page = (NOTEBOOKS / "README.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| \[\d\d\]\((.+?)\.ipynb\)", page, re.M) == [s.stem for s in SOURCES]


def test_all_notebooks_together_are_at_most_3_megabytes_and_have_at_least_16_figures():
    files = [*NOTEBOOKS.glob("*.ipynb"), *(NOTEBOOKS / "solved").glob("*.ipynb")]
    assert len(SOURCES) == 8
    assert len(files) == 16
    assert sum(file.stat().st_size for file in files) <= 3_000_000
    outputs = [output for source in SOURCES for output in outputs_of(source)]
    assert sum("image/png" in output.get("data", {}) for output in outputs) >= 16


# ---------------------------------------------------------------------------------------- the tools


def test_two_builds_of_a_source_are_equal():
    first, second = (nbformat.writes(build.build(SOURCES[0], solved=False)) for _ in range(2))
    assert first == second


def test_a_guess_of_two_numbers_becomes_two_gaps(tmp_path):
    source = tmp_path / "09_test.py"
    source.write_text("# %%\na, b = (1, 2), 3  # ← your guess\nc = 'x'  # ← your guess\n")
    [cell] = build.build(source, solved=False).cells
    assert cell.source == "a, b = ..., ...  # ← your guess\nc = ...  # ← your guess"


def test_a_cell_that_warns_is_an_error(tmp_path):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("import warnings; warnings.warn('old')")]
    )
    with pytest.raises(ValueError, match="printed a warning"):
        build.run(notebook, tmp_path)


def test_the_handout_has_no_solutions(tmp_path):
    build.write_handout(tmp_path / "handout")
    names = {path.name for path in (tmp_path / "handout").rglob("*")}
    assert {f"{source.stem}.ipynb" for source in SOURCES} <= names
    assert {"course.py", "requirements.txt"} <= names
    assert not names & {"solved", "source", *(source.name for source in SOURCES)}
