"""Building language models: Kneser-Ney against the textbook, pruning, and the command."""

from __future__ import annotations

import gzip
import itertools
import lzma
import math
from collections import Counter, defaultdict
from pathlib import Path

import numpy as np
import pytest

from asr_exit.errors import ConfigError
from asr_exit.ngram import NgramModel, load_ngram_model
from recipes.librispeech import lm
from recipes.librispeech.kneser_ney import discounts, estimate, read_text

Ngram = tuple[str, ...]


def babble(sentences: int, seed: int = 0) -> list[str]:
    """Sentences of a small language in which the next word depends on the two before it."""
    rng = np.random.default_rng(seed)
    words = ["a", "ab", "b", "ba", "cab", "dab", "it's"]
    lines = []
    for _ in range(sentences):
        line = [str(rng.choice(words)), str(rng.choice(words))]
        while rng.random() < 0.85:
            follow = (3 * words.index(line[-1]) + 2 * words.index(line[-2]) + int(rng.integers(0, 3))) % len(words)
            line.append(words[follow])
        lines.append(" ".join(line))
    return lines


def textbook(lines: list[str], order: int) -> dict[Ngram, dict[str, float]]:
    """P(word | context) for every context seen, by tables of strings; unseen words get the uniform distribution."""
    sentences = [["<s>", *line.split(), "</s>"] for line in lines]
    raw: list[Counter[Ngram]] = [Counter() for _ in range(order + 1)]
    for sentence in sentences:
        for length in range(1, order + 1):
            for start in range(len(sentence) - length + 1):
                raw[length][tuple(sentence[start : start + length])] += 1
    adjusted = list(raw)
    for length in range(1, order):
        before = Counter(ngram[1:] for ngram in raw[length + 1])
        adjusted[length] = Counter({g: raw[length][g] if g[0] == "<s>" else before[g] for g in raw[length]})
    del adjusted[1][("<s>",)]
    vocabulary = sorted({word for sentence in sentences for word in sentence} - {"<s>"} | {"<unk>"})
    found: dict[Ngram, dict[str, float]] = {}
    lower: dict[Ngram, dict[str, float]] = defaultdict(lambda: dict.fromkeys(vocabulary, 1 / len(vocabulary)))
    for length in range(1, order + 1):
        off = discounts(np.array(list(adjusted[length].values())))
        level: dict[Ngram, dict[str, float]] = {}
        for context in {ngram[:-1] for ngram in adjusted[length]}:
            follow = {g[-1]: c for g, c in adjusted[length].items() if g[:-1] == context}
            total = sum(follow.values())
            share = sum(off[min(3, c)] for c in follow.values()) / total
            level[context] = {
                word: max(0.0, follow.get(word, 0) - off[min(3, follow.get(word, 0))]) / total
                + share * lower[context[1:]][word]
                for word in vocabulary
            }
        found |= level
        lower = level  # type: ignore[assignment]
    return found


def model_of(lines: list[str], order: int = 3, prune: tuple[int, ...] = (), **options: object) -> NgramModel:
    stream, words, _ = read_text(lines, min_count=1)
    return estimate(stream, words, order=order, prune=prune, **options)  # type: ignore[arg-type]


def contexts_of(model: NgramModel) -> list[tuple[int, ...]]:
    return [context for length in range(3) for context in itertools.product(range(len(model.words)), repeat=length)]


@pytest.mark.parametrize("order", [1, 2, 3, 4])
def test_probabilities_equal_the_textbook(order: int) -> None:
    lines = babble(60)
    model, want = model_of(lines, order), textbook(lines, order)
    for context, distribution in want.items():
        numbers = tuple(map(model.index, context))
        for word, probability in distribution.items():
            got = math.exp(model.log_prob(numbers, model.index(word)))
            assert got == pytest.approx(probability, rel=6e-3), (context, word)


@pytest.mark.parametrize("prune", [(), (0, 1), (1, 3), (2, 2), (10**6,)])
def test_every_distribution_sums_to_one_at_any_pruning(prune: tuple[int, ...]) -> None:
    model = model_of(babble(60, 1), 3, prune, extra={"a": 50, "dab": 3})
    sizes = [len(level.log_prob) for level in model.levels]
    full = [len(level.log_prob) for level in model_of(babble(60, 1)).levels]
    assert (sizes[2] < full[2]) == bool(prune)
    for context in contexts_of(model):
        total = sum(math.exp(model.log_prob(context, word)) for word in range(len(model.words)))
        assert total == pytest.approx(1.0, abs=4e-3), context
    assert model.log_prob((), model.begin) < -200


