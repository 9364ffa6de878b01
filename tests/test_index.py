"""Versions, refreshes that may be killed, and roll back."""

import random
import signal
import subprocess
import sys
import time
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from fake_embedder import FakeEmbedder

from reference.chunks import chunk_corpus
from reference.corpus import Corpus, CorpusError
from reference.index import Index

DAY = date(2026, 12, 1)
KILLS = 50


def before_the_release(corpus):
    return Corpus(tuple(d for d in corpus if d.effective < corpus.releases[-1]))


def texts(corpus):
    return {node.text for node in chunk_corpus(corpus)}


def test_a_refresh_embeds_only_text_that_it_has_not_seen(harbour, tmp_path):
    embedder = FakeEmbedder()
    index = Index(tmp_path / "index", embedder)
    old = before_the_release(harbour)
    first = index.refresh(old)
    assert (first.embedded, first.kept) == (len(texts(old)), 0)
    embedder.embedded.clear()
    second = index.refresh(harbour)
    assert set(embedder.embedded) == texts(harbour) - texts(old)
    assert second.embedded == len(embedder.embedded) > 0
    assert index.refresh(harbour).embedded == 0


def test_a_changed_role_or_day_is_published_without_embedding_anything(harbour, tmp_path):
    index = Index(tmp_path / "index", FakeEmbedder())
    index.refresh(harbour)
    closed = Corpus(tuple(replace(d, roles=("owner",)) for d in harbour))
    assert index.refresh(closed).embedded == 0
    assert {role for node in index.nodes() for role in node.metadata["roles"]} == {"owner"}


def test_roll_back_serves_the_version_before_and_stays_until_the_documents_change(harbour, tmp_path, monkeypatch):
    monkeypatch.setenv("REFERENCE_CACHE", str(tmp_path))
    folder, embedder, old = tmp_path / "corpus", FakeEmbedder(), before_the_release(harbour)
    first = Index.of(folder, old, embedder).version
    index = Index.of(folder, harbour, embedder)
    assert index.version > first
    assert index.roll_back() == first
    assert index.corpus_hash == old.hash
    assert Index.of(folder, harbour, embedder).version == first
    index.refresh(harbour)
    assert index.corpus_hash == harbour.hash
    assert index.at_version(first).corpus_hash == old.hash


def test_a_version_that_never_was_cannot_be_served(harbour, tmp_path):
    index = Index(tmp_path / "index", FakeEmbedder())
    index.refresh(harbour)
    for wrong in (lambda: index.roll_back(), lambda: index.roll_back(999), lambda: index.at_version(999)):
        with pytest.raises(CorpusError):
            wrong()


def test_a_refresh_that_fails_leaves_the_old_version_serving(harbour, tmp_path):
    index = Index(tmp_path / "index", FakeEmbedder())
    index.refresh(before_the_release(harbour))
    served = index.version

    def fail(texts):
        raise RuntimeError("power cut")

    index.embedder.embed = fail
    with pytest.raises(RuntimeError):
        index.refresh(harbour)
    assert Index(tmp_path / "index", FakeEmbedder()).version == served


def test_a_damaged_index_is_one_clear_line(harbour, tmp_path):
    index = Index(tmp_path / "index", FakeEmbedder())
    index.refresh(harbour)
    for path in (tmp_path / "index").rglob("*"):
        if path.is_file():
            path.write_bytes(b"not an index")
    with pytest.raises(CorpusError, match="delete that folder") as error:
        Index(tmp_path / "index", FakeEmbedder()).dense("fee", "all", DAY, 3)
    assert "\n" not in str(error.value)


REFRESH = """
import sys
sys.path.insert(0, sys.argv[1])
from fake_embedder import FakeEmbedder
from reference.corpus import Corpus
from reference.index import Index
corpus = Corpus.load(sys.argv[2])
if sys.argv[4] == "old":
    corpus = Corpus(tuple(d for d in corpus if d.effective < corpus.releases[-1]))
index = Index(sys.argv[3], FakeEmbedder())
print("ready", flush=True)
for _ in range(int(sys.argv[5])):
    index.refresh(corpus)
print("done", flush=True)
"""


def start_refresh(folder, which="new", times=1):
    here = Path(__file__).parent
    arguments = [here, here / "corpora" / "harbour" / "corpus", folder, which, times]
    return subprocess.Popen([sys.executable, "-c", REFRESH, *map(str, arguments)], stdout=subprocess.PIPE, text=True)


def is_whole(index, corpora):
    """The served version is exactly one of the corpora, and can be searched both ways."""
    [corpus] = [c for c in corpora if c.hash == index.corpus_hash]
    nodes = index.nodes()
    assert {n.text for n in nodes} == texts(corpus)
    assert len(index.dense("what is the fee", "owner", DAY, 5)) == 5
    assert index.keyword("rental", "owner", DAY, 5)
    return corpus


def test_a_refresh_killed_at_fifty_random_points_leaves_a_whole_version_serving(harbour, tmp_path):
    """SIGKILL at points spread over the measured time of refreshing: each time a whole version serves, and work goes on."""
    folder, old = tmp_path / "index", before_the_release(harbour)
    index = Index(folder, FakeEmbedder())
    index.refresh(old)
    start = time.monotonic()
    index.refresh(harbour)
    duration = time.monotonic() - start
    rng, corpora = random.Random(0), [old, harbour]
    for _ in range(KILLS):
        process = start_refresh(folder, "new", times=1000)
        assert process.stdout.readline() == "ready\n"
        time.sleep(rng.uniform(0, 3 * duration))
        assert process.poll() is None
        process.send_signal(signal.SIGKILL)
        process.wait()
        process.stdout.close()
        assert is_whole(Index(folder, FakeEmbedder()), corpora).hash in (old.hash, harbour.hash)
    index = Index(folder, FakeEmbedder())
    index.refresh(harbour)
    assert is_whole(index, corpora) is harbour


def test_two_processes_may_refresh_at_once(harbour, tmp_path):
    both = [start_refresh(tmp_path / "index", which, times=3) for which in ("old", "new")]
    assert ["done" in process.communicate()[0] for process in both] == [True, True]
    is_whole(Index(tmp_path / "index", FakeEmbedder()), [before_the_release(harbour), harbour])
