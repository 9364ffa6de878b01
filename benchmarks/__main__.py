"""`python -m benchmarks [NAME …]`: run the benchmarks, keep their results, write the table."""

from __future__ import annotations

import argparse
import importlib
import json
import time
from dataclasses import asdict
from datetime import UTC, datetime
from pathlib import Path

import psutil

from benchmarks.measure import machine

HERE = Path(__file__).parent
BUSY = 0.5  # load average above which the numbers are marked as provisional
NAMES = ("generation", "grid", "retrieve", "load", "training")
FORMATS = {
    "nats": lambda nats: f"{nats:.3f}",
    "s": lambda s: f"{1000 * s:.0f} ms" if s < 1 else f"{s:.1f} s",
    "share": lambda share: f"{share:.0%}",
}
INTRODUCTION = """# Speed against peers

`python -m benchmarks` made this page. Ours and the peer take turns in one process (A B A B …) after a warm-up; a time is
the median of at least five turns unless a note says otherwise, a ratio is the peer's time over ours, in brackets its least
and greatest turn. Above 1 we are faster.
"""


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description="Speed against peers.")
    parser.add_argument("names", nargs="*", metavar="NAME", help=f"which to run: {', '.join(NAMES)}; all, if none is named")
    names = parser.parse_args().names or NAMES
    if unknown := set(names) - set(NAMES):
        parser.error(f"no benchmark {', '.join(sorted(unknown))}; there are {', '.join(NAMES)}")
    results_file = HERE / "results.json"
    results = json.loads(results_file.read_text()) if results_file.exists() else {}
    for name in names:
        results[name] = measure(name)
        results = {known: results[known] for known in NAMES if known in results}
        results_file.write_text(json.dumps(results, indent=1, ensure_ascii=False) + "\n")
        (HERE / "RESULTS.md").write_text(page(results))
        print(section(name, results[name]), flush=True)


def measure(name: str) -> dict:
    """Run one benchmark, with the time since its start before all that it says."""
    load, start = psutil.getloadavg()[0], time.monotonic()
    say = lambda text: print(f"{name} {time.monotonic() - start:5.0f} s: {text}", flush=True)  # noqa: E731
    say("starting")
    findings = importlib.import_module(f"benchmarks.{name}").run(say)
    say("done")
    about = {"machine": machine(), "day": str(datetime.now(UTC).date()), "load_before": load}
    return about | {"minutes": (time.monotonic() - start) / 60} | asdict(findings)


def page(results: dict[str, dict]) -> str:
    """RESULTS.md."""
    lines = [line for result in results.values() for line in result["lines"]]
    missed = [f"{line['work']} ({line['target']})" for line in lines if line["met"] is False]
    verdict = f"Missed: {'; '.join(missed)}." if missed else "Every target is met."
    return "\n".join([INTRODUCTION, verdict, "", *(section(name, result) for name, result in results.items())])


def section(name: str, result: dict) -> str:
    """One benchmark: the machine, its table, its notes."""
    about = f"{result['machine']}; {result['day']}, {result['minutes']:.0f} minutes."
    if result["load_before"] > BUSY:
        about += f" **Provisional**: others used the machine (load average before the start {result['load_before']:.1f})."
    table = ["| work | ours | peer | ratio | target | met |", "|---|---|---|---|---|---|", *map(row, result["lines"])]
    notes = [f"- {note}" for note in result["notes"]]
    return "\n".join([f"## {name}", "", about, "", *table, "", *notes, ""])


def row(line: dict) -> str:
    """One line of the table; a dash where nothing applies."""
    show = FORMATS[line["unit"]]
    ratio = line["ratio"] and f"{line['ratio']:.2f}×" + " ({:.2f} to {:.2f})".format(*line["spread"])
    met = {True: "met", False: "**missed**", None: None}[line["met"]]
    cells = [line["work"], show(line["ours"]), line["peer"] is not None and show(line["peer"]), ratio, line["target"], met]
    return "| " + " | ".join(cell or "–" for cell in cells) + " |"


if __name__ == "__main__":
    main()
