"""What a witness said of a run: a second judge or reward, asked about some of the completions and never trained on.

A run's own witness has the folder RUN/witness, one asked afterwards RUN/witness-NAME. Each look is one JSON file there:
the labels that were asked for, the means of each prompt, and what the test of `run/parting.py` made of them.
"""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np

from dualign.common.errors import UserError
from dualign.common.intervals import half_width, plus_minus
from dualign.common.types import Label, Prompt
from dualign.config import Config
from dualign.run import parting
from dualign.run.batch import Row

OWN = "witness"  # the folder of the run's own; those asked afterwards are called witness-NAME
BASELINE = 4  # π_0's batch is asked about with so many times the sample: every later one is held against it
SAMPLING, HELD_OUT = 0x317_0001, 0x317_0002  # streams of random numbers

Kind = Literal["batch", "heldout"]  # completions of an online batch, or held-out answers


@dataclass(frozen=True)
class Test:
    """A look against π_0 (`parting`): means over prompts of the witness and the training reward, now and then, the
    p-value, and the level that it is held to."""

    witness: float
    witness_0: float
    reward: float
    reward_0: float
    prompts: int  # that the witness labelled, of the batches that are compared, and of π_0's
    prompts_0: int
    p: float
    level: float

    @property
    def spoke(self) -> bool:
        return self.p <= self.level

    def __str__(self) -> str:
        return (
            f"reward and witness part: since π_0 the reward rose {self.reward_0:+.3f} -> {self.reward:+.3f} and the witness "
            f"fell {self.witness_0:+.3f} -> {self.witness:+.3f} (p = {self.p:.2g}, held to {self.level:.2g})"
        )


@dataclass(frozen=True)
class Look:
    """The witness of the policy after `step` online batches, on that batch or on what is held out. `means`: of each
    prompt, the mean training reward of all its completions and the witness's of those asked about (None: no label).
    `test`: None for π_0, and where π_0 has no label."""

    kind: Kind
    step: int
    by: str
    labels: Mapping[int, Label]  # by the completion's index
    means: Mapping[str, tuple[float | None, float | None]]
    test: Test | None = None

    @property
    def rewards(self) -> np.ndarray:
        return _array(reward for reward, _ in self.means.values())

    @property
    def witness(self) -> np.ndarray:
        return _array(witness for _, witness in self.means.values())

    @property
    def spoke(self) -> bool:
        return self.test is not None and self.test.spoke

    def record(self) -> dict[str, Any]:
        """The mean over prompts with half its 95 % interval, and labels that are there and that are absent."""
        values = self.witness[~np.isnan(self.witness)]
        half = half_width(values)
        absent = sum(label.value is None for label in self.labels.values())
        return {
            "witness": float(values.mean()) if len(values) else None,
            "witness_ci": None if np.isnan(half) else half,
            "witness_n": len(self.labels) - absent,
            "witness_absent": absent,
        }

    def text(self, told: bool) -> str:
        """In words: what it found, and where it spoke and that is to be `told`, what that means."""
        r = self.record()
        where = f"online batch {self.step}" if self.kind == "batch" else f"held-out answers after {self.step} batches"
        absent = f", {r['witness_absent']} absent" if r["witness_absent"] else ""
        said = f"witness {self.by}, {where}: {plus_minus(r['witness'], r['witness_ci'], r['witness_n'], '{:+.3f}')}"
        return f"{said} ({r['witness_n']} labels{absent})" + (f"; {self.test}" if self.spoke and told else "")


