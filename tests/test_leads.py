"""The rubric is the document, labels follow from it, and the shipped leads keep what their datasheet says."""

import json
from collections import Counter
from datetime import date

import pytest

from reference import leads
from reference.corpus import SHIPPED, Corpus, CorpusError, Document
from reference.leads import CRITERIA, Label, Rubric

BEST = {
    "budget": "approved in writing",
    "authority": "contact signs",
    "need": "named problem with a cost",
    "timeline": "decision in 3 months or less",
    "fit": "field service, 10 technicians or more",
}


@pytest.fixture(scope="module")
def corpus():
    return Corpus.load(SHIPPED)


@pytest.fixture(scope="module")
def rubric(corpus):
    return Rubric.on(corpus, "2026-10-01")


@pytest.fixture(scope="module")
def cases():
    return leads.load_cases(leads.SHIPPED_LEADS / "cases.jsonl")


# --- the rubric -------------------------------------------------------------------------------------------------------

# The seven worked examples of PBK-QUALIFICATION-EXAMPLES: the corpus itself says what the rubric makes of them.
EXAMPLES = [
    (("approved in writing", "contact signs", "named problem", 0, 0), 93, "A", "R-READY"),
    (("unknown", "contact signs", "named problem with a cost", 0, 0), 80, "B", "R-ASK-BUDGET"),
    (("range stated", "user only", "named problem", "7 to 12 months", "5 to 9"), 56, "C", "R-LOW-AUTHORITY"),
    (("approved in writing", "contact signs", "named problem with a cost", 0, "no field service"), 80, "D", "R-NOFIT"),
    (("none", "user only", "general interest", "unknown", "1 to 4"), 20, "D", "R-LOW-BUDGET"),
    (("exists without a figure", "influences and names the signer", 0, "4 to 6 months", 0), 74, "B", "R-LOW-BUDGET"),
    (("none", "contact signs", "named problem with a cost", 0, 0), 80, "B", "R-LOW-BUDGET"),
]  # fmt: skip


@pytest.mark.parametrize(("levels", "total", "band", "reason"), EXAMPLES)
def test_the_rubric_gives_what_the_worked_examples_of_the_corpus_say(corpus, rubric, levels, total, band, reason):
    levels = {c: level or BEST[c] for c, level in zip(CRITERIA, levels, strict=True)}
    label = rubric.label(levels)
    assert (label.total, label.band, label.reason) == (total, band, reason)
    text = corpus.as_of("2026-10-01").get("PBK-QUALIFICATION-EXAMPLES").text
    assert f"{total} points, band {band} | {reason} |" in text


def test_a_new_version_of_the_document_is_a_new_rubric(corpus, rubric):
    assert rubric.label(BEST).next_step == "AE calls within 4 working hours"
    assert Rubric.on(corpus, "2026-11-21").label(BEST).next_step == "AE calls within 2 working hours"
    assert Rubric.on(corpus, "2026-11-20") == rubric


def test_unknown_counts_nothing_and_is_missing(rubric):
    label = rubric.label(BEST | {"timeline": "unknown", "fit": "unknown"})
    assert label.scores.timeline == (None, None, 65) and label.missing == ["timeline", "fit"] and label.total == 65


def test_a_document_that_is_no_rubric_and_a_level_that_it_lacks_are_refused(corpus, rubric):
    with pytest.raises(CorpusError, match="not a rubric"):
        Rubric.of(Document("X", "X", "faq", date(2026, 1, 1), ("all",), "| Budget | none: 0 |"))
    with pytest.raises(CorpusError, match="unknown level 'plenty' of budget"):
        rubric.label(BEST | {"budget": "plenty"})


# --- scoring ----------------------------------------------------------------------------------------------------------


def test_a_right_output_has_every_point_and_a_wrong_band_loses_its_own(rubric):
    gold = rubric.label(BEST)
    assert {n / d for n, d in leads.score(gold.to_text(), gold, "").values()} == {1}
    wrong = gold.model_copy(update={"band": "B"}).to_text()
    found = leads.score(wrong, gold, "")
    assert found["band_accuracy"] == (0, 1) and found["format_validity"] == (1, 1) and found["all_right"] == (0, 1)
    assert found["point_accuracy"] == (5, 5)


