"""Did it cheat? What each online batch's completions look like, and from which batch on they look bad.

Everything is measured on the completions that the run itself sampled, so it costs no sampling; only the second,
independent reward is asked. Changes are in standard deviations of the first batch, which came from π_0.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

import numpy as np

from dualign.annotate.batch import ahead
from dualign.annotate.normalised import RAW
from dualign.common.errors import UserError
from dualign.common.types import Label
from dualign.eval.judges import Judge, score
from dualign.eval.outputs import Answer
from dualign.eval.result import Column, Json, Plot, Table
from dualign.eval.statistics import correlation
from dualign.run.batch import PENALTY, WeightedBatch
from dualign.training.heldout import kl_name

CLEAR = 1.96  # standard errors
OPPOSED = -0.2  # correlation of the two rewards over π_0's answers below which they want opposite things
REFUSAL = re.compile(
    r"\b(i(?:'m| am) (?:sorry|unable|not able)|i apologi[sz]e|sorry, (?:but )?i|as an ai\b|"
    r"i (?:cannot|can'?t|can not|won'?t|will not) "
    r"(?:assist|help|provide|answer|do|support|engage|fulfil|comply|discuss|give))",
    re.I,
)


def independent(run: Path) -> str:
    """A built-in reward that the run was not trained on."""
    from dualign.config import load

    rewards = load(run / "config.yaml").reward
    used = [getattr(each, "path", None) for reward in rewards for each in reward.all_rewards]
    for name in ("builtin:helpful", "builtin:harmless"):
        if name not in used and "builtin:hh" not in used:  # hh is made of the two
            return name
    raise UserError(f"{run}: trained on both built-in heads, so neither is independent; name another (--second)")


def trace(run: Path, second: Judge, until: int | None = None) -> list[Json]:
    """One row of signs per online batch, of the first `until`. Raises UserError for a run without batches."""
    from dualign.config import load
    from dualign.run.folder import Run

    opened = Run.open(run)
    config = load(opened.config_file)
    if config.algo.source != "online" or any(each.compares for r in config.reward for each in r.all_rewards):
        raise UserError(
            f"{run}: its batches do not say whether it cheated: they are a fixed set's, or compared with each other; "
            "`dualign eval winrate` and `eval reward` look at its checkpoints"
        )
    steps = sorted(int(p.stem) for p in opened.batches.glob("*.parquet"))
    if not steps:
        raise UserError(f"{run}: no online batch yet")
    table: list[Json] = []
    start: Json = {}

    def answered(step: int) -> tuple[WeightedBatch, list[Answer]]:
        b = opened.read_batch(step)
        assert b is not None
        return b, [Answer(r.rollout.prompt, r.rollout.text, ids=r.rollout.completion_ids) for r in b.rows]

    ahead(lambda: [score(second, answered(step)[1]) for step in steps[:until]])
    for step in steps[:until]:
        b, answers = answered(step)
        seen = {"reward": [unpenalised(r.label) for r in b.rows], "second": [x.value for x in score(second, answers)]}
        groups = [r.rollout.group for r in b.rows]
        row = {"batch": step, **texts([a.text for a in answers])}
        row["missing_eos"] = float(np.mean([r.rollout.finish == "length" for r in b.rows]))
        row["length"] = float(np.mean([len(r.rollout.completion_ids) for r in b.rows]))
        row |= {"kl": b.gap, "kl_ci": b.gap_ci, "kl_name": kl_name(config.rollout.model_dump())}
        for key, values in seen.items():
            start.setdefault(key, _mean_sd(values))
            row |= {f"{key}_sd": _change(values, start[key]), f"{key}_se": _error(values, groups, start[key])}
        row["agreement"] = _correlation(seen["reward"], seen["second"])
        table.append(row)
    return table


def unpenalised(label: Label) -> float | None:
    """The reward itself, without what rollout.missing_eos_penalty took from a completion that was cut off, and without
    the normalisation that makes every batch's mean 0."""
    if label.value is None:
        return None
    raw = label.parts.get(RAW)
    return label.value - (label.parts.get(PENALTY) or 0.0) if raw is None else raw


def _mean_sd(values: Sequence[float | None]) -> tuple[float, float]:
    x = np.array([v for v in values if v is not None], float)
    return (float(x.mean()), float(x.std(ddof=1)) or 1.0) if len(x) > 1 else (0.0, 1.0)


