"""Comments such as `x = ...  # (B, T, D)` are compared with the tensors while the code runs."""

import ast
import re
from pathlib import Path

import pytest
import soundfile
import torch

import data
import lora
import toys
import translate
import whisper_encoder
from llast import LLaST, LLaSTConfig
from shapes import Checker, claims, words_of
from test_layout import SEVEN

ROOT = Path(__file__).parents[1]


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
        translate.translate(model, paths, search=translate.SearchOptions(2, max_new_tokens=3))
    model.llm(torch.tensor([[1, 5, 7, 9]]))


def test_every_shape_comment_is_executed_and_true(tmp_path):
    paths = [ROOT / f"{name}.py" for name in SEVEN]
    w, m = toys.WHISPER, toys.LLAMA
    fixed = {"M": w["num_mel_bins"], "Da": w["d_model"], "D": m["hidden_size"], "Dh": m["head_dim"],
             "Hk": m["num_key_value_heads"], "V": m["vocab_size"]}  # fmt: skip
    # The encoder has heads of its own, so its H and Dh are checked with its own numbers.
    encoder = fixed | {"Dh": w["d_model"] // w["encoder_attention_heads"]}
    for watched, sizes in ((paths[:1], encoder), (paths[1:], fixed)):
        for function in vars(whisper_encoder).values():
            if hasattr(function, "cache_clear"):  # else its lines would not be executed again
                function.cache_clear()
        checker = Checker(watched, sizes)
        folder = tmp_path / watched[0].stem
        folder.mkdir()
        checker.run(lambda folder=folder: walk_through(folder))
        assert not checker.wrong, "\n".join(checker.wrong)
        written = {(path.name, line) for path in watched for line in claims(path)}
        assert written, watched
        assert written == checker.seen, f"never executed: {sorted(written - checker.seen)}"


@pytest.mark.parametrize("name", SEVEN)
def test_a_file_explains_its_letters_at_the_top(name):
    path = ROOT / f"{name}.py"
    sizes = [size for _, _, sizes in claims(path).values() for size in sizes]
    letters = {word for size in sizes for word in words_of(size) if word[0].isupper()}
    docstring = ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))
    explained = set(re.findall(r"\b([A-Z][a-z]?) [A-Za-z]", docstring))
    assert letters <= explained


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
