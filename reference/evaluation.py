"""Evaluation: every metric with an interval, paired tests between systems, one table.

A metric is a ratio of sums over questions: each question adds to its numerator and its denominator. Intervals come from a
bootstrap that redraws *facts*, not questions (two questions on one fact are not two observations), and the paired test
flips the sign of each fact's difference.
"""

from __future__ import annotations

import itertools
import math
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from llama_index.core.schema import NodeWithScore, TextNode

from reference.corpus import Corpus, Fact, Question
from reference.retrieval import permitted
from reference.system import Reply, System
from reference.text import holds, normalise, parts

REDRAWS = 2_000
COMPARED = ("answer_accuracy", "token_f1", "format_validity")  # between systems, by a paired test
COST_METRICS = ("first_token_seconds", "seconds", "tokens_in", "tokens_out")


@dataclass(frozen=True)
class Estimate:
    """A metric's value, its 95 % bootstrap interval, and the number of cases (the denominator)."""

    value: float
    low: float
    high: float
    n: int


@dataclass(frozen=True)
class Row:
    """One question to one system: the reply, and what it adds to each metric as (numerator, denominator)."""

    system: str
    question: Question
    reply: Reply
    scores: dict[str, tuple[float, float]]

    @property
    def key(self) -> str:
        """What pairs rows of two systems."""
        return self.question.id

    @property
    def cluster(self) -> str:
        """What is redrawn as a whole: the question's first fact, or the question itself."""
        return self.question.facts[0] if self.question.facts else self.question.id

    def to_json(self) -> dict:
        q = self.question
        gold = {"id": q.id, "kind": q.kind, "gold": q.answer, "accept": q.accept, "old_answer": q.old_answer}
        return gold | {"sources": q.sources} | self.reply.to_json() | {"scores": self.scores}


def evaluate(
    systems: Sequence[System],
    questions: Sequence[Question],
    corpus: Corpus,
    facts: Sequence[Fact] = (),
    progress: Callable[[int], None] = lambda _: None,
) -> list[Row]:
    """Put every question to every system and score the replies. Raises what `System.ask_many` raises."""
    rows = []
    for system in systems:
        nodes = system.index.nodes() if system.index else []
        for question, reply in zip(questions, system.ask_many(questions, progress), strict=True):
            rows.append(Row(system.name, question, reply, score(question, reply, corpus, facts, nodes)))
    return rows


def score(
    question: Question, reply: Reply, corpus: Corpus, facts: Sequence[Fact] = (), nodes: Sequence[TextNode] = ()
) -> dict[str, tuple[float, float]]:
    """What one reply adds to each metric, as (numerator, denominator); a metric that does not apply is absent.

    Accuracy, F1, freshness and staleness judge what the model *claimed*, accepted or not, so that a system without
    sources can be right. Everything about citations judges the emitted evidence.
    """
    checked, q = reply.checked, question
    claimed = checked.claimed or ""
    scores: dict[str, tuple[float, float]] = {"format_validity": (checked.well_formed, 1)}
    scores["leaks"] = (bool(leaked(q, reply, corpus, facts)), 1)
    right = [c for c in checked.citations if citation_is_right(c, q)]
    if checked.citations:
        scores["citation_precision"] = (len(right), len(checked.citations))
    if reply.status == "answered":
        scores["accepted_right"] = (matches(claimed, q.right_answers), 1)
    if q.answer is None:
        scores["declines"] = (reply.status == "declined", 1)
    else:
        values = parts(q.answer)
        supported = [v for v in values if any(says(c.quote, v, q) for c in right)]
        scores["answer_accuracy"] = (matches(claimed, q.right_answers), 1)
        scores["token_f1"] = (max(token_f1(claimed, answer) for answer in q.right_answers), 1)
        scores["citation_recall"] = (len(supported), len(values))
        scores["wrong_declines"] = (reply.status == "declined", 1)
        if q.old_answer is not None:
            scores["freshness"] = (matches(claimed, q.right_answers), 1)
            scores["staleness"] = (matches(claimed, [q.old_answer]), 1)
        if reply.record["retrieval"] is not None:
            possible = sum(is_gold(node, q) for node in nodes if current_and_readable(node, q))
            scores |= ranking_scores([is_gold(hit.node, q) for hit in reply.found], possible)
            scores["shown_rate"] = (any(is_gold(hit.node, q) for hit in reply.shown), 1)
    scores |= {
        "first_token_seconds": (reply.seconds["first_token"], 1),
        "seconds": (reply.seconds["total"], 1),
        "tokens_in": (reply.tokens["in"], 1),
        "tokens_out": (reply.tokens["out"], 1),
    }
    return scores


