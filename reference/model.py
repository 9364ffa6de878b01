"""The language model: tokens in, tokens out, greedy and fast on a laptop's CPU.

Generation is our own loop around any `transformers` causal model. It gives the tokens that `generate` would give, sooner:

- a prompt's shared beginning (instructions, examples) is computed once and kept;
- the continuation is guessed from the text so far and several guessed tokens are checked in one pass (prompt lookup
  decoding, Saxena 2023; exact for greedy decoding because only tokens that the model itself would choose are kept);
- several prompts decode as one batch, each row at its own position.

Shapes: B rows, Q new tokens a row, L positions in the cache, H key-value heads, D dimensions a head, V vocabulary.
"""

from __future__ import annotations

import time
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from reference import weights
from reference.adapters import Card, read_card

LONGEST_DRAFT = 16  # guessed tokens checked in one pass
NGRAM = 3  # tokens that must match for a guess
REMEMBERED_PREFIXES = 8


@contextmanager
def quiet() -> Iterator[None]:
    """Without the warning that PEFT asks transformers for something by an old name."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


@dataclass(frozen=True)
class Prompt:
    """What the model reads: chat text in two pieces. `shared` ends where prompts begin to differ, at a special token.

    `constraint` makes a `Constraint` that limits which tokens may come. `adapter` is the id of a loaded adapter.
    """

    shared: str
    own: str
    constraint: Callable[[], Constraint] | None = None
    adapter: str | None = None


@dataclass
class Generation:
    """What the model wrote. Seconds count from the start of the call, so in a batch they include the others' work."""

    text: str
    tokens: list[int]
    tokens_in: int
    first_token_seconds: float
    seconds: float
    finished: bool  # the model ended by itself; False: cut at the limit


