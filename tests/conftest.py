"""What several test files share: the second company's corpus, the models, a tiny language model."""

from pathlib import Path

import pytest
import torch

from reference.corpus import Corpus, load_facts, load_questions

HARBOUR = Path(__file__).parent / "corpora" / "harbour"


@pytest.fixture(scope="session")
def harbour() -> Corpus:
    return Corpus.load(HARBOUR / "corpus")


@pytest.fixture(scope="session")
def harbour_questions():
    return load_questions(HARBOUR / "questions.jsonl")


@pytest.fixture(scope="session")
def harbour_facts():
    return load_facts(HARBOUR / "facts.jsonl")


@pytest.fixture(scope="session")
def embedder():
    from reference.embedding import load_embedder

    return load_embedder()


@pytest.fixture(scope="session")
def harbour_index(harbour, embedder, tmp_path_factory):
    from reference.index import Index

    index = Index(tmp_path_factory.mktemp("harbour") / "index", embedder)
    index.refresh(harbour)
    return index


@pytest.fixture(scope="session")
def model():
    """The real language model."""
    from reference.model import LanguageModel

    return LanguageModel.load()


@pytest.fixture(scope="session")
def tiny_model(model):
    """Two random layers behind the real tokenizer: the real generation code in milliseconds."""
    from transformers import LlamaConfig, LlamaForCausalLM

    from reference.model import LanguageModel

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=model.network.config.vocab_size,
        hidden_size=48,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=6,
        num_key_value_heads=2,
        max_position_embeddings=2048,
        eos_token_id=2,
        attn_implementation="grouped",
    )
    return LanguageModel(LlamaForCausalLM(config), model.tokenizer, "tiny")


@pytest.fixture(scope="session")
def tiny_base(tiny_model, tmp_path_factory):
    """The tiny model as a folder, such as REFERENCE_MODEL may name."""
    folder = tmp_path_factory.mktemp("tiny-base")
    tiny_model.network.save_pretrained(folder)
    tiny_model.tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def tiny(tiny_base, monkeypatch):
    """Lessons and models of this test are about the tiny base."""
    monkeypatch.setenv("REFERENCE_MODEL", str(tiny_base))
    monkeypatch.setattr("reference.tuning.faster_dtype", lambda: torch.float32)
    return tiny_base
