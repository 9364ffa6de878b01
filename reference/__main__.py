"""The command line: `python -m reference doctor | ask | compare | evaluate | train`."""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

from reference.corpus import EVERYBODY, SHIPPED, SPLITS, Corpus, CorpusError, load_facts, load_questions, to_day
from reference.weights import WeightsError, write_text


def main(arguments: list[str] | None = None) -> int:
    """Run one command. Returns 0, or 2 after one clear line on bad input; `doctor` returns 1 when something is wrong."""
    options = parser().parse_args(arguments)
    try:
        return options.run(options)
    except (CorpusError, WeightsError, ValueError, OSError) as error:
        print(f"error: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("stopped; nothing is half written", file=sys.stderr)
        return 130


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, without the usage above it."""

    def error(self, message: str):
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")


def parser() -> argparse.ArgumentParser:
    top = Parser(prog="python -m reference", description="RAG or fine-tuning, or both? Ask, compare, measure.")
    commands = top.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, run, help: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=help, description=help)
        command.add_argument(
            "--corpus", type=Path, default=SHIPPED, metavar="DIR", help="a folder of <id>@<effective>.md files"
        )
        command.set_defaults(run=run)
        return command

    add("doctor", doctor, "check this installation line by line, and answer one question")
    for name, run, help in (
        ("ask", ask, "one question to one system"),
        ("compare", compare, "one question to every system, side by side"),
    ):
        command = add(name, run, help)
        command.add_argument("question")
        command.add_argument("--as-of", type=str, default=str(date.today()), metavar="DAY", help="the day that counts as today")
        command.add_argument("--role", default=EVERYBODY, help="who asks (default: somebody of whom nothing is known)")
        command.add_argument("--json", action="store_true", help="print JSON")
        if name == "ask":
            command.add_argument("--system", help="base, rag, prompted, … (default: the best one there is)")
    command = add("evaluate", evaluate, "every metric of each system on a set of questions")
    command.add_argument("--systems", metavar="NAMES", help="names with commas between, as base,rag (default: every system)")
    command.add_argument("--questions", type=Path, metavar="FILE", help="default: questions.jsonl beside the corpus folder")
    command.add_argument("--split", choices=[*SPLITS, "all"], default="test")
    command.add_argument("--limit", type=positive, metavar="N", help="only the first N questions")
    command.add_argument("--json", type=Path, metavar="OUT", help="write settings, metrics and rows to this file")
    command = commands.add_parser("train", help="rebuild a shipped adapter from its data")
    command.add_argument("name", metavar="NAME", help="closed_book, qualify or voice")
    command.add_argument(
        "--out", type=Path, metavar="DIR", help="write it there (default: a new version in adapters/, if it passes the gate)"
    )
    command.add_argument("--seed", type=int, default=0, help="of the first weights and of the order of the examples")
    command.set_defaults(run=train)
    return top


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above 0")
    return int(text)


def open_grid(options) -> dict:
    """The grid over the corpus that was named, once its role is known to be one of that corpus."""
    from reference import system

    grid = system.open_grid(options.corpus)
    grid["rag"].index.check_role(options.role)
    return grid


def choose(grid: dict, names: list[str]) -> list:
    """Systems by name, in the order named. Raises CorpusError for an unknown one."""
    for name in names:
        if name not in grid:
            raise CorpusError(f"unknown system {name!r}; choose from {', '.join(grid)}")
    return [grid[name] for name in names]


def ask(options) -> int:
    from reference.system import DEFAULT_SYSTEM

    day = to_day(options.as_of)
    [system] = choose(open_grid(options), [options.system or DEFAULT_SYSTEM])
    show([system.ask(options.question, options.role, day)], options.json, one=True)
    return 0


def compare(options) -> int:
    from reference.system import compare

    day = to_day(options.as_of)
    show(compare(list(open_grid(options).values()), options.question, options.role, day), options.json)
    return 0


def show(replies: list, as_json: bool, one: bool = False) -> None:
    """Print replies for people, or as JSON (`one` prints the object itself, otherwise a list)."""
    if as_json:
        found = [reply.to_json() for reply in replies]
        print(json.dumps(found[0] if one else found, ensure_ascii=False, indent=1))
        return
    for reply in replies:
        print(f"{reply.system}: {reply.status}" + (f": {reply.answer}" if reply.answer else ""))
        for citation in reply.checked.citations if reply.status == "answered" else ():
            print(f"    “{citation.quote}” — {citation.version}")
        if reply.status == "rejected":
            print(f"    why: {'; '.join(reply.checked.reasons)}\n    raw: {' '.join(reply.raw.split())[:200]}")
        print(f"    {reply.seconds['total']:.1f} s, {reply.tokens['in']} tokens in, {reply.tokens['out']} out")


def evaluate(options) -> int:
    from tqdm import tqdm

    from reference import evaluation, system

    if options.json:
        try:
            write_text(options.json, "")
        except OSError as error:  # said now, not after an hour
            raise CorpusError(f"{options.json} cannot be written ({error.strerror}); name another file") from None
    corpus = Corpus.load(options.corpus)
    beside = options.corpus.resolve().parent
    questions = load_questions(options.questions or beside / "questions.jsonl")
    facts = load_facts(beside / "facts.jsonl") if (beside / "facts.jsonl").exists() else []
    if options.split != "all":
        questions = [q for q in questions if q.split == options.split]
    questions = questions[: options.limit]
    if not questions:
        raise CorpusError(f"no questions of split {options.split!r}; try --split all")
    grid = system.open_grid(options.corpus, corpus)
    systems = choose(grid, options.systems.split(",") if options.systems else list(grid))
    with tqdm(total=len(questions) * len(systems), unit="answer", disable=None) as bar:
        rows = evaluation.evaluate(systems, questions, corpus, facts, bar.update)
    print(evaluation.table_text(evaluation.summarise(rows)))
    print(evaluation.paired_text(evaluation.paired_tests(rows)))
    print(f"seconds are of batches of {system.BATCH} answers; {len(questions)} questions of split {options.split}")
    if options.json:
        index = next((s.index for s in systems if s.index), None)
        settings = {
            "corpus": corpus.hash,
            "documents": len(corpus),
            "questions": len(questions),
            "split": options.split,
            "model": systems[0].model.id,
            "embedder": index.embedder.id if index else None,
            "index_version": index.version if index else None,
            "systems": [s.name for s in systems],
            "batch": system.BATCH,
        }
        write_text(options.json, json.dumps(evaluation.report(rows, settings), ensure_ascii=False, indent=1, default=str))
        print(f"written: {options.json}")
    return 0


def train(options) -> int:
    from accelerate import PartialState
    from tqdm import tqdm

    from reference import lessons, tuning
    from reference.adapters import Registry
    from reference.model import LanguageModel

    if options.name not in lessons.COURSES:
        raise CorpusError(f"unknown adapter {options.name!r}; choose from {', '.join(lessons.COURSES)}")
    course, registry = lessons.COURSES[options.name], Registry()
    folder = options.out or registry.root / f"new-{course.name}"
    examples = [case.example for case in course.cases("train")]
    recipe = replace(course.recipe, seed=options.seed)
    with tqdm(unit="step", disable=None) as bar:
        tuning.train(examples, folder, recipe, course.data, course.not_fit_for, tuning.shown_on(bar), name=course.name)
    if not PartialState().is_main_process:  # under `accelerate launch` one process examines and registers
        return 0
    model = LanguageModel.load()
    with tqdm(total=sum(len(course.cases(split)) for split in course.examined), unit="answer", disable=None) as bar:

        def graded(split: str, count: int) -> None:
            bar.set_description(split)
            bar.update(count)

        card, rows = lessons.grade(model, course, folder, graded)
    print(card.page())
    if options.out:
        return 0

    def judge(candidate: Path, current: Path | None) -> list[str]:
        if current is None:
            return lessons.objections(course, rows["dev"])
        before = lessons.examine(model, course, course.cases("dev"), model.load_adapter(current))
        return lessons.objections(course, rows["dev"], before)

    version = registry.add(course.name, folder)
    reasons = registry.promote(course.name, version, judge)
    print(f"version {version}: " + ("promoted" if not reasons else "not promoted: " + "; ".join(reasons)))
    return 0 if not reasons else 1


def doctor(options) -> int:
    from reference.doctor import examine

    return examine(options.corpus)


if __name__ == "__main__":
    sys.exit(main())
