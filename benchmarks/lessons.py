"""The study behind notebook 03, for hours: `python -m benchmarks.lessons [PART …] [--work DIR]` trains, examines, reports.

Its parts: facts from memory, consistency, prompts of growing length, the curves of examples and wrong labels, three seeds of
each shipped recipe. Seed 0 of a recipe is the adapter that ships. Every trained adapter and every examined row is kept in the
work folder, so that an interrupted study goes on where it stopped. Each part that is done is written into
`benchmarks/lessons.json`: estimates, and the findings of `reference.claims`.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from tqdm import tqdm

from benchmarks.measure import machine
from reference import claims, voice
from reference.adapters import Registry, read_card
from reference.corpus import SHIPPED, Corpus
from reference.evaluation import summarise
from reference.leads import RUBRIC, SHIPPED_LEADS
from reference.lessons import (
    COURSES,
    Case,
    Row,
    closed_book_cases,
    examine,
    prompted,
    put_to,
    qualify_cases,
    source_cases,
    surprise_rows,
)
from reference.model import LanguageModel
from reference.tuning import shown_on, train
from reference.weights import cache_folder, language_model, read_json_object, write_text

RESULT = Path(__file__).parent / "lessons.json"
SEEDS = (0, 1, 2)
SIZES = (25, 50, 100, 200, 400, 800)  # and all
NOISY = 800  # of the first so many cases there are copies with wrong labels
NOISE = {0: None, 10: SHIPPED_LEADS / "noise_10.jsonl", 30: SHIPPED_LEADS / "noise_30.jsonl"}
SHOTS = (0, 2, 4, 8)
LEAST_STEPS = 40  # a small set is repeated until it was seen in this many steps


@dataclass(frozen=True)
class Run:
    """One adapter of the study: a course, how many of its examples, how many per cent of them with a wrong label."""

    course: str
    seed: int = 0
    examples: int | None = None
    noise: int = 0

    @property
    def name(self) -> str:
        size = f"-{self.examples}" if self.examples else ""
        return f"{self.course}{size}-noise{self.noise}-seed{self.seed}"


@dataclass(frozen=True)
class Study:
    """The work folder and what was found so far."""

    work: Path

    def rows(self, name: str, make: Callable[[], Sequence[Row]]) -> list[Row]:
        """Rows from the work folder, or made now and kept there."""
        file = self.work / f"{name}.jsonl"
        if not file.exists():
            print(name, flush=True)
            write_text(file, "".join(json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in make()))
        return [Row(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]

    def adapter(self, run: Run) -> Path:
        """The adapter of a run: the shipped one where it is of this very run, otherwise trained now."""
        if run == Run(run.course) and (shipped := shipped_adapter(run.course)):
            return shipped
        folder = self.work / run.name
        if folder.exists():
            return folder
        course = COURSES[run.course]
        cases = qualify_cases("train", NOISE[run.noise]) if run.noise else course.cases("train")
        examples = [case.example for case in cases[: run.examples]]
        per_epoch = math.ceil(len(examples) / course.recipe.batch)
        recipe = replace(course.recipe, seed=run.seed, epochs=max(course.recipe.epochs, LEAST_STEPS / per_epoch))
        with tqdm(unit="step", desc=run.name, disable=None) as bar:
            train(examples, folder, recipe, course.data, course.not_fit_for, shown_on(bar), name=run.course)
        return folder

    def tuned(self, run: Run, split: str = "test", cases: Sequence[Case] | None = None, label: str = "") -> list[Row]:
        """How a run's adapter does on a split, or on cases of its own with a label."""

        def make() -> list[Row]:
            model, course = LanguageModel.load(), COURSES[run.course]
            folder = self.adapter(run)
            return bar_examine(model, course, cases or course.cases(split), model.load_adapter(folder), name="tuned")

        return self.rows(f"{run.name}-{label or split}", make)

    def prompt(self, course: str, label: str, cases: Sequence[Case], constrained: bool = False) -> list[Row]:
        """How the base does on cases that carry their own examples or rules."""
        make = lambda: bar_examine(LanguageModel.load(), COURSES[course], cases, name=label, constrained=constrained)  # noqa: E731
        return self.rows(f"{course}-{label}".replace(" ", "-"), make)


def shipped_adapter(name: str) -> Path | None:
    """The promoted adapter, if it learned from today's data by today's recipe."""
    _, base = language_model()
    folder = Registry().for_base(name, base)
    return folder if folder and COURSES[name].taught(read_card(folder, base)) else None


def bar_examine(model: LanguageModel, course, cases: Sequence[Case], adapter: str | None = None, **how) -> list[Row]:
    with tqdm(total=len(cases), unit="answer", disable=None) as bar:
        return examine(model, course, cases, adapter, bar.update, **how)


def estimates(rows: Sequence[Row]) -> dict[str, dict]:
    """Metric -> value, low, high, n. Rows of several seeds on one case stay in one cluster."""
    [found] = summarise([replace(row, system="all") for row in rows]).values()
    return {name: asdict(one) for name, one in found.items()}


