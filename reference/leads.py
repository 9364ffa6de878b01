"""Lead qualification: a text goes in, one scored JSON object comes out, by a rubric that is a document of the corpus.

The rubric is read from the document itself, so a new version of the document is a new rubric. A case says which level each
criterion has; everything else of its label (points, band, reason, next step) follows by `Rubric.label`.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from datetime import date
from itertools import accumulate
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from reference.corpus import SHIPPED, Corpus, CorpusError, Document, read_jsonl, to_day

RUBRIC = "PBK-QUALIFICATION-RUBRIC"
CRITERIA = ("budget", "authority", "need", "timeline", "fit")
BLOCKING = ("budget", "authority", "need")  # zero points on one of them block band A
LOW_ORDER = ("need", "authority", "budget", "fit", "timeline")  # ties of R-LOW codes
UNKNOWN = "unknown"
ASK_STEP = "SDR asks the missing question within one working day"
LONGEST_EVIDENCE = 100  # characters
SHIPPED_LEADS = SHIPPED.parent / "leads"


Words = Annotated[str, Field(max_length=LONGEST_EVIDENCE)]
Scored = tuple[Words | None, int | None, int]


class Scores(BaseModel):
    """Of each criterion the words of the text that show it, its points (both None where the text does not say), and the total
    so far. A small model finds, then judges; and it cannot add five numbers in its head, but one to a subtotal that it wrote
    down (Nye et al. 2021, "Show your work")."""

    model_config = ConfigDict(extra="forbid", strict=True)
    budget: Scored
    authority: Scored
    need: Scored
    timeline: Scored
    fit: Scored

    @classmethod
    def added_up(cls, evidence: dict[str, str | None], points: dict[str, int | None]) -> Scores:
        """From the words and the points of each criterion."""
        subtotals = accumulate(points[c] or 0 for c in CRITERIA)
        return cls(**{c: (evidence.get(c), points[c], subtotal) for c, subtotal in zip(CRITERIA, subtotals, strict=True)})

    def evidence(self) -> list[str]:
        """The words that are quoted."""
        return [words for c in CRITERIA if (words := getattr(self, c)[0]) is not None]

    def points(self) -> list[int | None]:
        """In the order of CRITERIA."""
        return [getattr(self, c)[1] for c in CRITERIA]


class Label(BaseModel):
    """What the qualification of a lead must emit."""

    model_config = ConfigDict(extra="forbid", strict=True)
    scores: Scores
    total: int
    band: Literal["A", "B", "C", "D"]
    reason: str
    next_step: str
    missing: list[str]

    def to_text(self) -> str:
        """The one way to write a label: JSON on one line."""
        return json.dumps(self.model_dump(), ensure_ascii=False)


@dataclass(frozen=True)
class Case:
    """One lead. `levels` maps each criterion to a level of the rubric or to "unknown", `evidence` to the words that show it.

    Straight double quotes become single ones: a small model that quotes them inside JSON forgets to escape them.
    """

    id: str
    account: str
    channel: str
    product: str
    place: str
    written_on: date
    text: str
    levels: dict[str, str]
    evidence: dict[str, str | None]
    split: str  # train, dev, test; shifted: product, region and channel that train never shows

    def __post_init__(self):
        single = str.maketrans('"', "'")
        object.__setattr__(self, "text", self.text.translate(single))
        object.__setattr__(self, "evidence", {c: words and words.translate(single) for c, words in self.evidence.items()})


@dataclass(frozen=True)
class Rubric:
    """Points by criterion and level, band floors and next steps, as one version of the document states them."""

    points: dict[str, dict[str, int]]
    floors: dict[str, int]  # band -> least total
    steps: dict[str, str]

    @classmethod
    def of(cls, document: Document) -> Rubric:
        """Read the tables of a rubric document. Raises CorpusError when one is missing."""
        rows = [[cell.strip() for cell in line.strip("| ").split("|")] for line in document.text.split("\n")]
        points = {
            row[0].lower(): {level: int(value) for level, value in re.findall(r"(.+?): (\d+)(?:, |$)", row[1])}
            for row in rows
            if len(row) == 2 and row[0].lower() in CRITERIA
        }
        bands = {row[0][5:]: row for row in rows if len(row) == 3 and re.fullmatch("Band [A-D]", row[0])}
        if set(points) != set(CRITERIA) or set(bands) != set("ABCD"):
            raise CorpusError(
                f"{document.version}: not a rubric; it needs a row for each of {', '.join(CRITERIA)} and four bands"
            )
        floors = {band: int(row[1].split()[0]) for band, row in bands.items()}
        return cls(points, floors, {band: row[2] for band, row in bands.items()})

    @classmethod
    def on(cls, corpus: Corpus, day: date | str) -> Rubric:
        """The rubric in force on a day."""
        return cls.of(corpus.as_of(day).get(RUBRIC))

    def label(self, levels: dict[str, str], evidence: dict[str, str | None] | None = None) -> Label:
        """The label that follows from the levels, with the words that show them.

        Raises CorpusError for a level that the rubric does not have.
        """
        for criterion in CRITERIA:
            if levels.get(criterion) not in (*self.points[criterion], UNKNOWN):
                raise CorpusError(
                    f"unknown level {levels.get(criterion)!r} of {criterion}; there are {', '.join(self.points[criterion])}"
                )
        points = {c: self.points[c].get(levels[c]) for c in CRITERIA}
        total = sum(value or 0 for value in points.values())
        no_service = levels["fit"] == min(self.points["fit"], key=self.points["fit"].get)
        zeros = [c for c in BLOCKING if not points[c]]
        band = next(band for band, floor in sorted(self.floors.items()) if total >= floor)
        lowered = band == "A" and bool(zeros)
        band = "D" if no_service else "B" if lowered else band
        asks = [c for c in zeros if points[c] is None] if lowered and not no_service else []
        if no_service:
            reason = "R-NOFIT"
        elif band == "A":
            reason = "R-READY"
        elif asks:
            reason = f"R-ASK-{asks[0].upper()}"
        else:
            below = {c: max(self.points[c].values()) - (points[c] or 0) for c in CRITERIA}
            reason = f"R-LOW-{max(LOW_ORDER, key=lambda c: below[c]).upper()}"
        step = ASK_STEP if asks else self.steps[band]
        missing = [c for c in CRITERIA if points[c] is None]
        return Label(
            scores=Scores.added_up(evidence or {}, points),
            total=total,
            band=band,
            reason=reason,
            next_step=step,
            missing=missing,
        )


def load_cases(path: str | Path, noise: str | Path | None = None) -> list[Case]:
    """The cases of a file; `noise` names a file of wrong levels, {id, levels}, that replace those of some cases.

    Raises CorpusError for a malformed row.
    """
    wrong = {row["id"]: row["levels"] for row in read_jsonl(Path(noise))} if noise else {}
    cases = []
    for number, row in enumerate(read_jsonl(Path(path)), 1):
        try:
            changes = {"written_on": to_day(row.get("written_on")), "levels": wrong.get(row.get("id"), row.get("levels"))}
            cases.append(Case(**row | changes))
        except TypeError as error:
            raise CorpusError(f"{path}: case {number}: {error}; a case has {', '.join(Case.__dataclass_fields__)}") from None
    return cases


def parse(raw: str) -> Label | None:
    """The label as emitted, or None when it is not exactly one object of the schema. Nothing is repaired."""
    try:
        return Label.model_validate_json(raw)
    except ValidationError:
        return None


def score(raw: str, gold: Label, text: str) -> dict[str, tuple[float, float]]:
    """What one output adds to each metric, as (numerator, denominator); `text` is the lead's. Any words of the text will do as
    evidence."""
    found = parse(raw)
    points, right = found.scores.points() if found else [], gold.scores.points()
    rest = found is not None and found.model_copy(update={"scores": gold.scores}) == gold  # all but the scores
    hits = {
        "format_validity": found is not None,
        "band_accuracy": found is not None and found.band == gold.band,
        "reason_accuracy": found is not None and found.reason == gold.reason,
        "next_step_accuracy": found is not None and found.next_step == gold.next_step,
        "all_right": rest and points == right,
        "consistent": found is not None and found.total == sum(value or 0 for value in points),
    }
    same = sum(mine == its for mine, its in zip(points, right, strict=False))
    scores = {name: (float(hit), 1) for name, hit in hits.items()} | {"point_accuracy": (same, len(CRITERIA))}
    if found and (quoted := found.scores.evidence()):
        scores["evidence_stands"] = (sum(words in text for words in quoted), len(quoted))
    return scores


def validate_cases(cases: Iterable[Case], corpus: Corpus) -> list[str]:
    """Problems of a set of cases, one line each: a level that the rubric lacks, an account in two splits, a doubled text."""
    problems, split_of, seen = [], {}, {}
    for case in cases:
        try:
            Rubric.on(corpus, case.written_on).label(case.levels)
        except CorpusError as error:
            problems.append(f"case {case.id}: {error}")
        if split_of.setdefault(case.account, case.split) != case.split:
            problems.append(f"case {case.id}: account {case.account} is in splits {split_of[case.account]} and {case.split}")
        for criterion, words in case.evidence.items():
            if (words is None) != (case.levels.get(criterion) == UNKNOWN) or (words and words not in case.text):
                problems.append(f"case {case.id}: {words!r} is no evidence for {criterion} {case.levels.get(criterion)!r}")
        if (other := seen.setdefault(" ".join(case.text.split()), case.id)) != case.id:
            problems.append(f"case {case.id}: the same text as {other}")
    return problems


# --- as a lesson ------------------------------------------------------------------------------------------------------

INSTRUCTION = (
    "You qualify sales leads. Reply in JSON: for budget, authority, need, timeline and fit the words that show it, the points"
    " (both null if the text does not say) and the total so far; then the total, band, reason code, next step, and what is"
    " missing."
)


def messages(case: Case) -> list[dict]:
    """The chat that asks for a label: instruction, lead."""
    return [{"role": "system", "content": INSTRUCTION}, {"role": "user", "content": render(case)}]


def render(case: Case) -> str:
    """A lead as the model reads it."""
    return f"{case.channel.capitalize()}, {case.written_on}:\n{case.text}"
