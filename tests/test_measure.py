"""tiny/measure.py, attention.py and tables.py: the measures, and the tables of tiny/README.md."""

import json
from ctypes.util import find_library
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import toys
from data import Row, read_corpus
from lora import lora_layers
from translate import SearchOptions, Translation, translate

ROOT = Path(__file__).parents[1]


@pytest.fixture
def measure(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tiny")
    import measure

    return measure


@pytest.fixture
def tables(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tiny")
    import tables

    return tables


def tones(*hertz: float) -> torch.Tensor:
    """The sum of tones of 1 s."""
    return torch.from_numpy(sum(0.2 * toys.tone(f, 16000, seconds=1) for f in hertz)).float()


def power(audio: torch.Tensor, hertz: int) -> float:
    """The power of a clip of 1 s at a frequency, as a share of that of a tone in tones()."""
    return (torch.fft.rfft(audio)[hertz].abs() / (0.2 * len(audio) / 2)).item() ** 2


def test_the_noise_has_a_tenth_of_the_power_of_the_speech(measure):
    audio = tones(500)
    noise = measure.add_noise(audio) - audio
    assert 10 * torch.log10(audio.norm() ** 2 / noise.norm() ** 2) == pytest.approx(10, abs=0.2)


def test_an_mp3_file_keeps_the_tones_and_their_length(measure):
    audio = measure.as_mp3(tones(500, 3000))
    assert power(audio[:16000], 500) > 0.9 and power(audio[:16000], 3000) > 0.9
    assert 1 <= len(audio) / 16000 < 1.2  # libsndfile's mp3 has padding


def test_a_telephone_keeps_only_300_to_3400_hz(measure):
    audio = measure.as_telephone(tones(100, 1000, 3000, 3700))
    assert len(audio) == 16000
    assert power(audio, 1000) > 0.9 and power(audio, 3000) > 0.9
    assert power(audio, 100) < 0.01 and power(audio, 3700) < 0.01


def test_silence_is_weak_and_noise_is_loud(measure):
    for clips, peak in ((measure.silent_clips(), 5e-4), (measure.noise_clips(), 0.5)):
        assert len(clips) == measure.N_SOUNDS
        assert all(clip.abs().max() == pytest.approx(peak) for clip in clips)
        assert all(16000 <= len(clip) <= 64000 for clip in clips)


def test_auc_is_the_share_of_pairs_in_the_right_order(measure):
    assert measure.auc([3.0, 4.0], [1.0, 2.0]) == 1
    assert measure.auc([1.0, 3.0], [2.0, 0.0]) == 0.75
    assert measure.auc([1.0], [1.0]) == 0.5


def test_answers_to_silence_are_compared_with_those_to_test_clips(measure, monkeypatch):
    rows = [Row(Path(name), "", name, "fr", "en", 1.0) for name in "abcd"]
    scores = {"a": -0.1, "b": -0.2, "c": -0.3, "d": -0.4}  # of the test clips; of others -0.25

    def answers(model, clips):
        texts = ["x" if isinstance(c, torch.Tensor) else str(c) for c in clips]
        texts = ["wrong" if text == "d" else text for text in texts]
        values = [scores.get(str(clip), -0.25) for clip in clips]
        return [Translation("", t, v, unlikely=v < -0.3) for t, v in zip(texts, values)]

    monkeypatch.setattr(measure, "translate", answers)
    model = SimpleNamespace(config=SimpleNamespace(max_loss=0.3))
    groups = measure.measure_scores(model, rows, [replace(rows[0], path=Path("z"))])["groups"]
    assert groups["test clips"] == {"n": 4, "median": -0.3, "unlikely": 1}
    assert groups["right translations"]["n"] == 3 and groups["wrong translations"]["n"] == 1
    for name, n in (("silence", measure.N_SOUNDS), ("noise", measure.N_SOUNDS)):
        assert groups[name]["n"] == n
        assert groups[name]["auc of test clips"] == 0.5
        assert groups[name]["auc of right translations"] == pytest.approx(2 / 3, abs=1e-3)


def test_inside_the_block_the_llm_gets_only_the_chosen_states(measure, model, clips):
    audio = [torch.randn(16000, generator=torch.Generator().manual_seed(0))]
    with measure.keep_states(model, lambda speech: speech[:20]):
        assert model.encode_speech(audio)[0].shape[0] == 20
        translate(model, toys.good(clips)[:1], search=SearchOptions(1, 1.0, 2))  # uses it, too
    assert model.encode_speech(audio)[0].shape[0] == 50


def test_a_lora_that_is_switched_off_changes_nothing_and_comes_back(measure, model):
    x = torch.randn(2, 3, model.speech_encoder.config.d_model)
    encoder_layer = lora_layers(model.speech_encoder)[0]
    llm_scales = [layer.scale for layer in lora_layers(model.llm)]
    before = encoder_layer.eval()(x)
    with measure.without_lora(model, "encoder"):
        plain = torch.nn.functional.linear(x, encoder_layer.weight, encoder_layer.bias)
        assert torch.allclose(encoder_layer(x), plain)
        assert [layer.scale for layer in lora_layers(model.llm)] == llm_scales
    assert torch.equal(encoder_layer(x), before) and not torch.allclose(before, plain)


# --------------------------------------------------------------------------------------- attention


@pytest.fixture
def attention(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "tiny")
    import attention

    return attention


def test_rank_correlation_is_spearmans(attention):
    times = torch.tensor([0.1, 0.2, 0.5, 0.9])
    values = torch.tensor([[1.0, 2, 3, 4], [4, 3, 2, 1], [1, 2, 4, 3]])
    # Spearman: 1 - 6 * (sum of squared differences of ranks) / (n * (n * n - 1))
    assert attention.rank_correlation(times, values).tolist() == pytest.approx([1, -1, 0.8])


def test_the_centre_is_the_mean_time_weighted_by_the_attention(attention):
    maps = torch.tensor([[0.0, 0, 0.5, 0], [0.1, 0, 0, 0.1]])
    assert attention.centres(maps).tolist() == pytest.approx([0.05, 0.04])


def test_each_word_has_the_mean_attention_of_the_positions_that_predict_it(attention, model, clips):
    row = Row(toys.good(clips)[0], "", "", "fr", "en", 0.3)
    maps = attention.attention_maps(model, row, "st", "Where is the station?")
    layers, heads = model.llm.config.num_hidden_layers, model.llm.config.num_attention_heads
    assert maps.shape == (layers, heads, 4, 15)
    assert (maps >= 0).all() and (maps.sum(-1) <= 1).all()
    longer = attention.attention_maps(model, row, "st", "Where is the station? There.")
    assert torch.allclose(maps, longer[:, :, :4], atol=1e-6), "a later word changes nothing"
    other = attention.attention_maps(model, row, "st", "Where is the hotel?")
    assert torch.allclose(maps[:, :, :3], other[:, :, :3], atol=1e-6)


@pytest.mark.skipif(not find_library("espeak-ng"), reason="espeak-ng is not installed")
def test_espeak_ng_gives_the_times_of_the_words_of_a_test_clip(attention):
    row = read_corpus(ROOT / "tiny" / "corpus", "fr", "en")[0]["test"][0]
    times = attention.word_times(attention.Speaker(), row, "test")
    assert len(times) == len(row.sentence.split(" "))
    assert times == sorted(times) and 0 <= times[0] and times[-1] < row.seconds


# ---------------------------------------------------------------------------- tables of the README


def test_the_results_were_measured_with_the_included_model(measure, tables):
    weights = measure.digest_of_weights(ROOT / "tiny" / "model")
    for file, script in ((tables.MEASURED, "measure.py"), (tables.ATTENTION, "attention.py")):
        assert json.loads(file.read_text())["weights"] == weights, f"run tiny/{script} again"


def test_the_tables_of_the_readme_are_those_of_the_result_files(tables):
    text = tables.README.read_text(encoding="utf-8")
    assert tables.write_tables(text) == text


@pytest.mark.parametrize(
    "better, other, verdict",
    [([81, 82], [79, 80], "seen"), ([81, 82], [80, 81.5], "not seen"), ([1, 2], [3, 4], "against")],
)
def test_a_claim_is_seen_only_if_the_seeds_do_not_overlap(
    tables, monkeypatch, tmp_path, better, other, verdict
):
    lines = [
        {"name": name, "seed": i, "dev_loss": 0.1, "test": {"fr-en": {"bleu": bleu}}}
        for name, values in (("a", better), ("b", other))
        for i, bleu in enumerate(values)
    ]
    (tmp_path / "results.jsonl").write_text("\n".join(map(json.dumps, lines)))
    monkeypatch.setattr(tables, "RUNS", tmp_path / "results.jsonl")
    monkeypatch.setattr(tables, "CLAIMS", {"a helps": ("a", "b")})
    row = tables.claims_table().splitlines()[-1]
    assert row.startswith("| a helps | ") and row.split(" | ")[-1].startswith(verdict)


def test_a_table_is_written_between_its_marks(tables, monkeypatch):
    monkeypatch.setattr(tables, "TABLES", {"a": lambda: tables.table(["x", "y"], [[1, 2]])})
    text = "before\n<!-- a -->\nold\n<!-- end -->\n<!-- b -->\nstays\n<!-- end -->\n"
    empty = text.replace("old\n", "")
    new = "before\n<!-- a -->\n| x | y |\n| --- | --- |\n| 1 | 2 |\n<!-- end -->\n"
    for old in (text, empty):
        assert tables.write_tables(old) == new + "<!-- b -->\nstays\n<!-- end -->\n"
