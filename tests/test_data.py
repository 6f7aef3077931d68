"""data.py: languages, tables and corpora, prompts and labels, examples and batches."""

import csv
import io
import json
import math
import os
import random
import re
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import data
import toys
from data import (
    AUDIO,
    AUDIO_ID,
    BOS,
    EOS,
    EOT,
    IGNORE,
    IM_END,
    IM_START,
    ROLE_END,
    ROLE_START,
    Batches,
    Example,
    Row,
)
from llama import Tokenizer
from toys import tone, write

ADDED = {name: 1295 + i for i, name in enumerate(data.NAMED_TOKENS)}


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = toys.llama_folder(tmp_path_factory.mktemp("bases") / "llama")
    (folder / "added_tokens.json").write_text(json.dumps(ADDED))
    return Tokenizer(folder)


# ---------------------------------------------------------------------------------------- languages


@pytest.mark.parametrize(
    ("typed", "meant"),
    [
        ("ger", "de"),
        ("german", "de"),
        ("Germn", "de"),
        ("spa", "es"),
        ("zh", "zh-CN"),
        ("FR", "fr"),
    ],
)
def test_the_error_for_an_unknown_language_names_the_nearest(typed, meant):
    with pytest.raises(ValueError, match=f"did you mean '{meant}'"):
        data.check_language(typed)


@pytest.mark.parametrize(
    ("typed", "directions"),
    [
        ("fr", [("fr", "en")]),
        ("fr,de", [("fr", "en"), ("de", "en")]),
        ("fr-en, en-de", [("fr", "en"), ("en", "de")]),
        ("zh-CN,zh-CN-en,en-zh-CN", [("zh-CN", "en"), ("en", "zh-CN")]),
        ("sv-SE", [("sv-SE", "en")]),
    ],
)
def test_each_direction_is_read_once_in_every_spelling(typed, directions):
    assert data.parse_directions(typed) == directions


def test_all_means_covost_and_paper_means_the_directions_of_the_paper():
    into = "fr de es ca it ru zh-CN pt fa et mn nl tr ar sv-SE lv sl ta ja id cy".split()
    from_english = "de tr fa sv-SE mn zh-CN cy ca sl et id ar ta lv ja".split()
    everything = {(code, "en") for code in into} | {("en", code) for code in from_english}
    assert set(data.parse_directions("all")) == everything
    assert len(data.parse_directions("all")) == len(data.parse_directions("all,fr")) == 36
    paper = data.parse_directions("paper")
    assert [s for s, t in paper if t == "en"] == ["fr", "es", "de", "it", "zh-CN", "ja"]
    assert [t for s, t in paper if s == "en"] == ["ja", "de", "zh-CN"] and len(paper) == 9


@pytest.mark.parametrize(
    ("typed", "message"),
    [
        ("en", "write it, as in en-de"),
        ("fr-de", "fr-de: exactly one side has to be English"),
        ("zh-CN-de", "exactly one side has to be English"),
        ("en-en", "exactly one side has to be English"),
        ("zh", "did you mean 'zh-CN'"),
        ("zh-cn", "did you mean 'zh-CN'"),
        ("zh-TW", "zh-TW: exactly one side has to be English"),
        ("en-zh", "unknown language 'zh'; did you mean 'zh-CN'"),
        ("sv-en", "unknown language 'sv'; did you mean 'sv-SE'"),
        ("german-en", "did you mean 'de'"),
        ("fr,", "unknown language ''"),
    ],
)
def test_directions_without_english_or_with_unknown_codes_are_refused(typed, message):
    with pytest.raises(ValueError, match=message):
        data.parse_directions(typed)


# ------------------------------------------------------------------------------------------ corpora


def cells_of(path: Path, columns=("path", "sentence")) -> list[tuple[str, ...]]:
    return [tuple(cells.values()) for _, cells in data.read_table(path, columns)]


def test_a_table_that_was_written_is_read_again(tmp_path):
    rows = [
        ("a", '"Oui", dit-il'),
        ("b", "AC\\DC"),
        ("c", 'un "mot'),
        ("d", '"'),
        ("e", ""),
        ("f", 1.5),
    ]
    data.write_table(tmp_path / "t.tsv", ("path", "sentence"), rows)
    assert cells_of(tmp_path / "t.tsv") == [(path, str(text)) for path, text in rows]
    data.write_table(tmp_path / "t.tsv", ("path", "sentence"), [("a", "one\ttwo\r\nthree")])
    assert cells_of(tmp_path / "t.tsv") == [("a", "one two three")]