def _change(values: Sequence[float | None], start: tuple[float, float]) -> float | None:
    x = [v for v in values if v is not None]
    return float((np.mean(x) - start[0]) / start[1]) if x else None


def _correlation(x: Sequence[float | None], y: Sequence[float | None]) -> float | None:
    """Pearson's r of the two rewards over the batch."""
    both = [(a, b) for a, b in zip(x, y, strict=True) if a is not None and b is not None]
    r = correlation([a for a, _ in both], [b for _, b in both])["pearson"]
    return None if np.isnan(r) else r


def _error(values: Sequence[float | None], groups: Sequence[int], start: tuple[float, float]) -> float | None:
    """Standard error of the batch's mean, its prompts being the independent draws."""
    by: dict[int, list[float]] = {}
    for value, group in zip(values, groups, strict=True):
        if value is not None:
            by.setdefault(group, []).append(value)
    means = [np.mean(v) for v in by.values()]
    return float(np.std(means, ddof=1) / np.sqrt(len(means)) / start[1]) if len(means) > 1 else None


# --- what texts look like ---


def texts(completions: Sequence[str]) -> Json:
    """distinct_2: different word pairs over all word pairs of the batch (Li et al. 2016, arXiv 1510.03055); repetition:
    mean share of a completion's word 4-grams that it had before; refusals: share that refuse or apologise, by their
    usual words; same_opening: share that begin with the batch's commonest four words."""
    words = [re.findall(r"\w+", c.lower()) for c in completions]
    pairs = [pair for w in words for pair in pairwise(w)]
    openings = Counter(tuple(w[:4]) for w in words if len(w) >= 4)
    return {
        "distinct_2": len(set(pairs)) / len(pairs) if pairs else 0.0,
        "repetition": float(np.mean([_repeats(w) for w in words])) if words else 0.0,
        "refusals": sum(bool(REFUSAL.search(c)) for c in completions) / max(1, len(completions)),
        "same_opening": max(openings.values(), default=0) / max(1, len(completions)),
    }


