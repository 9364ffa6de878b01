"""Loading, days, roles, and one clear line for every malformed input."""

import json
import os
from dataclasses import replace
from datetime import date

import pytest

from reference.corpus import (
    Corpus,
    CorpusError,
    assign_splits,
    load_facts,
    load_questions,
    to_day,
    validate_facts,
    validate_questions,
)

GOOD = """---
id: DOC
title: A document
kind: policy
effective: 2026-03-01
roles: [all]
---
# A document

The fee is $5.
"""


def one_line(error) -> str:
    text = str(error.value)
    assert "\n" not in text
    return text


def write(folder, name="DOC@2026-03-01.md", text=GOOD):
    (folder / name).write_text(text, encoding="utf-8")
    return folder


def test_the_latest_version_effective_on_or_before_the_day_is_current(tmp_path):
    write(tmp_path)
    write(tmp_path, "DOC@2026-05-01.md", GOOD.replace("2026-03-01", "2026-05-01").replace("$5", "$6"))
    corpus = Corpus.load(tmp_path)
    assert len(corpus.as_of("2026-02-28")) == 0
    assert "$5" in corpus.as_of("2026-04-30").get("DOC").text
    assert "$6" in corpus.as_of(date(2026, 5, 1)).get("DOC").text
    assert corpus.releases == [date(2026, 5, 1)]


def test_a_version_that_became_restricted_hides_the_earlier_open_one(tmp_path):
    write(tmp_path)
    write(tmp_path, "DOC@2026-05-01.md", GOOD.replace("2026-03-01", "2026-05-01").replace("[all]", "[exec]"))
    current = Corpus.load(tmp_path).as_of("2026-06-01")
    assert len(current.readable_by("all")) == 0
    assert len(current.readable_by("exec")) == 1


def test_everybody_reads_what_is_for_all_and_only_named_roles_the_rest(harbour):
    for role in harbour.roles:
        for document in harbour.readable_by(role):
            assert "all" in document.roles or role in document.roles


def test_the_hash_changes_with_anything_a_reader_could_notice(tmp_path):
    first = Corpus.load(write(tmp_path)).hash
    assert Corpus.load(tmp_path).hash == first
    assert Corpus.load(write(tmp_path, text=GOOD.replace("$5", "$6"))).hash != first
    assert Corpus.load(write(tmp_path, text=GOOD.replace("[all]", "[exec]"))).hash != first


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("# no front matter\n\ntext", "no front matter"),
        (GOOD.replace("title: A document", "title: [unclosed"), "not YAML"),
        (GOOD.replace("title: A document\n", ""), "no title"),
        (GOOD.replace("roles: [all]\n", ""), "no roles"),
        (GOOD.replace("roles: [all]", "roles: []"), "no roles"),
        (GOOD.replace("roles: [all]", "roles: all"), "list of names"),
        (GOOD.replace("roles: [all]", "roles: [1, 2]"), "list of names"),
        (GOOD.replace("kind: policy", "kind: poem"), "unknown kind"),
        (GOOD.replace("effective: 2026-03-01", "effective: 2026-02-31"), "not a day"),
        (GOOD.replace("effective: 2026-03-01", "effective: soon"), "not a day"),
        (GOOD.replace("effective: 2026-03-01", "effective: 2026-03-02"), "agree"),
        (GOOD.split("# A document")[0], "body is empty"),
        ("", "no front matter"),
        ("---\n- a\n---\ntext", "key: value"),
    ],
)
def test_a_malformed_document_is_one_clear_line_that_names_the_file(tmp_path, text, says):
    with pytest.raises(CorpusError) as error:
        Corpus.load(write(tmp_path, text=text))
    line = one_line(error)
    assert says in line
    assert "DOC@2026-03-01.md" in line


def test_a_binary_file_a_doubled_version_an_empty_and_a_missing_folder_are_clear_lines(tmp_path):
    with pytest.raises(CorpusError) as error:
        Corpus.load(tmp_path)
    assert "no documents" in one_line(error)
    with pytest.raises(CorpusError) as error:
        Corpus.load(tmp_path / "nowhere")
    assert "no such folder" in one_line(error)
    write(tmp_path)
    write(tmp_path, "copy.md")
    with pytest.raises(CorpusError) as error:
        Corpus.load(tmp_path)
    assert "a second DOC@2026-03-01" in one_line(error)
    (tmp_path / "copy.md").write_bytes(b"\x89PNG\r\n\x00\xff\xfe")
    with pytest.raises(CorpusError) as error:
        Corpus.load(tmp_path)
    assert "UTF-8" in one_line(error)


def test_an_unreadable_folder_is_a_clear_line(tmp_path):
    folder = tmp_path / "closed"
    folder.mkdir()
    write(folder)
    folder.chmod(0)
    try:
        if os.access(folder, os.R_OK):
            pytest.skip("this user can read every folder")
        with pytest.raises(CorpusError) as error:
            Corpus.load(folder)
        assert "cannot be read" in one_line(error)
    finally:
        folder.chmod(0o700)