def test_a_written_table_is_what_csv_writes(tmp_path):
    rows = [("a", '"Oui", dit-il'), ("b", "AC\\DC"), ("c", 'un "mot'), ("d", "l'été, enfin")]
    data.write_table(tmp_path / "t.tsv", ("path", "sentence"), rows)
    text = io.StringIO()
    csv.writer(text, delimiter="\t", lineterminator="\n").writerows([("path", "sentence"), *rows])
    assert (tmp_path / "t.tsv").read_text() == text.getvalue()


def test_a_table_that_cannot_be_written_leaves_the_old_one(tmp_path):
    data.write_table(tmp_path / "t.tsv", ("path", "sentence"), [("a", "b")])

    def rows():
        yield "c", "d"
        raise ValueError("no more rows")

    with pytest.raises(ValueError, match="no more rows"):
        data.write_table(tmp_path / "t.tsv", ("path", "sentence"), rows())
    assert cells_of(tmp_path / "t.tsv") == [("a", "b")]


def test_a_table_of_a_windows_spreadsheet_is_read(tmp_path):
    table = 'path\tsentence\r\na.mp3\t"""Oui"", dit-il"\r\n\r\nb.mp3\tl\'été\r\n'
    (tmp_path / "t.tsv").write_bytes(b"\xef\xbb\xbf" + table.encode())
    assert list(data.read_table(tmp_path / "t.tsv", ("path", "sentence"))) == [
        (f"{tmp_path}/t.tsv:2", {"path": "a.mp3", "sentence": '"Oui", dit-il'}),
        (f"{tmp_path}/t.tsv:4", {"path": "b.mp3", "sentence": "l'été"}),
    ]


def test_a_very_long_cell_is_read(tmp_path):
    (tmp_path / "t.tsv").write_text(f"path\tsentence\na\t{'x' * 200_000}\n")
    [(_, text)] = cells_of(tmp_path / "t.tsv")
    assert len(text) == 200_000


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", r"t\.tsv:1: the header must have the column path once, but it is \[\]"),
        (
            b"path\ttext\na\tb\n",
            r"t\.tsv:1: .* must have the column sentence once, but it is \['path', 'text'\]",
        ),
        (b"path,sentence\na,b\n", r"t\.tsv:1: .* must have the column path once"),
        (b"path\tpath\tsentence\na\tb\tc\n", r"t\.tsv:1: .* must have the column path once"),
        (b"path\tsentence\na\tb\nc\n", r"t\.tsv:3: expected 2 cells .*, found 1"),
        (
            b"path\tsentence\na\tb\tc\n",
            r"t\.tsv:2: expected 2 cells \['path', 'sentence'\], found 3",
        ),
        (b"path\tsentence\na\tb\nc\t\xe9t\xe9\n", r"t\.tsv:3: not UTF-8; save the table"),
        ("path\tsentence\n".encode("utf-16"), r"t\.tsv:1: not UTF-8"),
        (
            b'path\tsentence\na\tb\nc\t"Oui", dit-il\n',
            r"t\.tsv:3: .*; check that cells .* a cell that begins with a",
        ),
        (b'path\tsentence\na\t"Oui\nb\tNon"\n', r"t\.tsv:2: a cell in .* contains a line break"),
        (b'path\tsentence\na\t"Oui\nb\tNon\n', r"t\.tsv:2: "),
    ],
)
def test_a_table_that_cannot_be_read_is_named_with_line_and_reason(tmp_path, content, message):
    (tmp_path / "t.tsv").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        cells_of(tmp_path / "t.tsv")


CORPUS = [  # path, sentence, translation, split
    ("train.wav", "un", "one", "train"),
    ("dev.wav", '"Trois", dit-il.', "He said three.", "dev"),
    ("test.wav", "quatre", "AC\\DC", "test"),
    ("deep/er.wav", "\u200b", "five", "train"),
    ("missing.wav", "neuf", "nine", "train"),
    ("broken.wav", "dix", "ten", "train"),
    ("long.wav", "onze", "eleven", "test"),
    ("long_dev.wav", "onze", "eleven", "dev"),
    ("empty.wav", "douze", "twelve", "dev"),
    ("wordless.wav", "treize", " \u200b\ufeff", "test"),
    ("remove.wav", "quatorze", "REMOVE", "train"),  # CoVoST-2's mark is a word like any other here
    ("lost.wav", "quinze", "fifteen", "test"),
]


