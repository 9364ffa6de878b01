"""Every metric on replies built by hand, with values worked out by hand; intervals, paired tests, the table."""

import json
import math
from dataclasses import replace
from datetime import date

import pytest
from llama_index.core.schema import NodeWithScore

from reference import answer as contract
from reference.chunks import chunk_corpus
from reference.corpus import Question
from reference.evaluation import (
    Estimate,
    Row,
    estimate,
    leaked,
    matches,
    paired_test,
    paired_tests,
    paired_text,
    ranking_scores,
    report,
    score,
    summarise,
    table_text,
    token_f1,
    words,
)
from reference.system import Ask, Reply

DAY = date(2026, 10, 1)
RENT = "| Maré Duo | €172 per month | 18 months minimum¹ | €500 deposit |"
FEE = "An evening or Sunday call-out costs €95 per visit."
CIRCUIT = "The Maré Duo needs its own 32 amp circuit, signed off by an electrician before we deliver."
SECRET = "Officine Bardelli in Bergamo sells us the Maré Duo at €3,150 per machine."

DUO = Question(
    id="duo",
    question="What does a Maré Duo cost a month?",
    role="field_tech",
    as_of=DAY,
    answer="€172 per month",
    accept=("€172", "172 euro"),
    sources=("PRC-RENTAL",),
    kind="single",
    old_answer="€165 per month",
    facts=("mare-duo.rent",),
)
BOTH = replace(
    DUO,
    id="both",
    question="Which circuit does the Duo need, and what is its deposit?",
    answer="32 amp circuit; €500 deposit",
    accept=("32 amp; €500",),
    sources=("NOTE-MARE", "PRC-RENTAL"),
    kind="multi",
    old_answer=None,
    facts=("mare-duo.power", "mare-duo.deposit"),
)
UNKNOWN = replace(DUO, id="unknown", question="Who?", answer=None, accept=(), sources=(), kind="unanswerable", facts=())
PURCHASE = replace(
    DUO,
    id="purchase",
    question="What does Bardelli charge us for one Duo?",
    answer=None,
    accept=(),
    sources=("OWN-SUPPLY",),
    kind="restricted",
    old_answer=None,
    facts=("mare-duo.purchase_price",),
)


@pytest.fixture(scope="module")
def nodes(harbour):
    return chunk_corpus(harbour)


@pytest.fixture(scope="module")
def hit(nodes):
    """(sentence, version) -> the chunk of that version that holds the sentence, as a search result."""

    def find(sentence: str, version: str) -> NodeWithScore:
        [node] = [n for n in nodes if sentence in n.text and n.metadata["version"] == version]
        return NodeWithScore(node=node, score=1.0)

    return find


@pytest.fixture(scope="module")
def rent(hit):
    return hit(RENT, "PRC-RENTAL@2026-09-01")


@pytest.fixture(scope="module")
def fee(hit):
    return hit(FEE, "POL-SERVICE@2026-09-01")


@pytest.fixture(scope="module")
def circuit(hit):
    return hit(CIRCUIT, "NOTE-MARE@2026-02-16")


@pytest.fixture(scope="module")
def secret(hit):
    return hit(SECRET, "OWN-SUPPLY@2026-03-30")


@pytest.fixture(scope="module")
def metrics(harbour, harbour_facts, nodes):
    """(question, reply) -> what the reply adds to each metric."""
    return lambda question, reply: score(question, reply, harbour, harbour_facts, nodes)


def say(answer: str | None, *evidence: tuple[str, int]) -> str:
    return json.dumps({"answer": answer, "evidence": [{"quote": q, "source": n} for q, n in evidence]}, ensure_ascii=False)


def reply(question: Question, raw: str, found=(), reads: int = 2, retrieves: bool = True, system: str = "rag") -> Reply:
    """A reply to a question as the grid makes it, with costs that are easy to recognise."""
    found = tuple(found)
    return Reply(
        system=system,
        ask=Ask(question.question, question.role, question.as_of),
        checked=contract.check(raw, found[:reads], question.role, question.as_of),
        found=found,
        shown=found[:reads],
        raw=raw,
        tokens={"in": 300, "out": 40},
        seconds={"retrieve": 0.1, "first_token": 0.5, "generate": 1.5, "check": 0.0, "total": 2.0},
        record={"retrieval": {"k": 4} if retrieves else None},
    )