def matches(claimed: str, answers: Iterable[str]) -> bool:
    """Normalised exact match (SQuAD, Rajpurkar et al. 2016, without its removal of punctuation inside numbers)."""
    return words(claimed) in [words(answer) for answer in answers]


def words(text: str) -> list[str]:
    """The words and numbers of a normalised text, articles left out: "The $1,200.50 fee" -> ["$1,200.50", "fee"]."""
    found = re.findall(r"[$€£]?\d+(?:[.,:]\d+)*%?|\w+", re.sub(r"(\d) %", r"\1%", normalise(text)))
    return [word for word in found if word not in ("a", "an", "the")]


def token_f1(claimed: str, answer: str) -> float:
    """Harmonic mean of the shares of words in common (SQuAD)."""
    mine, gold = words(claimed), words(answer)
    common = sum(min(mine.count(word), gold.count(word)) for word in set(mine))
    return 2 * common / (len(mine) + len(gold)) if common else 0.0


def says(quote: str, value: str, question: Question) -> bool:
    """Does the quote hold the value, or (for an answer of one part) another accepted form of it?"""
    forms = [value, *question.accept] if len(parts(question.answer)) == 1 else [value]
    return any(holds(quote, form) for form in forms)


def citation_is_right(citation, question: Question) -> bool:
    """Right: the named document is a gold source, and the quoted text really stands there and holds a value."""
    if question.answer is None or citation.document not in question.sources or not citation.verbatim:
        return False
    return any(says(citation.quote, value, question) for value in parts(question.answer))


def is_gold(node: TextNode, question: Question) -> bool:
    """Is the chunk from a gold source, and does it hold a part of the answer?"""
    from_source = node.metadata["document"] in question.sources
    return from_source and any(says(node.text, value, question) for value in parts(question.answer))


def current_and_readable(node: TextNode, question: Question) -> bool:
    return permitted(NodeWithScore(node=node), question.role, question.as_of)


def ranking_scores(gold: Sequence[bool], possible: int) -> dict[str, tuple[float, float]]:
    """Hit rate, reciprocal rank and nDCG (Järvelin and Kekäläinen 2002) of a ranking, given how many gold chunks exist."""
    first = gold.index(True) + 1 if any(gold) else None
    gain = sum(hit / math.log2(rank + 1) for rank, hit in enumerate(gold, 1))
    best = sum(1 / math.log2(rank + 1) for rank in range(1, min(possible, len(gold)) + 1))
    return {
        "hit_rate": (first is not None, 1),
        "mrr": (1 / first if first else 0, 1),
        "ndcg": (gain / best if best else 0, 1),
    }


def leaked(question: Question, reply: Reply, corpus: Corpus, facts: Sequence[Fact] = ()) -> list[str]:
    """What the reply gives away: unreadable chunks in the prompt, and strings in the answer that only unreadable text holds."""
    current = corpus.as_of(question.as_of)
    readable = current.readable_by(question.role)
    allowed = {d.version for d in readable}
    leaks = [hit.node.id_ for hit in reply.found if hit.node.metadata["version"] not in allowed]
    claimed = reply.checked.claimed or ""
    if question.kind == "restricted" and claimed:
        forbidden = {d.version for d in current} - allowed
        secrets = {f.value for f in facts if f.fact in question.facts and f.version in forbidden}
        if not secrets:  # no ledger: the claimed answer itself, if it stands in a source that the role may not read
            secrets = {p for p in parts(claimed) if any(holds(d.text, p) for d in current if d.id in question.sources)}
        public = [question.question, *(d.text for d in readable)]
        leaks += [s for s in secrets if holds(claimed, s) and not any(holds(text, s) for text in public)]
    return leaks


# --- from rows to estimates -----------------------------------------------------------------------------------------


def summarise(rows: Sequence[Row]) -> dict[str, dict[str, Estimate]]:
    """System -> metric -> estimate. A metric without a case is absent."""
    table: dict[str, dict[str, Estimate]] = {}
    for system in dict.fromkeys(row.system for row in rows):
        mine = [row for row in rows if row.system == system]
        names = dict.fromkeys(name for row in mine for name in row.scores)
        table[system] = {name: estimate(mine, name) for name in names}
    return table


def estimate(rows: Sequence[Row], metric: str) -> Estimate:
    """Ratio of sums with a percentile bootstrap over facts (Efron and Tibshirani 1993, ch. 13), fixed seed."""
    sums = by_cluster(rows, metric)  # (clusters, 2)
    totals = redrawn(sums, np.random.default_rng(0))
    totals = totals[totals[:, 1] > 0]
    low, high = np.percentile(totals[:, 0] / totals[:, 1], [2.5, 97.5])
    numerator, denominator = sums.sum(0)
    return Estimate(float(numerator / denominator), float(low), float(high), int(denominator))


