"""How a benchmark measures, and what it hands back: turns, medians, lines of a table."""

from __future__ import annotations

import os
import platform
import re
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import psutil
import torch

TURNS = 5


@dataclass(frozen=True)
class Line:
    """One line of the results. `ours` and `peer` are in `unit`; a ratio is peer / ours, so above 1 we are faster."""

    work: str
    ours: float
    unit: str = "s"
    peer: float | None = None
    ratio: float | None = None
    spread: tuple[float, float] | None = None  # least and greatest ratio of a turn
    target: str | None = None
    met: bool | None = None


@dataclass(frozen=True)
class Findings:
    """What one benchmark found: the lines of its table, and what to know when reading them."""

    lines: list[Line]
    notes: list[str]


def take_turns(arms: Mapping[str, Callable[[], object]], turns: int = TURNS) -> dict[str, list[float]]:
    """Seconds of each arm in each turn, run A B A B …, so that a slow minute hits all arms; one warm-up is not counted."""
    seconds: dict[str, list[float]] = {name: [] for name in arms}
    for turn in range(-1, turns):
        for name, work in arms.items():
            start = time.perf_counter()
            work()
            if turn >= 0:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def total(of_each_piece: Sequence[Sequence[float]]) -> list[float]:
    """Seconds of a whole turn, from the turns of its pieces of work: (pieces, turns) -> (turns)."""
    return [sum(turn) for turn in zip(*of_each_piece, strict=True)]


def against(work: str, ours: Sequence[float], peer: Sequence[float], at_least: float | None = None) -> Line:
    """Medians of both, and how many times faster we are."""
    mine, theirs = statistics.median(ours), statistics.median(peer)
    ratios = [b / a for a, b in zip(ours, peer, strict=True)]
    target = f"≥ {at_least:g}×" if at_least else None
    met = theirs / mine >= at_least if at_least else None
    return Line(work, mine, "s", theirs, theirs / mine, (min(ratios), max(ratios)), target, met)


def within(work: str, seconds: Sequence[float], at_most: float | None = None) -> Line:
    """A median, and whether it stays below a limit."""
    middle = statistics.median(seconds)
    target = f"≤ {1000 * at_most:g} ms" if at_most else None
    return Line(work, middle, target=target, met=middle <= at_most if at_most else None)


def machine() -> str:
    """The machine and the versions that matter, in one line."""
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = re.search(r"model name\s*:\s*(.+)", text)
    family = re.search(r"^model\s*:\s*(\d+)", text, re.M)
    flags = set((re.search(r"flags\s*:\s*(.+)", text) or [""] * 2)[1].split())
    cpu = (name[1] if name else platform.processor() or platform.machine()) + (f" (model {family[1]})" if family else "")
    named = {"AVX2": "avx2", "AVX-512": "avx512f", "AMX-bf16": "amx_bf16"}
    sets = [f"{'with' if flag in flags else 'without'} {title}" for title, flag in named.items()] if flags else []
    used = f"torch {torch.__version__} uses {torch.backends.cpu.get_cpu_capability()} on {torch.get_num_threads()} threads"
    memory = psutil.virtual_memory().total / 2**30
    parts = [cpu, f"{os.cpu_count()} cores", *sets, f"{memory:.0f} GiB", used, f"transformers {version('transformers')}"]
    return ", ".join(parts)