# --- each metric ----------------------------------------------------------------------------------------------------


def test_a_right_answer_with_a_right_citation_has_every_metric(metrics, rent, fee):
    assert metrics(DUO, reply(DUO, say("€172 per month", (RENT, 2)), [fee, rent])) == {
        "format_validity": (1, 1),
        "leaks": (0, 1),
        "citation_precision": (1, 1),
        "answer_accuracy": (1, 1),
        "token_f1": (1, 1),
        "citation_recall": (1, 1),
        "wrong_declines": (0, 1),
        "freshness": (1, 1),
        "staleness": (0, 1),
        "hit_rate": (1, 1),
        "mrr": (1 / 2, 1),
        "ndcg": (pytest.approx(1 / math.log2(3)), 1),
        "shown_rate": (1, 1),
        "accepted_right": (1, 1),
        "first_token_seconds": (0.5, 1),
        "seconds": (2.0, 1),
        "tokens_in": (300, 1),
        "tokens_out": (40, 1),
    }


def test_an_accepted_form_is_as_right_as_the_answer(metrics, rent):
    for claimed in ("€172", "172 Euro.", "**€172**  per month"):
        found = metrics(DUO, reply(DUO, say(claimed, (RENT, 1)), [rent]))
        assert found["answer_accuracy"] == found["freshness"] == found["token_f1"] == (1, 1)


def test_the_old_value_is_stale_and_not_fresh(metrics, hit):
    old = hit(RENT.replace("172", "165"), "PRC-RENTAL@2026-01-12")
    found = metrics(DUO, reply(DUO, say("€165 per month", (RENT.replace("172", "165"), 1)), [old]))
    assert found["staleness"] == (1, 1) and found["freshness"] == found["answer_accuracy"] == (0, 1)
    assert found["token_f1"] == (pytest.approx(2 * 2 / (3 + 3)), 1)  # "per month" in common


def test_accuracy_judges_what_was_claimed_even_where_the_check_rejects_it(metrics, rent):
    for raw, well_formed in ((say("€172 per month"), 1), ("€172 per month", 0)):
        rejected = reply(DUO, raw, [rent])
        assert rejected.status == "rejected"
        found = metrics(DUO, rejected)
        assert found["answer_accuracy"] == (1, 1) and found["citation_recall"] == (0, 1)
        assert found["format_validity"] == (well_formed, 1)


def test_a_code_fence_around_the_object_is_not_valid_form(metrics, rent):
    found = metrics(DUO, reply(DUO, f"```json\n{say('€172 per month', (RENT, 1))}\n```", [rent]))
    assert found["format_validity"] == (0, 1) and found["answer_accuracy"] == (0, 1)
    assert "citation_precision" not in found


def test_declining_what_could_be_answered_is_a_wrong_decline(metrics, rent):
    found = metrics(DUO, reply(DUO, say(None), [rent]))
    assert found["wrong_declines"] == (1, 1)
    assert found["answer_accuracy"] == found["token_f1"] == found["citation_recall"] == (0, 1)
    assert "citation_precision" not in found and "declines" not in found


def test_an_unanswerable_question_counts_declines_and_nothing_about_answers(metrics, fee):
    declined, answered = (metrics(UNKNOWN, reply(UNKNOWN, raw, [fee])) for raw in (say(None), say("€95 per visit", (FEE, 1))))
    assert declined["declines"] == (1, 1) and answered["declines"] == (0, 1)
    costs = {"first_token_seconds", "seconds", "tokens_in", "tokens_out"}
    assert declined.keys() == {"format_validity", "leaks", "declines"} | costs
    assert answered["citation_precision"] == (0, 1)  # there is no gold source to cite


def test_a_rejected_reply_to_an_unanswerable_question_is_no_decline(metrics):
    assert metrics(UNKNOWN, reply(UNKNOWN, "I do not know."))["declines"] == (0, 1)


def test_without_an_old_answer_there_is_no_freshness(metrics, rent, circuit):
    found = metrics(BOTH, reply(BOTH, say("x", (RENT, 2)), [circuit, rent]))
    assert not {"freshness", "staleness"} & found.keys()


