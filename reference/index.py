"""The index: chunks and their vectors in an embedded LanceDB table on disk, with versions.

`refresh` writes a new version of the whole table and only then moves the tag `serving` to it, so an interrupted refresh
leaves the old version serving, and `roll_back` is moving the tag. Vectors of unchanged text are taken over, not computed.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import date
from pathlib import Path

import numpy as np
from llama_index.core.schema import NodeWithScore, TextNode

os.environ.setdefault("LANCEDB_LOG", "error")
import lancedb
import lancedb.index
import pyarrow as pa
from filelock import FileLock
from lancedb.query import MatchQuery

from reference.chunks import CHUNK_WORDS, chunk_corpus
from reference.corpus import EVERYBODY, Corpus, CorpusError
from reference.embedding import Embedder
from reference.weights import cache_folder

TABLE = "chunks"
FORMAT = 2  # of the table; another number makes new cached indexes
SERVING = "serving"
APPROXIMATE_FROM = 20_000  # chunks; below, every vector is compared, above, an inverted file narrows the search
COLUMNS = ["id", "document", "version", "title", "effective", "until", "roles", "account", "hash", "text"]


@dataclass(frozen=True)
class Refresh:
    """What a refresh did: the version now serving, and how many chunks were embedded, taken over and dropped."""

    version: int
    embedded: int
    kept: int
    dropped: int


class Index:
    """The chunks of one corpus. Reads go to the version that the tag `serving` names."""

    def __init__(self, folder: str | Path, embedder: Embedder, words: int = CHUNK_WORDS):
        self.folder = Path(folder)
        self.embedder = embedder
        self.words = words
        self._open()

    @classmethod
    def of(cls, corpus_folder: str | Path, corpus: Corpus, embedder: Embedder, words: int = CHUNK_WORDS) -> Index:
        """The cached index of a corpus folder, brought up to date unless `corpus` is what was published last.

        So a version that was rolled back stays rolled back until the folder's documents change.
        """
        key = f"{FORMAT}\n{Path(corpus_folder).resolve()}\n{embedder.id}\n{words}"
        name = f"index-{Path(corpus_folder).resolve().parent.name}-{hashlib.sha256(key.encode()).hexdigest()[:8]}"
        index = cls(cache_folder() / name, embedder, words)
        if index.published[-1:] != [corpus.hash]:
            index.refresh(corpus)
        return index

    def _open(self) -> None:
        """Show the serving version. Raises CorpusError when the folder holds something damaged."""
        self.table = None
        if not (self.folder / f"{TABLE}.lance" / "_versions").exists():
            return  # nothing yet, or a first refresh that was killed
        with self._damage_in_one_line():
            table = lancedb.connect(self.folder).open_table(TABLE)
            if SERVING in table.tags.list():
                table.checkout(SERVING)
                self.table = table

    @contextmanager
    def _damage_in_one_line(self):
        try:
            yield
        except Exception as error:  # lancedb raises plain RuntimeError, ValueError and OSError for damage of any kind
            reason = str(error).splitlines()[0][:120]
            raise CorpusError(f"the index {self.folder} is damaged ({reason}); delete that folder, it is rebuilt") from None

    @property
    def version(self) -> int:
        """The serving version; 0 before the first refresh."""
        return self.table.version if self.table else 0

    @property
    def corpus_hash(self) -> str:
        """The hash of the corpus that the serving version was made from."""
        return self.table.schema.metadata[b"corpus"].decode() if self.table else ""

    @property
    def served_versions(self) -> list[int]:
        """Every version that was ever published, oldest first."""
        return [version for version, _ in self._publications()]

    @property
    def published(self) -> list[str]:
        """The corpus hash of every version that was ever published, oldest first."""
        return [corpus_hash for _, corpus_hash in self._publications()]

    def _publications(self) -> list[tuple[int, str]]:
        tags = self.table.tags.list() if self.table else {}
        return sorted((tag["version"], name.split("-")[1]) for name, tag in tags.items() if name != SERVING)

    @property
    def roles(self) -> set[str]:
        """Every role that the corpus names, and `all`."""
        return set(json.loads(self.table.schema.metadata[b"roles"])) if self.table else set()

    def check_role(self, role: str) -> None:
        """Raises CorpusError for a role that no document names."""
        if role not in self.roles:
            raise CorpusError(f"unknown role {role!r}; this corpus knows {', '.join(sorted(self.roles))}")

    def at_version(self, version: int) -> Index:
        """The same index, reading one published version. Raises CorpusError when it was never published."""
        if version not in self.served_versions:
            raise CorpusError(f"index version {version} was never published here; there are {self.served_versions}")
        other = Index(self.folder, self.embedder, self.words)
        other.table.checkout(version)
        return other

    def __len__(self) -> int:
        return self.table.count_rows() if self.table else 0

    def refresh(self, corpus: Corpus, progress: Callable[[str], None] = lambda _: None) -> Refresh:
        """Make the index hold exactly the chunks of `corpus`. Atomic: readers see the old version, then the new one."""
        nodes = chunk_corpus(corpus, self.words)
        if not nodes:
            raise CorpusError("this corpus has no text below its headings; write some, then refresh")
        with self._lock():
            self._open()
            known = self._vectors_by_hash()
            hashes = [node.metadata["hash"] for node in nodes]
            missing = {h: node for h, node in zip(hashes, nodes, strict=True) if h not in known}
            if missing:
                progress(f"embedding {len(missing)} of {len(nodes)} chunks …")
                vectors = self.embedder.embed([node.text for node in missing.values()])
                new = known | dict(zip(missing, vectors, strict=True))
            else:
                new = known
            table = self._write(nodes, np.stack([new[h] for h in hashes]), corpus)
            self._publish(table, corpus.hash)
            self._open()
        return Refresh(self.version, len(missing), len(set(hashes) & known.keys()), len(known.keys() - set(hashes)))

    def roll_back(self, version: int | None = None) -> int:
        """Serve an earlier published version again (the one before the serving one, unless named); returns it.

        Raises CorpusError when there is none. The next refresh publishes anew; nothing is lost.
        """
        earlier = [v for v in self.served_versions if v < self.version]
        target = version if version is not None else (earlier[-1] if earlier else None)
        if target not in self.served_versions:
            raise CorpusError(f"no published version {target or 'before this one'}; there are {self.served_versions}")
        with self._lock():
            self.table.tags.update(SERVING, target)
            self._open()
        return target

    def nodes(self) -> list[TextNode]:
        """Every chunk of the serving version, of all days and roles, in order of id."""
        if not self.table:
            return []
        with self._damage_in_one_line():
            rows = self.table.search().select(COLUMNS).limit(len(self)).to_list()
        return sorted((_node(row) for row in rows), key=lambda node: node.id_)

    def dense(self, question: str, role: str, day: date, k: int) -> list[NodeWithScore]:
        """The k readable current chunks whose vectors are nearest to the question's; the score is the cosine."""
        if not self.table:
            return []
        vector = self.embedder.embed([question])[0]
        query = self.table.search(vector, vector_column_name="vector").distance_type("cosine")
        return self._hits(query, role, day, k, "_distance", lambda distance: 1 - distance)

    def keyword(self, question: str, role: str, day: date, k: int) -> list[NodeWithScore]:
        """The k readable current chunks with the best BM25 score (Robertson and Zaragoza 2009), by LanceDB."""
        if not self.table:
            return []
        query = self.table.search(MatchQuery(question, "text"), query_type="fts")
        return self._hits(query, role, day, k, "_score", lambda score: score)

    def _hits(self, query, role: str, day: date, k: int, column: str, to_score: Callable) -> list[NodeWithScore]:
        """Run a filtered search; best first, equal scores in order of chunk id."""
        with self._damage_in_one_line():
            rows = query.where(self._filter(role, day), prefilter=True).select([*COLUMNS, column]).limit(k).to_list()
        hits = [NodeWithScore(node=_node(row), score=to_score(row[column])) for row in rows]
        return sorted(hits, key=lambda hit: (-hit.score, hit.node.id_))

    @staticmethod
    def _filter(role: str, day: date) -> str:
        """SQL that holds for what `role` may read and what is current on `day`. It is applied before the search."""
        name = role.replace("'", "''")
        return f"effective <= '{day}' AND until > '{day}' AND (array_has(roles, '{EVERYBODY}') OR array_has(roles, '{name}'))"

    def _vectors_by_hash(self) -> dict[str, np.ndarray]:
        if not self.table:
            return {}
        with self._damage_in_one_line():
            rows = self.table.search().select(["hash", "vector"]).limit(len(self)).to_arrow()
        vectors = rows["vector"].combine_chunks().flatten().to_numpy(zero_copy_only=False)
        return dict(zip(rows["hash"].to_pylist(), vectors.reshape(len(rows), -1), strict=True))

    def _write(self, nodes: list[TextNode], vectors: np.ndarray, corpus: Corpus):
        """A new version of the table with its search indexes; nobody reads it yet."""
        columns = {name: [node.metadata[name] for node in nodes] for name in COLUMNS if name not in ("id", "text")}
        columns |= {"id": [node.id_ for node in nodes], "text": [node.text for node in nodes]}
        size = vectors.shape[1]
        types = {name: pa.list_(pa.string()) if name == "roles" else pa.string() for name in COLUMNS}
        about = {"corpus": corpus.hash, "roles": json.dumps(sorted(corpus.roles))}
        schema = pa.schema([*types.items(), ("vector", pa.list_(pa.float32(), size))], metadata=about)
        vector_column = pa.FixedSizeListArray.from_arrays(pa.array(vectors.ravel(), pa.float32()), size)
        data = pa.table([*(pa.array(columns[name], types[name]) for name in COLUMNS), vector_column], schema=schema)
        self.folder.mkdir(parents=True, exist_ok=True)
        table = lancedb.connect(self.folder).create_table(TABLE, data, mode="overwrite")
        table.create_index("text", config=lancedb.index.FTS())
        table.create_index("roles", config=lancedb.index.LabelList())
        for column in ("effective", "until"):
            table.create_index(column, config=lancedb.index.BTree())
        if len(nodes) > APPROXIMATE_FROM:
            table.create_index("vector", config=lancedb.index.IvfFlat(distance_type="cosine", num_partitions=128))
        return table

    def _publish(self, table, corpus_hash: str) -> None:
        """Move the serving tag, the one step that readers can see, then note the version as published: in this order, so that
        what was noted was served, and an interruption between the two only means another refresh."""
        version = table.version
        if SERVING in table.tags.list():
            table.tags.update(SERVING, version)
        else:
            table.tags.create(SERVING, version)
        table.tags.create(f"published-{corpus_hash}-{version}", version)

    @contextmanager
    def _lock(self):
        """One writer at a time, over processes; the lock goes with a process that dies."""
        self.folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(f"{self.folder}.lock"):
            yield

    def delete(self) -> None:
        """Remove the index from disk."""
        shutil.rmtree(self.folder, ignore_errors=True)
        self.table = None


def _node(row: dict) -> TextNode:
    hidden = [name for name in COLUMNS if name not in ("id", "text")]
    metadata = {name: row[name] for name in hidden}
    return TextNode(
        id_=row["id"], text=row["text"], metadata=metadata,
        excluded_embed_metadata_keys=hidden, excluded_llm_metadata_keys=hidden,
    )  # fmt: skip
