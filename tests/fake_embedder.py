"""A cheap embedder for tests of the index: a text's vector comes from a hash of the text."""

import hashlib

import numpy as np


class FakeEmbedder:
    id = "fake"
    dimensions = 384

    def __init__(self):
        self.embedded = []

    def embed(self, texts):
        self.embedded += texts
        seeds = [int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big") for text in texts]
        vectors = np.stack([np.random.default_rng(seed).normal(size=self.dimensions) for seed in seeds])
        return (vectors / np.linalg.norm(vectors, axis=1, keepdims=True)).astype(np.float32)
