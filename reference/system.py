"""The grid: a question in, a checked answer and its record out.

One class with optional parts makes every system of the workbook. A system without a retriever plays from memory; with one
it reads; worked examples and constrained decoding make the prompted control.
"""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, date, datetime
from pathlib import Path

from llama_index.core.schema import NodeWithScore

from reference import answer as contract
from reference.adapters import Registry
from reference.corpus import EVERYBODY, Corpus, CorpusError, Question, to_day
from reference.embedding import load_embedder
from reference.index import Index
from reference.model import Generation, LanguageModel, Prompt, json_constraint
from reference.retrieval import Retriever, Settings
from reference.weights import cache_folder

MAX_NEW_TOKENS = 128
LONGEST_QUESTION = 2_000  # characters
BATCH = 4
DEFAULT_SYSTEM = "prompted_constrained"  # the best on the dev split so far


@dataclass(frozen=True)
class Ask:
    """A question as somebody asks it: their role, and the day that counts as today."""

    question: str
    role: str = EVERYBODY
    as_of: date = field(default_factory=date.today)

    @classmethod
    def of(cls, asked: Ask | Question | str) -> Ask:
        return cls(asked) if isinstance(asked, str) else cls(asked.question, asked.role, asked.as_of)


@dataclass(frozen=True)
class Reply:
    """A checked answer, what was shown to get it, and what it cost."""

    system: str
    ask: Ask
    checked: contract.Checked
    found: tuple[NodeWithScore, ...]  # what retrieval found, best first
    shown: tuple[NodeWithScore, ...]  # the first few of it, which the model read
    raw: str
    tokens: dict[str, int]  # in, out
    seconds: dict[str, float]  # retrieve, first_token, generate, total; in a batch, of the whole batch
    record: dict

    @property
    def status(self) -> str:
        return self.checked.status

    @property
    def answer(self) -> str | None:
        return self.checked.answer

    def to_json(self) -> dict:
        """The object that `ask --json` prints."""
        return {
            "system": self.system,
            "question": self.ask.question,
            "role": self.ask.role,
            "as_of": str(self.ask.as_of),
            "answer": self.answer,
            "evidence": [
                {"document": c.document, "version": c.version, "quote": c.quote, "stands": c.stands}
                for c in self.checked.citations
            ],
            "status": self.status,
            "reasons": list(self.checked.reasons),
            "claimed": self.checked.claimed,
            "found": [hit.node.id_ for hit in self.found],
            "shown": [hit.node.id_ for hit in self.shown],
            "raw": self.raw,
            "seconds": self.seconds,
            "tokens": self.tokens,
        }


@dataclass(frozen=True)
class System:
    """One system of the grid. `index` is its sheet music, `adapter` its lessons (a folder), `examples` are worked examples."""

    name: str
    model: LanguageModel
    index: Index | None = None
    settings: Settings = Settings()
    examples: tuple[dict, ...] = ()
    constrained: bool = False
    adapter: Path | None = None
    records: Path | None = None  # a JSON Lines file to which every answer's record is appended

    def ask(self, question: str, role: str = EVERYBODY, as_of: date | str | None = None) -> Reply:
        """Answer one question as of a day (today, unless named). Raises CorpusError: empty or oversized question, unknown
        role, bad day."""
        return compare([self], question, role, as_of)[0]

    def ask_many(self, asked: Sequence[Ask | Question | str], progress: Callable[[int], None] = lambda _: None) -> list[Reply]:
        """Answer questions in small batches; `progress(how many)` is called after each. Raises as `ask` does."""
        replies = []
        for start in range(0, len(asked), BATCH):
            batch = [(self, Ask.of(one)) for one in asked[start : start + BATCH]]
            replies += answer_batch(batch)
            progress(len(batch))
        return replies

    def retrieve(self, ask: Ask) -> list[NodeWithScore]:
        """The chunks found for a question; none without an index."""
        if self.index is None:
            return []
        return Retriever(self.index, ask.role, ask.as_of, self.settings).retrieve(ask.question)

    def prompt(self, ask: Ask, shown: Sequence[NodeWithScore]) -> Prompt:
        prompt = self.model.chat(contract.messages(ask.question, shown, self.examples))
        if self.adapter:
            prompt = replace(prompt, adapter=self.model.load_adapter(self.adapter))
        if not self.constrained:
            return prompt
        # A sentence with one of the model's control tokens in it can be read, but never be forced upon the model as a quote.
        schema = contract.schema(shown, quotable=lambda sentence: self.model.harmless(sentence) == sentence)
        return replace(prompt, constraint=json_constraint(self.model, schema))


def build_grid(
    model: LanguageModel,
    index: Index | None,
    settings: Settings = Settings(),
    records: Path | None = None,
    registry: Registry = Registry(),
) -> dict[str, System]:
    """Every system there is, by name: {"base": System, …}. Those with lessons are there when an adapter for this model is."""
    parts = {
        "base": {},
        "rag": {"index": index},
        "prompted": {"index": index, "examples": contract.EXAMPLES},
        "prompted_constrained": {"index": index, "examples": contract.EXAMPLES, "constrained": True},
    }
    if lessons := registry.for_base("closed_book", model.id):
        parts |= {"tuned": {"adapter": lessons}, "rag_tuned": {"index": index, "adapter": lessons}}
    return {name: System(name, model, settings=settings, records=records, **chosen) for name, chosen in parts.items()}


