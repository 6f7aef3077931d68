"""tools/evaluate.py: cascade, error rates, tables of several test sets, published scores."""

import itertools
import json
import random
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

import toys
from data import AUDIO_ID, Row
from tools import evaluate
from tools.evaluate import cascade, edit_distance, error_rates, rows_with_reference, score_results
from translate import SearchOptions, Translation, beam_search, ids_of_prompt, translate

THREE = SearchOptions(3, max_new_tokens=6)
SHORT = SearchOptions(1, max_new_tokens=3)

# ----------------------------------------------------------------------------------------- cascade


def test_a_cascade_translates_its_transcripts(model, clips):
    paths = [*toys.good(clips), clips / "empty.wav"]
    transcripts = translate(model, paths, "asr", search=THREE)
    results = cascade(model, paths, "fr", "en", THREE, batch_size=2)
    assert "the file is empty" in results[-1].error and results[-1].text == ""
    prompt = ids_of_prompt(model, "st", "fr", "en").tolist()
    at = prompt.index(AUDIO_ID)
    for result, transcript in zip(results[:-1], transcripts[:-1], strict=True):
        assert result.path == transcript.path and result.text != transcript.text
        words = model.tokenizer.encode(transcript.text)
        row = torch.tensor(prompt[:at] + words + prompt[at + 1 :])
        [answers] = beam_search(model.llm, [model.llm.embed(row)], model.tokenizer.eos_ids, THREE)
        assert result.text == model.tokenizer.decode(answers[0].ids)
        assert result.tokens == transcript.tokens + answers[0].length
        assert result.score == pytest.approx(answers[0].score, abs=2e-4)


def test_a_cascade_translates_a_long_clip_piece_by_piece(model, long_clip):
    [spoken] = translate(model, [long_clip], "asr", search=SHORT)
    [result] = cascade(model, [long_clip], "fr", "en", SHORT)
    assert len(spoken.pieces) > 1
    for piece, transcript in zip(result.pieces, spoken.pieces, strict=True):
        assert (piece["start"], piece["end"]) == (transcript["start"], transcript["end"])
        assert piece["text"] != transcript["text"]
    assert result.text == " ".join(piece["text"] for piece in result.pieces)


def test_a_cascade_keeps_an_empty_transcript_empty(model, clips, monkeypatch):
    monkeypatch.setattr(model.tokenizer, "decode", lambda ids: "")
    transcripts = translate(model, toys.good(clips), "asr", search=THREE)
    results = cascade(model, toys.good(clips), "fr", "en", THREE)
    assert [(r.text, r.error) for r in results] == [("", None)] * len(transcripts)
    assert [r.tokens for r in results] == [r.tokens for r in transcripts]
    assert [r.n_best for r in results] == [r.n_best[:1] for r in transcripts]


# ------------------------------------------------------------------------------------- transcripts


def slow_distance(a: str, b: str) -> int:
    """The definition: the last characters agree, or one of three edits made them."""
    if not a or not b:
        return len(a) + len(b)
    return min(
        slow_distance(a[:-1], b[:-1]) + (a[-1] != b[-1]),
        slow_distance(a[:-1], b) + 1,
        slow_distance(a, b[:-1]) + 1,
    )


def test_the_edit_distance_equals_brute_force():
    words = ["".join(word) for n in range(4) for word in itertools.product("ab", repeat=n)]
    chance = random.Random(0)
    words += ["".join(chance.choices("abc", k=chance.randint(4, 6))) for _ in range(10)]
    for a, b in itertools.product(words, words):
        assert edit_distance(a, b) == edit_distance(list(a), list(b)) == slow_distance(a, b)


