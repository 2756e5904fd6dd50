"""A lexicon of the training data's words, and a run that tells their phones apart on the way."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from asr_exit.errors import ConfigError
from asr_exit.phones import LEXICON, read_lexicon
from asr_exit.schedule import TrainConfig
from asr_exit.train import Trainer
from recipes.librispeech import lexicon
from recipes.librispeech.ablate import lacking
from tests.recipes.conftest import NAMES
from tests.recipes.sine import SENTENCES
from tests.recipes.test_tiny import state_of
from tests.recipes.worker import short_config

UPDATES = 8


def config_of(**changes: object) -> TrainConfig:
    return short_config(hours=10.0, phone_weight=0.5, phone_segment=1, evaluate_utterances=1, **changes)


@pytest.fixture
def spoken(data: Path, tmp_path: Path, espeak: None) -> Path:
    """The prepared data with a lexicon beside it."""
    folder = tmp_path / "data"
    folder.mkdir()
    for item in data.iterdir():
        (folder / item.name).symlink_to(item)
    with pytest.raises(ConfigError, match=LEXICON):
        Trainer(config_of(), folder, tmp_path / "none")
    assert lacking("phones at exit 4", config_of(), folder) == "pronunciations (lexicon)"
    lexicon.main(["--data", str(folder)])
    return folder


def test_the_lexicon_holds_the_words_of_the_data(spoken: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = {word for text in SENTENCES for word in text.split()}
    assert read_lexicon(spoken) == {word: tuple(NAMES.get(letter, letter) for letter in word) for word in words}
    assert lacking("phones at exit 4", config_of(), spoken) == ""
    with pytest.raises(SystemExit, match="no feature shards"):
        lexicon.main(["--data", str(spoken / "nowhere")])


def test_phones_are_learned_resumed_to_the_last_bit_and_not_exported(spoken: Path, tmp_path: Path) -> None:
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    Trainer(config_of(), spoken, whole, max_updates=UPDATES).run()
    Trainer(config_of(), spoken, parts, max_updates=UPDATES // 2).run()
    again = Trainer(config_of(), spoken, parts, max_updates=UPDATES)
    again.resume()
    again.run()
    (tensors, progress), (expected, expected_progress) = state_of(parts), state_of(whole)
    torch.testing.assert_close(tensors, expected, rtol=0, atol=0)
    assert progress == expected_progress
    ours, theirs = (torch.load(run / "state.pt", weights_only=True)["phones"] for run in (parts, whole))
    torch.testing.assert_close(ours, theirs, rtol=0, atol=0)
    assert float(theirs["head.out.weight"].abs().max()) > 0
    lines = [json.loads(line) for line in (whole / "log.jsonl").read_text().splitlines()]
    assert any(line.get("phone_loss", 0) > 0 for line in lines)
    assert set(load_file(whole / "ema.safetensors")) == set(again.model.state_dict())


def test_without_the_switch_nothing_changes(spoken: Path, tmp_path: Path) -> None:
    plain = Trainer(short_config(hours=10.0), spoken, tmp_path / "a")
    other = Trainer(config_of(), spoken, tmp_path / "b")
    torch.testing.assert_close(plain.model.state_dict(), other.model.state_dict(), rtol=0, atol=0)
    assert plain.phones is None
