"""Extra training speech: any sentences of a text, said in pieces of the recordings cut in the middle of phones.

    python -m recipes.librispeech.diphones --data DATA --text sentences.txt.xz --hours 150 [--model model.safetensors]

A few hours of transcribed speech hold a tenth of a language's words, and a recogniser trained on nothing else spells
the others as it hears them. So every sentence of a text becomes speech: espeak-ng tells its phones, and the features of
one speaker's recordings are joined in the longest stretches that say them, cut in the middle of phones, where a joint
disturbs least: unit selection as in Hunt and Black (ICASSP 1996), without a vocoder, since training needs features
only. A CTC model finds the words in the recordings, a hidden Markov model trained on them the phones. Writes shards of
the corpus `diphones` to DATA/train; a configuration says in `corpus_shares` how much of it an epoch takes.
"""

from __future__ import annotations

import argparse
from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from asr_exit.checkpoint import Model
from asr_exit.data import FRAMES_PER_SECOND, Clip, FeatureStore
from asr_exit.errors import ConfigError
from recipes.librispeech import made_speech
from recipes.librispeech.lexicon import pronounce
from recipes.librispeech.phone_alignment import SILENCE, PhoneAligner, Phones, Spoken
from recipes.librispeech.splice import Place, find_words
from recipes.librispeech.synthesize import WORDS_PER_SECOND
from recipes.librispeech.variants import DIPHONES

LONGEST_PHONES = 12  # of a stretch taken from one place
CANDIDATES = 8  # places that are compared for the smoothest joint
PAUSE_PROBABILITY = 0.1  # between two words of a sentence; read speech pauses, and the text has no punctuation
SENTENCE_PAUSE_PROBABILITY = 0.8  # between two sentences
WORDS = (4, 38)  # of an utterance: as many sentences in a row as reach a number drawn from these
CROSSFADE_FRAMES = 2
SECONDS = (2.5, 16.0)  # of an utterance
TRAINING_SECONDS = 2 * 3600  # of the recordings that the aligner learns from


@dataclass(frozen=True)
class Recording:
    """Copies of a recording at several speeds, and its phones at speed 1."""

    copies: Mapping[float, Clip]
    phones: tuple[str, ...]
    starts: np.ndarray  # (phones + 1,) feature frames

    def middle(self, phone: int) -> float:
        return float(self.starts[phone] + self.starts[phone + 1]) / 2


@dataclass(frozen=True)
class Unit:
    """A stretch of a recording, in feature frames at speed 1."""

    recording: Recording
    start: float
    end: float


class Voice:
    """Where a speaker says which phones in a row."""

    def __init__(self, recordings: Sequence[Recording]) -> None:
        self.recordings = recordings
        self.phones = sum(len(recording.phones) for recording in recordings)
        self._where: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        for number, recording in enumerate(recordings):
            for start in range(len(recording.phones)):
                for length in range(1, min(LONGEST_PHONES, len(recording.phones) - start) + 1):
                    self._where[recording.phones[start : start + length]].append((number, start))

    def places(self, phones: tuple[str, ...]) -> list[tuple[int, int]]:
        """(recording, phone) where all of `phones` begin; empty if nowhere."""
        return self._where.get(phones, [])

    def longest(self, phones: tuple[str, ...]) -> tuple[int, list[tuple[int, int]]]:
        """How many of the first `LONGEST_PHONES` of `phones` one place says in a row, and all such places."""
        low, high = 0, min(LONGEST_PHONES, len(phones))
        while low < high:  # what says n phones says n - 1 of them
            half = (low + high + 1) // 2
            low, high = (half, high) if phones[:half] in self._where else (low, half - 1)
        return low, self._where.get(phones[:low], [])


