"""The files keep their sizes, imports and packages, and the READMEs are true."""

import ast
import importlib
import io
import json
import re
import shlex
import statistics
import subprocess
import sys
import tokenize
from functools import lru_cache
from pathlib import Path

import pytest
import torch.distributed.run

import train

ROOT = Path(__file__).parents[1]
LIMITS = {  # code lines of each file, at most
    "whisper_encoder": 310,
    "llama": 390,
    "lora": 52,
    "data": 317,
    "llast": 244,
    "translate": 400,
    "train": 655,
}
SEVEN = tuple(LIMITS)
TOOLS = ("cost", "prepare", "convert", "plan", "evaluate", "reproduce")
ORDER = [*SEVEN, *(f"tools.{name}" for name in TOOLS)]  # each imports only from those before it
PACKAGES = set("torch numpy sentencepiece safetensors soundfile sacrebleu tqdm pytest".split())
TOP_LEVEL = {*(f"{name}.py" for name in SEVEN)} | set(
    "README.md LICENSE requirements.txt tests notebooks tools tiny benchmarks "
    ".ci .github .gitignore .pytest.ini .ruff.toml .vscode".split()
)
READMES = {
    path: (ROOT / path).read_text(encoding="utf-8")
    for path in ("README.md", "tools/README.md", "tiny/README.md", "benchmarks/README.md")
}
README = READMES["README.md"]


def path_of(module: str) -> Path:
    return ROOT / f"{module.replace('.', '/')}.py"


def text_of(module: str) -> str:
    return path_of(module).read_text(encoding="utf-8")


@lru_cache
def tree_of(module: str) -> ast.Module:
    return ast.parse(text_of(module))


# ------------------------------------------------------------------------------------- code lines


def docstring_lines(tree: ast.Module) -> set[int]:
    """Numbers of the lines that belong to a docstring."""
    kinds = (ast.Module, ast.ClassDef, ast.FunctionDef)
    owners = [n for n in ast.walk(tree) if isinstance(n, kinds) and ast.get_docstring(n)]
    return {i for n in owners for i in range(n.body[0].lineno, n.body[0].end_lineno + 1)}


def code_lines(text: str) -> set[int]:
    """Numbers of the lines that hold code: no blank line, no comment and no docstring."""
    other = (tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    lines = set()
    for token in tokenize.generate_tokens(io.StringIO(text).readline):
        if token.type not in (*other, tokenize.ENDMARKER):
            lines.update(range(token.start[0], token.end[0] + 1))
    return lines - docstring_lines(ast.parse(text))


def function_sizes() -> dict[str, int]:
    """Code lines of every function of the seven files."""
    sizes = {}
    for module in SEVEN:
        code = code_lines(text_of(module))
        for node in ast.walk(tree_of(module)):
            if isinstance(node, ast.FunctionDef):
                size = len(code & set(range(node.lineno, node.end_lineno + 1)))
                sizes[f"{module}.py:{node.lineno} {node.name}"] = size
    return sizes


def test_comments_docstrings_and_blank_lines_are_not_code_lines():
    text = '"""Module."""\n\nx = """a\nb"""  # note\n\n\ndef f():\n    """One\n    two."""\n'
    text += "    # why\n    return (\n        x\n    )\n"
    assert code_lines(text) == {3, 4, 7, 11, 12, 13}


@pytest.mark.parametrize("name", SEVEN)
def test_a_file_keeps_its_limit_of_code_lines(name):
    size = len(code_lines(text_of(name)))
    assert size <= LIMITS[name]


def test_the_seven_files_have_at_most_2368_code_lines():
    size = sum(len(code_lines(text_of(name))) for name in SEVEN)
    assert size <= 2368


def test_the_median_function_has_at_most_12_code_lines_and_none_more_than_45():
    sizes = function_sizes()
    assert statistics.median(sizes.values()) <= 12
    assert {name: size for name, size in sizes.items() if size > 45} == {}


# ---------------------------------------------------------------------------------------- imports


def imports_of(module: str) -> set[str]:
    """Full names of the imported modules, wherever in the file the import is."""
    names = set()
    for node in ast.walk(tree_of(module)):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module == "tools":
            names |= {f"tools.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names.add(node.module)
    return names


@pytest.mark.parametrize("module", ORDER)
def test_a_file_imports_only_from_files_before_it(module):
    ours = {name for name in imports_of(module) if path_of(name).exists()}
    assert ours <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("module", ORDER)
def test_a_file_imports_no_other_package(module):
    others = {name.split(".")[0] for name in imports_of(module) if not path_of(name).exists()}
    assert others - set(sys.stdlib_module_names) <= PACKAGES - {"pytest"}


@pytest.mark.parametrize("name", TOOLS)
def test_a_tool_puts_the_repository_first_on_the_path(name):
    line = "sys.path.insert(0, str(Path(__file__).parents[1]))"
    assert line in text_of(f"tools.{name}")


def test_requirements_are_the_packages_with_exact_versions():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line.split()[0] for line in lines if line and not line.startswith("#")]
    assert {pin.split("==")[0] for pin in pins} == PACKAGES
    assert all(re.fullmatch(r"[a-z]+==[\d.]+", pin) for pin in pins)


# -------------------------------------------------------------------------------------- top level


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="not a git checkout")
def test_nothing_new_is_at_the_top_level():
    command = ["git", "ls-files", "--cached"]
    files = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=True).stdout
    assert {name.split("/")[0] for name in files.splitlines()} <= TOP_LEVEL


# ------------------------------------------------------------------------------------ the READMEs


