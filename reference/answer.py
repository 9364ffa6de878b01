"""The answer contract: the prompt that asks for it, its schema, and the check of every word of it against its sources.

    {"answer": "$49 per seat per month", "evidence": [{"quote": "Tempo Team lists at $49 per seat per month.", "source": 2}]}
    {"answer": null, "evidence": []}

Answer first, then its evidence; null when the sources do not say. Sources are numbered from 1 in the order shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import date
from typing import Literal

from llama_index.core.schema import NodeWithScore
from pydantic import BaseModel, ConfigDict, ValidationError

from reference.retrieval import permitted
from reference.text import holds, parts, stands_verbatim

INSTRUCTION = (
    "You answer questions from sources. Reply in JSON: the short answer, then the sentence it stands in and the number of its"
    ' source. Reply {"answer": null, "evidence": []} if the sources do not say.'
)
LONGEST_ANSWER = 80  # characters, where decoding is constrained

Status = Literal["answered", "declined", "rejected"]


class Evidence(BaseModel):
    """A sentence of a source, and the number of that source."""

    model_config = ConfigDict(extra="forbid", strict=True)
    quote: str
    source: int


class Answer(BaseModel):
    """What the model must emit. `answer` is None to decline; several values are joined by "; "."""

    model_config = ConfigDict(extra="forbid", strict=True)
    answer: str | None
    evidence: list[Evidence]


@dataclass(frozen=True)
class Citation:
    """One piece of evidence after the check. `document` and `version` are None when no source of that number was shown."""

    quote: str
    source: int
    document: str | None
    version: str | None
    shown: bool
    verbatim: bool  # the quote stands word for word in the chunk
    holds_value: bool  # the quote holds the answer, or a part of it
    readable: bool  # the role may read the chunk on that day

    @property
    def stands(self) -> bool:
        return self.shown and self.verbatim and self.holds_value and self.readable


@dataclass(frozen=True)
class Checked:
    """The verdict on one raw output. `answer` is set only when it was accepted; `claimed` is what the model said."""

    status: Status
    answer: str | None
    claimed: str | None
    citations: tuple[Citation, ...]
    well_formed: bool
    reasons: tuple[str, ...]  # why it was rejected, a line each


def render(question: str, texts: Sequence[str]) -> str:
    """What the user's turn says: the numbered sources, if any, then the question."""
    shown = [f"[{number}] {text}" for number, text in enumerate(texts, 1)]
    return "\n\n".join([*(["Sources:", *shown] if shown else []), f"Question: {question.strip()}"])


# Worked examples for the prompted control: of an invented furniture shop, and one of each kind of reply.
CHAIR = "Oak chair\n\n| Item | Value |\n|---|---|\n| Oak chair weight | 7 kg |"
DESK = "Oak desk price sheet › Price\n\nThe Oak desk lists at $210 per piece. The smallest order is 4 pieces."
RULES = "Delivery rules › Who signs\n\nDeliveries after 6 pm are approved by Ines Duarte, except on Fridays."
EXAMPLES = tuple(
    turn
    for sources, question, reply in (
        ([CHAIR], "What colour is the Oak chair?", '{"answer": null, "evidence": []}'),
        (
            [DESK],
            "What is the list price of the Oak desk?",
            '{"answer": "$210 per piece", "evidence": [{"quote": "The Oak desk lists at $210 per piece.", "source": 1}]}',
        ),
        (
            [RULES, CHAIR],
            "who has to approve it when we deliver in the evening?",
            '{"answer": "Ines Duarte", "evidence": '
            '[{"quote": "Deliveries after 6 pm are approved by Ines Duarte, except on Fridays.", "source": 1}]}',
        ),
        (
            [RULES, CHAIR],
            "How heavy is the Oak chair?",
            '{"answer": "7 kg", "evidence": [{"quote": "| Oak chair weight | 7 kg |", "source": 2}]}',
        ),
    )
    for turn in (
        {"role": "user", "content": render(question, sources)},
        {"role": "assistant", "content": reply},
    )
)


