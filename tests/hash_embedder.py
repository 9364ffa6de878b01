"""A stand-in for the embedding model where a test is about the index and not about meaning: a text's vector is its hash."""

import hashlib
from collections.abc import Sequence

import numpy as np


class HashEmbedder:
    """Deterministic vectors of length one, in microseconds; remembers what it embedded."""

    dimensions = 384

    def __init__(self, id: str = "hash"):
        self.id = id
        self.embedded: list[str] = []

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """(N texts) -> (N, 384) float32."""
        self.embedded += texts
        digests = [hashlib.shake_128(text.encode()).digest(self.dimensions) for text in texts]
        vectors = np.frombuffer(b"".join(digests), np.uint8).reshape(len(texts), -1).astype(np.float32) - 127.5
        return vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
