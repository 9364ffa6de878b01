"""A chunk keeps its title, its section and its table header, never crosses a section, and no word is lost."""

import re
from datetime import date, timedelta
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from reference.chunks import FOREVER, chunk_corpus, chunk_document, pack
from reference.corpus import Corpus, Document

HEADER = "| Plan | Price |\n|---|---|"
TABLE = f"{HEADER}\n" + "\n".join(f"| Plan {n} | ${n} per seat per month |" for n in range(60))
TEXT = f"""# Price sheet

An opening line.

## Prices

{TABLE}

## Long story

{" ".join(f"Sentence number {n} says something." for n in range(80))}
"""
SIZES = (8, 25, 60, 120, 1000)


def document(text, **changes) -> Document:
    given = {"id": "PRC", "title": "Price sheet", "kind": "price_sheet", "effective": date(2026, 1, 1), "roles": ("all",)}
    return Document(text=text, **given | changes)


DOCUMENT = document(TEXT)


def texts(text, words=120) -> list[str]:
    return [node.text for node in chunk_document(document(text), words=words)]


def sections_of(text) -> list[tuple[str, str]]:
    """(heading, body) by the plainest reading of Markdown: a line that begins with # opens a section."""
    found = [("", [])]
    for line in text.splitlines():
        if line.startswith("#"):
            found.append((line.lstrip("#").strip(), []))
        else:
            found[-1][1].append(line)
    return [(heading, "\n".join(lines)) for heading, lines in found]


def statements(body) -> list[str]:
    """Table rows and list items whole, paragraphs in sentences."""
    lines = [line.strip() for line in body.splitlines() if line.strip()]
    return [
        statement
        for line in lines
        for statement in ([line] if re.match(r"[|\-]|\d+\.", line) else re.split(r"(?<=[.!?])\s+", line))
    ]


# --- sections and titles --------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", SIZES)
def test_every_chunk_begins_with_title_and_section_and_holds_one_section_only(words):
    nodes = chunk_document(DOCUMENT, words=words)
    assert nodes[0].text.startswith("Price sheet\n\n")
    assert all(node.text.startswith(("Price sheet › Prices\n\n", "Price sheet › Long story\n\n")) for node in nodes[1:])
    assert all(("| Plan" in node.text) == ("› Prices" in node.text) for node in nodes)
    assert all(("Sentence" in node.text) == ("› Long story" in node.text) for node in nodes)


@pytest.mark.parametrize("words", SIZES)
def test_no_chunk_of_the_second_company_crosses_a_section(harbour, words):
    for doc in harbour:
        bodies = {}
        for heading, body in sections_of(doc.text):
            title = doc.title if heading in ("", doc.title) else f"{doc.title} › {heading}"
            bodies[title] = bodies.get(title, "") + body
        for node in chunk_document(doc, words=words):
            title, _, piece = node.text.partition("\n\n")
            assert all(statement in bodies[title] for statement in statements(piece)), node.id_


def test_short_sections_are_not_joined():
    assert texts("# One\n\na\n\n## Two\n\nb\n\n### Two\n\nc") == [
        "Price sheet › One\n\na", "Price sheet › Two\n\nb", "Price sheet › Two\n\nc",
    ]  # fmt: skip


def test_a_section_without_a_body_makes_no_chunk_and_a_sign_in_a_code_block_no_section():
    assert texts("# Empty\n\n## Full\n\n```\n# not a heading\n```") == ["Price sheet › Full\n\n```\n# not a heading\n```"]


def test_text_before_the_first_heading_stands_under_the_title():
    assert texts("Opening.\n\n## Two\n\nb") == ["Price sheet\n\nOpening.", "Price sheet › Two\n\nb"]


# --- size -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", SIZES)
def test_every_piece_of_a_table_begins_with_its_header(words):
    pieces = [text for text in texts(TEXT, words) if "| Plan" in text]
    assert len(pieces) > 1 or words == 1000
    assert all(f"\n\n{HEADER}\n| Plan " in piece and piece.count("|---|") == 1 for piece in pieces)
    rows = [row for piece in pieces for row in piece.partition(f"{HEADER}\n")[2].splitlines()]
    assert rows == TABLE.splitlines()[2:]


def test_a_table_right_below_a_line_of_text_keeps_its_header_too():
    pieces = [text for text in texts(f"All prices:\n{TABLE}", 40) if "| Plan" in text]
    assert len(pieces) > 1
    assert all(HEADER in piece for piece in pieces)


def test_a_long_paragraph_is_cut_between_sentences():
    long = " ".join(f"Sentence number {n} says something." for n in range(80))
    pieces = [text.partition("\n\n")[2] for text in texts(long, 30)]
    assert len(pieces) > 10
    assert " ".join(pieces) == long
    assert all(piece.startswith("Sentence ") and piece.endswith("something.") for piece in pieces)


def test_a_long_paragraph_of_several_lines_is_cut_between_sentences_too():
    lines = "\n".join(f"{n} begins here and goes on to\nthe next line. Then sentence" for n in range(30))
    pieces = [text.partition("\n\n")[2] for text in texts(f"Sentence {lines} ends.", 30)]
    assert len(pieces) > 5
    assert all(re.search(r"[.!?]$", piece) for piece in pieces)


def test_a_long_list_is_cut_between_its_items():
    items = [f"- Item {n} has some words. And a second sentence." for n in range(40)]
    pieces = [text.partition("\n\n")[2] for text in texts("\n".join(items), 30)]
    assert len(pieces) > 5
    assert [line for piece in pieces for line in piece.splitlines()] == items


