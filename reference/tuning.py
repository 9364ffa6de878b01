"""Lessons: examples in, a LoRA adapter and its card out (Hu et al. 2021), by PEFT on the workbook's own language model.

The loss is on the answers only. A lesson that is interrupted goes on from its last checkpoint; the finished adapter appears
under its name as a whole. On several devices: `accelerate launch -m reference train NAME`.
"""

from __future__ import annotations

import ctypes
import hashlib
import json
import math
import os
import platform
import random
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import psutil
import torch

from reference.adapters import WEIGHTS, Card, write_card
from reference.lora import LessonLoss
from reference.model import LanguageModel, quiet
from reference.packing import Lesson, lesson_attention
from reference.weights import sha256, write_file, write_folder

CHECKPOINT_SECONDS = 60
MOST_MEMORY = 3 * 2**30  # bytes; a process that holds more after a step gives back what it has freed


class TuningError(ValueError):
    """A lesson that cannot be given: one line that says what is wrong and how to mend it."""


@dataclass(frozen=True)
class Example:
    """One lesson: chat messages (role, content) as the model will be asked, and the answer that it should give."""

    messages: tuple[dict[str, str], ...]
    answer: str


@dataclass(frozen=True)
class Recipe:
    """How to teach. `rank` and `alpha` as in Hu et al. 2021 (section 4.1), on all linear layers (Dettmers et al. 2023, 4)."""

    rank: int = 8
    alpha: int = 16
    learning_rate: float = 1e-3
    epochs: float = 3
    batch: int = 16  # examples a step
    warmup: float = 0.05  # share of the steps
    seed: int = 0


@dataclass(frozen=True)
class Progress:
    """What a step tells: its number, the loss a token, speed, and the seconds that remain."""

    step: int
    steps: int
    loss: float
    tokens_per_second: float
    seconds_left: float


def shown_on(bar) -> Callable[[Progress], None]:
    """A `progress` for `train` that moves a tqdm bar."""

    def show(p: Progress) -> None:
        bar.total, bar.n = p.steps, p.step
        bar.set_postfix_str(f"loss {p.loss:.3f}, {p.tokens_per_second:.0f} tokens/s, {p.seconds_left / 60:.0f} minutes left")

    return show


@dataclass(frozen=True)
class Encoded:
    """An example in tokens: shared beginning, own part of the prompt, answer with its end token."""

    shared: tuple[int, ...]
    prompt: tuple[int, ...]
    answer: tuple[int, ...]


def encode(model: LanguageModel, example: Example) -> Encoded:
    """Tokens exactly as generation will see and make them. Raises TuningError: an empty answer, no end token, too long."""
    prompt = model.chat(list(example.messages))
    shared, own = model.encode(prompt.shared), model.encode(prompt.own)
    answer = model.encode(model.harmless(example.answer) + model.tokenizer.eos_token)
    if answer[-1] not in model.end_tokens or sum(token in model.end_tokens for token in answer) != 1:
        raise TuningError(f"the answer {example.answer[:40]!r} does not end with exactly one end token; mend its tokenizer")
    if len(answer) < 2:
        raise TuningError("an example has an empty answer; write one")
    limit = model.network.config.max_position_embeddings
    if (length := len(shared) + len(own) + len(answer)) > limit:
        raise TuningError(f"an example is {length} tokens long, the model reads {limit}; shorten {example.answer[:40]!r}")
    return Encoded(tuple(shared), tuple(own), tuple(answer))


def steps_of(encoded: Sequence[Encoded], recipe: Recipe) -> list[list[Encoded]]:
    """The examples of every step, reshuffled each epoch; a step holds examples with one shared beginning."""
    chance = random.Random(recipe.seed)
    groups: dict[tuple[int, ...], list[Encoded]] = {}
    for example in encoded:
        groups.setdefault(example.shared, []).append(example)
    steps: list[list[Encoded]] = []
    per_epoch = sum(math.ceil(len(group) / recipe.batch) for group in groups.values())
    while len(steps) < recipe.epochs * per_epoch:
        epoch = []
        for group in groups.values():
            chance.shuffle(group)
            epoch += [group[start : start + recipe.batch] for start in range(0, len(group), recipe.batch)]
        chance.shuffle(epoch)
        steps += epoch
    return steps[: math.ceil(recipe.epochs * per_epoch)]


