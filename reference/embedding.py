"""Embeddings: a text becomes a point, and texts of near meaning become near points (Reimers and Gurevych 2019)."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import torch
from llama_index.core.base.embeddings.base import BaseEmbedding

from reference import weights

BATCH = 32
LONGEST = 256  # tokens; the model was trained on texts of at most that length


class Embedder:
    """A sentence encoder: mean of the last hidden states, scaled to length one. `id` names the exact weights."""

    def __init__(self, network, tokenizer, id: str):
        self.network = network.eval()
        self.tokenizer = tokenizer
        self.id = id
        self.dimensions: int = network.config.hidden_size

    @torch.inference_mode()
    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(N texts) -> (N, D) float32, each row of length one, so that a dot product is a cosine."""
        vectors = np.zeros((len(texts), self.dimensions), np.float32)
        by_length = sorted(range(len(texts)), key=lambda i: len(texts[i]))
        for start in range(0, len(texts), BATCH):
            rows = by_length[start : start + BATCH]
            inputs = self.tokenizer(
                [texts[i] for i in rows], padding=True, truncation=True, max_length=LONGEST, return_tensors="pt"
            )
            hidden = self.network(**inputs).last_hidden_state  # (B, L, D)
            mask = inputs["attention_mask"][..., None].float()
            mean = (hidden * mask).sum(1) / mask.sum(1)
            vectors[rows] = torch.nn.functional.normalize(mean, dim=-1).numpy()
        return vectors

    def as_llama_index(self) -> BaseEmbedding:
        """The same encoder behind LlamaIndex's interface."""
        return LlamaIndexEmbedding(self)


class LlamaIndexEmbedding(BaseEmbedding):
    """LlamaIndex's embedding interface over an `Embedder`."""

    def __init__(self, embedder: Embedder):
        super().__init__(model_name=embedder.id)
        self._embedder = embedder

    def _get_text_embedding(self, text: str) -> list[float]:
        return self._embedder.embed([text])[0].tolist()

    def _get_text_embeddings(self, texts: list[str]) -> list[list[float]]:
        return self._embedder.embed(texts).tolist()

    def _get_query_embedding(self, query: str) -> list[float]:
        return self._get_text_embedding(query)

    async def _aget_query_embedding(self, query: str) -> list[float]:
        return self._get_query_embedding(query)


@functools.cache
def load_embedder() -> Embedder:
    """The embedding model that `weights.embedder` names, loaded once a process. Raises WeightsError."""
    from transformers import AutoModel, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    place, id = weights.embedder()
    try:
        return Embedder(AutoModel.from_pretrained(place, dtype=torch.float32), AutoTokenizer.from_pretrained(place), id)
    except OSError as error:
        raise weights.cannot_load(place, "REFERENCE_EMBEDDER", error) from None