@pytest.mark.parametrize("words", [20, 50, 120])
def test_no_chunk_is_longer_than_asked_but_for_its_heading(words):
    lengths = [len(node.text.split()) for node in chunk_document(DOCUMENT, words=words)]
    assert max(lengths) <= words + len(["Price", "sheet", "›", "Long", "story"])
    assert len(lengths) < 2 * len(TEXT.split()) / words + 10  # and they are not cut finer than they need be


def test_one_sentence_longer_than_a_chunk_stays_whole():
    long = " ".join(f"w{n}" for n in range(50)) + "."
    assert texts(f"Short. {long} Short.", 10) == ["Price sheet\n\nShort.", f"Price sheet\n\n{long}", "Price sheet\n\nShort."]


@given(st.lists(st.text("ab ", min_size=1).filter(str.strip), max_size=20), st.integers(1, 12))
def test_packing_keeps_every_piece_in_order_and_joins_what_fits(pieces, words):
    packed = list(pack(pieces, words, "\n"))
    assert "\n".join(packed) == "\n".join(pieces)
    assert all(len(text.split()) <= words or text in pieces for text in packed)
    assert all(len(f"{one} {next_one.splitlines()[0]}".split()) > words for one, next_one in pairwise(packed))


# --- nothing is lost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", SIZES)
def test_every_table_row_and_sentence_of_the_second_company_survives_whole_in_one_chunk(harbour, words):
    chunks = {}
    for node in chunk_corpus(harbour, words):
        chunks.setdefault(node.metadata["version"], []).append(node.text)
    count = 0
    for doc in harbour:
        for heading, body in sections_of(doc.text):
            if body.strip() and heading:
                assert any(heading in text.partition("\n\n")[0] for text in chunks[doc.version]), heading
            header = next((line for line in body.splitlines() if line.startswith("|")), None)
            for statement in statements(body):
                held = [text for text in chunks[doc.version] if statement in text]
                assert held, (doc.version, statement)
                if statement.startswith("|"):
                    assert all(header in text for text in held)
                count += 1
    assert count > 150


sentences = st.lists(st.text("abc ", min_size=1).map(lambda text: f"S{text}."), min_size=1, max_size=9).map(" ".join)
items = st.lists(st.text("abc ").map(lambda text: f"- i{text}"), min_size=1, max_size=9).map("\n".join)
headings = st.sampled_from(["# One", "## Two", "### Three"])


@given(st.lists(sentences | items | headings, min_size=1, max_size=8), st.integers(1, 40))
def test_no_word_of_any_paragraph_or_list_is_lost_doubled_or_moved(drawn, words):
    pieces = [text.partition("\n\n")[2] for text in texts("\n\n".join(drawn), words)]
    assert " ".join(pieces).split() == " ".join(block for block in drawn if not block.startswith("#")).split()


def test_a_number_sign_that_opens_a_text_makes_no_heading():
    assert texts("#1 in Europe since 2019.") == ["Price sheet\n\n#1 in Europe since 2019."]


# --- what a chunk says about itself -----------------------------------------------------------------------------------


def test_versions_are_true_from_their_day_until_the_next_one_begins():
    days = [date(2026, 1, 1), date(2026, 3, 1), date(2026, 9, 1)]
    corpus = Corpus((document("x", id="A"), *(document(f"text {n}", id="B", effective=day) for n, day in enumerate(days))))
    spans = {node.metadata["version"]: (node.metadata["effective"], node.metadata["until"]) for node in chunk_corpus(corpus)}
    assert spans == {
        "A@2026-01-01": ("2026-01-01", FOREVER),
        "B@2026-01-01": ("2026-01-01", "2026-03-01"),
        "B@2026-03-01": ("2026-03-01", "2026-09-01"),
        "B@2026-09-01": ("2026-09-01", FOREVER),
    }
    assert str(date.max) < FOREVER


def test_on_every_day_the_chunks_that_are_true_are_those_of_the_current_versions(harbour):
    nodes = chunk_corpus(harbour)
    for day in {d.effective + timedelta(shift) for d in harbour for shift in (-1, 0, 1)}:
        true = {n.metadata["version"] for n in nodes if n.metadata["effective"] <= str(day) < n.metadata["until"]}
        assert true == {d.version for d in harbour.as_of(day)}


def test_a_chunk_carries_the_roles_and_names_of_its_document():
    [node] = chunk_document(document("words", roles=("ae", "o'neill"), account="ACC-1"), until="2026-05-01")
    expected = {
        "document": "PRC", "version": "PRC@2026-01-01", "title": "Price sheet", "effective": "2026-01-01",
        "until": "2026-05-01", "roles": ["ae", "o'neill"], "account": "ACC-1",
    }  # fmt: skip
    assert {key: node.metadata[key] for key in expected} == expected
    assert node.id_ == "PRC@2026-01-01#0"
    assert chunk_document(document("words"))[0].metadata["account"] == ""


def test_ids_are_unique_and_the_hash_depends_on_the_text_alone(harbour):
    nodes = chunk_corpus(harbour)
    assert len({node.id_ for node in nodes}) == len(nodes)
    by_hash = {}
    for node in nodes:
        assert by_hash.setdefault(node.metadata["hash"], node.text) == node.text
    assert len(by_hash) == len({node.text for node in nodes}) < len(nodes)  # two versions share most of their text


def test_metadata_stays_out_of_what_is_embedded_and_shown():
    node = chunk_document(DOCUMENT)[0]
    assert node.get_content(metadata_mode="embed") == node.text == node.get_content(metadata_mode="llm")
