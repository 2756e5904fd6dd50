"""Prepared sine speech and a tiny model trained on it, once for all recipe tests."""

from __future__ import annotations

from pathlib import Path

import pytest

from recipes.librispeech import prepare, train
from tests.recipes.sine import write_librispeech


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
