"""Words found in recordings, and sentences put together from them."""

from __future__ import annotations

import dataclasses
import itertools
import json
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from asr_exit.checkpoint import Model
from asr_exit.data import FeatureStore
from recipes.librispeech import shards, splice
from recipes.librispeech.alignment import Aligned, lateness, token_frames
from tests.recipes.sine import LETTER_FRAMES, SENTENCES

NEW = ("the red cat sat on the street", "ten dog men can see the moon at dawn", "read no note in the dry barn")


def sounding(text: str) -> list[tuple[float, float]]:
    """Feature frames in which each word of a sentence sounds."""
    found, at = [], 1
    for word in text.split():
        found.append((LETTER_FRAMES * at, LETTER_FRAMES * (at + len(word))))
        at += len(word) + 1
    return found


def test_viterbi_equals_the_best_of_all_paths() -> None:
    rng = np.random.default_rng(0)
    for tokens in ((1, 2), (1, 1), (2,), (1, 2, 1)):
        scores = rng.normal(size=(6, 3))
        log_probs = scores - np.log(np.exp(scores).sum(axis=1, keepdims=True))
        best: tuple[float, tuple[int, ...]] = (-np.inf, ())
        for path in itertools.product(range(3), repeat=6):
            merged = [label for label, _ in itertools.groupby(path) if label != 0]
            if tuple(merged) == tokens:
                best = max(best, (sum(log_probs[t, label] for t, label in enumerate(path)), path))
        spans, at = [], 0
        for label, run in itertools.groupby(best[1]):
            length = len(list(run))
            if label:
                spans.append((at, at + length - 1))
            at += length
        assert token_frames(log_probs, tokens) == spans


def test_tokens_that_do_not_fit_are_told() -> None:
    log_probs = np.log(np.full((3, 4), 0.25))
    assert token_frames(log_probs, (1, 2, 3)) == [(0, 0), (1, 1), (2, 2)]
    assert token_frames(log_probs, (1, 1, 2)) is None  # needs a blank between equal labels
    assert token_frames(log_probs, (1, 2, 3, 1)) is None


def test_words_are_cut_in_their_pauses(model: Model, data: Path) -> None:
    voices = splice.find_words(model, FeatureStore(data / "train", model.tokenizer), 20)
    assert list(voices) == ["1"]
    assert len(voices["1"].places) == len(SENTENCES)
    for place in voices["1"].places:
        spans = sounding(" ".join(place.words))
        for number, (first, last) in enumerate(spans):
            assert place.cuts[number] <= first + 2, (place.words, number)  # windows reach over two frames
            assert place.cuts[number + 1] >= last - 2, (place.words, number)
            assert number == 0 or place.cuts[number] >= spans[number - 1][1] - 2