@pytest.fixture
def corpus(tmp_path):
    for path, *_ in CORPUS:
        seconds = {"long.wav": 30.01, "long_dev.wav": 30.01, "empty.wav": 0}.get(path, 0.5)
        write(tmp_path / "fr" / "clips" / path, np.zeros(round(seconds * 1000)), rate=1000)
    for name in ("missing.wav", "lost.wav"):
        (tmp_path / "fr" / "clips" / name).unlink()
    (tmp_path / "fr" / "clips" / "broken.wav").write_bytes(b"no audio at all")
    toys.write_corpus(tmp_path, CORPUS)
    return tmp_path


def test_a_corpus_is_read_by_split_in_the_order_of_its_table(corpus):
    splits, _ = data.read_corpus(corpus, "fr", "en")

    def row(i, seconds=0.5):
        path, sentence, translation, _ = CORPUS[i]
        path = corpus / "fr" / "clips" / path
        return Row(path, sentence.strip("\u200b"), translation, "fr", "en", seconds)

    # A clip that cannot be used stays only in test: the score counts every clip.
    assert splits == {
        "train": [row(0), row(3), row(10)],
        "dev": [row(1)],
        "test": [row(2), row(6, 30.01), row(11, 0.0)],
    }


def test_rows_that_cannot_be_used_are_named_with_the_reason(corpus):
    _, unusable = data.read_corpus(corpus, "fr", "en")
    wanted = [
        ("train", r"missing\.wav: no such file"),
        ("train", r"broken\.wav: not a format that"),
        ("dev", r"long_dev\.wav: 30\.0 s long; the encoder takes 30 s"),
        ("dev", r"empty\.wav: the clip has no samples"),
        ("test", r"wordless\.wav: empty translation \(.*fr-en\.tsv:11\)"),
        ("test", r"lost\.wav: no such file"),
    ]
    for (split, line), (expected, pattern) in zip(unusable, wanted, strict=True):
        assert split == expected and re.search(pattern, line), line


@pytest.mark.parametrize("cell", ["", "0"])
def test_only_clips_without_seconds_are_opened(corpus, monkeypatch, cell):
    opened = []

    def audio_seconds(path):
        opened.append(path.name)
        return 0.25

    monkeypatch.setattr(data, "audio_seconds", audio_seconds)
    rows = [("train.wav", "a", "b", "train", "0.5"), ("dev.wav", "a", "b", "dev", cell)]
    toys.write_corpus(corpus, [*rows, ("test.wav", "a", "b", "test", 2)])
    splits, unusable = data.read_corpus(corpus, "fr", "en")
    assert [splits[split][0].seconds for split in data.SPLITS] == [0.5, 0.25, 2.0]
    assert opened == ["dev.wav"] and not unusable


def test_a_table_written_by_hand_is_read(corpus):
    table = "split\tpath\tnotes\ttranslation\tsentence\ntrain\ttrain.wav\tx\tone\tun\n"
    (corpus / "fr" / "fr-en.tsv").write_text(table)
    [row] = data.read_corpus(corpus, "fr", "en")[0]["train"]
    assert (row.sentence, row.translation, row.seconds) == ("un", "one", 0.5)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (
            ("a.wav", "x", "y", "validated", ""),
            r"fr-en\.tsv:3: the split is 'validated'; write one",
        ),
        (("a.wav", "x", "y", "", ""), r"fr-en\.tsv:3: the split is ''"),
        (
            ("train.wav", "x", "y", "test", ""),
            r"fr-en\.tsv:3: train\.wav is also in .*fr-en\.tsv:2",
        ),
        (("./train.wav", "x", "y", "test", ""), r"fr-en\.tsv:3: train\.wav is also in "),
        (("test.wav", "x", "y", "test", "two"), r"fr-en\.tsv:3: seconds is 'two'; write a number"),
        (("test.wav", "x", "y", "test", "nan"), r"fr-en\.tsv:3: seconds is 'nan'"),
        (("test.wav", "x", "y", "test", "-1"), r"fr-en\.tsv:3: seconds is '-1'"),
    ],
)
def test_an_error_in_a_corpus_table_is_named_with_file_and_line(corpus, row, message):
    toys.write_corpus(corpus, [("train.wav", "un", "one", "train", ""), row])
    with pytest.raises(ValueError, match=message):
        data.read_corpus(corpus, "fr", "en")


