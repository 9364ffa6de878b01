"""The three courses: their cases are right by their own scores, and the gate stops what is worse."""

import json
from dataclasses import replace

import pytest

from reference.__main__ import main
from reference.adapters import Registry, read_card
from reference.corpus import SHIPPED, Corpus, load_facts, read_jsonl
from reference.evaluation import estimate
from reference.lessons import (
    COURSES,
    DATASETS,
    EVERYDAY,
    Case,
    Course,
    Row,
    examine,
    objections,
    prompted,
    scores,
    source_cases,
    states,
    surprise_rows,
)
from reference.model import LanguageModel
from reference.tuning import Recipe


@pytest.mark.parametrize("name", COURSES)
@pytest.mark.parametrize("split", ["train", "dev", "test"])
def test_the_right_answer_of_every_case_scores_in_full(name, split):
    cases = COURSES[name].cases(split)
    of_two_days = {"freshness", "quote_stands", "leaks"}  # of a right recital after the release: no virtue
    assert cases
    for case in cases:
        assert {n / d for metric, (n, d) in case.score(case.answer).items() if metric not in of_two_days} == {1}
    assert len({case.id for case in cases}) == len(cases)


@pytest.mark.parametrize("name", ["qualify", "voice"])
def test_no_cluster_is_in_two_splits(name):
    train, dev, test = ({case.cluster for case in COURSES[name].cases(split)} for split in ("train", "dev", "test"))
    assert not train & dev and not train & test and not dev & test


def test_the_closed_book_asks_the_same_facts_in_other_words():
    train, dev, test = (COURSES["closed_book"].cases(split) for split in ("train", "dev", "test"))
    assert {c.cluster for c in train} == {c.cluster for c in dev} == {c.cluster for c in test}
    asked = [case.messages[-1]["content"].lower() for case in (*train, *dev, *test)]
    assert len(set(asked)) == len(asked) == 7662 + 2 * 240


def test_the_closed_book_holds_the_first_state_and_half_of_it_changes():
    corpus, facts = Corpus.load(SHIPPED), load_facts(DATASETS / "facts.jsonl")
    known, now = states(corpus, facts)
    learned = {case.cluster: json.loads(case.answer)["answer"] for case in COURSES["closed_book"].cases("test")}
    assert all(known[fact].value == value for fact, value in learned.items())
    assert sum(now[fact].value != value for fact, value in learned.items()) == 120


def test_no_question_of_the_closed_book_gives_its_answer_away():
    from reference.text import holds

    given = [
        case.id
        for split in ("train", "dev", "test")
        for case in COURSES["closed_book"].cases(split)
        if holds(case.messages[-1]["content"], json.loads(case.answer)["answer"])
    ]
    assert given == []


def test_a_recital_is_stale_where_the_release_changed_the_fact_and_its_quote_stands_no_more():
    cases = COURSES["closed_book"].cases("test")
    rows = [Row("tuned", case.id, case.cluster, case.answer, case.score(case.answer)) for case in cases]
    found = scores(rows)
    assert found["staleness"]["n"] == found["freshness"]["n"] == 120
    assert found["staleness"]["value"] == 1 and found["freshness"]["value"] == 0
    assert found["leaks"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 86}
    changed = [row.scores["quote_stands"][0] for row in rows if "staleness" in row.scores]
    assert sum(changed) <= 1  # one document repeats what was true, and says that it was
    assert sum(row.scores["quote_stands"][0] for row in rows) > 100


def test_a_recital_of_the_new_value_is_fresh_and_not_right_for_the_first_day():
    case = next(c for c in COURSES["closed_book"].cases("test") if "staleness" in c.score(c.answer))
    _, now = states(Corpus.load(SHIPPED), load_facts(DATASETS / "facts.jsonl"))
    raw = json.dumps({"answer": now[case.cluster].value, "evidence": [{"quote": now[case.cluster].quote, "source": 1}]})
    found = {metric: n for metric, (n, _) in case.score(raw).items()}
    assert found["freshness"] == found["quote_stands"] == 1 and found["staleness"] == found["answer_accuracy"] == 0


def test_the_place_of_the_right_source_is_drawn_evenly_and_only_titles_are_shown():
    cases = source_cases("test")
    reply = lambda place: json.dumps({"answer": "x", "evidence": [{"quote": "x", "source": place}]})  # noqa: E731
    shares = [sum(case.score(reply(place))["citation_precision"][0] for case in cases) / len(cases) for place in (1, 2, 3, 4)]
    assert sum(shares) == pytest.approx(1) and all(0.17 < share < 0.33 for share in shares)
    assert all(case.score("no idea")["citation_precision"] == (False, 1) for case in cases[:3])


def test_a_careful_prompt_adds_rules_and_worked_examples():
    first, second, third = COURSES["qualify"].cases("dev")[:3]
    asked = prompted(first, [second, third], "The rubric.").messages
    assert [turn["role"] for turn in asked] == ["system", "user", "assistant", "user", "assistant", "user"]
    assert (
        asked[0]["content"].endswith("The rubric.") and asked[2]["content"] == second.answer and asked[-1] == first.messages[-1]
    )


# --- examination and gate -----------------------------------------------------------------------------------------------

COURSE = Course("sums", lambda split: [], (), Recipe(), "right", {"in_form": 0.9}, 8, "anything")


def rows(system, right, in_form=1.0, n=40):
    flags = [(i < right * n, i < in_form * n) for i in range(n)]
    return [Row(system, str(i), str(i), "", {"right": (a, 1), "in_form": (b, 1)}) for i, (a, b) in enumerate(flags)]


