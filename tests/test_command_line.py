"""The command line: what it prints, and one clear line and exit status 2 for every kind of bad input."""

import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from reference import doctor, weights
from reference.__main__ import main

ROOT = Path(__file__).parent.parent
HARBOUR = Path(__file__).parent / "corpora" / "harbour"
CORPUS = str(HARBOUR / "corpus")
ENVIRONMENT = dict(os.environ)  # as it was before the fixtures here changed it
NAMES = ["base", "rag", "prompted", "prompted_constrained"]
QUESTION = "What does a Maré Duo cost a month?"
RATES = {
    "answer_accuracy", "token_f1", "freshness", "staleness", "citation_precision", "citation_recall", "format_validity",
    "declines", "wrong_declines", "leaks", "hit_rate", "shown_rate", "mrr", "ndcg", "accepted_right",
}  # fmt: skip
COSTS = {"first_token_seconds", "seconds", "tokens_in", "tokens_out"}


@pytest.fixture(scope="module")
def workplace(tiny_model, tmp_path_factory):
    """A cache of this file's own, and the tiny model swapped in as a user would swap one in: by its folder."""
    folder = tmp_path_factory.mktemp("workplace")
    tiny_model.network.save_pretrained(folder / "tiny")
    tiny_model.tokenizer.save_pretrained(folder / "tiny")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("REFERENCE_MODEL", str(folder / "tiny"))
        patch.setenv("REFERENCE_CACHE", str(folder / "cache"))
        patch.delenv("REFERENCE_EMBEDDER", raising=False)
        yield folder


@pytest.fixture
def run(workplace, capsys):
    """Arguments -> (exit status, standard output, standard error)."""

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        capsys.readouterr()
        try:
            status = main([str(argument) for argument in arguments])
        except SystemExit as exit:
            status = exit.code
        return status, *capsys.readouterr()

    return run


@pytest.fixture
def refused(run):
    """Arguments -> the one line with which they are refused."""

    def refused(*arguments: str | Path) -> str:
        status, out, err = run(*arguments)
        assert status == 2
        assert err.endswith("\n") and err.count("\n") == 1, err
        assert out == ""
        return err

    return refused


@pytest.fixture
def own_corpus(tmp_path) -> Path:
    """A copy of the harbour corpus, to be damaged."""
    shutil.copytree(HARBOUR, tmp_path / "harbour")
    return tmp_path / "harbour" / "corpus"


# --- ask and compare ------------------------------------------------------------------------------------------------


def test_ask_prints_one_json_object_with_all_that_the_contract_names(run):
    status, out, err = run(
        "ask", QUESTION, "--system", "rag", "--corpus", CORPUS, "--as-of", "2026-10-01", "--role", "owner", "--json"
    )
    assert (status, err) == (0, "")
    reply = json.loads(out)
    assert reply.keys() >= {"system", "answer", "evidence", "status", "raw", "seconds", "tokens"}
    assert (reply["system"], reply["question"], reply["role"], reply["as_of"]) == ("rag", QUESTION, "owner", "2026-10-01")
    assert reply["status"] in ("answered", "declined", "rejected")
    assert reply["tokens"].keys() == {"in", "out"} and reply["seconds"]["total"] > 0
    assert "Maré" in out  # readable, not escaped


def test_ask_without_a_system_asks_the_best_one_and_prints_for_people(run):
    from reference.system import DEFAULT_SYSTEM

    status, out, err = run("ask", QUESTION, "--corpus", CORPUS)
    assert (status, err) == (0, "")
    assert out.startswith(f"{DEFAULT_SYSTEM}: ") and "tokens in" in out


def test_compare_prints_every_system(run):
    status, out, err = run("compare", QUESTION, "--corpus", CORPUS, "--as-of", "2026-10-01", "--json")
    assert (status, err) == (0, "")
    assert set(NAMES) <= {reply["system"] for reply in json.loads(out)}


def test_what_was_asked_is_recorded_in_the_cache_folder(run, workplace):
    records = workplace / "cache" / "records.jsonl"
    before = records.read_text().count("\n") if records.exists() else 0
    run("ask", QUESTION, "--system", "base", "--corpus", CORPUS)
    lines = records.read_text(encoding="utf-8").splitlines()
    assert len(lines) == before + 1
    assert json.loads(lines[-1])["question"] == QUESTION


# --- evaluate -------------------------------------------------------------------------------------------------------