def test_a_name_too_long_for_a_file_is_one_bad_row(corpus):
    name = "x" * 300 + ".wav"
    toys.write_corpus(corpus, [("dev.wav", "un", "one", "dev"), (name, "un", "one", "dev")])
    splits, [(split, reason)] = data.read_corpus(corpus, "fr", "en")
    assert [row.path.name for row in splits["dev"]] == ["dev.wav"]
    assert split == "dev" and reason.endswith(f"{name}: no such file")


def test_a_missing_clip_whose_name_exists_in_another_unicode_form_is_reported(corpus):
    composed, decomposed = "\u00e9t\u00e9.wav", "e\u0301te\u0301.wav"
    write(corpus / "fr" / "clips" / composed, tone(300, 16000))
    if (corpus / "fr" / "clips" / decomposed).exists():
        pytest.skip("this file system does not distinguish the two forms")
    toys.write_corpus(corpus, [("dev.wav", "un", "one", "dev"), (decomposed, "un", "one", "dev")])
    splits, [(_, reason)] = data.read_corpus(corpus, "fr", "en")
    assert [row.path.name for row in splits["dev"]] == ["dev.wav"]
    assert "no such file; the same name in the other Unicode form exists" in reason


def test_a_clip_whose_name_is_not_utf8_is_not_in_the_way(corpus):
    (corpus / "fr" / "clips" / os.fsdecode(b"\xff.wav")).write_bytes(b"")
    assert data.read_corpus(corpus, "fr", "en")[0]["dev"]


def test_a_link_to_itself_is_one_bad_row(corpus):
    for name, target in (("loop.wav", "loop.wav"), ("one.wav", "two.wav"), ("two.wav", "one.wav")):
        (corpus / "fr" / "clips" / name).symlink_to(target)
    names = ["dev.wav", "loop.wav", "one.wav"]
    toys.write_corpus(corpus, [(name, "un", "one", "dev") for name in names])
    splits, unusable = data.read_corpus(corpus, "fr", "en")
    assert [row.path.name for row in splits["dev"]] == ["dev.wav"]
    assert [reason.split(": ")[1] for _, reason in unusable] == ["no such file"] * 2


@pytest.mark.parametrize(
    "name",
    ["../secret.wav", "/etc/passwd", "link.wav", "sub/deep.wav", ".", "", "a/../train.wav", "a\0b"],
)
def test_a_path_that_leaves_the_folder_of_clips_is_refused(corpus, name):
    clips = corpus / "fr" / "clips"
    write(corpus / "fr" / "secret.wav", tone(300, 16000))
    (clips / "link.wav").symlink_to(corpus / "fr" / "secret.wav")
    (clips / "sub").symlink_to(corpus / "fr")
    toys.write_corpus(corpus, [(name, "un", "one", "train")])
    with pytest.raises(ValueError, match=r"fr-en\.tsv:2: the path .* is not inside"):
        data.read_corpus(corpus, "fr", "en")


def test_links_that_stay_inside_and_a_linked_folder_of_clips_are_fine(corpus):
    clips = corpus / "fr" / "clips"
    (clips / "link.wav").symlink_to("train.wav")
    clips.rename(corpus / "elsewhere")
    clips.symlink_to(corpus / "elsewhere")
    names = ["train.wav", "link.wav", f"{clips}/remove.wav"]
    toys.write_corpus(corpus, [(name, "un", "one", "train") for name in names])
    rows = data.read_corpus(corpus, "fr", "en")[0]["train"]
    assert [row.path.name for row in rows] == ["train.wav", "link.wav", "remove.wav"]
    assert [row.seconds for row in rows] == [0.5] * 3


def test_the_error_for_a_missing_corpus_names_those_that_exist(corpus):
    with pytest.raises(
        FileNotFoundError, match=r"no de-en .* needs .*de/de-en\.tsv .*there: fr-en\."
    ):
        data.read_corpus(corpus, "de", "en")
    with pytest.raises(FileNotFoundError, match=r"it needs .*fr/fr-de\.tsv"):
        data.read_corpus(corpus, "fr", "de")
    with pytest.raises(FileNotFoundError, match="Corpora there: none"):
        data.read_corpus(corpus / "nowhere", "fr", "en")


