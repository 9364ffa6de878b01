"""A corpus: dated, role-tagged documents; what is current on a day; what a role may read.

A folder of `<id>@<effective>.md` files is a corpus. A later file with the same id supersedes the earlier one from its
`effective` day on. The day on which a document changes is a *release*; publishing one is adding files.
"""

from __future__ import annotations

import hashlib
import json
from collections import defaultdict
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, replace
from datetime import date
from functools import cached_property
from pathlib import Path

import yaml

from reference.text import holds, parts, stands_verbatim

KINDS = ["price_sheet", "product_note", "policy", "playbook", "battlecard", "case_study", "account_note", "call_summary", "faq"]
QUESTION_KINDS = ["single", "multi", "comparison", "unanswerable", "out_of_domain", "restricted", "adversarial"]
SHIPPED = Path(__file__).parent.parent / "datasets" / "corpus"
SPLITS = {"train": 0.5, "dev": 0.15, "test": 0.35}  # and the share of the questions that each gets
EVERYBODY = "all"  # in a document: everybody may read it; as a role: somebody of whom nothing is known


class CorpusError(ValueError):
    """Bad input: the message is one line that says what is wrong and how to mend it."""


@dataclass(frozen=True)
class Document:
    """One version of one document. `effective` is the first day on which it is true."""

    id: str
    title: str
    kind: str
    effective: date
    roles: tuple[str, ...]
    text: str
    account: str | None = None

    @property
    def version(self) -> str:
        return f"{self.id}@{self.effective}"

    def readable_by(self, role: str) -> bool:
        return EVERYBODY in self.roles or role in self.roles


@dataclass(frozen=True)
class Corpus:
    """Document versions in a fixed order (id, then day). Methods return smaller corpora, never change this one."""

    documents: tuple[Document, ...]

    @classmethod
    def load(cls, folder: str | Path) -> Corpus:
        """Read every `*.md` of a folder. Raises CorpusError: no folder, no documents, a malformed or doubled one."""
        folder = Path(folder)
        try:
            if not folder.is_dir():
                raise CorpusError(f"{folder}: no such folder; name a folder of <id>@<effective>.md files")
            paths = sorted(path for path in folder.iterdir() if path.suffix == ".md")
        except OSError as error:
            raise CorpusError(f"{folder}: cannot be read ({error.strerror}); check its permissions") from None
        documents: dict[str, Document] = {}
        for path in paths:
            document = read_document(path)
            if document.version in documents:
                raise CorpusError(f"{path}: a second {document.version}; change its id or its effective day")
            documents[document.version] = document
        if not documents:
            raise CorpusError(f"{folder}: no documents; add <id>@<effective>.md files")
        return cls(tuple(sorted(documents.values(), key=lambda d: (d.id, d.effective))))

    def __iter__(self) -> Iterator[Document]:
        return iter(self.documents)

    def __len__(self) -> int:
        return len(self.documents)

    def as_of(self, day: date | str) -> Corpus:
        """The latest version of each document that is effective on or before `day`."""
        day = to_day(day)
        current = {d.id: d for d in self.documents if d.effective <= day}  # in order of day: the last one stays
        return Corpus(tuple(current.values()))

    def readable_by(self, role: str) -> Corpus:
        """The documents whose allow-list names `role` or everybody."""
        return Corpus(tuple(d for d in self.documents if d.readable_by(role)))

    def get(self, id: str) -> Document:
        """The latest version of a document here. Raises CorpusError when there is none."""
        versions = self.versions.get(id)
        if not versions:
            raise CorpusError(f"no document {id!r} here")
        return versions[-1]

    @cached_property
    def versions(self) -> dict[str, list[Document]]:
        """Document id -> its versions, oldest first."""
        found = defaultdict(list)
        for document in self.documents:
            found[document.id].append(document)
        return dict(found)

    @cached_property
    def roles(self) -> frozenset[str]:
        """Every role that some document names, and `all`."""
        return frozenset(role for d in self.documents for role in d.roles) | {EVERYBODY}

    @cached_property
    def releases(self) -> list[date]:
        """The days on which a document got a new version."""
        return sorted({d.effective for versions in self.versions.values() for d in versions[1:]})

    @cached_property
    def hash(self) -> str:
        """Twelve hex digits that change when anything that a reader could notice changes."""
        digest = hashlib.sha256()
        for d in self.documents:
            digest.update(json.dumps([d.version, d.title, d.kind, d.roles, d.account, d.text]).encode())
        return digest.hexdigest()[:12]


