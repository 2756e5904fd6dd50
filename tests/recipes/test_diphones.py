"""Pronunciations, phones found in recordings, and new sentences put together from pieces of them."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from asr_exit.checkpoint import Model
from asr_exit.config import FeatureConfig
from asr_exit.data import Clip, FeatureStore
from asr_exit.errors import ConfigError
from asr_exit.features import log_mel
from recipes.librispeech import diphones
from recipes.librispeech.diphones import Recording, Speaker, Voice, passages, phones_of_passage
from recipes.librispeech.lexicon import WEAK_FORMS, phones_of, pronounce
from recipes.librispeech.phone_alignment import SILENCE, PhoneAligner, Spoken, graph_of, viterbi
from tests.recipes.conftest import NAMES
from tests.recipes.sine import LETTER_FRAMES, SENTENCES, speak

NEW = ("the mean red cat ran at dawn", "no honest mirth can tread the north street", "tea and a sweet dish")


def spelled(word: str) -> tuple[str, ...]:
    return tuple(NAMES.get(letter, letter) for letter in word)


def test_mnemonics_become_phones() -> None:
    assert phones_of("b_'V_t#_3") == ("b", "V", "t#", "3")
    assert phones_of("p_l_'eI_t#_oU_z") == ("p", "l", "eI", "t#", "oU", "z")
    assert phones_of("l_'I_t#_@L") == ("l", "I", "t#", "@", "l")
    assert phones_of("f_'aI@_ b_'3:_d") == ("f", "aI", "@", "b", "3", "d")
    assert phones_of("l_'Q~_x") == ()  # no phone of ours: rather no word than a wrong one


def test_words_are_looked_up_at_once(espeak: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("recipes.librispeech.lexicon.WORDS_PER_CALL", 2)
    found = pronounce(["red", "cat", "red", "mist", "can", "qx"])
    assert found == {word: spelled(word) for word in ("red", "cat", "mist", "can")}  # no phone for x


def test_weak_forms_are_said_as_in_speech(monkeypatch: pytest.MonkeyPatch) -> None:
    assert all(phones_of("_".join(phones)) == phones for phones in WEAK_FORMS.values())
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ConfigError, match="no espeak-ng"):
        pronounce(["word"])


def test_viterbi_equals_the_best_of_all_paths(monkeypatch: pytest.MonkeyPatch) -> None:
    graph = graph_of([["a"], ["b"]], {SILENCE: 0, "a": 1, "b": 2})
    assert graph.phones == (SILENCE, "a", SILENCE, "b", SILENCE)
    monkeypatch.setattr("recipes.librispeech.phone_alignment.SILENCE_PENALTY", 0.5)
    rng = np.random.default_rng(0)
    for frames in (6, 7, 9):
        scores = rng.normal(size=(frames, 9)).astype(np.float32)
        best: tuple[float, tuple[int, ...]] = (-np.inf, ())
        for kept in itertools.product((False, True), repeat=3):  # silences that are there
            blocks = [i for i in range(5) if i % 2 or kept[i // 2]]
            states = [3 * block + part for block in blocks for part in range(3)]
            price = sum(0.5 for i in (1, 2) if kept[i])  # the first one begins the recording and costs nothing
            for cuts in itertools.combinations(range(1, frames), len(states) - 1):
                path = np.repeat(states, np.diff((0, *cuts, frames)))
                value = float(scores[np.arange(frames), graph.states[path]].sum()) - price
                best = max(best, (value, tuple(path.tolist())))
        found = viterbi([scores], [graph])[0]
        assert found is not None
        assert tuple(found.tolist()) == best[1]
    assert viterbi([rng.normal(size=(5, 9)).astype(np.float32)], [graph]) == [None]  # two phones need six frames


def letters_of(text: str) -> list[tuple[str, float]]:
    """Phones of a sentence and the feature frame at which each begins to sound."""
    return [(spelled(letter)[0], LETTER_FRAMES * (1 + at)) for at, letter in enumerate(text) if letter != " "]


def spoken_of(text: str, seed: int, shift: int = 0) -> Spoken:
    """A sentence of tones; its words are cut `shift` frames too late."""
    words = text.split()
    starts = [0, *(LETTER_FRAMES * (1.5 + sum(len(w) + 1 for w in words[: i + 1]) - 1) for i in range(len(words)))]
    cuts = np.array([round(start) + shift for start in starts])
    return Spoken(log_mel(speak(text, seed), FeatureConfig()), tuple(map(spelled, words)), cuts)


def test_phones_are_found_where_they_sound() -> None:
    recordings = [spoken_of(text, seed, shift) for seed, shift in enumerate((-4, 0, 4)) for text in SENTENCES]
    aligner = PhoneAligner(recordings)
    for text, found in zip(SENTENCES, aligner.align(recordings[: len(SENTENCES)]), strict=True):
        assert found is not None
        expected = letters_of(text)
        sounds = [(p, int(s)) for p, s in zip(found.phones, found.starts[:-1], strict=True) if p != SILENCE]
        assert [phone for phone, _ in sounds] == [phone for phone, _ in expected]
        assert max(abs(start - at) for (_, start), (_, at) in zip(sounds, expected, strict=True)) <= 4
        assert found.starts[0] == 0
        assert found.starts[-1] == len(log_mel(speak(text), FeatureConfig()))
    unknown = Spoken(recordings[0].features, (("Z",),), np.array([0, 10]))
    short = Spoken(recordings[0].features[:5], recordings[0].words, recordings[0].cuts)
    assert aligner.align([unknown, short]) == [None, None]


class PhoneStore(FeatureStore):
    """Recordings of 10 frames a phone, each of which holds one number: which phone of which recording it is."""

    def __init__(self, phones: list[str]) -> None:
        said = [tuple(item.split()) for item in phones]
        self.shards = [np.repeat(np.arange(len(p)), 10)[:, None] + 100.0 * i for i, p in enumerate(said)]
        clips = [Clip("u", "c", "s", 1.0, i, 0, 10 * len(p), "", ()) for i, p in enumerate(said)]
        starts = [10 * np.arange(len(p) + 1) for p in said]
        self.recordings = [Recording({1.0: c}, p, s) for c, p, s in zip(clips, said, starts, strict=True)]


def test_stretches_are_long_and_meet_in_the_middle_of_phones() -> None:
    store = PhoneStore(["sil k a t sil", "sil m a p s sil", "sil t u: sil"])
    speaker = Speaker(store, Voice(store.recordings), 1.0, np.random.default_rng(0))

    def units(text: str) -> list[tuple[int, float, float]] | None:
        made = speaker.units(tuple(text.split()))
        return made and [(store.recordings.index(unit.recording), unit.start, unit.end) for unit in made]

    assert units("sil k a t sil") == [(0, 0, 50)]
    assert units("sil k a p s sil") == [(0, 0, 25), (1, 25, 60)]  # "k a" and "a p s", joined in the middle of a
    joined = units("sil m a t u: sil")
    assert joined == [(1, 0, 25), (0, 25, 35), (2, 15, 40)]
    assert units("s k") == [(1, 40, 50), (0, 10, 20)]  # never in a row: whole phones, side by side
    assert units("sil Z sil") is None
    mel = speaker.say(speaker.units(("sil", "k", "a", "p", "s", "sil")) or [])
    assert mel.shape == (25 + 35, 1)
    assert mel[:23, 0].tolist() == store.shards[0][:23, 0].tolist()
    assert np.all(np.diff(mel[22:26, 0]) > 0)  # from one recording over to the other
    assert mel[25:, 0].tolist() == store.shards[1][25:, 0].tolist()


def test_passages_are_sentences_in_a_row() -> None:
    text = [f"w{i} x y" for i in range(20)]
    made = list(passages(text, 0.05, np.random.default_rng(0)))
    assert sum(len(passage) * 3 for passage in made) >= 0.05 * 3600 * 2.7
    for passage in made:
        start = text.index(passage[0])
        assert list(passage) == text[start : start + len(passage)]
        assert len(passage) <= 13
    lexicon = {"a": ("@",), "cat": ("k", "a", "t")}
    phones = phones_of_passage(["a cat", "a a"], lexicon, np.random.default_rng(0))
    assert [phone for phone in phones if phone != SILENCE] == ["@", "k", "a", "t", "@", "@"]
    assert phones[0] == phones[-1] == SILENCE
    assert phones_of_passage(["a dog"], lexicon, np.random.default_rng(0)) == ()


def test_a_text_is_said_with_pieces_of_the_recordings(
    espeak: None, model: Model, model_file: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "data"
    shutil.copytree(data, folder)
    (tmp_path / "text.txt").write_text("\n".join(NEW))
    arguments = ["--data", str(folder), "--text", str(tmp_path / "text.txt"), "--model", str(model_file)]
    diphones.main([*arguments, "--hours", "0.03", "--min-words", "20"])
    assert "1 speakers" in capsys.readouterr().out
    store = FeatureStore(folder / "train", model.tokenizer)
    clips = [clip for clip in store.clips if clip.corpus == "diphones"]
    assert json.loads((folder / "data.json").read_text())["train"]["diphones"]["clips"] == len(clips) > 5
    heard = {word for clip in clips for word in clip.text.split()}
    assert heard == {word for text in NEW for word in text.split()}  # also what no recording says
    unheard = heard - {word for text in SENTENCES for word in text.split()}
    assert {"honest", "mirth", "sweet"} <= unheard
    for clip in clips:
        letters = len(clip.text.replace(" ", ""))
        assert LETTER_FRAMES * letters / 1.1 - 20 <= clip.frames <= LETTER_FRAMES * 3 * letters / 0.9
    made = {file.name: file.read_bytes() for file in (folder / "train").glob("diphones*")}
    diphones.main([*arguments, "--hours", "0.03", "--min-words", "20"])  # instead of what is there, from the rest
    assert {file.name: file.read_bytes() for file in (folder / "train").glob("diphones*")} == made
    (tmp_path / "text.txt").write_text("puzzled quails jump")  # sounds that the recordings lack
    with pytest.raises(SystemExit, match="none of the text"):
        diphones.main([*arguments, "--hours", "0.03", "--min-words", "20"])
    assert {file.name: file.read_bytes() for file in (folder / "train").glob("diphones*")} == made
