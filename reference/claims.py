"""What people say about lessons, each sentence held against measured rows: a number, its interval, a verdict.

A function a claim. It takes the rows of an examination (`lessons.examine`), whoever made them and on however many cases, and
never asks the model itself. The rule for a verdict stands in the function's docstring; intervals are bootstraps over
clusters (facts, accounts, letters) as in `evaluation`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from reference.answer import parse
from reference.evaluation import Estimate, by_cluster, estimate, paired_test, redrawn
from reference.lessons import Course, Row, objections

Verdict = Literal["supported", "contradicted", "mixed"]


@dataclass(frozen=True)
class Finding:
    """A claim's number. `value`, `low` and `high` are of `measure`; `n` counts cases."""

    claim: str
    sentence: str
    measure: str
    value: float
    low: float
    high: float
    n: int
    verdict: Verdict
    remark: str = ""

    def __str__(self) -> str:
        number = f"{100 * self.value:.0f} [{100 * self.low:.0f}, {100 * self.high:.0f}] of {self.n}"
        return f"{self.claim} {self.sentence}\n    {self.measure}: {number}\n    {self.verdict}" + f"; {self.remark}" * bool(
            self.remark
        )


def sign(low: float, high: float) -> Verdict:
    """Supported above zero, contradicted below, mixed where the interval holds it."""
    return "supported" if low > 0 else "contradicted" if high < 0 else "mixed"


def of(rows: Sequence[Row], system: str, metric: str) -> Estimate:
    """A metric of one of the systems."""
    return estimate([row for row in rows if row.system == system], metric)


def gain(rows: Sequence[Row], metric: str, first: str, second: str) -> tuple[float, float, float, int]:
    """How much better `first` is than `second` on the same cases: difference, low, high, cases."""
    test = paired_test(rows, metric, first, second)
    return test["difference"], test["low"], test["high"], sum(row.system == first for row in rows)


def drop(here: Sequence[Row], there: Sequence[Row], metric: str) -> Estimate:
    """How much less `metric` is `there`, on other cases: two independent bootstraps."""
    chance, drawn, values = np.random.default_rng(0), [], []
    for rows in (here, there):
        sums = by_cluster(rows, metric)
        totals = redrawn(sums, chance)
        drawn.append(totals[:, 0] / totals[:, 1])
        values.append(sums[:, 0].sum() / sums[:, 1].sum())
    low, high = np.percentile(drawn[0] - drawn[1], [2.5, 97.5])
    return Estimate(float(values[0] - values[1]), float(low), float(high), len(there))


# --- facts from memory --------------------------------------------------------------------------------------------------


def k02(rows: Sequence[Row], retrieval: str, lessons: str) -> Finding:
    """Supported when lessons bring more valid format, and more equal answers to one fact in other words, than retrieval."""
    value, low, high, n = gain(rows, "format_validity", lessons, retrieval)
    same = {system: agreement([row for row in rows if row.system == system]) for system in (retrieval, lessons)}
    form = sign(low, high)
    verdict = form if (same[lessons] > same[retrieval]) == (form == "supported") else "mixed"
    remark = f"same answer to both phrasings: {same[lessons]:.0%} with lessons, {same[retrieval]:.0%} with retrieval"
    return Finding(
        "K02", "Tuning decides format and consistency; retrieval does not.",
        "valid format, lessons over retrieval, points", value, low, high, n, verdict, remark,
    )  # fmt: skip


def agreement(rows: Sequence[Row]) -> float:
    """Share of facts whose every phrasing got the same answer, in form; facts asked once do not count."""
    answers: dict[str, list] = {}
    for row in rows:
        said = parse(row.raw)
        answers.setdefault(row.cluster, []).append(said and said.answer)
    several = [found for found in answers.values() if len(found) > 1]
    return sum(found[0] is not None and len(set(found)) == 1 for found in several) / max(1, len(several))