def to_day(day: date | str) -> date:
    """A date from a date or `YYYY-MM-DD`. Raises CorpusError for anything else."""
    if isinstance(day, date):
        return day
    try:
        return date.fromisoformat(day)
    except (TypeError, ValueError):
        raise CorpusError(f"{day!r} is not a day; write it as 2026-11-21") from None


def read_text(path: Path) -> str:
    """A file's text. Raises CorpusError when it cannot be read or is not UTF-8."""
    try:
        return path.read_text(encoding="utf-8")
    except UnicodeDecodeError:
        raise CorpusError(f"{path}: not a UTF-8 text file; save it as UTF-8 or remove it") from None
    except OSError as error:
        raise CorpusError(f"{path}: cannot be read ({error.strerror}); check its name and permissions") from None


def read_document(path: Path) -> Document:
    """One document from its file. Raises CorpusError: front matter missing or malformed, empty body."""
    text = read_text(path)
    head, rule, body = text.removeprefix("---\n").partition("\n---\n")
    if not text.startswith("---\n") or not rule:
        raise CorpusError(f"{path}: no front matter; start with --- lines around id, title, kind, effective, roles")
    try:
        meta = yaml.safe_load(head)
    except yaml.YAMLError as error:
        raise CorpusError(f"{path}: front matter is not YAML ({str(error).splitlines()[0]}); mend that line") from None
    except ValueError as error:  # YAML found something like a day that is on no calendar
        raise CorpusError(f"{path}: not a day in the front matter ({error}); write it as 2026-11-21") from None
    if not isinstance(meta, dict):
        raise CorpusError(f"{path}: front matter must be `key: value` lines")
    for key in ("id", "title", "kind", "effective", "roles"):
        if not meta.get(key):
            raise CorpusError(f"{path}: front matter has no {key}; add a line `{key}: …`")
    if type(meta["effective"]) is not date:  # a datetime is a date too
        raise CorpusError(f"{path}: effective {meta['effective']!r} is not a day; write it as 2026-11-21")
    roles = meta["roles"]
    if not isinstance(roles, list) or not all(isinstance(role, str) and role for role in roles):
        raise CorpusError(f"{path}: roles must be a list of names; write `roles: [all]` or `roles: [ae, exec]`")
    if meta["kind"] not in KINDS:
        raise CorpusError(f"{path}: unknown kind {meta['kind']!r}; choose one of {', '.join(KINDS)}")
    if not body.strip():
        raise CorpusError(f"{path}: the body is empty; write the document below the front matter")
    account = meta.get("account")
    document = Document(
        str(meta["id"]), str(meta["title"]), meta["kind"], meta["effective"], tuple(roles), body.strip(), account
    )
    if "@" in path.stem and path.stem != document.version:
        raise CorpusError(f"{path}: its front matter says {document.version}; make the name and the front matter agree")
    return document


# --- questions and facts about a corpus -----------------------------------------------------------------------------


@dataclass(frozen=True)
class Question:
    """One row of questions.jsonl. `answer` is None when the right behaviour is to decline."""

    id: str
    question: str
    role: str
    as_of: date
    answer: str | None
    accept: tuple[str, ...]
    sources: tuple[str, ...]
    kind: str
    split: str = "test"
    old_answer: str | None = None
    facts: tuple[str, ...] = ()

    @property
    def right_answers(self) -> tuple[str, ...]:
        return () if self.answer is None else (self.answer, *self.accept)


@dataclass(frozen=True)
class Fact:
    """One statement of a fact in one document version: `value` stands in `quote`, `quote` in the document."""

    fact: str
    document: str
    effective: date
    value: str
    quote: str
    outdated: bool = False  # the document repeats an old value, and says that it is old

    @property
    def version(self) -> str:
        return f"{self.document}@{self.effective}"


