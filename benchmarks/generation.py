"""One answer, greedy: our `LanguageModel.generate` against `generate` of transformers, same prompts, same tokens out.

fp32 must give the same tokens, or this stops. bf16 and 4-bit may not, so their task scores stand beside fp32's.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn

from benchmarks.measure import Findings, Line, against, take_turns, total
from benchmarks.work import Peer, Work, open_work
from reference.evaluation import evaluate, summarise
from reference.model import LanguageModel, Prompt
from reference.system import MAX_NEW_TOKENS, Ask, System, build_grid

SYSTEMS = ("rag", "prompted")
QUESTIONS = 4  # so eight prompts
SCORED = 24
SCORES = ("answer_accuracy", "token_f1", "format_validity")
GROUP = 32  # weights that share a scale in 4 bits
VARIANTS = {"bf16": "bf16", "4-bit": "4-bit weights, bf16"}


def run(say: Callable[[str], None]) -> Findings:
    say("loading the models")
    work, peer = open_work(), Peer()
    models = {"fp32": LanguageModel.load(), "bf16": LanguageModel.load(torch.bfloat16), "4-bit": in_4_bits()}
    prompts = make_prompts(work, models["fp32"])
    count = sum(map(len, prompts.values()))
    say(f"comparing our tokens with those of transformers for {count} prompts")
    for system, made in prompts.items():
        for number, prompt in enumerate(made, 1):
            check_same_tokens(models["fp32"], peer, prompt, f"{system} prompt {number}")
    say(f"the same tokens for {count} of {count}")

    tokens = {name: count_tokens(model, prompts) for name, model in models.items()}
    seconds = {system: time_each(models, peer, made, system, say) for system, made in prompts.items()}
    scores, score_notes = score_variants(models, work, say)
    notes = [
        f"Prompts: {QUESTIONS} questions of {work.name} to {' and '.join(SYSTEMS)}; at most {MAX_NEW_TOKENS} new tokens.",
        f"Exact: token for token what transformers gives, for {count} of {count} prompts (the run stops otherwise).",
        "The default path is exact fp32, so its two targets are about the same numbers.",
        "A beginning is remembered from the second question on; transformers reads the whole prompt each time.",
        "bf16 and 4-bit write other answers, so their seconds for an answer hang on its length. Tokens written in all: "
        + ", ".join(f"{name} {number}" for name, number in tokens.items())
        + ".",
        *score_notes,
    ]
    return Findings(compare_seconds(seconds, tokens) + scores, notes)


def compare_seconds(seconds: dict[str, dict[str, list[list[float]]]], tokens: dict[str, int]) -> list[Line]:
    """The table's lines from system -> arm -> seconds (prompts, turns), and from how many tokens each model wrote."""
    arms = seconds[SYSTEMS[0]]
    everything = {arm: [piece for system in SYSTEMS for piece in seconds[system][arm]] for arm in arms}
    lines = []
    for name, found in {**seconds, "all": everything}.items():
        turns = {arm: total(pieces) for arm, pieces in found.items()}
        answers = f"{len(found['peer'])} answers, {name}"
        if name == "all":
            lines.append(against(f"{answers}: default path", turns["fp32"], turns["peer"], 1.6))
        lines.append(against(f"{answers}: exact fp32", turns["fp32"], turns["peer"], 1.2 if name == "all" else None))
        lines.append(against(f"{answers}: exact fp32, no beginning remembered", turns["cold"], turns["peer"]))
    for variant in VARIANTS:  # of all systems, which came last
        lines.append(against(f"{answers}: {VARIANTS[variant]}", turns[variant], turns["peer"]))
        mine, exact = ([second / tokens[arm] for second in turns[arm]] for arm in (variant, "fp32"))
        lines.append(against(f"a token of them: {VARIANTS[variant]} (peer: our fp32)", mine, exact))
    return lines


def make_prompts(work: Work, model: LanguageModel) -> dict[str, list[Prompt]]:
    """System -> its prompts, a question each."""
    grid = build_grid(model, work.index)
    asks = [Ask.of(q) for q in work.questions("train", QUESTIONS)]
    return {name: [make_prompt(grid[name], ask) for ask in asks] for name in SYSTEMS}


def make_prompt(system: System, ask: Ask) -> Prompt:
    return system.prompt(ask, system.retrieve(ask)[: system.settings.reads])


