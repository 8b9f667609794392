"""Small runs that are killed and resumed, and what must be the same as in an undisturbed one."""

from __future__ import annotations

import json
import os
import random
import socket
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import yaml

from dualign.run.folder import Run
from runs_common import metrics, tree, weights, write_prompts

REWARD = '''
import hashlib, os

def score(completions, id, **columns):
    """The share of vowels; every label that is given leaves a line in LOG, in the same write as the others (see zygote.py)."""
    texts = [c[0]["content"] for c in completions]
    lines = "".join(f"{i} {hashlib.sha256(t.encode()).hexdigest()[:16]}\\n" for i, t in zip(id, texts))
    values = [sum(ch in "aeiou" for ch in t) / max(1, len(t)) + 0.1 * (len(t) % 2) for t in texts]
    log = os.open(LOG, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.writev(log, [lines.encode()])
    os.close(log)
    return values

def coarse(completions, id, **columns):
    """The same by halves: many prompts are tied."""
    return [round(2 * value) / 2 for value in score(completions, id)]

def length(completions, **columns):
    return [len(c[0]["content"]) if len(c[0]["content"]) > 9 else None for c in completions]
'''


def is_free(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) != 0


class Zygote:
    """See zygote.py."""

    def __init__(self) -> None:
        environment = os.environ | {
            "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "OMP_WAIT_POLICY": "PASSIVE", "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false", "CUDA_VISIBLE_DEVICES": "",
        }  # fmt: skip
        self.process = subprocess.Popen(
            [sys.executable, str(Path(__file__).parent / "zygote.py")],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment,
        )  # fmt: skip
        assert self.process.stdout is not None and self.process.stdout.readline().strip() == "ready"
        worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
        # below those that the system gives to whoever asks for none, and apart from the other workers' of this suite:
        # their process numbers are neighbours, and two runs at one port would take each other for theirs
        self.port = 11000 + (os.getppid() * 7 + worker * 1000) % 20000

    def run(self, *argv: str, log: Path, processes: int = 1, **kill: Any) -> dict[str, Any]:
        self.port = next(port for port in range(self.port + 1, 32768) if is_free(port))
        order = {"argv": argv, "log": str(log), "processes": processes, "port": self.port, **kill}
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.write(json.dumps(order) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())  # type: ignore[no-any-return]

    def close(self) -> None:
        assert self.process.stdin is not None
        self.process.stdin.close()
        self.process.wait()


def prepare(
    folder: Path,
    model: Path,
    algo: str,
    name: str,
    lora: dict[str, Any] | None = None,
    twice: bool = False,
    shard: str = "none",
    settings: dict[str, Any] | None = None,
    **stale: Any,
) -> tuple[Path, Path, Path]:
    """A recipe of a few batches, held-out evaluations and checkpoints; (recipe, run, label log)."""
    folder.mkdir(parents=True, exist_ok=True)
    log = folder / f"{name}.labels"
    reward = folder / f"{name}_reward.py"
    reward.write_text(REWARD.replace("LOG", repr(str(log))))
    config = tree(model, write_prompts(folder), folder / name, {"name": algo, **(settings or {})}, online_batches=4)
    config["model"]["lora"] = lora
    config["train"] |= {"shard": shard, "reuse": stale.get("reuse", [])}
    config["rollout"] |= {"ahead": stale.get("ahead", 0), "resample": stale.get("resample", 0)}
    config["eval"] = {"prompts": 4, "every": 2}
    config["run"] |= {"checkpoints": 3, "keep_last": 2}
    config["reward"] = [{"type": "function", "path": f"{reward}:{stale.get('function', 'score')}"}]
    if twice:  # a second reward, which has no label for some rows
        config["reward"].append({"type": "function", "path": f"{reward}:length", "weight": 0.1, "optional": True})
    recipe = folder / f"{name}.yaml"
    recipe.write_text(yaml.safe_dump(config))
    return recipe, folder / name, log


def go_on(recipe: Path, run: Path) -> tuple[str, ...]:
    """The command that brings a run further, whatever state it is in."""
    return ("resume", str(run)) if (run / "config.yaml").exists() else ("train", str(recipe))


def readable(run: Path) -> list[str]:
    """What is wrong with the folder as it stands: everything that is there can be read and is what was written."""
    from dualign.run.verify import verify

    if not (run / "config.yaml").exists():
        return []
    opened = Run.open(run)
    opened.metrics()
    for path in sorted(opened.batches.glob("*.parquet")):
        assert opened.read_batch(int(path.stem)) is not None
    return [finding.text for finding in verify(run) if finding.kind == "damaged"]


def same(run: Path, undisturbed: Path) -> list[str]:
    """How two finished runs differ."""
    found = []
    one, two = weights(run), weights(undisturbed)
    found += [f"weights: {k}" for k in two if k not in one or not torch.equal(one[k], two[k])]
    if metrics(run) != metrics(undisturbed):
        found.append("metrics.jsonl")
    for part in ("batches", "evaluations", "reused"):
        a, b = (sorted(p.name for p in (folder / part).glob("*")) for folder in (run, undisturbed))
        if a != b:
            found.append(f"{part}: {a} and {b}")
    return found


def bought_twice(log: Path, undisturbed: Path) -> int:
    """Labels given beyond those of the undisturbed run."""
    return (Counter(log.read_text().split("\n")) - Counter(undisturbed.read_text().split("\n"))).total()


class Case:
    """One system at one number of processes: an undisturbed run, and disturbed ones to hold against it."""

    def __init__(self, zygote: Zygote, folder: Path, model: Path, algo: str, processes: int, **changes: Any) -> None:
        self.zygote, self.folder, self.model, self.algo, self.processes = zygote, folder, model, algo, processes
        self.changes, self.count = changes, 0
        recipe, self.still, self.labels = prepare(folder, model, algo, "still", **changes)
        done = zygote.run("train", str(recipe), log=folder / "out", processes=processes)
        assert done["status"] == 0, (folder / "out").read_text()
        self.seconds, self.writes = done["seconds"], done["writes"]

    def disturbed(self, kills: Iterator[dict[str, Any]]) -> Disturbed:
        """A run that is killed as `kills` says, launch after launch, then left to finish."""
        self.count += 1
        recipe, run, labels = prepare(self.folder, self.model, self.algo, f"killed{self.count}", **self.changes)
        labels.touch()
        out, killed, unreadable = self.folder / f"out{self.count}", 0, []
        for kill in kills:
            status = self.zygote.run(*go_on(recipe, run), log=out, processes=self.processes, **kill)["status"]
            unreadable += readable(run)
            if status == 0:
                break
            assert status == -9, out.read_text()[-9000:]
            killed += 1
        else:
            status = self.zygote.run(*go_on(recipe, run), log=out, processes=self.processes)["status"]
            assert status == 0, out.read_text()[-9000:]
        twice = bought_twice(labels, self.labels)
        return Disturbed(killed, unreadable + readable(run), same(run, self.still), twice)


@dataclass(frozen=True)
class Disturbed:
    kills: int
    unreadable: list[str]  # what could not be read after a kill
    different: list[str]  # from the undisturbed run
    bought_twice: int  # labels


def at_random(seed: int, seconds: float, count: int) -> Iterator[dict[str, Any]]:
    draw = random.Random(seed)
    for _ in range(count):
        yield {"kill_after": draw.uniform(0.2 * seconds, seconds)}