def read_jsonl(path: Path) -> list[dict]:
    """The objects of a JSON Lines file. Raises CorpusError naming the line that is not one."""
    rows = []
    for number, line in enumerate(read_text(Path(path)).split("\n"), 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise CorpusError(f"{path}:{number}: not JSON ({error.msg}); each line is one object") from None
        if not isinstance(row, dict):
            raise CorpusError(f"{path}:{number}: not an object; each line is one {{…}}")
        rows.append(row)
    return rows


def load_questions(path: str | Path) -> list[Question]:
    """The questions of a file. Raises CorpusError: a key missing, an unknown kind or split, a bad day, a doubled id."""
    questions: dict[str, Question] = {}
    for number, row in enumerate(read_jsonl(Path(path)), 1):
        where = f"{path}: question {row.get('id', number)}"
        missing = {"id", "question", "role", "as_of", "answer", "sources", "kind"} - row.keys()
        if missing:
            raise CorpusError(f"{where}: no {', '.join(sorted(missing))}; add the missing keys")
        texts = {"id": str, "question": str, "role": str, "answer": str | None, "old_answer": str | None}
        lists = dict.fromkeys(("accept", "sources", "facts"), list | None)
        for key, type_ in (texts | lists).items():
            if not isinstance(row.get(key), type_ if key in row else object):
                raise CorpusError(f"{where}: {key} is {row[key]!r}; write {'a list of texts' if key in lists else 'a text'}")
        known = {key: row[key] for key in Question.__dataclass_fields__ if key in row}
        for key in ("accept", "sources", "facts"):
            known[key] = tuple(known.get(key) or ())
        question = Question(**known | {"as_of": to_day(row["as_of"])})
        if question.kind not in QUESTION_KINDS:
            raise CorpusError(f"{where}: unknown kind {question.kind!r}; choose one of {', '.join(QUESTION_KINDS)}")
        if question.split not in SPLITS:
            raise CorpusError(f"{where}: unknown split {question.split!r}; choose one of {', '.join(SPLITS)}")
        if not isinstance(question.question, str) or not question.question.strip():
            raise CorpusError(f"{where}: the question is empty; write one")
        if question.id in questions:
            raise CorpusError(f"{where}: a second question of that id; ids are unique")
        questions[question.id] = question
    if not questions:
        raise CorpusError(f"{path}: no questions; add one JSON object a line")
    return list(questions.values())


def load_facts(path: str | Path) -> list[Fact]:
    """The facts ledger of a corpus. Raises CorpusError for a malformed row."""
    try:
        return [Fact(**row | {"effective": to_day(row.get("effective"))}) for row in read_jsonl(Path(path))]
    except TypeError as error:
        raise CorpusError(f"{path}: {error}; a row has fact, document, effective, value, quote") from None


def validate_facts(corpus: Corpus, facts: Iterable[Fact]) -> list[str]:
    """Problems of a facts ledger, one line each: a quote or value that does not stand where it should, a contradiction."""
    problems = []
    documents = {d.version: d for d in corpus}
    stated: dict[str, dict[str, Fact]] = defaultdict(dict)  # fact -> version -> row
    for fact in facts:
        where = f"fact {fact.fact} in {fact.version}"
        if fact.version not in documents:
            problems.append(f"{where}: no such document version")
        elif not stands_verbatim(fact.quote, documents[fact.version].text):
            problems.append(f"{where}: the document does not say {fact.quote!r}")
        elif not holds(fact.quote, fact.value):
            problems.append(f"{where}: the quote does not hold {fact.value!r}")
        elif fact.version in stated[fact.fact]:
            problems.append(f"{where}: stated twice")
        else:
            stated[fact.fact][fact.version] = fact
    for day in sorted({d.effective for d in corpus}):
        current = {d.version for d in corpus.as_of(day)}
        for name, rows in stated.items():
            values = {row.value for version, row in rows.items() if version in current and not row.outdated}
            if len(values) > 1:
                problems.append(f"fact {name}: contradicts itself on {day}: {' / '.join(sorted(values))}")
    return problems


def validate_questions(corpus: Corpus, questions: Iterable[Question], facts: Iterable[Fact] = ()) -> list[str]:
    """Problems of a question set, one line each.

    Proves that each answer stands in its sources as of its day, that the sources are current and readable, that
    `old_answer` stood in an earlier version, that a `restricted` role cannot read the sources (nor, where the ledger knows
    the fact, any other document that states it), and that no fact has questions in two splits.
    """
    problems = []
    ledger = defaultdict(list)
    for fact in facts:
        ledger[fact.fact].append(fact)
    ledger = dict(ledger)
    split_of: dict[str, str] = {}
    for q in questions:
        say = lambda problem, q=q: problems.append(f"question {q.id}: {problem}")  # noqa: E731
        current = corpus.as_of(q.as_of)
        readable = current.readable_by(q.role)
        texts = {d.id: d.text for d in current if d.id in q.sources}
        for missing in set(q.sources) - texts.keys():
            say(f"source {missing} does not exist on {q.as_of}")
        if q.role not in corpus.roles:
            say(f"unknown role {q.role}")
        if q.kind in ("unanswerable", "out_of_domain", "restricted") and q.answer is not None:
            say(f"a {q.kind} question has no answer: make it null")
        if q.kind in ("single", "multi", "comparison") and q.answer is None:
            say(f"a {q.kind} question needs an answer")
        if q.kind in ("multi", "comparison") and len(q.sources) < 2:
            say(f"a {q.kind} question needs two sources")
        if q.kind == "restricted":
            if not q.sources:
                say("a restricted question names the sources that its role may not read")
            for id in texts.keys() & readable.versions.keys():
                say(f"{q.role} may read {id}, so it is not restricted")
        else:
            for id in texts.keys() - readable.versions.keys():
                say(f"{q.role} may not read source {id}")
        if q.answer is not None:
            if not q.sources:
                say("an answer needs sources")
            for part in parts(q.answer):
                if not any(holds(text, part) for text in texts.values()):
                    say(f"no source says {part!r} on {q.as_of}")
        if q.old_answer is not None:
            earlier = [d for id in q.sources for d in corpus.versions.get(id, []) if d.effective <= q.as_of][:-1]
            superseded = [d.text for d in earlier if d.version not in {c.version for c in current}]
            for part in parts(q.old_answer):
                unchanged = part in parts(q.answer or "")
                if not unchanged and not any(holds(text, part) for text in superseded):
                    say(f"no earlier version of its sources said {part!r}")
            if q.old_answer in q.right_answers:
                say("old_answer is also accepted as right")
        here = {d.version for d in current}
        visible = {d.version for d in readable}
        for name in q.facts:
            if name not in ledger:
                if ledger:  # without a ledger, no fact is known, and none is missed
                    say(f"unknown fact {name}")
                continue
            if split_of.setdefault(name, q.split) != q.split:
                say(f"fact {name} is in splits {split_of[name]} and {q.split}")
            if q.kind == "restricted" and (leak := [f.version for f in ledger[name] if f.version in visible]):
                say(f"{q.role} can read {name} in {leak[0]}, so it is not restricted")
            if q.answer is not None and not any(f.version in here and f.document in q.sources for f in ledger[name]):
                say(f"no source states {name} on {q.as_of}")
        values = [f.value for name in q.facts for f in ledger.get(name, ()) if f.version in visible and not f.outdated]
        if q.kind == "single" and q.answer is not None and q.facts:  # noqa: SIM102
            if not any(holds(v, q.answer) or holds(q.answer, v) for v in values):
                say(f"answer {q.answer!r} is not the ledger's {' / '.join(sorted(set(values)))}")
    return problems


def restrict_to_split(questions: Iterable[Question], split: str) -> list[Question]:
    """The questions of one split."""
    return [q for q in questions if q.split == split]


def assign_splits(questions: list[Question], shares: dict[str, float] = SPLITS) -> list[Question]:
    """Questions split by fact: those that share a fact, directly or through others, land together.

    A group is dealt by a hash of its first fact in order of name (or of the question's id), so that adding a question moves
    no other, unless it joins two groups.
    """
    group: dict[str, str] = {}

    def root(name: str) -> str:
        while group.setdefault(name, name) != name:
            name = group[name]
        return name

    for q in questions:
        for fact in q.facts:
            first, later = sorted((root(fact), root(q.facts[0])))
            group[later] = first

    def split(q: Question) -> str:
        name = root(q.facts[0]) if q.facts else q.id
        place = int(hashlib.sha256(name.encode()).hexdigest(), 16) % 1000 / 1000
        for split, share in shares.items():
            if place < share:
                return split
            place -= share
        return split

    return [replace(q, split=split(q)) for q in questions]