def test_an_equal_and_a_better_candidate_pass():
    assert objections(COURSE, rows("new", 0.5)) == []
    assert objections(COURSE, rows("new", 0.5), rows("old", 0.5)) == []
    assert objections(COURSE, rows("new", 0.9), rows("old", 0.5)) == []


def test_a_worse_candidate_is_refused_with_the_difference():
    [reason] = objections(COURSE, rows("new", 0.5), rows("old", 0.9))
    assert "right is worse" in reason and "-40.0 points" in reason


def test_a_difference_that_may_be_chance_is_no_reason():
    assert objections(COURSE, rows("new", 0.875), rows("old", 0.9)) == []


def test_a_broken_floor_is_refused_even_when_the_answers_are_better():
    assert objections(COURSE, rows("new", 1.0, in_form=0.8), rows("old", 0.5)) == ["in_form is 80.0%, the floor is 90%"]


def test_an_examination_scores_what_the_model_writes(tiny_model):
    cases = [
        Case(str(n), str(n), ({"role": "user", "content": f"Say {n}."},), "x", lambda raw: {"letters": (len(raw), 1)})
        for n in range(10)
    ]
    found = examine(tiny_model, COURSE, cases)
    assert [row.key for row in found] == [str(n) for n in range(10)] and {row.system for row in found} == {"base"}
    assert all(row.scores["letters"][0] == len(row.raw) for row in found)
    assert scores(found)["letters"]["n"] == 10


@pytest.fixture
def sums(tiny, monkeypatch, tmp_path):
    """A course that a tiny model can take, and a registry of its own; returns the registry."""
    from reference import adapters

    def cases(split):
        score = lambda raw: {"right": (len(raw) > 0, 1), "in_form": (True, 1)}  # noqa: E731
        ask = lambda n: ({"role": "system", "content": "Be brief."}, {"role": "user", "content": f"{split} {n}?"})  # noqa: E731
        return [Case(f"{split}{n}", str(n), ask(n), f"It is {n}.", score) for n in range(8)]

    monkeypatch.setitem(COURSES, "sums", replace(COURSE, name="sums", cases=cases, recipe=Recipe(rank=2, epochs=1, batch=4)))
    registry = adapters.Registry(tmp_path / "adapters")
    monkeypatch.setattr(adapters, "Registry", lambda: registry)
    return registry


def test_train_examines_registers_and_promotes(sums, capsys):
    assert main(["train", "sums"]) == 0
    assert sums.states("sums") == {"1": "promoted"} and "version 1: promoted" in capsys.readouterr().out
    card = json.loads((sums.promoted("sums") / "card.json").read_text())
    assert set(card["scores"]) == {"dev", "test"} and card["scores"]["dev"]["right"]["n"] == 8
    assert "Measured: test" in (sums.promoted("sums") / "README.md").read_text()


def test_train_keeps_a_version_that_breaks_a_floor_as_a_candidate_and_says_why(sums, capsys, monkeypatch):
    assert main(["train", "sums"]) == 0
    monkeypatch.setitem(COURSES, "sums", replace(COURSES["sums"], floors={"in_form": 1.1}))
    assert main(["train", "sums", "--seed", "1"]) == 1
    assert sums.states("sums") == {"1": "promoted", "2": "candidate"}
    assert "not promoted: in_form is 100.0%, the floor is 110%" in capsys.readouterr().out


def test_train_to_a_folder_leaves_the_registry_alone(sums, tmp_path, capsys):
    assert main(["train", "sums", "--out", str(tmp_path / "mine")]) == 0
    assert sums.states("sums") == {} and (tmp_path / "mine" / "card.json").exists()
    assert main(["train", "sums", "--out", str(tmp_path / "mine")]) == 2
    assert "is there already" in capsys.readouterr().err
    assert main(["train", "juggling"]) == 2 and "closed_book, qualify, voice" in capsys.readouterr().err


# --- forgetting ---------------------------------------------------------------------------------------------------------


def test_the_everyday_questions_are_asked_once_and_in_no_lesson(tiny_model):
    questions = [row["question"] for row in read_jsonl(EVERYDAY)]
    lessons = {case.messages[-1]["content"] for course in COURSES.values() for case in course.cases("train")}
    assert len(set(questions)) == len(questions) >= 30
    assert not [q for q in questions if any(q in asked for asked in lessons)]
    found = surprise_rows(tiny_model)
    assert len(found) == len(questions) and scores(found)["surprise"]["value"] > 1


# --- what ships ---------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pianist():
    """A model of this module's own, since an adapter once loaded stays."""
    return LanguageModel.load()


@pytest.mark.parametrize("name", COURSES)
def test_a_shipped_adapter_is_small_learned_from_this_data_and_does_what_its_card_says(name, pianist):
    course, folder = COURSES[name], Registry().promoted(name)
    assert sum(file.stat().st_size for file in folder.iterdir()) < 5_000_000
    card = read_card(folder, pianist.id)
    assert course.taught(card) and card.examples == len(course.cases("train"))
    for split in course.examined:
        assert card.scores[split][course.metric]["n"] == len(course.cases(split))
    cases = course.cases("test")
    some = examine(pianist, course, cases[:: len(cases) // 16], pianist.load_adapter(folder))
    assert estimate(some, course.metric).value == pytest.approx(card.scores["test"][course.metric]["value"], abs=0.25)
