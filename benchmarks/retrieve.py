"""Find the chunks for a question: our `Retriever` against LlamaIndex's in-memory index and BM25, fused; and how our time
grows with the number of chunks.

The peer needs one package that nothing else here does: `pip install llama-index-retrievers-bm25`.
"""

from __future__ import annotations

import random
import re
import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import date
from pathlib import Path

import numpy as np
from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore

from benchmarks.measure import TURNS, Findings, Line, against, take_turns, total, within
from benchmarks.work import Work, open_work
from reference.chunks import chunk_corpus
from reference.corpus import EVERYBODY, Corpus, Document, Question
from reference.embedding import Embedder
from reference.index import Index
from reference.retrieval import Retriever, Settings, permitted

HERE = Path(__file__).parent
QUESTIONS = 10
SIZES = (1_000, 10_000, 100_000)  # chunks
LIMITS = {100_000: 0.080}  # seconds a question
SHIPPED_LIMIT = 0.025
NOISE = 0.5  # length of the random vector that is added to a chunk's own, of length one
SETTINGS = Settings()
STAGES = {"whole": "the whole", "keyword": "keyword search", "dense": "dense search with the embedding", "embed": "embedding"}


def run(say: Callable[[str], None]) -> Findings:
    work = open_work()
    questions = work.questions("train", QUESTIONS, kinds=("single",))
    say(f"{len(work.index)} chunks of {work.name}: building the peer's indexes")
    peers = peer_retrievers(work.index, questions)
    say(f"timing {len(questions)} questions against the peer")
    ours, theirs, both = [], [], 0
    for question, peer in zip(questions, peers, strict=True):
        mine = Retriever(work.index, question.role, question.as_of)
        arms = {"ours": mine, "peer": peer}
        seconds = take_turns({name: lambda r=r, q=question: r.retrieve(q.question) for name, r in arms.items()})
        ours.append(seconds["ours"])
        theirs.append(seconds["peer"])
        found = [{hit.node.id_ for hit in retriever.retrieve(question.question)} for retriever in arms.values()]
        both += len(found[0] & found[1])
    same = both / SETTINGS.k / len(questions)
    shipped = len(work.index)
    each = [seconds for turns in ours for seconds in turns]
    peer_each = [seconds for turns in theirs for seconds in turns]
    curve = {size: measure_size(work, size, questions, say) for size in SIZES}
    draw(curve, shipped, statistics.median(each), statistics.median(peer_each))
    lines = [
        against(f"retrieve for {len(questions)} questions, {shipped:,} chunks", total(ours), total(theirs), 1),
        within(f"one question, {shipped:,} chunks", each, SHIPPED_LIMIT),
        *(within(f"one question, {size:,} chunks", found["whole"], LIMITS.get(size)) for size, found in curve.items()),
        *curve[max(SIZES)]["recall"],
    ]
    notes = [
        f"Shipped size: {work.name}, {shipped:,} chunks; both embed the question with the same encoder.",
        "The peer filters vectors by day and role with MetadataFilters. Its BM25 leaks when filtered so, hence it is built"
        " beforehand over the permitted chunks of each question's role and day, and that is not timed.",
        f"Both return {SETTINGS.k} chunks out of {SETTINGS.pool} of each search; {same:.0%} are the same.",
        f"The larger sizes are made: {work.name} repeated, digits changed, a random vector of length {NOISE} added to each"
        " embedding. Recall is the share of the exact search's chunks that the default search finds too.",
        *(stage_note(size, found) for size, found in curve.items()),
        "![milliseconds a question against chunks](retrieve.png)",
    ]
    return Findings(lines, notes)


# --- the peer ---------------------------------------------------------------------------------------------------------


