"""When do two strings say the same thing? The one place that decides it."""

from __future__ import annotations

import re
import unicodedata

PART = re.compile(r"\s*;\s*")  # an answer of several parts joins them with "; "


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
