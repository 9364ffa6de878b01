"""Documents, questions and facts: what loads, what is refused in one line, and what the validators prove."""

import json
import os
from collections import Counter
from dataclasses import replace
from datetime import date

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.corpus import (
    KINDS,
    Corpus,
    CorpusError,
    Document,
    Fact,
    Question,
    assign_splits,
    load_facts,
    load_questions,
    restrict_to_split,
    to_day,
    validate_facts,
    validate_questions,
)

META = {"id": "PRC-A", "title": "Prices", "kind": "price_sheet", "effective": "2026-01-12", "roles": "[ae, exec]"}
QUESTION = {
    "id": "q1", "question": "How much?", "role": "ae", "as_of": "2026-03-01", "answer": "$49",
    "sources": ["PRC-A"], "kind": "single",
}  # fmt: skip
FACT = {"fact": "a.price", "document": "PRC-A", "effective": "2026-01-12", "value": "$49", "quote": "A is $49."}
JANUARY, MARCH, JUNE = date(2026, 1, 1), date(2026, 3, 1), date(2026, 6, 1)


def write(folder, name="PRC-A@2026-01-12.md", body="# Prices\n\nA is $49.", **changes):
    """A document file; a key that is changed to None is left out."""
    head = "".join(f"{key}: {value}\n" for key, value in (META | changes).items() if value is not None)
    path = folder / name
    path.write_text(f"---\n{head}---\n{body}\n", encoding="utf-8")
    return path


def write_jsonl(folder, *rows):
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return path


def refusal(load, *arguments) -> str:
    """The message with which `load` refuses its input; it must be one line."""
    with pytest.raises(CorpusError) as error:
        load(*arguments)
    message = str(error.value)
    assert message and "\n" not in message
    return message


def document(id="A", effective=JANUARY, roles=("all",), text="words", title="T", kind="faq", account=None):
    return Document(id, title, kind, effective, tuple(roles), text, account)


# --- loading --------------------------------------------------------------------------------------------------------


def test_a_document_is_read_with_all_that_its_front_matter_says(tmp_path):
    write(tmp_path, body="# Prices\n\nA is €49.\n\n---\n\nB is 5 ½.\n", account="ACC-7")
    assert list(Corpus.load(tmp_path)) == [
        Document(
            "PRC-A", "Prices", "price_sheet", date(2026, 1, 12), ("ae", "exec"),
            "# Prices\n\nA is €49.\n\n---\n\nB is 5 ½.", "ACC-7",
        )
    ]  # fmt: skip


def test_a_folder_may_be_named_by_a_string_and_only_its_md_files_count(tmp_path):
    write(tmp_path)
    (tmp_path / "README.txt").write_text("not a document")
    (tmp_path / "deeper").mkdir()
    write(tmp_path / "deeper", name="B.md", id="B")
    assert [d.version for d in Corpus.load(str(tmp_path))] == ["PRC-A@2026-01-12"]


def test_documents_come_in_order_of_id_and_day_whatever_their_files_are_called(tmp_path):
    write(tmp_path, name="1.md", id="B", effective="2026-01-01")
    write(tmp_path, name="2.md", id="A", effective="2026-09-01")
    write(tmp_path, name="3.md", id="A", effective="2026-02-01")
    assert [d.version for d in Corpus.load(tmp_path)] == ["A@2026-02-01", "A@2026-09-01", "B@2026-01-01"]


def test_windows_line_ends_change_nothing(tmp_path):
    path = write(tmp_path)
    unix = Corpus.load(tmp_path)
    path.write_bytes(path.read_bytes().replace(b"\n", b"\r\n"))
    assert Corpus.load(tmp_path) == unix


def test_every_kind_of_document_loads(tmp_path):
    for kind in KINDS:
        write(tmp_path, name=f"{kind}.md", id=kind, kind=kind)
    assert {d.kind for d in Corpus.load(tmp_path)} == set(KINDS)


def test_the_second_company_loads_whole(harbour):
    assert len(harbour) == 13 and len(harbour.versions) == 10
    assert harbour.roles == {"all", "finance", "owner", "field_tech", "barista_trainer"}
    assert harbour.releases == [date(2026, 9, 1)]