@dataclass(frozen=True)
class Witnessed:
    """All looks of one witness, in the order in which they were made."""

    folder: Path
    looks: Sequence[Look] = field(default=(), repr=False)

    @property
    def by(self) -> str:
        return self.looks[0].by if self.looks else ""

    @property
    def spoke(self) -> Look | None:
        """The first look at which it said that reward and witness part."""
        return next((look for look in self.looks if look.spoke), None)

    @cached_property
    def batches(self) -> dict[int, Look]:
        return {look.step: look for look in self.looks if look.kind == "batch"}

    @cached_property
    def heldout(self) -> dict[int, Look]:
        return {look.step: look for look in self.looks if look.kind == "heldout"}

    def best(self, steps: Sequence[int]) -> tuple[int, Look] | None:
        """Of checkpoints after so many batches the one that the witness rates highest, and the look that says so: the
        nearest to it on what is held out, where there are two or more after π_0, else on batches. Of checkpoints that one
        look rates it is the nearest. None without any."""
        held = {step: look for step, look in self.heldout.items() if step}
        looks = held if len(held) > 1 or not self.batches else self.batches
        rated = {s: v for s, look in looks.items() if (v := look.record()["witness"]) is not None}
        if not rated or not steps:
            return None
        nearest = {step: min(rated, key=lambda at: (abs(at - step), at)) for step in sorted(steps)}
        found = max(nearest, key=lambda step: (rated[nearest[step]], -abs(nearest[step] - step)))  # of equals the first
        return found, looks[nearest[found]]

    def summary(self, steps: Sequence[int]) -> dict[str, Any]:
        """For summary.json."""
        best, spoke = self.best(steps), self.spoke
        absent = Counter(x.reason or "" for look in self.looks for x in look.labels.values() if x.value is None)
        series = {kind: {s: k.record() for s, k in getattr(self, kind).items()} for kind in ("batches", "heldout")}
        told_best = best and {"checkpoint": best[0], "of": best[1].kind, "at": best[1].step} | best[1].record()
        return {
            "by": self.by,
            "labels": sum(look.record()["witness_n"] for look in self.looks),
            "absent": dict(absent),
            **series,
            "spoke": spoke and {"kind": spoke.kind, "step": spoke.step, **asdict(spoke.test)},  # type: ignore[arg-type]
            "best": told_best,
        }


# --- asking: which, how many ---


def planned(config: Config, settings: Any, evaluated: Sequence[int] | None = None) -> list[tuple[Kind, int]]:
    """The looks of a whole run, in order. `settings`: a WitnessConfig; `evaluated`: after how many batches there are
    evaluations, where that is known better than from the configuration."""
    total, every = config.train.online_batches, config.eval.every
    batches = range(0, total, settings.every) if config.algo.source == "online" else ()
    if evaluated is None:
        evaluated = sorted({0, total, *(range(0, total, every) if every else ())}) if config.data.eval else []
    looks: list[tuple[Kind, int]] = [("batch", step) for step in batches]
    looks += [("heldout", step) for step in evaluated if settings.heldout]
    return sorted(looks, key=lambda look: (look[1], look[0] == "batch"))


def most_labels(config: Config, settings: Any, heldout: int) -> int:
    """That the looks of a run need, where so many prompts are held out."""
    every = {
        "heldout": min(settings.heldout, heldout * config.eval.k),
        "batch": min(settings.sample, config.train.online_batch),
    }
    first = min(BASELINE * settings.sample, config.train.online_batch)
    return sum(first if (kind, step) == ("batch", 0) else every[kind] for kind, step in planned(config, settings))


def chosen(rows: Sequence[Row], kind: Kind, step: int, settings: Any, seed: int) -> list[Row]:
    """The completions of a look, always the same: one of each prompt before a second of any. Of what is held out the
    same places at each evaluation, so that prompts are paired."""
    if kind == "heldout":
        count, stream = settings.heldout, [seed, HELD_OUT]
    else:
        count, stream = settings.sample * (1 if step else BASELINE), [seed, SAMPLING, step]
    taken: Counter[int] = Counter()
    order = []
    for at, i in enumerate(np.random.default_rng(stream).permutation(len(rows))):
        group = rows[i].rollout.group
        order.append((taken[group], at, int(i)))
        taken[group] += 1
    return [rows[i] for i in sorted(i for _, _, i in sorted(order)[:count])]


def look_of(
    kind: Kind, step: int, by: str, rows: Sequence[Row], labels: Mapping[int, Label], before: Witnessed, level: float
) -> Look:
    """The look at `rows` that `labels` make, tested against π_0's among those `before`."""
    prompts: dict[str, tuple[list[float], list[float]]] = {}
    for row in rows:
        rewards, witness = prompts.setdefault(_key(row.rollout.prompt), ([], []))
        rewards += [] if row.label.value is None else [row.label.value]
        label = labels.get(row.rollout.index)
        witness += [] if label is None or label.value is None else [label.value]
    means = {key: (_mean(rewards), _mean(witness)) for key, (rewards, witness) in prompts.items()}
    look = Look(kind, step, by, labels, means)
    first = (before.batches if kind == "batch" else before.heldout).get(0)
    test = None if first is None or not step else (_pairs if kind == "heldout" else _window)(look, first, before, level)
    return Look(kind, step, by, labels, means, test)