def open_grid(corpus_folder: Path, corpus: Corpus | None = None) -> dict[str, System]:
    """The grid over a corpus folder: default models, an index that is up to date, records in the cache folder."""
    index = Index.of(corpus_folder, corpus or Corpus.load(corpus_folder), load_embedder())
    return build_grid(LanguageModel.load(), index, records=cache_folder() / "records.jsonl")


def compare(systems: Sequence[System], question: str, role: str = EVERYBODY, as_of: date | str | None = None) -> list[Reply]:
    """One question to several systems, answered as one batch. Raises as `System.ask` does."""
    ask = Ask(question, role, to_day(as_of or date.today()))
    return answer_batch([(system, ask) for system in systems])


def answer_batch(batch: Sequence[tuple[System, Ask]]) -> list[Reply]:
    """Retrieve for each, generate for all at once, check each, write the records."""
    start = time.perf_counter()
    searches: dict[tuple, list[NodeWithScore]] = {}  # systems with the same index and settings share one search
    found = []
    for system, ask in batch:
        check_ask(system, ask)
        key = (id(system.index), system.settings, ask)
        if key not in searches:
            searches[key] = system.retrieve(ask)
        found.append(searches[key])
    retrieved = time.perf_counter() - start
    model = batch[0][0].model
    prompts = [system.prompt(ask, hits[: system.settings.reads]) for (system, ask), hits in zip(batch, found, strict=True)]
    generations = model.generate(prompts, MAX_NEW_TOKENS)
    return [
        finish(system, ask, hits, prompt, generation, retrieved)
        for (system, ask), hits, prompt, generation in zip(batch, found, prompts, generations, strict=True)
    ]


def check_ask(system: System, ask: Ask) -> None:
    """Raises CorpusError for a question that cannot be answered as asked."""
    if not ask.question.strip():
        raise CorpusError("the question is empty; type one")
    if len(ask.question) > LONGEST_QUESTION:
        raise CorpusError(f"the question has {len(ask.question):,} characters; ask in at most {LONGEST_QUESTION:,}")
    if system.index is not None:
        system.index.check_role(ask.role)


def finish(
    system: System, ask: Ask, found: list[NodeWithScore], prompt: Prompt, generation: Generation, retrieved: float
) -> Reply:
    """Check one output, and record it."""
    start = time.perf_counter()
    shown = found[: system.settings.reads]
    checked = contract.check(generation.text, shown, ask.role, ask.as_of)
    seconds = {
        "retrieve": retrieved,
        "first_token": retrieved + generation.first_token_seconds,
        "generate": generation.seconds,
        "check": time.perf_counter() - start,
        "total": retrieved + generation.seconds + time.perf_counter() - start,
    }
    tokens = {"in": generation.tokens_in, "out": len(generation.tokens)}
    record = {
        "time": datetime.now(UTC).isoformat(timespec="milliseconds"),
        "system": system.name,
        "question": ask.question,
        "role": ask.role,
        "as_of": str(ask.as_of),
        "corpus": system.index.corpus_hash if system.index else None,
        "index_version": system.index.version if system.index else None,
        "retrieval": asdict(system.settings) if system.index else None,
        "chunks": [{"id": h.node.id_, "score": h.score, "shown": h in shown} for h in found],
        "model": system.model.id,
        "adapter": prompt.adapter,
        "tokens": tokens,
        "seconds": seconds,
        "raw": generation.text,
        "checked": asdict(checked),
    }
    if system.records:
        append_record(system.records, record)
    return Reply(system.name, ask, checked, tuple(found), tuple(shown), generation.text, tokens, seconds, record)


def adapter_id(system: System) -> str | None:
    return system.model.load_adapter(system.adapter) if system.adapter else None


def append_record(path: Path, record: dict) -> None:
    """Add one line to a JSON Lines file, in one write, so that lines of several processes never mix."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab", buffering=0) as file:
        file.write((json.dumps(record, ensure_ascii=False) + "\n").encode())


def replay(record: dict, grid: dict[str, System]) -> Reply:
    """Answer a recorded question again, with the recorded index version and settings.

    Raises CorpusError when the model, the corpus or the system that gave the recorded answer is not at hand.
    """
    system = grid.get(record["system"])
    if system is None:
        raise CorpusError(f"the record is of system {record['system']!r}; here are {', '.join(grid)}")
    if record["model"] != system.model.id:
        raise CorpusError(f"the record is of model {record['model']}; this is {system.model.id}")
    if record["adapter"] != adapter_id(system):
        raise CorpusError(f"the record is of adapter {record['adapter']}; {system.name} here has {adapter_id(system)}")
    if record["retrieval"]:
        if system.index is None:
            raise CorpusError("the record is of a system that read documents; replay it with an index")
        system = replace(
            system, index=system.index.at_version(record["index_version"]), settings=Settings(**record["retrieval"])
        )
        if system.index.corpus_hash != record["corpus"]:
            raise CorpusError(
                f"the record is of corpus {record['corpus']}; version {record['index_version']} here is of another"
            )
    return replace(system, records=None).ask(record["question"], record["role"], record["as_of"])
