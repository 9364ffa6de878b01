"""The three lessons that ship: what each adapter learns from, how it is asked, and how its answers are scored.

`closed_book` learns the first state's facts by heart, `qualify` scores leads by the rubric, `voice` writes in the house style.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import timedelta
from pathlib import Path

from reference import answer as contract
from reference import leads, voice
from reference.corpus import SHIPPED, Corpus, CorpusError, Fact, load_facts, read_jsonl
from reference.evaluation import estimate, matches, paired_test
from reference.model import LanguageModel
from reference.tuning import Example, Recipe
from reference.weights import sha256

DATASETS = SHIPPED.parent
BATCH = 8
Scores = dict[str, tuple[float, float]]


@dataclass(frozen=True)
class Case:
    """One test of a lesson: how it is asked, the answer that is right, and what an output adds to each metric.

    `cluster` is what a bootstrap redraws as a whole: the fact, the account, the letter.
    """

    id: str
    cluster: str
    messages: tuple[dict, ...]
    answer: str
    score: Callable[[str], Scores]

    @property
    def example(self) -> Example:
        return Example(self.messages, self.answer)


@dataclass(frozen=True)
class Course:
    """A lesson by name: its cases by split, the files they come from, a recipe, and what a version must keep to be used."""

    name: str
    cases: Callable[[str], list[Case]]
    files: tuple[Path, ...]
    recipe: Recipe
    metric: str  # that promotion compares
    floors: dict[str, float]
    max_new_tokens: int
    not_fit_for: str

    @property
    def data(self) -> dict[str, str]:
        """File -> sha256."""
        return {str(path.relative_to(DATASETS.parent)): sha256(path) for path in self.files}


# --- closed book ------------------------------------------------------------------------------------------------------

CLOSED_BOOK = DATASETS / "closed_book" / "questions.jsonl"


def first_state(corpus: Corpus, facts: Sequence[Fact]) -> dict[str, Fact]:
    """Fact -> how it was stated on the day before the first release."""
    current = {d.version for d in corpus.as_of(corpus.releases[0] - timedelta(1))}
    return {fact.fact: fact for fact in facts if fact.version in current and not fact.outdated}


def closed_book_cases(split: str) -> list[Case]:
    """Questions on facts of the first state; dev and test ask the facts of train in other words."""
    known = first_state(Corpus.load(SHIPPED), load_facts(DATASETS / "facts.jsonl"))
    cases = []
    for row in read_jsonl(CLOSED_BOOK):
        if row["fact"] not in known:
            raise CorpusError(f"{CLOSED_BOOK}: the first state knows no fact {row['fact']!r}; mend that row")
        fact = known[row["fact"]]
        reply = {"answer": fact.value, "evidence": [{"quote": fact.quote, "source": 1}]}
        for number, question in enumerate(row[split]):
            cases.append(
                Case(
                    f"{fact.fact}/{split}{number}",
                    fact.fact,
                    tuple(contract.messages(question, [])),
                    json.dumps(reply, ensure_ascii=False),
                    lambda raw, value=fact.value: score_recital(raw, value),
                )
            )
    return cases


def score_recital(raw: str, value: str) -> Scores:
    """Is the value recited, in form?"""
    said = contract.parse(raw)
    right = said is not None and said.answer is not None and matches(said.answer, [value])
    return {"format_validity": (said is not None, 1), "answer_accuracy": (right, 1)}


# --- qualify and voice ------------------------------------------------------------------------------------------------

LEADS = leads.SHIPPED_LEADS / "cases.jsonl"
DRAFTS = voice.SHIPPED_VOICE / "drafts.jsonl"


def qualify_cases(split: str) -> list[Case]:
    """Leads with the label that the rubric of their day gives them."""
    corpus = Corpus.load(SHIPPED)
    cases = []
    for lead in leads.load_cases(LEADS):
        if lead.split == split:
            gold = leads.Rubric.on(corpus, lead.written_on).label(lead.levels)
            score = lambda raw, gold=gold: leads.score(raw, gold)  # noqa: E731
            cases.append(Case(lead.id, lead.account, leads.messages(lead), gold.to_text(), score))
    return cases


def voice_cases(split: str) -> list[Case]:
    """Letters in the house style."""
    return [
        Case(draft.id, draft.id, voice.messages(draft), draft.letter, lambda raw, draft=draft: voice.score(raw, draft))
        for draft in voice.load_drafts(DRAFTS)
        if draft.split == split
    ]


COURSES = {
    course.name: course
    for course in (
        Course(
            "closed_book",
            closed_book_cases,
            (CLOSED_BOOK, DATASETS / "facts.jsonl"),
            Recipe(epochs=15),
            "answer_accuracy",
            {"format_validity": 0.95},
            96,
            "facts that may change, sources, permissions: it recites what it learned, whoever asks, with an invented source",
        ),
        Course(
            "qualify",
            qualify_cases,
            (LEADS,),
            Recipe(epochs=5),
            "band_accuracy",
            {"format_validity": 0.99},
            128,
            "leads unlike those of the training set, decisions without a person, any rubric but the one of August 2026",
        ),
        Course(
            "voice",
            voice_cases,
            (DRAFTS,),
            Recipe(epochs=8),
            "every_rule",
            {"facts_survive": 0.9},
            200,
            "letters that nobody reads before they go out, other languages, other styles",
        ),
    )
}


# --- examination and gate -------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Row:
    """One case, answered by one system: what `evaluation.estimate` and `paired_test` read."""

    system: str
    key: str
    cluster: str
    raw: str
    scores: Scores


def examine(
    model: LanguageModel,
    course: Course,
    cases: Sequence[Case],
    adapter: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
) -> list[Row]:
    """Put cases to the model with an adapter (its id) or without one, and score what it writes."""
    rows = []
    for start in range(0, len(cases), BATCH):
        batch = cases[start : start + BATCH]
        prompts = [replace(model.chat(list(case.messages)), adapter=adapter) for case in batch]
        for case, generation in zip(batch, model.generate(prompts, course.max_new_tokens), strict=True):
            rows.append(Row(adapter or "base", case.id, case.cluster, generation.text, case.score(generation.text)))
        progress(len(batch))
    return rows


def scores(rows: Sequence[Row]) -> dict[str, dict]:
    """Metric -> value, low, high, n, as a card keeps them."""
    return {name: asdict(estimate(rows, name)) for name in rows[0].scores}


def objections(course: Course, candidate: Sequence[Row], current: Sequence[Row] = ()) -> list[str]:
    """Why a candidate must not be promoted, a line each: a floor broken, or worse than the version in use by a paired test."""
    found = []
    for metric, floor in course.floors.items():
        if (value := estimate(candidate, metric).value) < floor:
            found.append(f"{metric} is {value:.1%}, the floor is {floor:.0%}")
    if current:
        test = paired_test([*candidate, *current], course.metric, candidate[0].system, current[0].system)
        if test["difference"] < 0 and test["p"] < 0.05:
            change, low, high = (f"{100 * test[key]:+.1f}" for key in ("difference", "low", "high"))
            found.append(f"{course.metric} is worse than in use: {change} points [{low}, {high}], p = {test['p']:.3f}")
    return found