def test_evaluate_writes_settings_metrics_and_rows(run, tmp_path):
    out_file = tmp_path / "results" / "out.json"
    status, out, err = run("evaluate", "--corpus", CORPUS, "--limit", "2", "--json", out_file)
    assert (status, err) == (0, "")
    assert out.startswith("metric ") and "answer_accuracy" in out and str(out_file) in out
    found = json.loads(out_file.read_text(encoding="utf-8"))
    assert found.keys() >= {"settings", "metrics", "rows"}
    systems = list(found["metrics"])
    assert systems == found["settings"]["systems"] and set(NAMES) <= set(systems)
    for metrics in found["metrics"].values():
        assert {"answer_accuracy", "leaks", "seconds"} <= metrics.keys() <= RATES | COSTS
        for name, estimate in metrics.items():
            assert estimate.keys() == {"value", "low", "high", "n"}
            assert estimate["low"] <= estimate["value"] <= estimate["high"] and estimate["n"] >= 1
            assert name in COSTS or 0 <= estimate["low"] <= estimate["high"] <= 1
        assert metrics["leaks"]["value"] == 0
    assert "hit_rate" not in found["metrics"]["base"] and "hit_rate" in found["metrics"]["rag"]
    assert [(row["id"], row["system"]) for row in found["rows"]] == [
        (id, s) for s in systems for id in ("harbour-01", "harbour-02")
    ]
    for row in found["rows"]:
        assert row.keys() >= {"id", "gold", "system", "answer", "evidence", "status", "raw", "seconds", "tokens"}


def test_evaluate_asks_only_the_systems_named_in_the_order_named(run, tmp_path):
    status, out, _ = run("evaluate", "--corpus", CORPUS, "--limit", "1", "--systems", "rag,base")
    assert status == 0 and out.split("\n")[0].split() == ["metric", "rag", "base"]


# --- bad input ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("command", [["ask", QUESTION], ["compare", QUESTION], ["evaluate"]])
def test_a_missing_corpus_folder_is_one_line(refused, tmp_path, command):
    assert "no such folder" in refused(*command, "--corpus", tmp_path / "absent")


def test_a_folder_without_documents_is_one_line(refused, tmp_path):
    assert "no documents" in refused("ask", QUESTION, "--corpus", tmp_path)


def test_a_malformed_document_is_one_line_that_names_it(refused, own_corpus):
    (own_corpus / "BAD@2026-01-01.md").write_text("---\nid: BAD\ntitle: x\nkind: faq\neffective: 2026-01-01\n---\nText.")
    line = refused("ask", QUESTION, "--corpus", own_corpus)
    assert "BAD@2026-01-01.md" in line and "roles" in line


@pytest.mark.parametrize("day", ["tomorrow", "2026-13-40", "01/10/2026", ""])
@pytest.mark.parametrize("command", ["ask", "compare"])
def test_a_bad_day_is_one_line(refused, command, day):
    assert "is not a day" in refused(command, QUESTION, "--corpus", CORPUS, "--as-of", day)


@pytest.mark.parametrize("command", [["ask"], ["ask", "--system", "base"], ["compare"]])
def test_an_unknown_role_is_one_line_that_names_the_known_ones(refused, command):
    line = refused(*command, QUESTION, "--corpus", CORPUS, "--role", "janitor")
    assert "janitor" in line and "barista_trainer" in line


@pytest.mark.parametrize("command", [["ask", QUESTION, "--system"], ["evaluate", "--limit", "1", "--systems"]])
def test_an_unknown_system_is_one_line_that_names_the_known_ones(refused, command):
    line = refused(*command, "clairvoyant", "--corpus", CORPUS)
    assert "clairvoyant" in line and "prompted_constrained" in line


@pytest.mark.parametrize("question, reason", [("", "empty"), ("  \n ", "empty"), ("why? " * 200_000, "1,000,000 characters")])
def test_an_empty_or_endless_question_is_one_line(refused, question, reason):
    assert reason in refused("ask", question, "--corpus", CORPUS)


ROW = {
    "id": "q1", "question": "How much?", "role": "owner", "as_of": "2026-10-01", "answer": "€95", "accept": [],
    "sources": ["POL-SERVICE"], "kind": "single", "split": "test",
}  # fmt: skip


@pytest.mark.parametrize(
    "content, piece",
    [
        ("", "no questions"),
        ("not JSON", "not JSON"),
        ("[1, 2]", "not an object"),
        (json.dumps(ROW)[:-5], "not JSON"),
        (json.dumps({k: v for k, v in ROW.items() if k != "role"}), "role"),
        (json.dumps(ROW | {"kind": "riddle"}), "riddle"),
        (json.dumps(ROW | {"split": "holdout"}), "holdout"),
        (json.dumps(ROW | {"as_of": "soon"}), "soon"),
        (json.dumps(ROW | {"question": " "}), "empty"),
        (json.dumps(ROW | {"question": 5}), "question"),
        (json.dumps(ROW) + "\n" + json.dumps(ROW), "q1"),
        (json.dumps(ROW | {"role": "janitor"}), "janitor"),
        (json.dumps(ROW | {"answer": 95}), "answer"),
        (json.dumps(ROW | {"sources": "POL-SERVICE"}), "sources"),
        (json.dumps(ROW | {"id": ["q1"]}), "id"),
    ],
)
def test_a_broken_questions_file_is_one_line_that_says_what_is_wrong(refused, tmp_path, content, piece):
    (tmp_path / "questions.jsonl").write_text(content)
    line = refused("evaluate", "--corpus", CORPUS, "--questions", tmp_path / "questions.jsonl", "--systems", "rag")
    assert piece in line


