"""Versions, refreshes that may be killed, and roll back."""

import json
import subprocess
import sys
from dataclasses import replace
from datetime import date
from pathlib import Path

import pytest
from fake_embedder import FakeEmbedder

from reference.chunks import chunk_corpus
from reference.corpus import Corpus, CorpusError, Document
from reference.index import Index

HERE = Path(__file__).parent
DAY = date(2026, 12, 1)
QUESTION = "What does the rental of a Maré Duo cost per month?"
KILLS = 50


def before_the_release(corpus):
    return Corpus(tuple(d for d in corpus if d.effective < corpus.releases[-1]))


@pytest.fixture(scope="module")
def old(harbour):
    return before_the_release(harbour)


@pytest.fixture
def index(old, tmp_path):
    """An index that serves the corpus as it was before its release."""
    index = Index(tmp_path / "index", FakeEmbedder())
    index.refresh(old)
    index.embedder.embedded.clear()
    return index


def texts(corpus):
    return {node.text for node in chunk_corpus(corpus)}


def hits(found):
    return [(hit.node.id_, round(hit.score, 5)) for hit in found]


def served(index):
    """All that a reader can get: every chunk, and what both searches find."""
    nodes = [(node.id_, node.text, node.metadata) for node in index.nodes()]
    return len(index), nodes, hits(index.dense(QUESTION, "owner", DAY, 8)), hits(index.keyword(QUESTION, "all", DAY, 8))