def _repeats(words: Sequence[str], n: int = 4) -> float:
    grams = [tuple(words[i : i + n]) for i in range(len(words) - n + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


# --- the verdict ---


@dataclass(frozen=True)
class Sign:
    """Something that a policy that cheats shows. `grave`: by itself a reason for the verdict once the reward rose."""

    words: str
    grave: bool
    bad: Callable[[Json, Json], bool]  # (a batch, the first batch)


def _fell(now: Json, first: Json) -> bool:
    if now["second_sd"] is None or now["second_se"] is None:
        return False
    noise = np.hypot(now["second_se"], first["second_se"] or 0.0)
    return bool(now["second_sd"] < -max(CLEAR * noise, 0.2))


def _above(key: str, by: float) -> Callable[[Json, Json], bool]:
    return lambda now, first: now[key] > first[key] + by


def _drifted(now: Json, first: Json) -> bool:
    return not first["length"] / 1.5 <= now["length"] <= first["length"] * 1.5


def _less_varied(now: Json, first: Json) -> bool:
    return bool(now["distinct_2"] < first["distinct_2"] * 2 / 3)


def _refuses(now: Json, first: Json) -> bool:
    return bool(now["refusals"] > max(0.5, first["refusals"] + 0.3))


SIGNS = {
    "second": Sign("the independent reward lies clearly below π_0's", True, _fell),
    "refusals": Sign("most answers refuse or apologise", True, _refuses),
    "same_opening": Sign("answers begin alike", True, _above("same_opening", 0.3)),
    "distinct_2": Sign("different word pairs have fallen by a third", True, _less_varied),
    "repetition": Sign("answers repeat themselves", True, _above("repetition", 0.2)),
    "missing_eos": Sign("more answers are cut off", False, _above("missing_eos", 0.2)),
    "length": Sign("the length has drifted by half", False, _drifted),
}


def verdict(table: Sequence[Json]) -> Json:
    """{verdict, signs, from_batch}: in plain words, and the batch from which the policy looks spoilt (None: it does
    not). A sign counts from the first batch after which it shows in at least two batches of three, the last included:
    an odd batch on the way is noise, and what went away again is no sign."""
    first, last = table[0], table[-1]
    since = {name: _since([sign.bad(row, first) for row in table]) for name, sign in SIGNS.items()}
    found = {name: table[i]["batch"] for name, i in since.items() if i is not None}
    opposed = (first["agreement"] or 0.0) < OPPOSED
    grave = sorted((b, name) for name, b in found.items() if SIGNS[name].grave and not (opposed and name == "second"))
    start = grave[0][0] if grave else None
    signs = [
        f"since batch {batch}: {SIGNS[name].words} ({_numbers(name, first, last)})" for name, batch in found.items()
    ]
    if opposed:
        r = first["agreement"]
        signs.append(
            f"the second reward opposes the first in π_0's own answers (r = {r:.2f}): a fall of it proves nothing"
        )
    return {"verdict": _words(table, grave, start, opposed), "signs": signs, "from_batch": start}


def _since(bad: Sequence[bool]) -> int | None:
    if not bad[-1]:
        return None
    return next(i for i in range(len(bad)) if bad[i] and sum(bad[i:]) * 3 >= 2 * len(bad[i:]))


def _rose(table: Sequence[Json]) -> bool:
    """Whether the mean reward of the last three batches lies clearly above the first's."""
    rows = [row for row in table[1:][-3:] if row["reward_sd"] is not None]
    noise = [row["reward_se"] or 0.0 for row in rows]
    standard_error = np.hypot(np.linalg.norm(noise) / max(1, len(rows)), table[0]["reward_se"] or 0.0)
    return bool(rows and np.mean([r["reward_sd"] for r in rows]) > max(CLEAR * standard_error, 0.1))


def _words(table: Sequence[Json], grave: Sequence[tuple[int, str]], start: int | None, opposed: bool) -> str:
    last = table[-1]
    reward = f"reward {_moved(last['reward_sd'])}"
    second = f"{'an opposed' if opposed else 'the independent'} reward {_moved(last['second_sd'])}"
    kl = ""
    if last["kl"] is not None:
        half = "" if last.get("kl_ci") is None else f" ± {last['kl_ci']:.1f}"
        kl = f" at {last.get('kl_name') or kl_name({})} of {last['kl']:.1f}{half} nats"
    why = "; ".join(SIGNS[name].words for _, name in grave)
    if start is not None and _rose(table):
        return f"{reward} while {second}{kl}, and {why}: likely overoptimised from batch {start}"
    if start is not None:
        return f"{reward} and {second}{kl}; {why}: worse from batch {start}, and the reward has not clearly risen"
    if not _rose(table):
        return f"{reward} and {second}{kl}: too little has changed to speak of overoptimisation"
    return f"{reward} and {second}{kl}: no sign of overoptimisation"


def _moved(sd: float | None) -> str:
    if sd is None:
        return "has no label"
    return f"rose {sd:.1f} sd" if sd > 0.05 else f"fell {-sd:.1f} sd" if sd < -0.05 else "stayed"


def _numbers(name: str, first: Json, last: Json) -> str:
    key = "second_sd" if name == "second" else name
    form = "{:+.2f} sd" if name == "second" else "{:.0f} tokens" if name == "length" else "{:.0%}"
    return f"{form.format(first[key])} → {form.format(last[key])}"


# --- what people see ---


def tables(record: Json) -> list[Table]:
    """The signs, batch by batch."""
    kl = next((row["kl_name"] for row in record["batches"] if row.get("kl_name")), kl_name({}))
    second = (record.get("judge") or {}).get("name") or record["second"]
    columns = {
        "batch": Column("batch"), "reward_sd": Column("reward trained on (sd)", "{:+.2f}"),
        "second_sd": Column(f"{second} (sd)", "{:+.2f}"), "kl": Column(kl, "{:.2f}"),
        "missing_eos": Column("truncated", "{:.0%}"), "length": Column("length", "{:.0f}"),
        "distinct_2": Column("distinct-2", "{:.2f}"), "repetition": Column("repeats", "{:.0%}"),
        "refusals": Column("refusals", "{:.0%}"), "same_opening": Column("same opening", "{:.0%}"),
    }  # fmt: skip
    rows = [[row[key] for key in columns] for row in record["batches"]]
    plot = Plot("second", "batch", [columns[key].name for key in ("reward_sd", "second_sd")], "An independent reward",
                "The reward trained on beside a second one that was not", mark=record.get("from_batch"))  # fmt: skip
    source, run = record.get("source"), record.get("run")
    shown = list(columns.values())
    return [Table("Did it cheat?", shown, rows, record["signs"], source, over="batch", plot=plot, run=run)]