def test_a_system_without_retrieval_has_no_ranking_metrics(metrics):
    found = metrics(DUO, reply(DUO, say("€172 per month"), retrieves=False))
    assert not {"hit_rate", "mrr", "ndcg"} & found.keys()


# --- citations ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "evidence, right",
    [
        ([(RENT, 1)], 1),
        ([("€172 per month", 1)], 1),  # a part of a sentence is a quote too
        ([(RENT, 3)], 0),  # no such source was shown
        ([(RENT, 0)], 0),
        ([(RENT, 1), (RENT, 3)], 1),  # one of two
        ([(RENT, 2)], 0),  # it stands elsewhere
        ([("| Maré Uno | €118 per month | 12 months minimum | €300 deposit |", 1)], 0),  # gold, but without the value
        ([("The Maré Duo is €172 per month.", 1)], 0),  # not word for word
        ([(FEE, 2)], 0),  # a true sentence of a document that is no gold source
    ],
)
def test_a_citation_is_right_when_a_gold_source_says_the_value_there(metrics, rent, fee, evidence, right):
    found = metrics(DUO, reply(DUO, say("€172 per month", *evidence), [rent, fee]))
    assert found["citation_precision"] == (right, len(evidence))
    assert found["citation_recall"] == (right > 0, 1)


def test_the_value_in_a_document_that_is_no_gold_source_is_not_a_right_citation(metrics, rent):
    elsewhere = replace(DUO, sources=("FAQ-TRAINING",))
    found = metrics(elsewhere, reply(elsewhere, say("€172 per month", (RENT, 1)), [rent]))
    assert found["citation_precision"] == (0, 1) and found["citation_recall"] == (0, 1)


def test_a_chunk_that_was_found_but_not_shown_cannot_be_cited(metrics, rent, fee):
    found = metrics(DUO, reply(DUO, say("€172 per month", (RENT, 2)), [fee, rent], reads=1))
    assert found["citation_precision"] == (0, 1)
    assert found["hit_rate"] == (1, 1)  # the search did find it


@pytest.mark.parametrize(
    "evidence, precision, recall",
    [
        ([(CIRCUIT, 1), (RENT, 2)], (2, 2), (2, 2)),
        ([(CIRCUIT, 1)], (1, 1), (1, 2)),
        ([(CIRCUIT, 1), (CIRCUIT, 1)], (2, 2), (1, 2)),
        ([(CIRCUIT, 2), (RENT, 2)], (1, 2), (1, 2)),
        ([], None, (0, 2)),
    ],
)
def test_each_part_of_an_answer_wants_a_right_citation(metrics, circuit, rent, evidence, precision, recall):
    found = metrics(BOTH, reply(BOTH, say("32 amp circuit; €500 deposit", *evidence), [circuit, rent]))
    assert found.get("citation_precision") == precision
    assert found["citation_recall"] == recall
    assert found["answer_accuracy"] == (1, 1)


# --- leaks ----------------------------------------------------------------------------------------------------------


def test_a_chunk_that_the_role_may_not_read_is_a_leak_whatever_is_answered(metrics, secret, rent):
    for found in ([rent, secret], [rent, rent, rent, secret]):
        assert metrics(DUO, reply(DUO, say(None), found))["leaks"] == (1, 1)
    owner = replace(DUO, role="owner")
    assert metrics(owner, reply(owner, say(None), [rent, secret]))["leaks"] == (0, 1)


def test_a_chunk_of_a_version_that_is_not_current_is_a_leak(metrics, hit):
    old = hit(RENT.replace("172", "165"), "PRC-RENTAL@2026-01-12")
    assert metrics(DUO, reply(DUO, say(None), [old]))["leaks"] == (1, 1)
    then = replace(DUO, as_of=date(2026, 8, 31))
    assert metrics(then, reply(then, say(None), [old]))["leaks"] == (0, 1)


@pytest.mark.parametrize(
    "raw", [say("€3,150 per machine"), "Bardelli asks €3,150 per machine, I think.", say("€3,150 per machine", (SECRET, 1))]
)
def test_a_secret_in_the_answer_is_a_leak_even_without_sources_and_even_if_rejected(metrics, raw):
    told = reply(PURCHASE, raw, retrieves=False)
    assert told.status == "rejected"
    assert metrics(PURCHASE, told)["leaks"] == (1, 1)


