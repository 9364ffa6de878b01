"""Four systems on one question, as one batch, against four separate calls of transformers."""

from __future__ import annotations

from collections.abc import Callable

from benchmarks.measure import Findings, against, take_turns, total
from benchmarks.work import Peer, open_work
from reference.model import LanguageModel
from reference.system import MAX_NEW_TOKENS, Ask, build_grid, compare

SYSTEMS = ("base", "rag", "prompted", "prompted_constrained")
QUESTIONS = 3


def run(say: Callable[[str], None]) -> Findings:
    work, peer = open_work(), Peer()
    grid = build_grid(LanguageModel.load(), work.index)
    systems = [grid[name] for name in SYSTEMS]
    ours, theirs, tokens = [], [], {"ours": 0, "peer": 0}
    questions = work.questions("train", QUESTIONS)
    for number, question in enumerate(questions, 1):
        say(f"comparing {len(SYSTEMS)} systems on question {number} of {len(questions)}")
        ask = Ask.of(question)
        replies = compare(systems, ask.question, ask.role, ask.as_of)
        calls = [
            (system.prompt(ask, reply.shown), reply.tokens["out"] if system.constrained else MAX_NEW_TOKENS)
            for system, reply in zip(systems, replies, strict=True)
        ]
        tokens["ours"] += sum(reply.tokens["out"] for reply in replies)
        tokens["peer"] += sum(len(peer.generate(prompt, limit)) for prompt, limit in calls)
        seconds = take_turns(
            {
                "ours": lambda ask=ask: compare(systems, ask.question, ask.role, ask.as_of),
                "peer": lambda calls=calls: [peer.generate(prompt, limit) for prompt, limit in calls],
            }
        )
        ours.append(seconds["ours"])
        theirs.append(seconds["peer"])
    line = against(f"{len(SYSTEMS)} systems on {len(questions)} questions", total(ours), total(theirs), 3)
    return Findings(
        [line],
        [
            f"Questions of {work.name}. Ours includes retrieval and the check of each answer; the peer is given the prompts.",
            "transformers cannot constrain decoding: its fourth call is free, and cut to as many tokens as ours wrote.",
            f"Tokens written in all: ours {tokens['ours']}, transformers {tokens['peer']}.",
        ],
    )
