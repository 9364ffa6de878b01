"""Retrieval: find the chunks that answer a question, among those that the asker may read on that day.

Dense search finds what means the same, keyword search finds what is spelt the same (ids, plan names, prices); their two
rankings are fused. Role and day filter *before* the search, and are checked again after it.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from datetime import date

from llama_index.core.retrievers import BaseRetriever
from llama_index.core.schema import NodeWithScore, QueryBundle

from reference.corpus import EVERYBODY
from reference.index import Index

MODES = ("dense", "keyword", "fused")
RRF = 60  # the constant of reciprocal rank fusion


@dataclass(frozen=True)
class Settings:
    """How to search: the mode, `pool` candidates from each search, `k` chunks found, of which the model `reads` the first few.

    A model of this size reads two sources better than four (measured on the dev split), so it is not shown all that is found.
    """

    k: int = 4
    reads: int = 2
    pool: int = 20
    mode: str = "fused"

    def __post_init__(self):
        if self.mode not in MODES:
            raise ValueError(f"unknown retrieval mode {self.mode!r}; choose one of {', '.join(MODES)}")
        if not 1 <= self.reads <= self.k <= self.pool:
            raise ValueError(f"reads {self.reads}, k {self.k}, pool {self.pool}: must be 1 or more and in this order of size")


class Retriever(BaseRetriever):
    """A LlamaIndex retriever that was made for one role and one day, and can see nothing else."""

    def __init__(self, index: Index, role: str, day: date, settings: Settings = Settings()):
        super().__init__()
        self.index, self.role, self.day, self.settings = index, role, day, settings

    def _retrieve(self, query_bundle: QueryBundle) -> list[NodeWithScore]:
        """At most k chunks, best first. Raises PermissionError if one slipped through that role or day forbid."""
        question, s = query_bundle.query_str, self.settings
        rankings = []
        if s.mode in ("dense", "fused"):
            rankings.append(self.index.dense(question, self.role, self.day, s.pool))
        if s.mode in ("keyword", "fused"):
            rankings.append(self.index.keyword(question, self.role, self.day, s.pool))
        found = (fuse(rankings) if s.mode == "fused" else rankings[0])[: s.k]
        for hit in found:
            if not permitted(hit, self.role, self.day):
                raise PermissionError(f"{hit.node.id_} is not for role {self.role!r} on {self.day}: the index's filter failed")
        return found


def fuse(rankings: list[list[NodeWithScore]]) -> list[NodeWithScore]:
    """Reciprocal rank fusion (Cormack, Clarke and Büttcher 2009): a chunk's score is the sum of 1 / (60 + its rank)."""
    scores: dict[str, float] = defaultdict(float)
    nodes = {}
    for ranking in rankings:
        for rank, hit in enumerate(ranking, 1):
            scores[hit.node.id_] += 1 / (RRF + rank)
            nodes[hit.node.id_] = hit.node
    best_first = sorted(scores, key=lambda id: (-scores[id], id))
    return [NodeWithScore(node=nodes[id], score=scores[id]) for id in best_first]


def permitted(hit: NodeWithScore, role: str, day: date) -> bool:
    """May `role` read this chunk, and is it current on `day`?"""
    m = hit.node.metadata
    return m["effective"] <= str(day) < m["until"] and bool({role, EVERYBODY} & set(m["roles"]))
