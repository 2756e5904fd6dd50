"""Word n-gram language models with backoff: a compact, memory-mapped form.

A file is a safetensors container, so any safetensors reader opens it. Metadata: `format` ("asr-exit-lm/1"), `order`,
`provenance` (JSON). The n-grams form a trie; level k holds those of k words, sorted by their first k - 1 words (the
parent, a row of level k - 1) and then by their last word. Words are numbered in the order of their spelling.

| tensor | shape, type | content |
| --- | --- | --- |
| `words` | (bytes,) uint8 | all words, UTF-8, sorted, a newline between them; `<s>`, `</s>` and `<unk>` among them |
| `K.word` | (N_K,) uint16 or uint32 | last word of each n-gram; not for K = 1, where the row is the word |
| `K.log_prob` | (N_K,) float32 for K = 1, else float16 | natural log of P(last word given the words before it) |
| `K.backoff` | as `K.log_prob` | natural log of the backoff weight of the n-gram as a context; not for the highest K |
| `K.first` | (N_K + 1,) uint32 | row of level K + 1 where the n-gram's continuations begin; not for the highest K |

Reading needs NumPy alone; writing needs safetensors.
"""

from __future__ import annotations

import json
import math
import mmap
from bisect import bisect_left
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from asr_exit.errors import CheckpointError

FORMAT = "asr-exit-lm/1"
BEGIN, END, UNKNOWN = "<s>", "</s>", "<unk>"
BUNDLED = "bundled"  # what users call the one in the package
_CACHE = 1 << 16
_AFTER_ALL = "\U0010ffff"


@dataclass(frozen=True, eq=False)
class Level:
    """The n-grams of one length; see the module for the arrays."""

    log_prob: np.ndarray
    word: np.ndarray | None = None
    backoff: np.ndarray | None = None
    first: np.ndarray | None = None


class NgramModel:
    """Log-probabilities (natural) of words after other words."""

    def __init__(self, words: Sequence[str], levels: Sequence[Level], provenance: Mapping[str, Any] | None = None):
        """`words` sorted, the three special ones among them.

        Raises:
            CheckpointError: the arrays do not belong together.
        """
        self.words, self.levels, self.provenance = tuple(words), tuple(levels), dict(provenance or {})
        _check(self.words, self.levels)
        self.begin, self.end, self.unknown = (self._position(word) for word in (BEGIN, END, UNKNOWN))
        # memoryviews: their items come as Python numbers, three times as fast as from arrays (float16 has none)
        self._word = [None if level.word is None else memoryview(level.word.data) for level in levels]
        self._first = [None if level.first is None else memoryview(level.first.data) for level in levels]
        self.log_prob = lru_cache(_CACHE)(self._compute_log_prob)
        self.best_log_prob = lru_cache(_CACHE)(self._compute_best_log_prob)

    @property
    def order(self) -> int:
        """Words of the longest n-grams."""
        return len(self.levels)

    def index(self, word: str) -> int:
        """Number of a word; that of `<unk>` if the model does not know it."""
        position = self._position(word)
        return self.unknown if position < 0 else position

    def _position(self, word: str) -> int:
        position = bisect_left(self.words, word)
        return position if position < len(self.words) and self.words[position] == word else -1

    def extend(self, context: tuple[int, ...], word: int) -> tuple[int, ...]:
        """The context after one more word: as many words as the model looks back."""
        return (*context, word)[-(self.order - 1) :] if self.order > 1 else ()

    def _compute_log_prob(self, context: tuple[int, ...], word: int) -> float:
        """Natural log of P(word given context). `context`: word numbers, oldest first, any number of them."""
        penalty = 0.0
        for start in range(max(0, len(context) - self.order + 1), len(context) + 1):
            row = self._find(context[start:])
            if row is None:
                continue
            level = len(context) - start
            hit = word if level == 0 else self._child(level - 1, row, word)
            if hit is not None:
                return penalty + float(self.levels[level].log_prob[hit])
            backoff = self.levels[level - 1].backoff
            penalty += 0.0 if backoff is None else float(backoff[row])
        raise AssertionError("the empty context knows every word")

    def _find(self, words: tuple[int, ...]) -> int | None:
        """Row of an n-gram on the level of its length; 0 for the empty one."""
        row: int | None = words[0] if words else 0
        for level, word in enumerate(words[1:]):
            if row is None:
                return None
            row = self._child(level, row, word)
        return row

    def _child(self, level: int, row: int, word: int) -> int | None:
        first, following = self._first[level], self._word[level + 1]
        assert first is not None, "not the last level"
        assert following is not None, "not the first level"
        end = first[row + 1]
        position = bisect_left(following, word, first[row], end)
        return position if position < end and following[position] == word else None

    def _compute_best_log_prob(self, letters: str) -> float:
        """Of all words that begin with `letters`, the largest unigram log-probability; -inf when there are none."""
        low, high = bisect_left(self.words, letters), bisect_left(self.words, letters + _AFTER_ALL)
        return float(self.levels[0].log_prob[low:high].max()) if high > low else -math.inf

    def sentence_log_prob(self, words: Sequence[str]) -> float:
        """Natural log of P(words, end of sentence)."""
        total = 0.0
        context: tuple[int, ...] = (self.begin,)
        for word in [*map(self.index, words), self.end]:
            total += self.log_prob(context, word)
            context = self.extend(context, word)
        return total

    def save(self, path: Path | str) -> None:
        """Write atomically."""
        from safetensors.numpy import save_file

        tensors = {"words": np.frombuffer("\n".join(self.words).encode(), np.uint8)}
        for number, level in enumerate(self.levels, 1):
            for name in ("word", "log_prob", "backoff", "first"):
                if getattr(level, name) is not None:
                    tensors[f"{number}.{name}"] = np.ascontiguousarray(getattr(level, name))
        metadata = {"format": FORMAT, "order": str(self.order), "provenance": json.dumps(self.provenance)}
        path = Path(path)
        partial = path.with_name(path.name + ".partial")
        try:
            save_file(tensors, partial, metadata=metadata)
            partial.replace(path)
        finally:
            partial.unlink(missing_ok=True)


