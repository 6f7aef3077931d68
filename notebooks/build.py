"""Build the notebooks of the course from their sources.

    python notebooks/build.py                  the exercise notebooks
    python notebooks/build.py --run 01 07      the solved notebooks 01 and 07, with outputs
    python notebooks/build.py --run            all solved notebooks
    python notebooks/build.py --report         the report of the experiments, with outputs
    python notebooks/build.py --handout DIR    a folder for students, without the solutions

Edit only source/*.py: Python files with cells that begin with `# %%` (jupytext's percent format).
Four things in a source become different in the two notebooks:

    in the source                            exercise notebook           solved notebook
    # BEGIN SOLUTION ... # END SOLUTION      raise NotImplementedError   the lines between them
    x = 3  # ← your guess                    x = ...  # ← your guess     the same line
    cell with tags=["wrong"]                 no cell                     no cell
    any other cell                           the same cell               the same cell, with outputs

A wrong cell has a typical wrong answer to the exercise above it. The check must refuse it with a
message that contains the words of `expects="..."`: see tests/notebooks/test_build.py.
"""

import argparse
import hashlib
import re
import shutil
import sys
import time
from pathlib import Path

import jupytext
import nbformat
from nbclient import NotebookClient

HERE = Path(__file__).parent
SOURCES = sorted((HERE / "source").glob("*.py"))
REPORT = HERE / "experiments" / "report.py"
SOLUTION = re.compile(r"^( *)# BEGIN SOLUTION\n.*?^ *# END SOLUTION\n?", re.M | re.S)
STUB = r'\1raise NotImplementedError("your turn")\n'
SOLUTION_MARK = re.compile(r"^ *# (?:BEGIN|END) SOLUTION\n?", re.M)
GUESS = re.compile(r"^([\w, ]+) = .+(?=  # ← your guess)", re.M)
HANDOUT = ("*.ipynb", "course.py", "requirements.txt")


def tags_of(cell) -> list[str]:
    return cell.metadata.get("tags", [])


def read_source(source: Path) -> list:
    """Return the cells of a source, with the wrong answers and the solutions."""
    return jupytext.read(source, fmt="py:percent").cells


def hide_guess(line: re.Match) -> str:
    """Return "a, b = ..., ..." for "a, b = 1, 2"."""
    names = line.group(1)
    return f"{names} = {', '.join(['...'] * len(names.split(',')))}"


def build(source: Path, solved: bool) -> nbformat.NotebookNode:
    """Return the exercise notebook or the solved notebook of a source, without outputs."""
    cells = [cell for cell in read_source(source) if "wrong" not in tags_of(cell)]
    for position, cell in enumerate(cells):
        text = cell.source + "\n"
        text = SOLUTION_MARK.sub("", text) if solved else SOLUTION.sub(STUB, text)
        cell.source = (text if solved else GUESS.sub(hide_guess, text)).strip("\n")
        # Two builds of one source must give the same bytes, so the id is not random.
        name = f"{source.stem} {position} {cell.source}"
        cell.id = hashlib.sha256(name.encode()).hexdigest()[:8]
    kernel = {"name": "python3", "language": "python", "display_name": "Python 3"}
    return nbformat.v4.new_notebook(cells=cells, metadata={"kernelspec": kernel})


def run(notebook: nbformat.NotebookNode, folder: Path):
    """Run all cells in `folder` and keep their outputs. Raise an error if a cell fails or warns."""
    NotebookClient(
        notebook,
        timeout=900,
        record_timing=False,
        coalesce_streams=True,
        resources={"metadata": {"path": str(folder)}},
    ).execute()
    notebook.metadata.pop("language_info", None)  # it has the version of Python
    for cell in notebook.cells:
        for output in cell.get("outputs", ()):
            if output.get("name") == "stderr":
                raise ValueError(f"this cell printed a warning:\n{cell.source}\n\n{output.text}")


def write(notebook: nbformat.NotebookNode, path: Path):
    path.parent.mkdir(exist_ok=True)
    path.write_text(nbformat.writes(notebook) + "\n", encoding="utf-8")


def write_handout(folder: Path):
    """Copy what students need to `folder`: exercise notebooks and course.py, no solutions."""
    folder.mkdir(parents=True)
    for pattern in HANDOUT:
        for file in HERE.glob(pattern):
            shutil.copy(file, folder)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--run", nargs="*", metavar="NN", help="build these solved notebooks")
    parser.add_argument("--handout", type=Path, metavar="DIR", help="copy the files of students")
    parser.add_argument("--report", action="store_true", help="build the report of the experiments")
    args = parser.parse_args()
    if args.report:
        notebook = build(REPORT, solved=True)
        run(notebook, REPORT.parent)
        return write(notebook, REPORT.with_suffix(".ipynb"))
    if args.handout:
        return write_handout(args.handout)
    if args.run is None:
        for source in SOURCES:
            write(build(source, solved=False), HERE / f"{source.stem}.ipynb")
        return None
    for source in SOURCES:
        if not args.run or source.stem.startswith(tuple(args.run)):
            start, notebook = time.perf_counter(), build(source, solved=True)
            run(notebook, HERE / "solved")
            write(notebook, HERE / "solved" / f"{source.stem}.ipynb")
            print(f"{source.stem}: {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    sys.exit(main())
