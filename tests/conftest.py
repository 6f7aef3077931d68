"""Fixtures that several test files use: a trained model with made-up weights, and clips."""

import sys
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch
from safetensors.torch import load_file, save_file

import toys
from llama import Tokenizer
from llast import LLaST


@pytest.fixture(scope="session")
def made(tmp_path_factory):
    """A folder with both bases, and trained/: a model with firm opinions about printable words."""
    made = tmp_path_factory.mktemp("made")
    toys.whisper_folder(made / "whisper")
    tokenizer = Tokenizer(toys.llama_folder(made / "llama"))
    weights = load_file(made / "llama" / "model.safetensors")
    head = weights["lm_head.weight"].normal_(generator=torch.Generator().manual_seed(0))
    no_word = [i for i in range(len(head)) if len(tokenizer.decode([i])) < 2 and i != 2]
    head[no_word] = 0  # no line breaks or broken characters, so that lines can be counted
    save_file(weights, made / "llama" / "model.safetensors")
    toys.save_model(made, made / "trained")
    return made


@pytest.fixture
def model(made):
    return LLaST.from_pretrained(made / "trained")


@pytest.fixture(scope="session")
def clips(tmp_path_factory):
    """Good clips of mixed lengths and rates, and four that cannot be used."""
    folder = tmp_path_factory.mktemp("clips")
    for i, (seconds, rate) in enumerate([(0.5, 16000), (0.1, 8000), (0.9, 44100), (0.3, 16000)]):
        t = np.arange(round(seconds * rate)) / rate
        hum = 0.4 * np.sin(2 * np.pi * (150 + 400 * i) * t * (1 + t))
        soundfile.write(folder / f"good{i}.wav", hum, rate)
    (folder / "empty.wav").touch()
    (folder / "noise.wav").write_bytes(b"no audio at all")
    soundfile.write(folder / "nan.wav", np.full(99, np.nan), 16000, subtype="FLOAT")
    return folder


@pytest.fixture(scope="session")
def long_clip(tmp_path_factory):
    """65 s of hums that change, with two pauses: at 21.5 and at 43 s."""
    seconds = np.arange(65 * 8000) / 8000
    hum = 0.4 * np.sin(2 * np.pi * (200 + 6 * seconds) * seconds)
    for pause in (21.5, 43.0):
        hum[np.abs(seconds - pause) < 0.25] = 0
    path = tmp_path_factory.mktemp("long") / "long.wav"
    soundfile.write(path, hum, 8000)
    return path


@pytest.fixture
def without_mecab(monkeypatch):
    for name in ("MeCab", "ipadic"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    monkeypatch.delitem(sys.modules, "sacrebleu.tokenizers.tokenizer_ja_mecab", raising=False)


@pytest.fixture
def quick(made):
    return ("--model", made / "trained", "--max-new-tokens", 6, "--beams", 3)


@pytest.fixture
def run_main(monkeypatch, capsys):
    """Run the main function of a module. -> exit code, lines of output, text of errors"""

    def run(module, *arguments):
        monkeypatch.setattr(sys, "argv", [Path(module.__file__).name, *map(str, arguments)])
        code = module.main()
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


def pytest_runtest_setup(item):
    if item.get_closest_marker("gpu") and not torch.cuda.is_available():
        pytest.skip("it needs a CUDA GPU")