def messages(question: str, sources: Sequence[NodeWithScore], examples: Sequence[dict] = ()) -> list[dict]:
    """The chat that asks for the contract: instruction, worked examples (chat turns), then the question."""
    turns = [{"role": "system", "content": INSTRUCTION}, *examples]
    return [*turns, {"role": "user", "content": render(question, [hit.node.text for hit in sources])}]


def schema(sources: Sequence[NodeWithScore], quotable: Callable[[str], bool] = bool) -> dict:
    """The JSON schema of the contract, narrowed to these sources: a quote must be one of the lines or sentences of the source
    that it names, and `quotable`. Constrained decoding holds a model to it."""
    whole = Answer.model_json_schema()
    whole["properties"]["answer"] = {"anyOf": [{"type": "string", "maxLength": LONGEST_ANSWER}, {"type": "null"}]}
    choices = [
        {
            "type": "object",
            "properties": {"quote": {"enum": quotes}, "source": {"const": number}},
            "required": ["quote", "source"],
            "additionalProperties": False,
        }
        for number, hit in enumerate(sources, 1)
        if (quotes := [sentence for sentence in sentences(hit.node.text) if quotable(sentence)])
    ]
    if choices:
        whole["properties"]["evidence"] = {"type": "array", "items": {"anyOf": choices}, "maxItems": 2}
    return whole


def sentences(text: str) -> list[str]:
    """The sentences and table rows of a chunk, each as it stands there."""
    lines = [line.strip() for line in text.split("\n")]
    found = [piece for line in lines for piece in ([line] if line.startswith("|") else re.split(r"(?<=[.!?]) ", line))]
    return list(dict.fromkeys(piece for piece in found if re.search(r"\w", piece)))


def parse(raw: str) -> Answer | None:
    """The answer as emitted, or None when it is not exactly one object of the schema. Nothing is repaired."""
    try:
        return Answer.model_validate_json(raw)
    except ValidationError:
        return None


def check(raw: str, sources: Sequence[NodeWithScore], role: str, day: date) -> Checked:
    """Hold a raw output against the contract and against the chunks that were shown. Never raises on what a model wrote."""
    answer = parse(raw)
    if answer is None:
        return Checked("rejected", None, raw.strip() or None, (), False, ("not one JSON object of the schema",))
    if answer.answer is None:
        if answer.evidence:
            return Checked("rejected", None, None, (), True, ("declines, yet gives evidence",))
        return Checked("declined", None, None, (), True, ())
    values = parts(answer.answer)
    citations = tuple(check_citation(e, values, sources, role, day) for e in answer.evidence)
    reasons = [reason for citation in citations for reason in faults(citation)]
    if not citations:
        reasons.append("no evidence")
    for value in values or [""]:
        if not any(c.stands and holds(c.quote, value) for c in citations):
            reasons.append(f"no standing quote holds {value!r}")
    status: Status = "rejected" if reasons else "answered"
    accepted = None if reasons else answer.answer
    return Checked(status, accepted, answer.answer, citations, True, tuple(dict.fromkeys(reasons)))


def check_citation(
    evidence: Evidence, values: Sequence[str], sources: Sequence[NodeWithScore], role: str, day: date
) -> Citation:
    """One quote against the chunk that it names."""
    holds_value = any(holds(evidence.quote, value) for value in values)
    if not 1 <= evidence.source <= len(sources):
        return Citation(evidence.quote, evidence.source, None, None, False, False, holds_value, False)
    hit = sources[evidence.source - 1]
    return Citation(
        quote=evidence.quote,
        source=evidence.source,
        document=hit.node.metadata["document"],
        version=hit.node.metadata["version"],
        shown=True,
        verbatim=stands_verbatim(evidence.quote, hit.node.text),
        holds_value=holds_value,
        readable=permitted(hit, role, day),
    )


def faults(citation: Citation) -> list[str]:
    """What is wrong with a citation, in words."""
    if not citation.shown:
        return [f"source {citation.source} was not shown"]
    where = f"source {citation.source} ({citation.document})"
    found = []
    if not citation.verbatim:
        found.append(f"the quote does not stand in {where}")
    if not citation.holds_value:
        found.append(f"the quote from {where} does not hold the answer")
    if not citation.readable:
        found.append(f"the role may not read {where}")
    return found