def grouped_attention(module, query, key, value, attention_mask, scaling, **_):
    """Attention in which the query heads of one key-value head are stacked as more queries, so that keys and values
    are never copied (grouped-query attention, Ainslie et al. 2023). The form is that of transformers' AttentionInterface."""
    B, heads, Q, D = query.shape
    H = key.shape[1]
    stacked = query.reshape(B, H, heads // H * Q, D)
    mask = attention_mask.expand(B, heads // H, Q, -1).reshape(B, 1, heads // H * Q, -1)
    out = F.scaled_dot_product_attention(stacked, key, value, attn_mask=mask, scale=scaling)
    return out.reshape(B, heads, Q, D).transpose(1, 2), None


class Cache:
    """Keys and values per layer, (B, H, capacity, D), in which each row writes at its own positions.

    A rejected guess is not removed: the row's next write covers it, and the mask hides it until then.
    """

    def __init__(self, capacity: int):
        self.capacity = capacity
        self.keys: list[Tensor] = []
        self.values: list[Tensor] = []
        self.positions: Tensor | None = None  # (B, Q): where the coming pass writes

    def update(self, keys: Tensor, values: Tensor, layer: int, *_, **__) -> tuple[Tensor, Tensor]:
        """Called by the attention of each layer with (B, H, Q, D); returns all that the row may look at."""
        B, H, Q, D = keys.shape
        if layer == len(self.keys):
            self.keys.append(keys.new_zeros(B, H, self.capacity, D))
            self.values.append(values.new_zeros(B, H, self.capacity, D))
        length = self.length
        for kept, new in ((self.keys[layer], keys), (self.values[layer], values)):
            if B == 1:
                kept[:, :, self.start : self.start + Q] = new
            else:
                kept[torch.arange(B)[:, None], :, self.positions] = new.transpose(1, 2)
        return self.keys[layer][:, :, :length], self.values[layer][:, :, :length]

    def move_to(self, positions: Tensor) -> None:
        self.positions, self.start = positions, int(positions[0, 0])
        self.length = int(positions.max()) + 1

    def get_seq_length(self, *_) -> int:
        return 0 if self.positions is None else self.length

    def keep_rows(self, rows: list[int]) -> None:
        self.keys = [k[rows] for k in self.keys]
        self.values = [v[rows] for v in self.values]

    @classmethod
    def stack(cls, caches: Sequence[Cache], capacity: int) -> Cache:
        """One batch of single-row caches."""
        batch = cls(capacity)
        for layer in range(len(caches[0].keys)):
            for mine, theirs in ((batch.keys, "keys"), (batch.values, "values")):
                rows = [getattr(c, theirs)[layer][:, :, : c.length] for c in caches]
                mine.append(torch.cat([F.pad(row, (0, 0, 0, capacity - row.shape[2])) for row in rows]))
        return batch


class Drafter:
    """Guesses a row's next tokens: what followed the last time when the same few tokens stood there."""

    def __init__(self, tokens: Sequence[int]):
        self.tokens: list[int] = []
        self.follows: dict[tuple[int, ...], int] = {}  # n-gram -> index just behind its latest place
        self.length = 4
        self.extend(tokens)

    def extend(self, tokens: Sequence[int]) -> None:
        for token in tokens:
            if len(self.tokens) >= NGRAM:
                self.follows[tuple(self.tokens[-NGRAM:])] = len(self.tokens)
            self.tokens.append(token)

    def guess(self) -> list[int]:
        place = self.follows.get(tuple(self.tokens[-NGRAM:]))
        return [] if place is None else self.tokens[place : place + self.length]

    def learn(self, guessed: int, right: int) -> None:
        """Guess more after a guess that was all right, less after one that was not."""
        if guessed:
            self.length = min(2 * self.length, LONGEST_DRAFT) if right == guessed else max(2, right + 1)


class LanguageModel:
    """A causal language model and its tokenizer. `id` names the exact weights."""

    def __init__(self, network, tokenizer, id: str):
        self.network = network.eval()
        self.tokenizer = tokenizer
        self.id = id
        ends = network.generation_config.eos_token_id
        self.end_tokens = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
        self.control_tokens = [str(t) for t in tokenizer.added_tokens_decoder.values() if t.special]
        self.prefixes: OrderedDict[tuple[str | None, str], tuple[list[int], Cache]] = OrderedDict()
        self.adapters: dict[str, Card] = {}

    @classmethod
    def load(cls, dtype: torch.dtype = torch.float32) -> LanguageModel:
        """The model that `weights.language_model` names. fp32 gives the same words on every CPU; bfloat16 is faster where
        the CPU has matrix instructions, and may differ in a word. Raises WeightsError."""
        from transformers import AttentionInterface, AutoModelForCausalLM, AutoTokenizer
        from transformers.utils import logging

        logging.disable_progress_bar()
        AttentionInterface.register("grouped", grouped_attention)
        place, id = weights.language_model()
        try:
            network = AutoModelForCausalLM.from_pretrained(place, dtype=dtype, attn_implementation="grouped")
            return cls(network, AutoTokenizer.from_pretrained(place), id)
        except OSError as error:
            raise weights.cannot_load(place, "REFERENCE_MODEL", error) from None

    def load_adapter(self, folder: str | Path) -> str:
        """Make an adapter available to prompts, by PEFT; the base and other adapters stay as they are. Returns its id: the
        name with the start of its weights' sha256. Loading it again does nothing.

        Raises AdapterError: no card, damaged weights, or trained on another base.
        """
        from peft import PeftModel

        card = read_card(folder, self.id)
        if card.id not in self.adapters:
            with quiet():
                if self.adapters:
                    self.network.load_adapter(folder, card.id)
                else:
                    self.network = PeftModel.from_pretrained(self.network, folder, adapter_name=card.id)
            self.network.eval()
            self.adapters[card.id] = card
        return card.id

    def chat(self, messages: list[dict[str, str]]) -> Prompt:
        """The model's chat format for `messages` (role, content); the last one is the part of its own.

        Text that looks like one of the model's own control tokens is broken up: content can never end a turn.
        """
        messages = [message | {"content": self.harmless(message["content"])} for message in messages]
        *shared, _ = messages
        whole = self.tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        head = self.tokenizer.apply_chat_template(shared, tokenize=False) if shared else ""
        if not whole.startswith(head):
            head = ""  # a template that is not a plain concatenation shares nothing
        return Prompt(head, whole[len(head) :])

    def harmless(self, content: str) -> str:
        """The text with every control token of the model broken up."""
        for token in self.control_tokens:
            content = content.replace(token, f"{token[0]} {token[1:]}")
        return content

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text, add_special_tokens=False)

    @torch.inference_mode()
    def generate(
        self,
        prompts: Sequence[Prompt],
        max_new_tokens: int = 128,
        on_token: Callable[[int, str], None] | None = None,
    ) -> list[Generation]:
        """Greedy continuations of the prompts, as one batch.

        `on_token(row, text so far)` is called whenever a row has grown. Raises ValueError when a prompt and its answer exceed
        the model's context.
        """
        start = time.perf_counter()
        if unknown := {prompt.adapter for prompt in prompts} - {None, *self.adapters}:
            raise ValueError(f"no adapter {min(unknown)!r} is loaded; there are {', '.join(self.adapters) or 'none'}")
        read: dict[tuple, tuple] = {}  # systems that show the same model the same text share its prefill
        rows = []
        for index, prompt in enumerate(prompts):
            key = prompt.adapter, prompt.shared, prompt.own
            if key not in read:
                read[key] = self._read(prompt, max_new_tokens)
            tokens, cache, logits = read[key]
            constraint = prompt.constraint() if prompt.constraint else None
            row = Row(index, prompt.adapter, cache, Drafter(tokens), len(tokens), self.end_tokens, constraint)
            row.accept([], logits)
            row.first_token_seconds = time.perf_counter() - start
            rows.append(row)
        for row in rows if on_token else ():
            on_token(row.index, self.text(row.tokens))
        active = rows
        cache: Cache | None = None
        while True:
            finished = [row for row in active if row.finished or len(row.tokens) >= max_new_tokens]
            for row in finished:
                row.seconds = time.perf_counter() - start
            staying = [i for i, row in enumerate(active) if row not in finished]
            if not staying:
                break
            if cache is None:
                active = [active[i] for i in staying]
                cache = Cache.stack([row.cache for row in active], max(row.cache.capacity for row in active))
            elif finished:
                cache.keep_rows(staying)
                active = [active[i] for i in staying]
            self._step(active, cache, max_new_tokens)
            if on_token:
                for row in active:
                    on_token(row.index, self.text(row.tokens))
        return [row.generation(self.text(row.tokens)) for row in rows]

    @torch.inference_mode()
    def surprise(self, prompt: Prompt, answer: str) -> tuple[float, int]:
        """How improbable an answer and its end are: summed negative log-probability in nats, and the number of tokens."""
        said = self.encode(answer + self.tokenizer.eos_token)
        tokens, cache, first = self._read(prompt, len(said))
        positions = torch.arange(len(tokens), len(tokens) + len(said) - 1)[None]
        rest = self._forward(torch.tensor([said[:-1]]), positions, cache, [prompt.adapter], keep=len(said) - 1)
        logits = torch.cat([first, rest[0]]).float()
        return F.cross_entropy(logits, torch.tensor(said), reduction="sum").item(), len(said)

    def text(self, tokens: Sequence[int]) -> str:
        """The text of generated tokens, without the end token."""
        return self.tokenizer.decode([t for t in tokens if t not in self.end_tokens])

    def _read(self, prompt: Prompt, max_new_tokens: int) -> tuple[list[int], Cache, Tensor]:
        """Prefill one prompt on its remembered shared beginning: tokens, cache, the next token's logits (1, V)."""
        head, remembered = self._prefix(prompt.adapter, prompt.shared)
        own = self.encode(prompt.own)
        length = len(head) + len(own)
        capacity = length + max_new_tokens + LONGEST_DRAFT + 1
        limit = self.network.config.max_position_embeddings
        if capacity > limit:
            raise ValueError(f"the prompt is {length} tokens long; this model reads {limit} with its answer: shorten it")
        cache = Cache(capacity)
        if remembered:
            cache = Cache.stack([remembered], capacity)
        logits = self._forward(torch.tensor([own]), torch.arange(len(head), length)[None], cache, [prompt.adapter], keep=1)
        return head + own, cache, logits[0]

    def _prefix(self, adapter: str | None, shared: str) -> tuple[list[int], Cache | None]:
        """Tokens, keys and values of a shared beginning; the most recently used few are kept."""
        if not shared:
            return [], None
        key = adapter, shared
        if key not in self.prefixes:
            tokens = self.encode(shared)
            cache = Cache(len(tokens))
            self._forward(torch.tensor([tokens]), torch.arange(len(tokens))[None], cache, [adapter], keep=1)
            self.prefixes[key] = tokens, cache
            if len(self.prefixes) > REMEMBERED_PREFIXES:
                self.prefixes.popitem(last=False)
        self.prefixes.move_to_end(key)
        return self.prefixes[key]

    def _step(self, rows: list[Row], cache: Cache, max_new_tokens: int) -> None:
        """One pass: each row's last token and its guess go in; the guess's right beginning and one more token come out."""
        longest = max(1, LONGEST_DRAFT // len(rows))  # the other rows are padded to the longest guess
        drafts = [row.draft()[: min(longest, max_new_tokens - len(row.tokens) - 1)] for row in rows]
        Q = 1 + max(map(len, drafts))
        inputs = torch.zeros(len(rows), Q, dtype=torch.long)
        for i, (row, draft) in enumerate(zip(rows, drafts, strict=True)):
            inputs[i, : 1 + len(draft)] = torch.tensor([row.tokens[-1], *draft])
        starts = torch.tensor([row.tokens_in + len(row.tokens) - 1 for row in rows])
        logits = self._forward(inputs, starts[:, None] + torch.arange(Q), cache, [row.adapter for row in rows], keep=Q)
        for row, draft, row_logits in zip(rows, drafts, logits, strict=True):
            row.accept(draft, row_logits)

    def _forward(self, tokens: Tensor, positions: Tensor, cache: Cache, adapters: list[str | None], keep: int) -> Tensor:
        """Logits (B, keep, V) of the last `keep` tokens. tokens, positions: (B, Q); adapters: of each row."""
        cache.move_to(positions)
        mask = torch.arange(cache.length) <= positions[:, None, :, None]  # (B, 1, Q, L): a token sees itself and what is before
        which = {}
        if len(set(adapters)) == 1 and adapters[0]:  # one adapter for all rows: cheaper than PEFT's row by row
            if self.network.active_adapter != adapters[0]:
                self.network.set_adapter(adapters[0])
        elif self.adapters:
            which = {"adapter_names": [name or "__base__" for name in adapters]}
        out = self.network(
            tokens,
            attention_mask=mask,
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
            logits_to_keep=keep,
            **which,
        )
        return out.logits


@dataclass
class Row:
    """One prompt being continued."""

    index: int
    adapter: str | None
    cache: Cache
    drafter: Drafter
    tokens_in: int
    end_tokens: set[int]
    constraint: Constraint | None = None
    tokens: list[int] = field(default_factory=list)
    finished: bool = False
    first_token_seconds: float = 0.0
    seconds: float = 0.0

    def draft(self) -> list[int]:
        forced = self.constraint.forced() if self.constraint else []
        return forced or self.drafter.guess()

    def accept(self, draft: list[int], logits: Tensor) -> None:
        """Keep the guess as far as the model agrees, and the model's own next token. logits: (≥ 1 + len(draft), V)."""
        chosen: list[int] = []
        plain = None if self.constraint else logits.argmax(-1).tolist()
        for place in range(len(draft) + 1):
            token = plain[place] if plain else self.constraint.choose(logits[place])
            chosen.append(token)
            if token in self.end_tokens:
                self.finished = True
                break
            if place == len(draft) or token != draft[place]:
                break
        self.drafter.learn(len(draft), len(chosen) - 1)
        self.drafter.extend(chosen)
        self.tokens += chosen

    def generation(self, text: str) -> Generation:
        return Generation(text, self.tokens, self.tokens_in, self.first_token_seconds, self.seconds, self.finished)


class Constraint:
    """Constrained decoding by the llguidance library: only tokens that keep the text inside a JSON schema may come."""

    def __init__(self, tokenizer, grammar: str):
        import llguidance
        import llguidance.numpy

        self.matcher = llguidance.LLMatcher(tokenizer, grammar)
        self.bits = llguidance.numpy.allocate_token_bitmask(1, tokenizer.vocab_size)

    def forced(self) -> list[int]:
        """Tokens that must come next whatever the model thinks."""
        return self.matcher.compute_ff_tokens()

    def choose(self, logits: Tensor) -> int:
        """The likeliest allowed token, (V,) -> int; the constraint moves on with it. (llguidance's own masking of torch tensors
        compiles C++ code, for which a laptop may have no compiler.)"""
        from llguidance.numpy import fill_next_token_bitmask

        fill_next_token_bitmask(self.matcher, self.bits)
        allowed = np.unpackbits(self.bits.view(np.uint8), bitorder="little")[: len(logits)]
        token = int(logits.masked_fill(torch.from_numpy(allowed == 0), -torch.inf).argmax())
        self.matcher.consume_token(token)
        return token


def json_constraint(model: LanguageModel, schema: dict) -> Callable[[], Constraint]:
    """A maker of constraints for a `Prompt`: text that is one JSON object of the schema, `", "` and `": "` between."""
    import llguidance
    import llguidance.hf

    if not hasattr(model, "guidance_tokenizer"):
        model.guidance_tokenizer = llguidance.hf.from_tokenizer(model.tokenizer)
    spacing = {"whitespace_flexible": False, "item_separator": ", ", "key_separator": ": "}
    grammar = llguidance.LLMatcher.grammar_from_json_schema(schema, defaults=spacing)
    return lambda: Constraint(model.guidance_tokenizer, grammar)
