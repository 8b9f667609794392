"""Whole small runs on a tiny model, and what is compared between them."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

from safetensors.torch import load_file

TIMED = {"seconds", "label_seconds", "dollars"}  # what the clock and the account say


def vowels(completions, **columns):
    """A reward that a byte-level model can learn: the share of vowels, less for odd lengths."""
    texts = [c[0]["content"] if isinstance(c, list) else c for c in completions]
    return [sum(ch in "aeiou" for ch in t) / max(1, len(t)) + 0.1 * (len(t) % 2) for t in texts]


def silent(completions, **columns):
    """A reward that has no label for anything."""
    return [None] * len(completions)


def whitened(completions, **columns):
    """A reward that depends on the batch: each length's distance from the mean, in standard deviations."""
    lengths = [len(c[0]["content"]) for c in completions]
    mean = sum(lengths) / len(lengths)
    sd = (sum((n - mean) ** 2 for n in lengths) / len(lengths)) ** 0.5
    return [(n - mean) / (sd + 1e-6) for n in lengths]


def write_prompts(folder: Path, count: int = 12) -> Path:
    path = folder / "prompts.jsonl"
    rows = [{"id": f"p{i}", "prompt": [{"role": "user", "content": f"say {'a' * (i % 5)} {i}"}]} for i in range(count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def write_pairs(folder: Path, count: int = 12) -> Path:
    path = folder / "pairs.jsonl"
    rows = [
        {
            "prompt": [{"role": "user", "content": f"say {i}"}],
            "chosen": [{"role": "assistant", "content": "aei" * (1 + i % 3)}],
            "rejected": [{"role": "assistant", "content": "xyz" * (1 + i % 2)}],
        }
        for i in range(count)
    ]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def write_demonstrations(folder: Path, count: int = 12) -> Path:
    path = folder / "demonstrations.jsonl"
    rows = [{"prompt": f"say {i}: ", "completion": "aei" * (1 + i % 3)} for i in range(count)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def tree(model: Path, data: Path, run: Path, algo: dict[str, Any], **train: Any) -> dict[str, Any]:
    """A configuration of a few online batches in fp32."""
    return {
        "model": {"name": str(model), "precision": "fp32"},
        "data": {"train": str(data), "eval": str(data)},
        "rollout": {"k": 4, "max_new_tokens": 12},
        "algo": algo,
        "train": {
            "online_batches": 3,
            "online_batch": 16,
            "update_size": 8,
            "lr": 1e-3,
            "warmup": 2,
            "micro_batch_tokens": 128,
            **train,
        },
        "eval": {"prompts": 4},
        "run": {"dir": str(run), "checkpoints": 1},
    }


def reward_file(function: str = "vowels") -> dict[str, Any]:
    return {"type": "function", "path": f"{Path(__file__)}:{function}"}


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return int(probe.getsockname()[1])


def launch(recipe: Path, *arguments: str, processes: int = 1, command: str = "train", wait: bool = True) -> Any:
    """`dualign train RECIPE` in processes of its own, on gloo where there are several."""
    launcher = [sys.executable, "-m"]
    if processes > 1:
        launcher += [
            "torch.distributed.run",
            f"--nproc-per-node={processes}",
            "--master-port",
            str(free_port()),
            "-m",
        ]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    started = subprocess.Popen(
        [*launcher, "dualign", command, str(recipe), *arguments],
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True,
        # a suite run in the background inherits an ignored SIGINT
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )  # fmt: skip
    if not wait:
        return started
    out, err = started.communicate(timeout=300)
    return subprocess.CompletedProcess(started.args, started.returncode, out, err)


def weights(run: Path) -> dict[str, Any]:
    last = sorted((run / "checkpoints").iterdir())[-1]
    return load_file(last / "train.safetensors")


def metrics(run: Path) -> list[dict[str, Any]]:
    """What was measured, without how long it took."""
    lines = (run / "metrics.jsonl").read_text().splitlines()
    return [{k: v for k, v in json.loads(line).items() if k not in TIMED} for line in lines]
