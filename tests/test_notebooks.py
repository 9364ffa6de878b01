"""Every notebook runs from the top, offline, and prints what is committed: strict nbval, and what nbval does not see."""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
LINK = re.compile(r"\]\(([^)#]+)[^)]*\)")


def cells(path, kind=None):
    return [c for c in json.loads(path.read_text())["cells"] if kind is None or c["cell_type"] == kind]


def test_the_first_three_notebooks_are_there():
    assert [p.name for p in NOTEBOOKS][:3] == ["00_start_here.ipynb", "01_sheet_music.ipynb", "02_new_sheet_music.ipynb"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_prints_what_is_committed(path):
    """nbval in a process of its own: another process is what a reader has."""
    command = [sys.executable, "-m", "pytest", "--nbval", "--nbval-cell-timeout=600", "-q", "-p", "no:cacheprovider", str(path)]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-6000:]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_was_run_from_the_top_without_errors_or_warnings(path):
    """A notebook stripped of its outputs passes nbval, so this looks at what is committed."""
    code = cells(path, "code")
    assert [c["execution_count"] for c in code] == list(range(1, len(code) + 1))
    outputs = [o for c in code for o in c["outputs"]]
    assert not [o for o in outputs if o["output_type"] == "error" or o.get("name") == "stderr"]
    assert sum(bool(c["outputs"]) for c in code) >= len(code) / 2
    assert not re.search(r"raises-exception|nbval-ignore|NBVAL_", path.read_text(), re.I)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_a_notebook_keeps_its_cells_small_and_talks_between_them(path):
    code = cells(path, "code")
    assert len(code) <= 20
    assert max(len("".join(c["source"]).splitlines()) for c in code) <= 15
    kinds = [c["cell_type"] for c in cells(path)]
    assert kinds[0] == "markdown"
    assert "codecode" not in "".join(kinds).replace("markdown", "m"), "each code cell is followed by what to notice"
    opening = "".join("".join(c["source"]) for c in cells(path)[:2])
    assert "You will be able to" in opening
    assert re.search(r"\d+ minutes?", opening)


@pytest.mark.parametrize("path", [*NOTEBOOKS, ROOT / "README.md", ROOT / "datasets" / "README.md"], ids=lambda p: p.name)
def test_links_lead_to_files_that_exist_and_pictures_are_local(path):
    text = path.read_text() if path.suffix == ".md" else "\n".join("".join(c["source"]) for c in cells(path, "markdown"))
    for target in LINK.findall(text):
        if not target.startswith("http"):
            assert (path.parent / target).exists(), target
    assert not re.search(r"!\[[^]]*\]\(http|<img[^>]+src=.http", text)
