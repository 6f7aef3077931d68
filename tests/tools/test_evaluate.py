"""tools/evaluate.py: scores by target, error rates, whole test sets, published numbers."""

import itertools
import json
import random
import sys
from importlib.util import find_spec
from pathlib import Path
from types import SimpleNamespace

import pytest
import sacrebleu

import translate
from data import Row
from translate import Translation, edit_distance, error_rates, score, score_rows

HYPOTHESES = ["The cat sleeps on the sofa.", "", "he went to the old Market", "Thanks a lot"]
REFERENCES = [
    "The cat sleeps on the couch.",
    "Where is the station?",
    "He went to the old market.",
    "Thank you",
]
CHINESE = ["我们明天去北京。", "他喜欢喝茶"], ["我们明天要去北京。", "她喜欢喝茶。"]
JAPANESE = ["猫は庭で静かに眠る。"], ["猫が庭で静かに眠る。"]

# ------------------------------------------------------------------------------------ translations


def test_scores_are_sacrebleus():
    scores = score(HYPOTHESES, REFERENCES)
    assert scores["bleu"] == round(sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES]).score, 2)
    lower = sacrebleu.corpus_bleu(HYPOTHESES, [REFERENCES], lowercase=True).score
    assert scores["bleu_lc"] == round(lower, 2) > scores["bleu"] > 0
    assert scores["chrf"] == round(sacrebleu.corpus_chrf(HYPOTHESES, [REFERENCES]).score, 2)
    assert "case:mixed" in scores["signature"] and "tok:13a" in scores["signature"]
    assert "nc:6" in scores["chrf_signature"]


def test_an_empty_hypothesis_counts():
    without = [pair for pair in zip(HYPOTHESES, REFERENCES, strict=True) if pair[0]]
    kept, dropped = score(HYPOTHESES, REFERENCES), score(*map(list, zip(*without, strict=True)))
    assert kept["n"] == 4
    assert kept["bleu"] < dropped["bleu"] and kept["chrf"] < dropped["chrf"]


def test_hypotheses_and_references_must_be_as_many():
    with pytest.raises(ValueError, match="1 hypotheses for 4 references"):
        score(HYPOTHESES[:1], REFERENCES)
    with pytest.raises(ValueError):
        error_rates(HYPOTHESES[:1], REFERENCES, "en")


def test_chinese_is_split_as_sacrebleu_splits_chinese():
    scores = score(*CHINESE, target="zh-CN")
    expected = sacrebleu.corpus_bleu(CHINESE[0], [CHINESE[1]], tokenize="zh").score
    assert scores["bleu"] == round(expected, 2) > score(*CHINESE)["bleu"] == 0
    assert "tok:zh|" in scores["signature"]


@pytest.mark.skipif(not (find_spec("MeCab") and find_spec("ipadic")), reason="no sacrebleu[ja]")
def test_japanese_is_split_by_mecab():
    scores = score(*JAPANESE, target="ja")
    expected = sacrebleu.corpus_bleu(JAPANESE[0], [JAPANESE[1]], tokenize="ja-mecab").score
    assert scores["bleu"] == round(expected, 2) > 0
    assert "tok:ja-mecab" in scores["signature"]


@pytest.fixture
def without_mecab(monkeypatch):
    for name in ("MeCab", "ipadic"):
        monkeypatch.setitem(sys.modules, name, None)  # importing it fails
    monkeypatch.delitem(sys.modules, "sacrebleu.tokenizers.tokenizer_ja_mecab", raising=False)


def test_without_mecab_the_error_names_the_package_and_nothing_else_is_used(without_mecab):
    with pytest.raises(ValueError, match=r'ja-mecab.* pip install "sacrebleu\[ja\]"'):
        score(*JAPANESE, target="ja")


def test_without_mecab_no_clip_is_translated_in_vain(without_mecab, monkeypatch):
    monkeypatch.setattr(translate, "translate", None)  # calling it would be a TypeError
    with pytest.raises(ValueError, match="pip install"):
        score_rows(None, [Row(Path("a.wav"), "a", "b", "en", "ja", 1.0)])


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