def test_a_late_model_is_found_out() -> None:
    """A word is 20 loud frames, a pause 10 silent ones; the tokens show in the word's last third, and later."""
    mel = np.tile(np.concatenate([np.full((20, 4), 10.0), np.zeros((10, 4))]), (5, 1))
    for by in (0, 6, 12):
        words = tuple(((30 * i + 10 + by) // 2, (30 * i + 10 + by) // 2) for i in range(5))
        late = lateness([Aligned(mel, words)], 2)
        cuts = Aligned(mel, words).cuts(2, late)
        assert all(mel[cut].max() == 0 for cut in cuts[1:-1])


def test_new_sentences_from_known_words(
    model: Model, model_file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (tmp_path / "text.txt").write_text("\n".join(NEW))
    common = ["--data", str(folder), "--text", str(tmp_path / "text.txt"), "--model", str(model_file)]
    splice.main([*common, "--hours", "0.03", "--min-words", "20"])
    assert "1 speakers" in capsys.readouterr().out
    store = FeatureStore(folder / "train", model.tokenizer)
    clips = [clip for clip in store.clips if clip.corpus == "spliced"]
    assert json.loads((folder / "data.json").read_text())["train"]["spliced"]["clips"] == len(clips) > 5
    assert 0.03 * 360_000 <= sum(clip.frames for clip in clips) <= 0.03 * 360_000 + 1500
    for clip in clips:
        said = clip.text
        while said:  # whole sentences of the text, one after the other
            sentence = next(text for text in NEW if said.startswith(text))
            said = said[len(sentence) :].lstrip()
        letters = len(clip.text.replace(" ", ""))
        assert LETTER_FRAMES * letters / 1.1 - 20 <= clip.frames <= LETTER_FRAMES * 3 * letters / 0.9
    made = {file.name: file.read_bytes() for file in (folder / "train").glob("spliced*")}
    splice.main([*common, "--hours", "0.03", "--min-words", "20"])  # instead of what is there, and made from the rest
    assert {file.name: file.read_bytes() for file in (folder / "train").glob("spliced*")} == made
    (tmp_path / "text.txt").write_text("zebras quietly juggle quartz pyxes")
    with pytest.raises(SystemExit, match="too few"):
        splice.main([*common, "--hours", "0.03", "--min-words", "20"])  # what is there stays
    assert {file.name: file.read_bytes() for file in (folder / "train").glob("spliced*")} == made
    assert not [file for file in (folder / "train").iterdir() if file.name.startswith(".")]


def test_a_failure_half_way_leaves_the_earlier_shards(tmp_path: Path) -> None:
    def utterances(count: int, fails: bool) -> Iterator[tuple[str, str, np.ndarray]]:
        for _ in range(count):
            yield "1", "a dog", np.full((300_000, 4), count, np.float16)  # a shard each
        if fails:
            raise OSError(28, "No space left on device")

    def files() -> dict[str, bytes]:
        return {file.name: file.read_bytes() for file in tmp_path.iterdir()}

    assert shards.write_corpus(tmp_path, "spliced", utterances(3, fails=False)) == (3, 2.5)
    before = files()
    with pytest.raises(OSError, match="No space"):
        shards.write_corpus(tmp_path, "spliced", utterances(2, fails=True))
    assert files() == before
    shards.write_corpus(tmp_path, "spliced", utterances(2, fails=False))  # fewer: none of the earlier ones stays
    assert sorted(files()) == sorted(f"spliced-000{i}-x100.{kind}" for i in (0, 1) for kind in ("json", "npy"))
    assert FeatureStore(tmp_path).features(FeatureStore(tmp_path).clips[1])[0, 0] == 2


def test_speeds_that_only_some_recordings_have_are_left_out(model: Model, data: Path) -> None:
    voice = splice.find_words(model, FeatureStore(data / "train", model.tokenizer), 20)["1"]
    first = dataclasses.replace(voice.places[0], copies={1.0: voice.places[0].copies[1.0]})
    voices = {"1": splice.Phrases([first, *voice.places[1:]])}
    store = FeatureStore(data / "train", model.tokenizer)
    assert len(list(splice.compose(store, voices, NEW, 0.01, seed=0))) > 1


def test_phrases_are_long_and_missing_words_borrowed() -> None:
    def place(text: str) -> splice.Place:
        return splice.Place({}, tuple(text.split()), np.arange(len(text.split()) + 1))

    own = splice.Phrases([place("the dog ran to the red barn"), place("a red cat")])
    anyone = splice.Phrases([*own.places, place("green cats ran away")])
    rng = np.random.default_rng(0)
    line, greener = "so the dog ran to green barn zebra the cat", "green cats ran away the dog"
    runs = list(splice.stretches(line.split(), own, anyone))
    assert runs == [("the", "dog", "ran", "to", "green", "barn")]  # nobody said so or zebra; the cat is too short
    assert not list(splice.stretches(greener.split(), own, anyone))  # borrows too much
    pieces = [
        p.words[a:b] for p, a, b in splice.pieces_of(("dog", "ran", "to", "green", "red", "cat"), own, anyone, rng)
    ]
    assert pieces == [("dog", "ran", "to"), ("green",), ("red", "cat")]


def test_pieces_get_one_spectrum_and_the_speed_asked_for(data: Path, model: Model) -> None:
    store = FeatureStore(data / "train", model.tokenizer)
    voice = splice.find_words(model, store, 20)["1"]
    pieces = [(voice.places[0], 0, 2), (voice.places[1], 1, 3)]
    for speed in (0.9, 1.1):
        first, second = (store.features(p.copies[speed]).astype(np.float32) for p, _, _ in pieces)
        (a, b), (c, d) = ((round(p.cuts[i] / speed), round(p.cuts[j] / speed)) for p, i, j in pieces)
        joined = splice.splice(store, pieces, speed)
        expected = np.concatenate([first[a:b], second[c:d] + first.mean(axis=0) - second.mean(axis=0)])
        assert joined.shape == expected.shape
        assert float(np.abs(joined - expected).max()) < 0.02  # float16


def test_what_is_missing_is_named(model: Model, model_file: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("\n".join(NEW))
    common = ["--data", str(data), "--text", str(tmp_path / "text.txt"), "--model", str(model_file)]
    with pytest.raises(SystemExit, match="--min-words"):
        splice.main([*common, "--min-words", "1000"])
    (tmp_path / "text.txt").write_text("zebras quietly juggle quartz pyxes")
    with pytest.raises(SystemExit, match="too few of the text's words"):
        splice.main([*common, "--min-words", "20"])
    with pytest.raises(SystemExit, match="no text at"):
        splice.main([*common[:3], str(tmp_path / "none.txt"), *common[4:]])
    assert not list((data / "train").glob("spliced*"))