def passages(sentences: Sequence[str], hours: float, rng: np.random.Generator) -> Iterator[tuple[str, ...]]:
    """Sentences in a row from random places of a text, enough for a little more than `hours` of speech."""
    words_left = hours * 3600 * WORDS_PER_SECOND * 1.2  # some cannot be said
    while words_left > 0:
        at, wanted = int(rng.integers(len(sentences))), int(rng.integers(*WORDS))
        end, words = at, 0
        while end < len(sentences) and words < wanted:
            words += sentences[end].count(" ") + 1
            end += 1
        words_left -= words
        yield tuple(sentences[at:end])


def phones_of_passage(
    passage: Sequence[str], lexicon: Mapping[str, tuple[str, ...]], rng: np.random.Generator
) -> tuple[str, ...]:
    """Phones of sentences, with silence around and here and there inside; () where a word has no pronunciation."""
    phones = [SILENCE]
    for sentence in passage:
        words = sentence.split()
        pauses = rng.random(len(words)) < PAUSE_PROBABILITY
        pauses[-1] = rng.random() < SENTENCE_PAUSE_PROBABILITY
        for word, pause in zip(words, pauses, strict=True):
            if word not in lexicon:
                return ()
            phones += lexicon[word]
            if pause:
                phones.append(SILENCE)
    return tuple(phones) if phones[-1] == SILENCE else (*phones, SILENCE)


class Speaker:
    """Says phones with the recordings of one voice, at one of the speeds they are stored in."""

    def __init__(self, store: FeatureStore, voice: Voice, speed: float, rng: np.random.Generator) -> None:
        self.store, self.voice, self.speed, self.rng = store, voice, speed, rng

    def units(self, phones: tuple[str, ...]) -> list[Unit] | None:
        """What says `phones`, longest stretches first; None where the voice lacks one of them altogether.

        A stretch ends in the middle of its last phone, where the next one begins. Where the voice never says two phones
        in a row they are joined at their border.
        """
        units: list[Unit] = []
        at, from_middle, before = 0, False, None
        while at < len(phones):
            length, places = self.voice.longest(phones[at:])
            if length == 0:
                return None
            number, phone, before = self._smoothest(places, length, from_middle, before)
            recording = self.voice.recordings[number]
            last = phone + length - 1
            start = recording.middle(phone) if from_middle else float(recording.starts[phone])
            through = at + length == len(phones) or length == 1
            end = float(recording.starts[last + 1]) if through else recording.middle(last)
            units.append(Unit(recording, start, end))
            at += length if through else length - 1
            from_middle = not through
        return units

    def _smoothest(
        self, places: Sequence[tuple[int, int]], length: int, from_middle: bool, before: np.ndarray | None
    ) -> tuple[int, int, np.ndarray]:
        """Of a few random places the one that begins most like what was `before`, and the frame where it ends."""
        picks = [places[i] for i in self.rng.choice(len(places), min(CANDIDATES, len(places)), replace=False)]
        best, best_distance = picks[0], np.inf
        if before is not None and from_middle:
            for number, phone in picks:
                recording = self.voice.recordings[number]
                distance = float(np.abs(self._frame(recording, recording.middle(phone)) - before).sum())
                if distance < best_distance:
                    best, best_distance = (number, phone), distance
        recording = self.voice.recordings[best[0]]
        return *best, self._frame(recording, recording.middle(best[1] + length - 1))

    def _frame(self, recording: Recording, at: float) -> np.ndarray:
        mel = self.store.features(recording.copies[1.0])
        return mel[min(int(at), len(mel) - 1)].astype(np.float32)

    def say(self, units: Sequence[Unit]) -> np.ndarray:
        """(F, M) float16 of the units one after the other, faded over at the joints."""
        parts: list[np.ndarray] = []
        for unit in units:
            mel = self.store.features(unit.recording.copies[self.speed])
            first, last = (round(edge / self.speed) for edge in (unit.start, unit.end))
            part = mel[first : max(first + 1, last)].astype(np.float32)
            if parts and min(len(part), len(parts[-1]), first) > CROSSFADE_FRAMES:
                coming = mel[first - CROSSFADE_FRAMES : first].astype(np.float32)
                share = np.arange(1, CROSSFADE_FRAMES + 1, dtype=np.float32)[:, None] / (CROSSFADE_FRAMES + 1)
                parts[-1][-CROSSFADE_FRAMES:] = (1 - share) * parts[-1][-CROSSFADE_FRAMES:] + share * coming
            parts.append(part)
        return np.concatenate(parts).astype(np.float16)