# --- malformed documents --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        *(({key: None}, f"no {key}") for key in META),
        *(({key: ""}, f"no {key}") for key in META),
        ({"effective": "soon"}, "'soon' is not a day"),
        ({"effective": "2026-11"}, "is not a day"),
        ({"effective": "2026-02-30"}, "not a day"),  # YAML itself chokes on it
        ({"effective": "2026-13-01"}, "not a day"),
        ({"effective": "2026-02-03 10:00:00"}, "is not a day"),
        ({"kind": "blog"}, "unknown kind 'blog'"),
        ({"kind": "[faq]"}, "unknown kind"),
        ({"roles": "all"}, "roles must be a list"),
        ({"roles": "ae, exec"}, "roles must be a list"),
        ({"roles": "{ae: exec}"}, "roles must be a list"),
        ({"roles": "[]"}, "no roles"),
        ({"roles": "[1, 2]"}, "roles must be a list of names"),
        ({"roles": "[ae, null]"}, "roles must be a list of names"),
        ({"roles": "['']"}, "roles must be a list of names"),
        ({"roles": "[[all]]"}, "roles must be a list of names"),
        ({"title": "Prices: the list"}, "not YAML"),
        ({"title": '"open'}, "not YAML"),
        ({"title": "!!python/object/apply:os.getcwd []"}, "not YAML"),
        ({"body": ""}, "body is empty"),
        ({"body": " \n\n\t\n"}, "body is empty"),
    ],
)  # fmt: skip
def test_a_malformed_document_is_refused_in_one_line_that_names_its_file(tmp_path, changes, complaint):
    path = write(tmp_path, **{"name": "x.md"} | changes)
    message = refusal(Corpus.load, tmp_path)
    assert message.startswith(f"{path}: ") and complaint in message


@pytest.mark.parametrize(
    "text",
    [
        "",
        "\n",
        "# Prices\n\nA is $49.\n",
        "---\nid: A\n",
        "---\nid: A\n# no closing line\n",
        " ---\nid: A\n---\nwords\n",
        "---\n---\n",
    ],
)
def test_a_file_without_front_matter_is_refused(tmp_path, text):
    (tmp_path / "A.md").write_text(text)
    message = refusal(Corpus.load, tmp_path)
    assert "A.md" in message and "no front matter" in message


def test_front_matter_that_is_no_mapping_is_refused(tmp_path):
    (tmp_path / "A.md").write_text("---\n- id\n- title\n---\nwords\n")
    assert "`key: value`" in refusal(Corpus.load, tmp_path)


def test_a_binary_file_is_refused(tmp_path):
    (tmp_path / "A.md").write_bytes(bytes(range(256)))
    message = refusal(Corpus.load, tmp_path)
    assert "A.md" in message and "UTF-8" in message


def test_a_folder_called_like_a_document_and_a_link_to_nowhere_are_refused(tmp_path):
    (tmp_path / "A.md").mkdir()
    assert "A.md: cannot be read" in refusal(Corpus.load, tmp_path)
    (tmp_path / "A.md").rmdir()
    (tmp_path / "A.md").symlink_to(tmp_path / "nowhere")
    assert "A.md: cannot be read" in refusal(Corpus.load, tmp_path)


@pytest.mark.parametrize("changes", [{"id": "PRC-B"}, {"effective": "2026-01-13"}])
def test_a_name_that_disagrees_with_the_front_matter_is_refused(tmp_path, changes):
    write(tmp_path, **changes)
    assert "make the name and the front matter agree" in refusal(Corpus.load, tmp_path)


def test_a_second_document_of_the_same_id_and_day_is_refused(tmp_path):
    write(tmp_path)
    write(tmp_path, name="copy.md", body="something else")
    message = refusal(Corpus.load, tmp_path)
    assert "copy.md" in message and "a second PRC-A@2026-01-12" in message


def test_one_malformed_document_among_good_ones_is_refused(tmp_path):
    write(tmp_path)
    write(tmp_path, name="B.md", id="B", roles=None)
    assert "B.md: front matter has no roles" in refusal(Corpus.load, tmp_path)


def test_a_folder_without_documents_and_no_folder_are_refused(tmp_path):
    assert "no documents" in refusal(Corpus.load, tmp_path)
    assert "no such folder" in refusal(Corpus.load, tmp_path / "nowhere")
    assert "no such folder" in refusal(Corpus.load, write(tmp_path))


@pytest.fixture
def closed(tmp_path):
    """A folder, with one document, that nobody may enter."""
    folder = tmp_path / "closed"
    folder.mkdir()
    write(folder)
    folder.chmod(0)
    if os.access(folder, os.R_OK):
        pytest.skip("this user (root, most likely) can read every folder whatever its permissions")
    yield folder
    folder.chmod(0o700)