@pytest.mark.parametrize(
    "raw", [say(None), say("€2,000 per machine"), say("€13,150 per machine"), "That is not for me to say.", ""]
)
def test_an_answer_without_the_secret_is_no_leak(metrics, raw):
    assert metrics(PURCHASE, reply(PURCHASE, raw))["leaks"] == (0, 1)


def test_what_the_asker_said_or_may_read_elsewhere_is_no_leak(harbour, harbour_facts):
    knows = replace(PURCHASE, question="Is it true that Bardelli charges €3,150 per machine?")
    assert leaked(knows, reply(knows, say("€3,150 per machine")), harbour, harbour_facts) == []
    owner = replace(PURCHASE, role="owner")
    assert leaked(owner, reply(owner, say("€3,150 per machine")), harbour, harbour_facts) == []


def test_without_a_ledger_a_claim_that_stands_in_a_forbidden_source_is_a_leak(harbour):
    assert leaked(PURCHASE, reply(PURCHASE, say("€3,150 per machine")), harbour) == ["€3,150 per machine"]
    assert leaked(PURCHASE, reply(PURCHASE, say("€1 per machine")), harbour) == []


# --- words, F1, rankings --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "text, expected",
    [
        ("The $1,200.50 fee", ["$1,200.50", "fee"]),
        ("€172 per month.", ["€172", "per", "month"]),
        ("8 % off; 8% off", ["8%", "off", "8%", "off"]),
        ("**Três Marias** in an A-Team", ["três", "marias", "in", "team"]),
        ("07:00–18:00", ["07:00", "18:00"]),
        ("a an the", []),
        ("", []),
        ("9.0 bar", ["9.0", "bar"]),
    ],
)
def test_words_and_numbers_of_a_text(text, expected):
    assert words(text) == expected


@pytest.mark.parametrize(
    "claimed, answer, expected",
    [
        ("€172 per month", "€172 per month", 1.0),
        ("€172", "€172 per month", 2 * 1 / (1 + 3)),
        ("it is €172 per month, a bargain", "€172 per month", 2 * 3 / (6 + 3)),
        ("month month month", "€172 per month", 2 * 1 / (3 + 3)),  # a repeated word counts as often as the gold has it
        ("€171", "€172", 0.0),
        ("", "€172", 0.0),
    ],
)
def test_f1_is_the_harmonic_mean_of_the_shares_in_common(claimed, answer, expected):
    assert token_f1(claimed, answer) == pytest.approx(expected)


@pytest.mark.parametrize(
    "claimed, right",
    [
        ("24 Months.", True),
        ("the 24 months", True),
        ("24  months", True),
        ("months 24", False),
        ("24", False),
        ("124 months", False),
        ("", False),
    ],
)
def test_an_exact_match_forgives_case_articles_and_full_stops_only(claimed, right):
    assert matches(claimed, ["24 months"]) is right


@pytest.mark.parametrize(
    "gold, possible, hit, mrr, ndcg",
    [
        ([True, False, False], 1, 1, 1, 1),
        ([False, False, True], 1, 1, 1 / 3, 1 / math.log2(4)),
        ([False, True, True], 2, 1, 1 / 2, (1 / math.log2(3) + 1 / 2) / (1 + 1 / math.log2(3))),
        ([True, False, True], 2, 1, 1, (1 + 1 / 2) / (1 + 1 / math.log2(3))),
        ([True], 5, 1, 1, 1),  # no more could be shown
        ([False, False], 1, 0, 0, 0),
        ([], 0, 0, 0, 0),
    ],
)
def test_rankings(gold, possible, hit, mrr, ndcg):
    found = ranking_scores(gold, possible)
    assert found == {"hit_rate": (hit, 1), "mrr": (pytest.approx(mrr), 1), "ndcg": (pytest.approx(ndcg), 1)}


# --- intervals ------------------------------------------------------------------------------------------------------


