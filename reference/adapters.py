"""Adapters as products: a card beside each, a registry of versions, and a gate that a worse one does not pass.

An adapter is a folder in PEFT's form (`adapter_config.json`, `adapter_model.safetensors`) with `card.json` and the same as a
page, `README.md`. The registry is `adapters/registry.json`: name -> its versions in order, each candidate, promoted or retired.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from reference.weights import WeightsError, read_json_object, verify, write_text

WEIGHTS = "adapter_model.safetensors"
ADAPTERS = Path(__file__).parent.parent / "adapters"


class AdapterError(ValueError):
    """An adapter that cannot be used: one line that says what is wrong and how to mend it."""


@dataclass(frozen=True)
class Card:
    """What an adapter is: where it comes from, what it was measured to do, and what it is not fit for."""

    name: str
    base: str  # id of the language model, with the start of its weights' sha256
    weights: str  # sha256 of adapter_model.safetensors
    data: dict[str, str]  # file -> sha256
    examples: int
    recipe: dict
    tokens: int
    seconds: float
    machine: str
    not_fit_for: str
    scores: dict[str, dict] = field(default_factory=dict)  # split -> metric -> value, low, high, n

    @property
    def id(self) -> str:
        """Name and start of the weights' sha256: no two versions share it."""
        return f"{self.name}-{self.weights[:12]}"

    def page(self) -> str:
        """The card for people, in Markdown."""
        about = {
            "base model": f"`{self.base}`",
            "learned from": f"{self.examples:,} examples: "
            + ", ".join(f"`{name}` ({sha[:12]})" for name, sha in self.data.items()),
            "recipe": ", ".join(f"{key.replace('_', ' ')} {value:g}" for key, value in self.recipe.items()),
            "cost": f"{self.tokens:,} tokens in {self.seconds / 60:.1f} minutes on {self.machine}",
            "not fit for": self.not_fit_for,
        }
        lines = [
            f"# Adapter `{self.name}`",
            "",
            "| | |",
            "|---|---|",
            *(f"| {key} | {value} |" for key, value in about.items()),
        ]
        for split, metrics in self.scores.items():
            lines += ["", f"## Measured: {split}", "", "| metric | value | 95 % interval | cases |", "|---|---|---|---|"]
            lines += [
                f"| {name} | {m['value']:.1%} | {m['low']:.1%} to {m['high']:.1%} | {m['n']} |" for name, m in metrics.items()
            ]
        return "\n".join(lines) + "\n"


def write_card(folder: Path, card: Card) -> None:
    """The card beside an adapter, as JSON and as a page."""
    write_text(folder / "card.json", json.dumps(asdict(card), indent=1, ensure_ascii=False) + "\n")
    write_text(folder / "README.md", card.page())


def read_card(folder: str | Path, base: str) -> Card:
    """The card of an adapter for the language model `base`.

    Raises AdapterError: no card, weights that are not the card's, or trained on another base.
    """
    folder = Path(folder)
    found = read_json_object(folder / "card.json")
    try:
        card = Card(**found)
    except TypeError:
        raise AdapterError(f"{folder}: no adapter card there; name a folder that `python -m reference train` wrote") from None
    try:
        verify(folder / WEIGHTS, card.weights, "take the folder anew or train it again")
    except WeightsError as error:
        raise AdapterError(f"{folder}: its weights are not those of its card: {error}") from None
    if card.base != base:
        raise AdapterError(f"{folder}: it was trained on {card.base}, not on {base}; train it on this model or load that one")
    return card


# --- the registry -----------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Registry:
    """The versions of every adapter below one folder: `<root>/<name>/<version>`."""

    root: Path = ADAPTERS

    def states(self, name: str) -> dict[str, str]:
        """Version -> state, oldest first. Empty for an unknown adapter."""
        return read_json_object(self.root / "registry.json").get(name, {})

    def promoted(self, name: str) -> Path:
        """The folder of the version in use. Raises AdapterError when none was promoted."""
        found = [version for version, state in self.states(name).items() if state == "promoted"]
        if not found:
            raise AdapterError(
                f"no promoted adapter {name!r} in {self.root}; run `python -m reference train {name}` and promote it"
            )
        return self.root / name / found[0]

    def for_base(self, name: str, base: str) -> Path | None:
        """The promoted version, if there is one and it was trained on the language model `base`."""
        if name not in self.names():
            return None
        folder = self.promoted(name)
        return folder if read_json_object(folder / "card.json").get("base") == base else None

    def names(self) -> list[str]:
        """Adapters of which a version is in use."""
        known = read_json_object(self.root / "registry.json")
        return [name for name, states in known.items() if "promoted" in states.values()]

    def add(self, name: str, folder: Path) -> str:
        """Move a trained adapter in as the next candidate; returns its version."""
        version = str(1 + max((int(v) for v in self.states(name)), default=0))
        place = self.root / name / version
        place.parent.mkdir(parents=True, exist_ok=True)
        os.replace(folder, place)
        self._write(name, self.states(name) | {version: "candidate"})
        return version

    def promote(self, name: str, version: str, judge: Callable[[Path, Path | None], Sequence[str]]) -> list[str]:
        """Put a version into use unless `judge(candidate folder, folder in use)` names reasons against it; returns them.

        Raises AdapterError for a version that is not there.
        """
        states = self.states(name)
        if version not in states:
            raise AdapterError(f"no version {version} of adapter {name!r}; there are {', '.join(states) or 'none'}")
        current = self.promoted(name) if "promoted" in states.values() else None
        reasons = list(judge(self.root / name / version, current))
        if not reasons:
            self._put_into_use(name, version)
        return reasons

    def roll_back(self, name: str) -> str:
        """Put the version before the one in use into use again; returns it. Raises AdapterError when there is none."""
        versions, current = list(self.states(name)), self.promoted(name).name
        earlier = [v for v in versions[: versions.index(current)] if self.states(name)[v] == "retired"]
        if not earlier:
            raise AdapterError(f"adapter {name!r} has no version before {current} to go back to")
        self._put_into_use(name, earlier[-1])
        return earlier[-1]

    def _put_into_use(self, name: str, version: str) -> None:
        states = {v: "retired" if state == "promoted" else state for v, state in self.states(name).items()}
        self._write(name, states | {version: "promoted"})

    def _write(self, name: str, states: dict[str, str]) -> None:
        known = read_json_object(self.root / "registry.json")
        write_text(self.root / "registry.json", json.dumps(known | {name: states}, indent=1) + "\n")
