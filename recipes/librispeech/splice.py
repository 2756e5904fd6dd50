"""Extra training speech: sentences of a text, put together from words and phrases of the recordings.

    python -m recipes.librispeech.splice --data DATA --text sentences.txt.xz --hours 20 [--model model.safetensors]

A few hours of transcribed speech hold few sentences, and deep exits have little language to learn from. So a trained
model finds the words in the recordings of DATA/train (forced alignment), and stretches of the text that one speaker has
said nearly every word of are spliced from that speaker's recordings, in the longest phrases there are; words that are
missing are borrowed from others. After Lam et al., "On-the-fly aligned data augmentation for sequence-to-sequence ASR"
(Interspeech 2021, arXiv 2104.01393), which replaces words; here all of the text is new. Writes shards of the corpus
`spliced` to DATA/train; a configuration says in `corpus_shares` how much of it an epoch takes.
"""

from __future__ import annotations

import argparse
from collections import Counter, defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from asr_exit.checkpoint import Model
from asr_exit.data import FRAMES_PER_SECOND, Clip, FeatureStore
from asr_exit.errors import ConfigError
from recipes.librispeech import made_speech
from recipes.librispeech.alignment import Aligned, align, lateness
from recipes.librispeech.variants import DIPHONES, SPLICED, SYNTHETIC

MIN_WORDS = 5  # of a stretch of text
OWN_SHARE = 0.75  # of the words of a stretch that the speaker has said; the others are borrowed
MAX_PHRASE = 4  # words taken from one place
SECONDS = (3.0, 15.0)  # of an utterance


@dataclass(frozen=True)
class Place:
    """An aligned recording: word i is frames cuts[i] to cuts[i + 1] of its copy at speed 1."""

    copies: dict[float, Clip]
    words: tuple[str, ...]
    cuts: np.ndarray


Piece = tuple[Place, int, int]  # words first to end (exclusive) of a place


class Phrases:
    """Where the words and short phrases of some recordings are."""

    def __init__(self, places: Sequence[Place]) -> None:
        self.places = places
        self.words = sum(len(place.words) for place in places)
        self._where: dict[tuple[str, ...], list[tuple[int, int]]] = defaultdict(list)
        for number, place in enumerate(places):
            for start in range(len(place.words)):
                for length in range(1, min(MAX_PHRASE, len(place.words) - start) + 1):
                    self._where[place.words[start : start + length]].append((number, start))

    def __contains__(self, word: str) -> bool:
        return (word,) in self._where

    def longest(self, words: tuple[str, ...], rng: np.random.Generator) -> Piece | None:
        """A random place among those that say most of the first `MAX_PHRASE` of `words`; None without the first."""
        for length in range(min(MAX_PHRASE, len(words)), 0, -1):
            if found := self._where.get(words[:length]):
                number, start = found[int(rng.integers(len(found)))]
                return self.places[number], start, start + length
        return None


def stretches(words: Sequence[str], own: Phrases, anyone: Phrases) -> Iterator[tuple[str, ...]]:
    """Runs of at least `MIN_WORDS` of `words` that somebody has said, most of them the speaker of `own`."""
    run: list[str] = []
    for word in [*words, ""]:
        if word in anyone:
            run.append(word)
            continue
        if len(run) >= MIN_WORDS and sum(said in own for said in run) >= OWN_SHARE * len(run):
            yield tuple(run)
        run = []


def pieces_of(words: tuple[str, ...], own: Phrases, anyone: Phrases, rng: np.random.Generator) -> Iterator[Piece]:
    """What says `words`, all of them in `anyone`: the longest phrases that the speaker has, else another's word."""
    while words:
        piece = own.longest(words, rng) or anyone.longest(words[:1], rng)
        assert piece is not None
        yield piece
        words = words[piece[2] - piece[1] :]


