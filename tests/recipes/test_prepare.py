"""Preparing data: what is broken is counted and left out, and nothing half-written is ever read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import soundfile

from asr_exit.checkpoint import save_model
from asr_exit.config import FeatureConfig
from asr_exit.data import FeatureStore
from asr_exit.encoder import Encoder
from asr_exit.errors import ConfigError
from asr_exit.features import log_mel
from asr_exit.tokenizer import Tokenizer
from asr_exit.train import Trainer
from recipes.librispeech.configs import tiny
from recipes.librispeech.corpora import read_librispeech, read_manifest
from recipes.librispeech.prepare import main, prepare
from recipes.librispeech.shards import ShardJob, pack
from tests.recipes.sine import RATE_HERTZ, SENTENCES, speak, write_librispeech

VOCABULARY = 40


def arguments(speech: Path, out: Path) -> list[str]:
    sources = ["--librispeech", str(speech), "--subsets", "sine", "--out", str(out)]
    return [*sources, "--vocab-size", str(VOCABULARY), "--processes", "1"]


@pytest.fixture
def damaged(tmp_path: Path) -> Path:
    """Eight clips of which four are good: one is no audio, one cut to nothing, one NaN, one without a transcript."""
    chapter = write_librispeech(tmp_path / "speech", "sine")
    (chapter / "1-2-0000.flac").write_bytes(b"this is no recording" * 50)
    whole = (chapter / "1-2-0001.flac").read_bytes()
    (chapter / "1-2-0001.flac").write_bytes(whole[:20])
    (chapter / "1-2-0002.flac").unlink()
    soundfile.write(chapter / "1-2-0002.wav", np.full(RATE_HERTZ, np.nan, np.float32), RATE_HERTZ, subtype="FLOAT")
    lines = (chapter / "1-2.trans.txt").read_text().splitlines(keepends=True)
    (chapter / "1-2.trans.txt").write_text("".join([*lines[:3], *lines[4:], "1-2-0099 NEVER RECORDED\n"]))
    soundfile.write(chapter / "1-2-0007.flac", speak("a")[:2000], RATE_HERTZ)
    return tmp_path / "speech"


def test_broken_clips_are_counted_and_left_out(damaged: Path, tmp_path: Path) -> None:
    main(arguments(damaged, tmp_path / "data"))
    found = json.loads((tmp_path / "data" / "data.json").read_text())["train"]["sine"]
    assert found["clips"] == 3
    assert found["skipped"] == {"does not decode": 3, "no transcript": 1, "no audio": 1, "too short": 1}
    store = FeatureStore(tmp_path / "data" / "train")
    assert {clip.text for clip in store.clips} == set(SENTENCES[4:7])
    assert sorted({clip.speed for clip in store.clips}) == [0.9, 1.0, 1.1]


def test_stored_features_are_those_of_the_recording(speech: Path, data: Path) -> None:
    store = FeatureStore(data / "dev")
    clip = next(clip for clip in store.clips if clip.utterance_id == "1-2-0003")
    samples, _ = soundfile.read(speech / "sine" / "1" / "2" / "1-2-0003.flac", dtype="float32")
    np.testing.assert_allclose(store.features(clip), log_mel(samples), rtol=1e-3)


def test_statistics_describe_the_training_frames(data: Path) -> None:
    description = json.loads((data / "data.json").read_text())
    frames = np.concatenate([FeatureStore(data / "dev").shards[0].astype(np.float64)])  # equals train at speed 1
    np.testing.assert_allclose(description["feature_mean"], frames.mean(axis=0), rtol=1e-3)
    np.testing.assert_allclose(description["feature_std"], frames.std(axis=0), rtol=1e-2)


def test_a_full_disk_leaves_nothing_that_counts(speech: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(file: object, array: np.ndarray) -> None:
        file.write(array.tobytes()[:1000])  # type: ignore[attr-defined]
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(np, "save", full)
    corpus = read_librispeech(speech / "sine")
    job = ShardJob("sine-0000", "sine", corpus.utterances, (1.0,), tmp_path, FeatureConfig())
    with pytest.raises(OSError, match="No space"):
        pack(job)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(ConfigError, match="no feature shards"):
        FeatureStore(tmp_path)


def test_an_interrupted_second_preparation_is_not_taken_for_the_first(speech: Path, tmp_path: Path) -> None:
    main(arguments(speech, tmp_path))
    with pytest.raises(ConfigError, match="pieces"):  # fails after the shards, before the end
        prepare(tmp_path, [read_librispeech(speech / "sine")], vocab_size=5000, processes=1)
    with pytest.raises(ConfigError, match="no finished data"):
        Trainer(tiny(), tmp_path, tmp_path / "run")


def test_shards_without_an_index_are_invisible(speech: Path, tmp_path: Path) -> None:
    main(arguments(speech, tmp_path))
    before = len(FeatureStore(tmp_path / "train").clips)
    np.save(tmp_path / "train" / "sine-0001-x100.npy", np.zeros((7, 80), np.float16))
    (tmp_path / "train" / ".sine-0002-x100.json.99.tmp").write_text("{")
    assert len(FeatureStore(tmp_path / "train").clips) == before


def test_the_tokenizer_of_a_model(speech: Path, tmp_path: Path) -> None:
    taken = Tokenizer.train(SENTENCES, 30)
    config = replace(tiny().model, vocab_size=30)
    save_model(tmp_path / "model.safetensors", config, Encoder(config).state_dict(), taken)
    sources = ["--librispeech", str(speech), "--subsets", "sine", "--out", str(tmp_path / "data"), "--processes", "1"]
    main([*sources, "--tokenizer-of", str(tmp_path / "model.safetensors")])
    assert (tmp_path / "data" / "tokenizer.model").read_bytes() == taken.proto
    assert json.loads((tmp_path / "data" / "data.json").read_text())["vocab_size"] == 30
    with pytest.raises(SystemExit, match=r"no model file at .*elsewhere"):  # before anything is packed
        main([*sources, "--out", str(tmp_path / "other"), "--tokenizer-of", str(tmp_path / "elsewhere")])
    assert not (tmp_path / "other").exists()
    with pytest.raises(SystemExit):
        main([*sources, "--tokenizer-of", str(tmp_path / "model.safetensors"), "--vocab-size", "40"])


def test_nothing_usable_says_what_to_change(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for folder in (tmp_path / "nowhere", tmp_path):
        with pytest.raises(SystemExit, match=r"prepare: .*sine"):
            main(arguments(folder, tmp_path / "data"))
    chapter = write_librispeech(tmp_path / "speech", "sine", SENTENCES[:2])
    for path in chapter.glob("*.flac"):
        path.write_bytes(b"broken")
    with pytest.raises(SystemExit, match="no training clip could be decoded"):
        main(arguments(tmp_path / "speech", tmp_path / "data"))
    assert "Traceback" not in capsys.readouterr().err


def test_manifest_rows_and_columns(tmp_path: Path) -> None:
    soundfile.write(tmp_path / "a.wav", speak("hello"), RATE_HERTZ)
    manifest = tmp_path / "manifest.tsv"
    rows = ["utt_id\tspeaker_id\trel_path\tseconds\ttranscript", 'a\ts\ta.wav\t1\tHello, "you"!']
    manifest.write_text("\n".join([*rows, "b\ts\tmissing.wav\t1\tTEXT", "c\ts\ta.wav\t1\t..."]) + "\n")
    corpus = read_manifest(manifest, "mine")
    assert [utterance.text for utterance in corpus.utterances] == ["hello you"]
    assert corpus.skipped == {"no audio": 1, "no transcript": 1}
    manifest.write_text("utt_id\trel_path\n")
    with pytest.raises(ConfigError, match="speaker_id, transcript"):
        read_manifest(manifest)