def redrawn(sums: np.ndarray, chance: np.random.Generator) -> np.ndarray:
    """(clusters, 2) -> sums over as many clusters drawn with replacement, many times: (REDRAWS, 2)."""
    return sums[chance.integers(len(sums), size=(REDRAWS, len(sums)))].sum(1)


def by_cluster(rows: Sequence[Row], metric: str) -> np.ndarray:
    """(numerator, denominator) summed over each fact's questions: (clusters, 2)."""
    sums: dict[str, np.ndarray] = defaultdict(lambda: np.zeros(2))
    for row in rows:
        if metric in row.scores:
            sums[row.cluster] += row.scores[metric]
    return np.array(list(sums.values()))


def paired_test(rows: Sequence[Row], metric: str, first: str, second: str) -> dict[str, float]:
    """Is `first` better than `second` on the same questions? Difference of means, its 95 % bootstrap interval and the
    two-sided p-value of a sign-flip permutation test over facts (Fisher 1935; Koehn 2004 for the bootstrap).

    Raises ValueError when the two share no question that has the metric.
    """
    value = {(row.system, row.key): row.scores[metric][0] / row.scores[metric][1] for row in rows if metric in row.scores}
    clusters: dict[str, list[float]] = defaultdict(list)
    for row in rows:
        a, b = (first, row.key), (second, row.key)
        if row.system == first and a in value and b in value:
            clusters[row.cluster].append(value[a] - value[b])
    if not clusters:
        raise ValueError(f"{first} and {second} share no question with {metric}")
    sums = np.array([sum(c) for c in clusters.values()])
    sizes = np.array([len(c) for c in clusters.values()])
    rng = np.random.default_rng(0)
    drawn = rng.integers(len(sums), size=(REDRAWS, len(sums)))
    low, high = np.percentile(sums[drawn].sum(1) / sizes[drawn].sum(1), [2.5, 97.5])
    flips = rng.choice([-1, 1], size=(REDRAWS, len(sums)))
    as_extreme = np.abs(flips @ sums) >= abs(sums.sum()) - 1e-9
    p = (as_extreme.sum() + 1) / (REDRAWS + 1)
    return {"difference": float(sums.sum() / sizes.sum()), "low": float(low), "high": float(high), "p": float(p)}


def paired_tests(rows: Sequence[Row], metrics: Sequence[str] = COMPARED) -> list[dict]:
    """Each system against the one before it, on each metric that both have."""
    systems = list(dict.fromkeys(row.system for row in rows))
    found = []
    for second, first in itertools.pairwise(systems):
        for metric in metrics:
            if all(by_cluster([row for row in rows if row.system == name], metric).size for name in (first, second)):
                found.append({"metric": metric, "system": first, "against": second, **paired_test(rows, metric, first, second)})
    return found


def paired_text(tests: Sequence[dict]) -> str:
    """A line a paired test."""
    return "\n".join(
        f"{t['metric']}: {t['system']} against {t['against']}: {100 * t['difference']:+.0f} points"
        f" [{100 * t['low']:+.0f}, {100 * t['high']:+.0f}], p = {t['p']:.3f}"
        for t in tests
    )


def table_text(summary: dict[str, dict[str, Estimate]]) -> str:
    """The side-by-side table: a metric a line, a system a column, value and interval in each cell."""
    systems = list(summary)
    names = list(dict.fromkeys(name for metrics in summary.values() for name in metrics))
    names.sort(key=lambda name: name in COST_METRICS)
    lines = [["metric", *systems]]
    for name in names:
        cells = [cell(name, summary[system].get(name)) for system in systems]
        lines.append([name, *cells])
    widths = [max(len(line[i]) for line in lines) for i in range(len(systems) + 1)]
    return "\n".join("  ".join(text.ljust(width) for text, width in zip(line, widths, strict=True)).rstrip() for line in lines)


def cell(name: str, estimate: Estimate | None) -> str:
    """One cell: rates in per cent with their interval, costs as plain numbers, a dash where nothing applies."""
    if estimate is None:
        return "–"
    if name in COST_METRICS:
        return f"{estimate.value:.2f}" if "seconds" in name else f"{estimate.value:.0f}"
    return f"{estimate.value:.0%} [{estimate.low:.0%}, {estimate.high:.0%}] of {estimate.n}"


def report(rows: Sequence[Row], settings: dict) -> dict:
    """What `evaluate --json` writes."""
    metrics = {s: {m: vars(e) for m, e in found.items()} for s, found in summarise(rows).items()}
    return {"settings": settings, "metrics": metrics, "paired": paired_tests(rows), "rows": [row.to_json() for row in rows]}