def k05(tuned: Sequence[Row]) -> Finding:
    """Supported when the tuned model answers changed facts with the old value more often than with the new."""
    changed = [row for row in tuned if "staleness" in row.scores]
    stale, fresh, first = (
        estimate(changed, "staleness"), estimate(changed, "freshness"), estimate(tuned, "answer_accuracy")
    )  # fmt: skip
    return Finding(
        "K05", "Facts tuned into weights go stale at the first update.",
        "changed facts answered with the old value, %", stale.value, stale.low, stale.high, stale.n,
        "supported" if stale.low > fresh.high else "contradicted" if stale.high < fresh.low else "mixed",
        f"day 0: {first.value:.0%} of {first.n} right; new value after the release: {fresh.value:.0%}",
    )  # fmt: skip


def k06(tuned: Sequence[Row], sources: Sequence[Row], chance: float = 0.25) -> Finding:
    """Supported when the source named among `1 / chance` titles is right no more often than chance."""
    right = estimate(sources, "citation_precision")
    stands = estimate([row for row in tuned if "staleness" in row.scores], "quote_stands")
    return Finding(
        "K06", "Answers from weights can't be traced.",
        f"right source among titles (chance {chance:.0%}), %", right.value, right.low, right.high, right.n,
        "supported" if right.low <= chance else "contradicted",
        f"of the quotes for changed facts {stands.value:.0%} still stand in the document",
    )  # fmt: skip


def k10(tuned: Sequence[Row]) -> Finding:
    """Supported when any restricted fact is told."""
    leaks = estimate(tuned, "leaks")
    return Finding(
        "K10", "Knowledge in weights escapes permissions.",
        "restricted facts told to somebody who may not read them, %", leaks.value, leaks.low, leaks.high, leaks.n,
        sign(leaks.value, leaks.high),
    )  # fmt: skip


# --- prompts against lessons ----------------------------------------------------------------------------------------------


def k07(rows: Sequence[Row], prompts: Mapping[int, str], lessons: str, metric: str = "format_validity") -> Finding:
    """`prompts`: worked examples -> system. Supported when no prompt of fewer tokens adheres as well as lessons do."""
    short, aim = of(rows, lessons, "tokens_in"), of(rows, lessons, metric)
    equal = [k for k, system in sorted(prompts.items()) if of(rows, system, metric).high >= aim.low]
    k = equal[0] if equal else max(prompts)
    long = of(rows, prompts[k], "tokens_in")
    ratio = [long.value / short.value, long.low / short.high, long.high / short.low]
    reached = (
        f"{k} worked examples reach it" if equal else f"{k} examples do not reach it ({of(rows, prompts[k], metric).value:.0%})"
    )
    return Finding(
        "K07", "Tuning shrinks prompts.",
        f"prompt tokens {'for' if equal else 'that still miss'} {aim.value:.0%} {metric}, % of those with lessons",
        *ratio, aim.n,
        "supported" if ratio[1] > 1 else "contradicted" if equal and ratio[2] < 1 else "mixed",
        f"{reached}: {long.value:.0f} tokens against {short.value:.0f}",
    )  # fmt: skip


def k21(rows: Sequence[Row], prompted: str, with_rules: str, lessons: str) -> Finding:
    """Supported when the prompt with the retrieved playbook stays behind lessons."""
    value, low, high, n = gain(rows, "band_accuracy", lessons, with_rules)
    added = paired_test(rows, "band_accuracy", with_rules, prompted)
    return Finding(
        "K21", "Retrieval does not repair a classification task.",
        "right bands, lessons over prompt with playbook, points", value, low, high, n, sign(low, high),
        "the playbook adds {:+.0f} [{:+.0f}, {:+.0f}]".format(*(100 * added[key] for key in ("difference", "low", "high"))),
    )  # fmt: skip