def test_error_rates_are_edits_over_the_length_of_the_references():
    said = ["le chat dort", "", "bonjour à tous mes amis"]
    meant = ["le chat noir dort", "merci", "Bonjour à tous."]
    scores = error_rates(said, meant, "fr")
    # one word missing; one missing; bonjour/Bonjour, tous/tous., mes, amis
    assert scores["wer"] == round(100 * (1 + 1 + 4) / (4 + 1 + 3), 2)
    # " noir"; "merci"; b/B, one of " mes amis" for ".", eight more
    assert scores["cer"] == round(100 * (5 + 5 + 10) / (17 + 5 + 15), 2)
    assert scores["n"] == 3 and "words:spaces" in scores["signature"]
    assert error_rates(meant, meant, "fr")["wer"] == error_rates(meant, meant, "fr")["cer"] == 0


@pytest.mark.parametrize("language", ["zh-CN", "ja"])
def test_without_spaces_each_character_is_a_word(language):
    scores = error_rates(["他喜欢 喝茶"], ["她喜欢喝茶。"], language)
    assert scores["wer"] == scores["cer"] == round(100 * 2 / 6, 2)
    assert "words:characters" in scores["signature"]


def test_spaces_between_words_count_as_characters_but_their_number_does_not():
    assert error_rates(["a  b "], ["a b"], "en")["cer"] == 0
    assert error_rates(["ab"], ["a b"], "en")["cer"] == round(100 / 3, 2)


# --------------------------------------------------------------------------------- whole test sets


def rows_of(source: str, target: str, n: int = 3) -> list[Row]:
    texts = [(f"dit {source} {i}", f"said\tin {target} {i} .") for i in range(n)]
    return [
        Row(Path(f"{source}{i}.mp3"), *both, source, target, 1.0) for i, both in enumerate(texts)
    ]


@pytest.fixture
def says(monkeypatch):
    """Puts a stand-in for translate() in place: what it answers to a file name, and its calls."""
    answers, calls = {}, []

    def stand_in(model, paths, task="st", source="fr", target="en", search=None, **options):
        calls.append((task, source, target, [path.name for path in paths]))
        results = []
        for path in paths:
            text = answers.get(path.name)
            bad = None if text is not None else f"{path}: no such file"
            results.append(Translation(str(path), text or "", None if bad else -0.5, error=bad))
        return results

    monkeypatch.setattr(evaluate, "translate", stand_in)
    return SimpleNamespace(answers=answers, calls=calls)