def test_a_day_is_a_date_or_iso_text():
    assert to_day("2026-11-21") == date(2026, 11, 21)
    for bad in ("2026-13-01", "tomorrow", None, 5):
        with pytest.raises(CorpusError):
            to_day(bad)


QUESTION = {
    "id": "q1", "question": "What is the fee?", "role": "all", "as_of": "2026-04-01",
    "answer": "$5", "sources": ["DOC"], "kind": "single",
}  # fmt: skip


@pytest.mark.parametrize(
    ("lines", "says"),
    [
        (['{"id": "q1", '], ":1: not JSON"),
        ([json.dumps(QUESTION), "[1]"], ":2: not an object"),
        ([json.dumps({k: v for k, v in QUESTION.items() if k != "role"})], "no role"),
        ([json.dumps(QUESTION | {"kind": "riddle"})], "unknown kind"),
        ([json.dumps(QUESTION | {"split": "final"})], "unknown split"),
        ([json.dumps(QUESTION | {"as_of": "yesterday"})], "not a day"),
        ([json.dumps(QUESTION | {"question": "  "})], "empty"),
        ([json.dumps(QUESTION), json.dumps(QUESTION)], "second question"),
        ([""], "no questions"),
    ],
)
def test_a_malformed_question_file_is_one_clear_line(tmp_path, lines, says):
    path = tmp_path / "questions.jsonl"
    path.write_text("\n".join(lines))
    with pytest.raises(CorpusError) as error:
        load_questions(path)
    assert says in one_line(error)


def test_a_malformed_fact_is_one_clear_line(tmp_path):
    (tmp_path / "facts.jsonl").write_text('{"fact": "a.b", "document": "DOC", "effective": "2026-03-01"}')
    with pytest.raises(CorpusError) as error:
        load_facts(tmp_path / "facts.jsonl")
    assert "a row has" in one_line(error)


def test_the_second_company_is_valid_too(harbour, harbour_facts, harbour_questions):
    assert validate_facts(harbour, harbour_facts) == []
    assert validate_questions(harbour, harbour_questions, harbour_facts) == []


def question_where(questions, condition):
    return next(q for q in questions if condition(q))


def test_each_seeded_fault_in_a_question_is_found(harbour, harbour_facts, harbour_questions):
    answered = question_where(harbour_questions, lambda q: q.kind == "single" and q.old_answer is None)
    changed = question_where(harbour_questions, lambda q: q.old_answer is not None)
    restricted = question_where(harbour_questions, lambda q: q.kind == "restricted")
    faults = [
        (replace(answered, answer="€1,234,567"), "no source says"),
        (replace(answered, sources=("NOPE",)), "does not exist"),
        (replace(answered, sources=()), "needs sources"),
        (replace(answered, role="pirate"), "unknown role"),
        (replace(answered, answer=None), "needs an answer"),
        (replace(answered, facts=("no.such_fact",)), "unknown fact"),
        (replace(changed, old_answer="€1,234,567"), "no earlier version"),
        (replace(changed, old_answer=changed.answer), "also accepted"),
        (replace(changed, as_of=date(2026, 7, 2)), "no source says"),
        (replace(restricted, role="owner"), "may read"),
        (replace(restricted, answer="€5"), "make it null"),
        (replace(answered, kind="multi", sources=answered.sources[:1]), "two sources"),
    ]
    for faulty, says in faults:
        found = validate_questions(harbour, [faulty], harbour_facts)
        assert any(says in problem for problem in found), (says, found)


def test_a_fact_in_two_splits_is_found(harbour, harbour_facts, harbour_questions):
    one = question_where(harbour_questions, lambda q: q.facts and q.kind == "single")
    twin = replace(one, id="twin", split="train")
    assert any("is in splits" in p for p in validate_questions(harbour, [one, twin], harbour_facts))


def test_each_seeded_fault_in_a_fact_is_found(harbour, harbour_facts):
    fact = harbour_facts[0]
    other = next(f for f in harbour_facts if f.document != fact.document)
    faults = [
        ([replace(fact, quote="Nobody ever wrote this.")], "does not say"),
        ([replace(fact, value="€1,234,567")], "does not hold"),
        ([replace(fact, effective=date(2020, 1, 1))], "no such document version"),
        ([fact, fact], "stated twice"),
        ([fact, replace(other, fact=fact.fact)], "contradicts itself"),
    ]
    for rows, says in faults:
        assert any(says in problem for problem in validate_facts(harbour, rows)), says


def test_splits_keep_facts_together_and_do_not_depend_on_the_other_questions(harbour_questions):
    shares = {"train": 0.5, "dev": 0.2, "test": 0.3}
    split = assign_splits(harbour_questions, shares)
    of_fact = {}
    for q in split:
        for fact in q.facts:
            assert of_fact.setdefault(fact, q.split) == q.split
    alone = [q for q in harbour_questions if not q.facts]
    assert [q.split for q in assign_splits(alone, shares)] == [q.split for q in split if not q.facts]
