"""Loading the language model from our cache against loading its GGUF with transformers; and `import reference`."""

from __future__ import annotations

import io
import subprocess
import sys
from collections.abc import Callable
from contextlib import redirect_stderr

import torch

from benchmarks.measure import Findings, against, take_turns, within
from reference import weights
from reference.model import LanguageModel

SLOW_TURNS = 3  # the peer takes many seconds


def run(say: Callable[[str], None]) -> Findings:
    say("loading from the cache, then from the GGUF, with one warm-up")
    LanguageModel.load()  # makes the cache, if there is none
    arms = {"ours": LanguageModel.load, "ours, weights": load_network, "peer": load_gguf, "peer, weights": load_gguf_network}
    load = take_turns(arms, turns=SLOW_TURNS)
    say("starting Python with and without `import reference`")
    start = take_turns({"import": lambda: python("import reference"), "nothing": lambda: python("pass")})
    lines = [
        against("load the language model and its tokenizer", load["ours"], load["peer"], 20),
        against("of it the weights", load["ours, weights"], load["peer, weights"]),
        within("`python -c 'import reference'`", start["import"], 1.0),
        within("`python -c pass`, for comparison", start["nothing"]),
    ]
    notes = [
        f"{SLOW_TURNS} turns, not 5, for loading, since the peer is slow.",
        "Both load in a process that has imported the libraries, from files that the system has read before.",
    ]
    return Findings(lines, notes)


def load_network():
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(weights.language_model()[0], dtype=torch.float32)


def load_gguf() -> None:
    """What a reader without the cache would do."""
    from transformers import AutoTokenizer

    load_gguf_network()
    AutoTokenizer.from_pretrained(**gguf())


def load_gguf_network():
    from transformers import AutoModelForCausalLM

    with redirect_stderr(io.StringIO()):  # a progress bar
        return AutoModelForCausalLM.from_pretrained(**gguf(), dtype=torch.float32)


def gguf() -> dict[str, str]:
    source = weights.LANGUAGE_MODEL.locate()
    return {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}


def python(code: str) -> None:
    subprocess.run([sys.executable, "-c", code], check=True)
