"""A lesson: `tuning.Learner` against TRL's SFTTrainer with LoRA (its defaults) and a plain transformers and PEFT loop.

Everybody learns the same examples of the qualification course in the same order, with the same rank, alpha and learning rate.
After the turns each adapter's surprise at answers that it never saw is taken: equal within noise, or the comparison is void.
TRL is no dependency of the workbook: `pip install trl` first.
"""

from __future__ import annotations

import statistics
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import replace
from importlib.util import find_spec

import psutil
import torch
import torch.nn.functional as F

from benchmarks.measure import Findings, Line, against, take_turns
from reference.lessons import COURSES, Case
from reference.model import LanguageModel
from reference.tuning import Encoded, Learner, encode, faster_dtype, lora_network

COURSE = COURSES["qualify"]
RECIPE = replace(COURSE.recipe, warmup=0.0, epochs=1)
STEPS = 2  # of RECIPE.batch examples, a turn
TURNS = 3
SEEDS = (0, 1, 2)
JUDGED = 16  # cases of dev


def run(say: Callable[[str], None]) -> Findings:
    if not find_spec("trl"):
        raise SystemExit("this benchmark compares with TRL; run `pip install trl` in this environment first")
    dtype = faster_dtype()
    cases = COURSE.cases("train")[: STEPS * RECIPE.batch * TURNS * 2]
    model = LanguageModel.load()
    judged = encode_all(model, COURSE.cases("dev")[:JUDGED])
    seconds: dict[str, list[float]] = {}
    surprise: dict[str, list[float]] = {}
    for seed in SEEDS:
        say(f"seed {seed}: three learners, {TURNS} turns of {STEPS * RECIPE.batch} examples")
        learners = {"ours": Ours(dtype, seed), "plain": Plain(dtype, seed), "TRL": Trl(seed)}
        shuffled = [cases[i] for i in torch.randperm(len(cases), generator=torch.Generator().manual_seed(seed))]
        lots = [shuffled[i : i + STEPS * RECIPE.batch] for i in range(0, len(shuffled), STEPS * RECIPE.batch)]
        arms = {name: turn(learner.learn, lots) for name, learner in learners.items()}
        for name, found in take_turns(arms, TURNS).items():
            seconds.setdefault(name, []).extend(found)
        for name, learner in learners.items():
            surprise.setdefault(name, []).append(unseen(learner.network, judged))
        say(", ".join(f"{name} {statistics.median(s):.1f} s" for name, s in seconds.items()))
    sizes = [len(e.shared) + len(e.prompt) + len(e.answer) for e in encode_all(model, cases)]
    tokens = STEPS * RECIPE.batch * statistics.mean(sizes)
    lines = [
        against(f"{STEPS * RECIPE.batch} examples, against TRL's SFTTrainer", seconds["ours"], seconds["TRL"], 3.5),
        against("against a plain transformers and PEFT loop", seconds["ours"], seconds["plain"], 1.8),
        *(
            Line(f"surprise at unseen answers after it, nats a token: {name}", statistics.mean(s), "nats")
            for name, s in surprise.items()
        ),
    ]
    notes = [
        f"Seeds {', '.join(map(str, SEEDS))}; ours computes in {str(dtype).removeprefix('torch.')}, as was faster here.",
        f"Tokens a second, counting each example whole: {tokens / statistics.median(seconds['ours']):.0f}.",
        f"Surprise by seed: {', '.join(name + ' ' + ' '.join(f'{one:.3f}' for one in s) for name, s in surprise.items())}.",
        f"Memory of this process, all three learners in it: {psutil.Process().memory_info().rss / 2**30:.1f} GiB.",
    ]
    return Findings(lines, notes)


def turn(learn: Callable[[Sequence[Case]], None], lots: Sequence[Sequence[Case]]) -> Callable[[], None]:
    """A turn is the next lot of examples."""
    left = iter(lots)
    return lambda: learn(next(left))


def encode_all(model: LanguageModel, cases: Sequence[Case]) -> list[Encoded]:
    return [encode(model, case.example) for case in cases]


class Ours:
    def __init__(self, dtype: torch.dtype, seed: int):
        self.model = LanguageModel.load(dtype)
        self.learner = Learner(self.model, replace(RECIPE, seed=seed), STEPS * TURNS * 100)
        self.network = self.learner.network

    def learn(self, cases: Sequence[Case]) -> None:
        encoded = encode_all(self.model, cases)
        for start in range(0, len(encoded), RECIPE.batch):
            self.learner.step(encoded[start : start + RECIPE.batch])


