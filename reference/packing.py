"""Packing: the examples of a step in one row of tokens without padding, with the beginning that they share computed once.

Attention grouped by that prefix gives each example exactly what it would see alone.

Shapes: T tokens in all, B examples, N own tokens of the longest, P tokens of the prefix, H heads, D dimensions a head.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

IGNORED = -100


@dataclass(frozen=True)
class Lesson:
    """Examples with one shared prefix, as one row of tokens without padding: prefix, first example, second example, …"""

    tokens: Tensor  # (1, T)
    positions: Tensor  # (1, T): each example's go on where the prefix ends
    targets: Tensor  # (T): the next token where there is a loss, otherwise IGNORED
    prefix: int  # P
    place: Tensor  # (B, N): where each example's tokens stand in the row; 0 beyond its end
    own: Tensor  # (B, N) bool: which of them are real
    mask: Tensor  # (B, 1, N, P + N) bool: the prefix, and what is before in the same example
    spans: list[tuple[int, int]]  # where in the row the prefix and each example stand

    @classmethod
    def of(cls, prefix: Sequence[int], examples: Sequence[tuple[Sequence[int], Sequence[int]]]) -> Lesson:
        """From (prompt tokens, answer tokens) of each example. The loss is on the answers only."""
        P = len(prefix)
        tokens, positions, targets = list(prefix), list(range(P)), [IGNORED] * P
        spans = [(0, P)] if P else []
        lengths = [len(prompt) + len(answer) for prompt, answer in examples]
        N = max(lengths)
        place = torch.zeros(len(examples), N, dtype=torch.long)
        for row, (prompt, answer) in enumerate(examples):
            place[row, : lengths[row]] = torch.arange(len(tokens), len(tokens) + lengths[row])
            spans.append((len(tokens), len(tokens) + lengths[row]))
            tokens += [*prompt, *answer]
            positions += range(P, P + lengths[row])
            targets += [IGNORED] * (len(prompt) - 1) + list(answer) + [IGNORED]
        before = torch.ones(N, N, dtype=torch.bool).tril()
        mask = torch.cat([torch.ones(N, P, dtype=torch.bool), before], 1).expand(len(examples), 1, N, P + N)
        own = torch.arange(N) < torch.tensor(lengths)[:, None]
        return cls(torch.tensor([tokens]), torch.tensor([positions]), torch.tensor(targets), P, place, own, mask, spans)

    @property
    def answer_tokens(self) -> int:
        return int((self.targets != IGNORED).sum())

    def to(self, device) -> Lesson:
        return Lesson(**{name: v.to(device) if isinstance(v, Tensor) else v for name, v in vars(self).items()})


def lesson_attention(module, query, key, value, attention_mask, scaling, lesson: Lesson | None = None, **_):
    """Attention in the form of transformers' AttentionInterface: (1, H, T, D) in, (1, T, H, D) out."""
    P, (_, heads, _, D) = lesson.prefix, query.shape
    H = key.shape[1]
    group = heads // H

    def rows(x: Tensor) -> Tensor:  # (1, H, T, D) -> (B, H, N, D)
        return x[0].transpose(0, 1)[lesson.place].transpose(1, 2)

    def attend(
        q: Tensor, k: Tensor, v: Tensor, mask: Tensor
    ) -> Tensor:  # query heads of one key head are stacked as more queries
        B, _, N, _ = q.shape
        stacked = q.reshape(B, H, group * N, D)
        many = mask.expand(B, group, N, -1).reshape(B, 1, group * N, -1)
        return F.scaled_dot_product_attention(stacked, k, v, attn_mask=many, scale=scaling).reshape(B, heads, N, D)

    B = len(lesson.place)
    keys = torch.cat([key[:, :, :P].expand(B, -1, -1, -1), rows(key)], 2)
    values = torch.cat([value[:, :, :P].expand(B, -1, -1, -1), rows(value)], 2)
    own = attend(rows(query), keys, values, lesson.mask).transpose(1, 2)[lesson.own]  # (T - P, heads, D)
    before = torch.ones(1, 1, P, P, dtype=torch.bool, device=query.device).tril()
    prefix = attend(query[:, :, :P], key[:, :, :P], value[:, :, :P], before)[0].transpose(0, 1)  # (P, heads, D)
    return torch.cat([prefix, own])[None], None


def plain_loss(network: nn.Module, lesson: Lesson) -> Tensor:
    """The summed cross entropy of a lesson's answer tokens, by PEFT and PyTorch; logits are computed at those tokens only."""
    causal = network.base_model.model  # the causal language model inside
    nothing = torch.zeros(1, 1, 1, 1, device=lesson.tokens.device)  # the lesson carries its own mask
    hidden = causal.model(lesson.tokens, attention_mask=nothing, position_ids=lesson.positions, use_cache=False, lesson=lesson)
    chosen = lesson.targets != IGNORED
    logits = causal.lm_head(hidden.last_hidden_state[0, chosen])
    return F.cross_entropy(logits.float(), lesson.targets[chosen], reduction="sum")