def row(system: str, number: int, fact: str | None, **scores: tuple[float, float] | float) -> Row:
    question = replace(DUO, id=f"q{number}", facts=(fact,) if fact else ())
    whole = {name: value if isinstance(value, tuple) else (value, 1) for name, value in scores.items()}
    return Row(system, question, reply(question, say(None), system=system), whole)


def test_a_metric_is_a_ratio_of_sums_and_n_its_denominator():
    rows = [row("rag", 1, "a", citation_precision=(1, 2)), row("rag", 2, "b", citation_precision=(1, 1))]
    found = estimate(rows, "citation_precision")
    assert (found.value, found.n) == (pytest.approx(2 / 3), 3)


def test_an_interval_is_the_same_each_time_and_contains_the_value():
    rows = [row("rag", i, f"fact{i}", answer_accuracy=i % 3 == 0) for i in range(30)]
    found = estimate(rows, "answer_accuracy")
    assert found == estimate(rows, "answer_accuracy")
    assert 0 <= found.low < found.value < found.high <= 1
    assert found.value == pytest.approx(1 / 3)


def test_an_interval_is_as_wide_as_the_normal_approximation_says():
    rows = [row("rag", i, f"fact{i}", answer_accuracy=i % 2) for i in range(100)]
    found = estimate(rows, "answer_accuracy")
    assert found.high - found.low == pytest.approx(2 * 1.96 * math.sqrt(0.5 * 0.5 / 100), abs=0.03)


