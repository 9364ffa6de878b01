"""Cards that belong to their weights, a registry of versions, and a gate."""

import json

import pytest

from reference.adapters import WEIGHTS, AdapterError, Card, Registry, read_card, write_card
from reference.weights import sha256

BASE = "tiny-0123"


def make(folder, name="style", weights=b"weights", base=BASE, **changes):
    """A folder that looks like an adapter."""
    folder.mkdir(parents=True)
    (folder / WEIGHTS).write_bytes(weights)
    about = {"data": {"datasets/x.jsonl": "ab" * 32}, "examples": 12, "recipe": {"rank": 8, "learning_rate": 0.001}}
    cost = {"tokens": 3400, "seconds": 90.0, "machine": "a laptop", "not_fit_for": "anything else"}
    card = Card(name=name, base=base, weights=sha256(folder / WEIGHTS), **about, **cost, **changes)
    write_card(folder, card)
    return card


# --- the card ---------------------------------------------------------------------------------------------------------


def test_a_card_is_read_back_as_it_was_written(tmp_path):
    scores = {"test": {"answer_accuracy": {"value": 0.9, "low": 0.85, "high": 0.95, "n": 240}}}
    card = make(tmp_path / "a", scores=scores)
    assert read_card(tmp_path / "a", BASE) == card


def test_the_page_says_what_the_card_says(tmp_path):
    make(tmp_path / "a", scores={"test": {"answer_accuracy": {"value": 0.9, "low": 0.85, "high": 0.95, "n": 240}}})
    page = (tmp_path / "a" / "README.md").read_text()
    for said in (
        "`style`",
        BASE,
        "12 examples",
        "rank 8",
        "1.5 minutes on a laptop",
        "anything else",
        "90.0%",
        "85.0% to 95.0%",
        "240",
    ):
        assert said in page


@pytest.mark.parametrize("damage", ["flipped", "gone", "no card", "half a card"])
def test_weights_or_a_card_that_do_not_match_are_refused_in_one_line(tmp_path, damage):
    make(tmp_path / "a")
    if damage == "flipped":
        (tmp_path / "a" / WEIGHTS).write_bytes(b"weightz")
    elif damage == "gone":
        (tmp_path / "a" / WEIGHTS).unlink()
    elif damage == "no card":
        (tmp_path / "a" / "card.json").unlink()
    else:
        text = (tmp_path / "a" / "card.json").read_text()
        (tmp_path / "a" / "card.json").write_text(text[: len(text) // 2])
    with pytest.raises(AdapterError) as error:
        read_card(tmp_path / "a", BASE)
    assert "\n" not in str(error.value) and str(tmp_path / "a") in str(error.value)


def test_an_adapter_of_another_base_is_refused_and_both_are_named(tmp_path):
    make(tmp_path / "a")
    with pytest.raises(AdapterError, match=f"trained on {BASE}, not on other-4567"):
        read_card(tmp_path / "a", "other-4567")


# --- the registry -----------------------------------------------------------------------------------------------------


@pytest.fixture
def registry(tmp_path):
    return Registry(tmp_path / "adapters")


def add(registry, tmp_path, weights=b"weights"):
    make(tmp_path / "new", weights=weights)
    return registry.add("style", tmp_path / "new")


def good(candidate, current):
    return []


def test_versions_are_numbered_and_wait_as_candidates(registry, tmp_path):
    assert [add(registry, tmp_path), add(registry, tmp_path)] == ["1", "2"]
    assert registry.states("style") == {"1": "candidate", "2": "candidate"}
    assert not (tmp_path / "new").exists() and registry.names() == []
    with pytest.raises(AdapterError, match="no promoted adapter 'style'"):
        registry.promoted("style")


def test_a_promoted_version_retires_the_one_before_and_one_call_goes_back(registry, tmp_path):
    for _ in range(2):
        assert registry.promote("style", add(registry, tmp_path), good) == []
    assert registry.states("style") == {"1": "retired", "2": "promoted"}
    assert registry.promoted("style") == registry.root / "style" / "2" and registry.names() == ["style"]
    assert registry.roll_back("style") == "1"
    assert registry.states("style") == {"1": "promoted", "2": "retired"}
    with pytest.raises(AdapterError, match="no version before 1"):
        registry.roll_back("style")


def test_a_version_with_reasons_against_it_stays_a_candidate(registry, tmp_path):
    registry.promote("style", add(registry, tmp_path), good)
    add(registry, tmp_path)
    asked = []
    judge = lambda candidate, current: asked.append((candidate.name, current.name)) or ["it is worse"]  # noqa: E731
    assert registry.promote("style", "2", judge) == ["it is worse"]
    assert asked == [("2", "1")]
    assert registry.states("style") == {"1": "promoted", "2": "candidate"}


def test_a_judge_that_fails_promotes_nothing(registry, tmp_path):
    add(registry, tmp_path)
    with pytest.raises(ZeroDivisionError):
        registry.promote("style", "1", lambda candidate, current: 1 / 0)
    assert registry.states("style") == {"1": "candidate"}


def test_a_version_that_was_never_retired_is_no_way_back(registry, tmp_path):
    add(registry, tmp_path)
    registry.promote("style", add(registry, tmp_path), good)
    with pytest.raises(AdapterError, match="no version before 2"):
        registry.roll_back("style")


def test_an_unknown_version_is_refused_and_the_known_ones_named(registry, tmp_path):
    add(registry, tmp_path)
    with pytest.raises(AdapterError, match="no version 7 of adapter 'style'; there are 1"):
        registry.promote("style", "7", good)


def test_other_adapters_in_the_registry_are_left_alone(registry, tmp_path):
    registry.promote("style", add(registry, tmp_path), good)
    make(tmp_path / "other", name="facts")
    registry.add("facts", tmp_path / "other")
    assert json.loads((registry.root / "registry.json").read_text()) == {
        "style": {"1": "promoted"},
        "facts": {"1": "candidate"},
    }