def peer_retrievers(index: Index, questions: Sequence[Question]) -> list[BaseRetriever]:
    """LlamaIndex's fusion retriever for each question, over one in-memory vector index of the same chunks and vectors."""
    from llama_index.core import VectorStoreIndex
    from llama_index.core.llms import MockLLM
    from llama_index.core.retrievers import QueryFusionRetriever
    from llama_index.core.vector_stores import FilterCondition, FilterOperator, MetadataFilter, MetadataFilters
    from llama_index.retrievers.bm25 import BM25Retriever

    nodes, vectors = index.nodes(), stored_vectors(index)
    for node in nodes:
        node.embedding = vectors[node.id_].tolist()
    in_memory = VectorStoreIndex(nodes, embed_model=index.embedder.as_llama_index())
    retrievers = []
    for question in questions:
        day, readers = str(question.as_of), [EVERYBODY, question.role]
        filters = MetadataFilters(
            filters=[
                MetadataFilter(key="effective", value=day, operator=FilterOperator.LTE),
                MetadataFilter(key="until", value=day, operator=FilterOperator.GT),
                MetadataFilter(key="roles", value=readers, operator=FilterOperator.ANY),
            ],
            condition=FilterCondition.AND,
        )
        allowed = [node for node in nodes if permitted(NodeWithScore(node=node), question.role, question.as_of)]
        dense = in_memory.as_retriever(similarity_top_k=SETTINGS.pool, filters=filters)
        keyword = BM25Retriever.from_defaults(nodes=allowed, similarity_top_k=SETTINGS.pool)
        fused = QueryFusionRetriever(
            [dense, keyword],
            llm=MockLLM(),  # never called, but without it a remote vendor is looked for
            mode="reciprocal_rerank",
            similarity_top_k=SETTINGS.k,
            num_queries=1,
            use_async=False,
        )
        retrievers.append(fused)
    return retrievers


def stored_vectors(index: Index) -> dict[str, np.ndarray]:
    """Chunk id -> vector, as the index holds them."""
    rows = index.table.search().select(["id", "vector"]).limit(len(index)).to_list()
    return {row["id"]: np.array(row["vector"], np.float32) for row in rows}


# --- our own time as the corpus grows ---------------------------------------------------------------------------------


class PerturbedEmbedder:
    """Questions get their real vector; a copied chunk gets its original's, moved at random."""

    id = "perturbed"

    def __init__(self, embedder: Embedder, vectors: dict[str, np.ndarray]):
        """`vectors`: a chunk's text without its digits -> its vector."""
        self.embedder = embedder
        self.vectors = vectors
        self.random = np.random.default_rng(0)

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        known = [self.vectors.get(without_digits(text)) for text in texts]
        if any(vector is None for vector in known):
            return self.embedder.embed(texts)
        noise = self.random.normal(size=(len(texts), len(known[0])))
        moved = np.stack(known) + NOISE * noise / np.linalg.norm(noise, axis=1, keepdims=True)
        return (moved / np.linalg.norm(moved, axis=1, keepdims=True)).astype(np.float32)


def without_digits(text: str) -> str:
    return re.sub(r"\d", "0", text)


def copies(corpus: Corpus, number: int) -> list[Document]:
    """The corpus again under other ids, with other digits; number 0 keeps its digits."""
    shuffled = "".join(random.Random(number).sample("0123456789", 10)) if number else "0123456789"
    other_digits = str.maketrans("0123456789", shuffled)
    mark = f"{number:05d}"  # in the title, so that no two chunks have the same text
    return [replace(d, id=f"{d.id}-{mark}", title=f"{d.title} {mark}", text=d.text.translate(other_digits)) for d in corpus]


