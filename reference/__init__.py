"""RAG or fine-tuning, or both? The package behind the notebooks: small modules, each named after one concept.

Read them in the order that data flows: text, corpus, weights, adapters, model, chunks, embedding, index, retrieval, answer,
system, evaluation, packing, lora, tuning, leads, voice, lessons, claims, doctor. Each imports only those above it. Heavy
libraries load on first use, so `import reference` is quick.
"""

import os
from pathlib import Path

_model = os.environ.get("REFERENCE_MODEL", "")
_embedder = os.environ.get("REFERENCE_EMBEDDER", "")
if all(not name or Path(name).expanduser().is_dir() for name in (_model, _embedder)):
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # offline, unless a swap names a model on the hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