def test_an_unreadable_folder_and_an_unreadable_file_are_refused(closed):
    assert "cannot be read" in refusal(Corpus.load, closed)
    closed.chmod(0o700)
    next(closed.iterdir()).chmod(0)
    assert "cannot be read" in refusal(Corpus.load, closed)


def test_a_folder_inside_an_unreadable_one_is_refused(closed):
    assert "deeper" in refusal(Corpus.load, closed / "deeper")


# --- what is current, what a role may read --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("day", "current"),
    [
        ("2026-08-31", ["PRC-RENTAL@2026-01-12"]),
        ("2026-09-01", ["PRC-RENTAL@2026-09-01"]),
        (date(2099, 1, 1), ["PRC-RENTAL@2026-09-01"]),
        ("2026-01-12", ["PRC-RENTAL@2026-01-12"]),
        ("2026-01-11", []),
    ],
)
def test_a_version_is_current_from_its_first_day_until_the_next_one_begins(harbour, day, current):
    assert [d.version for d in harbour.as_of(day) if d.id == "PRC-RENTAL"] == current


def test_a_role_reads_what_names_it_and_what_is_for_everybody():
    corpus = Corpus(
        (document("A"), document("B", roles=["ae"]), document("C", roles=["exec", "ae"]), document("D", roles=["exec"]))
    )
    assert [d.id for d in corpus.readable_by("ae")] == ["A", "B", "C"]
    assert [d.id for d in corpus.readable_by("exec")] == ["A", "C", "D"]
    assert [d.id for d in corpus.readable_by("stranger")] == [d.id for d in corpus.readable_by("all")] == ["A"]
    assert [d.id for d in corpus.readable_by("a")] == [d.id for d in corpus.readable_by("")] == ["A"]
    assert corpus.roles == {"all", "ae", "exec"}


def test_a_role_that_lost_a_document_does_not_get_its_old_version():
    corpus = Corpus((document(roles=["all"]), document(effective=MARCH, roles=["exec"])))
    assert len(corpus.as_of(JANUARY).readable_by("ae")) == 1
    assert len(corpus.as_of(JUNE).readable_by("ae")) == 0


versions = st.builds(
    document,
    id=st.sampled_from("ABC"),
    effective=st.dates(date(2026, 1, 1), date(2026, 1, 9)),
    roles=st.lists(st.sampled_from(["all", "ae", "o'neill"]), min_size=1, unique=True),
)


@given(st.lists(versions, unique_by=lambda d: d.version), st.dates(date(2025, 12, 31), date(2026, 1, 10)))
def test_as_of_then_readable_by_gives_the_newest_versions_that_the_role_may_read(drawn, day):
    corpus = Corpus(tuple(sorted(drawn, key=lambda d: (d.id, d.effective))))
    for role in ("ae", "o'neill", "all", "stranger"):
        expected = []
        for id in "ABC":
            begun = [d for d in drawn if d.id == id and d.effective <= day]
            newest = max(begun, key=lambda d: d.effective, default=None)
            if newest and ("all" in newest.roles or role in newest.roles):
                expected.append(newest)
        assert list(corpus.as_of(day).readable_by(role)) == expected
    assert len(corpus) == len(drawn)  # nothing was changed


def test_get_gives_the_latest_version_here_or_says_that_there_is_none(harbour):
    assert harbour.get("PRC-RENTAL").version == "PRC-RENTAL@2026-09-01"
    assert harbour.as_of("2026-08-31").get("PRC-RENTAL").version == "PRC-RENTAL@2026-01-12"
    assert "no document 'NOPE'" in refusal(harbour.get, "NOPE")
    assert "OWN-SUPPLY" in refusal(harbour.readable_by("finance").get, "OWN-SUPPLY")


def test_a_release_is_a_day_on_which_a_document_got_a_new_version():
    first = [document("A"), document("B", MARCH)]
    assert Corpus(tuple(first)).releases == []
    later = [
        document("A"),
        document("A", MARCH),
        document("A", JUNE),
        document("B"),
        document("B", JUNE),
        document("C", date(2026, 9, 1)),
    ]
    assert Corpus(tuple(later)).releases == [MARCH, JUNE]