def read_table(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


def results_of(rows: list[Row], *texts: str | None) -> list[Translation]:
    """A result for each row; None is a clip that failed."""
    return [
        Translation(str(row.path), text or "", None if text is None else -0.5,
                    error=f"{row.path}: no such file" if text is None else None)
        for row, text in zip(rows, texts, strict=True)
    ]  # fmt: skip


def test_rows_without_a_sentence_are_left_out_of_the_error_rates(tmp_path, capsys):
    rows = rows_of("fr", "en")
    silent = Row(Path("silent.mp3"), " ", "said", "fr", "en", 1.0)
    assert rows_with_reference([silent, *rows], "asr") == rows
    assert "1 fr clips have no transcript and are left out" in capsys.readouterr().err
    results = results_of(rows, "dit fr 0", "dit de 1", None)
    scores = score_results(rows, results, tmp_path / "out.tsv", "asr")
    assert scores["wer"] == round(100 * (1 + 3) / 9, 2)
    assert (scores["n"], scores["failed"]) == (3, 1) and "bleu" not in scores
    assert [cells[1] for cells in read_table(tmp_path / "out.tsv")[1:]] == [
        row.sentence for row in rows
    ]
    with pytest.raises(ValueError, match="none of the 1 fr clips has a transcript"):
        rows_with_reference([silent], "asr")


def test_chinese_transcripts_are_compared_by_characters():
    rows = [Row(Path("a.mp3"), "她喜欢喝茶。", "She likes tea.", "zh-CN", "en", 1.0)]
    results = results_of(rows, "他喜欢喝茶")
    assert score_results(rows, results, None, "asr")["wer"] == round(100 * 2 / 6, 2)


def test_transcripts_and_references_of_different_number_are_an_error():
    with pytest.raises(ValueError):
        error_rates(["one"], ["one", "two"], "en")


@pytest.fixture
def command(monkeypatch, run_main, tmp_path, says):
    """Run tools/evaluate.py with stand-ins for model and corpora. -> code, output, errors"""
    known = ("fr-en", "de-en", "es-en", "en-zh-CN", "en-de")
    model = SimpleNamespace(config=SimpleNamespace(directions=known))
    monkeypatch.setattr(evaluate, "load_model", lambda args: (model, args.model))

    def read_corpus(root, source, target):
        rows = [] if source == "es" else rows_of(source, target)
        return {"train": [], "dev": [], "test": rows}

    monkeypatch.setattr(evaluate, "read_splits", lambda *args: read_corpus(*args[:3]))
    says.answers |= {f"fr{i}.mp3": f"said in en {i} ." for i in range(3)}
    says.answers |= {"de0.mp3": "Said in en 0 .", "de2.mp3": "dit de 2"}
    says.answers |= {f"en{i}.mp3": f"dit en {i}" for i in range(3)}

    return partial(run_main, evaluate, "--model", tmp_path)


def test_one_direction_is_one_line(command, tmp_path):
    code, lines, err = command("--test", "fr")
    assert code == 0 and len(lines) == 1
    assert lines[0].startswith(
        "fr-en on 3 clips: BLEU 100.0, lower-cased 100.0, chrF 100.0  (nrefs"
    )
    assert str(tmp_path / "scored.st.fr-en.tsv") in err


def test_several_directions_are_a_table_with_their_average(command, tmp_path):
    code, lines, _ = command("--test", "fr,de")
    assert code == 1, "a clip of German failed"
    head, french, german, average, signature = lines
    assert head.split() == ["direction", "clips", "failed", "BLEU", "lower-cased", "chrF"]
    assert french.split() == ["fr-en", "3", "0", "100.0", "100.0", "100.0"]
    assert german.split()[:3] == ["de-en", "3", "1"]
    assert average.startswith("average of 2 ")
    means = [(100 + float(cell)) / 2 for cell in german.split()[3:]]
    assert [float(cell) for cell in average.split()[3:]] == pytest.approx(means, abs=0.11)
    assert means[0] < 100
    assert len({len(line) for line in lines[:4]}) == 1, "columns are aligned"
    assert signature.startswith("fr-en, de-en: nrefs:1|case:mixed|eff:no|tok:13a")
    assert ",  chrF nrefs:1" in signature
    for name in ("fr-en", "de-en"):
        assert len(read_table(tmp_path / f"scored.st.{name}.tsv")) == 4


def test_different_signatures_have_lines_of_their_own(command):
    *_, first, second = command("--test", "fr,en-zh-CN,de")[1]
    assert first.startswith("fr-en, de-en: ") and "tok:13a" in first
    assert second.startswith("en-zh-CN: ") and "tok:zh" in second


def test_error_rates_of_several_languages_are_a_table_too(command, says, tmp_path):
    code, lines, _ = command("--test", "de,en-zh-CN,en-de", "--task", "asr")
    assert lines[0].split() == ["direction", "clips", "failed", "WER", "CER"]
    assert [line.split()[0] for line in lines[1:3]] == ["de", "en"], "English once"
    assert lines[2].split() == ["en", "3", "0", "0.0", "0.0"]
    assert [call[:3] for call in says.calls] == [("asr", "de", "en"), ("asr", "en", "zh-CN")]
    assert lines[3].startswith("average of 2") and lines[4].startswith("de, en: case:mixed|punct")
    assert read_table(tmp_path / "scored.asr.en.tsv")[1][:3] == ["en0.mp3", "dit en 0", "dit en 0"]


def test_transcripts_use_the_direction_of_test(command, says, tmp_path):
    for direction in ("en-de", "en-zh-CN", "en-ja"):  # whatever it was trained to translate into
        assert command("--test", direction, "--task", "asr")[0] == 0
        assert says.calls[-1][:3] == ("asr", "en", direction.removeprefix("en-"))
    assert "was not trained on it" in command("--test", "it", "--task", "asr")[2]


def test_json_is_an_object_for_each_direction(command):
    code, lines, _ = command("--test", "fr,de", "--json")
    french, german = map(json.loads, lines)
    assert (french["direction"], french["task"], french["bleu"]) == ("fr-en", "st", 100)
    assert {"bleu", "bleu_lc", "chrf", "signature", "chrf_signature", "n", "failed"} <= set(german)
    assert german["failed"] == 1


def test_a_missing_test_set_is_reported_before_the_first_clip(command, says, without_mecab):
    code, lines, err = command("--test", "fr,es")
    assert (code, lines, says.calls) == (2, [], [])
    assert err.endswith("has no test clips; use another --data\n") and err.count("\n") == 1
    code, lines, err = command("--test", "fr,en-ja")
    assert code == 2 and "was not trained on en-ja" in err and says.calls == []


def test_a_missing_tokenizer_is_reported_before_the_first_clip(
    command, says, without_mecab, monkeypatch
):
    model = SimpleNamespace(config=SimpleNamespace(directions=("fr-en", "en-ja")))
    monkeypatch.setattr(evaluate, "load_model", lambda args: (model, args.model))
    code, _, err = command("--test", "fr,en-ja")
    assert (code, says.calls) == (2, []) and 'pip install "sacrebleu[ja]"' in err


# ------------------------------------------------------------------------------- published numbers


def test_published_scores_follow_the_models_scores_with_a_caveat(command, tmp_path):
    lines = command("--test", "fr,de,en-zh-CN", "--data", str(tmp_path))[1]
    own = next(i for i, line in enumerate(lines) if line.startswith("average"))
    start = next(i for i, line in enumerate(lines) if line.startswith("published BLEU"))
    assert start > own
    assert lines[start].split() == ["published", "BLEU", "fr-en", "de-en"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[start + 1 :]}
    assert rows["Whisper-large-v2"] == ["36.4", "36.3"]
    assert rows["LLaST-2B"] == ["41.2", "36.8"] and rows["LLaST-8B"] == ["44.1", "40.8"]
    assert rows["LLaST-14B"] == ["45.1", "-"]
    caveat = " ".join(lines[start:])
    for words in (
        "CoVoST-2",
        "PLaST, AAAI 2026",
        "we infer",
        "lower-cases",
        "Common Voice",
        "another corpus",
    ):
        assert words in caveat


def test_published_scores_are_printed_only_for_other_corpora_that_have_some(command, tmp_path):
    other = ["--data", str(tmp_path)]
    assert not any("Whisper" in line for line in command("--test", "fr")[1]), "embedded corpus"
    assert command("--test", "de", *other)[1][-1] == evaluate.CAVEAT.splitlines()[-1]
    assert not any("LLaST-14B" in line for line in command("--test", "de", *other)[1])
    assert len(command("--test", "en-de", *other)[1]) == 1, "no published score"
    lines = command("--test", "fr", "--task", "asr", *other)[1]
    assert not any("published" in line for line in lines)


def test_published_averages_equal_those_of_the_quoted_table():
    means = {
        "Whisper-large-v2": 31.3, "SeamlessM4T-large-v2": 35.2, "LLaST-2B": 34.0, "LLaST-8B": 36.7,
    }  # fmt: skip
    for name, mean in means.items():
        assert sum(evaluate.PUBLISHED[name]) / 6 == pytest.approx(mean, abs=0.051)


# ------------------------------------------------------------------------ the command with a model


def test_a_test_set_is_scored_and_every_clip_is_written(run_main, quick, made, clips, tmp_path):
    folder = tmp_path / "fr"
    shutil.copytree(clips, folder / "clips")
    rows = [("good0.wav", "un", "one", "test"), ("good1.wav", "deux", "two", "test")]
    toys.write_corpus(tmp_path, rows)
    code, lines, _ = run_main(evaluate, *quick, "--test", "fr", "--data", tmp_path)
    assert code == 0 and lines[0].startswith("fr-en on 2 clips: BLEU ")
    assert len((made / "trained" / "scored.st.fr-en.tsv").read_text().splitlines()) == 3
    code, lines, _ = run_main(evaluate, *quick, "--test", "fr", "--task", "asr", "--data", tmp_path)
    assert code == 0 and lines[0].startswith("fr on 2 clips: WER ")
    assert "\tdeux\t" in (made / "trained" / "scored.asr.fr.tsv").read_text()

    # Without --data it is the corpus of the training.
    (made / "trained" / "run.json").write_text(json.dumps({"data": str(tmp_path)}))
    code, lines, err = run_main(evaluate, *quick, "--test", "fr")
    (made / "trained" / "run.json").unlink()
    assert code == 0 and lines[0].startswith("fr-en on 2 clips: BLEU ")
    assert f"corpus: {tmp_path}" in err


def test_everything_is_checked_before_the_first_clip(
    run_main, quick, made, clips, tmp_path, monkeypatch
):
    folder = tmp_path / "fr"
    shutil.copytree(clips, folder / "clips")
    rows = [("good0.wav", "un", "one", "test"), ("good1.wav", "deux", "", "test")]
    toys.write_corpus(tmp_path, [*rows, ("gone.wav", "quatre", "four", "train")])
    tests = [*quick, "--test", "fr", "--data", tmp_path]
    code, _, err = run_main(evaluate, *tests)
    assert code == 0, err
    reports = [line for line in err.splitlines() if "unusable row" in line]
    assert len(reports) == 2, "the row of train does not matter here"
    assert reports[0].startswith("unusable row in test: ") and "empty translation" in reports[0]
    assert reports[1] == "fr-en: unusable rows (up to 5 shown): 1"

    monkeypatch.setattr(evaluate, "translate", None)
    written = made / "trained" / "scored.st.fr-en.tsv"
    assert written.read_text().count("\n") == 2, "what was there is still there"
    written.unlink()
    with pytest.raises(TypeError):  # where the first clip would be translated
        run_main(evaluate, *tests)
    assert not written.exists()
    written.mkdir()
    code, _, err = run_main(evaluate, *tests)
    written.rmdir()
    assert code == 2 and "Is a directory" in err and "scored.st.fr-en.tsv" in err


@pytest.mark.parametrize("text", ["", "[]", "{", '{"data": 7}', "[" * 100_000, "null", "{}"])
def test_a_broken_run_json_is_a_message(run_main, quick, made, text):
    file = made / "trained" / "run.json"
    file.write_text(text)
    code, _, err = run_main(evaluate, *quick, "--test", "fr")
    file.unlink()
    assert code == 2 and "run.json" in err and "--data" in err


@pytest.mark.parametrize(
    "flags, message",
    [
        ([], "expected --test or audio files"),
        (["a.wav", "--test", "fr"], "expected --test or audio files"),
        (["a.wav", "--data", "x"], "--data is only for --test"),
        (["--test", "fr", "--lang", "fr"], "--lang is only for audio files"),
        (["--test", "de"], "was not trained on de-en"),
        (["--test", "fr", "--data", "/nowhere"], "fr-en"),
        (["--test", "fr", "--beams", "0"], "--beams is 0; expected 1 or more"),
    ],
)
def test_mistakes_give_exit_code_2_and_a_message(run_main, quick, flags, message):
    code, lines, err = run_main(evaluate, *quick, *flags)
    assert (code, lines) == (2, []) and err.startswith("evaluate.py: ") and message in err


def test_audio_files_can_be_translated_by_a_cascade(run_main, quick, model, clips):
    code, lines, _ = run_main(evaluate, *quick, "--task", "cascade", *toys.good(clips))
    results = cascade(model, toys.good(clips), "fr", "en", THREE)
    assert code == 0 and lines == [f"{r.path}\t{r.text}" for r in results]
