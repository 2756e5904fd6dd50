"""Prepared sine speech and a tiny model trained on it, once for all recipe tests."""

from __future__ import annotations

import stat
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from asr_exit.checkpoint import Model, load
from asr_exit.features import log_mel
from asr_exit.tokenizer import BLANK_ID
from recipes.librispeech import alignment, bundle, prepare, train
from tests.recipes.sine import LETTER_FRAMES, SENTENCES, speak, write_librispeech

NAMES = {"c": "k", "e": "E", "i": "I", "o": "O:", "u": "U", "x": "Q~", "y": "j"}  # letters that are no phones
SPEAKING = """
import sys
names = {names!r}
for word in sys.stdin.read().split():
    print("'" + "_".join(names.get(letter, letter) for letter in word if letter != "q"))
"""
LATE = 12  # feature frames by which `model` shows its tokens late


@pytest.fixture(scope="session")
def speech(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder with the subset "sine" in the LibriSpeech layout."""
    folder = tmp_path_factory.mktemp("speech")
    write_librispeech(folder, "sine")
    return folder


@pytest.fixture(scope="session")
def data(speech: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """`speech` prepared; the held-out set is the training set."""
    out = tmp_path_factory.mktemp("data")
    sources = ["--librispeech", str(speech), "--subsets", "sine", "--dev", "sine"]
    prepare.main([*sources, "--out", str(out), "--vocab-size", "40", "--processes", "1"])
    return out


@pytest.fixture(scope="session")
def tiny_run(data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the configuration `tiny`, trained until it knows its eight sentences."""
    out = tmp_path_factory.mktemp("run")
    arguments = ["--data", str(data), "--out", str(out), "--config", "tiny", "--hours", "0.9", "--threads", "1"]
    train.main(arguments)
    return out


@pytest.fixture(scope="session")
def model_file(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    bundle.main(["--run", str(tiny_run), "--out", str(out)])
    return out


@pytest.fixture
def model(model_file: Path, monkeypatch: pytest.MonkeyPatch) -> Model:
    """Its posteriors are made by hand: a model of eight sentences knows them by heart and hears no words."""
    loaded = load(model_file)
    known = {text: log_mel(speak(text), loaded.config.features) for text in SENTENCES}

    def text_of(mel: np.ndarray) -> str:
        fitting = [text for text, clean in known.items() if len(clean) == len(mel)]
        return min(fitting, key=lambda text: float(np.abs(known[text] - mel).mean()))

    def show(_: Model, features: Sequence[np.ndarray]) -> list[np.ndarray]:
        return [spikes(loaded, text_of(mel), len(mel)) for mel in features]

    monkeypatch.setattr(alignment, "offline_log_probs", show)
    return loaded


def spikes(model: Model, text: str, frames: int) -> np.ndarray:
    """Log-posteriors in which each piece shows `LATE` frames after the middle of its letters."""
    factor, at = model.config.subsampling, -1  # the mark of the first word is the silence before it
    probabilities = np.full((-(-frames // factor), model.config.vocab_size), 1e-4)
    probabilities[:, BLANK_ID] = 1.0
    for token in model.tokenizer.encode(text):
        letters = len(model.pieces[token])
        frame = int((LETTER_FRAMES * (1 + at + letters / 2) + LATE) / factor)
        probabilities[min(len(probabilities) - 1, frame), [BLANK_ID, token]] = 1e-4, 1.0
        at += letters
    return np.log(probabilities / probabilities.sum(axis=1, keepdims=True))


@pytest.fixture
def espeak(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A stand-in for espeak-ng that spells; and no weak forms, since these voices spell them, too."""
    program = tmp_path / "bin" / "espeak-ng"
    program.parent.mkdir()
    program.write_text(f"#!{sys.executable}\n{SPEAKING.format(names=NAMES)}")
    program.chmod(program.stat().st_mode | stat.S_IXUSR)
    monkeypatch.setenv("PATH", str(program.parent), prepend=":")
    monkeypatch.setattr("recipes.librispeech.lexicon.WEAK_FORMS", {})
