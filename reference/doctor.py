"""Is this installation well? One line a check, each with its fix where something is wrong."""

from __future__ import annotations

import importlib.metadata
import os
import shutil
import sys
from collections.abc import Callable
from datetime import date
from pathlib import Path

from reference import weights
from reference.corpus import EVERYBODY, SHIPPED, Corpus, load_facts, load_questions, validate_facts, validate_questions

PYTHONS = ((3, 11), (3, 13))
MEMORY_GB, DISK_GB = 3, 2
QUESTION = "What is the list price of Forte Pro?"


class Unwell(Exception):
    """A check that failed: what is wrong, and the fix."""


def examine(corpus_folder: Path) -> int:
    """Run every check and print its line; 0 when all is well, 1 otherwise. A failed check does not stop the others."""
    checks: list[tuple[str, Callable[[], str]]] = [
        ("Python", python),
        ("packages", packages),
        ("cache folder", cache),
        ("memory", memory),
        ("disk", disk),
        ("language model", language_model),
        ("embedding model", lambda: weights.embedder()[1]),
        ("corpus", lambda: corpus(corpus_folder)),
        ("index", lambda: index(corpus_folder)),
        ("one question", lambda: one_question(corpus_folder)),
    ]
    well = True
    for name, check in checks:
        try:
            print(f"ok    {name}: {check()}", flush=True)
        except Exception as error:  # whatever is wrong becomes a line: that is what this command is for
            well = False
            print(f"WRONG {name}: {' '.join(str(error).split()) or type(error).__name__}", flush=True)
    print("all is well" if well else "something is wrong: mend the lines above, then run it again")
    return 0 if well else 1


def python() -> str:
    version = sys.version_info[:2]
    if not PYTHONS[0] <= version <= PYTHONS[1]:
        raise Unwell(f"{sys.version.split()[0]}; install 3.11, 3.12 or 3.13, delete .venv and run `make setup`")
    return sys.version.split()[0]


def packages() -> str:
    """Every requirement of the project is installed in a version that it allows."""
    from packaging.requirements import Requirement

    wrong, count = [], 0
    try:
        requirements = importlib.metadata.requires("pianist-workbook") or []
    except importlib.metadata.PackageNotFoundError:
        raise Unwell("this project is not installed; run `make setup`") from None
    for line in requirements:
        requirement = Requirement(line)
        if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
            continue
        count += 1
        try:
            version = importlib.metadata.version(requirement.name)
        except importlib.metadata.PackageNotFoundError:
            wrong.append(f"{requirement.name} is missing")
            continue
        if not requirement.specifier.contains(version, prereleases=True):
            wrong.append(f"{requirement.name} is {version}, not {requirement.specifier}")
    if wrong:
        raise Unwell(f"{', '.join(wrong)}; run `make setup`")
    return f"{count} requirements met"


def cache() -> str:
    folder = weights.cache_folder()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        weights.write_text(folder / ".writable", "")
        (folder / ".writable").unlink()
    except OSError as error:
        raise Unwell(f"{folder} cannot be written ({error.strerror}); set REFERENCE_CACHE to a folder that can") from None
    return str(folder)


def memory() -> str:
    import psutil

    free = psutil.virtual_memory().available / 2**30
    if free < MEMORY_GB:
        raise Unwell(f"{free:.1f} GB free; close other programs until {MEMORY_GB} GB are")
    return f"{free:.0f} GB free, {os.cpu_count()} cores"


def disk() -> str:
    folder = weights.cache_folder()
    free = shutil.disk_usage(folder if folder.exists() else folder.anchor).free / 2**30
    if free < DISK_GB:
        raise Unwell(f"{free:.1f} GB free at {folder}; make room until {DISK_GB} GB are, or set REFERENCE_CACHE elsewhere")
    return f"{free:.0f} GB free"


def language_model() -> str:
    weights.forget_checks()  # so that every file is read in full this time
    return weights.language_model()[1]


def corpus(folder: Path) -> str:
    """The documents load, and where questions and facts stand beside them, those are valid too."""
    documents = Corpus.load(folder)
    beside = folder.resolve().parent
    facts = load_facts(beside / "facts.jsonl") if (beside / "facts.jsonl").exists() else []
    questions = load_questions(beside / "questions.jsonl") if (beside / "questions.jsonl").exists() else []
    problems = validate_facts(documents, facts) + validate_questions(documents, questions, facts)
    if problems:
        raise Unwell(f"{problems[0]} (and {len(problems) - 1} more); mend the files in {beside}")
    return f"{len(documents.versions)} documents in {len(documents)} versions, {len(questions)} questions"


def index(folder: Path) -> str:
    from reference.embedding import load_embedder
    from reference.index import Index

    found = Index.of(folder, Corpus.load(folder), load_embedder())
    return f"{len(found)} chunks, version {found.version}"


def one_question(folder: Path) -> str:
    from reference.system import DEFAULT_SYSTEM, open_grid

    documents = Corpus.load(folder)
    question = QUESTION if folder.resolve() == SHIPPED.resolve() else f"What is {documents.documents[0].title}?"
    reply = open_grid(folder, documents)[DEFAULT_SYSTEM].ask(question, EVERYBODY, date.today())
    said = f": {reply.answer} ({reply.checked.citations[0].document})" if reply.answer else ""
    return f"{question} — {reply.status}{said}, in {reply.seconds['total']:.1f} s"