def test_the_edit_distance_is_that_of_brute_force():
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

    def stand_in(model, paths, task="st", source="fr", target="en", **how):
        calls.append((task, source, target, [path.name for path in paths]))
        results = []
        for path in paths:
            text = answers.get(path.name)
            bad = None if text is not None else f"{path}: no such file"
            results.append(Translation(str(path), text or "", None if bad else -0.5, error=bad))
        return results

    monkeypatch.setattr(translate, "translate", stand_in)
    return SimpleNamespace(answers=answers, calls=calls)


def read_table(path: Path) -> list[list[str]]:
    return [line.split("\t") for line in path.read_text(encoding="utf-8").splitlines()]


def test_every_clip_has_its_line_and_a_failed_one_is_empty_counted_and_named(
    says, tmp_path, capsys
):
    rows = rows_of("fr", "en")
    says.answers |= {"fr0.mp3": "said in\nen 0 .", "fr2.mp3": "said so"}
    scores = score_rows(None, rows, tmp_path / "out.tsv")
    assert (scores["n"], scores["failed"]) == (3, 1)
    assert "fr1.mp3: no such file" in capsys.readouterr().err
    assert read_table(tmp_path / "out.tsv") == [
        ["clip", "reference", "hypothesis", "score", "error"],
        ["fr0.mp3", "said in en 0 .", "said in en 0 .", "-0.5", ""],
        ["fr1.mp3", "said in en 1 .", "", "None", "fr1.mp3: no such file"],
        ["fr2.mp3", "said in en 2 .", "said so", "-0.5", ""],
    ]
    expected = score(["said in\nen 0 .", "", "said so"], [row.translation for row in rows])
    assert scores == expected | {"failed": 1}


def test_the_target_chooses_the_tokenizer_of_a_test_set(says):
    says.answers |= {f"en{i}.mp3": "我们明天去北京。" for i in range(3)}
    assert "tok:zh|" in score_rows(None, rows_of("en", "zh-CN"))["signature"]


def test_transcripts_are_compared_with_the_sentence_of_those_rows_that_have_one(
    says, tmp_path, capsys
):
    rows = rows_of("fr", "en")
    silent = Row(Path("silent.mp3"), " ", "said", "fr", "en", 1.0)
    says.answers |= {"fr0.mp3": "dit fr 0", "fr1.mp3": "dit de 1", "silent.mp3": "bla"}
    scores = score_rows(None, [silent, *rows], tmp_path / "out.tsv", "asr")
    assert says.calls == [("asr", "fr", "en", ["fr0.mp3", "fr1.mp3", "fr2.mp3"])]
    assert scores["wer"] == round(100 * (1 + 3) / 9, 2)
    assert (scores["n"], scores["failed"]) == (3, 1) and "bleu" not in scores
    assert "1 fr clips have no transcript: left out" in capsys.readouterr().err
    assert [cells[1] for cells in read_table(tmp_path / "out.tsv")[1:]] == [
        row.sentence for row in rows
    ]
    with pytest.raises(ValueError, match="none of the 1 fr clips has a transcript"):
        score_rows(None, [silent], task="asr")


def test_transcripts_of_chinese_are_split_as_chinese_whatever_the_target(says):
    rows = [Row(Path("a.mp3"), "她喜欢喝茶。", "She likes tea.", "zh-CN", "en", 1.0)]
    says.answers["a.mp3"] = "他喜欢喝茶"
    assert score_rows(None, rows, task="asr")["wer"] == round(100 * 2 / 6, 2)


