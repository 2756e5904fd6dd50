"""Transcripts by a model: only sure ones, as a manifest that prepare reads; and word errors of every exit."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_exit.checkpoint import load
from asr_exit.recognizer import Recognizer
from recipes.librispeech import bundle, evaluate, lm, prepare, pseudo_label
from recipes.librispeech.corpora import read_manifest
from tests.recipes.sine import RATE_HERTZ, SENTENCES, speak, write_librispeech


@pytest.fixture(scope="module")
def model_file(tiny_run: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("model") / "tiny.safetensors"
    bundle.main(["--run", str(tiny_run), "--out", str(out)])
    return out


@pytest.fixture(scope="module")
def sine_lm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("lm")
    (folder / "text.txt").write_text("\n".join(SENTENCES))
    lm.main(["--text", str(folder / "text.txt"), "--min-count", "1", "--prune", "0", "--out", str(folder / "lm.bin")])
    return folder / "lm.bin"


@pytest.fixture
def unlabelled(tmp_path: Path) -> Path:
    """Eight sentences the model knows, one clip of noise, one too short, one broken; no transcripts."""
    chapter = write_librispeech(tmp_path / "speech", "unlabelled")
    (chapter / "1-2.trans.txt").unlink()
    noise = 0.3 * np.random.default_rng(0).standard_normal(3 * RATE_HERTZ)
    soundfile.write(chapter / "1-2-0100.flac", noise, RATE_HERTZ)
    soundfile.write(chapter / "1-2-0101.flac", speak("a")[:2000], RATE_HERTZ)
    (chapter / "1-2-0102.flac").write_bytes(b"broken")
    return tmp_path / "speech" / "unlabelled"


def test_sure_recordings_become_training_data(
    model_file: Path, unlabelled: Path, sine_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "pseudo" / "manifest.tsv"
    common = ["--model", str(model_file), "--audio", str(unlabelled), "--out", str(out), "--chunk-ms", "640"]
    for extra in ([], ["--lm", str(sine_lm)]):
        pseudo_label.main([*common, "--threshold", "0.8", *extra])
        assert "8 of 11 recordings" in capsys.readouterr().out
        found = read_manifest(out)
        assert {utterance.text for utterance in found.utterances} == set(SENTENCES)
        assert {utterance.speaker for utterance in found.utterances} == {"1"}
        assert found.skipped == {}
        made_by = json.loads(out.with_suffix(".json").read_text())
        assert made_by["skipped"] == {"does not decode": 1, "too short": 1, "not sure enough": 1}
        assert made_by["language_model"] == (sine_lm.name if extra else None)
    with out.open() as lines:
        assert all(float(row["confidence"]) >= 0.8 for row in csv.DictReader(lines, delimiter="\t"))
    data = tmp_path / "data"
    prepare.main(["--manifest", str(out), "--out", str(data), "--vocab-size", "40", "--processes", "1"])
    assert json.loads((data / "data.json").read_text())["train"]["pseudo"]["clips"] == 8

    pseudo_label.main([*common, "--threshold", "1"])
    assert "0 of 11 recordings" in capsys.readouterr().out
    assert out.read_text().count("\n") == 1


def test_what_cannot_be_labelled_is_refused(model_file: Path, tmp_path: Path) -> None:
    common = ["--model", str(model_file), "--audio", str(tmp_path), "--out", str(tmp_path / "m.tsv")]
    with pytest.raises(SystemExit, match="no recordings"):
        pseudo_label.main(common)
    with pytest.raises(SystemExit, match="--threshold 2 must be"):
        pseudo_label.main([*common, "--threshold", "2"])
    assert not (tmp_path / "m.tsv").exists()


def test_evaluate_reads_every_exit_as_streaming_does(
    model_file: Path, speech: Path, sine_lm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    arguments = ["--model", str(model_file), "--librispeech", str(speech), "--subset", "sine"]
    arguments += ["--chunk-ms", "640,0", "--decoders", "greedy,beam,lm", "--lm", str(sine_lm), "--every", "2"]
    evaluate.main([*arguments, "--json", str(tmp_path / "rows.json")])
    rows = json.loads((tmp_path / "rows.json").read_text())
    assert [(row["chunk_ms"], row["decoder"], row["exit_layer"]) for row in rows] == [
        (chunk, decoder, layer) for chunk in (640, 0) for decoder in ("greedy", "beam", "lm") for layer in (2, 4)
    ]
    assert all(row["low"] <= row["wer"] <= row["high"] for row in rows)
    assert all(row["words"] == sum(len(text.split()) for text in SENTENCES[::2]) for row in rows)
    last = next(row for row in rows if row["decoder"] == "greedy" and row["exit_layer"] == 4)
    recognizer = Recognizer(load(model_file))
    assert [recognizer.transcribe(speak(text, 2 * n)).text for n, text in enumerate(SENTENCES[::2])] == list(
        SENTENCES[::2]
    )
    assert last["wer"] == 0
    assert "whole" in capsys.readouterr().out


def test_evaluate_refuses_what_does_not_fit(model_file: Path, speech: Path) -> None:
    corpus = ["--model", str(model_file), "--librispeech", str(speech), "--subset", "sine"]
    for arguments, message in (
        (["--manifest", "x.tsv"], "either --librispeech"),
        (["--exits", "3"], "no exit after layer 3; there are 2, 4"),
        (["--decoders", "best"], "unknown decoder 'best'"),
        (["--decoders", "lm"], "belong together"),
        (["--chunk-ms", "fast"], "not a whole number"),
        (["--every", "0"], "--every from 1"),
    ):
        with pytest.raises(SystemExit, match=message):
            evaluate.main([*corpus, *arguments])
