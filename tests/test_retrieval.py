"""Nobody ever gets a chunk that their role may not read or that is not current that day; and rankings are what they claim."""

from datetime import date, timedelta

import pytest
from fake_embedder import FakeEmbedder
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from llama_index.core.schema import NodeWithScore, TextNode

from reference.corpus import Corpus, Document
from reference.index import Index
from reference.retrieval import MODES, Retriever, Settings, fuse, permitted

WORDS = "fee price rental storage seat approval discount boiler training visit".split()  # noqa: SIM905
ROLES = ["ae", "exec", "o'brien", "deal_desk", "cs"]
START = date(2026, 1, 1)
ASKED_OF_EACH = 60
CORPORA = 60  # times 3 modes and 60 questions: 10,800 random cases

documents = st.lists(
    st.tuples(
        st.integers(0, 6),  # which document
        st.integers(0, 20),  # from which day
        st.lists(st.sampled_from([*ROLES, "all"]), min_size=1, max_size=3, unique=True),
        st.lists(st.sampled_from(WORDS), min_size=1, max_size=8),
    ),
    min_size=3,
    max_size=15,
    unique_by=lambda drawn: drawn[:2],
)
asked = st.lists(
    st.tuples(st.sampled_from([*ROLES, "all", "stranger"]), st.integers(-2, 25), st.sampled_from(WORDS), st.integers(1, 12)),
    min_size=ASKED_OF_EACH,
    max_size=ASKED_OF_EACH,
)


def make_corpus(drawn):
    return Corpus(
        tuple(
            Document(f"D{n}", f"Title {n}", "policy", START + timedelta(day), tuple(roles), " ".join(words))
            for n, day, roles, words in sorted(drawn, key=lambda d: d[:2])
        )
    )


@pytest.fixture(scope="module")
def scratch(tmp_path_factory):
    return Index(tmp_path_factory.mktemp("random") / "index", FakeEmbedder())


@settings(max_examples=CORPORA, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck))
@given(drawn=documents, cases=asked)
def test_no_random_role_and_day_ever_gets_a_chunk_that_it_may_not_have(scratch, drawn, cases):
    """10,800 random cases (60 corpora, 60 questions of each, 3 modes), against the corpus's own as_of and readable_by."""
    corpus = make_corpus(drawn)
    scratch.refresh(corpus)
    for role, offset, word, k in cases:
        day = START + timedelta(offset)
        allowed = {d.version for d in corpus.as_of(day).readable_by(role)}
        for mode in MODES:
            hits = Retriever(scratch, role, day, Settings(k=k, reads=1, mode=mode)).retrieve(word)
            found = {hit.node.metadata["version"] for hit in hits}
            assert found <= allowed
            if mode != "keyword":  # dense search ranks everything there is, so it must also miss nothing
                assert len(hits) == min(k, len(allowed))


def test_on_a_real_corpus_every_role_gets_only_its_own_every_day(scratch, harbour, harbour_questions):
    scratch.refresh(harbour)
    days = sorted({d.effective + timedelta(shift) for d in harbour for shift in (-1, 0)})
    for role in harbour.roles:
        for day in days:
            allowed = {d.version for d in harbour.as_of(day).readable_by(role)}
            for q in harbour_questions[:3]:
                hits = Retriever(scratch, role, day, Settings(k=20)).retrieve(q.question)
                assert {hit.node.metadata["version"] for hit in hits} <= allowed


def test_a_filter_that_fails_is_an_error_and_not_a_leak(harbour_index, monkeypatch):
    monkeypatch.setattr(Index, "_filter", staticmethod(lambda role, day: "true"))
    with pytest.raises(PermissionError, match="filter failed"):
        Retriever(harbour_index, "all", date(2026, 9, 10), Settings(k=20)).retrieve("supplier margin owner arrears")


def hit(id, score=1.0, **metadata):
    return NodeWithScore(node=TextNode(id_=id, text=id, metadata=metadata), score=score)


def test_fusion_is_the_sum_of_one_over_sixty_plus_rank():
    fused = fuse([[hit("a"), hit("b")], [hit("b"), hit("c")]])
    assert [h.node.id_ for h in fused] == ["b", "a", "c"]
    assert [h.score for h in fused] == pytest.approx([1 / 62 + 1 / 61, 1 / 61, 1 / 62])


def test_equal_scores_come_in_order_of_id():
    assert [h.node.id_ for h in fuse([[hit("z")], [hit("a")]])] == ["a", "z"]


def test_permission_needs_the_day_and_the_role():
    chunk = hit("x", effective="2026-03-01", until="2026-05-01", roles=["exec"])
    assert permitted(chunk, "exec", date(2026, 3, 1))
    assert permitted(chunk, "exec", date(2026, 4, 30))
    assert not permitted(chunk, "exec", date(2026, 5, 1))
    assert not permitted(chunk, "exec", date(2026, 2, 28))
    assert not permitted(chunk, "ae", date(2026, 4, 1))
    assert not permitted(chunk, "all", date(2026, 4, 1))


def test_settings_that_make_no_sense_are_refused():
    for wrong in ({"mode": "magic"}, {"k": 0}, {"k": 30}, {"reads": 5}, {"reads": 0}):
        with pytest.raises(ValueError):
            Settings(**wrong)


def test_search_survives_any_text(harbour_index):
    for text in ('"', "a AND (b OR", "field:value", "💶 €5 ~2 ^3 *", "'; DROP TABLE chunks; --", "x" * 2000, "the of a"):
        Retriever(harbour_index, "owner", date(2026, 9, 10)).retrieve(text)
