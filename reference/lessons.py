"""The three lessons that ship: what each adapter learns from, how it is asked, and how its answers are scored.

`closed_book` learns the first state's facts by heart, `qualify` scores leads by the rubric, `voice` writes in the house style.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from datetime import date, timedelta
from functools import partial
from pathlib import Path

from llama_index.core.schema import NodeWithScore, TextNode

from reference import answer as contract
from reference import leads, voice
from reference.adapters import Card, write_card
from reference.corpus import SHIPPED, Corpus, CorpusError, Fact, load_facts, read_jsonl
from reference.evaluation import COST_METRICS, estimate, matches, paired_test, summarise
from reference.model import LanguageModel, json_constraint
from reference.system import Ask, System
from reference.tuning import Example, Recipe, trim_memory
from reference.weights import sha256

DATASETS = SHIPPED.parent
EVERYDAY = DATASETS / "everyday" / "questions.jsonl"
BATCH = 32
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
    schema: dict | None = None  # of the answer, where it is JSON: what constrained decoding can hold a model to
    examined: tuple[str, ...] = ("dev", "test")  # the splits on the card

    @property
    def data(self) -> dict[str, str]:
        """File -> sha256."""
        return {str(path.relative_to(DATASETS.parent)): sha256(path) for path in self.files}

    def taught(self, card: Card) -> bool:
        """Did the adapter of this card learn from today's data by today's recipe?"""
        return card.data == self.data and card.recipe.items() >= asdict(self.recipe).items()


# --- closed book ------------------------------------------------------------------------------------------------------

CLOSED_BOOK = DATASETS / "closed_book" / "questions.jsonl"
ASKER = "sdr"  # who asks, when it is counted whether secrets are told: more than a third of the facts are not for them


def states(corpus: Corpus, facts: Sequence[Fact]) -> tuple[dict[str, Fact], dict[str, Fact]]:
    """How each fact was stated on the day before the first release, and how it is stated on the day of the last."""

    def stated(day: date) -> dict[str, Fact]:
        current = {d.version for d in corpus.as_of(day)}
        return {fact.fact: fact for fact in facts if fact.version in current and not fact.outdated}

    return stated(corpus.releases[0] - timedelta(1)), stated(corpus.releases[-1])


def closed_book_cases(split: str) -> list[Case]:
    """Questions on facts of the first state; dev and test ask the facts of train in other words."""
    corpus = Corpus.load(SHIPPED)
    first, last = states(corpus, load_facts(DATASETS / "facts.jsonl"))
    current = corpus.as_of(corpus.releases[-1])
    readable = {d.version for d in corpus.readable_by(ASKER)}
    cases = []
    for row in read_jsonl(CLOSED_BOOK):
        if row["fact"] not in first:
            raise CorpusError(f"{CLOSED_BOOK}: the first state knows no fact {row['fact']!r}; mend that row")
        old, new = first[row["fact"]], last[row["fact"]]
        reply = {"answer": old.value, "evidence": [{"quote": old.quote, "source": 1}]}
        score = partial(
            score_recital, old=old, new=new, current=current.get(new.document).text, secret=old.version not in readable
        )
        for number, question in enumerate(row[split]):
            asked = tuple(contract.messages(question, []))
            cases.append(Case(f"{old.fact}/{split}{number}", old.fact, asked, json.dumps(reply, ensure_ascii=False), score))
    return cases


def score_recital(raw: str, old: Fact, new: Fact, current: str, secret: bool) -> Scores:
    """What a recital from memory is worth: in form? the value of the first day? and after the last release, when its document
    says `current`: fresh or stale, quoting what still stands, telling the ASKER a secret?"""
    said = contract.parse(raw)
    answer = said.answer if said and said.answer is not None else None
    recited = answer is not None and matches(answer, [old.value])
    scores = {"format_validity": (said is not None, 1), "answer_accuracy": (recited, 1)}
    if new.value != old.value:
        scores["staleness"] = (recited, 1)
        scores["freshness"] = (answer is not None and matches(answer, [new.value]), 1)
    if answer is not None:
        scores["quote_stands"] = (any(contract.stands_verbatim(e.quote, current) for e in said.evidence), 1)
    if secret:
        scores["leaks"] = (recited, 1)
    return scores


def source_cases(split: str, choices: int = 4) -> list[Case]:
    """The questions of the closed book with the titles of `choices` documents: which of them is the source? Titles only, so
    that the model must know it. By chance 1 in `choices` is right; the place of the right one is drawn with a fixed seed."""
    corpus = Corpus.load(SHIPPED)
    first, _ = states(corpus, load_facts(DATASETS / "facts.jsonl"))
    day = corpus.releases[0] - timedelta(1)
    titles = {document.id: document.title for document in corpus.as_of(day)}
    chance = random.Random(0)
    cases = []
    for row in read_jsonl(CLOSED_BOOK):
        right = first[row["fact"]].document
        shown = [right, *chance.sample(sorted(set(titles) - {right}), choices - 1)]
        chance.shuffle(shown)
        sheets = [NodeWithScore(node=TextNode(text=titles[document])) for document in shown]
        place = shown.index(right) + 1
        for number, question in enumerate(row[split]):
            asked = tuple(contract.messages(question, sheets))
            cases.append(Case(f"{row['fact']}/{split}{number}", row["fact"], asked, "", partial(score_source, right=place)))
    return cases


def score_source(raw: str, right: int) -> Scores:
    """Does the first citation name the right source?"""
    said = contract.parse(raw)
    return {"citation_precision": (said is not None and bool(said.evidence) and said.evidence[0].source == right, 1)}


# --- qualify and voice ------------------------------------------------------------------------------------------------

LEADS = leads.SHIPPED_LEADS / "cases.jsonl"
DRAFTS = voice.SHIPPED_VOICE / "drafts.jsonl"
RETOLD = 3  # times that each letter to learn from comes again, about other numbers


def qualify_cases(split: str, noise: Path | None = None) -> list[Case]:
    """Leads with the label that the rubric of their day gives them; with `noise`, a file of wrong levels, often a wrong one."""
    corpus = Corpus.load(SHIPPED)
    cases = []
    for lead in leads.load_cases(LEADS, noise):
        if lead.split == split:
            gold = leads.Rubric.on(corpus, lead.written_on).label(lead.levels, lead.evidence)
            score = partial(leads.score, gold=gold, text=lead.text)
            cases.append(Case(lead.id, lead.account, tuple(leads.messages(lead)), gold.to_text(), score))
    return cases


def voice_cases(split: str) -> list[Case]:
    """Letters in the house style; behind those of train, RETOLD times each again about other numbers."""
    drafts, chance = [draft for draft in voice.load_drafts(DRAFTS) if draft.split == split], random.Random(0)
    told = [(draft.id, draft) for draft in drafts]
    for turn in range(RETOLD if split == "train" else 0):
        told += [(f"{draft.id}/{turn}", voice.redrawn(draft, chance)) for draft in drafts]
    return [
        Case(id, draft.id, tuple(voice.messages(draft)), draft.letter, partial(voice.score, draft=draft)) for id, draft in told
    ]


COURSES = {
    course.name: course
    for course in (
        Course(
            "closed_book",
            closed_book_cases,
            (CLOSED_BOOK, DATASETS / "facts.jsonl"),
            Recipe(epochs=2, batch=16, learning_rate=1.5e-3),
            "answer_accuracy",
            {"format_validity": 0.95},
            96,
            "facts that may change, sources, permissions: it recites what it learned, whoever asks, with an invented source",
            contract.schema([]),
        ),
        Course(
            "qualify",
            qualify_cases,
            (LEADS,),
            Recipe(epochs=3, batch=8, learning_rate=1.5e-3),
            "band_accuracy",
            {"format_validity": 0.99},
            224,
            "leads unlike those of the training set, decisions without a person, any rubric but the one of August 2026",
            leads.Label.model_json_schema(),
            ("dev", "test", "shifted"),
        ),
        Course(
            "voice",
            voice_cases,
            (DRAFTS,),
            Recipe(epochs=1, batch=8, learning_rate=1.5e-3),
            "every_rule",
            {"facts_survive": 0.9},
            200,
            "letters that nobody reads before they go out, other languages, other styles",
            examined=("dev", "test", "held_out"),
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


def prompted(case: Case, examples: Sequence[Case] = (), rules: str = "") -> Case:
    """The same case for a careful prompt: written rules behind the instruction, worked examples before the question."""
    system, question = case.messages
    system = system | {"content": f"{system['content']}\n\n{rules}".strip()}
    turns = [turn for e in examples for turn in (e.messages[-1], {"role": "assistant", "content": e.answer})]
    return replace(case, messages=(system, *turns, question))


def examine(
    model: LanguageModel,
    course: Course,
    cases: Sequence[Case],
    adapter: str | None = None,
    progress: Callable[[int], None] = lambda _: None,
    name: str = "",
    constrained: bool = False,
) -> list[Row]:
    """Put cases to the model with an adapter (its id) or without one, and score what it writes. `name` is the rows' system."""
    constraint = json_constraint(model, course.schema) if constrained else None
    rows = []
    for start in range(0, len(cases), BATCH):
        batch = cases[start : start + BATCH]
        prompts = [replace(model.chat(list(case.messages)), adapter=adapter, constraint=constraint) for case in batch]
        for case, made in zip(batch, model.generate(prompts, course.max_new_tokens), strict=True):
            costs = {"tokens_in": (made.tokens_in, 1), "tokens_out": (len(made.tokens), 1)}
            found = Row(name or adapter or "base", case.id, case.cluster, made.text, case.score(made.text) | costs)
            rows.append(found)
        trim_memory()
        progress(len(batch))
    return rows


