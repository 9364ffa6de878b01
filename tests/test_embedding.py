"""Texts become points."""

import asyncio
import random

import numpy as np
import pytest

from reference.embedding import BATCH, LONGEST, load_embedder

TEXTS = [
    "The Maré Duo rents at €172 per month.",
    "What does it cost to rent the two-group machine?",
    "",
    "?",
    "A rental may be paused for two months a year. " * 12,
    *(f"Sentence number {n} has {'very ' * (n % 7)}many words." for n in range(BATCH + 3)),
]


@pytest.fixture(scope="module")
def vectors(embedder):
    return embedder.embed(TEXTS)


def test_every_vector_has_length_one(embedder, vectors):
    assert vectors.shape == (len(TEXTS), embedder.dimensions)
    assert vectors.dtype == np.float32
    assert np.linalg.norm(vectors, axis=1) == pytest.approx(np.ones(len(TEXTS)), abs=1e-5)


def test_a_vector_does_not_depend_on_the_order_of_its_batch_or_on_its_neighbours(embedder, vectors):
    order = random.Random(7).sample(range(len(TEXTS)), len(TEXTS))
    np.testing.assert_allclose(embedder.embed([TEXTS[i] for i in order]), vectors[order], atol=1e-5)
    for i in (0, 2, 4, len(TEXTS) - 1):
        np.testing.assert_allclose(embedder.embed([TEXTS[i]])[0], vectors[i], atol=1e-5)


def test_the_same_texts_give_the_very_same_vectors_again(embedder, vectors):
    assert (embedder.embed(TEXTS) == vectors).all()


def test_near_meaning_is_near_and_other_meaning_is_far(embedder):
    price, same, other = embedder.embed(["How much is the Duo a month?", "monthly rent of the Duo", "Who painted this wall?"])
    assert price @ same > 0.5 > 0.3 > price @ other


def test_what_stands_beyond_the_longest_text_is_not_read(embedder):
    long = "word " * (LONGEST + 50)
    one, other, short = embedder.embed([long + "apples", long + "submarines", "word " * 10 + "submarines"])
    np.testing.assert_allclose(one, other, atol=1e-5)
    assert abs(one - short).max() > 1e-2


def test_no_texts_give_no_vectors(embedder):
    assert embedder.embed([]).shape == (0, embedder.dimensions)


def test_the_llama_index_interface_gives_the_same_vectors(embedder, vectors):
    interface = embedder.as_llama_index()
    assert interface.model_name == embedder.id
    np.testing.assert_allclose(interface.get_text_embedding(TEXTS[0]), vectors[0], atol=1e-5)
    np.testing.assert_allclose(interface.get_query_embedding(TEXTS[1]), vectors[1], atol=1e-5)
    np.testing.assert_allclose(asyncio.run(interface.aget_query_embedding(TEXTS[1])), vectors[1], atol=1e-5)
    np.testing.assert_allclose(interface.get_text_embedding_batch(TEXTS[:5]), vectors[:5], atol=1e-5)


def test_the_model_is_loaded_once_a_process_and_has_an_id(embedder):
    assert load_embedder() is embedder
    assert embedder.id