@pytest.mark.parametrize("day", ["tomorrow", "2026-02-30", "21/11/2026", "", None, 20261121])
def test_what_is_not_a_day_is_refused(harbour, day):
    assert "is not a day" in refusal(to_day, day)
    assert "is not a day" in refusal(harbour.as_of, day)


# --- the hash -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "change",
    [
        {"id": "B"}, {"title": "U"}, {"kind": "policy"}, {"effective": MARCH}, {"roles": ("ae",)}, {"text": "words."},
        {"account": "ACC-1"},
    ],
)  # fmt: skip
def test_the_hash_changes_with_everything_that_a_reader_could_notice(change):
    before = document()
    assert Corpus((before,)).hash != Corpus((replace(before, **change),)).hash


def test_the_hash_changes_with_the_documents_and_not_with_where_their_text_ends():
    one, two = Corpus((document("A", text="x"), document("B", text="y"))), Corpus((document("A", text="x"),))
    assert one.hash != two.hash
    assert one.hash != Corpus((document("A", text="xy"), document("B", text=""))).hash


def test_the_hash_is_the_same_after_loading_again_from_another_place(tmp_path):
    hashes = set()
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        write(tmp_path / name, name=f"{name}.md")
        hashes.add(Corpus.load(tmp_path / name).hash)
    assert len(hashes) == 1 and len(hashes.pop()) == 12


# --- files of questions and facts -----------------------------------------------------------------------------------


def test_a_question_has_defaults_for_what_may_be_left_out(tmp_path):
    [q] = load_questions(write_jsonl(tmp_path, QUESTION | {"accept": None, "note": "ignored"}))
    assert q == Question("q1", "How much?", "ae", date(2026, 3, 1), "$49", (), ("PRC-A",), "single", "test", None, ())
    assert q.right_answers == ("$49",)
    assert replace(q, accept=("49 dollars",)).right_answers == ("$49", "49 dollars")
    assert replace(q, answer=None).right_answers == ()


def test_blank_lines_and_unusual_line_separators_inside_a_string_are_no_new_rows(tmp_path):
    path = write_jsonl(tmp_path, QUESTION | {"question": "one\u2028two\u0085three"})
    path.write_text("\n" + path.read_text(encoding="utf-8") + "\n \n", encoding="utf-8")
    assert [q.question for q in load_questions(path)] == ["one\u2028two\u0085three"]


@pytest.mark.parametrize("load", [load_questions, load_facts])
@pytest.mark.parametrize(
    ("third", "complaint"),
    [("{oops", "not JSON"), ('{"id": "q"', "not JSON"), ("[1, 2]", "not an object"), ('"q"', "not an object")],
)
def test_a_broken_line_is_named_by_its_number(tmp_path, load, third, complaint):
    path = write_jsonl(tmp_path, QUESTION | FACT, {})
    path.write_text(f"{json.dumps(QUESTION)}\n\n{third}\n{json.dumps(QUESTION)}\n", encoding="utf-8")
    assert f"{path}:3: {complaint}" in refusal(load, path)


@pytest.mark.parametrize("load", [load_questions, load_facts])
def test_a_file_that_is_missing_or_binary_is_refused(tmp_path, load):
    assert "cannot be read" in refusal(load, tmp_path / "nowhere.jsonl")
    assert "cannot be read" in refusal(load, tmp_path)
    (tmp_path / "x.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "UTF-8" in refusal(load, tmp_path / "x.jsonl")


@pytest.mark.parametrize("key", QUESTION)
def test_a_question_that_lacks_a_key_is_refused_by_name(tmp_path, key):
    row = {name: value for name, value in QUESTION.items() if name != key}
    message = refusal(load_questions, write_jsonl(tmp_path, row))
    assert f"no {key}" in message and ("question 1:" if key == "id" else "question q1:") in message


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"kind": "riddle"}, "unknown kind 'riddle'"),
        ({"split": "exam"}, "unknown split 'exam'"),
        ({"as_of": "soon"}, "'soon' is not a day"),
        ({"as_of": None}, "is not a day"),
        ({"question": " "}, "question is empty"),
        ({"question": 7}, "question is 7"),
        ({"accept": "$49"}, "accept is '$49'; write a list"),  # not the list of its letters
        ({"sources": "PRC-A"}, "sources is 'PRC-A'; write a list"),
        ({"facts": 5}, "facts is 5; write a list"),
        ({"id": ["q1"]}, "id is ['q1']"),
        ({"answer": 49}, "answer is 49"),
        ({"old_answer": 39}, "old_answer is 39"),
    ],
)
def test_a_question_with_a_malformed_value_is_refused(tmp_path, change, complaint):
    assert complaint in refusal(load_questions, write_jsonl(tmp_path, QUESTION | change))


