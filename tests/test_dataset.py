"""The shipped corpus keeps what its datasheet promises."""

import csv
import re
from collections import Counter, defaultdict
from datetime import date

import pytest

from reference.corpus import (
    QUESTION_KINDS,
    SHIPPED,
    Corpus,
    assign_splits,
    load_facts,
    load_questions,
    validate_facts,
    validate_questions,
)

DATASETS = SHIPPED.parent
RELEASE = date(2026, 11, 21)
COMMON = "a an the of for to in on at is are was do does did how what which who when where we our us you your i my it its"


@pytest.fixture(scope="module")
def corpus():
    return Corpus.load(SHIPPED)


@pytest.fixture(scope="module")
def facts():
    return load_facts(DATASETS / "facts.jsonl")


@pytest.fixture(scope="module")
def questions():
    return load_questions(DATASETS / "questions.jsonl")


def values_over_time(facts):
    values = defaultdict(set)
    for fact in facts:
        if not fact.outdated:
            values[fact.fact].add(fact.value)
    return values


def test_every_fact_and_every_question_is_proved_by_the_documents(corpus, facts, questions):
    assert validate_facts(corpus, facts) + validate_questions(corpus, questions, facts) == []


def test_the_corpus_is_as_large_as_promised(corpus, facts):
    assert len(corpus.versions) >= 80
    assert len(values_over_time(facts)) >= 240
    assert len(corpus.roles - {"all"}) >= 5


def test_the_november_release_changes_many_facts_in_many_documents(corpus, facts):
    assert corpus.releases == [RELEASE]
    changed = {name for name, values in values_over_time(facts).items() if len(values) > 1}
    assert len(changed) >= 20
    assert len({fact.document for fact in facts if fact.fact in changed}) >= 10


def test_some_document_quotes_an_outdated_price_and_says_so(corpus, facts):
    outdated = [fact for fact in facts if fact.outdated and "price" in fact.fact]
    assert outdated
    texts = {document.version: document.text for document in corpus}
    assert all(re.search(r"outdated|old|no longer|until|before|was", texts[fact.version]) for fact in outdated)


def test_there_are_enough_questions_of_every_kind_and_on_changed_facts(questions):
    kinds = Counter(question.kind for question in questions)
    assert len(questions) >= 300
    assert all(kinds[kind] >= 25 for kind in QUESTION_KINDS), kinds
    assert sum(question.old_answer is not None for question in questions) >= 40


def test_the_splits_are_the_ones_that_assign_splits_deals(questions):
    assert assign_splits(questions) == questions


def test_every_split_holds_every_kind(questions):
    assert {(q.split, q.kind) for q in questions} == {(s, k) for s in ("train", "dev", "test") for k in QUESTION_KINDS}


def content_words(text):
    return set(re.findall(r"[a-z0-9]+", text.lower())) - set(COMMON.split())


def test_at_least_a_third_of_the_questions_are_worded_unlike_the_document(facts, questions):
    quotes = defaultdict(list)
    for fact in facts:
        quotes[fact.fact].append(fact.quote)
    answerable = [q for q in questions if q.answer is not None and q.facts]
    shared = []
    for q in answerable:
        asked = content_words(q.question)
        said = content_words(" ".join(quote for name in q.facts for quote in quotes[name]))
        shared.append(len(asked & said) / len(asked))
    assert sum(share < 0.5 for share in shared) / len(answerable) >= 1 / 3


def test_no_two_questions_share_a_frame_with_only_names_and_numbers_swapped(questions):
    frames = Counter(re.sub(r"[A-Z][\w-]*(?: [A-Z][\w-]*)*|\d[\d,.%-]*", "·", q.question) for q in questions)
    assert [frame for frame, count in frames.items() if count > 1] == []


def test_the_datasheet_counts_are_the_real_ones(corpus, facts, questions):
    sheet = (DATASETS / "README.md").read_text()
    values = values_over_time(facts)
    changed = {name for name, found in values.items() if len(found) > 1}
    kinds = Counter(q.kind.replace("_", " ") for q in questions)
    splits = Counter(q.split for q in questions)
    expected = [
        f"{len(corpus.versions)} documents in {len(corpus)} versions",
        f"{len(values):,} facts",
        f"{len(questions)} questions",
        f"{len(changed)} facts in {sum(d.effective == corpus.releases[-1] for d in corpus)} documents",
        f"{sum(q.old_answer is not None for q in questions)} ask about a fact",
        *(f"{kind} {count}" for kind, count in kinds.items()),
        *(f"{split} {count}" for split, count in splits.items()),
    ]
    sheet = " ".join(sheet.split())
    assert [text for text in expected if text not in sheet] == []


def read_csv(name):
    with open(DATASETS / "crm" / name, newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def test_the_crm_extract_agrees_with_itself_and_with_the_documents(corpus):
    accounts = {row["id"]: row for row in read_csv("accounts.csv")}
    assert all(row["account_id"] in accounts for row in [*read_csv("opportunities.csv"), *read_csv("contacts.csv")])
    notes = defaultdict(str)
    for document in corpus.as_of(RELEASE):
        if document.account:
            notes[document.account] += document.text
    assert set(notes) <= set(accounts)
    for id, text in notes.items():
        row = accounts[id]
        assert row["name"] in text, id
        assert row["owner"] in text, id
        assert not row["seats"] or re.search(rf"\b{row['seats']}\b", text), (id, row["seats"])
        assert not row["renewal"] or row["renewal"] in text or day_in_words(row["renewal"]) in text, (id, row["renewal"])


def day_in_words(day):
    parsed = date.fromisoformat(day)
    return f"{parsed.day} {parsed:%B %Y}"
