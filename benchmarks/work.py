"""What the benchmarks work on: the shipped corpus and its questions; the tests' small company where there is none yet."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from reference import weights
from reference.corpus import Corpus, Question, load_questions
from reference.embedding import load_embedder
from reference.index import Index
from reference.model import Prompt

ROOT = Path(__file__).parent.parent
HOMES = (ROOT / "datasets", ROOT / "tests" / "corpora" / "harbour")


@dataclass(frozen=True)
class Work:
    """A corpus, its index and its questions."""

    name: str
    corpus: Corpus
    index: Index
    all_questions: list[Question]

    def questions(self, split: str, count: int, kinds: Sequence[str] = ()) -> list[Question]:
        """`count` questions of a split, spread evenly over the file; of any split where the file has none of this one."""
        wanted = [q for q in self.all_questions if not kinds or q.kind in kinds]
        wanted = [q for q in wanted if q.split == split] or wanted
        return wanted[:: max(1, len(wanted) // count)][:count]


def open_work() -> Work:
    home = next(home for home in HOMES if list(home.glob("corpus/*.md")) and (home / "questions.jsonl").exists())
    corpus = Corpus.load(home / "corpus")
    index = Index.of(home / "corpus", corpus, load_embedder())
    return Work(home.name, corpus, index, load_questions(home / "questions.jsonl"))


class Peer:
    """The same weights as a reader would load and run them with plain `transformers`: fp32, its default attention."""

    def __init__(self):
        from transformers import AutoModelForCausalLM, AutoTokenizer

        place, _ = weights.language_model()
        self.network = AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32)
        self.tokenizer = AutoTokenizer.from_pretrained(place)

    def generate(self, prompt: Prompt, max_new_tokens: int) -> list[int]:
        """Greedy new tokens, the end token included, of a whole prompt without its constraint."""
        inputs = self.tokenizer(prompt.shared + prompt.own, return_tensors="pt", add_special_tokens=False)
        out = self.network.generate(**inputs, max_new_tokens=max_new_tokens, do_sample=False)
        return out[0, inputs["input_ids"].shape[1] :].tolist()
