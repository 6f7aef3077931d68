"""What the words say is true: shape comments, the README's table, its breakpoints, its commands."""

import ast
import inspect
import re
import shlex
import sys
from pathlib import Path

import pytest
import soundfile
import torch

import data
import llama
import llast
import lora
import toys
import train
import translate
import whisper_encoder
from llast import LLaST, LLaSTConfig
from shapes import Checker, claims
from whisper_encoder import mel_filters

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")
FILES = ("whisper_encoder", "llama", "lora", "data", "llast", "translate", "train")
BASES = {"whisper_encoder", "llama", "lora", "data"}
MAY_IMPORT = dict.fromkeys(BASES, set()) | {
    "data": {"whisper_encoder"},
    "llast": BASES,
    "translate": BASES | {"llast"},
    "train": BASES | {"llast", "translate"},
}
PACKAGES = set("torch numpy sentencepiece safetensors soundfile sacrebleu tqdm pytest".split())


def imports_of(path: Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name.split(".")[0] for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            found.add(node.module.split(".")[0])
    return found


@pytest.mark.parametrize("name", FILES)
def test_imports_point_one_way_and_name_no_other_package(name):
    found = imports_of(ROOT / f"{name}.py")
    assert found & set(FILES) <= MAY_IMPORT[name]
    assert found - set(FILES) - set(sys.stdlib_module_names) <= PACKAGES


@pytest.mark.parametrize("name", ["weight_files", "stored_tensors", "must_match"])
def test_what_stands_in_two_files_is_the_same_in_both(name):
    """whisper_encoder.py and llama.py may not import each other."""
    ours, theirs = (inspect.getsource(getattr(module, name)) for module in (whisper_encoder, llama))
    assert ours == theirs


def test_requirements_are_the_fixed_packages_with_exact_versions():
    lines = (ROOT / "requirements.txt").read_text().splitlines()
    pins = [line.split()[0] for line in lines if line and not line.startswith("#")]
    assert {pin.split("==")[0] for pin in pins} == PACKAGES
    assert all(re.fullmatch(r"[a-z]+==[\d.]+", pin) for pin in pins)


def walk_through(tmp_path):
    """One training step and one translation that execute every commented line."""
    whisper, llama = toys.whisper_folder(tmp_path / "w"), toys.llama_folder(tmp_path / "l")
    for window in ("clip", "30s"):
        config = LLaSTConfig(str(whisper), str(llama), "llama2", window, 5, 8, 5, 8, 0.1, ())
        model = LLaST.fresh(config)
        paths = []
        for name, seconds, rate in (("a", 0.5, 16000), ("b", 0.9, 22050), ("c", 0.7, 8000)):
            paths.append(tmp_path / f"{name}.wav")
            soundfile.write(paths[-1], torch.randn(int(seconds * rate), 2).numpy() * 0.1, rate)
        rows = [data.Row(p, "Où est la gare ?", "Where is it?", "fr", "en", 1.0) for p in paths]
        examples = [data.Example(row, "st") for row in rows]
        model(data.collate(examples, model.tokenizer, "llama2")).sum().backward()
        lora.merge_lora(model)
        translate.translate(model, paths, beams=2, max_new_tokens=3)
    model.llm(torch.tensor([[1, 5, 7, 9]]))


def test_every_shape_comment_is_executed_and_true(tmp_path):
    paths = [ROOT / f"{name}.py" for name in FILES]
    w, m = toys.WHISPER, toys.LLAMA
    known = {"M": w["num_mel_bins"], "Da": w["d_model"], "D": m["hidden_size"], "Dh": m["head_dim"],
             "Hk": m["num_key_value_heads"], "V": m["vocab_size"]}  # fmt: skip
    # The encoder has heads of its own, so its H and Dh are checked with its own numbers.
    encoder = known | {"Dh": w["d_model"] // w["encoder_attention_heads"]}
    for watched, sizes in ((paths[:1], encoder), (paths[1:], known)):
        whisper_encoder.sinc_table.cache_clear()
        mel_filters.cache_clear()
        checker = Checker(watched, sizes)
        folder = tmp_path / watched[0].stem
        folder.mkdir()
        checker.run(lambda folder=folder: walk_through(folder))
        assert not checker.wrong, "\n".join(checker.wrong)
        written = {(path.name, line) for path in watched for line in claims(path)}
        assert written, watched
        assert written == checker.seen, f"never executed: {sorted(written - checker.seen)}"


def test_a_wrong_shape_comment_is_found(tmp_path):
    path = tmp_path / "wrong.py"
    path.write_text(
        "import torch\ndef f(B, T):\n    x = torch.zeros(B, T, 4)  # (B, T, D)\n"
        "    y = x.mT  # (B, T, D)\n    return y\n"
    )
    scope = {}
    exec(compile(path.read_text(), str(path), "exec"), scope)
    checker = Checker([path], {"D": 4})
    checker.run(lambda: scope["f"](2, 3))
    assert [message.split(" = ")[0] for message in checker.wrong] == [
        "wrong.py:4 says y is (B, T, D)"
    ]


def test_the_readme_counts_the_lines_of_every_file():
    claimed = {n: int(c) for n, c in re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", README, re.M)}
    actual = {f"{name}.py": len((ROOT / f"{name}.py").read_text().splitlines()) for name in FILES}
    assert claimed == actual


def test_the_readme_sets_breakpoints_where_it_says():
    stops = re.findall(r"^\| `(\w+\.py):(\d+)` \| `([^`]+)` \|", README, re.M)
    assert len(stops) >= 8
    for file, line, code in stops:
        lines = (ROOT / file).read_text().splitlines()
        where = [i for i, text in enumerate(lines, 1) if text.strip().startswith(code)]
        assert int(line) in where, f"{file}:{line} is not `{code}`; that is at {where}"


def test_every_command_of_the_readme_is_understood():
    parsers = {f"{m.__name__}.py": m.build_parser() for m in (data, llast, train, translate)}
    commands = re.findall(r"^(?:pip install .*&& )?python ((?:\w+)\.py.*)$", README, re.M)
    assert {command.split()[0] for command in commands} == parsers.keys()
    for command in commands:
        name, *flags = shlex.split(command, comments=True)
        parsers[name].parse_args(flags)


@pytest.mark.parametrize("last", ["python train.py --lang fr", "pytest"])
def test_the_readme_sets_up_in_one_line(last):
    assert f"pip install -r requirements.txt && {last}\n" in README


def test_the_readme_and_llast_share_one_alphabet():
    text = " ".join((ROOT / "llast.py").read_text().split('"""')[1].split())
    letters = re.findall(r"\b(Da|Dh|Hk|[BNMSTPDHVRW]) (?=[a-z])", text.split("everywhere:")[1])
    for letter in letters:
        assert f"| `{letter}` |" in README