class Plain:
    """What a careful person writes: base in the faster type, batches padded to their longest, logits in chunks by the model."""

    def __init__(self, dtype: torch.dtype, seed: int):
        self.model = LanguageModel.load(dtype)
        self.network = lora_network(self.model, replace(RECIPE, seed=seed))
        self.model.network.set_attn_implementation("sdpa")
        weights = [weight for weight in self.network.parameters() if weight.requires_grad]
        self.optimizer = torch.optim.AdamW(weights, lr=RECIPE.learning_rate, weight_decay=0.0)

    def learn(self, cases: Sequence[Case]) -> None:
        encoded = encode_all(self.model, cases)
        for start in range(0, len(encoded), RECIPE.batch):
            batch = encoded[start : start + RECIPE.batch]
            answers = sum(len(e.answer) for e in batch)
            batch = sorted(batch, key=lambda e: len(e.prompt) + len(e.answer))
            for half in (batch[: len(batch) // 2], batch[len(batch) // 2 :]):  # by length, so that little is padding
                self.backward(half, answers)
            self.optimizer.step()
            self.optimizer.zero_grad()

    def backward(self, batch: Sequence[Encoded], answers: int) -> None:
        rows = [[*e.shared, *e.prompt, *e.answer] for e in batch]
        longest = max(map(len, rows))
        tokens = torch.tensor([row + [0] * (longest - len(row)) for row in rows])
        real = torch.tensor([[1] * len(row) + [0] * (longest - len(row)) for row in rows])
        labels = torch.full_like(tokens, -100)
        for i, (row, e) in enumerate(zip(rows, batch, strict=True)):
            labels[i, len(row) - len(e.answer) : len(row)] = torch.tensor(e.answer)
        logits = self.network(input_ids=tokens, attention_mask=real, use_cache=False).logits
        loss = F.cross_entropy(logits[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten(), reduction="sum")
        (loss / answers).backward()


class Trl:
    """SFTTrainer with its defaults: 8 examples a device, mixed precision, checkpointed activations; our learning rate."""

    def __init__(self, seed: int):
        from peft import LoraConfig

        torch.manual_seed(seed)
        self.model = LanguageModel.load()
        self.model.network.set_attn_implementation("sdpa")
        self.config = LoraConfig(r=RECIPE.rank, lora_alpha=RECIPE.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
        self.network = self.model.network
        self.optimizer = None  # the first trainer makes one, the later go on with it
        self.seed = seed

    def learn(self, cases: Sequence[Case]) -> None:
        from trl import SFTConfig, SFTTrainer

        import datasets

        answer = lambda case: [{"role": "assistant", "content": case.answer}]  # noqa: E731
        data = datasets.Dataset.from_list([{"prompt": list(case.messages), "completion": answer(case)} for case in cases])
        with tempfile.TemporaryDirectory() as folder:
            config = SFTConfig(
                folder, use_cpu=True, num_train_epochs=1, learning_rate=RECIPE.learning_rate, lr_scheduler_type="constant",
                seed=self.seed, report_to="none", save_strategy="no", disable_tqdm=True, logging_strategy="no",
            )  # fmt: skip
            first = self.network is self.model.network
            trainer = SFTTrainer(
                self.network, config, train_dataset=data, processing_class=self.model.tokenizer,
                peft_config=self.config if first else None,
                optimizers=(self.optimizer, None),
            )  # fmt: skip
            self.network = trainer.model
            trainer.train()
            self.optimizer = getattr(trainer.optimizer, "optimizer", trainer.optimizer)


def unseen(network, judged: Sequence[Encoded]) -> float:
    """Nats a token at answers of dev, by the network's own forward pass in fp32."""
    network = network.float().eval()
    network.base_model.model.set_attn_implementation("sdpa")
    nats = tokens = 0.0
    with torch.inference_mode():
        for e in judged:
            logits = network(input_ids=torch.tensor([[*e.shared, *e.prompt, *e.answer]])).logits[0, -len(e.answer) - 1 : -1]
            nats += F.cross_entropy(logits, torch.tensor(e.answer), reduction="sum").item()
            tokens += len(e.answer)
    return nats / tokens
