"""Claims: each verdict can go either way, and follows the numbers."""

import json

import pytest

from reference import claims
from reference.lessons import Course, Row
from reference.tuning import Recipe


def rows(system, n=40, raw="", **shares):
    """`n` cases of one system; of each metric the first `share` of the cases count 1, or every one a number above 1."""
    value = lambda share, i: share if share > 1 else float(i < share * n)  # noqa: E731
    return [Row(system, str(i), str(i), raw, {m: (value(s, i), 1) for m, s in shares.items()}) for i in range(n)]


def reply(answer):
    return json.dumps({"answer": answer, "evidence": []})


def twice(system, first, second, valid):
    """Facts asked in two ways, with what was said to each."""
    made = []
    for place, raw in enumerate((first, second)):
        made += [Row(system, f"{i}/{place}", str(i), raw, {"format_validity": (float(i < valid * 40), 1)}) for i in range(40)]
    return made


@pytest.mark.parametrize(
    ("valid", "lessons", "verdict"),
    [(1.0, (reply("a"), reply("a")), "supported"), (0.0, ("a", "a"), "contradicted"), (1.0, (reply("a"), reply("b")), "mixed")],
)
def test_k02_needs_form_and_consistency(valid, lessons, verdict):
    other = twice("rag", *(("x", "y") if valid else (reply("a"), reply("a"))), 1 - valid)
    found = claims.k02([*other, *twice("tuned", *lessons, valid)], "rag", "tuned")
    assert found.verdict == verdict and found.value == pytest.approx(2 * valid - 1)


@pytest.mark.parametrize(("old", "new", "verdict"), [(0.9, 0.05, "supported"), (0.1, 0.8, "contradicted"), (0.3, 0.3, "mixed")])
def test_k05_compares_old_and_new_values(old, new, verdict):
    found = claims.k05(rows("tuned", staleness=old, freshness=new, answer_accuracy=old))
    assert (found.verdict, found.value, found.n) == (verdict, pytest.approx(old), 40)


@pytest.mark.parametrize(("right", "verdict"), [(0.25, "supported"), (0.05, "supported"), (0.9, "contradicted")])
def test_k06_compares_the_source_with_chance(right, verdict):
    tuned = rows("tuned", staleness=1.0, quote_stands=0.0)
    assert claims.k06(tuned, rows("tuned", citation_precision=right)).verdict == verdict


@pytest.mark.parametrize(("told", "verdict"), [(0.5, "supported"), (0.0, "mixed")])
def test_k10_counts_what_was_told(told, verdict):
    assert claims.k10(rows("tuned", leaks=told)).verdict == verdict


def test_k07_finds_the_shortest_prompt_that_adheres():
    found = [
        *rows("0", format_validity=0.0, tokens_in=50), *rows("8", format_validity=1.0, tokens_in=900),
        *rows("tuned", format_validity=1.0, tokens_in=60),
    ]  # fmt: skip
    one = claims.k07(found, {0: "0", 8: "8"}, "tuned")
    assert one.verdict == "supported" and one.value == pytest.approx(15) and "8 worked examples reach it" in one.remark
    assert claims.k07(found, {0: "0"}, "tuned").remark.startswith("0 examples do not reach it")
    cheap = [*rows("0", format_validity=1.0, tokens_in=50), *rows("tuned", format_validity=1.0, tokens_in=60)]
    assert claims.k07(cheap, {0: "0"}, "tuned").verdict == "contradicted"


@pytest.mark.parametrize(("lessons", "verdict"), [(0.9, "supported"), (0.1, "contradicted"), (0.5, "mixed")])
def test_lessons_are_compared_with_prompts_on_the_same_cases(lessons, verdict):
    def of(metric):
        return [*rows("plain", **{metric: 0.3, "facts_survive": 1.0}), *rows("rules", **{metric: 0.5, "facts_survive": 1.0}),
                *rows("tuned", **{metric: lessons, "facts_survive": 1.0})]  # fmt: skip

    assert claims.k21(of("band_accuracy"), "plain", "rules", "tuned").verdict == verdict
    assert claims.k28(of("band_accuracy"), ["plain", "rules"], "tuned").verdict == verdict
    assert claims.k28(of("band_accuracy"), ["plain", "rules"], "tuned").remark.endswith("best prompt, rules")
    assert claims.k33(of("every_rule"), "rules", "tuned").verdict == verdict


@pytest.mark.parametrize(
    ("form", "task", "verdict"), [(1.0, 0.9, "supported"), (1.0, 0.5, "mixed"), (0.5, 0.5, "contradicted")]
)
def test_k22_looks_at_form_and_at_the_task(form, task, verdict):
    few = rows("few", format_validity=form, band_accuracy=task)
    curve = {25: rows("least", format_validity=0.0, band_accuracy=0.0), 200: few}
    curve[800] = rows("all", format_validity=1.0, band_accuracy=0.9)
    assert claims.k22(curve).verdict == verdict


@pytest.mark.parametrize(("there", "verdict"), [(0.2, "supported"), (1.0, "contradicted"), (0.8, "mixed")])
def test_what_is_lost_to_noise_or_to_new_kinds_of_lead(there, verdict):
    here, lost = rows("a", band_accuracy=0.8), rows("b", band_accuracy=there)
    assert claims.k23({0: here, 30: lost}).verdict == claims.k24(here, lost).verdict == verdict
    assert claims.k24(here, lost).value == pytest.approx(0.8 - there)


def test_k38_asks_the_gate_itself():
    course = Course("sums", lambda split: [], (), Recipe(), "right", {}, 8, "anything")
    current, bad, good = (rows(name, right=share) for name, share in (("current", 0.9), ("bad", 0.3), ("good", 0.9)))
    assert claims.k38(course, current, {"bad": bad}).verdict == "supported"
    half = claims.k38(course, current, {"bad": bad, "good": good})
    assert (half.verdict, half.value, half.remark) == ("mixed", 0.5, "let through: good")


def test_a_finding_prints_its_number_its_interval_and_its_verdict():
    said = str(claims.k10(rows("tuned", leaks=0.5)))
    assert said.splitlines()[0].startswith("K10 ") and "50 [" in said and said.endswith("supported")