@pytest.fixture
def command(monkeypatch, capsys, tmp_path, says):
    """Runs translate.py --test with stand-ins for model and corpora. -> code, output, errors"""
    known = ("fr-en", "de-en", "es-en", "en-zh-CN", "en-de")
    model = SimpleNamespace(config=SimpleNamespace(directions=known))
    monkeypatch.setattr(translate.LLaST, "from_pretrained", lambda *args: model)
    monkeypatch.setattr(translate, "merge_lora", lambda model, for_good: None)

    def read_corpus(root, source, target):
        rows = [] if source == "es" else rows_of(source, target)
        return {"train": [], "dev": [], "test": rows}, []

    monkeypatch.setattr(translate, "read_corpus", read_corpus)
    says.answers |= {f"fr{i}.mp3": f"said in en {i} ." for i in range(3)}
    says.answers |= {"de0.mp3": "Said in en 0 .", "de2.mp3": "dit de 2"}
    says.answers |= {f"en{i}.mp3": f"dit en {i}" for i in range(3)}

    def run(*arguments):
        folder = ["--model", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", ["translate.py", *folder, *arguments])
        code = translate.main()
        out, err = capsys.readouterr()
        return code, out.splitlines(), err

    return run


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


def test_signatures_that_differ_are_told_apart(command):
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


def test_transcripts_are_those_of_the_direction_that_was_named(command, says, tmp_path):
    for direction in ("en-de", "en-zh-CN", "en-ja"):  # whatever it was trained to translate into
        assert command("--test", direction, "--task", "asr")[0] == 0
        assert says.calls[-1][:3] == ("asr", "en", direction.removeprefix("en-"))
    assert "was not trained on 'it'" in command("--test", "it", "--task", "asr")[2]


def test_json_is_an_object_for_each_direction(command):
    code, lines, _ = command("--test", "fr,de", "--json", "--published")
    french, german = map(json.loads, lines)
    assert (french["direction"], french["task"], french["bleu"]) == ("fr-en", "st", 100)
    assert {"bleu", "bleu_lc", "chrf", "signature", "chrf_signature", "n", "failed"} <= set(german)
    assert german["failed"] == 1


def test_what_is_missing_is_said_before_the_first_clip_is_translated(command, says, without_mecab):
    code, lines, err = command("--test", "fr,es")
    assert (code, lines, says.calls) == (2, [], [])
    assert err.endswith("has no test clips\n") and err.count("\n") == 1
    code, lines, err = command("--test", "fr,en-ja")
    assert code == 2 and "was not trained on 'en-ja'" in err and says.calls == []


def test_a_tokenizer_that_is_missing_is_said_before_the_first_clip(
    command, says, without_mecab, monkeypatch
):
    model = SimpleNamespace(config=SimpleNamespace(directions=("fr-en", "en-ja")))
    monkeypatch.setattr(translate.LLaST, "from_pretrained", lambda *args: model)
    code, _, err = command("--test", "fr,en-ja")
    assert (code, says.calls) == (2, []) and 'pip install "sacrebleu[ja]"' in err


# ------------------------------------------------------------------------------- published numbers


def test_published_scores_come_after_ones_own_with_their_caveats(command):
    lines = command("--test", "fr,de,en-zh-CN", "--published")[1]
    own = next(i for i, line in enumerate(lines) if line.startswith("average"))
    start = next(i for i, line in enumerate(lines) if line.startswith("published BLEU"))
    assert start > own
    assert lines[start].split() == ["published", "BLEU", "fr-en", "de-en"]
    rows = {line.split()[0]: line.split()[1:] for line in lines[start + 1 :]}
    assert rows["Whisper-large-v2"] == ["36.4", "36.3"]
    assert rows["LLaST-2B"] == ["41.2", "36.8"] and rows["LLaST-8B"] == ["44.1", "40.8"]
    assert rows["LLaST-14B"] == ["45.1", "-"]
    caveat = " ".join(lines[start:])
    for words in ("CoVoST-2", "PLaST, AAAI 2026", "inferred", "lower-cases", "Common Voice"):
        assert words in caveat


def test_published_scores_are_printed_on_request_and_where_there_are_some(command):
    assert not any("Whisper" in line for line in command("--test", "fr")[1])
    assert command("--test", "de", "--published")[1][-1] == translate.CAVEAT.splitlines()[-1]
    assert not any("LLaST-14B" in line for line in command("--test", "de", "--published")[1])
    lines = command("--test", "en-de", "--published")[1]
    assert lines[1:] == ["no published BLEU at hand for en-de"]


def test_published_averages_are_those_of_the_table_they_are_quoted_from():
    means = {
        "Whisper-large-v2": 31.3, "SeamlessM4T-large-v2": 35.2, "LLaST-2B": 34.0, "LLaST-8B": 36.7,
    }  # fmt: skip
    for name, mean in means.items():
        assert sum(translate.PUBLISHED[name]) / 6 == pytest.approx(mean, abs=0.051)