def k28(rows: Sequence[Row], prompts: Sequence[str], lessons: str, metric: str = "band_accuracy") -> Finding:
    """Supported when lessons beat the best of the prompts."""
    best = max(prompts, key=lambda system: of(rows, system, metric).value)
    value, low, high, n = gain(rows, metric, lessons, best)
    return Finding(
        "K28", "Prompting alone is bounded by context and consistency.",
        f"{metric}, lessons over the best prompt, points", value, low, high, n, sign(low, high),
        f"{of(rows, lessons, metric).value:.0%} with lessons, {of(rows, best, metric).value:.0%} with the best prompt, {best}",
    )  # fmt: skip


def k33(rows: Sequence[Row], prompted: str, lessons: str) -> Finding:
    """Supported when more letters keep every rule with lessons than with the written style and examples in the prompt."""
    value, low, high, n = gain(rows, "every_rule", lessons, prompted)
    share = lambda metric, system: f"{of(rows, system, metric).value:.0%}"  # noqa: E731
    both = lambda metric: f"{share(metric, lessons)} with lessons, {share(metric, prompted)} with the prompt"  # noqa: E731
    return Finding(
        "K33", "Voice is held by tuning better than by prompts.",
        "letters that keep every rule, lessons over prompt, points", value, low, high, n, sign(low, high),
        f"{both('every_rule')}; facts that survive: {both('facts_survive')}",
    )  # fmt: skip


# --- how much, how clean, how far -----------------------------------------------------------------------------------------


def k22(
    curve: Mapping[int, Sequence[Row]], form: str = "format_validity", task: str = "band_accuracy", few: int = 400
) -> Finding:
    """`curve`: examples -> rows on the same cases. Supported when `few` are within five points of all, in form and in task;
    mixed when only in one."""
    most, some = max(curve), max(size for size in curve if size <= few)
    lost = {metric: drop(curve[most], curve[some], metric) for metric in (form, task)}
    enough = [one.value < 0.05 for one in lost.values()]
    return Finding(
        "K22", "A few hundred good examples are enough for format and style.",
        f"{task} lost with {some} examples instead of {most}, points",
        lost[task].value, lost[task].low, lost[task].high, lost[task].n,
        "supported" if all(enough) else "mixed" if any(enough) else "contradicted",
        f"{form} lost: {100 * lost[form].value:.0f} points",
    )  # fmt: skip


def k23(noise: Mapping[int, Sequence[Row]], metric: str = "band_accuracy") -> Finding:
    """`noise`: per cent of wrong labels -> rows after the same number of steps. Supported when the noisiest is worse."""
    clean, dirty = min(noise), max(noise)
    lost = drop(noise[clean], noise[dirty], metric)
    return Finding(
        "K23", "More data is not better data.", f"{metric} lost to {dirty} % wrong labels, points",
        lost.value, lost.low, lost.high, lost.n, sign(lost.low, lost.high),
    )  # fmt: skip


def k24(known: Sequence[Row], shifted: Sequence[Row], metric: str = "band_accuracy") -> Finding:
    """Supported when a product, a region and a channel that training never showed cost accuracy."""
    lost = drop(known, shifted, metric)
    return Finding(
        "K24", "Tuned models fail on what training did not cover.", f"{metric} lost on the shifted split, points",
        lost.value, lost.low, lost.high, lost.n, sign(lost.low, lost.high),
        f"{estimate(known, metric).value:.0%} on known kinds, {estimate(shifted, metric).value:.0%} on new ones",
    )  # fmt: skip


def k38(course: Course, current: Sequence[Row], worse: Mapping[str, Sequence[Row]]) -> Finding:
    """`worse`: name -> rows of a checkpoint that must not be promoted. Supported when the gate refuses every one."""
    refused = {name: objections(course, rows, current) for name, rows in worse.items()}
    share = sum(map(bool, refused.values())) / len(refused)
    let_through = [name for name, reasons in refused.items() if not reasons]
    return Finding(
        "K38", "A tuned model is a product: registry, promotion gate, regression test.",
        "worse checkpoints refused, %", share, share, share, len(refused),
        "supported" if share == 1 else "contradicted" if share == 0 else "mixed",
        "let through: " + ", ".join(let_through) if let_through else "",
    )  # fmt: skip