def faster_dtype() -> torch.dtype:
    """bfloat16 where this machine multiplies matrices clearly faster in it (measured, not assumed), otherwise float32."""
    if torch.cuda.is_available():
        return torch.bfloat16

    def seconds(dtype: torch.dtype) -> float:
        a, b = torch.ones(512, 576, dtype=dtype), torch.ones(576, 1536, dtype=dtype)
        turns = []
        for _ in range(5):
            start = time.perf_counter()
            _ = a @ b
            turns.append(time.perf_counter() - start)
        return min(turns)

    return torch.bfloat16 if 1.5 * seconds(torch.bfloat16) < seconds(torch.float32) else torch.float32


def lora_network(model: LanguageModel, recipe: Recipe):
    """The model's network with fresh LoRA layers by PEFT: fp32 masters on frozen weights."""
    from peft import LoraConfig, get_peft_model
    from transformers import AttentionInterface

    torch.manual_seed(recipe.seed)
    AttentionInterface.register("lesson", lesson_attention)
    model.network.set_attn_implementation("lesson")
    config = LoraConfig(r=recipe.rank, lora_alpha=recipe.alpha, target_modules="all-linear", task_type="CAUSAL_LM")
    with quiet():
        network = get_peft_model(model.network, config)
    config.base_model_name_or_path = model.id  # not the folder that it was read from
    return network.train()


class Learner:
    """The network, its optimiser and schedule, on as many devices as `accelerate` was told of."""

    def __init__(self, model: LanguageModel, recipe: Recipe, steps: int, fast: bool = True):
        from accelerate import Accelerator

        self.accelerator = Accelerator(cpu=not torch.cuda.is_available())
        self.network = lora_network(model, recipe)
        weights = [weight for weight in self.network.parameters() if weight.requires_grad]
        optimizer = torch.optim.AdamW(weights, lr=recipe.learning_rate, weight_decay=0.0)
        warmup = max(1, round(recipe.warmup * steps))
        share = lambda step: min((step + 1) / warmup, (steps - step) / max(1, steps - warmup))  # noqa: E731
        self.schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, share)
        self.loss, self.optimizer = self.accelerator.prepare(LessonLoss(self.network, fast), optimizer)
        self.weights = weights

    def step(self, examples: Sequence[Encoded]) -> float:
        """Learn one step's examples, each process its share of them; returns the loss a token."""
        processes, mine = (
            self.accelerator.num_processes,
            examples[self.accelerator.process_index :: self.accelerator.num_processes],
        )
        tokens = sum(len(example.answer) for example in examples)
        lesson = Lesson.of(examples[0].shared, [(e.prompt, e.answer) for e in mine or examples[:1]]).to(self.accelerator.device)
        loss = self.loss(lesson) / tokens * (1 if mine else 0)  # a process without a share adds nothing
        self.accelerator.backward(loss * processes)  # their gradients are averaged
        torch.nn.utils.clip_grad_norm_(self.weights, 1.0)
        self.optimizer.step()
        self.schedule.step()
        self.optimizer.zero_grad()
        return float(self.accelerator.reduce(loss.detach(), "sum"))

    def state(self) -> dict:
        return {
            "weights": [weight.detach().clone() for weight in self.weights],
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
        }

    def restore(self, state: dict) -> None:
        with torch.no_grad():
            for weight, kept in zip(self.weights, state["weights"], strict=True):
                weight.copy_(kept)
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])