def test_test_texts_that_are_also_in_train_are_counted():
    def row(i, sentence, translation):
        return Row(Path(f"{i}.wav"), sentence, translation, "fr", "en", 1.0)

    train = [row(1, "un", "one"), row(2, "", "two"), row(3, "trois", "three")]
    test = [row(4, "un ", "uno"), row(5, "un", "one"), row(6, "", "four"), row(7, "six", "six")]
    assert data.describe_overlap(train, test) == (
        "of 3 test sentences, 2 are also in train; of 4 test translations, 1 are also in train"
    )


# ----------------------------------------------------------------------------------------- the rows

STUDIED = Row(Path("a.wav"), "Le chat dort.", "The cat sleeps.", "fr", "en", 1.0)

# Every row that can be learnt, piece by piece; True where it carries loss.
PICTURES = {
    ("llama2", "st"): [
        (BOS, False),
        ("[INST] ", False),
        (AUDIO, False),
        ("\nPlease translate the French sentence into English. [/INST]", False),
        ("The cat sleeps.", True),
        (EOS, True),
    ],
    ("llama2", "asr"): [
        (BOS, False),
        ("[INST] ", False),
        (AUDIO, False),
        ("\nPlease transcribe the French sentence into French. [/INST]", False),
        ("Le chat dort.", True),
        (EOS, True),
    ],
    ("tinyllama", "st"): [
        (BOS, False),
        ("<|user|>\n", False),
        (AUDIO, False),
        ("\nPlease translate the French sentence into English.", False),
        (EOS, False),
        ("\n<|assistant|>", False),
        (EOS, False),
        ("\n", False),
        ("The cat sleeps.", True),
        (EOS, True),
    ],
    ("tinyllama", "asr"): [
        (BOS, False),
        ("<|user|>\n", False),
        (AUDIO, False),
        ("\nPlease transcribe the French sentence into French.", False),
        (EOS, False),
        ("\n<|assistant|>", False),
        (EOS, False),
        ("\n", False),
        ("Le chat dort.", True),
        (EOS, True),
    ],
}

for task, instruction in {
    "st": "Please translate the French sentence into English.",
    "asr": "Please transcribe the French sentence into French.",
}.items():
    answer = {"st": "The cat sleeps.", "asr": "Le chat dort."}[task]
    PICTURES["tinyllama-chat", task] = [
        (BOS, False),
        ("<|user|>\n", False),
        (AUDIO, False),
        (f"\n{instruction}", False),
        (EOS, False),
        ("\n<|assistant|>\n", False),
        (answer, True),
        (EOS, True),
    ]
    PICTURES["chatml", task] = [
        (BOS, False),
        (IM_START, False),
        ("user\n", False),
        (AUDIO, False),
        (f"\n{instruction}", False),
        (IM_END, False),
        ("\n", False),
        (IM_START, False),
        ("assistant\n", False),
        (answer, True),
        (IM_END, True),
    ]
    PICTURES["smollm2", task] = [
        (IM_START, False),
        ("system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face", False),
        (IM_END, False),
        ("\n", False),
        *PICTURES["chatml", task][1:],
    ]
    PICTURES["llama3", task] = [
        (BOS, False),
        (ROLE_START, False),
        ("user", False),
        (ROLE_END, False),
        ("\n\n", False),
        (AUDIO, False),
        (f"\n{instruction}", False),
        (EOT, False),
        (ROLE_START, False),
        ("assistant", False),
        (ROLE_END, False),
        ("\n\n", False),
        (answer, True),
        (EOT, True),
    ]
    PICTURES["plain", task] = [
        (BOS, False),
        (AUDIO, False),
        (f"\n{instruction}\n", False),
        (answer, True),
        (EOS, True),
    ]


def test_every_template_and_task_is_tested():
    assert set(PICTURES) == {(t, task) for t in data.TEMPLATES for task in data.INSTRUCTIONS}


@pytest.mark.parametrize(("template", "task"), PICTURES)
def test_only_the_answer_and_its_end_token_have_labels(tokenizer, template, task):
    special = {BOS: 1, EOS: 2, AUDIO: AUDIO_ID} | ADDED
    expected = [
        (i, i if is_answer else IGNORE)
        for piece, is_answer in PICTURES[template, task]
        for i in ([special[piece]] if piece in special else tokenizer.encode(piece))
    ]
    ids, labels = data.answer_row(Example(STUDIED, task), tokenizer, template)
    assert list(zip(ids, labels, strict=True)) == expected