def grow(work: Work, size: int, folder: Path) -> Index:
    """An index of about `size` chunks, written as any other."""
    stored = stored_vectors(work.index)
    chunks, marked = chunk_corpus(work.corpus), chunk_corpus(Corpus(tuple(copies(work.corpus, 0))))
    vectors = {without_digits(copy.text): stored[chunk.id_] for chunk, copy in zip(chunks, marked, strict=True)}
    documents = [document for number in range(-(-size // len(chunks))) for document in copies(work.corpus, number)]
    wanted = round(size * len(work.corpus) / len(chunks))
    index = Index(folder, PerturbedEmbedder(work.index.embedder, vectors))
    index.refresh(Corpus(tuple(documents[:wanted])))
    return index


def measure_size(work: Work, size: int, questions: Sequence[Question], say: Callable[[str], None]) -> dict[str, list]:
    """Seconds of a question at one size: the whole, and its stages; and recall where the search is approximate."""
    say(f"writing about {size:,} synthetic chunks")
    with tempfile.TemporaryDirectory() as folder:
        index = grow(work, size, Path(folder) / "index")
        say(f"timing {len(questions)} questions on {len(index):,} chunks")
        seconds: dict[str, list] = {"chunks": [len(index)]}
        for q in questions:
            stages = {
                "whole": lambda q=q: Retriever(index, q.role, q.as_of).retrieve(q.question),
                "embed": lambda q=q: index.embedder.embed([q.question]),
                "dense": lambda q=q: index.dense(q.question, q.role, q.as_of, SETTINGS.pool),
                "keyword": lambda q=q: index.keyword(q.question, q.role, q.as_of, SETTINGS.pool),
            }
            for stage, turns in take_turns(stages, TURNS).items():
                seconds.setdefault(stage, []).extend(turns)
        say("comparing with exact search")
        seconds["recall"] = [recall(index, work, k) for k in (SETTINGS.k, SETTINGS.pool)]
        return seconds


def nearest(index: Index, question: str, role: str, day: date, k: int) -> list[str]:
    """Ids of the chunks nearest to a question, as `Index.dense` finds them, but by comparing every vector."""
    vector = index.embedder.embed([question])[0]
    query = index.table.search(vector, vector_column_name="vector").distance_type("cosine").bypass_vector_index()
    rows = query.where(Index._filter(role, day), prefilter=True).select(["id", "_distance"]).limit(k).to_list()
    return [row["id"] for row in rows]


def recall(index: Index, work: Work, k: int) -> Line:
    """Recall of the default search against exact search."""
    shares = []
    for q in work.questions("dev", 50):
        exact = set(nearest(index, q.question, q.role, q.as_of, k))
        found = {hit.node.id_ for hit in index.dense(q.question, q.role, q.as_of, k)}
        shares.append(len(exact & found) / len(exact))
    work_name = f"recall@{k} of the approximate index, {len(index):,} chunks (peer: exact search)"
    return Line(work_name, statistics.mean(shares), "share", 1)


def stage_note(size: int, found: dict[str, list]) -> str:
    stages = ", ".join(f"{title} {1000 * statistics.median(found[name]):.0f}" for name, title in STAGES.items())
    slow = 1000 * np.percentile(found["whole"], 95)
    return f"Milliseconds at {found['chunks'][0]:,} chunks: {stages}; 19 of 20 questions within {slow:.0f}."


def draw(curve: dict[int, dict[str, list]], shipped: int, ours: float, peer: float) -> None:
    """retrieve.png: milliseconds a question against chunks."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(7.5, 4.8), layout="constrained")
    chunks = [found["chunks"][0] for found in curve.values()]
    for (stage, title), style in zip(STAGES.items(), ("o-", "s--", "^--", "v:"), strict=True):
        axes.plot(chunks, [1000 * statistics.median(found[stage]) for found in curve.values()], style, label=f"ours: {title}")
    axes.plot([shipped], [1000 * ours], "k*", markersize=13, label="ours, shipped corpus")
    axes.plot([shipped], [1000 * peer], "rX", markersize=11, label="LlamaIndex in memory, shipped corpus")
    for size, limit in {shipped: SHIPPED_LIMIT, **LIMITS}.items():
        axes.hlines(1000 * limit, size / 1.5, size * 1.5, color="grey", linewidth=3)
        axes.annotate(f"target {1000 * limit:g} ms", (size / 1.6, 1000 * limit), va="center", ha="right", color="dimgrey")
    slowest = max(
        1000 * peer, *(1000 * statistics.median(found["whole"]) for found in curve.values()), 1000 * LIMITS[max(SIZES)]
    )
    axes.set(xscale="log", yscale="log", xlabel="chunks in the index", ylabel="milliseconds a question (median)")
    axes.set(xlim=(150, 250_000), ylim=(1, 10 * slowest), title="Retrieval time as the corpus grows")
    axes.set_xticks(SIZES, [f"{size:,}" for size in SIZES])
    axes.yaxis.set_major_formatter("{x:g}")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=9, loc="upper left")
    figure.savefig(HERE / "retrieve.png", dpi=120)
    plt.close(figure)