def test_a_second_question_of_the_same_id_and_a_file_without_questions_are_refused(tmp_path):
    assert "question q1: a second" in refusal(
        load_questions, write_jsonl(tmp_path, QUESTION, QUESTION | {"question": "Other?"})
    )
    assert "no questions" in refusal(load_questions, write_jsonl(tmp_path))


def test_a_fact_is_read_with_its_version(tmp_path):
    [fact] = load_facts(write_jsonl(tmp_path, FACT))
    assert fact == Fact("a.price", "PRC-A", date(2026, 1, 12), "$49", "A is $49.")
    assert fact.version == "PRC-A@2026-01-12" and not fact.outdated


@pytest.mark.parametrize("key", FACT)
def test_a_fact_that_lacks_a_key_is_refused(tmp_path, key):
    refusal(load_facts, write_jsonl(tmp_path, {name: value for name, value in FACT.items() if name != key}))


def test_a_fact_with_an_unknown_key_or_a_bad_day_is_refused(tmp_path):
    assert "surprise" in refusal(load_facts, write_jsonl(tmp_path, FACT | {"surprise": 1}))
    assert "'soon' is not a day" in refusal(load_facts, write_jsonl(tmp_path, FACT | {"effective": "soon"}))


# --- validation: the second company is clean, and each fault is found --------------------------------------------------


def test_the_second_company_has_no_problems(harbour, harbour_facts, harbour_questions):
    assert len(harbour_facts) > 100 and len(harbour_questions) == 20
    assert validate_facts(harbour, harbour_facts) == []
    assert validate_questions(harbour, harbour_questions, harbour_facts) == []


def row_of(facts, name, effective) -> int:
    return next(i for i, fact in enumerate(facts) if fact.fact == name and str(fact.effective) == effective)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        ({"effective": date(2026, 9, 2)}, "no such document version"),
        ({"document": "PRC-NOPE"}, "no such document version"),
        ({"quote": "| Pico 2S | €43 per month | 6 months minimum | €110 deposit |"}, "the document does not say"),
        ({"quote": "| Pico 2S | €42 Per month"}, "the document does not say"),
        ({"quote": ""}, "the document does not say"),
        ({"value": "€39 per month"}, "the quote does not hold '€39 per month'"),
        ({"value": "€4"}, "the quote does not hold '€4'"),
        ({"value": ""}, "the quote does not hold ''"),
    ],
)
def test_a_fact_that_its_document_does_not_state_is_found(harbour, harbour_facts, change, complaint):
    facts = list(harbour_facts)
    row = row_of(facts, "pico-2s.rent", "2026-09-01")
    facts[row] = replace(facts[row], **change)
    [problem] = validate_facts(harbour, facts)
    assert problem.startswith("fact pico-2s.rent in ") and complaint in problem


def test_a_fact_stated_twice_in_one_version_is_found(harbour, harbour_facts):
    assert [p.endswith("stated twice") for p in validate_facts(harbour, [*harbour_facts, harbour_facts[0]])] == [True]


def test_two_documents_that_contradict_each_other_are_found_on_each_day_unless_one_is_marked_outdated(harbour, harbour_facts):
    facts = list(harbour_facts)
    row = row_of(facts, "pico-2.burr_size", "2025-11-03")
    facts[row] = replace(facts[row], fact="pico-2.rent")  # "58 mm burrs" against "€31 per month", once there is a price sheet
    problems = validate_facts(harbour, facts)
    assert problems and all("fact pico-2.rent: contradicts itself on " in p and "€31 per month" in p for p in problems)
    days = {d.effective for d in harbour if d.effective >= date(2026, 1, 12)}
    assert len(problems) == len(days)
    facts[row] = replace(facts[row], outdated=True)
    assert validate_facts(harbour, facts) == []