def train(
    examples: Sequence[Example],
    folder: str | Path,
    recipe: Recipe = Recipe(),
    data: dict[str, str] | None = None,
    not_fit_for: str = "anything but what its examples show",
    progress: Callable[[Progress], None] = lambda _: None,
    milestones: Sequence[int] = (),
    name: str | None = None,
    fast: bool = True,
) -> Card:
    """Teach `examples`, write the adapter with its card to `folder`, which must not be there yet; returns the card.

    The card's name is the folder's unless `name` says another; `data` maps data files to their sha256. After each step in
    `milestones` the adapter so far is also written, to `folder`-STEP. `fast=False` computes as PEFT does: the same
    gradients, slower. Raises TuningError and WeightsError.
    """
    folder = Path(folder)
    if folder.exists():
        raise TuningError(f"{folder} is there already; name another folder, or remove it")
    if not examples:
        raise TuningError("no examples to learn from; write some")
    model = LanguageModel.load(faster_dtype())
    encoded = [encode(model, example) for example in examples]
    steps = steps_of(encoded, recipe)
    learner = Learner(model, recipe, len(steps), fast)
    main = learner.accelerator.is_main_process
    state_file = folder.parent / f".{folder.name}.partial"
    lesson = {"key": fingerprint(model.id, encoded, recipe), "step": 0, "tokens": 0, "seconds": 0.0}
    if state_file.exists() and (kept := torch.load(state_file, weights_only=True))["lesson"]["key"] == lesson["key"]:
        learner.restore(kept["learner"])
        lesson = kept["lesson"]

    def card(step: int) -> Card:
        return Card(
            name=name or folder.name, base=model.id, weights="", data=data or {}, examples=len(examples),
            recipe=asdict(recipe) | {"steps": step}, tokens=lesson["tokens"], seconds=round(lesson["seconds"], 1),
            machine=machine(model), not_fit_for=not_fit_for,
        )  # fmt: skip

    saved, start, before = time.perf_counter(), time.perf_counter(), lesson["seconds"]
    for number in range(lesson["step"], len(steps)):
        loss = learner.step(steps[number])
        lesson["step"] = number + 1
        lesson["tokens"] += len(steps[number][0].shared) + sum(len(e.prompt) + len(e.answer) for e in steps[number])
        lesson["seconds"] = before + time.perf_counter() - start
        a_step = lesson["seconds"] / lesson["step"]
        progress(
            Progress(number + 1, len(steps), loss, lesson["tokens"] / lesson["seconds"], a_step * (len(steps) - number - 1))
        )
        trim_memory()
        if main and number + 1 in milestones:
            write_adapter(learner.network, Path(f"{folder}-{number + 1}"), card(number + 1))
        if main and time.perf_counter() - saved > CHECKPOINT_SECONDS:
            write_file(state_file, lambda path: torch.save({"lesson": lesson, "learner": learner.state()}, path))
            saved = time.perf_counter()
    made = card(len(steps))
    trim_memory(0)
    if main:
        made = write_adapter(learner.network, folder, made)
        state_file.unlink(missing_ok=True)
    learner.accelerator.wait_for_everyone()
    return made


def trim_memory(most: int = MOST_MEMORY) -> None:
    """Give freed memory back to the system where more than `most` bytes are held: glibc keeps it in pieces, and steps of unlike
    lengths need ever more. It costs a fifth of a step, so it is not done after each."""
    if sys.platform == "linux" and psutil.Process().memory_info().rss > most:
        libc = ctypes.CDLL(None)
        if hasattr(libc, "malloc_trim"):  # musl has none
            libc.malloc_trim(0)


def write_adapter(network, folder: Path, card: Card) -> Card:
    """Save the adapter in bf16 with its card, whole or not at all; returns the card with the weights' sha256."""
    from peft import get_peft_model_state_dict
    from safetensors.torch import save_file

    def write(temporary: Path) -> None:
        nonlocal card
        network.peft_config["default"].save_pretrained(temporary)
        state = get_peft_model_state_dict(network, save_embedding_layers=False)
        save_file(
            {name: weight.detach().to(torch.bfloat16).contiguous() for name, weight in state.items()}, temporary / WEIGHTS
        )
        card = replace(card, weights=sha256(temporary / WEIGHTS))
        write_card(temporary, card)

    write_folder(folder, write)
    return card


def fingerprint(base: str, encoded: Sequence[Encoded], recipe: Recipe) -> str:
    """What a checkpoint belongs to: the base, every token of the examples, the recipe."""
    said = json.dumps([base, [asdict(example) for example in encoded], asdict(recipe)])
    return hashlib.sha256(said.encode()).hexdigest()


def machine(model: LanguageModel) -> str:
    """The machine in a few words."""
    kind = torch.cuda.get_device_name() if torch.cuda.is_available() else f"{platform.machine()}, {os.cpu_count()} cores"
    return f"{kind}, torch {torch.__version__}, {str(model.network.dtype).removeprefix('torch.')}"