@pytest.mark.parametrize(("template", "task"), PICTURES)
def test_training_and_translation_use_the_same_prompt(tokenizer, template, task):
    prompt = data.prompt_ids(data.prompt_for(task, "fr", "en", template), tokenizer)
    ids, labels = data.answer_row(Example(STUDIED, task), tokenizer, template)
    assert ids[: len(prompt)] == prompt
    assert labels[len(prompt) - 1] == IGNORE and labels[len(prompt)] != IGNORE


@pytest.mark.parametrize("task", ["st", "asr"])
@pytest.mark.parametrize("text", ["</s>", "<audio>", "<s> un </s> deux <audio>"])
def test_text_that_looks_like_a_special_piece_stays_text(tokenizer, task, text):
    row = Row(Path("a.wav"), text, text, "fr", "en", 1.0)
    ids, labels = data.answer_row(Example(row, task), tokenizer, "llama2")
    *answer, end = [i for i in labels if i != IGNORE]
    assert tokenizer.decode(answer) == text
    assert not {tokenizer.bos_id, tokenizer.eos_id, AUDIO_ID} & set(answer)
    assert end == tokenizer.eos_id and ids.count(AUDIO_ID) == 1


def test_an_unknown_task_template_or_language_has_no_prompt():
    with pytest.raises(ValueError, match="task 'summarise'.*tasks: st, asr"):
        data.prompt_for("summarise", "fr", "en")
    with pytest.raises(ValueError, match="template 'gpt'.*templates: llama2, tinyllama"):
        data.prompt_for("st", "fr", "en", "gpt")
    with pytest.raises(ValueError, match="unknown language"):
        data.prompt_for("st", "fr", "english")


# -------------------------------------------------------------------------------- examples, batches

GOLDEN_MIX = [("1", "st"), ("2", "asr"), ("3", "st"), ("0", "st"), ("2", "st"), ("3", "asr")]
ROWS = [Row(Path(f"{i}.wav"), f"dit {i}", f"said {i}", "fr", "en", 1.0) for i in range(20)]


@pytest.mark.parametrize(("asr", "n"), [(0, 0), (0.5, 10), (1, 20)])
def test_every_row_is_translated_and_a_share_is_also_transcribed(asr, n):
    examples = data.examples_for(ROWS, asr, seed=1, epoch=0)
    translated = [example.row for example in examples if example.task == "st"]
    transcribed = [example.row for example in examples if example.task == "asr"]
    assert sorted(translated, key=ROWS.index) == ROWS
    assert len(transcribed) == len(set(transcribed)) == n
    assert len(examples) == 20 + n


def test_the_order_of_old_runs_does_not_change():
    """GOLDEN_MIX is from the first version of this function, so that old runs can be repeated."""
    mix = data.examples_for(ROWS[:4], 0.5, seed=1, epoch=2)
    assert [(example.row.path.stem, example.task) for example in mix] == GOLDEN_MIX


def test_a_clip_of_several_directions_is_transcribed_once():
    german = [replace(row, source="en", target="de") for row in ROWS]
    japanese = [replace(row, source="en", target="ja") for row in ROWS[5:]]
    for share, n in ((1, 20), (0.5, 10)):
        mix = data.examples_for(german + japanese, share, seed=1, epoch=0)
        transcribed = [example.row.path for example in mix if example.task == "asr"]
        assert len(transcribed) == len(set(transcribed)) == n
        assert len(mix) == 35 + n


def test_a_clip_without_a_sentence_is_only_translated():
    rows = [replace(row, sentence=" " * (i % 2)) for i, row in enumerate(ROWS)]
    rows[3] = ROWS[3]
    mix = data.examples_for(rows, 1, seed=1, epoch=0)
    assert [example.row for example in mix if example.task == "asr"] == [ROWS[3]]
    assert len(mix) == 21


def test_the_answer_is_the_translation_or_the_sentence():
    assert Example(ROWS[3], "st").answer == "said 3"
    assert Example(ROWS[3], "asr").answer == "dit 3"


def test_the_order_follows_from_seed_and_epoch_alone():
    first = data.examples_for(ROWS, 0.5, seed=1, epoch=0)
    random.seed(123)
    assert data.examples_for(ROWS, 0.5, seed=1, epoch=0) == first
    assert data.examples_for(ROWS, 0.5, seed=1, epoch=1) != first
    assert data.examples_for(ROWS, 0.5, seed=2, epoch=0) != first


