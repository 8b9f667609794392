"""The memory that `--dry-run` predicts beside what a run takes on this machine's CPU, phase by phase.

    python benchmarks/memory.py [--cases fp32 bf16 ...]

Each case is a whole run (one online batch, one checkpoint) in a process of its own. A phase's peak is the kernel's high
mark of resident memory, reset when the phase begins (/proc/self/clear_refs, so Linux only).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

os.environ["HF_HUB_OFFLINE"] = "1"

from common import RESULTS, machine, save, table
from dualign.common import cpu

SMALL = ["train.online_batch=32", "train.update_size=16", "rollout.k=4", "rollout.max_new_tokens=32"]
TINY = ["train.online_batch=16", "train.update_size=8", "rollout.k=4", "rollout.max_new_tokens=16"]
LARGE = ["model.name=RANDOM", *TINY]  # 0.4B, random weights
CASES = {
    "fp32": ["model.precision=fp32", *SMALL],
    "bf16": ["model.precision=bf16", *TINY],
    "bf16-checkpointing": ["model.precision=bf16", "model.gradient_checkpointing=true", *TINY],
    "0.4b-adamw": ["model.precision=fp32", "train.optimizer=adamw", *LARGE],
    "0.4b-lora": ["model.precision=fp32", "model.lora={r: 16}", *LARGE],
}
HEAD = ["case", "phase", "measured, GB", "predicted, GB", "ratio", "predicted of"]


def share_of_e(completions: list[Any], **columns: Any) -> list[float]:
    """A reward that costs nothing."""
    return [c[-1]["content"].count("e") / max(1, len(c[-1]["content"])) for c in completions]


class Meter:
    """The peak of resident memory within each phase, in bytes."""

    def __init__(self) -> None:
        self.peaks: dict[str, float] = {}

    @contextmanager
    def __call__(self, phase: str) -> Iterator[None]:
        Path("/proc/self/clear_refs").write_text("5")
        try:
            yield
        finally:
            status = Path("/proc/self/status").read_text()
            high = next(int(x.split()[1]) * 1024.0 for x in status.splitlines() if x.startswith("VmHWM"))
            self.peaks[phase] = max(self.peaks.get(phase, 0.0), high)


def one(case: str, folder: Path) -> None:
    """Runs a case in this process and writes predicted and measured bytes by phase to `folder`/result.json."""
    cpu.tune()
    from dualign import trainer
    from dualign.config import load
    from dualign.training.clock import Clock
    from dualign.training.fits import memory_of
    from dualign.training.memory import Place

    meter, found = Meter(), {}

    class Metered(Clock):
        @contextmanager
        def __call__(self, phase: str) -> Iterator[None]:
            with meter(phase), super().__call__(phase):
                yield

    class Watched(trainer.Trainer):
        def fit(self) -> None:
            loading.__exit__(None, None, None)
            longest = max(len(request.prompt_ids) for request in self.source.stream.items)
            place = Place(device="cpu", laid_out=cpu.bf16_units())
            memory, _ = memory_of(self.config, place, longest)
            found.update(prompt=longest, predicted=memory.phases(), parameters=memory.sizes.parameters)
            super().fit()

        def _checkpoint(self, *args: Any) -> None:
            self.engine.free_memory()  # as saving does, so that the last update's gradients are not in its peak
            with meter("checkpoint"):
                super()._checkpoint(*args)

    trainer.Trainer, trainer.Clock = Watched, Metered  # type: ignore[misc]
    overrides = [o.replace("RANDOM", str(folder / "model")) for o in CASES[case]]
    fixed = [
        "reward=[]",
        "rollout.log_probs=recomputed",
        "data.eval=null",
        "train.online_batches=2",
        f"run.dir={folder / 'run'}",
    ]
    config = load("quickstart", [*fixed, *overrides])
    loading = meter("load")
    loading.__enter__()
    trainer.train(config, reward=share_of_e, quiet=True)
    (folder / "result.json").write_text(json.dumps(found | {"measured": meter.peaks}))


def rows(case: str, found: dict[str, Any]) -> list[list[str]]:
    predicted = {phase: sum(parts.values()) for phase, parts in found["predicted"].items()}
    told = {
        phase: ", ".join(f"{p} {s / 1e9:.2f}" for p, s in parts.items()) for phase, parts in found["predicted"].items()
    }
    measured = {phase: found["measured"][phase] for phase in predicted}
    lines = [(phase, measured[phase], predicted[phase], told[phase]) for phase in predicted]
    lines.append(("**peak**", max(measured.values()), max(predicted.values()), ""))
    return [[case, phase, f"{m / 1e9:.2f}", f"{p / 1e9:.2f}", f"{p / m:.2f}", said] for phase, m, p, said in lines]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES))
    parser.add_argument("--one", nargs=2, metavar=("CASE", "FOLDER"), help=argparse.SUPPRESS)
    parser.add_argument("--out", type=Path, default=RESULTS)
    o = parser.parse_args()
    if o.one:
        return one(o.one[0], Path(o.one[1]))
    record: dict[str, Any] = {"machine": machine(), "cases": {}}
    lines: list[list[str]] = []
    for case in o.cases:
        with tempfile.TemporaryDirectory() as name:
            if "model.name=RANDOM" in CASES[case]:  # in a process of its own, whose memory is not this one's
                make = f"import pathlib, shard_memory; shard_memory.random_model(pathlib.Path({name + '/model'!r}))"
                subprocess.run([sys.executable, "-c", make], check=True, cwd=Path(__file__).parent)
            subprocess.run([sys.executable, __file__, "--one", case, name], check=True)
            record["cases"][case] = found = json.loads((Path(name) / "result.json").read_text())
        lines += rows(case, found)
        page = save("memory", record, table(HEAD, lines), o.out)
        print(table(HEAD, rows(case, found)), page, sep="\n", flush=True)


if __name__ == "__main__":
    main()
