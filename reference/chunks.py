"""Chunks: the pieces of a document that are embedded, found and shown to the model.

A chunk is a LlamaIndex `TextNode`. It never crosses a section, begins with its document's title and section, and a table
row never loses its header. Its metadata says which document and version it is from, on which days it is true and who may
read it; none of that enters the text that is embedded or shown.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterator

from llama_index.core.node_parser import MarkdownNodeParser
from llama_index.core.schema import Document as LlamaDocument
from llama_index.core.schema import TextNode

from reference.corpus import Corpus, Document

CHUNK_WORDS = 120
FOREVER = "forever"  # sorts after every day


def chunk_corpus(corpus: Corpus, words: int = CHUNK_WORDS) -> list[TextNode]:
    """The chunks of every document version, each with the days on which its version is the current one."""
    nodes = []
    for versions in corpus.versions.values():
        ends = [str(later.effective) for later in versions[1:]] + [FOREVER]
        for document, until in zip(versions, ends, strict=True):
            nodes += chunk_document(document, until, words)
    return nodes


def chunk_document(document: Document, until: str = FOREVER, words: int = CHUNK_WORDS) -> list[TextNode]:
    """The chunks of one document version, of at most about `words` words each; `until` is the first day it is not current."""
    nodes = []
    for section, body in sections(document):
        heading = document.title if section in ("", document.title) else f"{document.title} › {section}"
        for piece in pack(blocks(body, words), words):
            text = f"{heading}\n\n{piece}"
            metadata = {
                "document": document.id,
                "version": document.version,
                "title": document.title,
                "effective": str(document.effective),
                "until": until,
                "roles": list(document.roles),
                "account": document.account or "",
                "hash": hashlib.sha256(text.encode()).hexdigest()[:16],
            }
            hidden = list(metadata)
            nodes.append(
                TextNode(
                    id_=f"{document.version}#{len(nodes)}",
                    text=text,
                    metadata=metadata,
                    excluded_embed_metadata_keys=hidden,
                    excluded_llm_metadata_keys=hidden,
                )
            )
    return nodes


def sections(document: Document) -> Iterator[tuple[str, str]]:
    """(heading, body) of each Markdown section that has a body, by LlamaIndex's Markdown parser."""
    for node in MarkdownNodeParser().get_nodes_from_documents([LlamaDocument(text=document.text)]):
        first, _, rest = node.text.partition("\n")
        heading, body = (first.lstrip("#").strip(), rest) if re.match("#+ ", first) else ("", node.text)
        if body.strip():
            yield heading, body.strip()


def blocks(body: str, words: int = CHUNK_WORDS) -> Iterator[str]:
    """Paragraphs, lists and tables. What is longer than a chunk is cut between rows, list items or sentences, and each piece
    of a table begins with the table's header."""
    for block in re.split(r"\n\s*\n", body):
        table = re.search(r"^.*\|.*\n[|:\- ]+\n", block, re.M)
        if len(block.split()) <= words:
            yield block
        elif table:
            if above := block[: table.start()].strip():
                yield from blocks(above, words)
            for rows in pack(block[table.end() :].split("\n"), words - len(table[0].split()), "\n"):
                yield table[0] + rows
        elif len(items := re.split(r"\n(?=\s*(?:[-*+]|\d+[.)])\s)", block)) > 1:
            yield from pack(items, words, "\n")
        else:
            yield from pack(re.split(r"(?<=[.!?])\s+", block), words, " ")


def pack(pieces: Iterator[str] | list[str], words: int, joint: str = "\n\n") -> Iterator[str]:
    """Join neighbours while they stay within `words` words."""
    packed: list[str] = []
    for piece in pieces:
        if packed and len(joint.join([*packed, piece]).split()) > words:
            yield joint.join(packed)
            packed = []
        packed.append(piece)
    if packed:
        yield joint.join(packed)