def test_a_missing_or_unreadable_questions_file_is_one_line(refused, tmp_path):
    assert "absent.jsonl" in refused("evaluate", "--corpus", CORPUS, "--questions", tmp_path / "absent.jsonl")
    assert str(tmp_path) in refused("evaluate", "--corpus", CORPUS, "--questions", tmp_path)
    (tmp_path / "latin.jsonl").write_bytes("Maré".encode("latin-1"))
    assert "UTF-8" in refused("evaluate", "--corpus", CORPUS, "--questions", tmp_path / "latin.jsonl")


def test_a_broken_facts_ledger_beside_the_corpus_is_one_line(refused, own_corpus):
    (own_corpus.parent / "facts.jsonl").write_text('{"fact": "x", "effective": "2026-01-01"}\n')
    assert "facts.jsonl" in refused("evaluate", "--corpus", own_corpus)


def test_a_split_without_questions_is_one_line(refused):
    assert "'dev'" in refused("evaluate", "--corpus", CORPUS, "--split", "dev")


@pytest.mark.parametrize(
    "arguments",
    [
        ["evaluate", "--limit", "0"],
        ["evaluate", "--limit", "-1"],
        ["evaluate", "--limit", "many"],
        ["evaluate", "--split", "holdout"],
        ["ask"],
        ["ask", QUESTION, "--colour", "red"],
        ["sing"],
        [],
    ],
)
def test_arguments_that_make_no_sense_are_one_line(refused, arguments):
    refused(*arguments)


def test_a_results_file_that_cannot_be_written_is_one_line(run, tmp_path):
    (tmp_path / "file").write_text("")
    status, _, err = run(
        "evaluate", "--corpus", CORPUS, "--limit", "1", "--systems", "base", "--json", tmp_path / "file" / "out.json"
    )
    assert status == 2 and err.count("\n") == 1 and "out.json" in err