def check_same_tokens(model: LanguageModel, peer: Peer, prompt: Prompt, where: str) -> None:
    ours = model.generate([prompt], MAX_NEW_TOKENS)[0].tokens
    theirs = peer.generate(prompt, MAX_NEW_TOKENS)
    assert ours == theirs, f"{where}: ours {model.text(ours)!r}, transformers {model.text(theirs)!r}"


def time_each(
    models: dict[str, LanguageModel], peer: Peer, prompts: list[Prompt], system: str, say: Callable[[str], None]
) -> dict[str, list[list[float]]]:
    """Arm -> seconds (prompts, turns). Arms: the models warm, fp32 cold, the peer."""
    seconds: dict[str, list[list[float]]] = {}
    for number, prompt in enumerate(prompts, 1):
        say(f"{system}: timing prompt {number} of {len(prompts)}")

        def cold(prompt=prompt):
            models["fp32"].prefixes.clear()
            models["fp32"].generate([prompt], MAX_NEW_TOKENS)

        arms = {"cold": cold}  # first, so that it leaves the beginning remembered for the warm ones
        for name, model in models.items():
            arms[name] = lambda model=model, prompt=prompt: model.generate([prompt], MAX_NEW_TOKENS)
        arms["peer"] = lambda prompt=prompt: peer.generate(prompt, MAX_NEW_TOKENS)
        for arm, turns in take_turns(arms).items():
            seconds.setdefault(arm, []).append(turns)
    return seconds


def count_tokens(model: LanguageModel, prompts: dict[str, list[Prompt]]) -> int:
    """Tokens that a model writes for all prompts."""
    return sum(len(model.generate([prompt], MAX_NEW_TOKENS)[0].tokens) for made in prompts.values() for prompt in made)


def score_variants(models: dict[str, LanguageModel], work: Work, say: Callable[[str], None]) -> tuple[list[Line], list[str]]:
    """Task scores of each variant beside fp32's, and how many answers are the same word for word."""
    questions = work.questions("dev", SCORED)
    rows, found = {}, {}
    for name, model in models.items():
        say(f"{name}: scoring {len(questions)} questions")
        system = build_grid(model, work.index)["prompted_constrained"]
        rows[name] = evaluate([system], questions, work.corpus)
        found[name] = summarise(rows[name])[system.name]
    lines, notes = [], []
    for name in VARIANTS:
        for score in SCORES:
            if score in found[name]:
                work_name = f"{score}, {VARIANTS[name]} (peer: our fp32)"
                lines.append(Line(work_name, found[name][score].value, "share", found["fp32"][score].value))
        same = sum(a.reply.raw == b.reply.raw for a, b in zip(rows[name], rows["fp32"], strict=True))
        notes.append(f"{VARIANTS[name]}: {same} of {len(questions)} answers of prompted_constrained are word for word fp32's.")
    return lines, notes


# --- 4 bits, by torch's own kernels: only here, not in the package ----------------------------------------------------


class FourBitLinear(nn.Module):
    """A linear layer without bias whose weights are 4-bit numbers, each group of 32 with its scale and zero in bf16."""

    def __init__(self, weight: Tensor):
        super().__init__()
        N, K = weight.shape
        groups = weight.float().reshape(N, K // GROUP, GROUP)
        low, high = groups.amin(-1), groups.amax(-1)  # (N, K / GROUP)
        scale = ((high - low) / 15).clamp(min=1e-8)
        codes = ((groups - low[..., None]) / scale[..., None]).round().clamp(0, 15).int().reshape(N, K)
        zero = low + 8 * scale  # the kernel computes (code - 8) * scale + zero
        self.codes = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes, 1)
        self.scales = torch.stack([scale, zero], -1).transpose(0, 1).contiguous().bfloat16()  # (K / GROUP, N, 2)
        self.size = N

    def forward(self, x: Tensor) -> Tensor:
        """(..., K) -> (..., N)"""
        flat = x.reshape(-1, x.shape[-1])
        out = torch.ops.aten._weight_int4pack_mm_for_cpu(flat, self.codes, GROUP, self.scales)
        return out.reshape(*x.shape[:-1], self.size)


def in_4_bits() -> LanguageModel:
    """The language model with every linear layer in 4 bits; the rest is bf16, for which the kernels are fast."""
    exact, model = LanguageModel.load(), LanguageModel.load(torch.bfloat16)
    for name, layer in exact.network.named_modules():
        if isinstance(layer, nn.Linear):
            model.network.set_submodule(name, FourBitLinear(layer.weight.data))
    return model
