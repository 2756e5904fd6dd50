"""A small ARPA model, and the textbook backoff over its text: the reference for the packed one."""

from __future__ import annotations

import math

ARPA = """
\\data\\
ngram 1=7
ngram 2=5
ngram 3=3

\\1-grams:
-1.5\t<unk>
-99\t<s>\t-0.4
-0.9\t</s>
-0.7\ta\t-0.3
-0.8\tab\t-0.2
-1.1\tba\t-0.5
-1.3\tb

\\2-grams:
-0.3\t<s> ba\t-0.15
-0.5\t<s> a\t-0.25
-0.4\ta ab\t-0.1
-0.6\tba a
-0.2\tab </s>

\\3-grams:
-0.1\t<s> a ab
-0.7\t<s> ba a
-0.05\ta ab </s>

\\end\\
"""


def parse(text: str) -> dict[tuple[str, ...], tuple[float, float]]:
    """n-gram -> (log10 probability, log10 backoff)."""
    table, length = {}, 0
    for line in text.splitlines():
        fields = line.split()
        if line.startswith("\\"):
            length = int(line[1]) if line[1].isdigit() else 0
        elif fields and length:
            backoff = float(fields[length + 1]) if len(fields) > length + 1 else 0.0
            table[tuple(fields[1 : length + 1])] = (float(fields[0]), backoff)
    return table


def textbook_log_prob(table: dict[tuple[str, ...], tuple[float, float]], context: tuple[str, ...], word: str) -> float:
    """Natural log of P(word given up to two words before it)."""
    word = word if (word,) in table else "<unk>"
    context = tuple(w if (w,) in table else "<unk>" for w in context)[-2:]
    if (*context, word) in table:
        return table[(*context, word)][0] * math.log(10)
    return table.get(context, (0.0, 0.0))[1] * math.log(10) + textbook_log_prob(table, context[1:], word)