def test_longer_memory_predicts_better() -> None:
    train, held_out = babble(400), babble(100, seed=9)
    values = [lm.perplexity(model_of(train, order), iter(held_out))[0] for order in (1, 2, 3)]
    assert values[2] < 0.8 * values[1] < 0.8 * values[0]


def test_counts_of_other_text_bring_words_and_their_frequencies() -> None:
    lines = babble(50)
    stream, words, running = read_text([*lines, "rare"], min_count=2, extra={"zebra": 90, "emu": 10, "gnu": 1})
    assert running == sum(len(line.split()) for line in lines) + 1
    assert {"zebra", "emu"} <= set(words)
    assert not {"gnu", "rare"} & set(words)
    model = estimate(stream, words, order=2, extra={"zebra": 90, "emu": 10})
    zebra, emu = (model.log_prob((), model.index(word)) for word in ("zebra", "emu"))
    assert zebra - emu == pytest.approx(math.log(91 / 11), abs=0.01)
    assert model.index("rare") == model.unknown


def test_command_builds_reports_and_converts(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with lzma.open(tmp_path / "text.txt.xz", "wt") as file:
        file.writelines(f"{line.upper()}.\n" for line in babble(200))
    with gzip.open(tmp_path / "counts.txt.gz", "wt") as file:
        file.write("a\t90\nzebra\t40\n")
    (tmp_path / "held.txt").write_text("\n".join(babble(20, 5)) + "\nthe unknown one\n")
    out = tmp_path / "made" / "lm.bin"
    arguments = ["--text", str(tmp_path / "text.txt.xz"), "--counts", str(tmp_path / "counts.txt.gz")]
    lm.main([*arguments, "--heldout", str(tmp_path / "held.txt"), "--min-count", "1", "--out", str(out)])
    report = capsys.readouterr().out
    assert "different ones kept" in report
    assert "perplexity" in report
    assert "lm.bin: 0.0 MB" in report
    model = load_ngram_model(out)
    assert "zebra" in model.words
    assert model.provenance["sources"] == ["text.txt.xz", "counts.txt.gz"]
    assert model.provenance["prune"] == [0, 1]

    arpa = tmp_path / "one.arpa"
    arpa.write_text("\\data\\\nngram 1=2\n\n\\1-grams:\n-0.5\ta\n-0.2\t</s>\n\n\\end\\\n")
    lm.main(["--arpa", str(arpa), "--out", str(out)])
    assert load_ngram_model(out).order == 1


def test_what_cannot_be_built_is_refused(tmp_path: Path) -> None:
    good = tmp_path / "good.txt"
    good.write_text("\n".join(babble(20)))
    cut = tmp_path / "cut.txt.xz"
    cut.write_bytes(lzma.compress(b"a b c\n" * 5000)[:-20])
    (tmp_path / "counts.txt").write_text("a\tmany\n")
    (tmp_path / "empty.txt").write_text("")
    out = ["--out", str(tmp_path / "lm.bin")]
    for arguments, message in (
        (["--text", str(tmp_path / "none.txt")], "no text at"),
        (["--text", str(cut)], "cannot be read to its end"),
        (["--text", str(tmp_path / "empty.txt")], "at least one sentence"),
        (["--text", str(good), "--counts", str(tmp_path / "counts.txt")], "line 1"),
        (["--text", str(good), "--prune", "2,1"], "must not fall"),
        (["--text", str(good), "--prune", "x"], "must be 0 or more"),
        (["--text", str(good), "--order", "9"], "must be 1 to 5"),
        (["--arpa", str(good)], "not a readable ARPA file"),
    ):
        with pytest.raises(SystemExit, match=message):
            lm.main([*arguments, *out])
    assert not (tmp_path / "lm.bin").exists()
    with pytest.raises(ConfigError, match="no words"):
        lm.perplexity(model_of(babble(20)), iter(["", ""]))