def refusal(action, *arguments) -> str:
    with pytest.raises(CorpusError) as error:
        action(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def document(id="A", text="words", roles=("all",), title="T"):
    return Document(id, title, "faq", date(2026, 1, 1), roles, text)


# --- refreshing -------------------------------------------------------------------------------------------------------


def test_before_the_first_refresh_an_index_is_empty(tmp_path):
    index = Index(tmp_path / "index", FakeEmbedder())
    assert (index.version, index.corpus_hash, len(index), index.nodes()) == (0, "", 0, [])
    assert index.served_versions == index.published == [] and index.roles == set()


def test_an_index_holds_exactly_the_chunks_of_its_corpus_also_when_it_is_opened_again(index, old):
    expected = {node.id_: (node.text, node.metadata) for node in chunk_corpus(old)}
    for opened in (index, Index(index.folder, FakeEmbedder())):
        assert {node.id_: (node.text, node.metadata) for node in opened.nodes()} == expected
        assert len(opened) == len(expected) and opened.corpus_hash == old.hash and opened.roles == old.roles
        assert [node.id_ for node in opened.nodes()] == sorted(expected)
        assert all(node.get_content(metadata_mode="llm") == node.text for node in opened.nodes())


def test_a_first_refresh_embeds_every_text_once(harbour, tmp_path):
    index, said = Index(tmp_path / "index", FakeEmbedder()), []
    done = index.refresh(harbour, said.append)
    assert sorted(index.embedder.embedded) == sorted(texts(harbour))
    assert (done.embedded, done.kept, done.dropped) == (len(texts(harbour)), 0, 0)
    assert len(said) == 1 and str(done.embedded) in said[0]


def test_a_refresh_embeds_only_text_that_it_has_not_seen(index, old, harbour):
    done = index.refresh(harbour)
    new = texts(harbour) - texts(old)
    assert sorted(index.embedder.embedded) == sorted(new) and 0 < len(new) < 12
    assert (done.embedded, done.kept, done.dropped) == (len(new), len(texts(old)), 0)
    index.embedder.embedded.clear()
    again = index.refresh(harbour)
    assert index.embedder.embedded == [] and (again.embedded, again.kept) == (0, len(texts(harbour)))
    back = index.refresh(old)
    assert index.embedder.embedded == [] and (back.embedded, back.dropped) == (0, len(new))


def test_vectors_that_were_taken_over_are_those_that_would_be_computed(index, harbour, tmp_path):
    index.refresh(harbour)
    anew = Index(tmp_path / "anew", FakeEmbedder())
    anew.refresh(harbour)
    assert served(index) == served(anew)


def test_what_left_the_corpus_leaves_the_index(index, old):
    fewer = Corpus(tuple(d for d in old if d.id != "PRC-RENTAL"))
    done = index.refresh(fewer)
    assert done.dropped == len(texts(old) - texts(fewer)) > 0 == done.embedded
    assert {node.metadata["document"] for node in index.nodes()} == fewer.versions.keys()
    assert not [hit for hit in index.keyword("rental price sheet", "all", DAY, 50) if "PRC-RENTAL" in hit.node.id_]


def test_a_changed_role_is_published_without_embedding_anything(index, old):
    assert index.keyword(QUESTION, "all", DAY, 50)
    index.refresh(Corpus(tuple(replace(d, roles=("owner",)) for d in old)))
    assert index.embedder.embedded == []
    assert {role for node in index.nodes() for role in node.metadata["roles"]} == {"owner"}
    assert index.dense(QUESTION, "all", DAY, 50) == index.keyword(QUESTION, "all", DAY, 50) == []


def test_chunks_of_another_length_are_other_chunks(old, tmp_path):
    short = Index(tmp_path / "short", FakeEmbedder(), words=20)
    short.refresh(old)
    assert {node.id_ for node in short.nodes()} == {node.id_ for node in chunk_corpus(old, 20)}


def test_a_refresh_that_fails_leaves_the_old_version_serving(index, harbour):
    before = served(index)

    def fail(texts):
        raise RuntimeError("power cut")

    index.embedder.embed = fail
    with pytest.raises(RuntimeError):
        index.refresh(harbour)
    again = Index(index.folder, FakeEmbedder())
    assert served(again) == before
    again.refresh(harbour)
    assert again.corpus_hash == harbour.hash


def test_who_is_reading_goes_on_reading_the_same_version_while_another_publishes(index, harbour):
    reader = Index(index.folder, FakeEmbedder())
    before = served(reader)
    index.refresh(harbour)
    assert served(reader) == before != served(index)


def test_a_deleted_index_is_empty_and_can_be_filled_again(index, old):
    before = served(index)
    index.delete()
    assert len(index) == index.version == len(Index(index.folder, FakeEmbedder())) == 0
    index.refresh(old)
    assert served(index) == before


def test_a_corpus_without_a_body_below_its_headings_is_one_clear_line(tmp_path):
    refusal(Index(tmp_path / "index", FakeEmbedder()).refresh, Corpus((document(text="# Only a heading"),)))


def test_a_search_before_the_first_refresh_is_one_clear_line_or_finds_nothing(tmp_path):
    assert Index(tmp_path / "index", FakeEmbedder()).dense("x", "all", DAY, 3) == []


# --- searching --------------------------------------------------------------------------------------------------------


def test_the_dense_score_is_the_cosine_and_a_chunk_is_nearest_to_its_own_text(index):
    for node in index.nodes()[:5]:
        found = index.dense(node.text, "owner", DAY, 50)
        assert found[0].node.text == node.text and found[0].score == pytest.approx(1, abs=1e-5)
        query, *vectors = index.embedder.embed([node.text, *(hit.node.text for hit in found)])
        assert [hit.score for hit in found] == pytest.approx([float(query @ vector) for vector in vectors], abs=1e-5)
        assert [hit.score for hit in found] == sorted((hit.score for hit in found), reverse=True)


def test_keyword_search_finds_the_rare_word_first_and_only_chunks_that_share_a_word(index):
    found = index.keyword("portafilters courier Braga", "all", DAY, 50)
    assert found[0].node.metadata["document"] == "POL-EXIT" and "courier" in found[0].node.text
    assert all(hit.score > 0 for hit in found)
    assert index.keyword("zeppelin", "owner", DAY, 50) == []


@pytest.mark.parametrize("search", ["dense", "keyword"])
def test_equal_scores_come_in_order_of_document_id_also_where_the_list_is_cut(search, tmp_path):
    index = Index(tmp_path / "index", FakeEmbedder())
    index.refresh(Corpus(tuple(document(f"D{n:02d}", "the very same words") for n in range(30))))
    found = [hit.node.metadata["document"] for hit in getattr(index, search)("the same words", "all", DAY, 12)]
    assert found == [f"D{n:02d}" for n in range(12)]


def test_an_unknown_role_is_refused_by_name(index, old):
    for role in old.roles:
        index.check_role(role)
    assert "unknown role 'pirate'" in refusal(index.check_role, "pirate")
    assert "owner" in refusal(index.check_role, "")


def test_a_role_may_have_a_comma_in_its_name(tmp_path):
    index = Index(tmp_path / "index", FakeEmbedder())
    index.refresh(Corpus((document(roles=("sales, north",)),)))
    index.check_role("sales, north")


# --- versions ---------------------------------------------------------------------------------------------------------


def test_at_version_reads_one_published_version_and_leaves_the_serving_one_alone(index, old, harbour):
    first, before = index.version, served(index)
    index.refresh(harbour)
    after = served(index)
    assert index.served_versions == [first, index.version] and index.published == [old.hash, harbour.hash]
    past = index.at_version(first)
    assert (past.version, past.corpus_hash, served(past)) == (first, old.hash, before)
    assert served(index) == served(index.at_version(index.version)) == served(Index(index.folder, FakeEmbedder())) == after


def test_roll_back_serves_the_version_before_or_the_one_named(index, old, harbour):
    versions, states = [index.version], [served(index)]
    for corpus in (harbour, Corpus(old.documents[:3])):
        versions.append(index.refresh(corpus).version)
        states.append(served(index))
    for target in (1, 0):
        assert index.roll_back() == versions[target] == index.version
        assert served(index) == served(Index(index.folder, FakeEmbedder())) == states[target]
    assert index.roll_back(versions[2]) == versions[2]  # forward again
    assert served(index) == states[2]
    assert index.served_versions == versions  # nothing was lost, nothing was added


def test_a_refresh_after_a_roll_back_publishes_anew(index, old, harbour):
    new = index.refresh(harbour).version
    index.roll_back()
    index.embedder.embedded.clear()
    assert index.refresh(harbour).version > new
    assert set(index.embedder.embedded) == texts(harbour) - texts(old)
    assert index.corpus_hash == harbour.hash and index.published == [old.hash, harbour.hash, harbour.hash]


def test_a_version_that_never_was_cannot_be_served(index, tmp_path):
    assert "no published version before" in refusal(index.roll_back)
    for wrong in (999, 0, -1, index.version - 1):
        assert "never published" in refusal(index.at_version, wrong)
        assert "no published version" in refusal(index.roll_back, wrong)
    empty = Index(tmp_path / "empty", FakeEmbedder())
    assert "no published version" in refusal(empty.roll_back)
    assert "never published" in refusal(empty.at_version, 1)


@pytest.fixture
def cached(old, tmp_path, monkeypatch):
    """Open the cached index of a corpus folder."""
    monkeypatch.setenv("REFERENCE_CACHE", str(tmp_path / "cache"))
    return lambda corpus, embedder=None, name="corpus", **more: Index.of(
        tmp_path / "shop" / name, corpus, embedder or FakeEmbedder(), **more
    )


def test_a_cached_index_is_refreshed_only_when_the_documents_changed(cached, old, harbour):
    first = cached(old)
    embedder = FakeEmbedder()
    assert cached(old, embedder).version == first.version and embedder.embedded == []
    assert cached(harbour, embedder).corpus_hash == harbour.hash
    assert set(embedder.embedded) == texts(harbour) - texts(old)


def test_a_rolled_back_cached_index_stays_so_until_the_documents_change(cached, old, harbour):
    first = cached(old).version
    cached(harbour).roll_back()
    assert [cached(harbour).version for _ in range(2)] == [first, first]
    changed = Corpus(harbour.documents[1:])
    assert cached(changed).corpus_hash == changed.hash


def test_each_folder_embedder_and_chunk_length_has_its_own_cached_index(cached, old):
    other = FakeEmbedder()
    other.id = "other"
    indexes = [cached(old), cached(old, name="elsewhere"), cached(old, other), cached(old, words=20)]
    assert len({index.folder for index in indexes}) == 4
    assert len({index.folder.parent for index in indexes}) == 1


# --- damage -----------------------------------------------------------------------------------------------------------


def overwrite(folder, pattern, content=b"not an index"):
    paths = [path for path in folder.rglob(pattern) if path.is_file()]
    assert paths
    for path in paths:
        path.write_bytes(content)


DAMAGE = {
    "everything": lambda folder: overwrite(folder, "*"),
    "manifests": lambda folder: overwrite(folder, "*.manifest"),
    "empty manifests": lambda folder: overwrite(folder, "*.manifest", b""),
    "data": lambda folder: overwrite(folder, "data/*.lance"),
    "empty data": lambda folder: overwrite(folder, "data/*.lance", b""),
    "no data": lambda folder: [path.unlink() for path in folder.rglob("data/*.lance")],
    "search indexes": lambda folder: overwrite(folder, "_indices/*/*"),
    "tags": lambda folder: overwrite(folder, "tags/*.json"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_index_is_one_clear_line_that_says_what_to_do(index, damage):
    DAMAGE[damage](index.folder)
    for search in ("dense", "keyword"):
        message = refusal(lambda name=search: getattr(Index(index.folder, FakeEmbedder()), name)(QUESTION, "all", DAY, 3))
        assert f"{index.folder} is damaged" in message and "delete that folder" in message


@pytest.mark.parametrize("action", [lambda index, corpus: index.refresh(corpus), lambda index, corpus: index.nodes()])
def test_damaged_data_is_one_clear_line_for_whoever_refreshes_or_reads_all(index, harbour, action):
    DAMAGE["data"](index.folder)
    assert "delete that folder" in refusal(action, Index(index.folder, FakeEmbedder()), harbour)


def test_a_deleted_damaged_index_is_rebuilt(index, old):
    before = served(index)
    DAMAGE["everything"](index.folder)
    index.delete()
    again = Index(index.folder, FakeEmbedder())
    again.refresh(old)
    assert served(again) == before


# --- killed, and at once ----------------------------------------------------------------------------------------------

PREPARE = """
import itertools, json, os, random, shutil, signal, statistics, sys, time, traceback, warnings
from pathlib import Path
tests, corpus_folder, work = map(Path, sys.argv[1:4])
sys.path[:0] = [str(tests), str(tests.parent)]
import numpy.ma  # LanceDB imports it while it writes; here, so that all the time of a refresh goes into refreshing
from fake_embedder import FakeEmbedder
import reference.index
from reference.corpus import Corpus
from reference.index import Index

warnings.simplefilter("ignore")  # about forking, which is safe: nothing of LanceDB has run in this process
new = Corpus.load(corpus_folder)
old = Corpus(tuple(d for d in new if d.effective < new.releases[-1]))

def child(action):
    '''Runs the action in a process of its own and returns that process's id once the action has called its `ready`.'''
    told, tell = os.pipe()
    if pid := os.fork():
        os.close(tell)
        os.read(told, 1)
        os.close(told)
        return pid
    try:
        action(lambda: os.write(tell, b"!"))
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)

def ended(pid):
    '''True when it was killed, False when it had finished.'''
    code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    assert code in (0, -signal.SIGKILL), code
    return code != 0
"""

KILLED_AT_ANY_TIME = """
def refresh(ready):
    index = Index(folder, FakeEmbedder())
    ready()
    index.refresh(new)

durations = []
for n in range(5):
    folder = work / f"whole-{n}"
    shutil.copytree(work / "old", folder)
    pid, start = child(refresh), time.perf_counter()
    ended(pid)
    durations.append(time.perf_counter() - start)
rng, kills, died = random.Random(7), int(sys.argv[4]), []
for n in range(kills):
    folder = work / f"killed-{n}"
    shutil.copytree(work / "old", folder)
    pid = child(refresh)
    time.sleep((n + rng.random()) / kills * 1.3 * statistics.median(durations))
    os.kill(pid, signal.SIGKILL)
    died.append(ended(pid))
print(json.dumps(died))
"""

KILLED_AT_EVERY_LINE = """
def refresh(ready):
    index, left = Index(folder, FakeEmbedder()), n

    def line(frame, event, argument):
        nonlocal left
        left -= event == "line"
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return line

    def call(frame, event, argument):
        ours = frame.f_code.co_filename == reference.index.__file__
        return line if ours and frame.f_code.co_name in ("refresh", "_write", "_publish") else None

    ready()
    sys.settrace(call)
    index.refresh(new)

for n in itertools.count(1):
    folder = work / f"killed-{n}"
    if (work / "old").exists():
        shutil.copytree(work / "old", folder)
    if not ended(child(refresh)):
        break
print(json.dumps(n))
"""

AT_ONCE = """
def writer(corpus):
    def refresh(ready):
        index = Index(work / "index", FakeEmbedder())
        ready()
        for _ in range(6):
            index.refresh(corpus)
    return refresh

waiting, seen = {child(writer(corpus)) for corpus in (old, new, old)}, []
while waiting:  # meanwhile, somebody reads
    index = Index(work / "index", FakeEmbedder())
    seen.append([index.corpus_hash, len(index), len(index.nodes()), len(index.keyword("rental", "all", "2026-12-01", 99))])
    for pid in list(waiting):
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            assert status == 0
            waiting.remove(pid)
print(json.dumps(seen))
"""

forks = pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")


def run(script, work, *arguments):
    command = [sys.executable, "-c", PREPARE + script, HERE, HERE / "corpora" / "harbour" / "corpus", work, *arguments]
    done = subprocess.run([str(part) for part in command], cwd=HERE.parent, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def whole(old, harbour, tmp_path_factory):
    """Corpus hash -> all that a reader of that corpus gets."""
    states = {}
    for corpus in (old, harbour):
        index = Index(tmp_path_factory.mktemp("whole") / "index", FakeEmbedder())
        index.refresh(corpus)
        states[corpus.hash] = served(index)
    return states


def check_what_was_left(folder, whole, harbour) -> str:
    """A whole version serves; what is noted as published last is what serves; the next refresh succeeds. What serves, or ""."""
    index = Index(folder, FakeEmbedder())
    left = index.corpus_hash
    if left:
        assert served(index) == whole[left]
    assert index.published[-1:] != [harbour.hash] or left == harbour.hash  # else nobody would refresh again
    index.refresh(harbour)
    assert served(index) == whole[harbour.hash]
    return left


@forks
def test_a_refresh_killed_at_any_of_fifty_random_times_leaves_a_whole_version_serving(old, harbour, whole, tmp_path):
    Index(tmp_path / "old", FakeEmbedder()).refresh(old)
    died = run(KILLED_AT_ANY_TIME, tmp_path, KILLS)
    left = [check_what_was_left(tmp_path / f"killed-{n}", whole, harbour) for n in range(KILLS)]
    assert len(died) == KILLS and sum(died) > KILLS / 5  # the others had finished before their time
    assert set(left) == {old.hash, harbour.hash}  # the times lie on both sides of the publication


@forks
@pytest.mark.parametrize("first", [False, True], ids=["a later refresh", "the first refresh"])
def test_a_refresh_killed_at_any_of_its_lines_leaves_a_whole_version_serving(old, harbour, whole, tmp_path, first):
    if not first:
        Index(tmp_path / "old", FakeEmbedder()).refresh(old)
    finished = run(KILLED_AT_EVERY_LINE, tmp_path)
    assert finished > 25
    left = [check_what_was_left(tmp_path / f"killed-{n}", whole, harbour) for n in range(1, finished + 1)]
    before = "" if first else old.hash
    changes = left.index(harbour.hash)
    assert left == [before] * changes + [harbour.hash] * (finished - changes) and changes > 20  # one step publishes


def test_the_first_refresh_may_be_killed_while_it_writes_its_data(old, tmp_path):
    data = tmp_path / "index" / "chunks.lance" / "data"
    data.mkdir(parents=True)
    (data / ".tmpchqgdc").write_bytes(b"half")  # what a SIGKILL inside LanceDB's create_table left, as observed
    index = Index(tmp_path / "index", FakeEmbedder())
    assert index.version == 0
    index.refresh(old)
    assert index.corpus_hash == old.hash


@forks
def test_processes_that_refresh_at_once_all_succeed_and_readers_see_whole_versions(old, harbour, whole, tmp_path):
    Index(tmp_path / "index", FakeEmbedder()).refresh(old)
    seen = run(AT_ONCE, tmp_path)
    index = Index(tmp_path / "index", FakeEmbedder())
    assert served(index) == whole[index.corpus_hash]
    assert sorted(index.published) == sorted([old.hash] * 13 + [harbour.hash] * 6)
    assert index.version == index.served_versions[-1] and len(set(index.served_versions)) == 19
    keyword = {}
    for corpus_hash, rows, nodes, found in seen:
        assert rows == nodes == whole[corpus_hash][0]
        assert keyword.setdefault(corpus_hash, found) == found > 0
    assert seen
