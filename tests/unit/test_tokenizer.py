"""Text normalisation and pieces."""

from __future__ import annotations

import pytest

from asr_exit.errors import CheckpointError, ConfigError
from asr_exit.tokenizer import ALPHABET, BLANK_ID, Tokenizer, normalise

LINES = ["the quick brown fox jumps over the lazy dog", "pack my box with five dozen jugs", "it's the dog's box"] * 5


@pytest.fixture(scope="module")
def tokenizer() -> Tokenizer:
    return Tokenizer.train(LINES, vocab_size=48)


@pytest.mark.parametrize(
    ("raw", "clean"),
    [
        ("HELLO, World!", "hello world"),
        ("don’t  STOP", "don't stop"),
        ("'' a '", "a"),
        ("well-known\tthing\n", "well known thing"),
        ("42", ""),
        ("", ""),
    ],
)
def test_normalise(raw: str, clean: str) -> None:
    assert normalise(raw) == clean
    assert normalise(clean) == clean


def test_round_trip(tokenizer: Tokenizer) -> None:
    for line in [*LINES, "zebra", "q'z"]:
        ids = tokenizer.encode(line)
        assert BLANK_ID not in ids
        assert tokenizer.decode(ids) == line


def test_every_letter_has_a_piece_even_if_never_seen() -> None:
    tokenizer = Tokenizer.train(["aaa bbb ab ba"] * 3, vocab_size=34)
    assert BLANK_ID not in tokenizer.encode(ALPHABET)


def test_decode_skips_blanks(tokenizer: Tokenizer) -> None:
    ids = tokenizer.encode("the fox")
    assert tokenizer.decode([0, *ids, 0]) == "the fox"


def test_proto_rebuilds_the_same_pieces(tokenizer: Tokenizer) -> None:
    again = Tokenizer(tokenizer.proto)
    assert again.pieces == tokenizer.pieces
    assert again.vocab_size == 48 == len(again.pieces)


def test_too_little_text_is_refused() -> None:
    with pytest.raises(ConfigError, match="no text"):
        Tokenizer.train(["123", ""])
    with pytest.raises(ConfigError, match="smaller vocabulary"):
        Tokenizer.train(["a b"], vocab_size=500)


def test_foreign_model_is_refused() -> None:
    with pytest.raises(CheckpointError):
        Tokenizer(b"not a model")