def _pairs(look: Look, first: Look, before: Witnessed, level: float) -> Test | None:
    shared = [key for key in look.means if key in first.means]
    pairs = _array(v for key in shared for v in (*look.means[key], *first.means[key])).reshape(-1, 4)
    pairs = pairs[~np.isnan(pairs[:, [1, 3]]).any(1)]
    reward, witness, reward_0, witness_0 = pairs.T
    return _test((witness, witness_0, reward, reward_0), parting.parted_pairs, level)


def _window(look: Look, first: Look, before: Witnessed, level: float) -> Test | None:
    """Of the newest batches, as many as together have no more prompts than π_0's: unequal sides would let skewed labels
    raise more false alarms. A prompt that returns counts once."""
    most, taken = int((~np.isnan(first.witness)).sum()), [look]
    for other in sorted(before.batches.values(), key=lambda k: -k.step):
        if not 0 < other.step < look.step or len(_merged([*taken, other], 1)) > most:
            break
        taken.append(other)
    witness, reward = _merged(taken, 1), _merged(taken, 0)
    return _test((witness, _known(first.witness), reward, _known(first.rewards)), parting.parted, level)


def _test(values: tuple[np.ndarray, ...], p: Callable[..., Any], level: float) -> Test | None:
    """None where one of the four has no value."""
    if any(np.isnan(x).all() for x in values):
        return None
    witness, witness_0, reward, reward_0 = (float(np.nanmean(x)) for x in values)
    return Test(witness, witness_0, reward, reward_0, len(values[0]), len(values[1]), float(p(*values)), level)


def _merged(looks: Iterable[Look], which: int) -> np.ndarray:
    found: dict[str, list[float]] = {}
    for look in looks:
        for key, pair in look.means.items():
            if (value := pair[which]) is not None:
                found.setdefault(key, []).append(value)
    return np.array([np.mean(values) for values in found.values()])


def _known(values: np.ndarray) -> np.ndarray:
    return values[~np.isnan(values)]


def _mean(values: Sequence[float]) -> float | None:
    return float(np.mean(values)) if values else None


def _array(values: Iterable[float | None]) -> np.ndarray:
    return np.array([np.nan if v is None else v for v in values], float)


def _key(prompt: Prompt) -> str:
    """By what it is: places change between batches, and an id may be given twice."""
    return hashlib.sha256(json.dumps([prompt.id, prompt.content]).encode()).hexdigest()[:16]


# --- files ---


def file_name(kind: Kind, step: int) -> str:
    return f"{kind}-{step:06d}.json"


def to_text(look: Look) -> str:
    labels = {str(i): {k: v for k, v in asdict(label).items() if v} | {"value": label.value}
              for i, label in look.labels.items()}  # fmt: skip
    return json.dumps(asdict(look) | {"labels": labels}, indent=1, ensure_ascii=False)


def read(folder: Path) -> Witnessed:
    """Everything that a witness's folder holds; nothing where there is none. Raises UserError for a damaged file."""
    looks = [_look(path) for path in folder.glob("*-*.json")] if folder.is_dir() else []
    return Witnessed(folder, sorted(looks, key=lambda look: (look.step, look.kind == "batch")))


def folders(run: Path) -> list[Path]:
    """Those of a run's witnesses, its own first."""
    return sorted(path for path in run.glob(f"{OWN}*") if path.name == OWN or path.name.startswith(f"{OWN}-"))


def _look(path: Path) -> Look:
    try:
        told = json.loads(path.read_text(encoding="utf-8"))
        labels = {int(i): Label(**label) for i, label in told.pop("labels").items()}
        means = {key: tuple(pair) for key, pair in told.pop("means").items()}
        test = told.pop("test")
        return Look(**told, labels=labels, means=means, test=test and Test(**test))
    except (OSError, ValueError, TypeError, KeyError, AttributeError) as error:
        raise UserError(f"{path}: damaged: {error}. Delete it, and ask again: dualign witness RUN") from None