def test_a_cache_folder_that_cannot_be_written_is_one_line(refused, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REFERENCE_CACHE", str(tmp_path / "file" / "cache"))
    assert str(tmp_path / "file") in refused("ask", QUESTION, "--corpus", CORPUS)


def test_a_swapped_in_model_that_does_not_exist_is_one_line(refused, monkeypatch):
    monkeypatch.setenv("REFERENCE_MODEL", "no-such-folder/no-such-model")
    assert "no-such-model" in refused("ask", QUESTION, "--corpus", CORPUS)


def test_damaged_weights_are_one_line_that_names_the_fix(refused, tmp_path, monkeypatch):
    monkeypatch.setenv("REFERENCE_MODEL", str(tmp_path))
    assert "safetensors" in refused("ask", QUESTION, "--corpus", CORPUS)


def test_the_shell_sees_exit_status_2_and_one_line():
    done = subprocess.run(
        [sys.executable, "-m", "reference", "ask", QUESTION, "--corpus", CORPUS, "--as-of", "tomorrow"],
        cwd=ROOT, env=ENVIRONMENT, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.count("\n") == 1 and "'tomorrow' is not a day" in done.stderr


# --- doctor ---------------------------------------------------------------------------------------------------------


def installed(folder: Path, requirements: list[str]) -> None:
    """Make the project look installed, with these requirements, to whoever has `folder` on the path."""
    info = folder / "pianist_workbook-0.1.0.dist-info"
    info.mkdir()
    lines = [
        "Metadata-Version: 2.4",
        "Name: pianist-workbook",
        "Version: 0.1.0",
        *(f"Requires-Dist: {r}" for r in requirements),
    ]
    (info / "METADATA").write_text("\n".join(lines) + "\n")


@pytest.fixture
def installation(tmp_path_factory, monkeypatch) -> Path:
    """The project as `pip install -e .` would make it known, whether or not this environment did that."""
    folder = tmp_path_factory.mktemp("site")
    installed(folder, tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["dependencies"])
    monkeypatch.syspath_prepend(folder)
    return folder


def checks(out: str) -> dict[str, str]:
    """Check -> "ok" or what is wrong with it. Every line but the last is a check."""
    *lines, last = out.strip().split("\n")
    found = {}
    for line in lines:
        state, name, said = line[:5].strip(), *line[6:].split(": ", 1)
        assert state in ("ok", "WRONG")
        found[name] = "ok" if state == "ok" else said
    assert last == "all is well" if set(found.values()) == {"ok"} else last.startswith("something is wrong")
    return found


CHECKS = [
    "Python", "packages", "cache folder", "memory", "disk", "language model", "embedding model", "corpus", "index",
    "one question",
]  # fmt: skip


def test_doctor_finds_a_good_installation_well(run, installation):
    status, out, err = run("doctor", "--corpus", CORPUS)
    assert checks(out) == dict.fromkeys(CHECKS, "ok")
    assert (status, err) == (0, "")


def test_doctor_finds_the_real_installation_well_from_the_shell(installation):
    path = os.pathsep.join(filter(None, [str(installation), ENVIRONMENT.get("PYTHONPATH")]))
    done = subprocess.run(
        [sys.executable, "-m", "reference", "doctor", "--corpus", CORPUS],
        cwd=ROOT, env=ENVIRONMENT | {"PYTHONPATH": path}, capture_output=True, text=True, timeout=300,
    )  # fmt: skip
    assert checks(done.stdout) == dict.fromkeys(CHECKS, "ok")
    assert done.returncode == 0


def test_doctor_names_a_cache_folder_that_cannot_be_written_and_goes_on(run, installation, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("REFERENCE_CACHE", str(tmp_path / "file" / "cache"))
    status, out, _ = run("doctor", "--corpus", CORPUS)
    found = checks(out)
    assert status == 1 and list(found) == CHECKS
    assert str(tmp_path / "file" / "cache") in found["cache folder"] and "set REFERENCE_CACHE" in found["cache folder"]
    assert found["Python"] == found["packages"] == found["corpus"] == "ok"


@pytest.mark.parametrize("damage", [b"garbage", b"null"])
def test_doctor_is_not_fooled_by_a_damaged_memo_of_checks(run, installation, workplace, damage):
    (workplace / "cache" / "checked.json").write_bytes(damage)
    status, out, _ = run("doctor", "--corpus", CORPUS)
    assert status == 0 and set(checks(out).values()) == {"ok"}


def test_doctor_reads_weights_again_that_a_memo_calls_checked(run, installation, tmp_path, monkeypatch):
    monkeypatch.setenv("REFERENCE_CACHE", str(tmp_path))
    monkeypatch.delenv("REFERENCE_MODEL")
    folder = tmp_path / f"SmolLM2-135M-Instruct-{weights.LANGUAGE_MODEL.sha256[:12]}"
    folder.mkdir()
    file = folder / "model.safetensors"
    file.write_bytes(b"right")
    weights.record_sums(folder)
    weights.check_converted(folder)
    stat = file.stat()
    file.write_bytes(b"wrong")
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    weights.check_converted(folder)  # the memo still calls it good
    status, out, _ = run("doctor", "--corpus", CORPUS)
    found = checks(out)
    assert status == 1
    assert "damaged" in found["language model"] and f"delete {folder}" in found["language model"]
    assert found["embedding model"] == found["index"] == "ok" and found["one question"] != "ok"


def test_doctor_names_what_is_wrong_with_a_corpus(run, installation, own_corpus):
    row = json.loads((own_corpus.parent / "facts.jsonl").read_text(encoding="utf-8").split("\n")[0])
    (own_corpus.parent / "facts.jsonl").write_text(json.dumps(row | {"value": "€1", "quote": "All of it costs €1."}))
    status, out, _ = run("doctor", "--corpus", own_corpus)
    found = checks(out)
    assert status == 1 and [name for name, said in found.items() if said != "ok"] == ["corpus"]
    assert "does not say 'All of it costs €1.'" in found["corpus"] and "mend" in found["corpus"]


def test_doctor_names_packages_that_are_missing_or_of_the_wrong_version(tmp_path, monkeypatch):
    installed(tmp_path, ["numpy<1", "pianist-no-such-package>=2", "packaging", "colorama; sys_platform == 'none'"])
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(doctor.Unwell) as error:
        doctor.packages()
    message = str(error.value)
    assert "numpy is " in message and "not <1" in message and "pianist-no-such-package is missing" in message
    assert "packaging is" not in message and "colorama" not in message and "run `make setup`" in message


def test_doctor_names_the_fix_where_the_project_itself_is_not_installed(monkeypatch):
    def requires(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", requires)
    with pytest.raises(doctor.Unwell, match="make setup"):
        doctor.packages()