def _check(words: Sequence[str], levels: Sequence[Level]) -> None:
    def require(condition: bool, what: str) -> None:
        if not condition:
            raise CheckpointError(f"damaged language model: {what}; build or convert it again")

    require(bool(levels), "it has no n-grams")
    require({BEGIN, END, UNKNOWN} <= set(words), f"{BEGIN}, {END} or {UNKNOWN} is missing")
    require(all(a < b for a, b in pairwise(words)), "its words are not sorted")
    require(len(levels[0].log_prob) == len(words), "words and unigrams differ in number")
    for number, level in enumerate(levels, 1):
        rows = len(level.log_prob)
        require((level.word is None) == (number == 1), f"{number}.word")
        require(level.word is None or len(level.word) == rows, f"{number}.word")
        require(level.word is None or rows == 0 or int(level.word.max()) < len(words), f"{number}.word")
        if number == len(levels):
            continue
        require(level.backoff is not None and len(level.backoff) == rows, f"{number}.backoff")
        first = level.first
        require(first is not None and len(first) == rows + 1, f"{number}.first")
        assert first is not None
        ends = int(first[0]) == 0 and int(first[-1]) == len(levels[number].log_prob)
        require(ends and bool((first[1:] >= first[:-1]).all()), f"{number}.first")


def load_ngram_model(path: Path | str) -> NgramModel:
    """Map a file that `NgramModel.save` wrote, or read an ARPA file (plain or .gz); "bundled": the package's own.

    Raises:
        CheckpointError: no such file, or neither of the two, or damaged.
    """
    path = Path(__file__).with_name("assets") / "language_model.bin" if str(path) == BUNDLED else Path(path)
    if not path.is_file():
        raise CheckpointError(
            f"no language model at {path}; build one with python -m recipes.librispeech.lm, or take {BUNDLED!r}"
        )
    with path.open("rb") as file:
        start = file.read(2)
    if start == b"\x1f\x8b" or path.name.endswith((".arpa", ".arpa.gz")):
        from asr_exit.arpa import read_arpa

        return read_arpa(path)
    try:
        metadata, arrays = _map(path)
        if metadata.get("format") != FORMAT:
            raise CheckpointError(f"{path} is no language model of the format {FORMAT}, and no .arpa or .arpa.gz file")
        levels = [
            Level(
                arrays[f"{number}.log_prob"], *(arrays.get(f"{number}.{name}") for name in ("word", "backoff", "first"))
            )
            for number in range(1, int(metadata["order"]) + 1)
        ]
        words = arrays["words"].tobytes().decode().split("\n")
        return NgramModel(words, levels, json.loads(metadata["provenance"]))
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise CheckpointError(f"{path} is not a readable language model: {error}") from error


def _map(path: Path) -> tuple[dict[str, str], dict[str, np.ndarray]]:
    """Metadata and tensors of a safetensors file, read-only and in place: pages are read when they are needed."""
    kinds = {"U8": "u1", "U16": "<u2", "U32": "<u4", "F16": "<f2", "F32": "<f4"}
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    header_end = 8 + int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8:header_end])
    metadata, arrays = header.pop("__metadata__", {}), {}
    for name, entry in header.items():
        start, end = entry["data_offsets"]
        kind = np.dtype(kinds[entry["dtype"]])
        arrays[name] = np.frombuffer(mapped, kind, (end - start) // kind.itemsize, header_end + start)
    return metadata, arrays