@pytest.mark.parametrize("asr", [-0.1, 1.1, math.nan])
def test_a_share_outside_0_to_1_is_refused(asr):
    with pytest.raises(ValueError, match="--asr is"):
        data.examples_for(ROWS, asr, seed=1, epoch=0)


def sized(lengths: list[int]) -> list[Example]:
    """Examples with these sizes in their seconds."""
    return [
        Example(Row(Path(f"{i}.wav"), "", "", "fr", "en", n), "st") for i, n in enumerate(lengths)
    ]


def lengths_for(seed: int, n: int = 400) -> list[int]:
    return random.Random(seed).choices(range(1, 60), k=n)


def size_of(example: Example) -> int:
    return example.row.seconds


@pytest.mark.parametrize("budget", [1, 59, 60, 200, 100_000])
def test_batches_hold_every_example_once_and_keep_to_the_budget(budget):
    examples = sized(lengths_for(1))
    batches = data.group(examples, size_of, budget, seed=1, epoch=0)
    number = examples.index
    assert sorted((e for batch in batches for e in batch), key=number) == examples
    for batch in batches:
        assert batch
        assert len(batch) == 1 or len(batch) * max(map(size_of, batch)) <= budget


def test_an_example_larger_than_the_budget_is_alone():
    batches = data.group(sized([500, 3, 3, 3, 700, 3]), size_of, 100, seed=1, epoch=0)
    assert sorted(map(len, batches)) == [1, 1, 4]


def test_batches_hold_examples_of_similar_size():
    batches = data.group(sized(lengths_for(1)), size_of, 200, seed=1, epoch=0)
    padded = sum(len(batch) * max(map(size_of, batch)) for batch in batches)
    assert padded < 1.2 * sum(lengths_for(1))


def test_batches_follow_from_seed_and_epoch_alone():
    def grouped(seed, epoch):
        return data.group(sized(lengths_for(1)), size_of, 200, seed, epoch)

    first = grouped(1, 0)
    random.seed(123)
    assert grouped(1, 0) == first
    assert grouped(1, 1) != first and grouped(2, 0) != first


def test_collate_pads_rows_on_the_right_and_keeps_every_clip_at_its_own_length(tmp_path, tokenizer):
    rows = [
        Row(write(tmp_path / "a.wav", tone(300, 8000), 8000), "un", "one", "fr", "en", 0.2),
        Row(write(tmp_path / "b.wav", tone(300, 16000, 0.3)), "x", "far longer", "de", "en", 0.3),
    ]
    examples = [Example(rows[0], "asr"), Example(rows[1], "st")]
    batch = data.collate(examples, tokenizer, "llama2")
    assert [len(clip) for clip in batch.audio] == [3200, 4800]
    drawn = [data.answer_row(example, tokenizer, "llama2") for example in examples]
    T = max(len(ids) for ids, _ in drawn)
    assert batch.ids.shape == batch.labels.shape == (2, T)
    assert batch.lengths.tolist() == [len(ids) for ids, _ in drawn]
    for i, (ids, labels) in enumerate(drawn):
        padding = T - len(ids)
        assert batch.ids[i].tolist() == ids + [0] * padding
        assert batch.labels[i].tolist() == labels + [IGNORE] * padding


def batches_of(rows: list[Row], tokenizer, budget: int = 10_000) -> Batches:
    return Batches(rows, 1.0, tokenizer, "llama2", budget, seed=1)


def test_the_size_of_an_example_is_its_speech_and_its_text(tokenizer):
    ids, _ = data.answer_row(Example(STUDIED, "st"), tokenizer, "llama2")
    size = batches_of([STUDIED], tokenizer).size_of(Example(STUDIED, "st"))
    assert size == 50 * STUDIED.seconds + len(ids) - 1  # the speech takes the place of AUDIO_ID


def test_a_batch_has_the_positions_that_the_llm_sees(tmp_path, tokenizer):
    """The whole chain: seconds in the table, samples of the clip, states, positions."""
    clips = [(0.5, 16000), (0.51, 44100), (0.021, 8000), (0.02, 16000), (1.23, 48000)]
    rows = []
    for i, (seconds, rate) in enumerate(clips):
        path = write(tmp_path / f"{i}.wav", tone(300, rate, seconds), rate)
        rows.append(Row(path, "un", "one", "fr", "en", data.audio_seconds(path)))
    batches = batches_of(rows, tokenizer)
    [group] = batches.groups(0)
    batch = batches.load(group)
    assert batch.examples == group
    assert batch.positions == [batches.size_of(example) for example in group]
    for i, at in enumerate(batch.audio_at):
        ids = batch.ids[i, : batch.lengths[i]].tolist()
        assert ids[at] == AUDIO_ID and ids.count(AUDIO_ID) == 1
        words = len(ids) - 1
        assert batch.positions[i] == math.ceil(len(batch.audio[i]) / 320) + words