def compose(
    store: FeatureStore,
    voices: Mapping[str, Voice],
    lexicon: Mapping[str, tuple[str, ...]],
    texts: Iterable[Sequence[str]],
    hours: float,
    seed: int,
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(speaker, text, features) of utterances, each some sentences in a row, that last `hours` together.

    Fewer where the `texts` are over. Deterministic in `seed`.

    Raises:
        ConfigError: none of the texts can be said.
    """
    rng = np.random.default_rng(seed)
    names = sorted(voices)
    speeds = sorted(set.intersection(*(set(item.copies) for voice in voices.values() for item in voice.recordings)))
    shares = np.sqrt([voices[name].phones for name in names])
    shares = shares / shares.sum()
    frames_left = hours * 3600 * FRAMES_PER_SECOND
    made = 0
    for passage in texts:
        if frames_left <= 0:
            break
        name = names[int(rng.choice(len(names), p=shares))]
        phones = phones_of_passage(passage, lexicon, rng)
        speaker = Speaker(store, voices[name], speeds[int(rng.integers(len(speeds)))], rng)
        units = speaker.units(phones) if phones else None
        if units is None:
            continue
        features = speaker.say(units)
        if not SECONDS[0] <= len(features) / FRAMES_PER_SECOND <= SECONDS[1]:
            continue
        made += 1
        frames_left -= len(features)
        yield name, " ".join(passage), features
    if not made:
        raise ConfigError("none of the text can be said in pieces of the recordings; give other text, or more of both")


def find_phones(
    store: FeatureStore, places: Mapping[str, Sequence[Place]], lexicon: Mapping[str, tuple[str, ...]], seed: int = 0
) -> dict[str, Voice]:
    """Voices of the speakers whose words are known by `places`.

    Raises:
        ConfigError: no phones were found.
    """
    known = [(name, place) for name in sorted(places) for place in places[name]]
    known = [(name, place) for name, place in known if all(word in lexicon for word in place.words)]
    spoken = [
        Spoken(store.features(place.copies[1.0]), tuple(lexicon[word] for word in place.words), place.cuts)
        for _, place in known
    ]
    seconds = sum(len(item.features) for item in spoken) / FRAMES_PER_SECOND
    order = np.random.default_rng(seed).permutation(len(spoken))
    aligner = PhoneAligner([spoken[i] for i in order[: max(1, round(len(order) * TRAINING_SECONDS / seconds))]], seed)
    by_speaker: dict[str, list[Recording]] = defaultdict(list)
    for (name, place), found in zip(known, aligner.align(spoken), strict=True):
        if isinstance(found, Phones):
            by_speaker[name].append(Recording(place.copies, found.phones, found.starts))
    if not by_speaker:
        raise ConfigError("no recording has a transcript that espeak-ng can pronounce and the frames to say it")
    return {name: Voice(recordings) for name, recordings in by_speaker.items()}


def _make(
    model: Model, store: FeatureStore, sentences: Sequence[str], options: argparse.Namespace
) -> tuple[int, made_speech.Made]:
    places = {name: voice.places for name, voice in find_words(model, store, options.min_words).items()}
    said = {word for of in places.values() for place in of for word in place.words}
    texts = list(passages(sentences, options.hours, np.random.default_rng(options.seed)))
    lexicon = pronounce(said.union(word for text in texts for sentence in text for word in sentence.split()))
    voices = find_phones(store, places, lexicon, options.seed)
    return len(voices), compose(store, voices, lexicon, texts, options.hours, options.seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    about = "Make training utterances of any text from pieces of the recordings."
    made_speech.run("diphones", DIPHONES, _make, arguments, description=about, hours=100.0)


if __name__ == "__main__":
    main()
