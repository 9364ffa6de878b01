"""Each rule of the house style is caught when broken, and every shipped letter keeps them all."""

import random
from collections import Counter

import pytest

from reference import voice
from reference.corpus import CorpusError
from reference.voice import Draft, Statement

FACTS = (Statement("Tempo Team lists at $49.", "$49 per seat per month", "PRC-TEMPO-TEAM"),)
LETTER = """Hello Olga,

Thank you for your question on Tuesday about the price for your fitters. \
Tempo Team lists at $49 per seat per month (source: PRC-TEMPO-TEAM). \
That price holds for each seat, and you may add a seat at any time in the year. \
Your office staff who only read the plan do not need a seat. \
Would you like a quote for twelve seats by Friday?

Kind regards,
Ana Ruiz"""
DRAFT = Draft("V1", "answer to a price question", "Olga", "Glen Boilers", "Ana Ruiz", FACTS, LETTER, "train")


@pytest.fixture(scope="module")
def drafts():
    return voice.load_drafts(voice.SHIPPED_VOICE / "drafts.jsonl")


def test_a_letter_that_keeps_every_rule_has_no_fault():
    assert voice.faults(LETTER, DRAFT) == []
    assert voice.score(LETTER, DRAFT) == {"every_rule": (True, 1), "facts_survive": (1, 1)}


def test_a_redrawn_letter_keeps_every_rule_about_other_numbers():
    drawn = voice.redrawn(DRAFT, random.Random(0))
    [fact] = drawn.facts
    assert fact.value != FACTS[0].value and fact.value in drawn.letter and fact.statement != FACTS[0].statement
    assert voice.faults(drawn.letter, drawn) == []


@pytest.mark.parametrize(
    ("old", "new", "fault"),
    [
        ("Hello Olga,", "Hi Olga,", "layout"),
        ("Hello Olga,", "Hello Olaf,", "greeting"),
        ("Ana Ruiz", "Ana R.", "sign-off"),
        (
            LETTER[LETTER.index("That price") : LETTER.index(" Would")],
            "It does.",
            "length",
        ),
        ("That price holds", "That is the best price, it holds", "praise"),
        ("Thank you for your question", "I hope this finds you well. Thank you for your question", "phrase"),
        ("a seat. ", "a seat! ", "shouting"),
        ("do not need", "don't need", "short form"),
        ("do not need a seat.", "need a seat?", "one ask"),
        ("by Friday?", "by Friday? Thank you.", "one ask"),
        ("in the year. Your", "in the year, and then the next, and so on, as you like it, your", "long sentence"),
        ("$49 per seat per month", "$54 per seat per month", "facts"),
        (" (source: PRC-TEMPO-TEAM)", "", "source named"),
        ("(source: PRC-TEMPO-TEAM)", "(source: PRC-TEMPO-TEAM) (source: PRC-OTHER)", "invented source"),
    ],
)
def test_a_broken_rule_is_named(old, new, fault):
    assert old in LETTER
    assert fault in voice.faults(LETTER.replace(old, new), DRAFT)


@pytest.mark.parametrize("raw", ["", "Hello", "Hello Olga,\n\nKind regards,\nAna Ruiz", "{}"])
def test_anything_else_has_a_fault_and_never_raises(raw):
    assert voice.faults(raw, DRAFT) == ["layout"]


def test_every_shipped_letter_keeps_every_rule(drafts):
    assert {d.id: voice.faults(d.letter, d) for d in drafts if voice.faults(d.letter, d)} == {}
    assert Counter(d.split for d in drafts) == {"train": 1317, "held_out": 68, "test": 40, "dev": 20}


def test_what_is_held_out_is_never_in_train(drafts):
    train = [d for d in drafts if d.split == "train"]
    new_tasks = {d.task for d in drafts} - {d.task for d in train}
    products = ("ARIA", "ENCORE")
    assert new_tasks == {"reply to an objection about price", "win-back note to a former customer"}
    for d in drafts:
        about_new = any(p in fact.source for fact in d.facts for p in products)
        assert (d.split == "held_out") == (about_new or d.task in new_tasks)


def test_the_request_says_all_that_the_letter_needs():
    said = voice.messages(DRAFT)[-1]["content"]
    assert all(part in said for part in ("Olga", "Glen Boilers", "Ana Ruiz", "$49 per seat per month", "PRC-TEMPO-TEAM"))


def test_a_malformed_draft_is_named(tmp_path):
    (tmp_path / "d.jsonl").write_text('{"id": "V1", "facts": []}\n')
    with pytest.raises(CorpusError, match="draft 1"):
        voice.load_drafts(tmp_path / "d.jsonl")