def test_a_row_longer_than_the_budget_is_left_out_and_named(tokenizer):
    long = replace(ROWS[0], path=Path("long.wav"), translation="word " * 500)
    batches = batches_of([*ROWS, long], tokenizer, budget=300)
    drawn = {example for group in batches.groups(0) for example in group}
    assert batches.too_long == [Example(long, "st")]
    assert drawn == {Example(row, task) for row in ROWS for task in ("st", "asr")} | {
        Example(long, "asr")
    }


def test_a_row_exactly_as_long_as_the_budget_is_kept(tokenizer):
    example = Example(ROWS[0], "st")
    size = batches_of([ROWS[0]], tokenizer).size_of(example)
    batches = Batches([ROWS[0]], 0, tokenizer, "llama2", size, seed=1)
    assert batches.groups(0) == [[example]] and not batches.too_long
    with pytest.raises(ValueError, match=f"no row fits in --batch {size - 1} positions"):
        Batches([ROWS[0]], 0, tokenizer, "llama2", size - 1, seed=1).groups(0)


def test_decoded_clips_are_kept_up_to_a_number_of_bytes(tmp_path, tokenizer, monkeypatch):
    read = []
    monkeypatch.setattr(data, "CACHE_BYTES", 2 * 4 * 3200)  # two clips of 0.2 s in float32
    monkeypatch.setattr(data, "load_audio", lambda path: read.append(path) or torch.ones(3200))
    batches = batches_of(ROWS, tokenizer)
    paths = [row.path for row in ROWS[:3]]
    for _ in range(2):
        for path in paths:
            assert len(batches.read_audio(path)) == 3200
    assert read == [*paths, paths[2]]


def test_change_alters_the_audio_and_not_the_clip_in_memory(tmp_path, tokenizer):
    row = Row(write(tmp_path / "a.wav", tone(300, 16000)), "un", "one", "fr", "en", 0.2)
    batches = Batches(
        [row], 0, tokenizer, "llama2", 1000, seed=1, change=lambda audio: audio.mul_(2)
    )
    plain = batches_of([row], tokenizer).read_audio(row.path)
    for _ in range(2):
        [audio] = batches.load([Example(row, "st")]).audio
        torch.testing.assert_close(audio, 2 * plain)


def test_an_epoch_holds_every_example_once_within_the_budget(tokenizer):
    batches = batches_of(ROWS, tokenizer, budget=300)
    groups = batches.groups(epoch=3)
    drawn = [example for group in groups for example in group]
    assert len(drawn) == len(set(drawn)) == 2 * len(ROWS)
    assert all(len(g) * max(map(batches.size_of, g)) <= 300 for g in groups) and len(groups) < 40
    assert batches.groups(3) == groups != batches.groups(4)


def test_a_clip_that_fails_is_left_out_of_its_batch_and_reported(tmp_path, tokenizer):
    good = Row(write(tmp_path / "good.wav", tone(300, 16000)), "un", "one", "fr", "en", 0.2)
    bad = Row(tmp_path / "bad.wav", "deux", "two", "fr", "en", 0.2)
    bad.path.write_bytes(b"no audio at all")
    long = Row(write(tmp_path / "long.wav", np.zeros(31 * 16000)), "un", "one", "fr", "en", 0.2)
    batches = batches_of([good, bad, long], tokenizer)
    examples = [Example(row, "st") for row in (bad, good, long)] + [Example(bad, "asr")]
    batch = batches.load(examples)
    single = data.collate([Example(good, "st")], tokenizer, "llama2")
    assert batch.ids.tolist() == single.ids.tolist() and len(batch.audio) == 1
    assert list(batches.skipped) == [bad.path, long.path]
    assert "not a format" in batches.skipped[bad.path]
    assert "over 30 s; correct its seconds" in batches.skipped[long.path]
    assert batches.load([Example(bad, "st")]) is None