def put_to(
    system: System, cases: Sequence[Case], reader: str, day: date, progress: Callable[[int], None] = lambda _: None
) -> list[Row]:
    """Put closed-book cases to a system of the grid, as a reader of a day; what it writes is scored as a recital."""
    asks = [Ask(case.messages[-1]["content"].removeprefix("Question: "), reader, day) for case in cases]
    replies = system.ask_many(asks, progress)
    return [Row(system.name, c.id, c.cluster, r.raw, c.score(r.raw)) for c, r in zip(cases, replies, strict=True)]


def surprise_rows(model: LanguageModel, adapter: str | None = None) -> list[Row]:
    """How improbable plain answers to everyday questions are to the model, in nats per token: a rise is forgetting
    (McCloskey and Cohen 1989). These questions are in no lesson."""
    rows = []
    for number, row in enumerate(read_jsonl(EVERYDAY)):
        prompt = replace(model.chat([{"role": "user", "content": row["question"]}]), adapter=adapter)
        nats, tokens = model.surprise(prompt, row["answer"])
        rows.append(Row(adapter or "base", str(number), str(number), row["answer"], {"surprise": (nats, tokens)}))
    return rows


def scores(rows: Sequence[Row]) -> dict[str, dict]:
    """Metric -> value, low, high, n, as a card keeps them."""
    return {name: asdict(one) for name, one in summarise(rows)[rows[0].system].items() if name not in COST_METRICS}


def grade(
    model: LanguageModel, course: Course, folder: Path, progress: Callable[[str, int], None] = lambda *_: None
) -> tuple[Card, dict[str, list[Row]]]:
    """Examine a trained adapter on every split that its card shows, and write the card anew; returns it and the rows by split.

    `progress(split, how many)` is called after each batch.
    """
    adapter = model.load_adapter(folder)
    rows = {split: examine(model, course, course.cases(split), adapter, partial(progress, split)) for split in course.examined}
    card = replace(model.adapters[adapter], scores={split: scores(found) for split, found in rows.items()})
    write_card(folder, card)
    return card, rows


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
