"""When do two strings say the same thing? The one place that decides it. And the same text about other numbers."""

from __future__ import annotations

import random
import re
import unicodedata
from collections.abc import Callable, Sequence

PART = re.compile(r"\s*;\s*")  # an answer of several parts joins them with "; "
NUMBER = re.compile(r"\d+(?:,\d{3})*(?:\.\d+)?")
MONTHS = "january|february|march|april|may|june|july|august|september|october|november|december"
DATED = re.compile(rf"\d{{4}}-\d\d-\d\d|\b(?:19|20)\d\d\b|\d:\d\d|\b(?:{MONTHS})\b", re.I)


def normalise(text: str) -> str:
    """Lower case, one kind of dash, quote and space, no Markdown emphasis, no closing full stop."""
    text = unicodedata.normalize("NFKC", text).lower()
    text = re.sub(r"[‐‑‒–—−]", "-", text)
    text = text.translate(str.maketrans("‘’“”", "''\"\""))
    text = re.sub(r"\*\*|__|`", "", text)
    return re.sub(r"\s+", " ", text).strip().rstrip(".").strip()


def holds(text: str, value: str) -> bool:
    """Does `text` contain `value` as whole words and whole numbers? "$4" does not stand in "$49"."""
    wanted = normalise(value)
    pattern = rf"(?<!\w)(?<!\d[.,]){re.escape(wanted)}(?!\w)(?![.,]\d)"
    return bool(wanted) and re.search(pattern, normalise(text)) is not None


def parts(answer: str) -> list[str]:
    """The values of an answer: "$54; 5 seats" has two."""
    return [part for part in PART.split(answer.strip()) if part]


def stands_verbatim(quote: str, text: str) -> bool:
    """Does the quote stand word for word in the text? Only runs of white space may differ."""
    squeeze = " ".join
    return bool(quote.strip()) and squeeze(quote.split()) in squeeze(text.split())


def redraw(values: Sequence[str], texts: Sequence[str], chance: random.Random) -> Callable[[str], str]:
    """A function that gives the numbers of the values other digits wherever they stand, none of them a number of the texts.
    Values with a date or a time stay as they are, and so does a 1, since plurals hang on it."""
    taken = {"1", *(number for text in texts for number in NUMBER.findall(text))}
    numbers = {number for value in values if not DATED.search(value) for number in NUMBER.findall(value)} - {"1"}
    new = {}
    for number in sorted(numbers, key=lambda number: (-len(number), number)):
        for _ in range(20):
            drawn = "".join(digit_like(digit, chance) for digit in number)
            if drawn not in taken:
                new[number] = drawn
                taken.add(drawn)
                break
    if not new:
        return lambda text: text
    standing = re.compile(rf"(?<![\d.,])(?:{'|'.join(map(re.escape, new))})(?!\d|[.,]\d)")
    return lambda text: standing.sub(lambda found: new[found[0]], text)


def digit_like(digit: str, chance: random.Random) -> str:
    """Another digit; zeros, commas and points stay, so that a round number stays round."""
    return chance.choice("123456789") if digit in "123456789" else digit