def find_words(model: Model, store: FeatureStore, min_words: int, batch_frames: int = 8000) -> dict[str, Phrases]:
    """The words of every speaker with at least `min_words`, by speaker.

    Raises:
        ConfigError: there is none.
    """
    copies: dict[tuple[str, str], dict[float, Clip]] = defaultdict(dict)
    for clip in store.clips:
        if clip.corpus not in (SPLICED, SYNTHETIC, DIPHONES):  # voices of people only
            copies[clip.corpus, clip.utterance_id][clip.speed] = clip
    whole = [of for of in copies.values() if 1.0 in of]
    spoken: Counter[str] = Counter()
    for of in whole:
        spoken[of[1.0].speaker] += len(of[1.0].text.split())
    waiting = [of for of in whole if spoken[of[1.0].speaker] >= min_words]
    waiting.sort(key=lambda of: of[1.0].frames)
    found: list[tuple[dict[float, Clip], Aligned]] = []
    while waiting:
        batch = waiting[-max(1, batch_frames // waiting[-1][1.0].frames) :]
        del waiting[-len(batch) :]
        aligned = align(model, [store.features(of[1.0]) for of in batch], [of[1.0].text for of in batch])
        found += [(of, item) for of, item in zip(batch, aligned, strict=True) if item is not None]
    if not found:
        raise ConfigError(
            f"no speaker with {min_words} words that the model finds in the recordings; lower --min-words"
        )
    factor = model.config.features_per_label
    late = lateness([item for _, item in found[:: max(1, len(found) // 200)]], factor)
    by_speaker: dict[str, list[Place]] = defaultdict(list)
    for of, item in found:
        by_speaker[of[1.0].speaker].append(Place(of, tuple(of[1.0].text.split()), item.cuts(factor, late)))
    return {speaker: Phrases(places) for speaker, places in by_speaker.items()}


def splice(store: FeatureStore, pieces: Iterable[Piece], speed: float) -> np.ndarray:
    """(F, M) float16 of the pieces, one after the other, with the mean spectrum of the first one's recording."""
    parts: list[np.ndarray] = []
    wanted: np.ndarray | None = None
    for place, start, end in pieces:
        mel = store.features(place.copies[speed]).astype(np.float32)
        spectrum = mel.mean(axis=0)
        wanted = spectrum if wanted is None else wanted
        first, last = (round(place.cuts[word] / speed) for word in (start, end))
        parts.append(mel[first:last] + (wanted - spectrum))
    return np.concatenate(parts).astype(np.float16)


def compose(
    store: FeatureStore, voices: Mapping[str, Phrases], sentences: Sequence[str], hours: float, seed: int
) -> Iterator[tuple[str, str, np.ndarray]]:
    """(speaker, text, features) of utterances that last `hours` together. Deterministic in `seed`.

    Raises:
        ConfigError: the speakers have said too few of the words.
    """
    rng = np.random.default_rng(seed)
    anyone = Phrases([place for voice in voices.values() for place in voice.places])
    speeds = sorted(set.intersection(*(set(place.copies) for place in anyone.places)))
    names = sorted(voices)
    shares = np.sqrt([voices[name].words for name in names])
    frames_left = hours * 3600 * FRAMES_PER_SECOND
    tried = made = 0
    while frames_left > 0:
        speaker = names[int(rng.choice(len(names), p=shares / shares.sum()))]
        own = voices[speaker]
        wanted = rng.uniform(*SECONDS) * FRAMES_PER_SECOND
        speed = speeds[int(rng.integers(len(speeds)))]
        at = int(rng.integers(len(sentences)))
        words: list[str] = []
        parts: list[np.ndarray] = []
        frames = 0
        while frames < wanted and at < len(sentences):
            for stretch in stretches(sentences[at].split(), own, anyone):
                part = splice(store, pieces_of(stretch, own, anyone, rng), speed)
                if frames + len(part) > SECONDS[1] * FRAMES_PER_SECOND:
                    wanted = frames
                    break
                words += stretch
                parts.append(part)
                frames += len(part)
            at += 1
            tried += 1
            if tried > 10_000 * (made + 1):
                raise ConfigError("the speakers of the recordings say too few of the text's words")
        if frames >= SECONDS[0] * FRAMES_PER_SECOND:
            made += 1
            frames_left -= frames
            yield speaker, " ".join(words), np.concatenate(parts)


def _make(
    model: Model, store: FeatureStore, sentences: Sequence[str], options: argparse.Namespace
) -> tuple[int, made_speech.Made]:
    voices = find_words(model, store, options.min_words)
    return len(voices), compose(store, voices, sentences, options.hours, options.seed)


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line."""
    about = "Splice training utterances from words of the recordings."
    made_speech.run("splice", SPLICED, _make, arguments, description=about, hours=20.0)


if __name__ == "__main__":
    main()