def code_in(text: str) -> list[str]:
    """Each line of a fenced block, and each piece of code inside a sentence."""
    blocks = re.findall(r"^```\w*\n(.*?)^```$", text, re.M | re.S)
    inline = re.findall(r"`([^`\n]+)`", re.sub(r"^```.*?^```$", "", text, flags=re.M | re.S))
    return [line for block in blocks for line in block.splitlines()] + inline


def commands_in(text: str) -> list[list[str]]:
    """The words of each command that runs one of our programs, from its file name on."""
    lines = [re.sub(r"^.*&& ", "", line.strip()) for line in code_in(text)]
    lines = [re.sub(r"^torchrun .*(?=train\.py)", "python ", line) for line in lines]
    lines = [line.removeprefix("python ") for line in lines if line.startswith("python ")]
    return [shlex.split(line, comments=True) for line in lines if not line.startswith("-")]


def parse(file: str, *words: str):
    """Parse a command as the program does."""
    module = importlib.import_module(file.removesuffix(".py").replace("/", "."))
    if file != "tools/plan.py":
        return module.build_parser().parse_args(words)
    _, others = module.build_parser().parse_known_args(words)  # it takes train.py's options too
    return train.build_parser().parse_args(others)


@pytest.mark.parametrize("path", READMES)
def test_every_command_of_a_readme_is_valid(path):
    commands = commands_in(READMES[path])
    assert commands
    for file, *words in commands:
        assert (ROOT / file).is_file(), file
        if file.startswith(("tiny/", "benchmarks/")) or file == "tools/draw.py":
            continue  # these have no options to check
        try:
            parse(file, *words)
        except SystemExit:
            pytest.fail(f"not a valid command: python {shlex.join([file, *words])}")


@pytest.mark.parametrize("module", ORDER)
def test_every_program_that_the_code_names_exists(module):
    for file in set(re.findall(r"python ((?:\w+/)?\w+\.py)\b", text_of(module))):
        is_program = '__name__ == "__main__"' in (ROOT / file).read_text(encoding="utf-8")
        assert is_program, file


def option_names(parser) -> set[str]:
    names = set()
    for action in parser._actions:
        names |= set(action.option_strings)
        for sub in (getattr(action, "choices", None) or {}) if action.nargs == "A..." else ():
            names |= option_names(action.choices[sub])
    return names


def test_every_option_that_a_readme_names_exists():
    files = ["train", "translate", *(f"tools.{name}" for name in TOOLS)]
    modules = [importlib.import_module(name) for name in files]
    known = set().union(
        *(option_names(m.build_parser()) for m in modules if "cost" not in m.__name__)
    )
    known |= {"--exclude", "--local-dir", "--index-url"}  # of hf and of pip
    known |= option_names(torch.distributed.run.get_args_parser())  # of torchrun
    for code in (code for text in READMES.values() for code in code_in(text)):
        if code.startswith("#SBATCH"):  # options of SLURM
            continue
        assert set(re.findall(r"(?<!\S)--[a-z][a-z-]+", code)) <= known, code


@pytest.mark.parametrize("path", READMES)
def test_every_link_inside_the_repository_leads_to_a_file(path):
    for link in re.findall(r"\]\(([^)#]+)", READMES[path]):
        assert "://" in link or ((ROOT / path).parent / link).exists(), link


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 200
    assert len(README.split()) <= 1700


def test_the_table_of_files_names_every_file_in_the_order_of_imports():
    rows = re.findall(r"^\| `(?:tools/)?(\w+)\.py` \|", README, re.M)
    assert [row for row in rows if row in LIMITS] == list(SEVEN)


def test_the_breakpoints_of_the_readme_are_at_their_lines():
    stops = re.findall(r"^\| `(\w+\.py):(\d+)` \| `([^`]+)` \|", README, re.M)
    assert len(stops) >= 10
    for file, line, code in stops:
        lines = (ROOT / file).read_text(encoding="utf-8").splitlines()
        places = [i for i, text in enumerate(lines, 1) if text.strip().startswith(code)]
        assert int(line) in places, f"{file}:{line} is not `{code}`; it is at {places}"


def test_the_debug_configurations_stop_at_the_lines_of_the_readme():
    text = (ROOT / ".vscode/launch.json").read_text(encoding="utf-8")
    commands = [c["command"] for c in json.loads(text)["configurations"] if "command" in c]
    stops = re.findall(r"^\| `(\w+\.py:\d+)` \| `[^`]+` \| (in training)?", README, re.M)
    for program, note in (("translate.py", ""), ("train.py", "in training")):
        [command] = [c for c in commands if f" {program} " in c]
        expected = [place for place, training in stops if training == note]
        assert re.findall(r'"b ([^"]+)"', command) == expected, (
            "copy the numbers of the README to .vscode/launch.json"
        )


@pytest.mark.parametrize("last", ["python train.py --lang fr", "pytest"])
def test_the_readme_sets_up_in_one_line(last):
    assert f"\npip install -r requirements.txt && {last}\n" in README


def test_the_readme_and_llast_have_one_alphabet():
    letters = r"Da|Dh|Hk|[BNMSTPDHVRW]"
    rows = dict(re.findall(rf"^\| `({letters})` \| (.+?) \|$", README, re.M))
    docstring = " ".join(ast.get_docstring(tree_of("llast")).split())
    sizes = dict(re.findall(rf"\b({letters}) ([^,.]+)", docstring.split("Sizes")[1]))
    assert rows.keys() == sizes.keys()
    for letter, meaning in sizes.items():
        first = re.sub(r" \(.*", "", meaning)
        assert rows[letter].startswith(first), f"{letter}: {rows[letter]!r} is not {meaning!r}"
