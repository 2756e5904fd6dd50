"""Reading n-gram language models in the ARPA text format, which KenLM and SRILM write."""

from __future__ import annotations

import gzip
import math
import re
from array import array
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from asr_exit.errors import CheckpointError
from asr_exit.ngram import BEGIN, END, UNKNOWN, Level, NgramModel

_LN10 = math.log(10)
_NEVER = -99.0  # base 10; what ARPA files write for log 0
_COUNT = re.compile(r"ngram (\d+)=(\d+)")


def read_arpa(path: Path | str) -> NgramModel:
    """An ARPA file, plain or gzip-compressed. Words are taken in lower case if that keeps them distinct.

    Raises:
        CheckpointError: not an ARPA file, damaged, or an n-gram whose first words are not in it.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rt", encoding="utf-8") if packed else path.open(encoding="utf-8") as lines:
            return _read(lines, path.name)
    except (OSError, EOFError, LookupError, ValueError) as error:
        raise CheckpointError(f"{path} is not a readable ARPA file: {error}") from error


def _read(lines: Iterator[str], name: str) -> NgramModel:
    counts: list[int] = []
    for line in lines:
        found = _COUNT.match(line.strip())
        if found:
            counts.append(int(found[2]))
        elif line.startswith("\\1-grams:"):
            break
    if not counts:
        raise ValueError("it has no \\data\\ section with counts")
    spelled: list[str] = []
    log_prob, backoff = array("d"), array("d")
    for words, probability, weight in _section(lines, 1, counts[0]):
        spelled += words
        log_prob.append(probability)
        backoff.append(weight)
    for special in {BEGIN, END, UNKNOWN} - {word.lower() for word in spelled}:
        spelled.append(special)
        log_prob.append(_NEVER)
        backoff.append(0.0)
    lower = [word.lower() for word in spelled]
    names = lower if len(set(lower)) == len(lower) else spelled
    order = np.array(sorted(range(len(names)), key=names.__getitem__))
    number_of = {spelled[position]: number for number, position in enumerate(order.tolist())}
    highest = len(counts)
    levels = [
        Level(
            (_LN10 * np.array(log_prob)[order]).astype(np.float32),
            backoff=None if highest == 1 else (_LN10 * np.array(backoff)[order]).astype(np.float32),
        )
    ]
    keys = [np.arange(len(names))]
    for number, count in enumerate(counts[1:], 2):
        levels.append(_add_level(levels, keys, number_of, _section(lines, number, count), number == highest))
    return NgramModel([names[position] for position in order], levels, {"source": name})


def _add_level(
    levels: list[Level],
    keys: list[np.ndarray],
    number_of: dict[str, int],
    ngrams: Iterator[tuple[list[str], float, float]],
    last: bool,
) -> Level:
    """The next level. Completes the one before it, and adds its keys (parent row * words + word, sorted) to `keys`."""
    flat, log_prob, backoff = array("q"), array("d"), array("d")
    for words, probability, weight in ngrams:
        flat.extend(number_of[word] for word in words)
        log_prob.append(probability)
        backoff.append(weight)
    num_words, number = len(number_of), len(keys) + 1
    words_of = np.frombuffer(flat, np.int64).reshape(-1, number)
    rows = words_of[:, 0]
    for column in range(1, number - 1):
        rows = _rows(keys[column], rows * num_words + words_of[:, column])
    unsorted = rows * num_words + words_of[:, -1]
    order = np.argsort(unsorted, kind="stable")
    keys.append(unsorted[order])
    first = np.searchsorted(keys[-1], np.arange(len(levels[-1].log_prob) + 1) * num_words).astype(np.uint32)
    levels[-1] = Level(levels[-1].log_prob, levels[-1].word, levels[-1].backoff, first)
    return Level(
        (_LN10 * np.frombuffer(log_prob)[order]).astype(np.float16),
        (keys[-1] % num_words).astype(word_type(num_words)),
        None if last else (_LN10 * np.frombuffer(backoff)[order]).astype(np.float16),
    )


def word_type(num_words: int) -> type[np.unsignedinteger]:
    """The smallest type for word numbers."""
    return np.uint16 if num_words <= 1 << 16 else np.uint32


def _section(lines: Iterator[str], number: int, count: int) -> Iterator[tuple[list[str], float, float]]:
    """(words, log10 probability, log10 backoff) of each n-gram of `number` words, up to the next headline."""
    found = 0
    for line in lines:
        fields = line.split()
        if not fields:
            continue
        if line.startswith("\\"):
            break
        if not number + 1 <= len(fields) <= number + 2:
            raise ValueError(f"{line.strip()!r} is no n-gram of {number} words")
        found += 1
        yield fields[1 : number + 1], float(fields[0]), float(fields[-1]) if len(fields) > number + 1 else 0.0
    if found != count:
        raise ValueError(f"{found} n-grams of {number} words instead of {count}")


def _rows(keys: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    rows = np.minimum(np.searchsorted(keys, wanted), max(0, len(keys) - 1))
    if len(keys) == 0 or (keys[rows] != wanted).any():
        raise LookupError("an n-gram whose first words are not an n-gram of the file themselves")
    return rows
