"""Packed n-gram models: the textbook's probabilities, files, and what is refused."""

from __future__ import annotations

import gzip
import itertools
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from asr_exit.arpa import read_arpa
from asr_exit.errors import CheckpointError
from asr_exit.ngram import NgramModel, load_ngram_model
from tests.unit.arpa_text import ARPA, parse, textbook_log_prob

WORDS = ("<s>", "</s>", "a", "ab", "ba", "b", "zebra")


@pytest.fixture
def model(tmp_path: Path) -> NgramModel:
    (tmp_path / "small.arpa").write_text(ARPA)
    return read_arpa(tmp_path / "small.arpa")


def assert_equals_the_textbook(model: NgramModel) -> None:
    table = parse(ARPA)
    for length in range(4):
        for context in itertools.product(WORDS, repeat=length):
            numbers = tuple(map(model.index, context))
            for word in WORDS[1:]:
                want = textbook_log_prob(table, context, word)
                assert model.log_prob(numbers, model.index(word)) == pytest.approx(want, rel=2e-3), (context, word)


def test_arpa_and_packed_file_give_the_textbook_probabilities(model: NgramModel, tmp_path: Path) -> None:
    assert model.order == 3
    assert_equals_the_textbook(model)
    model.save(tmp_path / "lm.bin")
    packed = load_ngram_model(tmp_path / "lm.bin")
    assert_equals_the_textbook(packed)
    assert (packed.words, packed.provenance) == (model.words, {"source": "small.arpa"})
    assert not packed.levels[1].log_prob.flags.writeable  # the file itself, not a copy
    with gzip.open(tmp_path / "small.arpa.gz", "wt") as file:
        file.write(ARPA)
    assert_equals_the_textbook(load_ngram_model(tmp_path / "small.arpa.gz"))


def test_upper_case_arpa_is_read_in_lower_case(tmp_path: Path) -> None:
    (tmp_path / "upper.arpa").write_text(ARPA.replace("ba", "BA").replace("ab", "AB").replace("<s>", "<S>"))
    assert_equals_the_textbook(load_ngram_model(tmp_path / "upper.arpa"))


def test_missing_special_words_are_added_as_impossible_ones(tmp_path: Path) -> None:
    (tmp_path / "x.arpa").write_text("\\data\\\nngram 1=2\n\n\\1-grams:\n-0.5\ta\n-0.2\t</s>\n\n\\end\\\n")
    model = load_ngram_model(tmp_path / "x.arpa")
    assert model.order == 1
    assert model.log_prob((model.index("a"),), model.index("a")) == pytest.approx(-0.5 * np.log(10))
    assert model.log_prob((), model.index("dog")) < -200


def test_sentences_and_lookahead(model: NgramModel) -> None:
    table = parse(ARPA)
    want = sum(
        textbook_log_prob(table, context, word)
        for context, word in [(("<s>",), "ba"), (("<s>", "ba"), "zebra"), (("ba", "zebra"), "</s>")]
    )
    assert model.sentence_log_prob(["ba", "zebra"]) == pytest.approx(want, rel=2e-3)
    assert model.best_log_prob("a") == pytest.approx(-0.7 * np.log(10))
    assert model.best_log_prob("ab") == pytest.approx(-0.8 * np.log(10))
    assert model.best_log_prob("abc") == -np.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda text: text.replace("ngram 2=5", "ngram 2=6"), "5 n-grams of 2 words instead of 6"),
        (lambda text: text.replace("-0.5\t<s> a\t-0.25", "-0.5\t<s> b\t-0.25"), "first words"),
        (lambda text: text.replace("-0.6\tba a", "-0.6\tba cat"), "cat"),
        (lambda text: text.replace("-0.6\tba a", "-0.6\tba"), "no n-gram of 2 words"),
        (lambda text: text.replace("-1.5", "much"), "much"),
        (lambda text: "", "no .data. section"),
    ],
)
def test_damaged_arpa_files_are_refused(change, message: str, tmp_path: Path) -> None:
    (tmp_path / "bad.arpa").write_text(change(ARPA))
    with pytest.raises(CheckpointError, match=message):
        load_ngram_model(tmp_path / "bad.arpa")


def test_the_bundled_model_knows_english() -> None:
    model = load_ngram_model("bundled")
    assert model.order == 3
    assert {"books_normalised.txt.xz", "librispeech_train_word_counts.txt.gz"} == set(model.provenance["sources"])
    words = ["there", "was", "a", "man", "at", "the", "door"]
    assert model.sentence_log_prob(words) > model.sentence_log_prob(words[::-1]) + 10
    assert model.index("captain") != model.unknown == model.index("qwzx")


def test_damaged_packed_files_are_refused(model: NgramModel, tmp_path: Path) -> None:
    path = tmp_path / "lm.bin"
    with pytest.raises(CheckpointError, match="no language model at"):
        load_ngram_model(path)
    model.save(path)
    assert [item.name for item in tmp_path.iterdir() if item.name.endswith(".partial")] == []
    whole = path.read_bytes()
    for cut in (0, 5, 40, len(whole) - 3):
        path.write_bytes(whole[:cut])
        with pytest.raises(CheckpointError, match="not a readable language model"):
            load_ngram_model(path)
    path.write_bytes(whole)
    tensors = load_file(path)
    save_file(tensors, path)
    with pytest.raises(CheckpointError, match="no language model of the format"):
        load_ngram_model(path)
    for name, value in (("2.first", tensors["2.first"][::-1].copy()), ("2.word", tensors["2.word"] + 100)):
        save_file(tensors | {name: value}, path, {"format": "asr-exit-lm/1", "order": "3", "provenance": "{}"})
        with pytest.raises(CheckpointError, match="damaged"):
            load_ngram_model(path)