@pytest.mark.parametrize("raw", ["", "band A", '{"band": "A"}', "null", "[]"])
def test_what_is_not_the_schema_scores_nothing(rubric, raw):
    assert leads.parse(raw) is None
    assert {n for n, _ in leads.score(raw, rubric.label(BEST), "").values()} == {0}


def test_a_label_with_an_extra_key_or_a_text_for_a_number_is_not_the_schema(rubric):
    whole = json.loads(rubric.label(BEST).to_text())
    assert leads.parse(json.dumps(whole)) is not None
    assert leads.parse(json.dumps(whole | {"mood": "good"})) is None
    assert leads.parse(json.dumps(whole | {"total": "100"})) is None
    assert leads.parse(json.dumps(whole | {"scores": whole["scores"] | {"fit": [20]}})) is None


def test_a_label_shows_the_words_the_points_and_the_total_so_far(rubric):
    text = rubric.label(BEST | {"need": "unknown"}, {"budget": "signed off", "fit": "a dozen vans"}).to_text()
    assert text.startswith(
        '{"scores": {"budget": ["signed off", 20, 20], "authority": [null, 20, 40], "need": [null, null, 40], '
    )
    assert '"fit": ["a dozen vans", 20, 75]}, "total": 75, ' in text


def test_evidence_must_stand_in_the_text_and_any_words_of_it_will_do(rubric):
    gold = rubric.label(BEST, {"budget": "signed off", "fit": "a dozen vans"})
    other = rubric.label(BEST, {"budget": "it is signed off", "fit": "a hundred vans"})
    found = leads.score(other.to_text(), gold, "The money? Well, it is signed off. We have a dozen vans.")
    assert found["all_right"] == (1, 1) and found["evidence_stands"] == (1, 2)


# --- the shipped leads ------------------------------------------------------------------------------------------------


def test_the_shipped_leads_are_valid(cases, corpus):
    assert leads.validate_cases(cases, corpus) == []
    assert Counter(case.split for case in cases) == {"train": 2400, "dev": 120, "test": 220, "shifted": 120}


def test_the_validator_finds_a_wrong_level_a_split_account_and_a_doubled_text(cases, corpus):
    from dataclasses import replace

    one = cases[0]
    bad = [one, replace(one, id="x", split="other"), replace(one, id="y", account="z", levels=one.levels | {"need": "dire"})]
    bad += [replace(one, id="w", evidence=one.evidence | {"budget": "words of somebody else"})]
    said = " ".join(leads.validate_cases(bad, corpus))
    assert "unknown level 'dire'" in said and "is in splits" in said and "the same text" in said
    assert "'words of somebody else' is no evidence for budget" in said


def test_the_shifted_split_has_products_places_and_channels_that_train_never_shows(cases):
    for field in ("product", "place", "channel"):
        train = {getattr(case, field) for case in cases if case.split == "train"}
        assert not train & {getattr(case, field) for case in cases if case.split == "shifted"}


@pytest.mark.parametrize("share", [10, 30])
def test_a_noisy_copy_of_the_first_800_of_train_has_that_share_of_wrong_levels(cases, share):
    noisy = {
        case.id: case
        for case in leads.load_cases(leads.SHIPPED_LEADS / "cases.jsonl", leads.SHIPPED_LEADS / f"noise_{share}.jsonl")
    }
    first = [case for case in cases if case.split == "train"][:800]
    assert sum(noisy[case.id].levels != case.levels for case in first) == len(first) * share // 100
    assert all(noisy[case.id] == case for case in cases if case not in first)


def test_every_band_and_every_level_occurs_in_every_split(cases, corpus, rubric):
    for split in ("train", "dev", "test", "shifted"):
        mine = [case for case in cases if case.split == split]
        assert {rubric.label(case.levels).band for case in mine} == set("ABCD")
        for criterion in CRITERIA:
            assert {case.levels[criterion] for case in mine} == {*rubric.points[criterion], "unknown"}


def test_a_label_is_written_one_way(rubric):
    text = rubric.label(BEST).to_text()
    assert "\n" not in text and leads.parse(text).to_text() == text and isinstance(leads.parse(text), Label)