def test_a_new_version_with_a_new_value_is_no_contradiction_but_a_second_document_with_the_old_one_is(harbour, harbour_facts):
    old = next(f for f in harbour_facts if f.fact == "pico-2s.rent" and f.value == "€39 per month")
    memo = document("MEMO", effective=date(2026, 2, 1), text=f"From the sheet: {old.quote}")
    corpus = Corpus(tuple(sorted([*harbour, memo], key=lambda d: (d.id, d.effective))))
    facts = [*harbour_facts, replace(old, document="MEMO", effective=memo.effective)]
    problems = validate_facts(corpus, facts)
    assert len(problems) == 1 and "pico-2s.rent: contradicts itself on 2026-09-01: €39 per month / €42 per month" in problems[0]


SINGLE, COMMON, PLAYBOOK, FINANCE, MULTI = "harbour-01", "harbour-06", "harbour-08", "harbour-09", "harbour-11"
COMPARISON, UNANSWERABLE, ELSEWHERE, RESTRICTED = "harbour-13", "harbour-15", "harbour-17", "harbour-18"


@pytest.mark.parametrize(
    ("id", "change", "complaint"),
    [
        (SINGLE, {"sources": ("PRC-RENTAL", "NOPE")}, "source NOPE does not exist on 2026-09-14"),
        (UNANSWERABLE, {"sources": ("NOPE",)}, "source NOPE does not exist"),
        (COMMON, {"as_of": date(2025, 11, 30)}, "source POL-SERVICE does not exist on 2025-11-30"),
        (SINGLE, {"role": "barista"}, "unknown role barista"),
        (UNANSWERABLE, {"answer": "€42 per month", "sources": ("PRC-RENTAL",)}, "unanswerable question has no answer"),
        (ELSEWHERE, {"answer": "€42 per month", "sources": ("PRC-RENTAL",)}, "out_of_domain question has no answer"),
        (RESTRICTED, {"answer": "€3,150 per machine"}, "restricted question has no answer"),
        (SINGLE, {"answer": None}, "single question needs an answer"),
        (MULTI, {"answer": None}, "multi question needs an answer"),
        (COMPARISON, {"answer": None}, "comparison question needs an answer"),
        (MULTI, {"sources": ("PRC-RENTAL",)}, "multi question needs two sources"),
        (COMPARISON, {"sources": ("POL-SERVICE",)}, "comparison question needs two sources"),
        (RESTRICTED, {"sources": ()}, "names the sources that its role may not read"),
        (RESTRICTED, {"role": "owner"}, "owner may read OWN-SUPPLY, so it is not restricted"),
        (RESTRICTED, {"sources": ("OWN-SUPPLY", "PRC-RENTAL")}, "field_tech may read PRC-RENTAL, so it is not restricted"),
        (FINANCE, {"role": "field_tech"}, "field_tech may not read source FIN-ARREARS"),
        (PLAYBOOK, {"role": "all"}, "all may not read source PLB-DESCALE"),
        (SINGLE, {"sources": ()}, "an answer needs sources"),
        (SINGLE, {"answer": "€43 per month"}, "no source says '€43 per month'"),
        (SINGLE, {"answer": "€39 per month"}, "no source says '€39 per month' on 2026-09-14"),
        (SINGLE, {"as_of": date(2026, 8, 31)}, "no source says '€42 per month' on 2026-08-31"),
        (SINGLE, {"sources": ("NOTE-PICO",)}, "no source says '€42 per month'"),
        (COMPARISON, {"answer": "€95 per visit; €141 per session"}, "no source says '€141 per session'"),
        (SINGLE, {"old_answer": "€38 per month"}, "no earlier version of its sources said '€38 per month'"),
        (SINGLE, {"old_answer": "€42 per month"}, "old_answer is also accepted as right"),
        (SINGLE, {"old_answer": "€42"}, "old_answer is also accepted as right"),
        (COMPARISON, {"old_answer": "€85 per visit; €139 per session"}, "no earlier version of its sources said '€139"),
        (COMMON, {"as_of": date(2026, 8, 11), "old_answer": "€85 per visit"}, "no earlier version of its sources said"),
        (COMMON, {"as_of": date(2026, 8, 11), "old_answer": "€95 per visit"}, "no earlier version of its sources said"),
        (SINGLE, {"facts": ("pico-2s.rent", "nope")}, "unknown fact nope"),
        (MULTI, {"split": "train"}, "fact pico-2s.rent is in splits test and train"),
        (SINGLE, {"facts": ("mare-duo.pump",)}, "no source states mare-duo.pump on 2026-09-14"),
        (SINGLE, {"facts": ("pico-2.rent",)}, "answer '€42 per month' is not the ledger's €31 per month"),
        (COMMON, {"answer": "6 working hours"}, "answer '6 working hours' is not the ledger's"),
        (RESTRICTED, {"facts": ("mare-duo.rent",)}, "field_tech can read mare-duo.rent in PRC-RENTAL@2026-09-01"),
    ],
)  # fmt: skip
def test_a_faulty_question_is_found(harbour, harbour_facts, harbour_questions, id, change, complaint):
    questions = [replace(q, **change) if q.id == id else q for q in harbour_questions]
    problems = validate_questions(harbour, questions, harbour_facts)
    assert any(problem.startswith(f"question {id}: ") and complaint in problem for problem in problems), problems
    assert all("\n" not in problem and problem.startswith(f"question {id}: ") for problem in problems)