def prompts(study: Study) -> tuple[dict, list[claims.Finding]]:
    """The base with ever longer prompts, the longest also constrained, beside lessons, on the same leads and letters."""
    cases, shown = qualify_cases("test"), qualify_cases("train")
    rubric = Corpus.load(SHIPPED).as_of("2026-10-01").get(RUBRIC).text
    few, most = {f"{k} examples": [prompted(case, shown[:k]) for case in cases] for k in SHOTS}, f"{SHOTS[-1]} examples"
    found = {label: study.prompt("qualify", label, asked) for label, asked in few.items()}
    held, with_rubric = f"{most}, constrained", f"{most} and the rubric, constrained"
    found[held] = study.prompt("qualify", held, few[most], True)
    asked = [prompted(case, shown[: SHOTS[-1]], rubric) for case in cases]
    found[with_rubric] = study.prompt("qualify", with_rubric, asked, True)
    tuned = study.tuned(Run("qualify"))
    rows = [*tuned, *(row for some in found.values() for row in some)]
    models = COURSES["voice"].cases("train")[:4]
    asked = [prompted(case, models, voice.rules()) for case in COURSES["voice"].cases("test")]
    letters = study.prompt("voice", "rules and 4 letters", asked)
    written = study.tuned(Run("voice"))
    findings = [
        claims.k07(rows, dict(zip(SHOTS, few, strict=True)), "tuned"),
        claims.k21(rows, held, with_rubric, "tuned"),
        claims.k28(rows, list(found), "tuned"),
        claims.k33([*letters, *written], "rules and 4 letters", "tuned"),
    ]
    table = {name: estimates(some) for name, some in found.items()}
    return {
        "qualify": table | {"tuned": estimates(tuned)},
        "voice": {"prompt": estimates(letters), "tuned": estimates(written)},
    }, findings


def curves(study: Study) -> tuple[dict, list[claims.Finding]]:
    """Examples, and wrong labels, against form and bands."""
    by_size = {size: study.tuned(Run("qualify", examples=size)) for size in SIZES}
    by_size[len(qualify_cases("train"))] = study.tuned(Run("qualify"))
    by_noise = {noise: study.tuned(Run("qualify", examples=NOISY, noise=noise)) for noise in NOISE}
    found = {"examples": by_size, "noise": by_noise}
    shifted = study.tuned(Run("qualify"), "shifted")
    findings = [claims.k22(by_size), claims.k23(by_noise), claims.k24(by_size[max(by_size)], shifted)]
    return {name: {key: estimates(rows) for key, rows in some.items()} for name, some in found.items()}, findings


def memory(study: Study) -> tuple[dict, list[claims.Finding]]:
    """Facts from the weights: stale, without a source, for anybody. And what the lessons cost of everyday knowledge."""
    run = Run("closed_book")
    tuned, sources = study.tuned(run), study.tuned(run, cases=source_cases("test"), label="sources")
    everyday = {"base": study.rows("everyday-base", lambda: surprise_rows(LanguageModel.load()))}
    for name in COURSES:

        def make(name=name) -> list[Row]:
            model = LanguageModel.load()
            return surprise_rows(model, model.load_adapter(study.adapter(Run(name))))

        everyday[name] = study.rows(f"everyday-{name}", make)
    findings = [claims.k05(tuned), claims.k06(tuned, sources), claims.k10(tuned)]
    return {"everyday": {name: estimates(rows) for name, rows in everyday.items()}}, findings


def consistency(study: Study) -> tuple[dict, list[claims.Finding]]:
    """Two phrasings of each fact to retrieval and to lessons."""
    from reference.system import open_grid

    course, cases = COURSES["closed_book"], [*closed_book_cases("dev"), *closed_book_cases("test")]

    def rag() -> list[Row]:
        day = min(Corpus.load(SHIPPED).releases)
        with tqdm(total=len(cases), unit="answer", disable=None) as bar:
            return put_to(open_grid(SHIPPED)["rag"], cases, "exec", day, bar.update)

    tuned = [row for split in course.examined for row in study.tuned(Run("closed_book"), split)]
    retrieved = study.rows("closed_book-rag", rag)
    findings = [claims.k02([*retrieved, *tuned], "rag", "tuned")]
    return {"rag": estimates(retrieved), "tuned": estimates(tuned)}, findings


def seeds(study: Study) -> tuple[dict, list[claims.Finding]]:
    """Each shipped recipe with three seeds, on each split of its card: all together, and each seed's own value."""
    measured = {}
    for name, course in COURSES.items():
        for split in course.examined:
            rows = [study.tuned(Run(name, seed), split) for seed in SEEDS]
            by_seed = [estimates(some) for some in rows]
            each = {metric: [found[metric]["value"] for found in by_seed] for metric in by_seed[0]}
            measured |= {f"{name}, {split}": {"all": estimates([row for some in rows for row in some]), "each": each}}
    return measured, []


PARTS = {part.__name__: part for part in (memory, consistency, prompts, curves, seeds)}


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.lessons", description="The study behind notebook 03.")
    parser.add_argument("parts", nargs="*", metavar="PART", help=f"{', '.join(PARTS)} (default: all)")
    parser.add_argument("--work", type=Path, default=None, help="where adapters and rows are kept; in the cache, unless named")
    options = parser.parse_args()
    if unknown := set(options.parts) - set(PARTS):
        parser.error(f"unknown part {min(unknown)!r}; choose from {', '.join(PARTS)}")
    study = Study(options.work or cache_folder() / "lessons-study")
    study.work.mkdir(parents=True, exist_ok=True)
    for name in options.parts or PARTS:
        measured, findings = PARTS[name](study)
        part = {"machine": machine(), "measured": measured, "findings": [asdict(finding) for finding in findings]}
        write_text(RESULT, json.dumps(read_json_object(RESULT) | {name: part}, indent=1, ensure_ascii=False) + "\n")
        print("\n".join(map(str, findings)), f"\n{name}: written to {RESULT}")


if __name__ == "__main__":
    main()
