"""The house voice: an e-mail from facts, in a style whose every rule a program can check.

The rules for people stand in `datasets/voice/README.md`; `faults` is the same list for the machine.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass, replace
from pathlib import Path

from reference.corpus import SHIPPED, CorpusError, read_jsonl
from reference.text import redraw

SHIPPED_VOICE = SHIPPED.parent / "voice"
WORDS = range(45, 91)  # of the body
LONGEST_SENTENCE = 24  # words
PRAISE = (  # noqa: SIM905
    "best leading greatest fastest easiest perfect amazing exciting excited thrilled delighted unique world-class "
    "revolutionary seamless powerful unbeatable incredible ultimate cutting-edge game-changing"
).split()
PHRASES = ("hope this finds", "just checking in", "touch base", "reach out", "please do not hesitate")
SHORT_FORM = re.compile(r"\b\w+'(?:ll|re|ve|d|m)\b|n't\b|\b(?:it|that|there|here|what|let)'s\b", re.I)
SOURCE = re.compile(r"\s*\(source: ([A-Z0-9-]+)\)")
LETTER = re.compile(r"Hello (.+?),\n\n(.+)\n\nKind regards,\n(.+)", re.S)


@dataclass(frozen=True)
class Statement:
    """A fact that the letter must carry: its value word for word, and in the same sentence the document it stands in."""

    statement: str
    value: str
    source: str


@dataclass(frozen=True)
class Draft:
    """What to write, and a letter that keeps every rule."""

    id: str
    task: str
    to: str
    company: str
    sender: str
    facts: tuple[Statement, ...]
    letter: str
    split: str  # train, dev, test; held_out: product and kinds of letter that train never shows


def load_drafts(path: str | Path) -> list[Draft]:
    """The drafts of a file. Raises CorpusError for a malformed row."""
    drafts = []
    for number, row in enumerate(read_jsonl(Path(path)), 1):
        try:
            drafts.append(Draft(**row | {"facts": tuple(Statement(**fact) for fact in row["facts"])}))
        except (TypeError, KeyError) as error:
            raise CorpusError(f"{path}: draft {number}: {error}; a draft has {', '.join(Draft.__dataclass_fields__)}") from None
    return drafts


def redrawn(draft: Draft, chance: random.Random) -> Draft:
    """The same letter about other numbers: what is asked for changes, so a lesson has to teach copying, not remembering."""
    said = [text for fact in draft.facts for text in (fact.value, fact.statement)]
    change = redraw(said, [*said, draft.letter], chance)
    facts = tuple(Statement(change(fact.statement), change(fact.value), fact.source) for fact in draft.facts)
    return replace(draft, facts=facts, letter=change(draft.letter))


def rules() -> str:
    """The written rules, as `datasets/voice/README.md` gives them to people."""
    guide = (SHIPPED_VOICE / "README.md").read_text(encoding="utf-8")
    return guide[guide.index("## The rules") : guide.index("`voice.faults`")].strip()


def sentences(text: str) -> list[str]:
    return re.split(r"(?<=[.!?])\s+", text.strip())


def faults(letter: str, draft: Draft) -> list[str]:
    """The rules that a letter breaks, by name; empty when it keeps every one."""
    whole = LETTER.fullmatch(letter.strip())
    if not whole:
        return ["layout"]
    to, body, sender = whole.groups()
    plain = SOURCE.sub("", body)
    own_words = plain
    for fact in draft.facts:
        own_words = own_words.replace(fact.value, "")  # a value may hold any word
    low = own_words.lower().replace("’", "'")
    broken = {
        "greeting": to != draft.to,
        "sign-off": sender != draft.sender,
        "length": len(plain.split()) not in WORDS,
        "praise": any(re.search(rf"(?<![\w-]){re.escape(word)}(?![\w-])", low) for word in PRAISE),
        "phrase": any(phrase in low for phrase in PHRASES),
        "shouting": "!" in body,
        "short form": bool(SHORT_FORM.search(low)),
        "one ask": plain.count("?") != 1 or not plain.rstrip().endswith("?"),
        "long sentence": any(len(sentence.split()) > LONGEST_SENTENCE for sentence in sentences(plain)),
        "facts": not all(fact.value in body for fact in draft.facts),
        "source named": not all(
            any(fact.value in sentence and fact.source in SOURCE.findall(sentence) for sentence in sentences(body))
            for fact in draft.facts
        ),
        "invented source": not set(SOURCE.findall(body)) <= {fact.source for fact in draft.facts},
    }
    return [rule for rule, is_broken in broken.items() if is_broken]


def score(letter: str, draft: Draft) -> dict[str, tuple[float, float]]:
    """What one letter adds to each metric, as (numerator, denominator)."""
    survived = sum(fact.value in letter for fact in draft.facts)
    return {"every_rule": (not faults(letter, draft), 1), "facts_survive": (survived, len(draft.facts))}


def request(draft: Draft) -> str:
    """What the writer is asked, in words."""
    facts = "\n".join(f"- {fact.statement} [say: {fact.value}] (source: {fact.source})" for fact in draft.facts)
    return f"Write: {draft.task}\nTo: {draft.to}, {draft.company}\nFrom: {draft.sender}\nFacts:\n{facts}"


INSTRUCTION = (
    "You write for Cadenza Software's sales team in its house style: short sentences, no praise, one question at the end,"
    " and each fact with its source in brackets."
)


def messages(draft: Draft) -> list[dict]:
    """The chat that asks for a letter: instruction, request."""
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": request(draft)}]
