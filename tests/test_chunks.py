"""A chunk keeps its title, its section and its table header, and never crosses a section."""

from datetime import date

from reference.chunks import chunk_corpus, chunk_document
from reference.corpus import Document

TABLE = "| Plan | Price |\n|---|---|\n" + "\n".join(f"| Plan {n} | ${n} per seat per month |" for n in range(60))
TEXT = f"""# Price sheet

An opening line.

## Prices

{TABLE}

## Long story

{" ".join(f"Sentence number {n} says something." for n in range(80))}
"""
DOCUMENT = Document("PRC", "Price sheet", "price_sheet", date(2026, 1, 1), ("all",), TEXT)


def test_every_piece_of_a_long_table_begins_with_its_header():
    pieces = [n.text for n in chunk_document(DOCUMENT) if "| Plan" in n.text]
    assert len(pieces) > 1
    assert all("| Plan | Price |\n|---|---|\n| Plan " in piece for piece in pieces)


def test_every_chunk_begins_with_title_and_section_and_holds_one_section_only():
    nodes = chunk_document(DOCUMENT)
    assert nodes[0].text.startswith("Price sheet\n\n")
    assert all(n.text.startswith("Price sheet › ") for n in nodes[1:])
    assert not [n for n in nodes if "| Plan" in n.text and "Sentence" in n.text]


def test_no_chunk_is_much_longer_than_asked():
    assert max(len(n.text.split()) for n in chunk_document(DOCUMENT, words=50)) <= 50 + 10


def test_every_line_and_sentence_survives(harbour):
    chunks = {}
    for node in chunk_corpus(harbour):
        chunks.setdefault(node.metadata["version"], []).append(" ".join(node.text.split()))
    for document in harbour:
        text = " ".join(chunks[document.version])
        for line in document.text.splitlines():
            if line.strip() and not line.startswith("#"):
                assert all(" ".join(s.split()) in text for s in line.split(". ")), (document.version, line)


def test_a_version_is_current_until_the_next_one(harbour):
    for versions in harbour.versions.values():
        if len(versions) == 2:
            nodes = [n for n in chunk_corpus(harbour) if n.metadata["version"] == versions[0].version]
            assert {n.metadata["until"] for n in nodes} == {str(versions[1].effective)}


def test_metadata_stays_out_of_what_is_embedded_and_shown():
    node = chunk_document(DOCUMENT)[0]
    assert node.get_content(metadata_mode="embed") == node.text == node.get_content(metadata_mode="llm")