def test_a_restricted_fact_that_another_readable_document_states_is_found(harbour, harbour_facts, harbour_questions):
    secret = next(f for f in harbour_facts if f.fact == "mare-duo.purchase_price")
    blog = document("BLOG", effective=date(2026, 5, 1), text=f"Heard in the depot: {secret.quote}")
    corpus = Corpus(tuple(sorted([*harbour, blog], key=lambda d: (d.id, d.effective))))
    facts = [*harbour_facts, replace(secret, document="BLOG", effective=blog.effective)]
    assert validate_facts(corpus, facts) == []
    [problem] = validate_questions(corpus, harbour_questions, facts)
    assert "field_tech can read mare-duo.purchase_price in BLOG@2026-05-01, so it is not restricted" in problem


def test_a_ledger_is_not_needed_for_questions_that_name_no_facts(harbour, harbour_questions):
    assert validate_questions(harbour, [replace(q, facts=()) for q in harbour_questions]) == []


# --- splits ---------------------------------------------------------------------------------------------------------

SHARES = {"train": 0.6, "dev": 0.2, "test": 0.2}


def about(id, *facts):
    return Question(id, "?", "ae", JUNE, "x", (), ("A",), "single", facts=facts)


def splits(questions):
    return {q.id: q.split for q in assign_splits(questions, SHARES)}


fact_names = st.lists(st.sampled_from([f"f{n}" for n in range(12)]), max_size=3, unique=True)
question_sets = st.lists(fact_names, max_size=15).map(lambda sets: [about(f"q{n}", *facts) for n, facts in enumerate(sets)])


@given(question_sets)
def test_questions_that_share_a_fact_land_in_one_split(questions):
    dealt = assign_splits(questions, SHARES)
    assert [replace(q, split="test") for q in dealt] == questions  # nothing but the split has changed
    for fact in {fact for q in dealt for fact in q.facts}:
        assert len({q.split for q in dealt if fact in q.facts}) == 1


def test_questions_that_share_a_fact_through_others_land_in_one_split():
    for n in range(50):
        chain = [about(f"{n}.{i}", f"{n}.f{i}", f"{n}.f{i + 1}") for i in range(6)]
        assert len(set(splits(chain).values())) == 1


@given(question_sets)
def test_the_same_questions_always_land_the_same_way_and_a_new_fact_moves_no_other(questions):
    before = splits(questions)
    assert splits(questions) == before
    new = [about("new1", "new.a"), about("new2", "new.a", "new.b"), about("new3")]
    assert {id: split for id, split in splits([*new, *questions]).items() if id in before} == before


def test_the_order_of_the_questions_does_not_matter():
    for n in range(30):
        questions = [about("q1", f"{n}.a", f"{n}.b"), about("q2", f"{n}.c", f"{n}.b"), about("q3", f"{n}.d")]
        assert splits(questions[::-1]) == splits(questions)


def test_each_split_gets_about_its_share():
    counts = Counter(splits([about(f"q{n}", f"fact{n}") for n in range(2000)]).values())
    assert all(abs(counts[split] / 2000 - share) < 0.04 for split, share in SHARES.items()), counts
    assert set(splits([about(f"q{n}") for n in range(200)]).values()) == set(SHARES)


def test_restricting_to_a_split_keeps_its_questions_in_order():
    dealt = assign_splits([about(f"q{n}") for n in range(50)], SHARES)
    kept = [restrict_to_split(dealt, split) for split in SHARES]
    assert sorted((q for part in kept for q in part), key=dealt.index) == dealt
    assert all(q.split == split for split, part in zip(SHARES, kept, strict=True) for q in part)
    assert all(part == sorted(part, key=dealt.index) for part in kept)