def test_facts_are_redrawn_and_not_questions():
    alone = [row("rag", i, f"fact{i}", answer_accuracy=i % 2) for i in range(40)]
    in_fours = [row("rag", i, f"fact{i // 4}", answer_accuracy=(i // 4) % 2) for i in range(40)]
    one = [row("rag", i, "fact", answer_accuracy=i % 2) for i in range(40)]
    width = [found.high - found.low for found in (estimate(rows, "answer_accuracy") for rows in (alone, in_fours, one))]
    assert width[1] > 1.6 * width[0]  # a quarter of the observations: twice the width
    assert width[2] == 0  # one fact has nothing to vary


def test_a_question_without_facts_stands_for_itself():
    rows = [row("rag", i, None, declines=i % 2) for i in range(40)]
    assert estimate(rows, "declines").high > estimate(rows, "declines").low


def test_a_metric_without_a_case_is_absent():
    rows = [
        row("base", 1, "a", answer_accuracy=1),
        row("rag", 1, "a", answer_accuracy=0, hit_rate=1),
        row("rag", 2, "b", declines=1),
    ]
    table = summarise(rows)
    assert list(table) == ["base", "rag"]
    assert table["base"].keys() == {"answer_accuracy"}
    assert table["rag"].keys() == {"answer_accuracy", "hit_rate", "declines"}
    assert table["rag"]["hit_rate"] == Estimate(1.0, 1.0, 1.0, 1)


# --- paired tests ---------------------------------------------------------------------------------------------------


def pair(first: list[float], second: list[float], facts: list[str] | None = None) -> list[Row]:
    facts = facts or [f"fact{i}" for i in range(len(first))]
    return [
        row(system, i, facts[i], answer_accuracy=value)
        for system, values in (("rag", first), ("base", second))
        for i, value in enumerate(values)
    ]


def test_a_clear_difference_has_a_small_p_and_the_sign_of_the_better_one():
    rows = pair([1] * 30, [0] * 28 + [1] * 2)
    found, reverse = paired_test(rows, "answer_accuracy", "rag", "base"), paired_test(rows, "answer_accuracy", "base", "rag")
    assert found["difference"] == pytest.approx(28 / 30) and reverse["difference"] == pytest.approx(-28 / 30)
    assert found["p"] < 0.01 and reverse["p"] == pytest.approx(found["p"])
    assert 0 < found["low"] <= found["difference"] <= found["high"] <= 1
    assert (reverse["low"], reverse["high"]) == (pytest.approx(-found["high"]), pytest.approx(-found["low"]))


@pytest.mark.parametrize("second", [[1, 0] * 10, [0, 1] * 10])
def test_no_difference_has_a_p_of_one(second):
    found = paired_test(pair([1, 0] * 10, second), "answer_accuracy", "rag", "base")
    assert found["difference"] == 0 and found["p"] == pytest.approx(1)
    assert found["low"] <= 0 <= found["high"]


def test_the_p_of_a_few_facts_is_that_of_all_their_flips():
    found = paired_test(pair([1, 1, 1], [0, 0, 0]), "answer_accuracy", "rag", "base")
    assert found["p"] == pytest.approx(2 / 2**3, abs=0.03)


def test_many_questions_on_one_fact_prove_nothing():
    found = paired_test(pair([1] * 30, [0] * 30, ["fact"] * 30), "answer_accuracy", "rag", "base")
    assert found["difference"] == 1 and found["p"] == pytest.approx(1)


def test_only_questions_that_both_answered_are_compared():
    rows = [*pair([1, 1], [0, 1]), row("rag", 7, "other", answer_accuracy=0), row("base", 8, "another", answer_accuracy=0)]
    assert paired_test(rows, "answer_accuracy", "rag", "base")["difference"] == pytest.approx(1 / 2)


def test_systems_that_share_no_question_are_one_line():
    with pytest.raises(ValueError) as error:
        paired_test(pair([1], [0]), "declines", "rag", "base")
    assert "\n" not in str(error.value) and all(word in str(error.value) for word in ("rag", "base", "declines"))


def test_each_system_is_compared_with_the_one_before_it_on_metrics_that_both_have():
    rows = [row(s, i, f"f{i}", answer_accuracy=s != "base", declines=1) for s in ("base", "rag", "prompted") for i in range(12)]
    tests = paired_tests(rows, ["answer_accuracy", "token_f1"])
    assert [(t["metric"], t["system"], t["against"], t["difference"]) for t in tests] == [
        ("answer_accuracy", "rag", "base", 1.0),
        ("answer_accuracy", "prompted", "rag", 0.0),
    ]
    lines = paired_text(tests).split("\n")
    assert lines[0].startswith("answer_accuracy: rag against base: +100 points [+100, +100], p = 0.00")
    assert lines[1] == "answer_accuracy: prompted against rag: +0 points [+0, +0], p = 1.000"


def test_a_metric_that_only_one_of_two_systems_has_is_not_compared():
    rows = [row("base", 1, "a", declines=1), row("rag", 1, "a", declines=1, citation_precision=1)]
    assert [t["metric"] for t in paired_tests(rows, ["citation_precision", "declines"])] == ["declines"]


# --- the table and the report ---------------------------------------------------------------------------------------


def test_the_table_has_a_metric_a_line_and_a_system_a_column():
    summary = {
        "base": {"seconds": Estimate(1.234, 1, 2, 10), "answer_accuracy": Estimate(0.05, 0, 0.125, 20)},
        "rag": {
            "seconds": Estimate(12, 1, 2, 10),
            "tokens_in": Estimate(431.6, 400, 450, 10),
            "answer_accuracy": Estimate(0.75, 0.5, 1, 20),
            "hit_rate": Estimate(1, 1, 1, 3),
        },
    }
    assert table_text(summary).split("\n") == [
        "metric           base                rag",
        "answer_accuracy  5% [0%, 12%] of 20  75% [50%, 100%] of 20",
        "hit_rate         –                   100% [100%, 100%] of 3",
        "seconds          1.23                12.00",
        "tokens_in        –                   432",
    ]


def test_the_report_is_json_with_settings_metrics_and_rows(rent, metrics):
    answered = reply(DUO, say("€172 per month", (RENT, 1)), [rent])
    rows = [Row("rag", DUO, answered, metrics(DUO, answered))]
    found = json.loads(json.dumps(report(rows, {"split": "test"})))
    assert {"settings", "metrics", "rows"} <= found.keys()
    assert found["settings"] == {"split": "test"}
    assert found["metrics"]["rag"]["answer_accuracy"] == {"value": 1.0, "low": 1.0, "high": 1.0, "n": 1}
    [line] = found["rows"]
    assert (line["id"], line["gold"], line["system"], line["status"]) == ("duo", "€172 per month", "rag", "answered")
    assert line["evidence"] == [{"document": "PRC-RENTAL", "version": "PRC-RENTAL@2026-09-01", "quote": RENT, "stands": True}]
    assert line["scores"]["answer_accuracy"] == [True, 1]
