"""course.py: guesses, sound, and the weights of attention."""

import importlib.util
import sys
from pathlib import Path

import pytest
import torch

import toys
from llama import Llama
from whisper_encoder import WhisperEncoder

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
MISSING = [name for name in ("matplotlib", "IPython") if not importlib.util.find_spec(name)]
pytestmark = pytest.mark.skipif(
    bool(MISSING), reason=f"notebooks/requirements.txt is not installed: {', '.join(MISSING)}"
)
if not MISSING:
    sys.path.insert(0, str(NOTEBOOKS))
    import course


def models(tmp_path):
    encoder = WhisperEncoder.from_pretrained(toys.whisper_folder(tmp_path / "whisper"))
    return encoder, Llama.from_pretrained(toys.llama_folder(tmp_path / "llama"))


def test_the_weights_of_every_layer_are_seen_and_the_states_stay_the_same(tmp_path):
    encoder, llm = models(tmp_path)
    mel = torch.randn(2, encoder.config.num_mel_bins, 12)
    x = torch.randn(1, 7, llm.config.hidden_size)
    layers_and_heads = (
        (
            lambda: encoder(mel, torch.tensor([4, 6])),
            encoder.layers,
            encoder.layers[0].self_attn.n_heads,
        ),
        (lambda: llm.hidden(x)[0], llm.model.layers, llm.config.num_attention_heads),
    )
    for run, layers, n_heads in layers_and_heads:
        with course.watch_attention() as maps:
            watched = run()
        assert torch.equal(watched, run())
        assert len(maps) == len(layers)
        for weights in maps:
            assert weights.shape[1] == n_heads
            torch.testing.assert_close(weights.sum(dim=-1), torch.ones(weights.shape[:-1]))


def test_a_key_that_may_not_be_seen_has_the_weight_0(tmp_path):
    encoder, llm = models(tmp_path)
    with course.watch_attention() as maps:
        encoder(torch.randn(2, encoder.config.num_mel_bins, 12), torch.tensor([4, 6]))
    assert all(m[0, ..., 4:].max() == 0 < m[1, ..., 4:].min() for m in maps)
    with course.watch_attention() as maps:
        llm.hidden(torch.randn(1, 7, llm.config.hidden_size))
    assert all(m.triu(1).max() == 0 for m in maps)


def test_the_attention_of_pytorch_is_back_after_an_error(tmp_path):
    original = torch.nn.functional.scaled_dot_product_attention
    with pytest.raises(ZeroDivisionError), course.watch_attention():
        raise ZeroDivisionError
    assert torch.nn.functional.scaled_dot_product_attention is original


def test_reveal_prints_a_guess_and_also_that_there_is_none(capsys):
    course.reveal("states", 70, 74, "50 per second")
    course.reveal("states", ..., 74)
    text = "states: 74   (your guess: 70)\n    50 per second\nstates: 74   (no guess)\n"
    assert capsys.readouterr().out == text


def test_silence_can_be_played():
    assert "audio/mpeg" in course.play(torch.zeros(16000)).data
